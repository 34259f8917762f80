"""Losses on what comes before a ReLU: on which side of its boundary a neuron lies, and how far beyond.

The layers to name are those before the activation, such as a batch norm, so that maps (N, C, H, W) have both signs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks, layers
from kd.losses.layers import Layers, Shapes


def ab(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """How far the student is from `margin` on the teacher's side of 0, squared: sum over N, times 3/1000.

    Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons" (2019);
    HobbitLong/RepDistiller, distiller_zoo/AB.py.

    Args:
        student: maps (N, C, H, W) before their ReLU.
        teacher: maps of the same width before theirs.
        margin: above 0.

    Raises:
        BadValue: if the margin is not a finite number above 0.
        InputError: if one is no map or empty, or batch or width differ.

    >>> ab(torch.tensor([[[[-1.0, 2.0]]]]), torch.tensor([[[[1.0, -1.0]]]]))  # (2² + 3²) · 0.003
    tensor(0.0390)
    """
    margin = checks.positive("margin", margin)
    student, teacher = (checks.widened(m) for m in layers.maps(student, teacher, widths=False))
    on = teacher > 0
    beyond = torch.where(on, (margin - student).clamp(min=0), (student + margin).clamp(min=0))
    return beyond.square().sum() / len(student) * 3 / 1000


def ofd(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Squared difference to the teacher's maps, which end at `margin` below, where it counts: sum over N.

    It does not count where the teacher is not above 0 and the student not above the teacher.

    Heo et al., "A Comprehensive Overhaul of Feature Distillation" (2019); clovaai/overhaul-distillation,
    CIFAR-100/distiller.py.

    Args:
        student: maps (N, C, H, W) before their ReLU.
        teacher: maps of the same width before theirs.
        margin: (C,), below 0: `expected_below`.

    Raises:
        InputError: if one is no map or empty, or batch or width differ.

    >>> ofd(torch.tensor([[[[-3.0, 2.0]]]]), torch.tensor([[[[-4.0, 1.0]]]]), torch.tensor([-1.0]))
    tensor(1.)
    """
    student, teacher = (checks.widened(m) for m in layers.maps(student, teacher, widths=False))
    if margin.shape != teacher.shape[1:2]:
        raise InputError(
            f"maps of {teacher.shape[1]} channels and margins of shape {tuple(margin.shape)} do not fit; one margin a "
            "channel was meant"
        )
    teacher = torch.maximum(teacher, margin.to(teacher.dtype)[:, None, None])
    counts = (student > teacher) | (teacher > 0)
    return ((student - teacher).square() * counts).sum() / len(student)


def expected_below(mean: Tensor, deviation: Tensor) -> Tensor:
    """What a Gaussian is expected to be where it is below 0; -3 deviations where that is rarer than 1 in 1000.

    Args:
        mean: of any shape.
        deviation: of the same shape.

    >>> expected_below(torch.tensor([0.0, 9.0]), torch.tensor([1.0, 1.0]))  # -√(2/π)
    tensor([-0.7979, -3.0000])
    """
    deviation = deviation.clamp(min=1e-12)
    way = mean / deviation
    below = torch.special.ndtr(-way)
    density = (-way.square() / 2).exp() / math.sqrt(2 * math.pi)
    often = below > 1e-3
    return torch.where(often, mean - deviation * density / torch.where(often, below, 1.0), -3 * deviation)


class AB(nn.Module):
    """`ab` as a term's loss: the last of several layers counts once, each before it half of the next.

    A trained 1x1 convolution and batch norm lead to the teacher's width where it differs. The authors use this loss
    alone, to initialise the student; here it is a term like any other.

    >>> loss = AB()
    >>> loss.bind((8, 3, 4, 4), (8, 5, 4, 4))
    >>> loss(student=torch.randn(8, 3, 4, 4), teacher=torch.randn(8, 5, 4, 4)).shape
    torch.Size([])
    """

    READS = "maps"

    extra_repr = checks.shown("margin")

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = checks.positive("margin", margin)
        self.connectors = layers.Connectors("ab", _where_wider)

    def bind(self, student_shape: Shapes, teacher_shape: Shapes) -> None:
        """Make the connectors, as `layers.Connectors` does."""
        self.connectors.bind(student_shape, teacher_shape)

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for maps as bound, any batch size."""
        found = self.connectors(student, teacher)
        return _halved([ab(s, t, self.margin) for s, t in found])


class OFD(nn.Module):
    """`ofd` as a term's loss: the last of several layers counts once, each before it half of the next.

    The student's maps go through a trained 1x1 convolution and batch norm. The margin of a channel is what a Gaussian
    of its mean and deviation in this batch is expected to be below 0; the authors read both from the teacher's batch
    norm, which says the same of all batches. Theirs keeps that norm in training mode; here the teacher never leaves
    evaluation.

    >>> loss = OFD()
    >>> loss.bind((8, 3, 4, 4), (8, 5, 4, 4))
    >>> loss(student=torch.randn(8, 3, 4, 4), teacher=torch.randn(8, 5, 4, 4)).shape
    torch.Size([])
    """

    READS = "maps"

    def __init__(self) -> None:
        super().__init__()
        self.connectors = layers.Connectors("ofd", layers.normed)

    def bind(self, student_shape: Shapes, teacher_shape: Shapes) -> None:
        """Make the connectors, as `layers.Connectors` does."""
        self.connectors.bind(student_shape, teacher_shape)

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for maps as bound, any batch size."""
        parts = []
        for s, t in self.connectors(student, teacher):
            wide = checks.widened(t)
            variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
            parts.append(ofd(s, t, expected_below(mean, variance.sqrt())))
        return _halved(parts)


def _where_wider(student: int, teacher: int) -> nn.Module | None:
    return None if student == teacher else layers.normed(student, teacher)


def _halved(parts: list[Tensor]) -> Tensor:
    """The sum of the layers, the last once and each before it half of the next."""
    return layers.summed([part / 2 ** (len(parts) - 1 - i) for i, part in enumerate(parts)])
