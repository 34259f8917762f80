"""A value whose gradients are known beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def with_gradients(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """`value` as a scalar whose gradient on each tensor is the one that stands beside it.

    For formulas of which autograd would keep and walk many steps, where the gradient is a line. There is no second
    derivative.

    Args:
        value: a scalar without a graph.
        pairs: tensors, and the value's gradient on each, of its shape.

    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> (2 * with_gradients(x.detach().square().sum(), (x, 2 * x.detach()))).backward()
    >>> x.grad
    tensor([12.])
    """
    found: Tensor = _Known.apply(value, *(tensor for pair in pairs for tensor in pair))
    return found


class _Known(torch.autograd.Function):
    """The value goes out, and each gradient goes back, times what comes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *flat: Tensor) -> Tensor:
        ctx.save_for_backward(*flat[1::2])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None]
        for gradient, need in zip(ctx.saved_tensors, ctx.needs_input_grad[1::2], strict=True):
            found += [outer * gradient if need else None, None]
        return tuple(found)
