"""The teacher's pass over the views of a split, as fast as the device allows, into shards that survive a kill."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.data import Split
from kd.data.labels import Layout, duration_text, flaw, pack, shard, size_text, write_shard
from kd.models import Frozen, Normalised, Taps
from kd.training.loaders import EpochLoader
from kd.training.settings import Run
from kd.training.trainer import device_of

BUFFER = 256 * 2**20  # bytes of outputs held while a block is made
GROUP = 8  # views made of one decoding, at most


@dataclass(frozen=True)
class Pass:
    """How a teacher runs where it only speaks: all of it is hashed, for another kernel gives other bits.

    Args:
        batch_size: the last batch is filled up, so that every sample goes through the same kernels.
        precision: `32-true` or `bf16-mixed`.
        channels_last: pixels side by side, channels innermost: often faster for convolutions.
        compile: through `torch.compile`.
    """

    batch_size: int = 256
    precision: str = "32-true"
    channels_last: bool = False
    compile: bool = False


class Speaker:
    """A frozen teacher that gives logits and chosen features of a batch.

    Args:
        teacher: moved to the device and frozen in place.
        how: precision, layout, compilation.
        features: paths of layers, each with `:pooled` behind it; or these by the names that they are kept under.
        device: where it runs.
    """

    def __init__(
        self, teacher: Normalised, how: Pass, features: Sequence[str] | Mapping[str, str], device: torch.device
    ) -> None:
        self.taps = Taps(teacher.net, features)  # before compilation, or the hooks never fire
        teacher = teacher.to(device)
        if how.channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        self.net: Callable[[Tensor], Any] = Frozen(teacher)
        if how.compile:
            self.net = torch.compile(self.net)
        self.how, self.device = how, device

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C) and features (B, width) of images (B, C, H, W) in [0, 1], in float32."""
        if self.how.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        mixed = self.how.precision == "bf16-mixed"
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            logits = self.net(images)
        return logits.float(), {path: value.float() for path, value in self.taps.pop().items()}


def label_views(
    speaker: Speaker,
    split: Split,
    layout: Layout,
    run: Run,
    *,
    made_by: str,
    augment: str,
    seed: int,
    size: int,
    work: Path,
    tell: Callable[[dict[str, Any]], None],
) -> list[Path]:
    """Write the shards that ``work`` does not hold yet; returns all of them.

    Args:
        speaker: the teacher.
        split: the training split, in the order in which the rows are stored.
        layout: of the shards.
        run: where.
        made_by: the views' scheme, for the shards' headers.
        augment: of the views.
        seed: of the views.
        size: pixels of the images.
        work: the folder that survives a kill.
        tell: hears of progress, size and expected time.
    """
    batch = speaker.how.batch_size
    loader = EpochLoader(
        split, batch, augment=augment, view_seed=seed, size=size, device=device_of(run), workers=run.workers
    )
    group = 1 if split.paths is None else max(1, min(GROUP, BUFFER // (layout.row * layout.block)))
    missing = _missing(layout, made_by, work, tell)
    todo = sum(len(views) * rows for (_, _, rows), views in missing)
    done, total = 0, -(-todo // batch)
    started, announced = time.perf_counter(), False
    for (number, first, rows), views in missing:
        for some in (views[i : i + group] for i in range(0, len(views), group)):
            made: dict[int, list[Mapping[str, Tensor]]] = {view: [] for view in some}
            for view, outputs in _outputs(speaker, loader, first, rows, some, layout):
                made[view].append(outputs)
                done += 1
                if done == 1:  # which warmed up: the next two tell the time
                    started = time.perf_counter()
                if done == 3:
                    announced = _announce(layout, todo, (time.perf_counter() - started) / 2 * total, tell)
                tell({"event": "pass", "step": done, "total": max(total, done)})
            if not announced:  # before the first file, however few batches there are
                announced = _announce(layout, todo, (time.perf_counter() - started) * total / done, tell)
            for view, parts in made.items():
                whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                write_shard(work / shard(view, number), whole, made_by, view)
    return [work / shard(view, number) for view in range(layout.views) for number, _, _ in layout.blocks()]


def _outputs(
    speaker: Speaker, loader: EpochLoader, first: int, rows: int, views: Sequence[int], layout: Layout
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(view, packed outputs on the CPU) for each batch of a block and each view of it."""
    size = speaker.how.batch_size
    counts = [min(size, rows - start) for start in range(0, rows, size)]
    # A last batch that is not full is filled with its last sample: a kernel for another shape may round differently.
    spans = [
        torch.arange(first + i * size, first + (i + 1) * size).clamp(max=first + i * size + count - 1)
        for i, count in enumerate(counts)
    ]
    for count, (_, ids, images) in zip(counts, loader.raw(spans), strict=True):
        for view in views:
            logits, features = speaker(loader.seen(images, ids, view))
            packed = pack(logits, layout, features)
            yield view, {name: value[:count].cpu().contiguous() for name, value in packed.items()}


def _missing(
    layout: Layout, made_by: str, work: Path, tell: Callable[[dict[str, Any]], None]
) -> list[tuple[tuple[int, int, int], list[int]]]:
    """The views that each block lacks; what a kill left is kept where it is whole."""
    found, kept = [], 0
    for block in layout.blocks():
        views = []
        for view in range(layout.views):
            path = work / shard(view, block[0])
            wrong = flaw(path, made_by, view) if path.exists() else "absent"
            if wrong and path.exists():
                tell({"event": "say", "line": f"{wrong}: making it again"})
                path.unlink()
            kept += not wrong
            if wrong:
                views.append(view)
        if views:
            found.append((block, views))
    if kept:
        tell({"event": "say", "line": f"labels: {kept} of {kept + sum(len(v) for _, v in found)} files are there"})
    return found


def _announce(layout: Layout, todo: int, seconds: float, tell: Callable[[dict[str, Any]], None]) -> bool:
    """Say how large the rest will be and how long it will take."""
    kept = "" if layout.top_k is None else f", the {layout.top_k} largest logits"
    tell(
        {
            "event": "say",
            "line": f"labels: {layout.views} views of {layout.samples:,} samples in {layout.dtype}{kept}: "
            f"{size_text(todo * layout.row)} to write, about {duration_text(seconds)}",
        }
    )
    return True


def link(paths: Sequence[Path], out: Path) -> None:
    """Have the files under their names in ``out`` too, without a copy where the file system can."""
    for path in paths:
        try:
            os.link(path, out / path.name)
        except OSError:
            shutil.copyfile(path, out / path.name)
