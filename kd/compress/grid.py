"""The values that integers of a few bits can stand for, and the nearest of them to a tensor's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 255  # of an unsigned byte, above 0
BITS = (8, 4)  # that a weight may have


def steps(weight: Tensor, bits: int, block: int | None = None) -> Tensor:
    """The distance between a weight's values: of each output (O, 1), or of each block of its inputs (O, blocks, 1).

    The largest weight of a row is the largest integer, 2^(bits-1) - 1, and 0 is 0: what pruning zeroed stays so.

    Args:
        weight: (O, …).
        bits: of a signed integer.
        block: inputs in a row that share a step; None: all of an output.

    >>> steps(torch.tensor([[127.0, -3.0], [0.0, 0.0]]), 8).flatten()
    tensor([1., 1.])
    """
    found = rows(weight, block).abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(found > 0, found, 1.0)


def rows(weight: Tensor, block: int | None = None) -> Tensor:
    """A weight as (O, inputs), or filled up with zeros as (O, blocks, block)."""
    flat = weight.flatten(1)
    if block is None:
        return flat
    filled = F.pad(flat, (0, -flat.shape[1] % block))
    return filled.view(len(flat), -1, block)


def integers(weight: Tensor, bits: int, block: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight as int8 in the shape of `rows`, and their `steps`.

    >>> integers(torch.tensor([[1.0, -0.6, 0.0]]), 4)
    (tensor([[ 7, -4,  0]], dtype=torch.int8), tensor([[0.1429]]))
    """
    most, step = 2 ** (bits - 1) - 1, steps(weight, bits, block)
    return (rows(weight, block) / step).round().clamp(-most, most).to(torch.int8), step


def nearest(weight: Tensor, bits: int, block: int | None = None) -> Tensor:
    """The weight moved to the values that it may have.

    >>> nearest(torch.tensor([[1.0, -0.6, 0.0]]), 4)
    tensor([[ 1.0000, -0.5714,  0.0000]])
    """
    whole, step = integers(weight, bits, block)
    flat = (whole * step).flatten(1)
    return flat[:, : weight[0].numel()].view(weight.shape).to(weight.dtype)


def passed(weight: Tensor, bits: int, block: int | None = None) -> Tensor:
    """`nearest`, whose gradient is the weight's own (straight through: Bengio et al. 2013, arXiv:1308.3432)."""
    return nearest(weight.detach(), bits, block) + (weight - weight.detach())  # what is added is 0 exactly


def affine(low: float, high: float) -> tuple[float, int]:
    """Step and zero point of an unsigned byte whose values reach from `low` to `high`, and hold 0.

    >>> affine(0.0, 255.0), affine(-1.0, 254.0)
    ((1.0, 0), (1.0, 1))
    """
    low, high = min(low, 0.0), max(high, 0.0)
    step = torch.tensor((high - low) / LEVELS, dtype=torch.float32).item()
    return step, min(LEVELS, max(0, round(-low / step)))


def as_bytes(values: Tensor, step: Tensor | float, zero: Tensor | int) -> Tensor:
    """The values that unsigned bytes stand for; the gradient is passed on inside their range, and is 0 outside.

    Torch's own `fake_quantize_per_tensor_affine` has no form for compilation, export or counting.

    >>> as_bytes(torch.tensor([-9.0, 0.4, 0.6, 300.0]), 1.0, 1)
    tensor([ -1.,   0.,   1., 254.])
    """
    moved: Tensor = _Bytes.apply(values, step, zero)
    return moved


class _Bytes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Any, zero: Any) -> Tensor:
        whole: Tensor = (values / step).round_().add_(zero)
        ctx.save_for_backward((whole >= 0) & (whole <= LEVELS))
        return whole.clamp_(0, LEVELS).sub_(zero).mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None
