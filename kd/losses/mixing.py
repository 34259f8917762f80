"""The logits of several teachers as one teacher's, weights for them, and draws among them.

What a mixture returns are logits: `temperature` times the logarithm of the mixed softened probabilities, so that a loss
which divides by the same temperature sees exactly the mixture. For a KL or a cross-entropy against the teacher, that
has the gradient of the weighted sum of the losses against each teacher; their values differ by a constant of theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import InputError
from kd.losses import checks


def mean_logits(teachers: Sequence[Tensor]) -> Tensor:
    """The mean of the teachers' logits (N, C): the normalised geometric mean of their distributions.

    Args:
        teachers: K times logits (N, C).

    Raises:
        InputError: if there is none, or their shapes differ.

    >>> mean_logits([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])])
    tensor([[1., 0.]])
    """
    return stacked(teachers).mean(dim=0)


def mixture(teachers: Sequence[Tensor], weights: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Logits (N, C) whose distribution at `temperature` is the weighted mean of the teachers' at that temperature.

    They are `temperature` times the logarithm of that mean. At temperature 1 these are log-probabilities.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 1, name the arithmetic and
    the geometric mean (`mean_logits`); You et al., "Learning from Multiple Teacher Networks" (2017), average softened
    probabilities.

    Args:
        teachers: K times logits (N, C).
        weights: (K,), or (K, N) for each sample its own; they add up to 1 over the teachers. None: 1/K each.
        temperature: at which probabilities are averaged; above 0.

    Raises:
        BadValue: if the temperature is not a finite number above 0.
        InputError: if there is no teacher, their shapes differ, or weights are of another shape.

    >>> thirds = torch.tensor([[3.0, 1.0]]).log()  # 0.75 and 0.25
    >>> mixture([thirds, torch.zeros(1, 2)]).exp()
    tensor([[0.6250, 0.3750]])
    """
    temperature = checks.positive("temperature", temperature)
    each = F.log_softmax(stacked(teachers) / temperature, dim=2)
    if weights is None:
        weights = each.new_full((len(each),), 1 / len(each))
    if weights.shape not in (each.shape[:1], each.shape[:2]):
        raise InputError(
            f"weights of shape {tuple(weights.shape)} meet {len(each)} teachers of {each.shape[1]} samples"
        )
    return mixed(each, weights.to(each.dtype).log(), temperature)


def confidence_weights(teachers: Sequence[Tensor]) -> Tensor:
    """For each teacher and sample (K, N), the more the lower the teacher's entropy H: (1 - H_k / ΣH) / (K - 1).

    They add up to 1 over the teachers. Where none of them has any entropy, and for one teacher, all are equal.

    The weights that Zhang, Chen and Wang (2022) compare with as EBKD, after Kwon et al., "Adaptive Knowledge
    Distillation Based on Entropy" (2020); Rorozhl/CA-MKD, helper/loops.py, which divides their loss by K once more.

    Args:
        teachers: K times logits (N, C).

    Raises:
        InputError: if there is none, or their shapes differ.

    >>> confidence_weights([torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)])
    tensor([[0.5521],
            [0.4479]])
    """
    logs = F.log_softmax(stacked(teachers), dim=2)
    entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(dim=2)
    total = entropy.sum(dim=0)
    share = torch.where(total > 0, entropy / total.where(total > 0, 1.0), 1 / len(logs))
    return _rest(share)


def cross_entropy_weights(teachers: Sequence[Tensor], target: Tensor) -> Tensor:
    """For each teacher and sample (K, N), the more the better it knows the label: (1 - softmax_k(CE_k)) / (K - 1).

    They add up to 1 over the teachers; one teacher has 1.

    Zhang, Chen and Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation" (2022); Rorozhl/CA-MKD,
    helper/loops.py, which divides their loss by K once more.

    Args:
        teachers: K times logits (N, C).
        target: class indices (N,).

    Raises:
        InputError: if there is no teacher, shapes differ, or a label is no class.

    >>> cross_entropy_weights([torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)], torch.tensor([0]))
    tensor([[0.6000],
            [0.4000]])
    """
    every = stacked(teachers)
    target = checks.labels(target, every[0])
    return _rest(torch.stack([F.cross_entropy(z, target, reduction="none") for z in every]).softmax(dim=0))


def drawn(seed: int, position: float, count: int, take: int) -> list[int]:
    """Which `take` of `count` are drawn at a position of training, in rising order: a function of these alone.

    >>> [drawn(0, epoch / 4, count=3, take=1) for epoch in range(6)]
    [[1], [0], [1], [2], [1], [1]]
    >>> drawn(0, 0.25, count=3, take=2) == drawn(0, 0.25, count=3, take=2)
    True
    """
    return sorted(sorted(range(count), key=lambda index: _hash(seed, float(position), index))[:take])


def mixed(each: Tensor, logs: Tensor, temperature: float) -> Tensor:
    """`mixture` of log-probabilities at `temperature` (K, N, C) by the logarithms of weights, (K,) or (K, N)."""
    temperature = checks.positive("temperature", temperature)
    return temperature * torch.logsumexp(each + logs.reshape(*logs.shape, *(1,) * (3 - logs.ndim)), dim=0)


def stacked(teachers: Sequence[Tensor]) -> Tensor:
    """The teachers' logits as one tensor (K, N, C), in the precision to compute in.

    Raises:
        InputError: if there is none, or their shapes differ.
    """
    if not len(teachers):
        raise InputError("there is no teacher to hear; name a view or more, such as [teacher1.logits,teacher2.logits]")
    wide = [checks.logits("teacher", teacher) for teacher in teachers]
    first = wide[0]
    for other in wide[1:]:
        if other.shape != first.shape:
            raise InputError(
                f"the teachers' logits are of shapes {tuple(first.shape)} and {tuple(other.shape)}; mix nets of the "
                "same classes on the same batch"
            )
    return torch.stack(wide)


def _rest(shares: Tensor) -> Tensor:
    """Of shares (K, N) that add up to 1, what each leaves to the others, to add up to 1 again."""
    return (1 - shares) / (len(shares) - 1) if len(shares) > 1 else torch.ones_like(shares)


def _hash(*words: float) -> bytes:
    return hashlib.blake2b("/".join(map(repr, words)).encode(), digest_size=8).digest()
