"""Inputs from literal arithmetic, and the formulas that several test files compute in numpy and float64."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def wave(*shape: int, phase: float = 0.0, size: float = 4.0) -> Array:
    """Numbers between -size and size, no two rows alike."""
    return np.asarray(size * np.sin(1.7 * np.arange(int(np.prod(shape))) + phase).reshape(shape))


def softmax(logits: Array, temperature: float = 1.0) -> Array:
    """Along the last axis."""
    powers = np.exp(logits / temperature - np.max(logits / temperature, axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def kl(first: Array, second: Array) -> Array:
    """KL(first ‖ second) of probabilities along the last axis."""
    return np.asarray((first * np.log(first / second)).sum(axis=-1))


def tensors(*arrays: Array) -> tuple[Tensor, ...]:
    """In float32, as a training gives them."""
    return tuple(torch.from_numpy(array).float() for array in arrays)
