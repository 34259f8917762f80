"""Losses on features: a layer of the student learns to look like a layer of the teacher.

Romero et al., "FitNets: Hints for Thin Deep Nets" (2015); the projection and the reduction are those of the common
reference code (mdistiller's FitNet): 1x1 convolution, batch norm and ReLU, then the mean over all elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all elements of the squared difference of two features.

    Args:
        student: features of any shape, already projected to the teacher's.
        teacher: features of the same shape.

    Raises:
        InputError: if the shapes differ or hold nothing.

    >>> hint(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(2.)
    """
    if student.shape != teacher.shape or not student.numel():
        raise InputError(
            f"features of shape {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher) cannot be "
            "compared; they must be of the same shape and not empty"
        )
    return F.mse_loss(checks.widened(student), checks.widened(teacher))


class Hint(nn.Module):
    """`hint` behind a trained projection of the student's features to the teacher's width.

    Maps (N, C, H, W) go through 1x1 convolution, batch norm and ReLU, so the teacher's layer should be one after its
    own ReLU; vectors (N, D) and tokens (N, L, D) through a linear layer. Where two maps differ in height or width, the
    larger is averaged down to the smaller. `bind` makes the projection from the shapes of both; it is trained and
    checkpointed with the objective and never shipped with the student. Even equal widths are projected: the same
    features in another basis are not an error of the student's.

    >>> loss = Hint()
    >>> loss.bind((8, 16, 14, 14), (8, 64, 7, 7))
    >>> loss.projection[0]
    Conv2d(16, 64, kernel_size=(1, 1), stride=(1, 1), bias=False)
    >>> loss(student=torch.rand(8, 16, 14, 14), teacher=torch.rand(8, 64, 7, 7)).shape
    torch.Size([])
    """

    projection: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("projection", None)
        self._widths: tuple[int, int, int] | None = None

    def bind(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        """Make the projection, drawing its weights from the global generator; a second time it only checks.

        Args:
            student_shape: of the student's features, batch first.
            teacher_shape: of the teacher's features, batch first.

        Raises:
            InputError: if no projection leads from the one to the other.
        """
        student, teacher = tuple(student_shape), tuple(teacher_shape)
        if len(student) != len(teacher) or len(student) not in (2, 3, 4):
            raise InputError(
                f"a hint cannot lead from features of shape {student} to {teacher}; choose two layers that both give "
                "maps (N, C, H, W), tokens (N, L, D) or vectors (N, D)"
            )
        if len(student) == 3 and student[1] != teacher[1]:
            raise InputError(
                f"a hint cannot lead from {student[1]} tokens to {teacher[1]}; choose layers with as many of them"
            )
        axis = 1 if len(student) == 4 else -1
        widths = (len(student), student[axis], teacher[axis])
        if self._widths not in (None, widths):
            raise InputError(f"this hint is already bound to other shapes than {student} and {teacher}; make a new one")
        if self.projection is None:
            self.projection = _projection(*widths)
            self._widths = widths

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for features of the shapes that `bind` was given, any batch size.

        Raises:
            InputError: if `bind` was not called, or the features are others.
        """
        if self._widths is None or self.projection is None:
            raise InputError("a hint is used before it knows its shapes; call bind(student_shape, teacher_shape) first")
        rank, width, _ = self._widths
        if student.ndim != rank or student.shape[1 if rank == 4 else -1] != width or not student.numel():
            raise InputError(
                f"the student's features are of shape {tuple(student.shape)}; this hint was bound to {rank} axes "
                f"and width {width}"
            )
        if rank == 4 and teacher.ndim == 4:
            grid = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
            student, teacher = _averaged(student, grid), _averaged(teacher, grid)
        return hint(self.projection(student), teacher)


def _projection(rank: int, student: int, teacher: int) -> nn.Module:
    if rank < 4:
        return nn.Linear(student, teacher)
    return nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher), nn.ReLU())


def _averaged(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling to `grid`, as two products: on CUDA the gradient of torch's own is not deterministic."""
    if maps.shape[2:] == grid:
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
