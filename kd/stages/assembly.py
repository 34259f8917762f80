"""All that a training is made of: student, teacher or its stored labels, bound terms, the samples to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kd.errors import InputError
from kd.roles import by_role, labels_of, teachers
from kd.stages.base import Config, Room
from kd.stages.building import build_objective
from kd.stages.splits import taken
from kd.store import Artifact
from kd.training.settings import Fit

if TYPE_CHECKING:
    from kd.data import Split, Splits
    from kd.data.several import Labels
    from kd.models import Grafted, Normalised
    from kd.objective import Objective
    from kd.training.module import Distiller


Module = TypeVar("Module")


@dataclass(frozen=True)
class Assembly(Generic[Module]):
    """What a training is given.

    Args:
        module: student, teacher and objective; or a circle of networks that learn together.
        fit: the schedule.
        split: the samples to learn from.
        labels: what the teachers said of them before, where that is stored.
        teachers: the others as they were loaded, by role, whether or not a term hears them.
        views: views of a sample before the first comes again; None: another in each epoch.
        view_seed: of the views, if there are some.
        bindings: what the terms are bound to, a line each.
    """

    module: Module
    fit: Fit
    split: Split
    labels: Labels | None
    teachers: Mapping[str, Normalised]
    views: int | None
    view_seed: int | None
    bindings: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return steps_of(self.fit, len(self.split))


def steps_of(fit: Fit, samples: int) -> int:
    """Steps of an epoch over that many samples.

    >>> steps_of(Fit(batch_size=4, drop_last=False), 9), steps_of(Fit(batch_size=4, drop_last=True), 9)
    (3, 2)
    """
    return samples // fit.batch_size if fit.drop_last else -(-samples // fit.batch_size)


def assemble(
    stage: Any,
    student: Normalised,
    inputs: Mapping[str, Artifact],
    splits: Splits,
    room: Room,
    given: Normalised | Mapping[str, Normalised] | None = None,
) -> Assembly[Distiller]:
    """Put a stage's training together; the terms' own parts are drawn from the stage's seed.

    Args:
        stage: with ``objective``, ``fit``, ``data`` and ``seed``.
        student: as it is built.
        inputs: the artifacts by role; a teacher with ``labels`` is not asked.
        splits: of the data.
        room: where it happens.
        given: stand in for ``inputs["teacher"]``, or for several teachers by role.

    Raises:
        InputError: if the terms cannot be bound.
    """
    from kd.models import load
    from kd.training.module import Distiller
    from kd.training.optimisers import configure
    from kd.training.seeds import seed_all

    fit = Fit(**stage.fit)
    seed_all(stage.seed, "objective")
    objective = build_objective(stage.objective, room)
    split = room.once(("samples", id(splits), fit.samples, stage.seed), lambda: taken(splits, fit.samples, stage.seed))
    objective.draws_from(stage.seed)
    stored = {role: inputs[labels_of(role)] for role in teachers(inputs) if labels_of(role) in inputs}
    labels = None
    if stored:
        keys = tuple(artifact.key for artifact in stored.values())
        labels = room.once(("labels", keys, id(split)), lambda: stored_labels(stored, split, len(splits.classes)))
    live = {role: net for role, net in by_role(given).items() if role not in stored}
    live |= {r: load(inputs[r].path) for r in teachers(inputs) if r not in stored and r not in live}
    lenders = {r: load(inputs[r].path) for r in stored if any(name.startswith(f"{r}.") for name in objective.borrows)}
    bindings = _bind(
        objective, student, live, stage.data, labels, len(split), getattr(stage, "teacher_stages", None), lenders
    )
    module = Distiller(
        student,
        objective,
        configure(fit, steps_of(fit, len(split))),
        live,
        stored=tuple(stored),
        channels_last=fit.channels_last,
        graft=grafted(objective, student, stage.data),
    )
    views, view_seed = (getattr(stage, name, None) for name in ("views", "view_seed"))
    return Assembly(module, fit, split, labels, live, views, view_seed, tuple(bindings))


def _bind(
    objective: Any,
    student: Normalised,
    live: Mapping[str, Normalised],
    data: Config,
    labels: Labels | None,
    samples: int,
    teacher_stages: Sequence[str] | None,
    lenders: Mapping[str, Normalised],
) -> list[str]:
    import torch

    from kd.stages.bindings import bind_sides

    # On the CPU still: ranks are forked later, and a process that has touched CUDA cannot be forked.
    two = {} if labels is None else labels.at(0, torch.arange(2, device=labels.device))
    kept = {name: value.cpu() for name, value in two.items()}
    nets, chosen = {"student": student, **live}, {"teacher": teacher_stages}
    return bind_sides(objective, nets, data, kept, samples, chosen, lenders=lenders)


def grafted(objective: Objective, student: Normalised, data: Config) -> Grafted | None:
    """What a student becomes where a term ships it with another end; it learns with the student and the objective.

    Args:
        objective: bound.
        student: as it trains.
        data: for the shape of an image.

    Raises:
        InputError: if it cannot be built, or could not be stored.
    """
    from kd.models import Grafted

    if (graft := objective.graft) is None:
        return None
    size = int(data["size"])
    try:
        made = Grafted(student.net, graft.at, graft.tail, (int(data["channels"]), size, size))
        assert made.change  # what is stored of it
    except InputError as error:
        raise InputError(f"the term {graft.term!r}: {error}") from error
    return made


def stored_labels(artifacts: Mapping[str, Artifact], split: Split, classes: int) -> Labels:
    """The labels in artifacts, by the role of the teacher that they are of, for the samples of a split.

    Raises:
        KDError: if they are of other samples.
    """
    from kd.data.labels import StoredLabels
    from kd.data.several import SeveralLabels

    ids, found = split.ids.cpu(), {}
    for role, artifact in artifacts.items():
        views = artifact.card["document"]["config"].get("views")
        found[role] = StoredLabels.open(artifact.path, ids, classes, views)
    return found["teacher"] if list(found) == ["teacher"] else SeveralLabels(found)
