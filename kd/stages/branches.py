"""The stage in which one network is trained as several branches that teach one another, and shipped as one: ONE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd import names
from kd.errors import InputError
from kd.roles import teachers
from kd.stages.assembly import Assembly, assemble
from kd.stages.base import Config, Room, Stage
from kd.stages.bindings import views_of
from kd.stages.building import build, build_objective
from kd.stages.image import FIT_SINCE, Distil, recipe, rehearse, trained
from kd.stages.splits import images_in, learnt_from
from kd.store import Artifact
from kd.training.settings import require

if TYPE_CHECKING:
    from kd.data import Splits
    from kd.models import Normalised
    from kd.models.branches import Branched
    from kd.training.module import Distiller

BEST = "best"


@dataclass(frozen=True)
class Branches:
    """Train a student with several branches behind a shared trunk, and keep one of them as the student.

    Terms read `student.branches`, `student.ensemble` and, as of any student, `student.logits` (of the branch that is
    shipped; of the first where that is to be the best), layers and parts, which are those of the first branch.

    Args:
        student: the network, of one branch.
        branches: how many, 2 or more; each has weights of its own.
        at: the last layer that they share: a stage or a path; None: the last stage but one.
        ship: number of the branch that is kept, or `best`, the one that is most often right on validation.
        data: the data set.
        objective: its terms.
        fit: the schedule.
        seed: of all weights, the order and, without ``views``, the augmentation.
        views: as in `Distil`, where a term hears a teacher.
        view_seed: likewise.
        live: likewise.
        teacher_stages: likewise.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {**FIT_SINCE, "student.stages": None, "teacher_stages": None}

    student: Config
    branches: int
    at: str | None
    ship: int | str
    data: Config
    objective: Config
    fit: Config
    seed: int
    views: int | None
    view_seed: int | None
    live: bool
    teacher_stages: list[str] | None

    @property
    def student_config(self) -> Config:
        """The network that is shipped."""
        return self.student

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """As `Distil`, but that named stages always count: they say where the branches begin.

        Raises:
            InputError: at a value out of range.
        """
        count, ship, at = config["branches"], config["ship"], config["at"]
        require(type(count) is int and count >= 2, "one.branches", count, "a whole number, 2 or more")
        known = ship == BEST or (type(ship) is int and 1 <= ship <= count)
        require(known, "one.ship", ship, f"the number of a branch, 1 to {count}, or best")
        require(at is None or isinstance(at, str), "one.at", at, "a stage or a layer, e.g. stage1, or null")
        return {**Distil.settled(config), "student": config["student"]}

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """A teacher and its labels, where no term hears it; else as `Distil`.

        Raises:
            InputError: if no term reads what the branches say.
        """
        read = [names.part(view) for view in views_of(config["objective"], "student")]
        if not any(part == "ensemble" or str(part).startswith("branch") for part in read):
            raise InputError("no term of a weight above 0 teaches the branches; add one that does, e.g. loss=[one]")
        deaf = {
            role: f"no term of a weight above 0 hears the {role}"
            for role in teachers(inputs)
            if not views_of(config["objective"], role)
        }
        return {**deaf, **Distil.unused(config, inputs)}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Build and branch the network and bind the terms on two blank images.

        Raises:
            InputError: if the network cannot be branched there, or a term cannot be bound.
        """
        images_in(inputs)
        heard: dict[str, Config | Normalised] = {role: room.stand_in(inputs[role]) for role in teachers(inputs)}
        student = self._branched(None, room)
        for name, term in build_objective(self.objective, room).active.items():
            if hasattr(term.loss, "graft"):
                raise InputError(f"the term {name!r} ships another end of the network, and so does a branch; drop one")
        rehearse(self.data, student, heard, self.objective, self.fit, room, self.teacher_stages)
        line = f"{self.branches} branches of {self.student['name']} share all up to {_net(student).at}"
        room.tell({"event": "say", "line": line})

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The student, with weights that mean nothing."""
        return build(self.student, self.data, None, 0, room)

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Train all branches, judge each and the ensemble, save the one that is kept."""
        splits = learnt_from(self.data, inputs, room)
        student = self._branched(splits, room)
        made = assemble(self, student, inputs, splits, room)
        metrics: dict[str, Any] = {}
        spec = recipe(self.student, self.data, splits)
        keep = partial(self._kept, splits=splits, room=room, metrics=metrics)
        return trained(self, made, inputs, splits, out, room, spec, more=lambda: metrics, keep=keep)

    def assemble(self, teacher: Normalised | None, splits: Splits, room: Room) -> Assembly[Distiller]:
        """Put the training together, under a live teacher if there is one."""
        return assemble(self, self._branched(splits, room), {}, splits, room, teacher)

    def _branched(self, splits: Splits | None, room: Room) -> Normalised:
        from kd.models import Normalised
        from kd.models.branches import Branched, trunk_of
        from kd.training.seeds import mix, seed_all

        nets = [build(self.student, self.data, splits, self.seed, room)]
        for number in range(2, self.branches + 1):
            nets.append(build(self.student, self.data, splits, mix(self.seed, "branch", number), room))
        shape = (int(self.data["channels"]), int(self.data["size"]), int(self.data["size"]))
        seed_all(self.seed, "gate")
        shipped = self.ship if isinstance(self.ship, int) else 1
        net = Branched([one.net for one in nets], trunk_of(nets[0].net, shape, self.at), shape, shipped)
        return Normalised(net, *nets[0].statistics)

    def _kept(self, student: Normalised, splits: Splits, room: Room, metrics: dict[str, Any]) -> Normalised:
        """The branch that is shipped, as a network of its own; what each was worth goes into the metrics."""
        from kd.models import Normalised
        from kd.models.branches import Every
        from kd.stages.evaluation import logits_of

        every = Normalised(Every(_net(student)), *student.statistics)
        scores = {}
        for part, split in (("val", splits.validation), ("test", splits.test)):
            chosen = logits_of(every, split, self.data, room).argmax(dim=2)
            right = (chosen == split.targets.cpu()[:, None]).double().mean(dim=0).tolist()
            scores[part] = right[:-1]
            metrics |= {f"branch{number}/{part}_accuracy": score for number, score in enumerate(right[:-1], 1)}
            metrics[f"ensemble/{part}_accuracy"] = right[-1]
        which = self.ship if isinstance(self.ship, int) else 1 + scores["val"].index(max(scores["val"]))
        metrics["branch/shipped"] = which
        return Normalised(_net(student).plain(which), *student.statistics)


def _net(student: Normalised) -> Branched:
    from kd.models.branches import Branched

    assert isinstance(student.net, Branched)
    return student.net
