"""A mean over tokens that never holds more than a piece of the vocabulary's distributions.

(8, 1024, 50257) logits are 0.77 GiB in half precision and twice that in single, and autograd would keep several such
for one divergence. Here it keeps the inputs alone and computes each piece again for the gradient: beside that gradient,
in the student's own precision, it needs some 0.2 GiB. What fits into one piece is computed once, value and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from kd.errors import InputError
from kd.losses import checks

Pointwise = Callable[..., Tensor]
IGNORED = -100  # the label that no token has
PIECE = 2**22  # logits that are computed at a time
NOTHING = -1e4  # stands for log 0: its exponential is 0, and the difference of two of them too


def token_mean(each: Pointwise, student: Tensor, others: Sequence[Tensor], target: Tensor | None = None) -> Tensor:
    """Mean of `each` over the tokens that count; 0 where none does, whatever stands at the others.

    Only the student gets a gradient, and there is no second derivative.

    Args:
        each: from logits (..., C) and a piece of each of the others, none in half precision, to a number a token (...).
        student: logits (N, C) or (B, L, C).
        others: tensors whose first axes are those of the tokens.
        target: labels, of which `IGNORED` does not count, or a mask; (N,) or (B, L). Without it all count.

    Raises:
        InputError: if the target is no label and no mask of each token.

    >>> logits = torch.tensor([[1.0, 3.0], [5.0, 9.0], [7.0, 0.0]])
    >>> token_mean(lambda z: z.sum(dim=-1), logits, (), torch.tensor([0, 1, -100]))
    tensor(9.)
    """
    wanted = torch.is_grad_enabled() and student.requires_grad
    found: Tensor = _TokenMean.apply(student, _counts(target, student), each, wanted, *others)
    return found


def check_tokens(name: str, values: Tensor) -> None:
    """Refuse what are no logits of tokens.

    Raises:
        InputError: if they are no floats of shape (N, C) or (B, L, C), or empty.
    """
    if not checks.floats(values) or values.ndim not in (2, 3) or not values.numel():
        raise InputError(
            f"the {name}'s logits are {checks.spelt(values)}; a loss on tokens needs floats of shape (N, C) or "
            "(B, L, C), not empty"
        )


def check_pair(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits that are not of the same tokens and vocabulary.

    Raises:
        InputError: if one are no logits of tokens, or the shapes differ.
    """
    check_tokens("student", student)
    check_tokens("teacher", teacher)
    if student.shape != teacher.shape:
        raise InputError(
            f"the student's logits are of shape {tuple(student.shape)} and the teacher's of {tuple(teacher.shape)}; "
            "both must see the same tokens and have the same vocabulary"
        )


def pieces(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Slices over all axes but the last that together hold each token once, each of about `PIECE` logits at most.

    >>> list(pieces((3, PIECE)))
    [(slice(0, 1, None),), (slice(1, 2, None),), (slice(2, 3, None),)]
    """
    tokens = max(1, PIECE // shape[-1])
    if len(shape) == 2:
        yield from ((slice(i, i + tokens),) for i in range(0, shape[0], tokens))
        return
    rows, columns = max(1, tokens // shape[1]), min(tokens, shape[1])
    for i in range(0, shape[0], rows):
        yield from ((slice(i, i + rows), slice(j, j + columns)) for j in range(0, shape[1], columns))


def kl(s: Tensor, t: Tensor) -> Tensor:
    """KL(t ‖ s) of log-probabilities (..., C).

    >>> kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).clamp(min=1e-30).log())
    tensor(0.6931)
    """
    return (t.exp() * (t - s)).sum(dim=-1)


def without_bars(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Both log-probabilities (..., C) with a class that is -inf on either side brought to the same nothing on both."""
    # A look is a tenth of the work; a GPU would have to be waited for.
    if s.device.type == "cpu" and min(s.amin(), t.amin()) > -math.inf:
        return s, t
    barred = s.isneginf() | t.isneginf()
    return s.masked_fill(barred, NOTHING), t.masked_fill(barred, NOTHING)


class _TokenMean(torch.autograd.Function):
    """The mean, and a gradient that is known at once for one piece and computed again for each of several."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, counts: Tensor | None, each: Pointwise, wanted: bool, *others: Tensor
    ) -> Tensor:
        tokens = student.shape[:-1].numel() if counts is None else counts.sum().clamp(min=1)
        ctx.each, ctx.tokens = each, tokens
        ctx.whole = wanted and student.numel() <= PIECE
        if ctx.whole:
            total, gradient = _slope(each, student, counts, others, ...)
            ctx.save_for_backward(gradient)
            ctx.dtype = student.dtype
            return total / tokens
        ctx.save_for_backward(student, counts, *others)
        total = checks.widened(student.new_zeros(()))
        for at in pieces(student.shape):
            total = total + _sum(each, checks.widened(student[at]), counts, others, at)
        return total / tokens

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        scale = outer / ctx.tokens
        if ctx.whole:
            (found,) = ctx.saved_tensors
            return ((scale * found).to(ctx.dtype), *(None for _ in ctx.needs_input_grad[1:]))
        student, counts, *others = ctx.saved_tensors
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        for at in pieces(student.shape):
            gradient[at] = scale * _slope(ctx.each, student[at], counts, others, at)[1]
        return (gradient, *(None for _ in ctx.needs_input_grad[1:]))


# A piece's place: slices, or all of it.
Place = tuple[slice, ...] | EllipsisType


def _sum(each: Pointwise, part: Tensor, counts: Tensor | None, others: Sequence[Tensor], at: Place) -> Tensor:
    """Over the tokens of a piece that count."""
    found = each(part, *(checks.widened(values[at]).detach() for values in others))
    return found.sum() if counts is None else torch.where(counts[at], found, 0.0).sum()


def _slope(
    each: Pointwise, student: Tensor, counts: Tensor | None, others: Sequence[Tensor], at: Place
) -> tuple[Tensor, Tensor]:
    """The sum over a piece's tokens, and its gradient on the logits of that piece."""
    with torch.enable_grad():
        part = checks.widened(student).detach().requires_grad_()
        total = _sum(each, part, counts, others, at)
        (found,) = torch.autograd.grad(total, part)
    # Not found times the mask: what stands at a token that does not count may be NaN.
    return total.detach(), found if counts is None else torch.where(counts[at][..., None], found, 0.0)


def _counts(target: Tensor | None, student: Tensor) -> Tensor | None:
    """True for each token that counts; None where all do."""
    if target is None:
        return None
    mask = isinstance(target, Tensor) and target.dtype == torch.bool
    if not (mask or checks.whole_numbers(target)) or target.shape != student.shape[:-1]:
        raise InputError(
            f"the target is {checks.spelt(target)}; logits of shape {tuple(student.shape)} need a label or a mask a "
            f"token, {tuple(student.shape[:-1])}"
        )
    return target if mask else target != IGNORED
