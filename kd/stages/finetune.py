"""The stage that trains a network further: how a compressed one wins back what it lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.roles import teachers
from kd.stages.base import Config, Room, Stage
from kd.stages.compress import _mark
from kd.stages.image import FIT_SINCE, Distil
from kd.store import Artifact

if TYPE_CHECKING:
    from kd.models import Normalised


@dataclass(frozen=True)
class FineTune:
    """Train a network that is there already, under any terms; what compression made of it stays.

    Args:
        data: the data set.
        objective: its terms; a teacher among them is the input `teacher`.
        fit: the schedule.
        seed: of the order and, without ``views``, the augmentation.
        views: as for `Distil`.
        view_seed: as for `Distil`.
        live: as for `Distil`.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {**FIT_SINCE, "views": None, "view_seed": None, "live": False}
    PHASE: ClassVar[str] = "structure"

    data: Config
    objective: Config
    fit: Config
    seed: int
    views: int | None
    view_seed: int | None
    live: bool

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """As for `Distil`."""
        return Distil.settled(config)

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """As for `Distil`."""
        return Distil.unused(config, inputs)

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Bind the terms on stand-ins of both networks.

        Raises:
            InputError: if a layer path is not there, or shapes cannot be bridged.
        """
        from kd.stages.image import rehearse

        student = room.stand_in(inputs["model"])
        heard = {role: room.stand_in(inputs[role]) for role in teachers(inputs)}
        rehearse(self.data, student, heard, self.objective, self.fit, room)

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The network as it came."""
        return room.stand_in(inputs["model"])

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Train, evaluate against the labels and the teacher, save."""
        from kd.compress.masks import zeros
        from kd.compress.measure import file_bytes
        from kd.compress.structure import masked
        from kd.models import load, recipe_of
        from kd.models.files import WEIGHTS
        from kd.stages.image import train_net
        from kd.stages.splits import load_data

        splits = load_data(self.data, room)
        recipe = recipe_of(inputs["model"].path)
        student = load(inputs["model"].path)
        masks = zeros(student.net, list(masked(recipe.get("structure", []))))
        heard = {role: artifact for role, artifact in inputs.items() if role != "model"}
        result = train_net(self, student, heard, splits, out, room, recipe, masks)
        result["cost"]["gzip_bytes"] = file_bytes(out / WEIGHTS)["gzip_bytes"]
        return {**result, **_mark(result, inputs["model"], splits, room)}
