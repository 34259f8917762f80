"""Splits: the samples of a part of a data set, with labels and stable ids, in memory or in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.data.augment import bits

STREAM = -1  # of random numbers; no augmentation draws from it, so being in train says nothing about a view


@dataclass(frozen=True, eq=False)
class Split:
    """Samples with labels and ids; their images are either held in memory or decoded from files when needed.

    Args:
        ids: int64 (N,): the sample's index in the original set, whatever split it is in.
        targets: int64 (N,).
        images: uint8 (N, C, side, side), or None.
        paths: N image files, or None.
        side: pixels; known from ``images`` if there are any.
        channels: likewise.

    Raises:
        ValueError: if lengths differ, or not just one of ``images`` and ``paths`` is given.

    >>> split = Split(torch.arange(4), torch.tensor([0, 1, 0, 1]), torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    >>> len(split), split.side, split.subset(torch.tensor([1, 3])).targets
    (4, 8, tensor([1, 1]))
    """

    ids: Tensor
    targets: Tensor
    images: Tensor | None = None
    paths: tuple[Path, ...] | None = None
    side: int = 0
    channels: int = 0

    def __post_init__(self) -> None:
        """Check the lengths; side and channels follow from images."""
        if (self.images is None) == (self.paths is None):
            raise ValueError("a split has images or paths, and not both")
        if self.images is not None:
            object.__setattr__(self, "channels", self.images.shape[1])
            object.__setattr__(self, "side", self.images.shape[3])
        count = len(self.paths) if self.paths is not None else 0 if self.images is None else len(self.images)
        if not len(self.ids) == len(self.targets) == count:
            raise ValueError(f"{len(self.ids)} ids, {len(self.targets)} targets and {count} images")

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, rows: Tensor) -> Split:
        """The samples at ``rows`` (int64), in that order, under the ids they have."""
        return Split(
            self.ids[rows],
            self.targets[rows],
            None if self.images is None else self.images[rows],
            None if self.paths is None else tuple(self.paths[i] for i in rows.tolist()),
            self.side,
            self.channels,
        )

    def without(self, rows: Tensor) -> Split:
        """All samples but those at ``rows``, in the order they have."""
        left = torch.ones(len(self), dtype=torch.bool)
        left[rows] = False
        return self.subset(left.nonzero().flatten())


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set: what is trained on, what is selected by, what is judged by, and the names of the classes."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]


def held(images: NDArray[np.uint8], targets: NDArray[np.integer], ids: NDArray[np.int64] | None = None) -> Split:
    """A split in memory; without ``ids`` a sample's id is its row.

    >>> held(np.zeros((3, 1, 2, 2), np.uint8), np.array([0, 1, 2])).ids
    tensor([0, 1, 2])
    """
    return Split(torch.arange(len(targets)) if ids is None else tensor(ids), tensor(targets), torch.from_numpy(images))


def tensor(values: NDArray[np.integer]) -> Tensor:
    """Whole numbers as an int64 tensor of their own memory."""
    return torch.from_numpy(values.astype(np.int64))


def stratified(ids: Tensor, targets: Tensor, count: int, seed: int) -> Tensor:
    """Rows of ``count`` samples in which each class has its share, to within one sample; ascending.

    Which samples are taken depends on the seed and on their ids, not on their order. Shares are rounded by largest
    remainder (ties to the lower class).

    Args:
        ids: int64 (N,).
        targets: int64 (N,).
        count: how many to take, 0 to N.
        seed: another one takes other samples.

    >>> rows = stratified(torch.arange(100), torch.arange(100) % 4, 10, seed=0)
    >>> (torch.arange(100) % 4)[rows].bincount()
    tensor([3, 3, 2, 2])
    """
    total = len(targets)
    if not total or not count:
        return torch.empty(0, dtype=torch.int64)
    _, group, sizes = torch.unique(targets, return_inverse=True, return_counts=True)
    quota, rest = sizes * count // total, sizes * count % total
    quota[rest.argsort(descending=True, stable=True)[: count - int(quota.sum())]] += 1
    drawn = bits(seed, ids, view=0, stream=STREAM).argsort(stable=True)
    order = drawn[group[drawn].argsort(stable=True)]  # class after class, each in the order drawn
    start = sizes.cumsum(0) - sizes
    rank = torch.arange(total) - start[group[order]]
    return order[rank < quota[group[order]]].sort().values
