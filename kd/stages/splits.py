"""The data of a stage: splits whose content is what the key names, before training and after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kd.errors import InputError, KDError
from kd.roles import plain
from kd.stages.base import Config, Room
from kd.store import Artifact, canonical

if TYPE_CHECKING:
    import torch

    from kd.data import Split, Splits


IMAGES = "images"  # the role of the stage whose images stand for the training split


def load_data(data: Config, room: Room) -> Splits:
    """The splits; refused if their content is not what the key names."""
    found: Splits = room.once(("data", canonical(data)), lambda: _load(data, room))
    return found


def learnt_from(data: Config, inputs: Mapping[str, Artifact], room: Room) -> Splits:
    """The splits with what a stage learns from: its input `images`, if it has one, in the place of the training split.

    Validation and test stay the data's own.

    Raises:
        KDError: if the images are not of the data's shape, or show classes that it has not, or labels are of others.
    """
    splits = load_data(data, room)
    artifact = inputs.get(IMAGES)
    for role, labels in inputs.items():
        if plain(role) == "labels" and labels.card["document"]["inputs"].get(IMAGES) != (artifact and artifact.key):
            raise KDError(f"{role} are of other images than the student sees; name one stage as the {IMAGES} of both")
    if artifact is None:
        return splits
    found: Splits = room.once((IMAGES, artifact.key, canonical(data)), lambda: _made(splits, artifact, data))
    return found


def _made(splits: Splits, artifact: Artifact, data: Config) -> Splits:
    from dataclasses import replace

    from kd.data import dreams

    made = dreams.read(artifact.file(dreams.IMAGES), int(data["channels"]), int(data["size"]))
    if int(made.targets.max()) >= len(splits.classes):
        count = int(made.targets.max()) + 1
        raise KDError(f"the images show {count} classes, and {data['name']} has {len(splits.classes)}")
    return replace(splits, train=made)


def images_in(inputs: Mapping[str, Any]) -> int | None:
    """How many images a stage learns from in the place of the data's; None where it learns from these.

    Raises:
        InputError: if the stage that is named makes none.
    """
    source = inputs.get(IMAGES)
    if source is None:
        return None
    config = source.card["document"]["config"] if isinstance(source, Artifact) else vars(source)
    makes = "images.safetensors" in source.card["files"] if isinstance(source, Artifact) else hasattr(source, "recipe")
    if not makes:
        raise InputError(f"{IMAGES} must name a stage that makes images, such as kd.stages.Dream")
    return int(config["samples"])


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
