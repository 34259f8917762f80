"""`kd bench step`: what the training loop costs beside a bare one; interleaved rounds, medians, ratios of one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kd.config import jobs
from kd.errors import InputError
from kd.pipeline.plan import plan
from kd.training.settings import Fit, Run

if TYPE_CHECKING:
    from kd.data import Split

WARM = 20  # steps before the clock starts
LOOPS = {
    "a": "bare loop, student alone",
    "b": "our Trainer, student alone",
    "c": "our Trainer, live teacher",
    "d": "our Trainer, stored soft labels",
}
RATIOS = (("b", "a", 0.9), ("d", "b", 0.9), ("c", "b", None))


class Clock:
    """Times the steps after the warm-up, from inside the loop: starting a Trainer is not a step."""

    def __init__(self, steps: int, wait: Callable[[], None] | None = None) -> None:
        """Count ``steps`` after `WARM`; ``wait`` is called before the clock is read."""
        self.steps, self.seen, self.begun, self.seconds, self.wait = steps, 0, 0.0, 0.0, wait

    def tick(self) -> None:
        """Called after each step."""
        self.seen += 1
        if self.wait is not None and self.seen in (WARM, WARM + self.steps):
            self.wait()  # a GPU's work is only asked for by a step, not done
        if self.seen == WARM:
            self.begun = time.perf_counter()
        elif self.seen == WARM + self.steps:
            self.seconds = time.perf_counter() - self.begun


@contextmanager
def _scratch() -> Iterator[Path]:
    with TemporaryDirectory(prefix="kd-bench-") as folder:
        yield Path(folder)


def bench_step(words: list[str], rounds: int, steps: int) -> tuple[dict[str, Any], Table]:
    """Steps a second of the four loops of `LOOPS` on one config, as data and as a table.

    Raises:
        InputError: if the data has too few samples for that many steps.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    config = jobs(["run.wandb=disabled", "run.latency=false", *words])[0][0].config
    node = plan(config).nodes[-1]
    measure = _loops(node.config, config, Run(**config["run"]), steps)
    seconds: dict[str, list[float]] = {name: [] for name in measure}
    order = [name for _ in range(rounds) for name in measure]
    for name in track(order, "measuring", console=console, transient=True, disable=not console.is_terminal):
        seconds[name].append(measure[name]())
    return _summary(seconds, steps)


def _summary(seconds: dict[str, list[float]], steps: int) -> tuple[dict[str, Any], Table]:
    speed = {name: median(steps / s for s in values) for name, values in seconds.items()}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("loop", "", "steps/s", "slowest", "fastest"):
        table.add_column(column, justify="left" if column in ("loop", "") else "right")
    for name, text in LOOPS.items():
        if name not in seconds:
            table.add_row(f"({name})", f"{text}: a term runs the teacher again", "-", "-", "-")
            continue
        values = [steps / s for s in seconds[name]]
        table.add_row(f"({name})", text, f"{speed[name]:.0f}", f"{min(values):.0f}", f"{max(values):.0f}")
    ratios = {}
    for top, bottom, target in RATIOS:
        if not {top, bottom} <= set(seconds):
            continue
        # Round by round: what slows the machine for a moment slows both.
        pairs = [b / t for t, b in zip(seconds[top], seconds[bottom], strict=True)]
        ratios[f"{top}/{bottom}"] = median(pairs)
        said = f"target {target}" if target else ""
        table.add_row(f"({top})/({bottom})", said, f"{median(pairs):.2f}", f"{min(pairs):.2f}", f"{max(pairs):.2f}")
    return {"steps_per_second": speed, "ratios": ratios, "seconds": seconds, "steps": steps}, table


def _loops(stage: dict[str, Any], config: dict[str, Any], run: Run, steps: int) -> dict[str, Callable[[], float]]:
    import torch

    from kd.data.labels import StoredLabels
    from kd.losses.logits import CrossEntropy
    from kd.objective import Objective, Term
    from kd.stages.base import Room
    from kd.stages.bindings import bind
    from kd.stages.building import build, build_objective
    from kd.stages.evaluation import logits_of
    from kd.stages.splits import load_data
    from kd.training.callbacks import EachStep
    from kd.training.loaders import EpochLoader
    from kd.training.module import Distiller
    from kd.training.optimisers import configure
    from kd.training.trainer import device_of, quiet, train

    if "student" not in stage:
        raise InputError("kd bench step compares with a teacher; use pipeline=distil")
    data, fit = stage["data"], Fit(**{**stage["fit"], "epochs": 1, "samples": None, "select": "last", "patience": None})
    splits = load_data(data, Room(run, Path()))
    wanted = (WARM + steps) * fit.batch_size
    if wanted > len(splits.train):
        raise InputError(
            f"{WARM} + {steps} steps of {fit.batch_size} need {wanted} samples, {data['name']} has "
            f"{len(splits.train)}: lower --steps or fit.batch_size, or choose larger data, e.g. data=mnist"
        )
    split = splits.train.subset(torch.arange(wanted))
    room = Room(run, Path())
    device = device_of(run)
    teacher = build(config["teacher"], data, splits, 0, room)
    labels = logits_of(teacher, split, data, room)
    augment = data["augment"]
    wait = torch.cuda.synchronize if device.type == "cuda" else None

    def student() -> Any:
        return build(stage["student"], data, splits, 0, room).to(device).train()

    def bare() -> float:
        net, clock = student(), Clock(steps, wait)
        kind = configure(fit, WARM + steps)(list(net.parameters()))
        optimiser, schedule = kind["optimizer"], kind["lr_scheduler"]["scheduler"]
        loader = EpochLoader(
            split, fit.batch_size, augment=augment, size=data["size"], shuffle=True, drop_last=True, device=device
        )
        for batch in loader:
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(batch["image"]), batch["target"]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            clock.tick()
        return clock.seconds

    def ours(distilled: bool, stored: StoredLabels | None) -> Callable[[], float]:
        def measure() -> float:
            net, clock = student(), Clock(steps, wait)
            alone = Objective({"ce": Term(CrossEntropy(), 1.0, "student.logits", target="batch.target")})
            objective = build_objective(stage["objective"], room) if distilled else alone
            bind(objective, net, teacher if distilled else None, data)
            module = Distiller(
                net,
                objective,
                configure(fit, WARM + steps),
                teacher if distilled else None,
                stored=("teacher",) if stored is not None else (),
            )
            with _scratch() as work, quiet():
                train(
                    module,
                    (split, _few(splits.validation)),
                    fit,
                    Run(**{**run.__dict__, "validate_every": 0}),
                    seed=0,
                    size=data["size"],
                    augment=augment,
                    work=work,
                    labels=stored,
                    tell=lambda event: None,
                    watching=[EachStep(clock.tick)],
                )
            return clock.seconds

        return measure

    loops = {"a": bare, "b": ours(False, None), "c": ours(True, None)}
    if not build_objective(stage["objective"], room).again:  # what is asked again has no stored answer
        loops["d"] = ours(True, StoredLabels.of(labels, split.ids))
    return loops


def _few(split: Split) -> Split:
    import torch

    return split.subset(torch.arange(min(64, len(split))))
