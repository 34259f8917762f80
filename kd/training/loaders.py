"""Batches as a function of seed, epoch and position alone: any epoch can be entered anywhere with the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.data.augment import augment
from kd.data.readers import decode_rows
from kd.data.several import Labels
from kd.data.split import Split
from kd.errors import InputError
from kd.training.seeds import mix

Batch = dict[str, Tensor]


class EpochLoader:
    """A split in batches, on the device they are used on.

    The order depends on (seed, epoch), a sample's augmentation on (view seed, view, its id), and nothing on the global
    generators, on ``workers``, or on whether images lie in memory or in files.

    A batch is a dict: ``image`` float32 (B, C, size, size) in [0, 1], ``target`` int64 (B,), ``id`` int64 (B,),
    ``row`` int64 (B,), the sample's row in the split; with ``labels`` also what they hold of these rows and this view,
    ``teacher.logits`` and the like.

    Args:
        split: the samples; in memory they are moved to the device once.
        batch_size: samples in a batch; the last one may have fewer.
        seed: of the order, and of augmentation where ``view_seed`` is None.
        augment: one of ``kd.data.source.AUGMENTS``.
        size: pixels of the images (None: as the split has them).
        shuffle: another order in each epoch, or the split's own.
        drop_last: leave out a last batch that is not full.
        device: where batches are made.
        workers: processes that decode files; 0 decodes between batches, in memory there is nothing to decode.
        views: views of a sample before the first comes again; None: another in each epoch.
        view_seed: of augmentation.
        labels: a teacher's stored outputs for the same views.
        part: (rank, ranks): each rank is given its share of every batch.
        position: asked at the first batch of a pass for (epoch, first batch); None always means (0, 0).

    Raises:
        InputError: if ``drop_last`` leaves no batch at all.

    >>> images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    >>> loader = EpochLoader(Split(torch.arange(5), torch.zeros(5, dtype=torch.int64), images), 2)
    >>> [batch["row"].tolist() for batch in loader]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        augment: str = "none",
        size: int | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        workers: int = 0,
        views: int | None = None,
        view_seed: int | None = None,
        labels: Labels | None = None,
        position: Callable[[], tuple[int, int]] | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if batch_size < 1:
            raise InputError(f"fit.batch_size={batch_size}: give 1 or more")
        if drop_last and 0 < len(split) < batch_size:
            raise InputError(
                f"fit.batch_size={batch_size} is larger than the {len(split)} samples; lower it, or set "
                "fit.drop_last=false"
            )
        self.batch_size, self.seed, self.augment, self.size = batch_size, seed, augment, size
        self.shuffle, self.drop_last, self.workers, self.position = shuffle, drop_last, workers, position
        self.views, self.view_seed, self.labels = views, seed if view_seed is None else view_seed, labels
        self.device, self.part = torch.device(device), part
        self._paths, self._side, self._channels = split.paths, split.side, split.channels
        self._images = None if split.images is None else split.images.to(self.device)
        self._targets, self._ids = split.targets.to(self.device), split.ids.to(self.device)

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever a pass begins."""
        full, rest = divmod(len(self._ids), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> Tensor:
        """The rows of an epoch in the order they are visited: int64 (N,), on the CPU."""
        count = len(self._ids)
        if not self.shuffle:
            return torch.arange(count)
        return torch.randperm(count, generator=torch.Generator().manual_seed(mix(self.seed, "order", epoch)))

    def __iter__(self) -> Iterator[Batch]:
        """The batches from `position` to the end of its epoch."""
        # A generator: nothing of this runs before the first next(), when the trainer knows where it stands.
        epoch, first = self.position() if self.position is not None else (0, 0)
        yield from self.batches(epoch, first)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from the ``first`` on."""
        order = self.order(epoch)
        view = epoch if self.views is None else epoch % self.views
        spans = [slice(i * self.batch_size, (i + 1) * self.batch_size) for i in range(first, len(self))]
        rank, ranks = self.part
        shares = [slice(len(order[s]) * rank // ranks, len(order[s]) * (rank + 1) // ranks) for s in spans]
        for rows, ids, images in self.raw([order[span][share] for span, share in zip(spans, shares, strict=True)]):
            batch = {
                "image": self.seen(images, ids, view),
                "target": self._targets.index_select(0, rows),
                "id": ids,
                "row": rows,
            }
            if self.labels is not None:
                batch |= self.labels.at(view % self.labels.views, rows)
            yield batch

    def raw(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows, ids and images as they lie there (uint8), on the device, for each batch of rows: decoded once each."""
        decoded = None if self._paths is None else self._decoded(self._paths, [rows.tolist() for rows in batches])
        # Once an epoch: a batch then has nothing for the device to wait for.
        together = torch.cat(list(batches)).to(self.device) if len(batches) else torch.empty(0, dtype=torch.int64)
        for rows in torch.split(together, [len(rows) for rows in batches]):
            if decoded is not None:
                images = next(decoded).to(self.device, non_blocking=True)
            else:
                assert self._images is not None
                images = self._images.index_select(0, rows)
            yield rows, self._ids.index_select(0, rows), images

    def seen(self, images: Tensor, ids: Tensor, view: int) -> Tensor:
        """Images as a network is given them in a view: a function of the images, their ids and the view alone."""
        return augment(images, self.augment, self.view_seed, ids, view, self.size)

    def _decoded(self, paths: Sequence[Path], batches: Sequence[list[int]]) -> Iterator[Tensor]:
        with warnings.catch_warnings():
            # torch warns of more workers than cores, Python of forking beside torch's threads; neither moves a number,
            # and the workers run PIL and numpy only.
            warnings.simplefilter("ignore")
            loader = iter(
                DataLoader(
                    _Files(paths, self._side, self._channels),
                    batch_sampler=batches,
                    num_workers=min(self.workers, len(batches)),
                    collate_fn=_as_it_is,
                    pin_memory=self.device.type == "cuda",
                    generator=torch.Generator(),  # or it would draw the workers' seeds from the global one
                )
            )
        try:
            for found in loader:
                if isinstance(found, str):
                    raise InputError(found)
                yield found
        finally:
            # Left to a traceback and the garbage collector, it would lose its queues before its workers and wait 5 s
            # for each of them.
            del loader


class _Files(Dataset[Tensor]):
    """Image files that are decoded a batch at a time."""

    def __init__(self, paths: Sequence[Path], side: int, channels: int) -> None:
        self.paths, self.side, self.channels = paths, side, channels

    def __getitems__(self, rows: list[int]) -> Tensor | str:
        """The images at some rows, or what is wrong: an exception would reach the user with a worker's traceback."""
        try:
            return torch.from_numpy(decode_rows([self.paths[row] for row in rows], self.side, self.channels))
        except InputError as error:
            return str(error)


def _as_it_is(batch: Any) -> Any:
    return batch
