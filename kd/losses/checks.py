"""What every loss refuses before it computes, and the precision it computes in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def logits(name: str, values: Tensor) -> Tensor:
    """`values` (N, C) in the precision to compute in, refused unless they are logits of a batch that is not empty.

    Raises:
        InputError: if they are no (N, C) of floats, or the batch is empty.

    >>> logits("student", torch.zeros(2, 3, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    if values.ndim != 2 or not values.is_floating_point():
        raise InputError(f"the {name}'s logits are {_spelt(values)}; a loss on logits needs floats of shape (N, C)")
    if not values.numel():
        raise InputError(f"the {name}'s logits are {_spelt(values)}: a batch without samples has no mean")
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


def widened(values: Tensor) -> Tensor:
    """`values` in float32 where they were in half precision, else as they are.

    A sum over classes or positions in bfloat16 keeps two or three digits.
    """
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _spelt(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"
