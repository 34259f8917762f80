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


def svd_flow(student: list[Tensor], teacher: list[Tensor], turned: frozenset[tuple[int, int]] = frozenset()) -> Array:
    """KD-SVD of one vector, between each layer and the next, sample by sample.

    Args:
        student: maps of each layer.
        teacher: maps of each layer.
        turned: (layer, sample) whose teacher's vector has the other sign.
    """

    def directions(maps: Array, count: int) -> Array:
        return np.asarray(np.linalg.svd(maps.reshape(len(maps), -1).T, full_matrices=False)[2][:count])

    total = np.zeros(len(student) - 1)
    for sample in range(len(student[0])):
        before: tuple[Array, Array] | None = None
        for layer, (s, t) in enumerate(zip(student, teacher, strict=True)):
            (goal,) = directions(t[sample].double().numpy(), 1)
            goal = goal if (goal.sum() >= 0) != ((layer, sample) in turned) else -goal
            found = directions(s[sample].double().numpy(), 4)
            best = found[np.abs(found @ goal).argmax()]
            best = best * np.sign(best @ goal)
            if before is not None:
                ours, theirs = (
                    np.exp(-((a[:, None] - b[None]) ** 2) / 8) for a, b in zip((best, goal), before, strict=True)
                )
                total[layer - 1] += ((ours - theirs) ** 2).sum() / len(student[0])
            before = best, goal
    return total
