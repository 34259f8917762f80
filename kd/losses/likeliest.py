"""The loss on tokens from a teacher of which only the likeliest classes are kept, and what is kept of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks
from kd.losses.tokens import NOTHING, check_pair, check_tokens, kl, pieces, token_mean, without_bars


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
    temperature, k = checks.positive("temperature", temperature), checks.whole("k", k)
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
    >>> top_k_kl(torch.zeros(1, 4), *top_k(teacher, 2))  # the KL of all four is 1.0206
    tensor(1.0210)
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
        found = kl(*without_bars(given.gather(-1, indices), goal))
        if rest:
            others = given.clamp(min=NOTHING).scatter(-1, indices, NOTHING).logsumexp(dim=-1)
            left = -torch.expm1(values.logsumexp(dim=-1).clamp(max=0.0))
            found = found + left * (left.clamp(min=1e-12).log() - others)
        return found

    return temperature**2 * token_mean(each, student, (values, indices), target)


class TopKKL(nn.Module):
    """`top_k_kl` as a term's loss, from a teacher whose logits are all there: of these it hears the k largest."""

    extra_repr = checks.shown("k", "temperature", "tail")

    def __init__(self, k: int = 64, temperature: float = 1.0, tail: bool = False) -> None:
        super().__init__()
        self.k, self.tail = checks.whole("k", k), bool(tail)
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The scalar for logits (N, C) or (B, L, C) of both, and labels or a mask; k is at most C."""
        check_pair(student, teacher)
        found = top_k(teacher.detach(), min(self.k, teacher.shape[-1]), self.temperature)
        return top_k_kl(student, *found, target, self.temperature, self.tail)
