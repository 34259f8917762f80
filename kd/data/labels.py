"""Soft labels on disk: what a teacher says of K views of each sample, one file a view and block of samples.

`labels.safetensors` holds the samples' ids (and, where a sample looks the same in every epoch, the one view there is);
`labels-v00003-b0000.safetensors` holds the fourth view of the first block. Files are mapped, not read: a batch touches
the rows it needs. Sizes and headers are looked at without torch, so that planning can.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import InputError, KDError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = "labels.safetensors"
FORMAT = "1"
SCHEME = 1  # of augmentation: goes up when the same (name, seed, id, view) would give another image
SHARD_BYTES = 64 * 2**20
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}


def scheme(augment: str, seed: int, size: int) -> str:
    """What a view is made by, beside the sample and the view's number.

    >>> scheme("crop_flip", 0, 32)
    'crop_flip/1 seed 0 size 32'
    """
    return f"{augment}/{SCHEME} seed {seed} size {size}"


@dataclass(frozen=True)
class Layout:
    """How the outputs lie on disk.

    Args:
        samples: N of them, in the order of the training split.
        classes: C.
        views: K.
        dtype: one of `ITEM`.
        top_k: logits kept of each row, or None for all.
        widths: of the features, by the name that their view has after `teacher.`.

    >>> Layout(samples=45_000, classes=100, views=240, dtype="float16").bytes
    2160000000
    """

    samples: int
    classes: int
    views: int
    dtype: str = "float32"
    top_k: int | None = None
    widths: Mapping[str, int] = field(default_factory=dict)

    @property
    def row(self) -> int:
        """Bytes of one sample in one view."""
        item = ITEM[self.dtype]
        kept = self.classes * item if self.top_k is None else self.top_k * (item + self.index_item) + item
        return kept + item * sum(self.widths.values())

    @property
    def index_item(self) -> int:
        """Bytes of a class index."""
        return 2 if self.classes <= 2**15 else 4

    @property
    def bytes(self) -> int:
        """Bytes of all views, less the files' headers."""
        return self.row * self.samples * self.views

    @property
    def block(self) -> int:
        """Samples in a file."""
        return max(1, min(self.samples, SHARD_BYTES // self.row))

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(number, first row, rows) of each block of samples."""
        for number, first in enumerate(range(0, self.samples, self.block)):
            yield number, first, min(self.block, self.samples - first)


def shard(view: int, block: int) -> str:
    """The name of a file.

    >>> shard(3, 0)
    'labels-v00003-b0000.safetensors'
    """
    return f"labels-v{view:05d}-b{block:04d}.safetensors"


def header(path: Path) -> dict[str, str]:
    """What `write_shard` wrote into the header of a file whose length is what the header says; no more of it is read.

    Raises:
        KDError: if it is cut short or no such file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            found = json.loads(file.read(length) if length < 2**24 else b"")
        end = 8 + length + max((e["data_offsets"][1] for n, e in found.items() if n != "__metadata__"), default=0)
        size = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise KDError(f"{path.name} is half-written or no file of tensors ({type(error).__name__})") from error
    if size != end:
        raise KDError(f"{path.name} is half-written: {size} of {end} bytes")
    try:
        return dict(json.loads(found.get("__metadata__", {}).get("kd", "{}")))
    except ValueError:
        return {}


def flaw(path: Path, made_by: str, view: int) -> str | None:
    """What is wrong with a shard by its length and its own word, or None.

    Args:
        path: of the file.
        made_by: the `scheme` that its views must have.
        view: the number of the view it must hold.
    """
    try:
        said = header(path)
    except KDError as error:
        return str(error)
    if said.get("format") != FORMAT or said.get("view") != str(view):
        return f"{path.name} holds no view {view} in the format {FORMAT} of this kd"
    if said.get("scheme") != made_by:
        return f"{path.name} holds views of {said.get('scheme')!r}, and {made_by!r} was meant"
    return None


def write_shard(path: Path, tensors: Mapping[str, Tensor], made_by: str, view: int) -> None:
    """Write one shard, whole or not at all.

    Args:
        path: of the file.
        tensors: what `pack` gave, row by row.
        made_by: the views' `scheme`.
        view: the view's number.
    """
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    try:
        # One entry: safetensors writes several in any order, and files of the same content must be the same.
        said = json.dumps({"format": FORMAT, "scheme": made_by, "view": str(view)}, sort_keys=True)
        save_file(dict(tensors), temporary, metadata={"kd": said})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before what it names
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def pack(logits: Tensor, layout: Layout, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of outputs as it is stored: in the stored type, the largest logits only where `top_k` says so.

    With `top_k`, `tail` is the logit that each of the other classes would need for all of them to hold the probability
    that is left: at temperature 1 what is read back has the k largest probabilities, and the rest's sum, exactly.

    Args:
        logits: (B, C), float32.
        layout: how they are to lie.
        features: (B, width) each, by the name that their view has after `teacher.`.

    >>> import torch
    >>> found = pack(torch.tensor([[3.0, 1.0, 1.0]]), Layout(1, 3, 1, top_k=1), {})
    >>> found["values"], found["classes"], found["tail"]
    (tensor([[3.]]), tensor([[0]], dtype=torch.int16), tensor([1.]))
    """
    import torch

    dtype = getattr(torch, layout.dtype)
    packed = {f"feature.{path}": value.to(dtype) for path, value in features.items()}
    if layout.top_k is None:
        return {"logits": logits.to(dtype), **packed}
    values, classes = logits.topk(layout.top_k, dim=1)
    rest = logits.scatter(1, classes, -torch.inf).logsumexp(dim=1)
    tail = rest - torch.tensor(float(layout.classes - layout.top_k)).log()
    index = torch.int16 if layout.index_item == 2 else torch.int32
    return {"values": values.to(dtype), "classes": classes.to(index), "tail": tail.to(dtype), **packed}


def unpack(rows: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """What a term reads, of rows as `pack` made them: `teacher.logits` (B, C) and features, in float32.

    >>> import torch
    >>> unpack(pack(torch.tensor([[3.0, 1.0, 1.0]]), Layout(1, 3, 1, top_k=1), {}), 3)["teacher.logits"]
    tensor([[3., 1., 1.]])
    """
    views = {
        f"teacher.{name.removeprefix('feature.')}": value.float()
        for name, value in rows.items()
        if name.startswith("feature.")
    }
    if "logits" in rows:
        return {"teacher.logits": rows["logits"].float(), **views}
    full = rows["tail"].float()[:, None].expand(-1, classes)
    return {"teacher.logits": full.scatter(1, rows["classes"].long(), rows["values"].float()), **views}


class StoredLabels:
    """A teacher's stored outputs, by view and row of a split.

    Args:
        views: for each view its blocks in order: files, or tensors by name.
        ids: int64 (N,), the samples that the rows belong to.
        wanted: int64 (M,), the ids of the split that will ask; None: the same in the same order.
        classes: C.
        device: where rows are needed; on a GPU a whole view is held there while it is read.

    Raises:
        KDError: if a wanted sample is not among the stored ones.

    >>> import torch
    >>> stored = StoredLabels.of(torch.eye(3), ids=torch.tensor([7, 8, 9]), wanted=torch.tensor([9, 7]))
    >>> stored.at(0, torch.tensor([0]))["teacher.logits"]
    tensor([[0., 0., 1.]])
    """

    def __init__(
        self,
        views: Sequence[Sequence[Path | Mapping[str, Tensor]]],
        ids: Tensor,
        wanted: Tensor | None = None,
        *,
        classes: int,
        device: torch.device | str = "cpu",
    ) -> None:
        import torch

        self.device, self.classes = torch.device(device), classes
        self._views = views
        self._current = -1
        self._blocks: list[dict[str, Tensor]] = []
        self._rows: Tensor | None = None
        if wanted is not None and not wanted.equal(ids):
            ordered, where = ids.sort()
            place = torch.searchsorted(ordered, wanted).clamp(max=max(0, len(ids) - 1))
            if not len(ids) or not ordered[place].equal(wanted):
                raise KDError("the stored soft labels belong to other samples than this training split's")
            self._rows = where[place].to(self.device)

    @classmethod
    def of(cls, logits: Tensor, ids: Tensor | None = None, wanted: Tensor | None = None) -> StoredLabels:
        """Labels of one view that are in memory: logits (N, C), for the samples ``ids`` (None: 0 to N - 1)."""
        import torch

        ids = torch.arange(len(logits)) if ids is None else ids
        return cls([[{"logits": logits}]], ids, wanted, classes=logits.shape[1])

    @classmethod
    def open(
        cls, folder: Path, wanted: Tensor, classes: int, views: int | None, device: torch.device | str = "cpu"
    ) -> StoredLabels:
        """The labels in an artifact's folder.

        Args:
            folder: the artifact's.
            wanted: ids of the split that will ask.
            classes: C.
            views: K, or None for labels of the one view that never changes.
            device: where rows are needed.

        Raises:
            KDError: if files are missing or unreadable, or belong to other samples.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(folder / INDEX, framework="pt") as file:
                ids = file.get_tensor("ids")
        except (OSError, SafetensorError) as error:
            raise KDError(f"no soft labels can be read from {folder}: {error}") from error
        found: list[list[Path | Mapping[str, Tensor]]]
        if views is None:
            found = [[folder / INDEX]]
        else:
            found = [list(sorted(folder.glob(f"labels-v{view:05d}-b*.safetensors"))) for view in range(views)]
        if missing := [view for view, blocks in enumerate(found) if not blocks]:
            raise KDError(f"{folder} holds no view {missing[0]} of {views}; remove it with `kd rm`, and run again")
        return cls(found, ids, wanted, classes=classes, device=device)

    def on(self, device: torch.device) -> StoredLabels:
        """The same labels, read on another device."""
        if device != self.device:
            self.device, self._current = device, -1
            self._rows = None if self._rows is None else self._rows.to(device)
        return self

    @property
    def views(self) -> int:
        """How many views are stored."""
        return len(self._views)

    def at(self, view: int, rows: Tensor) -> dict[str, Tensor]:
        """`teacher.logits` (B, C) and features (B, width) of one view, for rows of the split.

        Args:
            view: 0 to K - 1.
            rows: int64 (B,), on the device.
        """
        if view != self._current:
            self._enter(view)
        if self._rows is not None:
            rows = self._rows.index_select(0, rows)
        if len(self._blocks) == 1:
            return unpack({n: t.index_select(0, rows) for n, t in self._blocks[0].items()}, self.classes)
        return unpack(self._gathered(rows), self.classes)

    def _gathered(self, rows: Tensor) -> dict[str, Tensor]:
        import torch

        length = len(next(iter(self._blocks[0].values())))  # all blocks but the last are as long
        which, place = rows // length, rows % length
        order, parts = [], []
        for number, block in enumerate(self._blocks):
            if len(mine := (which == number).nonzero().flatten()):
                order.append(mine)
                parts.append({n: t.index_select(0, place.index_select(0, mine)) for n, t in block.items()})
        back = torch.cat(order).argsort()
        return {n: torch.cat([part[n] for part in parts]).index_select(0, back) for n in parts[0]}

    def _enter(self, view: int) -> None:
        """Map a view's files, and ask the system to read the next view's ahead."""
        import torch

        blocks = [self._opened(block) for block in self._views[view]]
        if self.device.type != "cpu":
            # Once an epoch: a batch then has nothing to wait for.
            blocks = [{n: torch.cat([b[n] for b in blocks]).to(self.device) for n in blocks[0]}]
        self._blocks, self._current = blocks, view
        for block in (*self._views[view], *self._views[(view + 1) % len(self._views)]):
            if isinstance(block, Path):
                _read_ahead(block)

    def _opened(self, block: Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        if not isinstance(block, Path):
            return dict(block)
        try:
            with safe_open(block, framework="pt") as file:
                return {name: file.get_tensor(name) for name in sorted(file.keys()) if name != "ids"}
        except (OSError, SafetensorError) as error:
            raise KDError(f"the soft labels in {block} cannot be read: {error}") from error


def _read_ahead(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def check(views: Any, dtype: Any, top_k: Any, classes: int | None) -> None:
    """Refuse settings of `labels` that no teacher could meet.

    Raises:
        InputError: naming the field, its value and what it may be.
    """
    if views is not None and not (type(views) is int and views >= 1):
        raise InputError(
            f"labels.views={views!r}: give the number of views of each sample to store (the epochs for an exact copy "
            "of a live teacher), or null"
        )
    if dtype not in ITEM:
        raise InputError(f"labels.dtype={dtype!r} is none of {', '.join(ITEM)}")
    if top_k is not None and not (type(top_k) is int and top_k >= 1 and (classes is None or top_k < classes)):
        limit = f"fewer than the {classes} classes" if classes is not None else "a whole number"
        raise InputError(
            f"labels.top_k={top_k!r}: give how many logits to keep, 1 or more and {limit}, or null for all"
        )


def size_text(count: float) -> str:
    """Bytes as a person says them.

    >>> size_text(2_160_000_000), size_text(700)
    ('2.2 GB', '700 bytes')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}" if count < 10 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} bytes"


def duration_text(seconds: float) -> str:
    """A duration as a person says it.

    >>> duration_text(3), duration_text(200), duration_text(9000)
    ('3 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
