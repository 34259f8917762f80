"""Losses on logits: the label's cross-entropy and the teacher's softened distribution.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2. Both teacher terms carry
temperature² here and nowhere else: the gradient of a softened distribution shrinks with 1/temperature², so alpha keeps
its meaning while the temperature is swept.
"""

from __future__ import annotations

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
    wide = checks.logits("student", student)
    if target.shape != student.shape[:1] or target.is_floating_point():
        raise InputError(
            f"the target is {str(target.dtype).removeprefix('torch.')} of shape {tuple(target.shape)}; "
            f"logits of shape {tuple(student.shape)} need {len(student)} class indices"
        )
    try:
        return F.cross_entropy(wide, target.long())
    except IndexError as error:  # the CPU kernel looks; to look on a GPU would stop it at every step
        raise InputError(f"a label is no class of the student's {student.shape[1]} ({error})") from error


def soft_target_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of the distributions at `temperature`, times temperature²: sum over classes, batch mean.

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        temperature: divides both logits; above 0.

    Raises:
        BadValue: if the temperature is not a finite number above 0.
        InputError: if shapes differ or the batch is empty.

    >>> import torch
    >>> soft_target_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=1.0)
    tensor(0.3278)
    """
    temperature = checks.positive("temperature", temperature)
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

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return soft_target_kl(student, teacher, self.temperature)

    def extra_repr(self) -> str:
        """What stands between the brackets when it is printed."""
        return f"temperature={self.temperature}"


class SoftTargetCrossEntropy(nn.Module):
    """`soft_target_cross_entropy` as a term's loss.

    >>> SoftTargetCrossEntropy(temperature=4)
    SoftTargetCrossEntropy(temperature=4.0)
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both."""
        return soft_target_cross_entropy(student, teacher, self.temperature)

    def extra_repr(self) -> str:
        """What stands between the brackets when it is printed."""
        return f"temperature={self.temperature}"
