"""The smallest whole job: digits, 256 samples, two epochs; and ways to kill a process in the middle of it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from kd.config import jobs
from kd.pipeline.execute import execute
from kd.pipeline.plan import Plan, plan
from kd.pipeline.work import run_job
from kd.store import Store
from kd.training.settings import Run

WORDS = (
    "teacher_fit.epochs=2", "teacher_fit.samples=256", "teacher_fit.batch_size=64",
    "fit.epochs=2", "fit.samples=256", "fit.batch_size=64",
    "run.wandb=disabled", "run.latency=false", "run.progress=false",
)  # fmt: skip


def planned(store: Path, *words: str) -> tuple[Plan, Run]:
    """The plan and the run settings of the small job with more words."""
    job = jobs([f"run.store={store}", *WORDS, *words])[0][0]
    return plan(job.config, job.overrides), Run(**job.config["run"])


def made(store: Path, *words: str) -> tuple[list[str], dict[str, Any]]:
    """Run it here; the stages that ran, and the last card."""
    one, run = planned(store, *words)
    ran = execute(one, Store(store), run)
    artifact = Store(store).get(one.key)
    assert artifact is not None
    return ran, artifact.card


def cards(store: Path, *words: str) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, Path]]:
    """Run it here; the stages that ran, each stage's card and folder."""
    one, run = planned(store, *words)
    ran = execute(one, Store(store), run)
    found = {node.name: Store(store).get(node.key) for node in one.nodes}
    return ran, {n: a.card for n, a in found.items() if a}, {n: a.path for n, a in found.items() if a}


def kill_at(moment: str, at: int, one: Plan, run: Run, tell: Any) -> None:
    """Run a plan and die by SIGKILL when the student's training reaches a moment for the ``at``-th time."""
    from kd.data import dreams
    from kd.stages import image
    from kd.training.callbacks import Checkpoint, Recorder
    from kd.training.module import Distiller

    where: dict[str, tuple[Any, str]] = {
        "step": (Checkpoint, "on_train_batch_end"),
        "before the checkpoint of an epoch's end": (Checkpoint, "on_train_epoch_end"),
        "after the epoch's record": (Recorder, "on_train_epoch_end"),
        "validation": (Distiller, "validation_step"),
        "the first checkpoint's writing": (Checkpoint, "write"),
        "evaluation": (image, "evaluated"),
        "storing": (Store, "put"),
        "a batch of images": (dreams, "write"),
    }
    owner, name = where[moment]
    inner, count = getattr(owner, name), [0]

    def die(*arguments: Any, **keywords: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments, **keywords)

    setattr(owner, name, die)
    execute(one, Store(run.store), run)


def exits(tell: Any) -> None:
    """A job that calls exit."""
    raise SystemExit(3)


def raises(tell: Any) -> None:
    """A job that raises."""
    raise RuntimeError("first line\nsecond line")


def killed(tell: Any) -> None:
    """A job that the kernel kills, as it does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def vanishes(tell: Any) -> None:
    """A job whose process ends without a word."""
    os._exit(5)


def imports(words: list[str], tell: Any) -> list[str]:
    """A job that trains; the modules of kd that it had to import by itself."""
    before = set(sys.modules)
    store = Path(next(word for word in words if word.startswith("run.store=")).partition("=")[2])
    one, run = planned(store, *words)
    execute(one, Store(store), run, tell)
    # A job gets its plan from its parent, who composes it.
    return sorted(name for name in set(sys.modules) - before if name.startswith("kd.") and name != "kd.config")


def tells(number: int, tell: Any) -> int:
    """A job that speaks and returns."""
    tell({"event": "say", "line": f"got {number}"})
    return number + 1


def killed_for_seed_7(one: Plan, run: Run, sweep: str | None, threads: int | None, tell: Any) -> list[str]:
    """`run_job`, but the job with seed 7 is killed as the kernel would do it."""
    if one.dials["seed"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_job(one, run, sweep, threads, tell)
