"""`kd bench topology`: what a step costs with several teachers, live or stored, and with networks that learn together.

Weights and stored labels are random, and nothing is kept: it says nothing about accuracy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kd.config import jobs
from kd.errors import InputError
from kd.pipeline.execute import build as build_stage
from kd.pipeline.plan import plan
from kd.training.settings import Run

if TYPE_CHECKING:
    from kd.data import Splits
    from kd.models import Normalised
    from kd.stages.assembly import Assembly
    from kd.stages.base import Room

WARM = 3  # steps of each before the clock starts
TEACHERS, NETWORKS = (1, 2, 4), (2, 4)
OWN = ("pipeline", "teachers", "students", "circle.copies")  # words that each row has for itself


@dataclass(frozen=True)
class Topology:
    """One row.

    Args:
        name: what learns from what.
        words: overrides that make it.
        stored: the teachers' outputs are read and not computed.
    """

    name: str
    words: tuple[str, ...]
    stored: bool = False


@dataclass(frozen=True)
class Going:
    """A training that goes on when it is asked to.

    Args:
        step: takes one step, its batch included.
        networks: how many run in it.
        weights: bytes of their parameters and buffers.
        device: where.
    """

    step: Callable[[], None]
    networks: int
    weights: int
    device: Any


def topologies() -> list[Topology]:
    """The rows, the student alone first.

    >>> [one.name for one in topologies()][:3]
    ['student alone', '1 live teacher', '2 live teachers']
    """
    found = [Topology("student alone", ("pipeline=baseline",))]
    for stored in (False, True):
        for number in TEACHERS:
            alike = "name: ${teacher.name}, options: ${teacher.options}"
            named = ",".join(f"{{{alike}, with: {{seed: {seed}}}}}" for seed in range(number))
            what = f"teacher{'s' if number > 1 else ''}"
            name = f"{number} {what}, stored labels" if stored else f"{number} live {what}"
            found.append(Topology(name, ("pipeline=teachers", f"teachers=[{named}]"), stored))
    found += [Topology(f"mutual, {n} networks", ("pipeline=mutual", f"circle.copies={n - 1}")) for n in NETWORKS]
    return [*found, Topology("bidirectional", ("pipeline=bidirectional",))]


def bench_topology(words: list[str], rounds: int, steps: int) -> tuple[dict[str, Any], Table]:
    """Milliseconds a step of each topology, beside the student alone, as data and as a table.

    On a processor it is the processor's own time in one thread, which other work on the machine does not lengthen.

    Args:
        words: overrides, e.g. `teacher.name=resnet34 student.name=resnet18 data=cifar100`.
        rounds: of all topologies, one after the other.
        steps: of each in a round.

    Raises:
        InputError: if a word is one that the rows have for themselves, or a topology cannot be.
    """
    import torch

    from kd.training.memory import keep_memory

    for word in words:
        if (name := word.lstrip("+~").partition("=")[0]) in OWN:
            raise InputError(f"{word}: kd bench topology sets {name} itself, row by row; leave it out")
    keep_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(words, rounds, steps)
    finally:
        torch.set_num_threads(threads)


def _measured(words: list[str], rounds: int, steps: int) -> tuple[dict[str, Any], Table]:
    from rich.console import Console
    from rich.progress import track

    from kd.benching.memory import peak_bytes

    data, skipped = _Data(), {}
    going: dict[str, Going] = {}
    for one in topologies():
        try:
            going[one.name] = _going(one, words, data)
        except _Skipped as why:
            skipped[one.name] = str(why)
    for training in going.values():
        _timed(training, WARM)
    seconds: dict[str, list[float]] = {name: [] for name in going}
    console = Console(stderr=True)
    order = [name for _ in range(rounds) for name in going]
    for name in track(order, "measuring", console=console, transient=True, disable=not console.is_terminal):
        seconds[name].append(_timed(going[name], steps) / steps)
    rows: list[dict[str, Any]] = []
    for one in topologies():
        if one.name in skipped:
            rows.append({"topology": one.name, "skipped": skipped[one.name]})
            continue
        training = going[one.name]
        costs = {"networks": training.networks, "weights": training.weights}
        costs["held"] = peak_bytes(training.step, training.device)
        rows.append({"topology": one.name, **costs, **compared(seconds[one.name], seconds["student alone"])})
    return _summary(rows, rounds, steps, next(iter(going.values())).device.type)


def compared(seconds: list[float], alone: list[float]) -> dict[str, float]:
    """A step's median, and its median, least and greatest share of the same round's step of the student alone.

    >>> compared([2.0, 30.0, 2.0], [1.0, 10.0, 1.0])
    {'seconds': 2.0, 'of_alone': 2.0, 'least': 2.0, 'most': 3.0}
    """
    shares = [one / other for one, other in zip(seconds, alone, strict=True)]
    return {"seconds": median(seconds), "of_alone": median(shares), "least": min(shares), "most": max(shares)}


class _Skipped(Exception):
    """A row that cannot be with these words."""


class _Data:
    """The data of all rows, loaded once."""

    def __init__(self) -> None:
        self.splits: Splits | None = None

    def of(self, data: dict[str, Any], room: Room) -> Splits:
        """The splits."""
        from kd.stages.splits import load_data

        if self.splits is None:
            self.splits = load_data(data, room)
        return self.splits


def _going(one: Topology, words: list[str], data: _Data) -> Going:
    """A topology's training, about to begin."""
    from kd.stages.assembly import assemble
    from kd.stages.base import Room
    from kd.stages.building import build

    config = jobs(["run.wandb=disabled", *one.words, *words])[0][0].config
    run = Run(**config["run"])
    node = plan(config).nodes[-1]
    stage, room = build_stage(node.document, run.trusted), Room(run, Path(os.devnull))
    splits = data.of(stage.data, room)
    # Each of weights of its own, as they would be.
    teachers = {
        role: build(config["teacher"], stage.data, splits, number, room)
        for number, role in enumerate(sorted(role for role in node.inputs if role.startswith("teacher")), 1)
    }
    if hasattr(stage, "assemble"):
        made: Assembly[Any] = stage.assemble(teachers.get("teacher"), splits, room)
        nets = [member.net for member in made.module.members.values()]
        return _training(made, stage, run, nets)
    student = build(stage.student_config, stage.data, splits, stage.seed, room)
    made = assemble(stage, student, {}, splits, room, teachers)
    if teachers and not made.module.objective.teachers:
        raise _Skipped("no term of a weight above 0 hears a teacher")
    if one.stored:
        made = _from_labels(made, len(splits.classes))
    return _training(made, stage, run, [made.module.student, *made.module.live.values()])


def _from_labels(made: Assembly[Any], classes: int) -> Assembly[Any]:
    """The same training, the teachers' logits out of a store."""
    import torch

    from kd.data.labels import StoredLabels
    from kd.data.several import SeveralLabels
    from kd.training.module import Distiller

    objective = made.module.objective
    roles = objective.teachers
    if any(objective.paths(role) for role in roles):
        raise _Skipped("a term reads layers of the teacher's, which these labels do not hold")
    module = Distiller(
        made.module.student,
        objective,
        made.module.optimisers,
        stored=roles,
        channels_last=made.fit.channels_last,
    )
    ids = made.split.ids.cpu()
    found = {role: StoredLabels.of(torch.randn(len(ids), classes), ids) for role in roles}
    labels = found["teacher"] if roles == ["teacher"] else SeveralLabels(found)
    return replace(made, module=module, labels=labels)


def _training(made: Assembly[Any], stage: Any, run: Run, nets: list[Normalised]) -> Going:
    import torch

    from kd.compress.measure import stored_bytes
    from kd.training.probe import for_ever, in_precision, loader_of, mixed
    from kd.training.trainer import check_precision, device_of

    module, fit, device = made.module, made.fit, device_of(run)
    check_precision(fit, run)
    loader = loader_of(made.split, fit, run, stage.data, stage.seed, made.views, made.view_seed, made.labels)
    module.to(device).train()
    if fit.precision == "64-true":
        module.double()
    if fit.compile:
        module.compile_nets()
    found: Mapping[str, Any] = module.configure_optimizers()
    optimiser, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    batches, numbers, autocast = for_ever(loader), count(), mixed(fit, device)

    def step() -> None:
        number = next(numbers)
        batch = in_precision(next(batches), fit)
        module.at(number / len(loader), fit.epochs)
        optimiser.zero_grad()
        with autocast():
            loss = module.training_step(batch, number)
        loss.backward()
        if fit.clip is not None:
            torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], fit.clip)
        optimiser.step()
        schedule.step()

    return Going(step, len(nets), sum(stored_bytes(net.net) for net in nets), device)


def _timed(training: Going, steps: int) -> float:
    """Seconds of some steps: of a processor its own, of a GPU by the clock."""
    import torch

    def now() -> float:
        if training.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    for _ in range(steps):
        training.step()
    return now() - started


def _summary(rows: list[dict[str, Any]], rounds: int, steps: int, device: str) -> tuple[dict[str, Any], Table]:
    where = "one thread's own time" if device == "cpu" else "by the clock"
    title = f"rounds: {rounds} of {steps} steps, {device}, {where}"
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in ("topology", "networks", "ms a step", "of alone", "least", "most", "MiB of weights", "MiB a step"):
        table.add_column(column, justify="left" if column == "topology" else "right")
    for row in rows:
        if "skipped" in row:
            table.add_row(row["topology"], "", f"skipped: {row['skipped']}")
            continue
        shares = [f"{row[name]:.2f}" for name in ("of_alone", "least", "most")]
        mebibytes = [f"{row[name] / 2**20:.1f}" for name in ("weights", "held")]
        table.add_row(row["topology"], str(row["networks"]), f"{1e3 * row['seconds']:.2f}", *shares, *mebibytes)
    return {"rows": rows, "rounds": rounds, "steps": steps, "device": device}, table
