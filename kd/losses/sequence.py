"""Losses on tokens: divergences of two distributions over a vocabulary, averaged over the tokens that count.

All functions here take logits of `student` and `teacher`, (N, C) or (B, L, C), which `temperature`, above 0, divides;
which position predicts which token is the task's to arrange. `target`, (N,) or (B, L), says which tokens count: labels,
of which -100 does not, or a mask that is true where one does. Without it all do; if none does, the loss is 0. Where a
number is out of its range they raise `BadValue`, where shapes or types differ or there is no token `InputError`. All is
computed in pieces (`kd.losses.tokens`): a vocabulary is too wide to keep its distributions for a gradient.

A class whose logit is -inf on either side (a padded vocabulary, a banned token) adds nothing. The teacher gets no
gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kd.losses import checks
from kd.losses.likeliest import TopKKL as TopKKL  # hashed configs name it as it stands here
from kd.losses.tokens import Pointwise, check_pair, kl, token_mean, without_bars


def forward_kl(student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) at `temperature`, times temperature²: the student covers all that the teacher would say.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015); jongwooko/distillm,
    distillm/losses.py, forward_kl, whose value is larger by the teacher's entropy: there it is a cross-entropy.

    >>> forward_kl(torch.zeros(2, 2), torch.tensor([[2.0, 0.0], [9.0, 0.0]]), torch.tensor([1, -100]))
    tensor(0.3278)
    """
    temperature = checks.positive("temperature", temperature)
    return temperature**2 * _mean(kl, student, teacher, target, temperature)


def reverse_kl(student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ teacher) at `temperature`, times temperature²: the student says nothing that the teacher would not.

    Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (2024); jongwooko/distillm,
    distillm/losses.py, reverse_kl.

    >>> reverse_kl(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))
    tensor(0.3278)
    """
    temperature = checks.positive("temperature", temperature)
    return temperature**2 * _mean(_reversed, student, teacher, target, temperature)


def symmetric_kl(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0, balance: float = 0.5
) -> Tensor:
    """(1 - balance) of `forward_kl` and `balance` of `reverse_kl`; at 0 and at 1 one of them alone.

    Jeffreys, "An invariant form for the prior probability in estimation problems" (1946); jongwooko/distillm,
    distillm/losses.py, symmetric_kl.

    `balance` is the share of the reverse KL, 0 to 1.

    >>> symmetric_kl(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))  # (0.3278 + 0.4338) / 2
    tensor(0.3808)
    """
    temperature, balance = checks.positive("temperature", temperature), checks.within("balance", balance, high=1.0)
    if balance in (0, 1):
        return (reverse_kl if balance else forward_kl)(student, teacher, target, temperature)

    def each(s: Tensor, t: Tensor) -> Tensor:
        return (1 - balance) * kl(s, t) + balance * kl(t, s)

    return temperature**2 * _mean(each, student, teacher, target, temperature)


def generalised_jsd(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """The sum of beta · KL(teacher ‖ m) and (1 - beta) · KL(student ‖ m), m = beta · teacher + (1 - beta) · student.

    No temperature². At 0 it is the forward KL and at 1 the reverse, in place of the limits, which are 0. Beta is the
    share of the *teacher*; other code gives the same name to the student's.

    Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (2024);
    huggingface/trl, trl/experimental/gkd/gkd_trainer.py.

    `beta` is the teacher's share in m, 0 to 1.

    >>> generalised_jsd(torch.tensor([[0.0, 99.0]]), torch.tensor([[99.0, 0.0]]))  # nothing in common: ln 2
    tensor(0.6931)
    """
    temperature, beta = checks.positive("temperature", temperature), checks.within("beta", beta, high=1.0)
    if beta in (0, 1):
        return _mean(_reversed if beta else kl, student, teacher, target, temperature)

    def each(s: Tensor, t: Tensor) -> Tensor:
        mixed = _mixture(t, s, beta)
        return beta * kl(t=t, s=mixed) + (1 - beta) * kl(t=s, s=mixed)

    return _mean(each, student, teacher, target, temperature)


def skew_forward_kl(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """KL(teacher ‖ skew of the teacher and the rest of the student), times temperature²; at 0 the forward KL.

    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (2024); jongwooko/distillm,
    distillm/losses.py, skewed_forward_kl, whose value is larger by the teacher's entropy.

    `skew` is the teacher's share in the second distribution, 0 to 1; at 1 there is nothing left to learn.

    >>> skew_forward_kl(torch.tensor([[0.0, 99.0]]), torch.tensor([[99.0, 0.0]]))  # -ln 0.1, where the KL is 99
    tensor(2.3026)
    """
    temperature, skew = checks.positive("temperature", temperature), checks.within("skew", skew, high=1.0)
    if not skew:
        return forward_kl(student, teacher, target, temperature)

    def each(s: Tensor, t: Tensor) -> Tensor:
        return kl(t=t, s=_mixture(t, s, skew))

    return temperature**2 * _mean(each, student, teacher, target, temperature)


def skew_reverse_kl(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """KL(student ‖ skew of the student and the rest of the teacher), times temperature²; at 0 the reverse KL.

    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (2024); jongwooko/distillm,
    distillm/losses.py, skewed_reverse_kl.

    `skew` is the student's share in the second distribution, 0 to 1; at 1 there is nothing left to learn.

    >>> skew_reverse_kl(torch.tensor([[0.0, 99.0]]), torch.tensor([[99.0, 0.0]]))
    tensor(2.3026)
    """
    temperature, skew = checks.positive("temperature", temperature), checks.within("skew", skew, high=1.0)
    if not skew:
        return reverse_kl(student, teacher, target, temperature)

    def each(s: Tensor, t: Tensor) -> Tensor:
        return kl(t=s, s=_mixture(s, t, skew))

    return temperature**2 * _mean(each, student, teacher, target, temperature)


def total_variation(student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Half the sum of the absolute differences of the probabilities, 0 to 1; no temperature².

    Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (2023); jongwooko/distillm,
    distillm/losses.py, tv_distance.

    >>> total_variation(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))  # 0.8808 - ½
    tensor(0.3808)
    """
    temperature = checks.positive("temperature", temperature)

    def each(s: Tensor, t: Tensor) -> Tensor:
        return (t.exp() - s.exp()).abs().sum(dim=-1) / 2

    return _mean(each, student, teacher, target, temperature)


class ForwardKL(nn.Module):
    """`forward_kl` as a term's loss."""

    extra_repr = checks.shown("temperature")

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The scalar for logits (N, C) or (B, L, C) of both, and labels or a mask."""
        return forward_kl(student, teacher, target, self.temperature)


class ReverseKL(nn.Module):
    """`reverse_kl` as a term's loss."""

    extra_repr = checks.shown("temperature")

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The scalar for logits (N, C) or (B, L, C) of both, and labels or a mask."""
        return reverse_kl(student, teacher, target, self.temperature)


class SymmetricKL(nn.Module):
    """`symmetric_kl` as a term's loss."""

    extra_repr = checks.shown("temperature", "balance")

    def __init__(self, temperature: float = 1.0, balance: float = 0.5) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)
        self.balance = checks.within("balance", balance, high=1.0)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The scalar for logits (N, C) or (B, L, C) of both, and labels or a mask."""
        return symmetric_kl(student, teacher, target, self.temperature, self.balance)


class GeneralisedJSD(nn.Module):
    """`generalised_jsd` as a term's loss."""

    extra_repr = checks.shown("temperature", "beta")

    def __init__(self, temperature: float = 1.0, beta: float = 0.5) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)
        self.beta = checks.within("beta", beta, high=1.0)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The scalar for logits (N, C) or (B, L, C) of both, and labels or a mask."""
        return generalised_jsd(student, teacher, target, self.temperature, self.beta)


class SkewForwardKL(nn.Module):
    """`skew_forward_kl` as a term's loss."""

    extra_repr = checks.shown("temperature", "skew")

    def __init__(self, temperature: float = 1.0, skew: float = 0.1) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)
        self.skew = checks.within("skew", skew, high=1.0)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The scalar for logits (N, C) or (B, L, C) of both, and labels or a mask."""
        return skew_forward_kl(student, teacher, target, self.temperature, self.skew)


class SkewReverseKL(nn.Module):
    """`skew_reverse_kl` as a term's loss."""

    extra_repr = checks.shown("temperature", "skew")

    def __init__(self, temperature: float = 1.0, skew: float = 0.1) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)
        self.skew = checks.within("skew", skew, high=1.0)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The scalar for logits (N, C) or (B, L, C) of both, and labels or a mask."""
        return skew_reverse_kl(student, teacher, target, self.temperature, self.skew)


class TotalVariation(nn.Module):
    """`total_variation` as a term's loss."""

    extra_repr = checks.shown("temperature")

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The scalar for logits (N, C) or (B, L, C) of both, and labels or a mask."""
        return total_variation(student, teacher, target, self.temperature)


# Divergences of log-probabilities (..., C): the second argument is the one whose expectation is taken.


def _reversed(s: Tensor, t: Tensor) -> Tensor:
    return kl(t, s)


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Log-probabilities of `share` of the first and the rest of the second."""
    if share == 1:
        return first
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _mean(each: Pointwise, student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float) -> Tensor:
    check_pair(student, teacher)

    def of_logits(s: Tensor, t: Tensor) -> Tensor:
        return each(*without_bars(*((z / temperature).log_softmax(dim=-1) for z in (s, t))))

    return token_mean(of_logits, student, (teacher,), target)
