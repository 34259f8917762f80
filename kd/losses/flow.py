"""Losses on the flow between layers: how one layer's channels go with those of the next, as in the teacher.

Each takes two layers or more of student and teacher, in their order, and adds up what it finds between each and the
next. Maps (N, C, H, W) must be as wide as the teacher's; the modules lead there with trained 1x1 convolutions where
they are not. Products are never computed in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks, layers
from kd.losses.checks import BadValue
from kd.losses.layers import Shapes


def fsp(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared difference of the flow matrices: mean over their elements and samples, summed over consecutive layers.

    A flow matrix is the product of two layers' channels, averaged over positions; the larger of the two maps is
    averaged down to the smaller.

    Yim et al., "A Gift from Knowledge Distillation" (2017); HobbitLong/RepDistiller, distiller_zoo/FSP.py.

    Args:
        student: maps (N, C, H, W), two layers or more.
        teacher: maps of the same widths.

    Raises:
        InputError: if there are fewer than two layers, one gives no maps, or samples or widths differ.

    >>> ones = torch.ones(1, 1, 2, 2)
    >>> fsp([ones, ones], [ones, 3 * ones])  # (1 - 3)²
    tensor(4.)
    """
    found = _checked(student, teacher)
    total = []
    for (s, t), (s_next, t_next) in pairwise(found):
        total.append(F.mse_loss(_flow(s, s_next), _flow(t, t_next)))
    return layers.summed(total)


def kdsvd(student: Sequence[Tensor], teacher: Sequence[Tensor], rank: int = 1, signs: str = "fixed") -> Tensor:
    """Squared difference of RBF similarities of consecutive layers' singular vectors: summed, mean over samples.

    Of each sample's maps as (positions, channels) the first `rank` right singular vectors are taken, each times the
    teacher's singular value over the L2 norm of them all. The teacher's are signed so that their elements add up to 0
    or more, where the published code leaves the sign to the library; the student's, of which three further ones may
    stand in where they lie closer, are signed like the teacher's. The similarity is exp(-difference² / 8) of any two
    channels. Where two singular values are the same, their vectors are any of a plane and give each other no gradient.

    Lee et al., "Self-supervised Knowledge Distillation Using Singular Value Decomposition" (2018);
    HobbitLong/RepDistiller, distiller_zoo/KDSVD.py.

    Args:
        student: maps (N, C, H, W), two layers or more.
        teacher: maps of the same widths.
        rank: vectors to take; 1 or more.
        signs: of the teacher's vectors: `fixed`, or `library` as the singular value decomposition happens to leave
            them, which is the published code, and may be another value under another library.

    Raises:
        BadValue: if the rank is no whole number of 1 or more, or the signs are none of these.
        InputError: if there are fewer than two layers, one gives no maps, or samples or widths differ.

    >>> maps = [torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)]
    >>> kdsvd(maps, maps)
    tensor(0.)
    """
    checks.whole("rank", rank)
    _known(signs)
    aligned = [_aligned(s, t, rank, signs) for s, t in _checked(student, teacher)]
    total = []
    for (s, t), (s_next, t_next) in pairwise(aligned):
        total.append((_likeness(s, s_next) - _likeness(t, t_next)).square().sum())
    return layers.summed(total) / len(student[0])


class FSP(nn.Module):
    """`fsp` as a term's loss.

    >>> loss = FSP()
    >>> loss.bind([(8, 3, 4, 4), (8, 4, 2, 2)], [(8, 5, 4, 4), (8, 4, 2, 2)])
    >>> len(list(loss.parameters()))  # only the first layer's widths differ
    1
    """

    READS = "maps"

    def __init__(self) -> None:
        super().__init__()
        self.connectors = layers.Connectors("fsp", layers.between)

    def bind(self, student_shape: Shapes, teacher_shape: Shapes) -> None:
        """Make the connectors, as `layers.Connectors` does, of two layers or more."""
        _two(len(layers.shapes(student_shape, teacher_shape)))
        self.connectors.bind(student_shape, teacher_shape)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The scalar for lists of maps as bound, any batch size."""
        found = self.connectors(student, teacher)
        return fsp([s for s, _ in found], [t for _, t in found])


class KDSVD(nn.Module):
    """`kdsvd` as a term's loss.

    >>> KDSVD().rank
    1
    """

    READS = "maps"

    COMPARES_SAMPLES = True

    extra_repr = checks.shown("rank", "signs")

    def __init__(self, rank: int = 1, signs: str = "fixed") -> None:
        super().__init__()
        self.rank, self.signs = checks.whole("rank", rank), _known(signs)
        self.connectors = layers.Connectors("kdsvd", layers.between)

    def bind(self, student_shape: Shapes, teacher_shape: Shapes) -> None:
        """Make the connectors, as `layers.Connectors` does, of two layers or more."""
        _two(len(layers.shapes(student_shape, teacher_shape)))
        self.connectors.bind(student_shape, teacher_shape)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The scalar for lists of maps as bound, any batch size."""
        found = self.connectors(student, teacher)
        return kdsvd([s for s, _ in found], [t for _, t in found], self.rank, self.signs)


class _Directions(torch.autograd.Function):
    """Right singular vectors (N, C, k) of (N, P, C) by falling singular value, and which of them have one above 0.

    torch's own gradient is NaN where two singular values are the same, and dead channels have several zeros.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
        values, vectors = values.flip(1), vectors.flip(2)
        ctx.save_for_backward(matrix, values, vectors)
        ctx.count = count
        found = values[:, :count] > 1e-12 * values[:, :1]
        ctx.mark_non_differentiable(found)
        return vectors[:, :, :count], found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        matrix, values, vectors = ctx.saved_tensors
        taken = values[:, None, : ctx.count]
        gap = taken - values[:, :, None]
        same = gap.abs() <= 1e-12 * values[:, :1, None].clamp(min=1e-30)
        turned = vectors.mT @ gradients[0] * torch.where(same, 0.0, 1 / torch.where(same, 1.0, gap))
        product = vectors @ turned @ vectors[:, :, : ctx.count].mT
        return matrix @ (product + product.mT), None


def _checked(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each layer of both on its common grid, wide."""
    found = layers.pairs(student, teacher)
    _two(len(found))
    both = [layers.maps(s, t, widths=False) for s, t in found]
    return [(checks.widened(s), checks.widened(t)) for s, t in both]


def _two(count: int) -> None:
    if count < 2:
        raise InputError("one layer has no flow to a next; name two or more of each, such as [student.a, student.b]")


def _flow(bottom: Tensor, top: Tensor) -> Tensor:
    """(N, D, C): products of the channels of two layers, averaged over positions."""
    bottom, top = layers.maps(bottom, top)
    with checks.exactly(top):
        flow: Tensor = top.flatten(2) @ bottom.flatten(2).mT
    return flow / bottom[0, 0].numel()


def _known(signs: str) -> str:
    if signs not in ("fixed", "library"):
        raise BadValue(f"signs is {signs!r}; fixed or library was meant")
    return signs


def _aligned(student: Tensor, teacher: Tensor, rank: int, signs: str) -> tuple[Tensor, Tensor]:
    """(N, C, k) of both: the teacher's vectors, and of the student's those that lie closest, signed alike."""
    ours, theirs = (m.flatten(2).mT.double() for m in (student, teacher))
    channels = theirs.shape[2]
    with checks.exactly(ours):
        # The teacher's are decomposed in float64 like the student's: half of the digits go into the square.
        values, vectors = torch.linalg.eigh(theirs.mT @ theirs)
        values, goal = values.flip(1)[:, :rank].clamp(min=0).sqrt(), vectors.flip(2)[:, :, :rank]
        # Either sign solves it, and which one comes is the library's choice.
        seen = goal
        if signs == "library":
            plain = torch.linalg.svd(teacher.flatten(2).mT, full_matrices=False).Vh[:, :rank].mT.to(goal.dtype)
            seen = F.pad(plain, (0, goal.shape[2] - plain.shape[2])) * goal
        goal = goal * torch.where(seen.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
        found, there = _Directions.apply(ours, min(rank + 3, channels))
        # Maps of fewer dimensions than channels leave vectors over that mean nothing.
        cosines = (found.mT @ goal).detach() * there[:, :, None]
        nearest = cosines.abs().argmax(dim=1, keepdim=True)
        turns = cosines.gather(1, nearest).sign()
        chosen = found.gather(2, nearest.expand(-1, channels, -1)) * turns
    scale = F.normalize(values, dim=1)[:, None]
    return (chosen * scale).to(student.dtype), (goal * scale).to(teacher.dtype)


def _likeness(first: Tensor, second: Tensor) -> Tensor:
    """(N, C, D, k)."""
    return (-(first[:, :, None] - second[:, None]).square() / 8).exp()
