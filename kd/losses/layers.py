"""What losses on layers share: lists of them, a common grid, and the trained connectors between two widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks

Layers = Tensor | Sequence[Tensor]
Shapes = Sequence[int] | Sequence[Sequence[int]]


def pairs(student: Layers, teacher: Layers) -> list[tuple[Tensor, Tensor]]:
    """The features of both, layer by layer; a tensor alone is a list of one.

    Raises:
        InputError: if one has more layers than the other, or there is none.

    >>> len(pairs([torch.zeros(1), torch.ones(1)], [torch.zeros(2), torch.ones(2)]))
    2
    """
    ours, theirs = listed(student), listed(teacher)
    _matched(len(ours), len(theirs))
    return list(zip(ours, theirs, strict=True))


def listed(features: Layers) -> list[Tensor]:
    """One layer, or a list of them, as a list.

    >>> len(listed(torch.zeros(1))), len(listed([torch.zeros(1), torch.zeros(2)]))
    (1, 2)
    """
    several: Any = features
    return list(several) if isinstance(several, list | tuple) else [several]


def shapes(student: Shapes, teacher: Shapes) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of both, layer by layer, as `bind` is given them.

    Raises:
        InputError: if one has more layers than the other, or there is none.

    >>> shapes((8, 3, 4, 4), [(8, 5, 2, 2)])
    [((8, 3, 4, 4), (8, 5, 2, 2))]
    """
    ours, theirs = each_shape(student), each_shape(teacher)
    _matched(len(ours), len(theirs))
    return list(zip(ours, theirs, strict=True))


def each_shape(given: Shapes) -> list[tuple[int, ...]]:
    """One shape, or a list of them, as a list.

    >>> each_shape((8, 3)), each_shape([(8, 3), (8, 5)])
    ([(8, 3)], [(8, 3), (8, 5)])
    """
    entries: list[Any] = list(given)
    return [tuple(entries)] if all(isinstance(entry, int) for entry in entries) else [tuple(e) for e in entries]


def maps(student: Tensor, teacher: Tensor, widths: bool = True) -> tuple[Tensor, Tensor]:
    """Both maps (N, C, H, W) on the smaller of the two grids, in the precision they have.

    Args:
        student: maps.
        teacher: maps of the same samples.
        widths: whether the two may differ in C.

    Raises:
        InputError: if one is no map of floats or is empty, or samples or, where they must not, widths differ.

    >>> first, second = maps(torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 4, 4))
    >>> first.shape, second.shape
    (torch.Size([2, 3, 4, 4]), torch.Size([2, 5, 4, 4]))
    """
    for name, values in (("student", student), ("teacher", teacher)):
        if not checks.floats(values) or values.ndim != 4 or not values.numel():
            raise InputError(
                f"the {name}'s features are {checks.spelt(values)}; a loss on maps needs floats of shape "
                "(N, C, H, W), not empty"
            )
    if len(student) != len(teacher):
        raise InputError(
            f"the student's maps are of {len(student)} samples and the teacher's of {len(teacher)}; "
            "both must see the same batch"
        )
    if not widths and student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"the student's maps have {student.shape[1]} channels and the teacher's {teacher.shape[1]}; "
            "bring them to one width first"
        )
    grid = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    with checks.exactly(student):
        return averaged(student, grid), averaged(teacher, grid)


def between(student: int, teacher: int) -> nn.Module | None:
    """A 1x1 convolution where the widths differ, else nothing.

    >>> between(4, 4) is None
    True
    """
    return None if student == teacher else nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False))


def normed(student: int, teacher: int) -> nn.Module:
    """A 1x1 convolution and batch norm, without activation: for targets before their ReLU.

    >>> len(normed(4, 4))
    2
    """
    return nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher))


class Connectors(nn.ModuleList):
    """One trained connector a layer, which leads from the student's channels to the teacher's.

    Losses that compare maps of two widths hold these; they are optimised and checkpointed with the objective and never
    shipped with the student.

    Args:
        loss: its name, for messages.
        make: from the student's channels and the teacher's to a connector; None where there is nothing to bridge.

    >>> connectors = Connectors("fsp", between)
    >>> connectors.bind((8, 3, 4, 4), (8, 5, 4, 4))
    >>> connectors[0][0]
    Conv2d(3, 5, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """

    def __init__(self, loss: str, make: Callable[[int, int], nn.Module | None]) -> None:
        super().__init__()
        self.loss, self.make = loss, make

    def bind(self, student: Shapes, teacher: Shapes) -> None:
        """Make them, drawing their weights from the global generator; a second time it does nothing.

        Args:
            student: shapes (N, C, H, W), one or a list.
            teacher: shapes (N, D, H, W), as many.

        Raises:
            InputError: if a shape is not that of maps, or one side has more layers.
        """
        made = []
        for ours, theirs in shapes(student, teacher):
            if len(ours) != 4 or len(theirs) != 4:
                raise InputError(
                    f"{self.loss} cannot lead from features of shape {ours} to {theirs}; choose two layers that both "
                    "give maps (N, C, H, W)"
                )
            made.append((ours[1], theirs[1]))
        if not len(self):
            self.extend(self.make(*widths) or nn.Identity() for widths in made)

    def forward(self, student: Layers, teacher: Layers) -> list[tuple[Tensor, Tensor]]:
        """Each layer's maps on their common grid, the student's through its connector.

        Raises:
            InputError: if `bind` was not called, or the maps are others than those bound.
        """
        found = [maps(ours, theirs) for ours, theirs in pairs(student, teacher)]
        if not len(self):
            raise InputError(
                f"{self.loss} is used before it knows its shapes; call bind(student_shape, teacher_shape) first"
            )
        if len(self) != len(found):
            raise InputError(f"{self.loss} was bound to {len(self)} layers and is given {len(found)}")
        for part, (ours, _) in zip(self, found, strict=True):
            taken = next((m.in_channels for m in part.modules() if isinstance(m, nn.Conv2d)), ours.shape[1])
            if taken != ours.shape[1]:
                raise InputError(f"the student's maps have {ours.shape[1]} channels; {self.loss} was bound to {taken}")
        return [(through(part, ours), theirs) for part, (ours, theirs) in zip(self, found, strict=True)]


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum of what each layer gives.

    >>> summed([torch.tensor(1.0), torch.tensor(2.0)])
    tensor(3.)
    """
    return torch.stack(list(parts)).sum()


def through(part: nn.Module, features: Tensor) -> Tensor:
    """What a trained part makes of features.

    Raises:
        InputError: if batch norm, in training, is given one number a channel.

    >>> through(nn.BatchNorm2d(3), torch.zeros(1, 3, 1, 1))
    Traceback (most recent call last):
        ...
    kd.errors.InputError: features of shape (1, 3, 1, 1) are one number a channel, of which batch norm can tell no \
deviation; take a batch of more samples, or a layer of more positions
    """
    try:
        found: Tensor = part(features)
    except ValueError as error:
        raise InputError(
            f"features of shape {tuple(features.shape)} are one number a channel, of which batch norm can tell no "
            "deviation; take a batch of more samples, or a layer of more positions"
        ) from error
    return found


def averaged(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling to `grid`, as two products: on CUDA the gradient of torch's own is not deterministic.

    >>> averaged(torch.tensor([[[[1.0, 3.0]]]]), (1, 1))
    tensor([[[[2.]]]])
    """
    if tuple(maps.shape[2:]) == grid:
        return maps
    rows, columns = (
        _windows(size, parts).to(maps.dtype).to(maps.device) for size, parts in zip(maps.shape[2:], grid, strict=True)
    )
    return rows @ maps @ columns.T


def _windows(size: int, parts: int) -> Tensor:
    """(parts, size): row i takes the mean of the i-th window of adaptive pooling.

    >>> _windows(4, 2)
    tensor([[0.5000, 0.5000, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    weights = torch.zeros(parts, size, dtype=torch.float64)
    for part in range(parts):
        window = slice(part * size // parts, -(-(part + 1) * size // parts))
        weights[part, window] = 1 / (window.stop - window.start)
    return weights


def _matched(student: int, teacher: int) -> None:
    if student != teacher or not student:
        raise InputError(
            f"the student has {student} layers and the teacher {teacher}; name as many of each, in the same order"
        )
