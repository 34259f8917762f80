"""How the jobs of a sweep are spread: one after the other, packed into one process, over processes, over a cluster.

The names are Hydra's (`hydra/launcher=…`, options as `hydra.launcher.…`); a job is planned here and handed over whole,
so no process composes it again. None of it is hashed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.errors import InputError, nearest, offer
from kd.pipeline import jobs as children
from kd.pipeline.plan import Plan
from kd.pipeline.work import run_job, run_packed
from kd.store import canonical
from kd.training.settings import Run, require, typed

Event = dict[str, Any]
_CHOICE = re.compile(r"\+*hydra/launcher=(.*)")
_OPTION = re.compile(r"\+*hydra\.launcher\.(\w+)=(.*)")
SUBMITIT = ("submitit_local", "submitit_slurm")


@dataclass(frozen=True)
class Task:
    """One job that has stages to run."""

    plan: Plan
    run: Run


Hear = Callable[[int, Event], None]  # a task's number, and what its process told
End = Callable[[int, Event], None]  # a task's number, and its outcome


@dataclass(frozen=True)
class Basic:
    """One job after the other, each in a process of its own."""

    def launch(self, tasks: Sequence[Task], sweep: str | None, hear: Hear, end: End) -> None:
        """Run all tasks."""
        for number, task in enumerate(tasks):
            end(number, _alone(task, sweep, None, number, hear))


@dataclass(frozen=True)
class Packed:
    """All jobs in one process, which imports, reads data and makes batches once; each job's bits are its lone run's.

    Args:
        together: jobs that take turns at the same batches; the others follow.
    """

    together: int = 16

    def __post_init__(self) -> None:
        """Check the range."""
        require(self.together >= 1, "hydra.launcher.together", self.together, "1 or more jobs")

    def launch(self, tasks: Sequence[Task], sweep: str | None, hear: Hear, end: End) -> None:
        """Run all tasks; those that the end of their process left undone are run alone."""
        # torch keeps few lone forms of one class in a process, and runs the rest as they are: other bits.
        # Ranks are forked, and would take the neighbours along.
        lone = [
            number
            for number, task in enumerate(tasks)
            if task.run.devices > 1 or (task.plan.nodes[-1].config.get("fit") or {}).get("compile")
        ]
        packs = [[number for number in pack if number not in lone] for pack in packs_of(tasks, self.together)]
        ended: set[int] = set()

        def listen(event: Event) -> None:
            number = int(event["job"])
            if event["event"] == "ended":
                ended.add(number)
                end(number, event["outcome"])
            else:
                hear(number, event)

        work = [[(number, tasks[number].plan, tasks[number].run) for number in pack] for pack in packs]
        outcome = children.call(run_packed, work, sweep, tell=listen)
        for number, task in enumerate(tasks):
            if number in lone:
                end(number, _alone(task, sweep, None, number, hear))
            elif number not in ended:
                hear(number, {"event": "say", "line": f"the packed process ended ({outcome.get('error')}): on alone"})
                end(number, _alone(task, sweep, None, number, hear))


@dataclass(frozen=True)
class Joblib:
    """Several jobs at once, each in a process of its own; joblib deals them out, and the threads are divided.

    Args:
        n_jobs: at once; -1 as many as there are processors.
    """

    n_jobs: int = -1

    def __post_init__(self) -> None:
        """Check the range."""
        require(self.n_jobs >= 1 or self.n_jobs == -1, "hydra.launcher.n_jobs", self.n_jobs, "1 or more, or -1")

    def launch(self, tasks: Sequence[Task], sweep: str | None, hear: Hear, end: End) -> None:
        """Run all tasks."""
        from joblib import Parallel, delayed

        count = min(processors() if self.n_jobs == -1 else self.n_jobs, len(tasks))
        threads = max(1, processors() // count)

        def one(number: int) -> tuple[int, Event]:
            return number, _alone(tasks[number], sweep, threads, number, hear)

        # Its threads only wait: each job runs in a process of ours, which leaves nothing behind for the next one.
        parallel = Parallel(n_jobs=count, backend="threading", return_as="generator_unordered")
        for number, outcome in parallel(delayed(one)(number) for number in range(len(tasks))):
            end(number, outcome)


@dataclass(frozen=True)
class Submitit:
    """Each job as a job of submitit: on this machine, or of a SLURM cluster.

    Args:
        cluster: `local` or `slurm`.
        at_once: jobs at once on this machine; null: as many as there are processors.
        parameters: what submitit's executor takes, such as `timeout_min` and `slurm_partition`.
    """

    cluster: str
    at_once: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def launch(self, tasks: Sequence[Task], sweep: str | None, hear: Hear, end: End) -> None:
        """Run all tasks."""
        import time

        import submitit

        folder = Path(tasks[0].run.store).expanduser().absolute() / "submitit"
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=self.cluster)
        local = self.cluster == "local"
        count = min(self.at_once or processors(), len(tasks)) if local else len(tasks)
        threads = max(1, processors() // count) if local else None
        try:
            executor.update_parameters(**{"timeout_min": 24 * 60, "name": "kd", **self.parameters})
        except (NameError, TypeError, ValueError) as error:
            raise InputError(f"hydra.launcher: submitit does not take {self.parameters}: {error}") from error
        waiting = list(range(len(tasks)))[::-1]
        going: dict[int, Any] = {}
        try:
            while waiting or going:
                while waiting and len(going) < count:
                    number = waiting.pop()
                    task = tasks[number]
                    going[number] = executor.submit(children.outcome_of, run_job, task.plan, task.run, sweep, threads)
                    hear(number, {"event": "start", "stage": task.plan.nodes[-1].name, "key": task.plan.key})
                for number in [number for number, job in going.items() if job.done()]:
                    end(number, _result(going.pop(number)))
                time.sleep(0.2)
        finally:
            for job in going.values():
                job.cancel()


Launcher = Basic | Packed | Joblib | Submitit
KINDS: Mapping[str, type[Basic | Packed | Joblib]] = {"basic": Basic, "packed": Packed, "joblib": Joblib}
NAMES = (*KINDS, *SUBMITIT)


def split_words(words: Iterable[str]) -> tuple[list[str], Launcher]:
    """What a run is made of, and how its jobs are spread.

    Raises:
        InputError: at a launcher that is none, or an option that it does not have.

    >>> split_words(["alpha=0.5", "hydra/launcher=packed", "hydra.launcher.together=4"])
    (['alpha=0.5'], Packed(together=4))
    """
    rest: list[str] = []
    name = "basic"
    options: dict[str, Any] = {}
    for word in words:
        if found := _CHOICE.fullmatch(word):
            name = found[1]
        elif found := _OPTION.fullmatch(word):
            options |= _value(*found.groups())
        else:
            rest.append(word)
    if name not in NAMES:
        raise InputError(f"hydra/launcher={name}: no such launcher{offer(name, NAMES)}")
    if name in SUBMITIT:
        return rest, _submitit(name, options)
    kind = KINDS[name]
    known = [f.name for f in fields(kind)]
    for option in options:
        if option not in known:
            raise InputError(f"hydra.launcher.{option} is not an option of {name}{nearest(option, known)}")
    return rest, typed(kind, options, "hydra.launcher")


def _value(name: str, text: str) -> dict[str, Any]:
    """An option as a config would read it."""
    try:
        return dict(OmegaConf.to_container(OmegaConf.from_dotlist([f"{name}={text}"])))  # type: ignore[arg-type]
    except (OmegaConfBaseException, ValueError) as error:
        raise InputError(f"hydra.launcher.{name}={text} is no value") from error


def _submitit(name: str, options: dict[str, Any]) -> Submitit:
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise InputError(f"hydra/launcher={name} needs submitit, which is not here: pip install 'kd[slurm]'") from error
    at_once = options.pop("at_once", None)
    if at_once is not None:
        require(type(at_once) is int and at_once >= 1, "hydra.launcher.at_once", at_once, "1 or more jobs")
    return Submitit(name.removeprefix("submitit_"), at_once, options)


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def packs_of(tasks: Sequence[Task], together: int) -> Iterator[list[int]]:
    """The tasks' numbers in packs: those that see the same batches take turns at them, ``together`` at the most."""
    alike: dict[str, list[int]] = {}
    for number, task in enumerate(tasks):
        alike.setdefault(_batches(task.plan), []).append(number)
    for numbers in alike.values():
        yield from (numbers[i : i + together] for i in range(0, len(numbers), together))


def _batches(plan: Plan) -> str:
    """All that a training's batches depend on, and what a process has only one of."""
    last = plan.nodes[-1]
    config = last.config
    fit = config.get("fit") or {}
    shape = [fit.get(name) for name in ("batch_size", "samples", "drop_last", "deterministic")]
    views = [config.get("views"), config.get("view_seed"), last.inputs.get("labels")]
    return canonical([config.get("data"), config.get("seed"), shape, views])


def shared_plans(tasks: Sequence[Task]) -> list[Task]:
    """What the tasks are made from, each once and in order: to be made before they are spread."""
    found: dict[tuple[str, ...], Task] = {}
    for task in tasks:
        before = task.plan.nodes[:-1]
        if before:
            one = Task(Plan(before, task.plan.pipeline, task.plan.dials), task.run)
            found.setdefault(tuple(node.key for node in before), one)
    return list(found.values())


def _alone(task: Task, sweep: str | None, threads: int | None, number: int, hear: Hear) -> Event:
    return children.call(run_job, task.plan, task.run, sweep, threads, tell=lambda event: hear(number, event))


def _result(job: Any) -> Event:
    error = job.exception()
    if error is None:
        return dict(job.result())
    last = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return {"status": "failed", "exit_code": 1, "error": f"job {job.job_id} of submitit: {last[-1].strip()}"}
