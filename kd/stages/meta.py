"""The stage in which a teacher learns to teach: MetaDistil."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.errors import InputError
from kd.stages.assembly import Assembly, steps_of
from kd.stages.base import Config, Room, Stage
from kd.stages.bindings import bind, lends_nothing
from kd.stages.building import build, build_objective
from kd.stages.circle import STUDENT, TEACHER, checked_tune, recipe_of_artifact, told, tuned
from kd.stages.image import FIT_SINCE, recipe, trained
from kd.stages.splits import load_data, taken, training_samples
from kd.store import Artifact
from kd.training.settings import Fit, require

if TYPE_CHECKING:
    from kd.data import Split, Splits
    from kd.models import Normalised
    from kd.objective import Objective
    from kd.training.circle import Circle as Module


@dataclass(frozen=True)
class MetaDistil:
    """Train a student under a teacher that learns, before each step, from what that step would do to held-out samples.

    Args:
        student: the network.
        data: the data set.
        objective: its terms.
        fit: the schedule.
        seed: of the student's weights, the samples held out, the order and the augmentation.
        tune: what of the teacher learns: `all`, `head`, or a list of layers.
        rate: the teacher's learning rate as a multiple of `fit.lr`.
        quiz: share of the training samples that the student does not learn from, and the teacher does.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {**FIT_SINCE, "student.stages": None}

    student: Config
    data: Config
    objective: Config
    fit: Config
    seed: int
    tune: str | list[str]
    rate: float
    quiz: float

    @property
    def student_config(self) -> Config:
        """The network that is shipped."""
        return self.student

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What of the teacher learns, in one form.

        Raises:
            InputError: at a value out of range.
        """
        number = isinstance(config["rate"], (int, float)) and not isinstance(config["rate"], bool)
        require(number and config["rate"] > 0, "circle.rate", config["rate"], "above 0")
        share = config["quiz"]
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        require(number and 0 < share < 1, "circle.quiz", share, "a share of the training samples, e.g. 0.1")
        return {**config, "tune": checked_tune(config["tune"])}

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It reads its inputs always.

        Raises:
            InputError: where the training has what nobody can differentiate through.
        """
        fit = config["fit"]
        if fit.get("precision") not in ("32-true", "64-true"):
            raise InputError(
                f"fit.precision={fit.get('precision')}: pipeline=meta differentiates through a step; use 32-true"
            )
        if fit.get("compile"):
            raise InputError("fit.compile=true: pipeline=meta differentiates through a step, uncompiled; use false")
        for name, term in config["objective"].items():
            if term.get("row"):
                raise InputError(f"the term {name} remembers samples, and pipeline=meta tries steps that do not count")
            if term.get("under"):
                raise InputError(f"the term {name} runs its networks again, which pipeline=meta does not; leave it out")
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Build both networks and their optimisers, bind the terms on two blank images, count the samples of each.

        Raises:
            InputError: if a layer path is not there, shapes cannot be bridged, no term hears the teacher, an optimiser
                is none, or the quiz leaves either too few samples.
        """
        from kd.training.circle import Circle, Member
        from kd.training.optimisers import configure
        from kd.training.trainer import check_precision

        fit = Fit(**self.fit)
        check_precision(fit, room.run)
        self._parts(training_samples(self.data, room, fit.samples), fit.batch_size)
        if room.run.devices > 1:
            raise InputError(f"run.devices={room.run.devices}: networks that learn together do so on one device")
        student, teacher = build(self.student, self.data, None, 0, room), room.stand_in(inputs[TEACHER])
        terms = build_objective(self.objective, room)
        lends_nothing(terms)
        if not terms.needs_teacher:
            raise InputError(
                "no term of a weight above 0 hears the teacher, so it would learn nothing: e.g. loss=[ce,kd]"
            )
        for line in bind(terms, student, teacher, self.data, rehearse=True):
            room.tell({"event": "say", "line": line})
        members = {
            TEACHER: Member(teacher, None, (), tuned(teacher, self.tune, self.data)),
            STUDENT: Member(student, terms, (TEACHER,)),
        }
        Circle(members, STUDENT, configure(fit, 1), fit.lr).configure_optimizers()
        configure(replace(fit, lr=fit.lr * self.rate), 1)([p for p in teacher.parameters() if p.requires_grad])

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The student, with weights that mean nothing."""
        return build(self.student, self.data, None, 0, room)

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Train both, evaluate both, save both: the student as the artifact's network, the teacher beside it."""
        from kd.models import load, save

        splits, teacher = load_data(self.data, room), load(inputs[TEACHER].path)
        made = self.assemble(teacher, splits, room)

        def more() -> dict[str, Any]:
            return told({TEACHER: teacher}, inputs, splits, self.data, room)

        spec = recipe(self.student, self.data, splits)
        card = trained(self, made, inputs, splits, out, room, spec, more=more)
        save(teacher.cpu().eval(), recipe_of_artifact(inputs[TEACHER]), out, name=TEACHER)
        return card

    def assemble(self, teacher: Normalised | None, splits: Splits, room: Room) -> Assembly[Module]:
        """Put the training together.

        Args:
            teacher: as it was loaded.
            splits: of the data.
            room: where it happens.

        Raises:
            InputError: if the terms cannot be bound, or the quiz leaves too few samples.
        """
        from kd.training.circle import Circle, Member
        from kd.training.optimisers import configure
        from kd.training.seeds import seed_all

        assert teacher is not None
        fit = Fit(**self.fit)
        learnt, quiz = self._parted(taken(splits, fit.samples, self.seed), fit.batch_size)
        student = build(self.student, self.data, splits, self.seed, room)
        seed_all(self.seed, "objective")
        terms: Objective = build_objective(self.objective, room)
        terms.draws_from(self.seed)
        said = bind(terms, student, teacher, self.data, samples=len(learnt))
        members = {
            TEACHER: Member(teacher, None, (), tuned(teacher, self.tune, self.data)),
            STUDENT: Member(student, terms, (TEACHER,)),
        }
        optimisers = configure(fit, steps_of(fit, len(learnt)))
        tutor = self._tutor(quiz, fit, steps_of(fit, len(learnt)), room)
        circle = Circle(members, STUDENT, optimisers, fit.lr, channels_last=fit.channels_last, before=tutor)
        return Assembly(circle, fit, learnt, None, {TEACHER: teacher}, None, None, tuple(said))

    def _parted(self, split: Split, batch: int) -> tuple[Split, Split]:
        """What the student learns from, and the quiz."""
        import torch

        from kd.training.seeds import mix

        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(mix(self.seed, "quiz")))
        count = self._parts(len(split), batch)
        return split.subset(order[count:].sort().values), split.subset(order[:count].sort().values)

    def _parts(self, samples: int, batch: int) -> int:
        """How many of the samples are the quiz.

        Raises:
            InputError: if that leaves too few to the teacher or to the student.
        """
        count = round(self.quiz * samples)
        if count < 2 or samples - count < batch:
            raise InputError(
                f"circle.quiz={self.quiz} of {samples} samples leaves {count} to the teacher, which needs 2, and "
                f"{samples - count} to the student, which needs a batch of fit.batch_size={batch}"
            )
        return count

    def _tutor(self, quiz: Split, fit: Fit, steps: int, room: Room) -> Any:
        from kd.training.loaders import EpochLoader
        from kd.training.meta import Tutor
        from kd.training.optimisers import configure, scale
        from kd.training.seeds import mix
        from kd.training.trainer import device_of

        loader = EpochLoader(
            quiz,
            min(fit.batch_size, len(quiz)),
            seed=mix(self.seed, "quiz order") % 2**31,
            augment=self.data["augment"],
            size=int(self.data["size"]),
            shuffle=True,
            drop_last=True,
            device=device_of(room.run),
            workers=room.run.workers,
        )
        build_ = configure(replace(fit, lr=fit.lr * self.rate), steps)
        return Tutor(loader, lambda parameters: build_(parameters)["optimizer"], scale(fit, steps))
