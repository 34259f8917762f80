"""Losses on logits: the label's cross-entropy, the teacher's softened distribution, and the logits themselves.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2. Both terms on softened
distributions carry temperature² here and nowhere else: the gradient of a softened distribution shrinks with
1/temperature², so alpha keeps its meaning while the temperature is swept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks


def cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the student's surprise at the labels, in nats.

    Args:
        student: logits (N, C).
        target: class indices (N,), integers.

    Raises:
        InputError: if shapes or types are others, or a label is no class of the student's.

    >>> import torch
    >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor(0.6931)
    """
    return F.cross_entropy(checks.logits("student", student), checks.labels(target, student))


def soft_target_kl(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """KL(teacher ‖ student) of the distributions at `temperature`, times temperature²: sum over classes, batch mean.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        temperature: divides both logits; above 0. A scalar tensor where it is learned.

    Raises:
        BadValue: if the temperature is a number and not a finite one above 0.
        InputError: if shapes differ or the batch is empty.

    >>> import torch
    >>> soft_target_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=1.0)
    tensor(0.3278)
    """
    temperature = temperature if isinstance(temperature, Tensor) else checks.positive("temperature", temperature)
    student, teacher = (F.log_softmax(z / temperature, dim=1) for z in checks.pair(student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def soft_target_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the student against the teacher at `temperature`, times temperature²: batch mean.

    It is `soft_target_kl` plus the teacher's entropy, so the student's gradient is the same and the value is not zero
    where both agree.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        temperature: divides both logits; above 0.

    Raises:
        BadValue: if the temperature is not a finite number above 0.
        InputError: if shapes differ or the batch is empty.

    >>> import torch
    >>> soft_target_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=1.0)
    tensor(0.6931)
    """
    temperature = checks.positive("temperature", temperature)
    student, teacher = (z / temperature for z in checks.pair(student, teacher))
    return F.cross_entropy(student, teacher.softmax(dim=1)) * temperature**2


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all elements of the squared difference of the logits.

    Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (2014), equation 2, there with the sum over classes.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).

    Raises:
        InputError: if shapes differ or the batch is empty.

    >>> logit_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(2.)
    """
    return F.mse_loss(*checks.pair(student, teacher))


def standardised(logits: Tensor) -> Tensor:
    """Each row less its mean, over its standard deviation (of a sample, C - 1) plus 1e-7.

    A row whose logits are all the same gives zeros, and a finite gradient: a net with a zeroed head begins there.

    Sun et al., "Logit Standardization in Knowledge Distillation" (2024); sunshangquan/logit-standardization-KD,
    mdistiller/distillers/KD.py.

    Args:
        logits: (N, C).

    Raises:
        InputError: if they are no logits of two classes or more.

    >>> standardised(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    tensor([[-1.0000,  0.0000,  1.0000],
            [ 0.0000,  0.0000,  0.0000]])
    """
    wide = checks.logits("student or teacher", logits)
    if wide.shape[1] < 2:
        raise InputError(f"logits of shape {tuple(wide.shape)} have no spread; standardised logits need two classes")
    centred = wide - wide.mean(dim=1, keepdim=True)
    variance = centred.square().sum(dim=1, keepdim=True) / (wide.shape[1] - 1)
    # The root has no slope at 0: there the divisor is a constant, any of which leaves the row at 0.
    flat = variance == 0
    return centred / torch.where(flat, 1.0, torch.where(flat, 1.0, variance).sqrt() + 1e-7)


class CrossEntropy(nn.Module):
    """`cross_entropy` as a term's loss."""

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The scalar for logits (N, C) and class indices (N,)."""
        return cross_entropy(student, target)


class SoftTargetKL(nn.Module):
    """`soft_target_kl` as a term's loss.

    >>> SoftTargetKL(temperature=4)
    SoftTargetKL(temperature=4.0)
    """

    extra_repr = checks.shown("temperature")

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return soft_target_kl(student, teacher, self.temperature)


class SoftTargetCrossEntropy(nn.Module):
    """`soft_target_cross_entropy` as a term's loss.

    >>> SoftTargetCrossEntropy(temperature=4)
    SoftTargetCrossEntropy(temperature=4.0)
    """

    extra_repr = checks.shown("temperature")

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return soft_target_cross_entropy(student, teacher, self.temperature)


class LogitMSE(nn.Module):
    """`logit_mse` as a term's loss."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return logit_mse(student, teacher)


class Standardised(nn.Module):
    """Any loss on logits, given the `standardised` logits of student and teacher.

    Args:
        loss: called as `loss(student=…)` with the `teacher=…` and `target=…` that it is given.

    >>> logits = torch.tensor([[2.0, 4.0, 6.0]])
    >>> Standardised(SoftTargetKL(2.0))(student=logits, teacher=10 * logits)
    tensor(0.)
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def at(self, epoch: float, epochs: int) -> None:
        """Pass on where training stands, if the loss has a schedule."""
        if callable(schedule := getattr(self.loss, "at", None)):
            schedule(epoch, epochs)

    def forward(self, student: Tensor, teacher: Tensor, **others: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both; `target` goes through as it is."""
        found: Tensor = self.loss(student=standardised(student), teacher=standardised(teacher), **others)
        return found
