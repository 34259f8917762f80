"""What every loss refuses before it computes, and the precision it computes in."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kd.errors import InputError


class BadValue(InputError, ValueError):
    """A number outside its range: an `InputError` at the command line, a `ValueError` to Python callers."""


def positive(name: str, value: float) -> float:
    """`value` as a float, refused unless it is finite and above zero.

    Raises:
        BadValue: if it is zero, negative, infinite or not a number.

    >>> positive("temperature", 4)
    4.0
    >>> positive("temperature", 0)
    Traceback (most recent call last):
        ...
    kd.losses.checks.BadValue: temperature is 0; it must be a finite number above 0
    """
    if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
        raise BadValue(f"{name} is {value!r}; it must be a finite number above 0")
    return float(value)


def within(name: str, value: float, low: float = 0.0, high: float = math.inf) -> float:
    """`value` as a float, refused unless it is finite and from `low` to `high`, both included.

    Raises:
        BadValue: if it lies outside, or is infinite or not a number.

    >>> within("beta", 0, high=1)
    0.0
    >>> within("beta", 1.5, high=1)
    Traceback (most recent call last):
        ...
    kd.losses.checks.BadValue: beta is 1.5; it must be a finite number from 0 to 1
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value <= high):
        span = f"from {low:g} to {high:g}" if high < math.inf else f"of {low:g} or more"
        raise BadValue(f"{name} is {value!r}; it must be a finite number {span}")
    return float(value)


def whole(name: str, value: int) -> int:
    """`value`, refused unless it is a whole number of 1 or more.

    Raises:
        BadValue: if it is less, or no whole number.

    >>> whole("width", 128)
    128
    >>> whole("width", 0)
    Traceback (most recent call last):
        ...
    kd.losses.checks.BadValue: width is 0; it must be a whole number of 1 or more
    """
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise BadValue(f"{name} is {value!r}; it must be a whole number of 1 or more")
    return value


def logits(name: str, values: Tensor) -> Tensor:
    """`values` (N, C) in the precision to compute in, refused unless they are logits of a batch that is not empty.

    Raises:
        InputError: if they are no (N, C) of floats, or the batch is empty.

    >>> logits("student", torch.zeros(2, 3, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    if not floats(values) or values.ndim != 2:
        raise InputError(f"the {name}'s logits are {spelt(values)}; a loss on logits needs floats of shape (N, C)")
    if not values.numel():
        raise InputError(f"the {name}'s logits are {spelt(values)}: a batch without samples has no mean")
    return widened(values)


def pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits (N, C) in the precision to compute in.

    Raises:
        InputError: if one is no batch of logits, or samples or classes differ.

    >>> pair(torch.zeros(2, 10), torch.zeros(2, 100))
    Traceback (most recent call last):
        ...
    kd.errors.InputError: the student's logits have 10 classes and the teacher's 100; distil between nets of the same \
classes
    """
    wide = logits("student", student), logits("teacher", teacher)
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"the student's logits have {student.shape[1]} classes and the teacher's {teacher.shape[1]}; "
            "distil between nets of the same classes"
        )
    if len(student) != len(teacher):
        raise InputError(
            f"the student's logits are of {len(student)} samples and the teacher's of {len(teacher)}; "
            "both must see the same batch"
        )
    return wide


def labels(target: Tensor, student: Tensor) -> Tensor:
    """`target` (N,) as int64, refused unless it holds a class of the student's logits (N, C) for each sample.

    Raises:
        InputError: if shape or type are others, or a label is no class of the student's.

    >>> labels(torch.tensor([0, 3]), torch.zeros(2, 3))
    Traceback (most recent call last):
        ...
    kd.errors.InputError: a label is no class of the student's 3: they go from 0 to 3
    """
    if not whole_numbers(target) or target.shape != student.shape[:1]:
        raise InputError(
            f"the target is {spelt(target)}; logits of shape {tuple(student.shape)} need {len(student)} class indices"
        )
    # A GPU would have to be waited for at every step; there the index is checked by the kernel that uses it.
    if target.device.type == "cpu":
        low, high = (int(end) for end in target.aminmax())
        if low < 0 or high >= student.shape[1]:
            raise InputError(f"a label is no class of the student's {student.shape[1]}: they go from {low} to {high}")
    return target.long()


def labelled(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`pair` of both logits, and `labels` of the target.

    Raises:
        InputError: as those two.

    >>> labelled(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([1]))[2]
    tensor([1])
    """
    student, teacher = pair(student, teacher)
    return student, teacher, labels(target, student)


def is_label(logits: Tensor, target: Tensor) -> Tensor:
    """(N, C): true at each sample's label.

    >>> is_label(torch.zeros(1, 3), torch.tensor([1]))
    tensor([[False,  True, False]])
    """
    return torch.arange(logits.shape[1], device=logits.device) == target[:, None]


def two_classes(logits: Tensor) -> None:
    """Refuse logits (N, C) of one class, where a loss needs another beside the label.

    Raises:
        InputError: if C is 1.
    """
    if logits.shape[1] < 2:
        raise InputError(
            f"logits of shape {tuple(logits.shape)} have no class beside the label; two or more are needed"
        )


def rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, …) of both as (N, D) in the precision to compute in; each may have a width of its own.

    Raises:
        InputError: if one holds no floats or nothing, or they are of two batches.

    >>> first, second = rows(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5))
    >>> first.shape, second.shape
    (torch.Size([2, 48]), torch.Size([2, 5]))
    """
    for name, values in (("student", student), ("teacher", teacher)):
        if not floats(values) or values.ndim < 2 or not values.numel():
            raise InputError(
                f"the {name}'s features are {spelt(values)}; a loss on relations needs floats of shape (N, …), "
                "not empty"
            )
    if len(student) != len(teacher):
        raise InputError(
            f"the student's features are of {len(student)} samples and the teacher's of {len(teacher)}; "
            "both must see the same batch"
        )
    return widened(student.flatten(1)), widened(teacher.flatten(1))


def shown(*names: str) -> Callable[[nn.Module], str]:
    """An `extra_repr` that shows these attributes."""

    def extra_repr(module: nn.Module) -> str:
        return ", ".join(f"{name}={getattr(module, name)!r}" for name in names)

    return extra_repr


def exactly(values: Tensor) -> torch.autocast:
    """A context without autocast on the device of `values`, for products of matrices that half precision would spoil.

    >>> with torch.autocast("cpu", torch.bfloat16), exactly(torch.zeros(1)):
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    return torch.autocast(values.device.type, enabled=False)


def widened(values: Tensor) -> Tensor:
    """`values` in float32 where they were in half precision, else as they are.

    A sum over classes or positions in bfloat16 keeps two or three digits.
    """
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def floats(values: object) -> bool:
    """Whether these are a tensor of real numbers that a gradient can be taken of.

    >>> floats(torch.zeros(2)), floats(torch.arange(2)), floats([torch.zeros(2)])
    (True, False, False)
    """
    return isinstance(values, Tensor) and values.is_floating_point()


def whole_numbers(values: object) -> bool:
    """Whether these are a tensor of integers; booleans are none.

    >>> whole_numbers(torch.arange(2)), whole_numbers(torch.zeros(2)), whole_numbers(torch.ones(2) > 0)
    (True, False, False)
    """
    if not isinstance(values, Tensor) or values.dtype == torch.bool:
        return False
    return not values.is_floating_point() and not values.is_complex()


def spelt(values: object) -> str:
    """What was given, for a message.

    >>> spelt(torch.zeros(2, 3)), spelt([torch.zeros(2)]), spelt(None)
    ('float32 of shape (2, 3)', 'a list of 1', 'nothing')
    """
    if isinstance(values, Tensor):
        return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"
    if isinstance(values, list | tuple):
        return f"a list of {len(values)}"
    return "nothing" if values is None else f"of type {type(values).__name__}"
