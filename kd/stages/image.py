"""The stages of image classification that train: a network on labels alone, or a student under a teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd import names
from kd.binding import each
from kd.errors import InputError
from kd.roles import plain, teachers
from kd.schedules import weighs
from kd.stages.assembly import Assembly, assemble, grafted
from kd.stages.base import Config, Room, Stage
from kd.stages.bindings import bind_sides, reads_stages, views_of
from kd.stages.building import build, build_objective
from kd.stages.evaluation import CHOSEN, evaluated, peers_of
from kd.stages.splits import data_print, images_in, learnt_from, load_data
from kd.store import Artifact, canonical
from kd.training.settings import HISTORY, Fit

if TYPE_CHECKING:
    import torch

    from kd.data import Splits
    from kd.models import Normalised
    from kd.objective import Objective

FIT_SINCE = {"fit.channels_last": False, "fit.compile": False}


@dataclass(frozen=True)
class Train:
    """Train one network on the labels alone: a teacher, or the student without one."""

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {**FIT_SINCE, "model.stages": None}

    model: Config
    data: Config
    objective: Config
    fit: Config
    seed: int

    @property
    def student_config(self) -> Config:
        """The network that is trained."""
        return self.model

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Every field counts, but for named stages that no term asks for."""
        return {**config, "model": _asked(config["model"], config["objective"])}

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It has no inputs."""
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Build the network and bind the terms on two blank images.

        Raises:
            InputError: if a term asks for a teacher, or something does not fit.
        """
        objective = rehearse(self.data, self.model, {}, self.objective, self.fit, room)
        if objective.needs_teacher:
            raise InputError("a stage without a teacher has a term that needs one; use pipeline=distil for it")

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The network that it trains, with weights that mean nothing."""
        return build(self.model, self.data, None, 0, room)

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Train, evaluate, save."""
        splits = load_data(self.data, room)
        student = build(self.model, self.data, splits, self.seed, room)
        return train_net(self, student, {}, splits, out, room, recipe(self.model, self.data, splits))


@dataclass(frozen=True)
class Distil:
    """Train a student under an objective that hears a teacher, live or through its stored soft labels.

    With an input `images` it learns from what that stage made, and not from the training samples of the data.

    Args:
        student: the network.
        data: the data set.
        objective: its terms.
        fit: the schedule.
        seed: of the student's weights, the order and, without ``views``, the augmentation.
        views: views of a sample before the first comes again; None: another in each epoch.
        view_seed: of the views, if there are some.
        live: run the teacher even where its stored labels would serve.
        teacher_stages: layers of the teacher that are its stages, in the place of those that are found.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {
        **FIT_SINCE,
        "views": None,
        "view_seed": None,
        "live": False,
        "student.stages": None,
        "teacher_stages": None,
    }

    student: Config
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
        """The network that is trained."""
        return self.student

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Views without augmentation are one; without views their seed is the run's; a live teacher shows in inputs.

        Named stages that no term asks for change nothing.
        """
        found = {**config, "live": False}
        if "student" in config:
            found["student"] = _asked(config["student"], config["objective"])
        if "teacher_stages" in config and not reads_stages(views_of(config["objective"], "teacher")):
            found["teacher_stages"] = None
        if config["data"].get("augment", "none") == "none":
            found["views"] = None
        if found["views"] is None:
            found["view_seed"] = None
        return found

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Stored soft labels serve views that come again, and of these the logits and the features that were kept."""
        found = {
            role: why for role in inputs if plain(role) == "labels" and (why := cls._deaf(config, inputs[role], role))
        }
        heard = [term for term in config["objective"].values() if weighs(term.get("weight", 1))]
        if {view for term in heard for view in each(term.get("teacher") or [])} == {names.EARLIER}:
            found |= {role: f"the student's own {names.EARLIER} take its place" for role in teachers(inputs)}
        return found

    @classmethod
    def _deaf(cls, config: Mapping[str, Any], labels: Mapping[str, Any], role: str) -> str | None:
        """Why one teacher's stored labels do not serve, if they do not."""
        teacher = "teacher" + role.removeprefix("labels")
        heard = {name: term for name, term in config["objective"].items() if weighs(term.get("weight", 1))}
        read = {
            name: [view for view in each(term.get("teacher") or []) if str(view).startswith(f"{teacher}.")]
            for name, term in heard.items()
        }
        if not any(read.values()):
            return f"no term of a weight above 0 hears the {teacher}"
        if config.get("live"):
            return f"labels.live=true asks for the live {teacher}"
        augment = config["data"].get("augment", "none")
        if augment != "none" and config.get("views") is None:
            return (
                f"data.augment={augment} makes a new view in each epoch, so the live {teacher} runs "
                f"(labels.views={config['fit'].get('epochs', 'K')} would store them)"
            )
        seen = {"views": config.get("views"), "seed": config.get("view_seed") or 0, "data": config["data"]}
        held = {"views": labels.get("views"), "seed": labels.get("seed", 0), "data": labels["data"]}
        for name in ("data",) if augment == "none" else seen:
            if canonical(seen[name]) != canonical(held[name]):
                raise InputError(
                    f"the student sees other {name} than its labels were made from; set labels.views, labels.seed and "
                    "data, which both read"
                )
        kept = {f"{teacher}.{names.stored(path)}" for path in labels.get("features") or ()}
        if f"{teacher}.{names.stored('embedding')}" in kept:
            kept.add(f"{teacher}.embedding")  # a vector already
        for name, views in read.items():
            if views and heard[name].get("under"):
                return f"the term {name} runs its networks again, so the live {teacher} runs"
            for view in views:
                if view != f"{teacher}.logits" and view not in kept:
                    path = str(view).removeprefix(f"{teacher}.").removesuffix(names.POOLED)
                    vector = str(view).endswith(names.POOLED) or path == "embedding"
                    mend = f" (labels.features=[{path}] would store it)" if vector else ""
                    return f"the term {name} reads {view}, so the live {teacher} runs{mend}"
        return None

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Build all networks and bind the terms on two blank images; tell of a student larger than a teacher.

        Raises:
            InputError: if a layer path is not there, shapes cannot be bridged, or class counts differ.
        """
        place = f"pipeline.stages.{room.stage or 'student'}.inputs"
        images_in(inputs)
        heard: dict[str, Config | Normalised] = {}
        for role in teachers(inputs):
            source = inputs[role]
            if isinstance(source, Artifact):
                heard[role] = room.once(("teacher", source.key), partial(room.stand_in, source))
            elif isinstance(source, Train):
                heard[role] = source.model
            elif isinstance(source, Distil) and not source.borrows:
                heard[role] = source.student
            elif hasattr(source, "stand_in"):
                heard[role] = room.stand_in(source)
            else:
                raise InputError(f"{place}.{role} must name a stage that trains a network")
        if not heard and not views_of(self.objective, names.EARLIER.partition(".")[0]):
            raise InputError(f"{place}.teacher must name a stage that trains a network")
        rehearse(self.data, self.student, heard, self.objective, self.fit, room, self.teacher_stages)

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The student as it is shipped, with weights that mean nothing."""
        student = build(self.student, self.data, None, 0, room)
        if not self.borrows:
            return student
        objective = build_objective(self.objective, room)
        nets = {role: room.stand_in(inputs[role]) for role in teachers(inputs)}
        bind_sides(objective, {"student": student, **nets}, self.data, chosen={"teacher": self.teacher_stages})
        graft = grafted(objective, student, self.data)
        return student if graft is None else type(student)(graft, *student.statistics)

    @property
    def borrows(self) -> bool:
        """Whether a term is lent a part of a teacher, and so perhaps ships another net than the student."""
        return any(term.get("part") for term in self.objective.values())

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Distil, evaluate against the labels and the teacher, save the student alone."""
        splits = learnt_from(self.data, inputs, room)
        student = build(self.student, self.data, splits, self.seed, room)
        return train_net(self, student, inputs, splits, out, room, recipe(self.student, self.data, splits))


def rehearse(
    data: Config,
    model: Config | Normalised,
    teachers: Mapping[str, Config | Normalised],
    objective: Config,
    fit: Config,
    room: Room,
    teacher_stages: Sequence[str] | None = None,
) -> Objective:
    """Everything a training builds, once, without training: what is wrong is found before the first stage starts."""
    from kd.training import ranks
    from kd.training.optimisers import configure
    from kd.training.trainer import check_compiler, check_precision, device_of

    check_precision(Fit(**fit), room.run)
    check_compiler("fit.compile", Fit(**fit).compile, room.run)
    terms = build_objective(objective, room)

    def built() -> bool:
        student = build(model, data, None, 0, room) if isinstance(model, dict) else model
        configure(Fit(**fit), 1)(list(student.parameters()))
        nets = {r: build(n, data, None, 0, room) if isinstance(n, dict) else n for r, n in teachers.items()}
        able = bool(nets) or not terms.needs_teacher
        for line in bind_sides(
            terms, {"student": student, **nets}, data, chosen={"teacher": teacher_stages}, rehearse=able
        ):
            room.tell({"event": "say", "line": line})
        for line in larger(student, nets, room.stage):
            room.tell({"event": "say", "line": line})
        grafted(terms, student, data)
        ranks.check(Fit(**fit), room.run.devices, device_of(room.run).type == "cuda", student, terms)
        return True

    if not isinstance(model, dict):
        built()
        return terms
    # What numbers stand in the terms decides nothing about shapes: a sweep over them is bound once.
    asked = [[role, net if isinstance(net, dict) else id(net)] for role, net in teachers.items()]
    shape = [data[name] for name in ("channels", "size", "num_classes")]
    known = [_without_numbers(objective), sorted(terms.active), model, asked, shape, fit, teacher_stages]
    room.once(canonical(known), built)
    return terms


def larger(student: Normalised, teachers: Mapping[str, Normalised], stage: str) -> list[str]:
    """A line for each teacher that has fewer parameters than its student."""
    own = sum(p.numel() for p in student.parameters())
    found = []
    for role, net in teachers.items():
        count = sum(p.numel() for p in net.parameters())
        if count < own:
            found.append(
                f"{stage or 'the student'}: {type(student.net).__name__} has {own:,} parameters, more than the "
                f"{count:,} of its {role}"
            )
    return found


def _asked(model: Config, objective: Config) -> Config:
    """A student's config without named stages where no term asks for them."""
    if model.get("stages") is None or reads_stages(views_of(objective, "student")):
        return model
    return {**model, "stages": None}


def _without_numbers(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_numbers(value) for key, value in node.items()}
    return None if isinstance(node, (int, float)) and not isinstance(node, bool) else node


def train_net(
    stage: Any,
    student: Normalised,
    inputs: Mapping[str, Artifact],
    splits: Splits,
    out: Path,
    room: Room,
    spec: Mapping[str, Any],
    masks: Mapping[str, torch.Tensor] | None = None,
    finish: Callable[[Normalised], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Put a student's training together and do it: see `trained`."""
    made = assemble(stage, student, inputs, splits, room)
    return trained(stage, made, inputs, splits, out, room, spec, masks, finish)


def trained(
    stage: Any,
    made: Assembly[Any],
    inputs: Mapping[str, Artifact],
    splits: Splits,
    out: Path,
    room: Room,
    spec: Mapping[str, Any],
    masks: Mapping[str, torch.Tensor] | None = None,
    finish: Callable[[Normalised], list[dict[str, Any]]] | None = None,
    more: Callable[[], dict[str, Any]] = dict,
    keep: Callable[[Normalised], Normalised] | None = None,
) -> dict[str, Any]:
    """Fit the student, then evaluate it on validation and, once, on test; write weights and card parts.

    ``spec`` is what it is built from again; ``masks`` the parameters whose zeros stay; ``finish`` changes what training
    leaves, and says how its structure changed; ``more`` gives further metrics when all is trained; ``keep`` gives what
    is shipped of what was trained, where that is not all of it.
    """
    import torch
    from safetensors.torch import save_file

    from kd.compress.measure import cost
    from kd.models import save, weights_digest
    from kd.training.callbacks import Pruning
    from kd.training.loggers import loggers, summarise
    from kd.training.trainer import device_of, train

    data, module = stage.data, made.module
    with loggers(
        room.run,
        key=room.key,
        stage=room.stage,
        document=room.document,
        dials=room.dials,
        sweep=room.sweep,
        beside=room.company is not None,
    ) as sinks:
        trace = train(
            module,
            (made.split, splits.validation),
            made.fit,
            room.run,
            seed=stage.seed,
            size=int(data["size"]),
            augment=data["augment"],
            views=made.views,
            view_seed=made.view_seed,
            labels=made.labels,
            turns=None if room.company is None else room.company.turns,
            work=room.work,
            tell=room.tell,
            loggers=sinks,
            masks=masks,
            watching=[Pruning(room.trial)] if room.trial else [],
        )
        # Shipped in float32, whatever it was trained in: what reads it builds float32 networks.
        student = module.student.float().to(device_of(room.run))
        student = student.to(memory_format=torch.contiguous_format)
        if keep is not None:
            student = keep(student).to(device_of(room.run))
        changes = [] if finish is None else finish(student)
        if (graft := grafted(module.objective, student, data)) is not None:  # anew, for a change made other layers
            student = type(student)(graft, *student.statistics).float().to(device_of(room.run))
            changes.append(graft.change)
        if changes:
            spec = {**spec, "structure": [*spec.get("structure", []), *changes]}
        metrics, chosen = evaluated(student, peers_of(inputs, made.teachers, data), splits, data, room)
        metrics |= more()
        content = data_print(data, room)
        student = student.cpu().eval()
        shape = (int(data["channels"]), int(data["size"]), int(data["size"]))
        costs = cost(student, shape, latency=room.run.latency)
        summarise(sinks, {**metrics, **{f"cost/{name}": value for name, value in costs.items()}}, trace.steps)
    save(student, spec, out)
    # What a student's agreement is judged by, so that none has to ask its teacher again.
    save_file({"test": chosen}, out / CHOSEN)
    # Copied: after a kill between here and the store, the next attempt finds it where the checkpoint is.
    shutil.copyfile(room.work / HISTORY, out / HISTORY)
    return {
        "metrics": metrics,
        "cost": costs,
        "weights": weights_digest(student.net),
        "trace": {"losses": trace.losses, "epochs": trace.epochs, "selected_epoch": trace.selected_epoch},
        "gradients": trace.gradients,
        "resumed": trace.resumed,
        **({"bindings": list(made.bindings)} if made.bindings else {}),
        "fingerprints": {"data": content},
    }


def recipe(model: Config, data: Config, splits: Splits) -> dict[str, Any]:
    """What a network is built from again, and the names of its classes in the order of its logits."""
    return {
        "model": {k: v for k, v in model.items() if k not in ("_target_", "stages")} | {"pretrained": False},
        "num_classes": len(splits.classes),
        "in_chans": int(data["channels"]),
        "size": int(data["size"]),
        "classes": list(splits.classes),
    }
