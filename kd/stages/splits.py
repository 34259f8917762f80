"""The data of a stage: splits whose content is what the key names, before training and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kd.errors import InputError, KDError
from kd.stages.base import Config, Room
from kd.store import canonical

if TYPE_CHECKING:
    import torch

    from kd.data import Split, Splits


def load_data(data: Config, room: Room) -> Splits:
    """The splits; refused if their content is not what the key names."""
    found: Splits = room.once(("data", canonical(data)), lambda: _load(data, room))
    return found


def source_of(data: Config, room: Room) -> Any:
    """The data set of a config, nothing of it read."""
    from kd.instantiate import instantiate

    found = instantiate({k: v for k, v in data.items() if k != "digest"}, room.run.trusted, "data")
    return found.resolved(room.data_dir)


def training_samples(data: Config, room: Room, samples: int | None = None) -> int:
    """How many samples a training will learn from, without reading an image.

    Args:
        data: the data set.
        room: where it is looked for.
        samples: at most so many are taken, as `fit.samples`; None: all.
    """
    there = int(source_of(data, room).training_samples(room.data_dir))
    return there if samples is None else min(samples, there)


def _load(data: Config, room: Room) -> Splits:
    source = source_of(data, room)
    found = source.content_digest(room.data_dir, room.data_cache / "digests.json")
    if data.get("digest") not in (None, found):
        raise InputError(
            f"the data set {data['name']} has changed: its content is {found[:16]}, the config names "
            f"{str(data['digest'])[:16]}; plan again, or put the old files back"
        )
    splits: Splits = source.load(room.data_dir, memory_bytes=int(room.run.memory_gb * 2**30), cache=room.data_cache)
    if not len(splits.validation):
        raise InputError(
            "data.validation=0 leaves no validation sample, and test may choose nothing: give it 1 or more"
        )
    return splits


def data_print(data: Config, room: Room) -> dict[str, Any]:
    """The data's fingerprint, taken again after they were used: only files that were touched meanwhile are read again.

    Raises:
        KDError: if the content is no longer what it was at the start. The checkpoint, which may have learnt from both,
            is gone then.
    """
    try:
        source = source_of(data, room)
        found = source.content_digest(room.data_dir, room.data_cache / "digests.json")
        said = f"its content is now {found[:16]}"
    except InputError as error:
        found, said = "", str(error)
    if data.get("digest") not in (None, found):
        for path in room.work.glob("*"):
            if path.is_file():
                path.unlink()
        raise KDError(
            f"the data set {data['name']} was {str(data['digest'])[:16]} when {room.stage or 'the stage'} began, and "
            f"changed while it ran ({said}); nothing was stored: leave the files alone and run the same command again"
        )
    return {"name": data["name"], "digest": found}


def subset(splits: Splits, samples: int | None, seed: int) -> torch.Tensor | None:
    """Rows of the training split to learn from: balanced over classes, drawn by the seed; None for all."""
    import torch

    from kd.training.seeds import mix

    if samples is None or samples >= len(splits.train):
        return None
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(mix(seed, "samples")))
    targets = splits.train.targets.cpu()[order]
    # The k-th sample of each class comes before the k+1-th of any.
    rank = torch.empty_like(targets)
    for label in range(int(targets.max()) + 1):
        where = targets == label
        rank[where] = torch.arange(int(where.sum()))
    return order[torch.argsort(rank, stable=True)[:samples]].sort().values


def taken(splits: Splits, samples: int | None, seed: int) -> Split:
    """The part of the training split to learn from."""
    rows = subset(splits, samples, seed)
    return splits.train if rows is None else splits.train.subset(rows)
