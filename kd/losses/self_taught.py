"""Losses without another network as the teacher: smoothed labels, and a student that is its own or an earlier self.

Each function names its paper and the code whose numbers it gives; weights of a term stand in the config, not here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks
from kd.losses.logits import soft_target_kl
from kd.losses.ranks import by_rank
from kd.losses.rising import risen
from kd.losses.slopes import with_gradients


def label_smoothing(student: Tensor, target: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy against the label with a share of its certainty spread over all classes, itself included.

    Batch mean. At 0 it is the cross-entropy.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7.

    Args:
        student: logits (N, C).
        target: class indices (N,).
        smoothing: the share, 0 to 1.

    Raises:
        BadValue: if the share is out of its range.
        InputError: if shapes or types are others, or a label is no class.

    >>> label_smoothing(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))  # softplus(-1) + 0.05 · 1
    tensor(0.3633)
    """
    smoothing = checks.within("smoothing", smoothing, high=1.0)
    wide = checks.logits("student", student)
    return F.cross_entropy(wide, checks.labels(target, student), label_smoothing=smoothing)


def tfkd_reg(student: Tensor, target: Tensor, temperature: float = 20.0, correct: float = 0.99) -> Tensor:
    """KL(u ‖ student) with u a made-up teacher that is always right: mean over batch and classes, no temperature².

    u is the softmax of a *probability* vector over `temperature`, `correct` at the label and the rest spread evenly;
    the student is not softened.

    Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization" (2020);
    yuanli2333/Teacher-free-Knowledge-Distillation, my_loss_function.py, loss_kd_regularization.

    Args:
        student: logits (N, C).
        target: class indices (N,).
        temperature: divides the made-up probabilities; above 0.
        correct: the made-up probability of the label, 0 to 1.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes or types are others, a label is no class, or there is one class only.

    >>> tfkd_reg(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), temperature=1.0, correct=1.0)  # tanh(½) / 2
    tensor(0.2311)
    """
    temperature = checks.positive("temperature", temperature)
    correct = checks.within("correct", correct, high=1.0)
    wide = checks.logits("student", student)
    target = checks.labels(target, student)
    classes = wide.shape[1]
    checks.two_classes(wide)
    rest = (1 - correct) / (classes - 1)
    teacher = torch.full_like(wide, rest).scatter(1, target[:, None], correct)
    goal = (teacher / temperature).log_softmax(dim=1)
    return F.kl_div(wide.log_softmax(dim=1), goal, reduction="batchmean", log_target=True) / classes


def tfkd_self(student: Tensor, teacher: Tensor, temperature: float = 20.0) -> Tensor:
    """`soft_target_kl` over the number of classes: mean over batch and classes, times temperature².

    The teacher is the same architecture, trained before.

    Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization" (2020);
    yuanli2333/Teacher-free-Knowledge-Distillation, my_loss_function.py, loss_kd_self.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        temperature: divides both logits; above 0.

    Raises:
        BadValue: if the temperature is not a finite number above 0.
        InputError: if shapes differ or the batch is empty.

    >>> tfkd_self(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=1.0)
    tensor(0.1639)
    """
    return soft_target_kl(student, teacher, temperature) / student.shape[1]


def pskd(student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 0.8) -> Tensor:
    """Cross-entropy against (1 - alpha) of the label and alpha of an earlier self's probabilities: batch mean.

    At 0 it is the cross-entropy with the label, and nothing of the earlier self, NaN included, reaches it.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets" (2021); lgcnsai/PS-KD-Pytorch,
    loss/pskd_loss.py and main.py.

    Args:
        student: logits (N, C).
        teacher: logits (N, C) that the student itself gave for these samples one epoch ago.
        target: class indices (N,).
        alpha: share of the earlier self, 0 to 1.

    Raises:
        BadValue: if the share is out of its range.
        InputError: if shapes differ, the batch is empty, or a label is no class.

    >>> pskd(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.tensor([0]), alpha=0.5)  # softplus(-1) + ¼ · 1
    tensor(0.5633)
    """
    alpha = checks.within("alpha", alpha, high=1.0)
    student, teacher = checks.pair(student, teacher)
    hard = F.cross_entropy(student, checks.labels(target, student))
    if not alpha:
        return hard
    return (1 - alpha) * hard + alpha * F.cross_entropy(student, teacher.softmax(dim=1))


def uskd(
    student: Tensor, weak: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005
) -> Tensor:
    """The label softened by the student's own belief, the other classes by Zipf's law in the order of two rankings.

    Sum of three batch means: alpha times the cross-entropy at the label weighed by p_y² + 1 - mean(p_y²); beta times
    the cross-entropy of the other classes among themselves against 1/rank, normalised; mu times the cross-entropy of
    `weak` against 0.9 of the label and 0.1 spread over all classes. Classes are ranked by the sum of weak probabilities
    over 1 - w_y + 1e-6 and, as in the authors' code, the student's *log*-probabilities over 1 - log p_y + 1e-6. Weights
    and ranks are constants to the gradient, and there is no second derivative.

    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation" (2023); yzd-v/cls_KD,
    mmcls/models/dis_losses/uskd.py.

    Args:
        student: logits (N, C).
        weak: logits (N, C) of a classifier on an earlier layer of the student.
        target: class indices (N,).
        alpha: weight of the label.
        beta: weight of the other classes.
        mu: weight of the weak classifier's own cross-entropy.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes differ, the batch is empty, a label is no class, or there is one class only.

    >>> uskd(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))  # (1 + 0.005) ln 2
    tensor(0.6966)
    """
    alpha, beta, mu = (checks.within(n, v) for n, v in (("alpha", alpha), ("beta", beta), ("mu", mu)))
    student, weak = checks.pair(student, weak)
    target = checks.labels(target, student)[:, None]
    count, classes = student.shape
    checks.two_classes(student)
    with torch.no_grad():
        label = student.gather(1, target)
        masked = student.scatter(1, target, -1e30)
        among = masked.softmax(dim=1)  # the other classes' probabilities among themselves
        rest = _total(masked, among)
        surprise = F.softplus(rest - label)  # at the label
        square = (-2 * surprise).exp()
        certainty = square + 1 - square.mean()
        chances = weak.softmax(dim=1)
        score = (student - (label + surprise)).div_(1 + surprise + 1e-6)
        score.addcdiv_(chances, 1 - chances.gather(1, target) + 1e-6)
        zipf = by_rank(score, 1 / torch.arange(1, classes + 1, device=score.device, dtype=score.dtype))
        zipf.scatter_(1, target, 0.0)
        share = 1 / zipf.sum(dim=1, keepdim=True)
        doubt = rest - share * torch.linalg.vecdot(zipf, student, dim=1)[:, None]
        smooth = _total(weak, chances) - 0.9 * weak.gather(1, target) - 0.1 * weak.mean(dim=1, keepdim=True)
        value = (alpha * certainty * surprise + beta * doubt + mu * smooth).mean()
        # Each cross-entropy's gradient is the probabilities less the goal.
        away = alpha * certainty * torch.sigmoid(rest - label)
        pull = among.mul_((away + beta) / count).addcmul_(zipf, share, value=-beta / count)
        pull.scatter_(1, target, -away / count)
        at_label = (chances.gather(1, target) - 0.9 - 0.1 / classes) * (mu / count)
        weak_pull = chances.sub_(0.1 / classes).mul_(mu / count).scatter_(1, target, at_label)
    return with_gradients(value, (student, pull), (weak, weak_pull))


def _total(logits: Tensor, probabilities: Tensor) -> Tensor:
    """(N, 1) logarithm of the sum of the exponentials, from what a softmax made of them."""
    return logits.amax(dim=1, keepdim=True) - probabilities.amax(dim=1, keepdim=True).log()


class LabelSmoothing(nn.Module):
    """`label_smoothing` as a term's loss."""

    extra_repr = checks.shown("smoothing")

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        self.smoothing = checks.within("smoothing", smoothing, high=1.0)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The scalar for logits (N, C) and class indices (N,)."""
        return label_smoothing(student, target, self.smoothing)


class TfKDReg(nn.Module):
    """`tfkd_reg` as a term's loss."""

    extra_repr = checks.shown("temperature", "correct")

    def __init__(self, temperature: float = 20.0, correct: float = 0.99) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)
        self.correct = checks.within("correct", correct, high=1.0)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The scalar for logits (N, C) and class indices (N,)."""
        return tfkd_reg(student, target, self.temperature, self.correct)


class TfKDSelf(nn.Module):
    """`tfkd_self` as a term's loss."""

    extra_repr = checks.shown("temperature")

    def __init__(self, temperature: float = 20.0) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return tfkd_self(student, teacher, self.temperature)


class PSKD(nn.Module):
    """`pskd` as a term's loss, trusting the earlier self more from epoch to epoch: in the n-th of E, alpha · n / E.

    Before `at` is called it trusts it by alpha.

    >>> loss = PSKD(alpha=0.8)
    >>> loss.at(epoch=4.5, epochs=10)  # within the fifth
    >>> loss.share
    0.4
    """

    extra_repr = checks.shown("alpha")

    def __init__(self, alpha: float = 0.8) -> None:
        super().__init__()
        self.alpha = checks.within("alpha", alpha, high=1.0)
        self.share = self.alpha

    def at(self, epoch: float, epochs: int) -> None:
        """Set the share for where training stands: `epoch` of `epochs` are done."""
        self.share = self.alpha * risen(epoch, epochs)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The scalar for logits (N, C) now, logits (N, C) one epoch ago, and class indices (N,)."""
        return pskd(student, teacher, target, self.share)


class USKD(nn.Module):
    """`uskd` with the weak classifier that it trains: a linear layer on an earlier layer's features.

    Maps (N, D, H, W) are averaged over their positions. `bind` makes the layer from the shapes of both; it is trained
    and checkpointed with the objective and never shipped with the student.

    >>> loss = USKD()
    >>> loss.bind((8, 10), (8, 16, 7, 7))
    >>> loss.weak
    Linear(in_features=16, out_features=10, bias=True)
    """

    weak: nn.Module | None
    extra_repr = checks.shown("alpha", "beta", "mu")

    def __init__(self, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005) -> None:
        super().__init__()
        self.alpha, self.beta = checks.within("alpha", alpha), checks.within("beta", beta)
        self.mu = checks.within("mu", mu)
        self.register_module("weak", None)

    def bind(self, student_shape: tuple[int, ...], feature_shape: tuple[int, ...]) -> None:
        """Make the weak classifier, drawing its weights from the global generator; a second time it does nothing.

        Raises:
            InputError: if the first is no shape of logits, or the second none of maps or vectors.
        """
        if len(student_shape) != 2 or len(feature_shape) not in (2, 4):
            raise InputError(
                f"uskd cannot classify features of shape {tuple(feature_shape)} like logits of shape "
                f"{tuple(student_shape)}; choose a layer that gives maps (N, D, H, W) or vectors (N, D)"
            )
        if self.weak is None:
            self.weak = nn.Linear(feature_shape[1], student_shape[1])

    def forward(self, student: Tensor, feature: Tensor, target: Tensor) -> Tensor:
        """The scalar for logits (N, C), features as bound, and class indices (N,).

        Raises:
            InputError: if `bind` was not called, or the features are of another width.
        """
        if not isinstance(self.weak, nn.Linear):
            raise InputError("uskd is used before it knows its shapes; call bind(student_shape, feature_shape) first")
        student = checks.logits("student", student)
        fits = checks.floats(feature) and feature.ndim in (2, 4) and feature.numel()
        if not fits or feature.shape[1] != self.weak.in_features or feature.shape[:1] != student.shape[:1]:
            raise InputError(
                f"the feature is {checks.spelt(feature)} beside logits of shape {tuple(student.shape)}; uskd was bound "
                f"to width {self.weak.in_features}, as many samples, in floats"
            )
        vectors = feature.mean(dim=(2, 3)) if feature.ndim == 4 else feature
        return uskd(student, self.weak(vectors), target, self.alpha, self.beta, self.mu)
