"""The stage that makes images from a teacher alone, for students that may not see its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.errors import InputError
from kd.stages.base import Room, Stage
from kd.store import Artifact
from kd.training.settings import require

if TYPE_CHECKING:
    from kd.models import Normalised
    from kd.training.dreaming import Recipe

TEACHER = "teacher"


@dataclass(frozen=True)
class Dream:
    """Make images by inverting a teacher's batch statistics (DeepInversion); no data set is read.

    The k-th image is made to show class k modulo their number. `kd.training.dreaming` says what is minimised.

    Args:
        samples: how many images.
        batch_size: made together: their statistics are compared, so it changes them.
        steps: on each batch.
        lr: on normalised pixels.
        statistics: weight of the distance to the teacher's running statistics.
        first: what that of its first batch norm is multiplied by.
        variation: weight of the total variation.
        l2: weight of the norm of the pixels.
        jitter: pixels by which images are rolled at most.
        seed: of the noise that they begin with.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}

    samples: int
    batch_size: int
    steps: int
    lr: float
    statistics: float
    first: float
    variation: float
    l2: float
    jitter: int
    seed: int

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of no more than all images; what multiplies nothing at 1.

        Raises:
            InputError: at a value out of range.
        """
        for name in ("samples", "batch_size", "steps", "jitter", "seed"):
            least = {"samples": 2, "batch_size": 2, "steps": 1}.get(name, 0)
            whole = type(config[name]) is int and config[name] >= least
            require(whole, f"dream.{name}", config[name], f"a whole number, {least} or more")
        for name in ("lr", "statistics", "first", "variation", "l2"):
            value = config[name]
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            above = name == "lr"
            sound = number and (value > 0 if above else value >= 0)
            require(sound, f"dream.{name}", value, "a number above 0" if above else "a number, 0 or more")
        if config["samples"] % config["batch_size"] == 1:
            raise InputError(
                f"dream.batch_size={config['batch_size']} leaves a last batch of one image, which has no statistics; "
                "change it by one"
            )
        found = {**config, "batch_size": min(config["batch_size"], config["samples"])}
        return found if config["statistics"] else {**found, "first": 1.0}

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It reads its teacher always.

        Raises:
            InputError: if it has none.
        """
        if TEACHER not in inputs:
            raise InputError("images are made from a teacher; name a stage, e.g. inputs: {teacher: teacher}")
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Look whether the teacher has statistics to invert.

        Raises:
            InputError: if it has no batch norm.
        """
        from kd.training.dreaming import check

        check(room.stand_in(inputs[TEACHER]).net)

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Make the batches that an earlier attempt has not left behind, then write all images as one file."""
        import torch

        from kd.data import dreams
        from kd.models import load, recipe_of
        from kd.training.dreaming import check
        from kd.training.loggers import loggers, summarise
        from kd.training.trainer import device_of

        known, teacher = recipe_of(inputs[TEACHER].path), load(inputs[TEACHER].path)
        check(teacher.net)
        teacher = teacher.to(device_of(room.run))
        channels, side = int(known["in_chans"]), int(known["size"])
        targets = torch.arange(self.samples) % int(known["num_classes"])
        batches = torch.split(targets, self.batch_size)
        there = sum((room.work / dreams.shard(number)).exists() for number in range(len(batches)))
        if there:
            room.tell({"event": "say", "line": f"images: {there} of {len(batches)} batches are there"})
        for number, wanted in enumerate(batches):
            path = room.work / dreams.shard(number)
            if not path.exists():
                made = self._made(teacher, wanted, (channels, side, side), number, len(batches), room)
                dreams.write(path, made, wanted)
        parts = [dreams.read(room.work / dreams.shard(n), channels, side) for n in range(len(batches))]
        images = torch.cat([part.images for part in parts if part.images is not None])
        dreams.write(out / dreams.IMAGES, images, targets)
        metrics = self._worth(teacher, images, targets)
        with loggers(
            room.run, key=room.key, stage=room.stage, document=room.document, dials=room.dials, sweep=room.sweep
        ) as sinks:
            summarise(sinks, metrics, 0)
        return {"metrics": metrics}

    def recipe(self) -> Recipe:
        """How each batch is made."""
        from kd.training.dreaming import Recipe

        return Recipe(self.steps, self.lr, self.statistics, self.first, self.variation, self.l2, self.jitter)

    def _made(
        self, teacher: Normalised, targets: Any, shape: tuple[int, int, int], number: int, batches: int, room: Room
    ) -> Any:
        from kd.training.dreaming import dream

        def tell(step: int) -> None:
            if step % 10 == 9 or step == self.steps - 1:
                done = number * self.steps + step + 1
                room.tell({"event": "pass", "step": done, "total": batches * self.steps})

        return dream(teacher, targets, shape, self.recipe(), self.seed, number, tell)

    def _worth(self, teacher: Normalised, images: Any, targets: Any) -> dict[str, float]:
        """What the teacher makes of the images that are stored, batch by batch as they were made."""
        from kd.training.dreaming import judged

        right, distance = judged(teacher, images, targets, self.batch_size)
        return {"dream/teacher_accuracy": right, "dream/statistics": distance}
