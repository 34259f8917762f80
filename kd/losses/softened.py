"""Losses that soften the teacher's response in another way than by one fixed temperature: a power, or one learned.

Each function names its paper and the code whose numbers it gives; weights of a term stand in the config, not here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kd.losses import checks
from kd.losses.logits import soft_target_kl
from kd.losses.rising import risen


def ttm(student: Tensor, teacher: Tensor, gamma: float = 0.1) -> Tensor:
    """KL(q ‖ student) with q the teacher's probabilities to the power of gamma, normalised: batch mean.

    No temperature²: the power is a temperature of 1/gamma on the teacher alone, and the student is not softened.

    Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching" (2024); zkxufo/TTM,
    distiller_zoo/ttm.py.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        gamma: the power; above 0. At 1 this is the KL at temperature 1.

    Raises:
        BadValue: if gamma is not a finite number above 0.
        InputError: if shapes differ or the batch is empty.

    >>> ttm(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), gamma=1.0)
    tensor(0.3278)
    """
    return _transformed(student, teacher, gamma)[0].mean()


def wttm(student: Tensor, teacher: Tensor, gamma: float = 0.1) -> Tensor:
    """`ttm` with each sample weighed by the sum of the teacher's powered probabilities: more where it is less sure.

    Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching" (2024); zkxufo/TTM,
    distiller_zoo/wttm.py.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        gamma: the power; above 0. At 1 this is the KL at temperature 1.

    Raises:
        BadValue: if gamma is not a finite number above 0.
        InputError: if shapes differ or the batch is empty.

    >>> wttm(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), gamma=1.0)
    tensor(0.3278)
    """
    each, power = _transformed(student, teacher, gamma)
    return (power * each).mean()


class TTM(nn.Module):
    """`ttm` as a term's loss."""

    extra_repr = checks.shown("gamma")

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__()
        self.gamma = checks.positive("gamma", gamma)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return ttm(student, teacher, self.gamma)


class WTTM(nn.Module):
    """`wttm` as a term's loss."""

    extra_repr = checks.shown("gamma")

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__()
        self.gamma = checks.positive("gamma", gamma)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return wttm(student, teacher, self.gamma)


class LearnedTemperatureKL(nn.Module):
    """`soft_target_kl` at a temperature that is learned against the student: CTKD with its global temperature.

    The temperature is `low` + `span` · σ(theta), theta starting at 1 and trained with the student, but its gradient is
    multiplied by a factor that goes from `begin` to `end` along a half cosine over the first `epochs` epochs: from 0,
    where the temperature rests, to -1, where it climbs the loss. Before `at` is called the factor is `end`.

    Li et al., "Curriculum Temperature for Knowledge Distillation" (2023); zhengli97/CTKD, helper/loops.py and
    train_student.py.

    Args:
        low: the temperature's lower bound.
        span: how far above it the temperature may go.
        begin: the gradient's factor before the first epoch.
        end: the factor from the `epochs`-th epoch on; 1 would learn the temperature together with the student.
        epochs: over how many epochs it goes from the one to the other.

    >>> loss = LearnedTemperatureKL()
    >>> loss.temperature()
    tensor(15.6212, grad_fn=<AddBackward0>)
    >>> loss.at(epoch=4.0, epochs=240)  # the fifth is half of ten
    >>> loss.factor
    -0.5
    """

    extra_repr = checks.shown("low", "span", "begin", "end", "epochs")

    def __init__(
        self, low: float = 1.0, span: float = 20.0, begin: float = 0.0, end: float = -1.0, epochs: float = 10.0
    ) -> None:
        super().__init__()
        self.low, self.span = checks.positive("low", low), checks.positive("span", span)
        self.begin, self.end = (checks.within(n, v, -math.inf) for n, v in (("begin", begin), ("end", end)))
        self.epochs = checks.positive("epochs", epochs)
        self.factor = self.end
        self.theta = nn.Parameter(torch.ones(()))

    def at(self, epoch: float, epochs: int) -> None:
        """Set the gradient's factor for where training stands: `epoch` epochs are done."""
        way = risen(epoch, self.epochs)
        self.factor = (math.cos(math.pi * way) + 1) / 2 * (self.begin - self.end) + self.end

    def temperature(self) -> Tensor:
        """The temperature as a scalar, whose gradient on theta is the factor's multiple."""
        theta = checks.widened(self.theta)
        fixed = theta.detach()
        return self.low + self.span * torch.sigmoid(fixed + self.factor * (theta - fixed))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return soft_target_kl(student, teacher, self.temperature())


def _transformed(student: Tensor, teacher: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """(N,) of KL(q ‖ student), and the sum of the teacher's probabilities to the power of gamma."""
    gamma = checks.positive("gamma", gamma)
    student, teacher = checks.pair(student, teacher)
    powered = gamma * teacher.log_softmax(dim=1)
    goal, given = powered.log_softmax(dim=1), student.log_softmax(dim=1)
    return (goal.exp() * (goal - given)).sum(dim=1), powered.logsumexp(dim=1).exp()
