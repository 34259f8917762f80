"""From a stage's config to what it trains: a network and the terms of its objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kd.errors import InputError
from kd.schedules import parted, replaced, schedule_of
from kd.stages.base import Config, Room

if TYPE_CHECKING:
    from kd.data import Splits
    from kd.models import Normalised
    from kd.objective import Objective

MODEL = {"_target_": "kd.models.create", "name": "", "pretrained": False, "stages": None, "options": {}}


def model_of(node: Any) -> Config | None:
    """A network by its name alone, or some of its fields, as a whole config; None where it is neither.

    >>> model_of("resnet18") == model_of({"name": "resnet18"}) == {**MODEL, "name": "resnet18"}, model_of(3)
    (True, None)
    """
    if isinstance(node, str):
        return {**MODEL, "name": node}
    return {**MODEL, **node} if isinstance(node, Mapping) else None


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
    """The terms that a config describes; each number of a schedule's is one that its loss would take.

    Raises:
        InputError: if a term is none, a number is out of its range, or nothing is to be minimised.
    """
    from kd.instantiate import instantiate
    from kd.objective import Objective

    if "loss" in config:
        raise InputError("a term cannot be called 'loss': that is the name of the sum in records and loggers")
    try:
        terms = {}
        for name, term in config.items():
            plain, scheduled = parted(term)
            for path, node in scheduled.items():
                for value in schedule_of(node).ends():
                    instantiate(replaced(plain, path, value), room.run.trusted)
            # Without a schedule the config goes through as it is: a class of the user's own need not know of them.
            terms[name] = {**plain, "schedule": scheduled} if scheduled else plain
        return Objective(instantiate(terms, room.run.trusted))
    except (TypeError, ValueError) as error:
        raise InputError(f"loss: {error}") from error
