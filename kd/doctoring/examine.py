"""Look at planned jobs with their real data, networks and a few steps; in a child process, which keeps nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.data.labels import duration_text, size_text
from kd.doctoring import verdicts
from kd.doctoring.verdicts import FAIL, OK, WARN, Check
from kd.errors import KDError
from kd.instantiate import resolve
from kd.pipeline.execute import build as build_stage
from kd.pipeline.execute import check
from kd.pipeline.plan import Node, Plan
from kd.roles import labels_of, teachers
from kd.schedules import weighs
from kd.stages.base import Company, Room
from kd.store import Artifact, Store, canonical, short, with_neutral
from kd.training.settings import Fit, Run

if TYPE_CHECKING:
    from torch import nn

    from kd.data import Splits
    from kd.models import Normalised
    from kd.stages.assembly import Assembly
    from kd.training.circle import Circle
    from kd.training.module import Distiller
    from kd.training.probe import Probed

SAMPLES = 2000  # of validation that a teacher is asked about, and of training whose pixels are looked at
_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}  # of a probability that was stored so


@dataclass
class Cost:
    """Seconds and bytes of one stage that is still to be made."""

    seconds: float
    bytes: int
    said: str = ""


@dataclass
class Examined:
    """One job: its checks, and what each of its missing stages will cost, by key."""

    checks: list[Check] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)


def examine(plans: Sequence[Plan], runs: Sequence[Run], chosen: Sequence[int], tell: Any) -> list[Examined]:
    """The chosen jobs looked at whole, of the others what they will cost.

    Args:
        plans: all jobs of a command.
        runs: where each would run.
        chosen: numbers of those that are looked at.
        tell: hears how many are done.
    """
    from kd.training.trainer import quiet
    from kd.training.turns import Turns

    desk, found = _Desk(Store(runs[0].store), Company(Turns())), []
    with quiet():
        for number, (plan, run) in enumerate(zip(plans, runs, strict=True)):
            found.append(desk.job(plan, run, number in set(chosen)))
            tell({"event": "pass", "step": number + 1, "total": len(plans)})
    return found


@dataclass
class _Speed:
    """What was measured of one kind of stage."""

    step: float  # seconds
    judge: float  # seconds a sample
    bytes: int  # of the weights


class _Desk:
    """What jobs share while they are looked at: data, and the speed of stages of the same kind."""

    def __init__(self, store: Store, company: Company) -> None:
        self.store, self.company = store, company
        self.speeds: dict[str, Any] = {}

    def job(self, plan: Plan, run: Run, whole: bool) -> Examined:
        """All checks of one job, or only its costs."""
        found = Examined()
        # Behind the student there may be compression, which has no terms of its own to look at.
        last = next(node for node in reversed(plan.nodes) if _trains(node))
        try:
            if whole:
                check([plan], self.store, run)  # what `kd run` refuses before it starts
                self._last(last, plan, run, found)
            for node in plan.nodes:
                if self.store.get(node.key) is None and _counted(node):
                    found.costs[node.key] = self._cost(node, plan, run)
        except KDError as error:
            found.checks.append(Check(FAIL, "config", str(error)))
            return found
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            found.checks.append(Check(FAIL, "memory", f"{str(error).splitlines()[0]}; lower fit.batch_size"))
            return found
        if whole:
            found.checks += [self._time(plan, run, found.costs), self._disk(found.costs)]
        return found

    def _room(self, run: Run) -> Room:
        return Room(run, Path(os.devnull), company=self.company)

    def _last(self, node: Node, plan: Plan, run: Run, found: Examined) -> None:
        """The checks of the stage that the command is about."""
        from kd.stages.splits import learnt_from

        stage = build_stage(node.document, run.trusted)
        there = {role: self.store.get(key) for role, key in node.inputs.items()}
        splits = learnt_from(stage.data, self._images(node), self._room(run))
        found.checks.append(self._stages(plan))
        for role in teachers(node.inputs):
            artifact = there.get(role)
            if artifact is not None:
                found.checks += self._teacher(node, role, artifact, stage, splits, run)
            else:
                found.checks.append(Check(WARN, f"{role} accuracy", f"{verdicts.NOT_YET}; ask again when it is"))
        made = self._assembled(node, stage, splits, plan, run)
        found.checks.append(self._normalised("student", made.module.student, stage, stage.student_config, splits, run))
        found.checks.append(_bindings(made))
        for role in teachers(node.inputs):
            if labels_of(role) in node.inputs:
                one = self._stored(role, there.get(labels_of(role)), there.get(role), made, stage, run)
                found.checks.append(_of(role, one))
        trained = all(there.get(role) is not None for role in teachers(node.inputs))
        found.checks += self._steps(node, stage, made, splits, run, trained)

    def _images(self, node: Node) -> dict[str, Artifact]:
        """The images that a stage learns from; until they are made, those of the data stand for them."""
        found = self.store.get(node.inputs["images"]) if "images" in node.inputs else None
        return {} if found is None else {"images": found}

    def _stages(self, plan: Plan) -> Check:
        states = [
            f"{node.name} {short(node.key)} {'is in the store' if self.store.get(node.key) else 'is to be made'}"
            for node in plan.nodes
        ]
        return Check(OK, "stages", ", ".join(states))

    def _teacher(self, node: Node, role: str, artifact: Artifact, stage: Any, splits: Splits, run: Run) -> list[Check]:
        from kd.models import load
        from kd.training.probe import speak

        net, card = load(artifact.path), artifact.card
        logits, targets, _ = speak(net, splits.validation, stage.data, run, SAMPLES)
        accuracy = float((logits.argmax(1) == targets).double().mean()) if logits.shape[1] else 0.0
        chance = float(targets.bincount().max()) / len(targets)
        same = _still(card["document"]["config"].get("data", {})) == _still(stage.data)
        recorded = card.get("metrics", {}).get("val/accuracy") if same else None
        names = json.loads((artifact.path / "model.json").read_text(encoding="utf-8")).get("classes")
        checks = [
            verdicts.teacher_accuracy(
                accuracy, len(targets), len(splits.validation), chance, recorded, self._baseline(node)
            ),
            verdicts.class_order(names, list(splits.classes)),
        ]
        config = card["document"]["config"]
        model = config.get("model") or config.get("student") or {}
        normalised = self._normalised("teacher", net, stage, model, splits, run)
        return [_of(role, check) for check in (*checks, normalised)]

    def _normalised(
        self, role: str, net: Normalised, stage: Any, model: Mapping[str, Any], splits: Splits, run: Run
    ) -> Check:
        from kd.training.probe import pixels

        seen = self._known(("pixels", _still(stage.data)), lambda: pixels(splits.train, stage.data, run, SAMPLES))
        data = stage.data["mean"], stage.data["std"]
        return verdicts.normalisation(role, net.statistics, data, seen, bool(model.get("pretrained")))

    def _baseline(self, node: Node) -> tuple[float, str] | None:
        """The best validation accuracy of the same student on the same data without a teacher, and its hash."""
        student, scores = canonical(node.config.get("student")), []
        for artifact in self.store:
            config, metrics = artifact.card["document"]["config"], artifact.card.get("metrics", {})
            alike = "model" in config and canonical(config["model"]) == student
            if alike and _still(config.get("data", {})) == _still(node.config["data"]) and "val/accuracy" in metrics:
                scores.append((float(metrics["val/accuracy"]), short(artifact.key)))
        return max(scores, default=None)

    def _known(self, key: Any, make: Callable[[], Any]) -> Any:
        name = canonical(list(key))
        if name not in self.speeds:
            self.speeds[name] = make()
        return self.speeds[name]

    def _assembled(self, node: Node, stage: Any, splits: Splits, plan: Plan, run: Run) -> Assembly[Any]:
        """The training as it would begin; a teacher that is not there yet is one of fresh weights."""
        from kd.models import load
        from kd.stages.assembly import assemble
        from kd.stages.building import build

        room = self._room(run)
        inputs = {role: found for role, key in node.inputs.items() if (found := self.store.get(key)) is not None}
        fresh = {}
        for role in teachers(node.inputs):
            if role not in inputs:
                source = next(n for n in plan.nodes if n.key == node.inputs[role])
                model = source.config.get("model") or source.config["student"]
                fresh[role] = build(model, stage.data, splits, 0, room)
        if hasattr(stage, "assemble"):  # networks that learn together
            one = fresh.get("teacher") or (load(inputs["teacher"].path) if "teacher" in inputs else None)
            made: Assembly[Any] = stage.assemble(one, splits, room)
            return made
        student = build(stage.student_config, stage.data, splits, stage.seed, room)
        return assemble(stage, student, inputs, splits, room, fresh)

    def _stored(
        self,
        role: str,
        labels: Artifact | None,
        teacher: Artifact | None,
        made: Assembly[Any],
        stage: Any,
        run: Run,
    ) -> Check:
        import torch

        from kd.models import load
        from kd.training.probe import loader_of, spoken

        if labels is None or teacher is None:
            return Check(OK, "stored labels", "not made yet; until they are, a live teacher stands for them here")
        kind = resolve(labels.card["document"]["stage"])
        if wrong := kind.flaw(labels):
            return Check(FAIL, "stored labels", f"{wrong}; remove them with `kd rm {short(labels.key)}`")
        config = with_neutral(labels.card["document"]["config"], kind.SINCE)
        loader = loader_of(made.split, made.fit, run, stage.data, stage.seed, made.views, made.view_seed, made.labels)
        stored, live = spoken(load(teacher.path), loader, run, role)
        top = live.argmax(1, keepdim=True)
        off = (stored.softmax(1).gather(1, top) - live.softmax(1).gather(1, top)).abs().max().item()
        agree = float((stored.argmax(1) == top.squeeze(1)).to(torch.float64).mean())
        half = config["precision"] != "32-true"
        return verdicts.stored_labels(agree, off, len(top), 5e-2 if half else _TOLERANCE[config["dtype"]])

    def _steps(
        self, node: Node, stage: Any, made: Assembly[Any], splits: Splits, run: Run, trained: bool
    ) -> list[Check]:
        """Take some steps; what they show of the teacher, the losses and the terms."""
        from kd.training.probe import listened

        live = listened(made.module)
        probed = self._probed(node, stage, made, splits, run)
        checks = []
        if live is not None:
            norms = sum("running_mean" in name for name, _ in live.named_buffers())
            checks += [verdicts.frozen(probed.training, probed.learning), verdicts.unmoved(probed.moved, norms)]
        elif hasattr(stage, "tune") and teachers(node.inputs):
            tuned = stage.tune if isinstance(stage.tune, str) else ", ".join(stage.tune)
            checks.append(Check(OK, "teacher frozen", f"it learns too: {tuned} at {stage.rate:g} of fit.lr"))
        elif teachers(node.inputs):
            why = (
                "its stored labels speak for it" if made.labels is not None else "no term of a weight above 0 hears it"
            )
            checks.append(Check(OK, "teacher frozen", f"it does not run: {why}"))
        checks += [verdicts.losses(probed.losses, probed.parts), verdicts.shares(probed.gradients, trained)]
        return [*checks, _memory(probed.peak, run)]

    def _probed(self, node: Node, stage: Any, made: Assembly[Any], splits: Splits, run: Run) -> Probed:
        from kd.compress.measure import stored_bytes
        from kd.training.probe import loader_of, probe, speak

        _, _, judge = speak(made.module.student, splits.validation, stage.data, run, 512)
        made.module.student_taps.clear()
        size = sum(stored_bytes(net) for net in _learning(made.module))
        loader = loader_of(made.split, made.fit, run, stage.data, stage.seed, made.views, made.view_seed, made.labels)
        probed = probe(made.module, loader, made.fit, run, stage.seed)
        step = probed.step_s
        for role in made.module.live:
            if labels_of(role) in node.inputs:
                _, _, asked = speak(made.teachers[role], made.split, stage.data, run, made.fit.batch_size)
                step = max(step - asked * made.fit.batch_size, step / 10)  # its labels will be there by then
        self.speeds.setdefault(self._kind(node), _Speed(step, judge, size))
        return probed

    def _kind(self, node: Node) -> str:
        """What decides how fast a stage goes; numbers in terms, seeds and epochs do not."""
        config = {k: v for k, v in node.config.items() if k not in ("seed", "view_seed", "objective", "fit", "views")}
        known = node.config.get("fit") or {}
        fit = {k: v for k, v in known.items() if k in ("batch_size", "precision", "channels_last")}
        terms = {
            name: {k: v for k, v in term.items() if k != "weight"}
            for name, term in node.config.get("objective", {}).items()
            if weighs(term.get("weight", 1))
        }
        return canonical(["speed", node.document["stage"], config, fit, _without_numbers(terms), sorted(node.inputs)])

    def _cost(self, node: Node, plan: Plan, run: Run) -> Cost:
        """Of one stage that is not there."""
        from kd.stages.splits import learnt_from

        kind = resolve(node.document["stage"])
        splits = learnt_from(node.config["data"], self._images(node), self._room(run))
        if hasattr(kind, "forecast"):
            return self._labels_cost(node, kind, splits, plan, run)
        stage = build_stage(node.document, run.trusted)
        name = self._kind(node)
        if name not in self.speeds:
            self._probed(node, stage, self._assembled(node, stage, splits, plan, run), splits, run)
        speed, fit = self.speeds[name], Fit(**stage.fit)
        from kd.stages.assembly import steps_of

        samples = min(fit.samples or len(splits.train), len(splits.train))
        steps = steps_of(fit, samples - round(getattr(stage, "quiz", 0) * samples))
        every = 1 if fit.needs_validation else run.validate_every
        validation = speed.judge * len(splits.validation)
        epoch = steps * speed.step + (validation / every if every else 0)
        seconds = fit.epochs * epoch + validation + speed.judge * len(splits.test)
        said = f"{_short(epoch)} an epoch ({steps} steps of {_short(speed.step)}), {fit.epochs} epochs"
        # The checkpoint beside the weights holds them again, with what the optimiser remembers.
        return Cost(seconds, 4 * speed.bytes, said)

    def _labels_cost(self, node: Node, kind: Any, splits: Splits, plan: Plan, run: Run) -> Cost:
        from kd.models import load
        from kd.stages.building import build
        from kd.training.probe import speak

        config, source = with_neutral(node.config, kind.SINCE), node.inputs["teacher"]
        there = self.store.get(source)

        def asked() -> float:
            model = next(n for n in plan.nodes if n.key == source).config["model"]
            net = load(there.path) if there else build(model, node.config["data"], splits, 0, self._room(run))
            return speak(net, splits.train, node.config["data"], run, 1024)[2]

        views = int(config["views"] or 1)
        seconds = self._known(("pass", source), asked) * len(splits.train) * views
        if config["views"] is None:
            size = len(splits.train) * (4 * len(splits.classes) + 8)
        else:
            size = kind.forecast(config, len(splits.train), self.store.work(node.key))[0]
        return Cost(seconds, size, f"{views} view{'s' if views > 1 else ''} of {len(splits.train):,} samples")

    def _time(self, plan: Plan, run: Run, costs: Mapping[str, Cost]) -> Check:
        silent = [n.name for n in plan.nodes if not _counted(n) and self.store.get(n.key) is None]
        more = f"; {', '.join(silent)} not counted" if silent else ""
        if not costs:
            return Check(OK, "time", f"nothing is left to run{more}")
        parts = [
            f"{node.name} {duration_text(cost.seconds)} ({cost.said})"
            for node in plan.nodes
            if (cost := costs.get(node.key)) is not None
        ]
        total = sum(cost.seconds for cost in costs.values())
        note = "; measured uncompiled" if any((n.config.get("fit") or {}).get("compile") for n in plan.nodes) else ""
        return Check(OK, "time", f"about {duration_text(total)} in all: {', '.join(parts)}{note}{more}")

    def _disk(self, costs: Mapping[str, Cost]) -> Check:
        return disk_check(self.store, costs)


def disk_check(store: Store, costs: Mapping[str, Cost]) -> Check:
    """Whether what these stages will write fits on the store's disk."""
    place = next(path for path in (store.root, *store.root.parents) if path.exists())
    needed = sum(cost.bytes for cost in costs.values())
    return verdicts.disk(needed, shutil.disk_usage(place).free, f"{len(costs)} stage{'s' if len(costs) != 1 else ''}")


def _trains(node: Node) -> bool:
    """Whether a stage trains a network from its start."""
    return hasattr(resolve(node.document["stage"]), "student_config")


def _counted(node: Node) -> bool:
    """Whether it can be told what a stage will cost."""
    return _trains(node) or hasattr(resolve(node.document["stage"]), "forecast")


def _learning(module: Distiller | Circle) -> list[nn.Module]:
    """The plain networks that a training writes down."""
    members = getattr(module, "members", None)
    return [module.net] if members is None else [member.net.net for member in members.values()]


def _bindings(made: Assembly[Any]) -> Check:
    """Which views each term reads, and what the terms train themselves; of several networks, those of each."""
    module = made.module
    others = {f"{n}_": terms for n, terms in getattr(module, "objectives", {}).items() if terms is not module.objective}
    said, own = [], 0
    for owner, objective in {"": module.objective, **others}.items():
        for name, term in objective.active.items():
            named = [v if isinstance(v, str) else " + ".join(filter(None, v)) for v in term.names().values()]
            said.append(f"{owner}{name}({', '.join(named)})")
        own += sum(p.numel() for p in objective.parameters() if p.requires_grad)
    return Check(
        OK, "bindings", ", ".join(said) + (f"; the terms train {own:,} parameters of their own" if own else "")
    )


def _memory(peak: int, run: Run) -> Check:
    import torch

    from kd.training.trainer import device_of

    device = device_of(run)
    if device.type == "cuda":
        whole, where = torch.cuda.get_device_properties(device).total_memory, "the GPU"
    else:
        whole, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    state = WARN if peak > 0.9 * whole else OK
    return Check(state, "memory", f"{size_text(peak)} at most, {where} has {size_text(whole)}")


def _of(role: str, check: Check) -> Check:
    """A check under the name of one of several teachers."""
    if role == "teacher":
        return check
    named = check.name.replace("teacher", role)
    return check._replace(name=named if role in named else f"{role}: {check.name}")


def _still(data: Mapping[str, Any]) -> str:
    """A data config without its augmentation, as text."""
    return canonical({name: value for name, value in data.items() if name != "augment"})


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else duration_text(seconds)


def _without_numbers(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_numbers(value) for key, value in node.items()}
    return None if isinstance(node, (int, float)) and not isinstance(node, bool) else node
