"""The stages of image classification: train a network, write its soft labels, distil it into a student."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.errors import InputError, KDError
from kd.stages.base import Room, Stage
from kd.store import Artifact
from kd.training.settings import HISTORY, Fit

if TYPE_CHECKING:
    import torch

    from kd.data import Splits
    from kd.models import Normalised
    from kd.objective import Objective

Config = dict[str, Any]
LABELS = "labels.safetensors"


@dataclass(frozen=True)
class Train:
    """Train one network on the labels alone: a teacher, or the student without one."""

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}

    model: Config
    data: Config
    objective: Config
    fit: Config
    seed: int

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, str]:
        """It has no inputs."""
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Build the network and bind the terms on two blank images.

        Raises:
            InputError: if a term asks for a teacher, or something does not fit.
        """
        objective = _rehearse(self.data, self.model, None, self.objective, self.fit, room)
        if objective.needs_teacher:
            raise InputError("a stage without a teacher has a term that needs one; use pipeline=distil for it")

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Train, evaluate, save."""
        splits = _load(self.data, room)
        student = _build(self.model, self.data, splits, self.seed, room)
        return _train(self, student, None, None, splits, out, room, self.model)


@dataclass(frozen=True)
class SoftLabels:
    """The teacher's logits on each training sample, in the order of the split, for views that never change."""

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}

    data: Config

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, str]:
        """It reads its one input always."""
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Nothing can be wrong that its teacher's own check does not find."""

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """One pass of the teacher over the training split."""
        import torch
        from safetensors.torch import save_file

        from kd.models import load
        from kd.training.loggers import loggers, summarise

        splits = _load(self.data, room)
        teacher = load(inputs["teacher"].path)
        logits = _logits(teacher, splits.train, self.data, room)
        save_file({"ids": splits.train.ids.cpu(), "logits": logits.contiguous()}, out / LABELS)
        accuracy = (logits.argmax(1) == splits.train.targets.cpu()).to(torch.float64).mean().item()
        with loggers(
            room.run, key=room.key, stage=room.stage, document=room.document, dials=room.dials, sweep=room.sweep
        ) as sinks:
            summarise(sinks, {"train/accuracy": accuracy}, 0)
        return {"metrics": {"train/accuracy": accuracy}, "fingerprints": {"data": _data_print(self.data, room)}}


@dataclass(frozen=True)
class Distil:
    """Train a student under an objective that hears a teacher, live or through its stored soft labels."""

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}

    student: Config
    data: Config
    objective: Config
    fit: Config
    seed: int

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, str]:
        """Stored soft labels serve only logits of views that are the same in every epoch."""
        if "labels" not in inputs:
            return {}
        heard = [term for term in config["objective"].values() if float(term.get("weight", 1)) != 0]
        if not any(term.get("teacher") for term in heard):
            return {"labels": "no term of a weight above 0 hears the teacher"}
        augment = config["data"].get("augment", "none")
        if augment != "none":
            return {"labels": f"data.augment={augment} makes a new view in each epoch, so the live teacher runs"}
        for name, term in config["objective"].items():
            view = str(term.get("teacher") or "teacher.logits")
            if view != "teacher.logits" and float(term.get("weight", 1)) != 0:
                return {"labels": f"the term {name} reads {view}, so the live teacher runs"}
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Build both networks and bind the terms on two blank images.

        Raises:
            InputError: if a layer path is not there, shapes cannot be bridged, or class counts differ.
        """
        teacher = inputs.get("teacher")
        if isinstance(teacher, Artifact):
            from kd.models import load

            _rehearse(self.data, self.student, load(teacher.path), self.objective, self.fit, room)
        elif isinstance(teacher, Train):
            _rehearse(self.data, self.student, teacher.model, self.objective, self.fit, room)
        else:
            raise InputError("pipeline.stages.student.inputs.teacher must name a stage that trains a network")

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Distil, evaluate against the labels and the teacher, save the student alone."""
        from safetensors.torch import load_file

        from kd.models import load

        splits = _load(self.data, room)
        teacher = load(inputs["teacher"].path)
        labels = None
        if "labels" in inputs:
            stored = load_file(inputs["labels"].file(LABELS))
            if not stored["ids"].equal(splits.train.ids.cpu()):
                raise KDError("the stored soft labels belong to other samples than this training split's")
            labels = stored["logits"]
        student = _build(self.student, self.data, splits, self.seed, room)
        return _train(self, student, teacher, labels, splits, out, room, self.student)


def _load(data: Config, room: Room) -> Splits:
    """The splits; refused if their content is not what the key names."""
    from kd.instantiate import instantiate

    source = instantiate({k: v for k, v in data.items() if k != "digest"}, room.run.trusted, "data").resolved(
        room.data_dir
    )
    found = source.content_digest(room.data_dir, room.data_cache / "digests.json")
    if data.get("digest") not in (None, found):
        raise InputError(
            f"the data set {data['name']} has changed: its content is {found[:16]}, the config names "
            f"{str(data['digest'])[:16]}; plan again, or put the old files back"
        )
    splits: Splits = source.load(room.data_dir, memory_bytes=int(room.run.memory_gb * 2**30), cache=room.data_cache)
    if not len(splits.validation):
        raise InputError(
            "data.validation=0 leaves no validation sample, and test may choose nothing: give it 1 or more"
        )
    return splits


def _data_print(data: Config, room: Room) -> dict[str, Any]:
    """The data's fingerprint, taken again after they were used: only files that were touched meanwhile are read again.

    Raises:
        KDError: if the content is no longer what it was at the start. The checkpoint, which may have learnt from both,
            is gone then.
    """
    from kd.instantiate import instantiate

    try:
        source = instantiate({k: v for k, v in data.items() if k != "digest"}, room.run.trusted, "data").resolved(
            room.data_dir
        )
        found = source.content_digest(room.data_dir, room.data_cache / "digests.json")
        said = f"its content is now {found[:16]}"
    except InputError as error:
        found, said = "", str(error)
    if data.get("digest") not in (None, found):
        for path in room.work.glob("*"):
            if path.is_file():
                path.unlink()
        raise KDError(
            f"the data set {data['name']} was {str(data['digest'])[:16]} when {room.stage or 'the stage'} began, and "
            f"changed while it ran ({said}); nothing was stored: leave the files alone and run the same command again"
        )
    return {"name": data["name"], "digest": found}


def _build(model: Config, data: Config, splits: Splits | None, seed: int, room: Room) -> Normalised:
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


def _objective(config: Config, room: Room) -> Objective:
    from kd.instantiate import instantiate
    from kd.objective import Objective

    if "loss" in config:
        raise InputError("a term cannot be called 'loss': that is the name of the sum in records and loggers")
    try:
        return Objective(instantiate(config, room.run.trusted))
    except (TypeError, ValueError) as error:
        raise InputError(f"loss: {error}") from error


def _bind(objective: Objective, student: Normalised, teacher: Normalised | None, data: Config) -> None:
    """Give the terms the shapes of what they compare: one blank batch through both networks, in eval mode."""
    import torch

    from kd.models import Taps

    blank = torch.zeros(2, int(data["channels"]), int(data["size"]), int(data["size"]))
    views = {"batch.target": torch.zeros(2, dtype=torch.long)}
    for role, net in (("student", student), ("teacher", teacher)):
        if net is None:
            continue
        training = net.training
        taps = Taps(net.net, objective.paths(role))
        device = next(net.parameters()).device
        try:
            with torch.no_grad():
                views[f"{role}.logits"] = net.eval()(blank.to(device))
        except (RuntimeError, ValueError, AssertionError) as error:
            line = str(error).splitlines()[0]
            raise InputError(
                f"the {role} {type(net.net).__name__} does not take images of {data['size']}x{data['size']} with "
                f"{data['channels']} channels ({line}); choose another {role}.name, or pass {role}.options"
            ) from error
        views |= {f"{role}.{path}": value for path, value in taps.pop().items()}
        taps.remove()
        net.train(training)
    pair = views.get("student.logits"), views.get("teacher.logits")
    if pair[0] is not None and pair[1] is not None and pair[0].shape != pair[1].shape:
        raise InputError(f"the student has {pair[0].shape[1]} classes and the teacher {pair[1].shape[1]}")
    objective.bind({name: view.shape for name, view in views.items()})


def _rehearse(
    data: Config, model: Config, teacher: Config | Normalised | None, objective: Config, fit: Config, room: Room
) -> Objective:
    """Everything a training builds, once, without training: what is wrong is found before the first stage starts."""
    from kd.training.optimisers import configure
    from kd.training.trainer import check_precision

    check_precision(Fit(**fit), room.run)
    terms = _objective(objective, room)
    student = _build(model, data, None, 0, room)
    configure(Fit(**fit), 1)(list(student.parameters()))
    net = _build(teacher, data, None, 0, room) if isinstance(teacher, dict) else teacher
    _bind(terms, student, net, data)
    return terms


def _subset(splits: Splits, samples: int | None, seed: int) -> torch.Tensor | None:
    """Rows of the training split to learn from: balanced over classes, drawn by the seed; None for all."""
    import torch

    from kd.training.seeds import mix

    if samples is None or samples >= len(splits.train):
        return None
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(mix(seed, "samples")))
    targets = splits.train.targets.cpu()[order]
    # The k-th sample of each class comes before the k+1-th of any.
    rank = torch.empty_like(targets)
    for label in range(int(targets.max()) + 1):
        where = targets == label
        rank[where] = torch.arange(int(where.sum()))
    return order[torch.argsort(rank, stable=True)[:samples]].sort().values


def _train(
    stage: Train | Distil,
    student: Normalised,
    teacher: Normalised | None,
    labels: torch.Tensor | None,
    splits: Splits,
    out: Path,
    room: Room,
    model: Config,
) -> dict[str, Any]:
    """Fit the student, then evaluate it on validation and, once, on test; write weights and card parts."""
    from kd.compress.measure import cost
    from kd.models import save, weights_digest
    from kd.training.callbacks import Pruning
    from kd.training.loggers import loggers, summarise
    from kd.training.module import Distiller
    from kd.training.optimisers import configure
    from kd.training.seeds import seed_all
    from kd.training.trainer import device_of, train

    fit, data = Fit(**stage.fit), stage.data
    seed_all(stage.seed, "objective")
    objective = _objective(stage.objective, room)
    _bind(objective, student, teacher, data)
    rows = _subset(splits, fit.samples, stage.seed)
    train_split = splits.train if rows is None else splits.train.subset(rows)
    if labels is not None and rows is not None:
        labels = labels[rows]
    steps = len(train_split) // fit.batch_size if fit.drop_last else -(-len(train_split) // fit.batch_size)
    module = Distiller(student, objective, configure(fit, steps), teacher, labels)
    with loggers(
        room.run, key=room.key, stage=room.stage, document=room.document, dials=room.dials, sweep=room.sweep
    ) as sinks:
        trace = train(
            module,
            (train_split, splits.validation),
            fit,
            room.run,
            seed=stage.seed,
            size=int(data["size"]),
            augment=data["augment"],
            work=room.work,
            tell=room.tell,
            loggers=sinks,
            watching=[Pruning(room.trial)] if room.trial else [],
        )
        # Shipped in float32, whatever it was trained in: what reads it builds float32 networks.
        student = module.student.float().to(device_of(room.run))
        metrics = _evaluate(student, teacher, splits, data, room)
        data_print = _data_print(data, room)
        student = student.cpu().eval()
        shape = (int(data["channels"]), int(data["size"]), int(data["size"]))
        costs = cost(student, shape, latency=room.run.latency)
        summarise(sinks, {**metrics, **{f"cost/{name}": value for name, value in costs.items()}}, trace.steps)
    spec = {
        "model": {k: v for k, v in model.items() if k != "_target_"} | {"pretrained": False},
        "num_classes": len(splits.classes),
        "in_chans": int(data["channels"]),
        "size": int(data["size"]),
        "classes": list(splits.classes),
    }
    save(student, spec, out)
    # Copied: after a kill between here and the store, the next attempt finds it where the checkpoint is.
    shutil.copyfile(room.work / HISTORY, out / HISTORY)
    return {
        "metrics": metrics,
        "cost": costs,
        "weights": weights_digest(student.net),
        "trace": {"losses": trace.losses, "epochs": trace.epochs, "selected_epoch": trace.selected_epoch},
        "resumed": trace.resumed,
        "fingerprints": {"data": data_print},
    }


def _evaluate(
    student: Normalised, teacher: Normalised | None, splits: Splits, data: Config, room: Room
) -> dict[str, Any]:
    """Metrics of validation and test; agreement with the teacher where there is one."""
    from kd.tasks.image import evaluate

    metrics: dict[str, Any] = {}
    for name, split in (("val", splits.validation), ("test", splits.test)):
        logits = _logits(student, split, data, room)
        peer = _logits(teacher, split, data, room) if teacher is not None and name == "test" else None
        metrics |= {f"{name}/{k}": v for k, v in evaluate(logits, split.targets.cpu(), peer).items()}
    return metrics


def _logits(net: Normalised, split: Any, data: Config, room: Room) -> torch.Tensor:
    """A network's logits on a whole split, in its order, on the CPU."""
    import torch

    from kd.training.trainer import device_of, evaluation_loader

    net = net.to(device_of(room.run)).eval()
    found = []
    loader = evaluation_loader(split, int(data["size"]), room.run)
    with torch.no_grad():
        for i, batch in enumerate(loader):
            found.append(net(batch["image"]).float().cpu())
            room.tell({"event": "pass", "step": i + 1, "total": len(loader)})
    return torch.cat(found)
