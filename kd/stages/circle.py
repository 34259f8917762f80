"""The stage in which several networks learn at once: peers from each other, or a teacher from its student too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.errors import InputError
from kd.roles import by_role
from kd.stages.assembly import Assembly, steps_of
from kd.stages.base import Config, Room, Stage
from kd.stages.bindings import bind_sides, lends_nothing
from kd.stages.building import build, build_objective, model_of
from kd.stages.image import FIT_SINCE, recipe, trained
from kd.stages.splits import load_data, taken
from kd.store import Artifact
from kd.training.settings import Fit, one_of, require

if TYPE_CHECKING:
    from kd.data import Splits
    from kd.models import Normalised
    from kd.objective import Objective
    from kd.training.circle import Circle as Module
    from kd.training.circle import Member

TURNS, HEARS = ("joint", "alternate"), ("others", "all")
STUDENT, TEACHER = "student", "teacher"


@dataclass(frozen=True)
class Circle:
    """Train a student together with its peers, its teacher, or both; the student is what is shipped.

    A term binds to `student.…`, the network that learns by it, and to `teacher.…`, the one that this hears; where it
    hears several they are `teacher1.…`, `teacher2.…`: the teacher first, then student and peers in order.

    Args:
        student: the network.
        peers: networks that start anew, as the student does, each from weights of its own; by name, or as `student`.
        copies: of the student, as peers where none is named.
        data: the data set.
        objective: the terms of the student and of each peer.
        back: the terms of the teacher; there `student` is the teacher, and `teacher` those it hears.
        fit: the schedule.
        seed: of all weights, the order and the augmentation.
        tune: what of the teacher learns: `all`, `head`, or a list of layers.
        rate: the teacher's learning rate as a multiple of `fit.lr`.
        turns: `joint`, all learn in each step; or `alternate`, one after the other.
        hears: `others`, or `all`: itself too, where the terms mix those who are heard.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {**FIT_SINCE, "student.stages": None}

    student: Config
    peers: list[Config]
    copies: int
    data: Config
    objective: Config
    back: Config
    fit: Config
    seed: int
    tune: str | list[str]
    rate: float
    turns: str
    hears: str

    @property
    def student_config(self) -> Config:
        """The network that is shipped."""
        return self.student

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Peers as networks, one by one.

        Raises:
            InputError: at a value out of range.
        """
        one_of("circle.turns", config["turns"], TURNS)
        one_of("circle.hears", config["hears"], HEARS)
        number = isinstance(config["rate"], (int, float)) and not isinstance(config["rate"], bool)
        require(number and config["rate"] >= 0, "circle.rate", config["rate"], "0 or more")
        tune = checked_tune(config["tune"])
        copies, peers = config["copies"], list(config["peers"])
        require(type(copies) is int and copies >= 0, "circle.copies", copies, "a whole number, 0 or more")
        found = {**config, "peers": [_model(p) for p in peers] or [config["student"]] * copies, "copies": 0}
        return {**found, "tune": tune}

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It reads its inputs always; a circle of one is none.

        Raises:
            InputError: if the student stands alone.
        """
        if not (config["peers"] or config["copies"] or TEACHER in inputs):
            raise InputError("nobody learns with the student: name peers, e.g. students=[resnet18], or a teacher")
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Build all networks and bind their terms on two blank images.

        Raises:
            InputError: if a layer path is not there, shapes cannot be bridged, or class counts differ.
        """
        from kd.training.optimisers import configure
        from kd.training.trainer import check_compiler, check_precision

        fit = Fit(**self.fit)
        check_precision(fit, room.run)
        check_compiler("fit.compile", fit.compile, room.run)
        if room.run.devices > 1:
            raise InputError(f"run.devices={room.run.devices}: networks that learn together do so on one device")
        teacher = room.stand_in(inputs[TEACHER]) if TEACHER in inputs else None
        members, said = self._members(teacher, None, room, 2, rehearse=True)
        for line in said:
            room.tell({"event": "say", "line": line})
        circle = self._circle(members, fit, configure(fit, 1))
        circle.configure_optimizers()

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The student, with weights that mean nothing."""
        return build(self.student, self.data, None, 0, room)

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Train all, evaluate each, save each: the student as the artifact's network, the others beside it."""
        from kd.models import load, save

        splits = load_data(self.data, room)
        teacher = load(inputs[TEACHER].path) if TEACHER in inputs else None
        made = self.assemble(teacher, splits, room)
        others = {name: member.net for name, member in made.module.members.items() if name != STUDENT}

        def more() -> dict[str, Any]:
            return told(others, inputs, splits, self.data, room)

        card = trained(self, made, inputs, splits, out, room, recipe(self.student, self.data, splits), more=more)
        configs = {f"peer{index}": model for index, model in enumerate(self.peers, 1)}
        for name, net in others.items():
            spec = recipe(configs[name], self.data, splits) if name in configs else recipe_of_artifact(inputs[TEACHER])
            save(net.cpu().eval(), spec, out, name=name)
        return card

    def assemble(self, teacher: Normalised | None, splits: Splits, room: Room) -> Assembly[Module]:
        """Put the training together.

        Args:
            teacher: as it was loaded, where there is one.
            splits: of the data.
            room: where it happens.

        Raises:
            InputError: if the terms cannot be bound.
        """
        from kd.training.optimisers import configure

        fit = Fit(**self.fit)
        split = room.once(
            ("samples", id(splits), fit.samples, self.seed), lambda: taken(splits, fit.samples, self.seed)
        )
        members, said = self._members(teacher, splits, room, len(split))
        circle = self._circle(members, fit, configure(fit, steps_of(fit, len(split))))
        return Assembly(circle, fit, split, None, by_role(teacher), None, None, tuple(said))

    def _members(
        self,
        teacher: Normalised | None,
        splits: Splits | None,
        room: Room,
        samples: int,
        rehearse: bool = False,
    ) -> tuple[dict[str, Member], list[str]]:
        """Who learns with whom, bound; and what is bound to what, a line each."""
        from kd.training.circle import Member
        from kd.training.seeds import mix, seed_all

        nets = {STUDENT: build(self.student, self.data, splits, self.seed, room)}
        for index, model in enumerate(self.peers, 1):
            nets[f"peer{index}"] = build(model, self.data, splits, mix(self.seed, "peer", index), room)
        names = [*([TEACHER] if teacher is not None else []), *nets]
        seed_all(self.seed, "objective")
        members = {}
        for name in names:
            heard = names if self.hears == "all" else [other for other in names if other != name]
            terms: Objective = build_objective(self.back if name == TEACHER else self.objective, room)
            terms.draws_from(self.seed)
            lends_nothing(terms)
            if name == TEACHER and teacher is not None:
                members[name] = Member(teacher, terms, heard, tuned(teacher, self.tune, self.data), float(self.rate))
            else:
                members[name] = Member(nets[name], terms, heard)
        said = []
        for name, member in members.items():
            assert member.objective is not None
            nets = {"student": member.net} | {side: members[other].net for side, other in member.roles().items()}
            try:
                lines = bind_sides(member.objective, nets, self.data, samples=samples, rehearse=rehearse)
            except InputError as error:
                raise InputError(str(error) if name == STUDENT else f"for {name}: {error}") from error
            said += lines if name == STUDENT else [f"{name}: {line}" for line in lines]
        return members, said

    def _circle(self, members: Mapping[str, Member], fit: Fit, optimisers: Any) -> Module:
        from kd.training.circle import Circle as Module

        return Module(members, STUDENT, optimisers, fit.lr, self.turns == "alternate", fit.channels_last)


def checked_tune(tune: Any) -> str | list[str]:
    """What of a teacher learns, in one form.

    Raises:
        InputError: if it is neither `all`, `head` nor a list of layers.

    >>> checked_tune(["fc", "layer4", "fc"])
    ['fc', 'layer4']
    """
    if tune in ("all", "head"):
        return str(tune)
    if isinstance(tune, list) and tune and all(isinstance(path, str) for path in tune):
        return sorted(set(tune))
    raise InputError(f"circle.tune={tune!r}: give all, head, or a list of layers, e.g. [layer4,fc]")


def _model(node: Any) -> Config:
    """A network by its name alone, or as a config has it."""
    found = model_of(node)
    if found is not None and found["name"]:
        return found
    raise InputError(f"students: {node!r} is no network; give a name, or a mapping such as {{name: resnet18}}")


def tuned(net: Normalised, tune: str | list[str], data: Config) -> list[str] | None:
    """The layers of the teacher that learn, by path; None for all."""
    from kd.models.outline import outline

    if tune == "all":
        return None
    if tune != "head":
        return list(tune)
    head = outline(net.net, (int(data["channels"]), int(data["size"]), int(data["size"]))).classifier
    if head is None:
        raise InputError(f"{type(net.net).__name__} has no classifier to tune; name its layers, or tune all")
    return [head]


def recipe_of_artifact(artifact: Artifact) -> dict[str, Any]:
    """What an artifact's network is built from."""
    from kd.models.files import recipe_of

    return recipe_of(artifact.path)


def told(
    others: Mapping[str, Normalised], inputs: Mapping[str, Artifact], splits: Splits, data: Config, room: Room
) -> dict[str, Any]:
    """What became of the others: accuracies, and how far the teacher went from where it was."""
    import torch

    from kd.models import load
    from kd.stages.evaluation import logits_of

    metrics: dict[str, Any] = {}
    for name, net in others.items():
        net = net.float()
        chosen = {}
        for part, split in (("val", splits.validation), ("test", splits.test)):
            chosen[part] = logits_of(net, split, data, room).argmax(dim=1)
            right = (chosen[part] == split.targets.cpu()).double().mean().item()
            metrics[f"{name}/{part}_accuracy"] = right
        if name == TEACHER:
            before = load(inputs[TEACHER].path)
            was = logits_of(before, splits.test, data, room).argmax(dim=1)
            metrics["teacher/test_accuracy_before"] = (was == splits.test.targets.cpu()).double().mean().item()
            metrics["teacher/agreement_with_before"] = (was == chosen["test"]).double().mean().item()
            pairs = list(zip(net.cpu().parameters(), before.cpu().parameters(), strict=True))
            moved = torch.stack([(a - b).detach().double().square().sum() for a, b in pairs]).sum().sqrt()
            length = torch.stack([b.detach().double().square().sum() for _, b in pairs]).sum().sqrt()
            metrics["teacher/drift"] = (moved / length).item()
    return metrics
