"""ONE: several branches of one network, and the gated ensemble of them that teaches each.

Lan, Zhu and Gong, "Knowledge Distillation by On-the-Fly Native Ensemble" (2018); Lan1991Xu/ONE_NeurIPS2018,
cifar_one.py and loss/kl_loss.py, whose KL adds 1e-7 to each probability of the ensemble; here it is the KL itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks, layers
from kd.losses.layers import Layers, Shapes
from kd.losses.logits import soft_target_kl


def one(
    branches: Sequence[Tensor], ensemble: Tensor, target: Tensor, temperature: float = 3.0, share: float = 1.0
) -> Tensor:
    """Cross-entropy of each branch and of the ensemble, and `share` of the KL from the ensemble to each branch: a sum.

    Each part is a mean over the batch, T² inside the KL. The ensemble learns from the label alone: as a teacher it is a
    constant.

    Args:
        branches: logits (N, C) of each.
        ensemble: logits (N, C).
        target: class indices (N,).
        temperature: of the KL; above 0.
        share: from 0 to 1.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes differ, the batch is empty, or a label is no class.

    >>> import torch
    >>> one([torch.zeros(1, 2), torch.zeros(1, 2)], torch.zeros(1, 2), torch.tensor([0])) / 3
    tensor(0.6931)
    """
    share = checks.within("share", share, 0.0, 1.0)
    together = checks.logits("ensemble", ensemble)
    target = checks.labels(target, together)
    parts = [F.cross_entropy(together, target)]
    for branch in branches:
        logits, goal = checks.pair(branch, together.detach())
        parts.append(F.cross_entropy(logits, target) + share * soft_target_kl(logits, goal, temperature))
    return layers.summed(parts)


def sigmoid_rise(epoch: float, over: float) -> float:
    """exp(-5 (1 - t)²) at t = whole epochs done / `over`, at most 1; over 0, 1.

    Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning" (2017), as ONE's code ramps its KL up.

    >>> round(sigmoid_rise(0.0, 80), 4), round(sigmoid_rise(40.5, 80), 4), sigmoid_rise(80, 80), sigmoid_rise(0, 0)
    (0.0067, 0.2865, 1.0, 1.0)
    """
    return math.exp(-5.0 * (1.0 - min(math.floor(epoch) / over, 1.0)) ** 2) if over else 1.0


class ONE(nn.Module):
    """`one` as a term's loss: `student` is the list of branches, `feature` the ensemble.

    Args:
        temperature: of the KL.
        rampup: epochs over which the KL rises, by `sigmoid_rise`; 0: it weighs 1 from the start.

    >>> import torch
    >>> loss = ONE(rampup=80)
    >>> loss.at(0, 300)
    >>> loss(student=[torch.zeros(1, 2)], feature=torch.zeros(1, 2), target=torch.tensor([0])) / 2
    tensor(0.6931)
    """

    extra_repr = checks.shown("temperature", "rampup")

    def __init__(self, temperature: float = 3.0, rampup: float = 0.0) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)
        self.rampup = checks.within("rampup", rampup)
        self.share = sigmoid_rise(0.0, self.rampup)
        self.count: int | None = None

    def bind(self, student_shape: Shapes, feature_shape: Sequence[int]) -> None:
        """Remember how many branches there are: it is used on no other number.

        Raises:
            InputError: if they are fewer than two.
        """
        shapes = layers.each_shape(student_shape)
        if len(shapes) < 2:
            raise InputError(f"one needs two branches or more, and is given {len(shapes)}; name student.branches")
        self.count = len(shapes)

    def at(self, epoch: float, epochs: int) -> None:
        """Let the KL weigh what it does at this epoch."""
        self.share = sigmoid_rise(epoch, self.rampup)

    def forward(self, student: Layers, feature: Tensor, target: Tensor) -> Tensor:
        """The scalar for the branches' logits, those of the ensemble (N, C), and class indices (N,).

        Raises:
            InputError: if there are more or fewer branches than were bound.
        """
        branches = layers.listed(student)
        if not branches or self.count not in (None, len(branches)):
            raise InputError(f"one was bound to {self.count or 'some'} branches and is given {len(branches)}")
        return one(branches, feature, target, self.temperature, self.share)
