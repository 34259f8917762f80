"""All that a training is made of: student, teacher or its stored labels, bound terms, the samples to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kd.stages.base import Config, Room
from kd.stages.building import build_objective
from kd.stages.splits import taken
from kd.store import Artifact
from kd.training.settings import Fit

if TYPE_CHECKING:
    from kd.data import Split, Splits
    from kd.data.labels import StoredLabels
    from kd.models import Normalised
    from kd.training.module import Distiller


Module = TypeVar("Module")


@dataclass(frozen=True)
class Assembly(Generic[Module]):
    """What a training is given.

    Args:
        module: student, teacher and objective; or a circle of networks that learn together.
        fit: the schedule.
        split: the samples to learn from.
        labels: what the teacher said of them before, where that is stored.
        teacher: as it was loaded, whether or not a term hears it.
        views: views of a sample before the first comes again; None: another in each epoch.
        view_seed: of the views, if there are some.
        bindings: what the terms are bound to, a line each.
    """

    module: Module
    fit: Fit
    split: Split
    labels: StoredLabels | None
    teacher: Normalised | None
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
    teacher: Normalised | None = None,
) -> Assembly[Distiller]:
    """Put a stage's training together; the terms' own parts are drawn from the stage's seed.

    Args:
        stage: with ``objective``, ``fit``, ``data`` and ``seed``.
        student: as it is built.
        inputs: the artifacts by role; with ``labels`` no teacher is asked.
        splits: of the data.
        room: where it happens.
        teacher: stands in for ``inputs["teacher"]``.

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
    labels = None
    if "labels" in inputs:
        labels = room.once(
            ("labels", inputs["labels"].key, id(split)),
            lambda: stored_labels(inputs["labels"], split, len(splits.classes)),
        )
        teacher = None
    elif teacher is None and "teacher" in inputs:
        teacher = load(inputs["teacher"].path)
    bindings = _bind(
        objective, student, teacher, stage.data, labels, len(split), getattr(stage, "teacher_stages", None)
    )
    module = Distiller(
        student,
        objective,
        configure(fit, steps_of(fit, len(split))),
        teacher,
        stored=labels is not None,
        channels_last=fit.channels_last,
    )
    views, view_seed = (getattr(stage, name, None) for name in ("views", "view_seed"))
    return Assembly(module, fit, split, labels, teacher, views, view_seed, tuple(bindings))


def _bind(
    objective: Any,
    student: Normalised,
    teacher: Normalised | None,
    data: Config,
    labels: StoredLabels | None,
    samples: int,
    teacher_stages: Sequence[str] | None,
) -> list[str]:
    import torch

    from kd.stages.bindings import bind

    if labels is None:
        return bind(objective, student, teacher, data, samples=samples, teacher_stages=teacher_stages)
    # On the CPU still: ranks are forked later, and a process that has touched CUDA cannot be forked.
    two = labels.at(0, torch.arange(2, device=labels.device))
    return bind(objective, student, None, data, {name: value.cpu() for name, value in two.items()}, samples)


def stored_labels(artifact: Artifact, split: Split, classes: int) -> StoredLabels:
    """The labels in an artifact, for the samples of a split.

    Raises:
        KDError: if they are of other samples.
    """
    from kd.data.labels import StoredLabels

    views = artifact.card["document"]["config"].get("views")
    return StoredLabels.open(artifact.path, split.ids.cpu(), classes, views)
