"""Losses on tokens: divergences of two distributions over a vocabulary, averaged over the tokens that count.

Logits are (N, C) or (B, L, C); which position predicts which token is the task's to arrange. `target` says which tokens
count: labels, of which -100 does not, or a mask that is true where one does. Without it all do; if none does, the loss
is 0. All is computed in pieces (`kd.losses.tokens`): a vocabulary is too wide to keep its distributions for a gradient.

A class whose logit is -inf on either side (a padded vocabulary, a banned token) adds nothing. The teacher gets no
gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks
from kd.losses.tokens import Pointwise, check_pair, check_tokens, pieces, token_mean

_NOTHING = -1e4  # stands for log 0: its exponential is 0, and the difference of two of them too


def forward_kl(student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) at `temperature`, times temperature²: the student covers all that the teacher would say.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015); jongwooko/distillm,
    distillm/losses.py, forward_kl, whose value is larger by the teacher's entropy: there it is a cross-entropy.

    Args:
        student: logits (N, C) or (B, L, C).
        teacher: logits of the same shape.
        target: labels or a mask of shape (N,) or (B, L).
        temperature: divides both logits; above 0.

    Raises:
        BadValue: if the temperature is not a finite number above 0.
        InputError: if shapes or types differ, or there is no token.

    >>> forward_kl(torch.zeros(2, 2), torch.tensor([[2.0, 0.0], [9.0, 0.0]]), torch.tensor([1, -100]))
    tensor(0.3278)
    """
    temperature = checks.positive("temperature", temperature)
    return temperature**2 * _mean(_kl, student, teacher, target, temperature)


def reverse_kl(student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ teacher) at `temperature`, times temperature²: the student says nothing that the teacher would not.

    Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (2024); jongwooko/distillm,
    distillm/losses.py, reverse_kl.

    Args:
        student: logits (N, C) or (B, L, C).
        teacher: logits of the same shape.
        target: labels or a mask of shape (N,) or (B, L).
        temperature: divides both logits; above 0.

    Raises:
        BadValue: if the temperature is not a finite number above 0.
        InputError: if shapes or types differ, or there is no token.

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

    Args:
        student: logits (N, C) or (B, L, C).
        teacher: logits of the same shape.
        target: labels or a mask of shape (N,) or (B, L).
        temperature: divides both logits; above 0.
        balance: share of the reverse KL, 0 to 1.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes or types differ, or there is no token.

    >>> symmetric_kl(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))  # (0.3278 + 0.4338) / 2
    tensor(0.3808)
    """
    temperature, balance = checks.positive("temperature", temperature), checks.within("balance", balance, high=1.0)
    if balance in (0, 1):
        return (reverse_kl if balance else forward_kl)(student, teacher, target, temperature)

    def each(s: Tensor, t: Tensor) -> Tensor:
        return (1 - balance) * _kl(s, t) + balance * _kl(t, s)

    return temperature**2 * _mean(each, student, teacher, target, temperature)


def generalised_jsd(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """The sum of beta · KL(teacher ‖ m) and (1 - beta) · KL(student ‖ m), m = beta · teacher + (1 - beta) · student.

    No temperature². At 0 it is the forward KL and at 1 the reverse, in place of the limits, which are 0. Beta is the
    share of the *teacher*; other code gives the same name to the student's.

    Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (2024);
    huggingface/trl, trl/experimental/gkd/gkd_trainer.py.

    Args:
        student: logits (N, C) or (B, L, C).
        teacher: logits of the same shape.
        target: labels or a mask of shape (N,) or (B, L).
        temperature: divides both logits; above 0.
        beta: the teacher's share in m, 0 to 1.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes or types differ, or there is no token.

    >>> generalised_jsd(torch.tensor([[0.0, 99.0]]), torch.tensor([[99.0, 0.0]]))  # nothing in common: ln 2
    tensor(0.6931)
    """
    temperature, beta = checks.positive("temperature", temperature), checks.within("beta", beta, high=1.0)
    if beta in (0, 1):
        return _mean(_reversed if beta else _kl, student, teacher, target, temperature)

    def each(s: Tensor, t: Tensor) -> Tensor:
        mixed = _mixture(t, s, beta)
        return beta * _kl(t=t, s=mixed) + (1 - beta) * _kl(t=s, s=mixed)

    return _mean(each, student, teacher, target, temperature)


def skew_forward_kl(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """KL(teacher ‖ skew of the teacher and the rest of the student), times temperature²; at 0 the forward KL.

    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (2024); jongwooko/distillm,
    distillm/losses.py, skewed_forward_kl, whose value is larger by the teacher's entropy.

    Args:
        student: logits (N, C) or (B, L, C).
        teacher: logits of the same shape.
        target: labels or a mask of shape (N,) or (B, L).
        temperature: divides both logits; above 0.
        skew: the teacher's share in the second distribution, 0 to 1; at 1 there is nothing left to learn.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes or types differ, or there is no token.

    >>> skew_forward_kl(torch.tensor([[0.0, 99.0]]), torch.tensor([[99.0, 0.0]]))  # -ln 0.1, where the KL is 99
    tensor(2.3026)
    """
    temperature, skew = checks.positive("temperature", temperature), checks.within("skew", skew, high=1.0)
    if not skew:
        return forward_kl(student, teacher, target, temperature)

    def each(s: Tensor, t: Tensor) -> Tensor:
        return _kl(t=t, s=_mixture(t, s, skew))

    return temperature**2 * _mean(each, student, teacher, target, temperature)


def skew_reverse_kl(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """KL(student ‖ skew of the student and the rest of the teacher), times temperature²; at 0 the reverse KL.

    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (2024); jongwooko/distillm,
    distillm/losses.py, skewed_reverse_kl.

    Args:
        student: logits (N, C) or (B, L, C).
        teacher: logits of the same shape.
        target: labels or a mask of shape (N,) or (B, L).
        temperature: divides both logits; above 0.
        skew: the student's share in the second distribution, 0 to 1; at 1 there is nothing left to learn.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes or types differ, or there is no token.

    >>> skew_reverse_kl(torch.tensor([[0.0, 99.0]]), torch.tensor([[99.0, 0.0]]))
    tensor(2.3026)
    """
    temperature, skew = checks.positive("temperature", temperature), checks.within("skew", skew, high=1.0)
    if not skew:
        return reverse_kl(student, teacher, target, temperature)

    def each(s: Tensor, t: Tensor) -> Tensor:
        return _kl(t=s, s=_mixture(s, t, skew))

    return temperature**2 * _mean(each, student, teacher, target, temperature)


def total_variation(student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Half the sum of the absolute differences of the probabilities, 0 to 1; no temperature².

    Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (2023); jongwooko/distillm,
    distillm/losses.py, tv_distance.

    Args:
        student: logits (N, C) or (B, L, C).
        teacher: logits of the same shape.
        target: labels or a mask of shape (N,) or (B, L).
        temperature: divides both logits; above 0.

    Raises:
        BadValue: if the temperature is not a finite number above 0.
        InputError: if shapes or types differ, or there is no token.

    >>> total_variation(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))  # 0.8808 - ½
    tensor(0.3808)
    """
    temperature = checks.positive("temperature", temperature)

    def each(s: Tensor, t: Tensor) -> Tensor:
        return (t.exp() - s.exp()).abs().sum(dim=-1) / 2

    return _mean(each, student, teacher, target, temperature)


def top_k(teacher: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The teacher's k likeliest classes: their log-probabilities among all at `temperature`, and their indices.

    What a store of soft labels keeps where a whole vocabulary a token is too much.

    Args:
        teacher: logits (N, C) or (B, L, C).
        k: how many, 1 to C.
        temperature: divides the logits; above 0.

    Raises:
        BadValue: if k or the temperature is out of its range.
        InputError: if shape or type are others, or there is no token.

    >>> values, indices = top_k(torch.tensor([[0.0, 2.0, 1.0]]), k=2)
    >>> values.exp(), indices
    (tensor([[0.6652, 0.2447]]), tensor([[1, 2]]))
    """
    temperature, k = checks.positive("temperature", temperature), _count(k)
    check_tokens("teacher", teacher)
    if k > teacher.shape[-1]:
        raise checks.BadValue(f"k is {k!r}; there are {teacher.shape[-1]} classes")
    totals = checks.widened(teacher.new_empty(teacher.shape[:-1]))
    for at in pieces(teacher.shape):
        totals[at] = (checks.widened(teacher[at]) / temperature).logsumexp(dim=-1)
    values, indices = teacher.topk(k, dim=-1)
    return checks.widened(values) / temperature - totals[..., None], indices


def top_k_kl(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    target: Tensor | None = None,
    temperature: float = 1.0,
    tail: bool = False,
) -> Tensor:
    """The forward KL from a teacher of which only k classes a token are known, times temperature².

    Without `tail` the teacher is taken to believe in these alone: its probabilities are brought to a sum of 1, the
    student's remain those among all classes. With it all other classes are one more outcome, on both sides; this is 0
    where both agree. With all classes known either is the forward KL.

    Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (2025), who show what the
    first form costs: the student is drawn to more certainty than the teacher has.

    Args:
        student: logits (N, C) or (B, L, C).
        values: the teacher's log-probabilities (N, k) or (B, L, k) at `temperature`, as `top_k` gives them.
        indices: their classes, of the same shape.
        target: labels or a mask of shape (N,) or (B, L).
        temperature: divides the student's logits; above 0.
        tail: whether what the k classes leave counts as one more.

    Raises:
        BadValue: if the temperature is not a finite number above 0.
        InputError: if shapes or types differ, or there is no token.

    >>> teacher = torch.tensor([[2.0, 0.0, -9.0, -9.0]])
    >>> top_k_kl(torch.zeros(1, 4), *top_k(teacher, 2)), forward_kl(torch.zeros(1, 4), teacher)
    (tensor(1.0210), tensor(1.0206))
    """
    temperature = checks.positive("temperature", temperature)
    check_tokens("student", student)
    leading = (*student.shape[:-1], values.shape[-1] if values.ndim else 0)
    if values.shape != leading or indices.shape != leading or not values.numel() or not values.is_floating_point():
        raise InputError(
            f"the teacher's top values are of shape {tuple(values.shape)} and their indices of {tuple(indices.shape)}; "
            f"logits of shape {tuple(student.shape)} need k of both a token"
        )
    classes = student.shape[-1]
    rest = tail and values.shape[-1] < classes

    def each(logits: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        given = (logits / temperature).log_softmax(dim=-1)
        goal = values if rest else values.log_softmax(dim=-1)
        found = _kl(*_without_bars(given.gather(-1, indices), goal))
        if rest:
            others = given.clamp(min=_NOTHING).scatter(-1, indices, _NOTHING).logsumexp(dim=-1)
            left = -torch.expm1(values.logsumexp(dim=-1).clamp(max=0.0))
            found = found + left * (left.clamp(min=1e-12).log() - others)
        return found

    return temperature**2 * token_mean(each, student, (values, indices), target)


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


class TopKKL(nn.Module):
    """`top_k_kl` as a term's loss, from a teacher whose logits are all there: of these it hears the k largest."""

    extra_repr = checks.shown("k", "temperature", "tail")

    def __init__(self, k: int = 64, temperature: float = 1.0, tail: bool = False) -> None:
        super().__init__()
        self.k, self.temperature, self.tail = _count(k), checks.positive("temperature", temperature), bool(tail)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The scalar for logits (N, C) or (B, L, C) of both, and labels or a mask; k is at most C."""
        check_pair(student, teacher)
        found = top_k(teacher.detach(), min(self.k, teacher.shape[-1]), self.temperature)
        return top_k_kl(student, *found, target, self.temperature, self.tail)


# Divergences of log-probabilities (..., C): the second argument is the one whose expectation is taken.


def _kl(s: Tensor, t: Tensor) -> Tensor:
    return (t.exp() * (t - s)).sum(dim=-1)


def _reversed(s: Tensor, t: Tensor) -> Tensor:
    return _kl(t, s)


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Log-probabilities of `share` of the first and the rest of the second."""
    if share == 1:
        return first
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _without_bars(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Both with a class that is -inf on either side brought to the same nothing on both."""
    # A look is a tenth of the work; a GPU would have to be waited for.
    if s.device.type == "cpu" and min(s.amin(), t.amin()) > -math.inf:
        return s, t
    barred = s.isneginf() | t.isneginf()
    return s.masked_fill(barred, _NOTHING), t.masked_fill(barred, _NOTHING)


def _mean(each: Pointwise, student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float) -> Tensor:
    check_pair(student, teacher)

    def of_logits(s: Tensor, t: Tensor) -> Tensor:
        return each(*_without_bars(*((z / temperature).log_softmax(dim=-1) for z in (s, t))))

    return token_mean(of_logits, student, (teacher,), target)


def _count(value: int) -> int:
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise checks.BadValue(f"k is {value!r}; it must be a whole number of 1 or more")
    return value
