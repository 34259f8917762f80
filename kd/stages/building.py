"""From a stage's config to what it trains: a network and the terms of its objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd.errors import InputError
from kd.stages.base import Config, Room

if TYPE_CHECKING:
    from kd.data import Splits
    from kd.models import Normalised
    from kd.objective import Objective


def build(model: Config, data: Config, splits: Splits | None, seed: int, room: Room) -> Normalised:
    """A network for the data's shape and classes, initialised from the seed alone."""
    from kd.instantiate import instantiate
    from kd.models import Normalised, preprocessing
    from kd.training.seeds import seed_all

    seed_all(seed, "init")
    classes = len(splits.classes) if splits is not None else int(data["num_classes"])
    net = instantiate(
        model, room.run.trusted, num_classes=classes, in_chans=int(data["channels"]), size=int(data["size"])
    )
    return Normalised(net, *preprocessing(net, data["mean"], data["std"]))


def build_objective(config: Config, room: Room) -> Objective:
    """The terms that a config describes.

    Raises:
        InputError: if a term is none, or nothing is to be minimised.
    """
    from kd.instantiate import instantiate
    from kd.objective import Objective

    if "loss" in config:
        raise InputError("a term cannot be called 'loss': that is the name of the sum in records and loggers")
    try:
        return Objective(instantiate(config, room.run.trusted))
    except (TypeError, ValueError) as error:
        raise InputError(f"loss: {error}") from error
