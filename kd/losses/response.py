"""Losses that take the teacher's response apart, weigh it by sample, or compare how it relates classes and samples.

Each function names its paper and the code whose numbers it gives; weights of a term stand in the config, not here.
Where a distribution leaves the label out, its probabilities are those of the other classes among themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks
from kd.losses.exits import OFA as OFA
from kd.losses.logits import soft_target_kl
from kd.losses.products import product_gaps
from kd.losses.rising import risen
from kd.losses.softened import TTM as TTM
from kd.losses.softened import WTTM as WTTM
from kd.losses.softened import LearnedTemperatureKL as LearnedTemperatureKL

# OFA, TTM, WTTM and the learned temperature are at home in files of their own; hashed configs name them as here.


def dkd(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """The KL taken apart: alpha times that of label against rest, beta times that among the other classes.

    Each is a sum over its outcomes and a mean over the batch, times temperature².

    Zhao et al., "Decoupled Knowledge Distillation" (2022); megvii-research/mdistiller, mdistiller/distillers/DKD.py.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        target: class indices (N,).
        alpha: weight of the label against the rest (TCKD).
        beta: weight of the other classes among themselves (NCKD).
        temperature: divides both logits; above 0.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes differ, the batch is empty, a label is no class, or there is one class only.

    >>> dkd(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([0]), temperature=1.0)
    tensor(0.3278)
    """
    alpha, beta = checks.within("alpha", alpha), checks.within("beta", beta)
    temperature = checks.positive("temperature", temperature)
    student, teacher, target = checks.labelled(student, teacher, target)
    student, teacher = student / temperature, teacher / temperature
    others = [_without_label(z, target) for z in (student, teacher)]
    total = student.new_zeros(())
    if alpha:
        s, t = (_label_and_rest(*pair, target) for pair in zip((student, teacher), others, strict=True))
        total = total + alpha * F.kl_div(s, t, reduction="batchmean", log_target=True)
    if beta:
        s, t = (z.log_softmax(dim=1) for z in others)
        total = total + beta * F.kl_div(s, t, reduction="batchmean", log_target=True)
    return total * temperature**2


def nkd(student: Tensor, teacher: Tensor, target: Tensor, gamma: float = 1.5, temperature: float = 1.0) -> Tensor:
    """Cross-entropy at the label weighed by the teacher's belief in it, plus gamma times that among the other classes.

    The first part is at temperature 1, the second at `temperature` and times temperature². Batch mean; not zero where
    both agree.

    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation" (2023); yzd-v/cls_KD,
    mmcls/models/dis_losses/nkd.py.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        target: class indices (N,).
        gamma: weight of the other classes.
        temperature: divides both logits in the second part; above 0.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes differ, the batch is empty, a label is no class, or there is one class only.

    >>> nkd(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))  # ½ ln 2, and one other class has no choice
    tensor(0.3466)
    """
    gamma = checks.within("gamma", gamma)
    temperature = checks.positive("temperature", temperature)
    student, teacher, target = checks.labelled(student, teacher, target)
    surprise, doubt = (F.cross_entropy(z, target, reduction="none") for z in (student, teacher.detach()))
    total = (doubt.neg().exp() * surprise).mean()
    if gamma:
        s, t = (_without_label(z / temperature, target).log_softmax(dim=1) for z in (student, teacher))
        total = total - gamma * temperature**2 * torch.linalg.vecdot(t.exp(), s, dim=1).mean()
    return total


def wsld(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """Cross-entropy against the teacher at `temperature`, each sample weighed by how much worse the student knows it.

    The weight is 1 - exp(-CE_s / (CE_t + 1e-7)) of the cross-entropies with the label, and a constant to the gradient.
    Times temperature²; batch mean; not zero where both agree.

    Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective" (2021);
    yzd-v/cls_KD, mmcls/models/dis_losses/wsld.py.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        target: class indices (N,).
        temperature: divides both logits; above 0.

    Raises:
        BadValue: if the temperature is not a finite number above 0.
        InputError: if shapes differ, the batch is empty, or a label is no class.

    >>> wsld(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), temperature=1.0)  # (1 - 1/e) ln 2
    tensor(0.4382)
    """
    temperature = checks.positive("temperature", temperature)
    student, teacher, target = checks.labelled(student, teacher, target)
    surprise = [F.cross_entropy(z.detach(), target, reduction="none") for z in (student, teacher)]
    weight = -torch.expm1(-surprise[0] / (surprise[1] + 1e-7))
    each = F.cross_entropy(student / temperature, (teacher / temperature).softmax(dim=1), reduction="none")
    return (weight * each).mean() * temperature**2


def dist(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> Tensor:
    """1 - Pearson's correlation of the distributions: beta times over each sample's classes, gamma over each class's.

    Mean over samples and mean over classes, each times temperature² as in the authors' code; 1e-8 in the divisor.

    Huang et al., "Knowledge Distillation from A Stronger Teacher" (2022); open-mmlab/mmrazor,
    mmrazor/models/losses/dist_loss.py.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        beta: weight of the relation between classes, sample by sample.
        gamma: weight of the relation within a class, over the batch.
        temperature: divides both logits; above 0.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes differ or the batch is empty.

    >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    >>> round(dist(logits, logits).item(), 4), round(dist(logits, logits.flip(0)).item(), 4)
    (0.0, 3.3355)
    """
    beta, gamma = checks.within("beta", beta), checks.within("gamma", gamma)
    temperature = checks.positive("temperature", temperature)
    student, teacher = ((z / temperature).softmax(dim=1) for z in checks.pair(student, teacher))
    even = 1 / student.shape[1]  # the mean of a row
    between = 1 - _correlation(student - even, teacher - even, dim=1).mean()
    within = 1 - _correlation(student - student.mean(dim=0), teacher - teacher.mean(dim=0), dim=0).mean()
    return (beta * between + gamma * within) * temperature**2


def mlkd(
    student: Tensor,
    teacher: Tensor,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    keep: float | None = 0.5,
) -> Tensor:
    """At each temperature: the KL times temperature², and how the class and the sample correlations differ.

    With P the (N, C) probabilities, these are the squared differences of PᵀP over C and of PPᵀ over N, summed. As in
    the authors' code the masks do not choose rows: KL and sample part are scaled by the share of samples, the class
    part by the share of classes, whose confidence in the teacher (at temperature 1) is at most the `keep` quantile.

    Jin, Wang and Lin, "Multi-Level Logit Distillation" (2023); Jin-Ying/Multi-Level-Logit-Distillation,
    mdistiller/distillers/KD_ours.py, its weakly augmented half. There the other half reads two of its temperatures from
    the weak view and drops its class part; here each temperature reads the views that it is given.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        temperatures: each divides both logits; above 0.
        keep: the quantile, 0 to 1; None for no shares, as for the strongly augmented half.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if there is no temperature, shapes differ or the batch is empty.

    >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    >>> mlkd(logits, logits), mlkd(logits, logits.flip(0)) > 0
    (tensor(0.), tensor(True))
    """
    if not temperatures:
        raise InputError("mlkd has no temperature; give one or more, such as [2, 3, 4, 5, 6]")
    temperatures = [checks.positive("temperature", temperature) for temperature in temperatures]
    student, teacher = checks.pair(student, teacher)
    samples = classes = student.new_ones(())
    if keep is not None:
        quantile = checks.within("keep", keep, high=1.0)
        belief = teacher.detach().softmax(dim=1)
        samples, classes = (_share(values, quantile) for values in (belief.amax(dim=1), belief.sum(dim=0)))
    total = student.new_zeros(())
    for temperature in temperatures:
        s, t = ((z / temperature).softmax(dim=1) for z in (student, teacher))
        by_sample, by_class = product_gaps(s, t)
        total = total + samples * (soft_target_kl(student, teacher, temperature) + by_sample / len(s))
        total = total + classes * by_class / s.shape[1]
    return total


class DKD(nn.Module):
    """`dkd` as a term's loss, rising linearly over the first epochs: the n-th epoch weighs n / warmup, at most 1.

    Before `at` is called it weighs 1.

    >>> loss = DKD(warmup=20)
    >>> loss.at(epoch=4.5, epochs=240)  # within the fifth
    >>> loss.factor
    0.25
    """

    extra_repr = checks.shown("alpha", "beta", "temperature", "warmup")

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, warmup: float = 20.0) -> None:
        super().__init__()
        self.alpha, self.beta = checks.within("alpha", alpha), checks.within("beta", beta)
        self.temperature = checks.positive("temperature", temperature)
        self.warmup = checks.within("warmup", warmup)
        self.factor = 1.0

    def at(self, epoch: float, epochs: int) -> None:
        """Set the weight for where training stands: `epoch` epochs are done."""
        self.factor = risen(epoch, self.warmup)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both and class indices (N,)."""
        return self.factor * dkd(student, teacher, target, self.alpha, self.beta, self.temperature)


class NKD(nn.Module):
    """`nkd` as a term's loss."""

    extra_repr = checks.shown("gamma", "temperature")

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.gamma, self.temperature = checks.within("gamma", gamma), checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both and class indices (N,)."""
        return nkd(student, teacher, target, self.gamma, self.temperature)


class WSLD(nn.Module):
    """`wsld` as a term's loss."""

    extra_repr = checks.shown("temperature")

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both and class indices (N,)."""
        return wsld(student, teacher, target, self.temperature)


class DIST(nn.Module):
    """`dist` as a term's loss."""

    COMPARES_SAMPLES = True

    extra_repr = checks.shown("beta", "gamma", "temperature")

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.beta, self.gamma = checks.within("beta", beta), checks.within("gamma", gamma)
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return dist(student, teacher, self.beta, self.gamma, self.temperature)


class MLKD(nn.Module):
    """`mlkd` as a term's loss."""

    COMPARES_SAMPLES = True

    extra_repr = checks.shown("temperatures", "keep")

    def __init__(self, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0), keep: float | None = 0.5) -> None:
        super().__init__()
        self.temperatures = [checks.positive("temperature", temperature) for temperature in temperatures]
        self.keep = None if keep is None else checks.within("keep", keep, high=1.0)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return mlkd(student, teacher, self.temperatures, self.keep)


def _without_label(logits: Tensor, target: Tensor) -> Tensor:
    """(N, C) logits with that of the label so low that its probability is 0, the logarithm of which stays finite.

    So neither a KL of two such, 0 · 0, nor a cross-entropy, 0 · -1e30, has anything of it.
    """
    checks.two_classes(logits)
    return logits.scatter(1, target[:, None], -1e30)


def _label_and_rest(logits: Tensor, others: Tensor, target: Tensor) -> Tensor:
    """(N, 2) log-probabilities of the label and of all else; in logs, as 1 - p would be 0 for a sure net."""
    return torch.stack([logits.gather(1, target[:, None])[:, 0], others.logsumexp(dim=1)], dim=1).log_softmax(dim=1)


def _correlation(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along an axis of two that have a mean of 0 along it."""
    lengths: Tensor = torch.linalg.vector_norm(first, dim=dim) * torch.linalg.vector_norm(second, dim=dim)
    found: Tensor = torch.linalg.vecdot(first, second, dim=dim)
    return found / (lengths + 1e-8)


def _share(values: Tensor, quantile: float) -> Tensor:
    return (values <= values.quantile(quantile)).to(values.dtype).mean()
