"""KDCL: what several nets that learn together make of their logits, for each of them to learn from.

Guo et al., "Online Knowledge Distillation via Collaborative Learning" (2020), section 3.2, has four ways; there is no
code of the authors'. The list of teachers is the circle's: the learner's own logits stand among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import InputError
from kd.losses import checks
from kd.losses.ensemble import Teachers, _against, _heat, _listed, _Mixed
from kd.losses.mixing import mixture, stacked

_HALVINGS, _ROUNDS = 24, 8


def best_logits(teachers: Sequence[Tensor], target: Tensor) -> Tensor:
    """For each sample the logits (N, C) of the net with the smallest cross-entropy: KDCL-Naive.

    Args:
        teachers: K times logits (N, C).
        target: class indices (N,).

    Raises:
        InputError: if there is no net, shapes differ, or a label is no class.

    >>> best_logits([torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])], torch.tensor([1]))
    tensor([[0., 1.]])
    """
    every = stacked(teachers)
    losses = _losses(every, target)
    return every.gather(0, losses.argmin(dim=0)[None, :, None].expand(1, *every.shape[1:])).squeeze(0)


def linear_logits(teachers: Sequence[Tensor], target: Tensor) -> Tensor:
    """For each sample the convex combination of the nets' logits (N, C) of least cross-entropy: KDCL-Linear.

    The problem is convex; it is solved by moving weight between two nets at a time, each time by bisection.

    Args:
        teachers: K times logits (N, C).
        target: class indices (N,).

    Raises:
        InputError: if there is no net, shapes differ, or a label is no class.

    >>> two = [torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0]])]
    >>> linear_logits(two, torch.tensor([0])).round(decimals=4)
    tensor([[0., 1., 1.]])
    """
    every = stacked(teachers)
    target = checks.labels(target, every[0])
    count = len(every)
    # A common shift of a net's logits is none of the loss's: the label's own is made 0.
    shifted = every - every.gather(2, target[None, :, None].expand(count, -1, 1))
    weights = every.new_full((count, every.shape[1]), 1 / count)
    for _ in range(_ROUNDS if count > 2 else 1):
        for one in range(count):
            for other in range(one + 1, count):
                weights = _balanced(shifted, weights, one, other)
    return (weights[..., None] * every).sum(dim=0)


def _balanced(shifted: Tensor, weights: Tensor, one: int, other: int) -> Tensor:
    """The weights (K, N) with those of two nets at their best, their sum kept."""
    total = weights[one] + weights[other]
    rest = (weights[..., None] * shifted).sum(0) - weights[one, :, None] * shifted[one]
    rest = rest - weights[other, :, None] * shifted[other]
    step = shifted[one] - shifted[other]
    low, high = torch.zeros_like(total), total.clone()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        at = rest + middle[:, None] * shifted[one] + (total - middle)[:, None] * shifted[other]
        slope = (at.softmax(dim=1) * step).sum(dim=1)
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    best = (low + high) / 2
    found = weights.clone()
    found[one], found[other] = best, total - best
    return found


def min_logits(teachers: Sequence[Tensor], target: Tensor) -> Tensor:
    """For each class the smallest, over the nets, of its logit less the label's (N, C): KDCL-MinLogit.

    The label keeps 0, and no class has more against it than the most certain net gives.

    Args:
        teachers: K times logits (N, C).
        target: class indices (N,).

    Raises:
        InputError: if there is no net, shapes differ, or a label is no class.

    >>> min_logits([torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[2.0, 1.0, -4.0]])], torch.tensor([0]))
    tensor([[ 0., -2., -6.]])
    """
    every = stacked(teachers)
    target = checks.labels(target, every[0])
    own = every.gather(2, target[None, :, None].expand(len(every), -1, 1))
    return (every - own).amin(dim=0)


def generalisation_weights(teachers: Sequence[Tensor], target: Tensor) -> Tensor:
    """Weights (K,) of the nets by how their errors on held-out samples go together: KDCL-General.

    With C the mean over the samples of the inner products of two nets' errors (probabilities less the label's), the
    weights are C⁻¹1 / 1ᵀC⁻¹1: those of the least squared error of the weighted mean. Perrone and Cooper, "When
    Networks Disagree" (1993). Weights below 0 are made 0, and the rest scaled: the mean must be a distribution.

    Args:
        teachers: K times logits (N, C) on held-out samples.
        target: class indices (N,).

    Raises:
        InputError: if there is no net, shapes differ, or a label is no class.

    >>> knows_one = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    >>> generalisation_weights([knows_one, knows_one.flip(0)], torch.tensor([0, 0]))
    tensor([0.5000, 0.5000])
    """
    every = stacked(teachers).double()
    target = checks.labels(target, every[0])
    errors = every.softmax(dim=2) - F.one_hot(target, every.shape[2])
    together = torch.einsum("inc,jnc->ij", errors, errors) / every.shape[1]
    # Nets that err alike make C singular: a thousandth of its mean diagonal settles the tie by halves.
    floor = 1e-3 * together.diagonal().mean().clamp_min(1e-12)
    together = together + floor * torch.eye(len(every), dtype=together.dtype, device=together.device)
    solved = torch.linalg.solve(together, together.new_ones(len(every)))
    kept = solved.clamp_min(0)
    weights: Tensor = kept / kept.sum()
    return weights.to(torch.float32)


class Naive(_Mixed):
    """A loss against `best_logits` of the circle.

    Args:
        loss: called as `loss(student=…, teacher=…)`, with the `target=…` if it takes one.

    >>> from kd.losses.logits import LogitMSE
    >>> two = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> Naive(LogitMSE())(student=two[1], teacher=two, target=torch.tensor([1]))
    tensor(0.)
    """

    def forward(self, student: Tensor, teacher: Teachers, target: Tensor, **others: Any) -> Tensor:
        """The scalar for logits (N, C) of the student's, a list of the circle's, and class indices (N,)."""
        made = best_logits(_listed(student, teacher), target)
        return _against(self.loss, student, made, {"target": target, **others})


class Linear(_Mixed):
    """A loss against `linear_logits` of the circle.

    Args:
        loss: called as `loss(student=…, teacher=…)`, with the `target=…` if it takes one.

    >>> from kd.losses.logits import LogitMSE
    >>> one = torch.tensor([[3.0, 0.0]])
    >>> Linear(LogitMSE())(student=one, teacher=[one], target=torch.tensor([1]))
    tensor(0.)
    """

    def forward(self, student: Tensor, teacher: Teachers, target: Tensor, **others: Any) -> Tensor:
        """The scalar for logits (N, C) of the student's, a list of the circle's, and class indices (N,)."""
        made = linear_logits(_listed(student, teacher), target)
        return _against(self.loss, student, made, {"target": target, **others})


class MinLogit(_Mixed):
    """A loss against `min_logits` of the circle.

    Args:
        loss: called as `loss(student=…, teacher=…)`, with the `target=…` if it takes one.

    >>> from kd.losses.logits import SoftTargetKL
    >>> one = torch.tensor([[3.0, 0.0]])
    >>> MinLogit(SoftTargetKL(1.0))(student=one, teacher=[one], target=torch.tensor([1]))
    tensor(0.)
    """

    def forward(self, student: Tensor, teacher: Teachers, target: Tensor, **others: Any) -> Tensor:
        """The scalar for logits (N, C) of the student's, a list of the circle's, and class indices (N,)."""
        made = min_logits(_listed(student, teacher), target)
        return _against(self.loss, student, made, {"target": target, **others})


class General(_Mixed):
    """A loss against the `mixture` of the circle by `generalisation_weights`, found anew on each validation.

    Until the first one all weigh the same. The weights are in the checkpoint.

    Args:
        loss: called as `loss(student=…, teacher=…)`, with the `target=…` if it takes one.

    >>> from kd.losses.logits import SoftTargetKL
    >>> loss = General(SoftTargetKL(1.0))
    >>> two = [torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)]
    >>> loss.bind((1, 2), [(1, 2), (1, 2)])
    >>> loss(student=torch.tensor([[5.0, 3.0]]).log(), teacher=two).abs() < 1e-6
    tensor(True)
    """

    weights: Tensor
    JUDGES = True  # `judge` wants the circle's logits on the validation split

    def bind(self, student_shape: Any, teacher_shapes: Sequence[Any], *others: Any) -> None:
        """Make as many weights as there are nets, and let the loss make its parts; a second time it does nothing."""
        if not hasattr(self, "weights"):
            self.register_buffer("weights", torch.full((len(teacher_shapes),), 1 / len(teacher_shapes)))
        super().bind(student_shape, teacher_shapes, *others)

    def judge(self, teachers: Sequence[Tensor], target: Tensor) -> None:
        """Weigh the nets by their logits (N, C) on held-out samples.

        Raises:
            InputError: if there are others than were bound.
        """
        if not hasattr(self, "weights") or len(teachers) != len(self.weights):
            raise InputError(f"{len(teachers)} nets are judged; call bind with as many first")
        self.weights.copy_(generalisation_weights(teachers, target))

    def forward(self, student: Tensor, teacher: Teachers, **others: Any) -> Tensor:
        """The scalar for logits (N, C) of the student's and a list of the circle's.

        Raises:
            InputError: if `bind` was not called, or for others.
        """
        nets = _listed(student, teacher)
        if not hasattr(self, "weights") or len(nets) != len(self.weights):
            raise InputError(f"{len(nets)} nets are heard; call bind with as many first")
        made = mixture(nets, self.weights.to(student.dtype), _heat(None, self.loss))
        return _against(self.loss, student, made, others)


def _losses(every: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy of each net on each sample (K, N)."""
    target = checks.labels(target, every[0])
    return torch.stack([F.cross_entropy(logits, target, reduction="none") for logits in every])
