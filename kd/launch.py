"""Start jobs and show how they go: plan in this process, train in children, one progress line each."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kd.config import Job, jobs, labels
from kd.errors import Inconclusive, InputError, KDError
from kd.pipeline import jobs as children
from kd.pipeline.execute import record_sweep
from kd.pipeline.launchers import Basic, Launcher, Task, shared_plans, split_words
from kd.pipeline.plan import Plan, outlook, plan, status
from kd.pipeline.reproduce import Verdict, differences, judge, lineage
from kd.pipeline.work import check_jobs, run_job
from kd.stages.fingerprints import code_print
from kd.store import Store, short
from kd.training.settings import Run

console = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def progress(shown: bool) -> Iterator[Progress]:
    """A progress display on standard error; silent where that is no terminal or progress is off."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bars:
        yield bars


def say(line: str) -> None:
    """One line on standard error, markup and all, as long as it is."""
    console.print(line, soft_wrap=True)


def repeat(event: dict[str, Any]) -> None:
    """Say what a job's process has to say."""
    if event.get("event") == "say":
        say(escape(event["line"]))


def planned(words: list[str], multirun: bool, config_dir: str | None) -> tuple[list[Plan], list[Job], Run, bool]:
    """The plans of all jobs a command line asks for."""
    found, sweep = jobs(split_words(words)[0], multirun, config_dir)
    run = Run(**found[0].config["run"])
    for job in found:
        if Run(**job.config["run"]).store != run.store:
            raise InputError("run.store may not vary within a sweep: its jobs share teachers through the store")
    plans = [plan(job.config, job.overrides) for job in found]
    return plans, found, run, sweep


def sweep_id(plans: list[Plan]) -> str:
    """The name of a sweep: the hash of its runs' keys, in any order.

    >>> sweep_id([])
    'e3b0c44298fc1c14'
    """
    return hashlib.sha256("".join(sorted({p.key for p in plans})).encode()).hexdigest()[:16]


def launch(
    words: list[str], multirun: bool, config_dir: str | None
) -> tuple[list[Plan], list[dict[str, Any]], str | None, Run]:
    """Run all jobs; returns their plans and outcomes, and the sweep's id if it is one.

    Raises:
        InputError: before anything runs, if any job is not right.
    """
    words, launcher = split_words(words)
    plans, configs, run, is_sweep = planned(words, multirun, config_dir)
    store = Store(run.store)
    outlook(plans, store, run)
    sweep = sweep_id(plans) if is_sweep else None
    runs = [Run(**job.config["run"]) for job in configs]
    missing = [p for p in plans if any(status(n, store) != "hit" for n in p.nodes)]
    if missing:
        writable(store.root)
        children.warm()
        with console.status("checking every job") if console.is_terminal else contextlib.nullcontext():
            outcome = children.call(check_jobs, missing, run, tell=repeat)
        if outcome["status"] != "done":
            raise _as_error(outcome)
    names = labels(p.overrides for p in plans) if is_sweep else [""]
    outcomes: list[dict[str, Any]] = [{"status": "pending", "ran": []} for _ in plans]
    with progress(run.progress) as bars:
        show = _Show(bars, plans, names, len(plans) if is_sweep else None)

        def end(number: int, outcome: dict[str, Any]) -> None:
            outcomes[number] = {**outcome, "ran": show.ran(number)}
            show.ended(number)
            if outcome["status"] == "failed":
                if not is_sweep:
                    raise _as_error(outcome)
                say(f"[red]failed[/] {escape(names[number] or short(plans[number].key))}: {escape(outcome['error'])}")
            if sweep is not None:
                # After each job, so that a killed sweep is still found; the last writing is the whole one.
                record_sweep(store, sweep, words, plans, outcomes)

        _spread(launcher, plans, runs, store, sweep, show, end)
    return plans, outcomes, sweep, run


def _spread(
    launcher: Launcher,
    plans: list[Plan],
    runs: list[Run],
    store: Store,
    sweep: str | None,
    show: _Show,
    end: Callable[[int, dict[str, Any]], None],
) -> None:
    """Hand the jobs that miss something to the launcher; where several run at once, what they share is made first."""
    here = [all(status(node, store) == "hit" for node in plan.nodes) for plan in plans]
    first: dict[str, int] = {}
    twins: dict[int, int] = {}
    missing: list[int] = []
    for number, one in enumerate(plans):
        if here[number]:
            end(number, {"status": "hit", "exit_code": 0})
        elif not isinstance(launcher, Basic) and one.key in first:
            twins[number] = first[one.key]
        else:
            first[one.key] = number
            missing.append(number)
    if not missing:
        return
    if not isinstance(launcher, Basic):
        missing = _prepared(missing, plans, runs, store, sweep, show, end)
    tasks = [Task(plans[number], runs[number]) for number in missing]
    if tasks:
        launcher.launch(
            tasks, sweep, lambda n, event: show.hear(missing[n], event), lambda n, outcome: end(missing[n], outcome)
        )
    for number, twin in twins.items():
        hit = store.get(plans[twin].key) is not None
        failed = {"status": "failed", "exit_code": 1, "error": f"the same as job {twin}, which failed"}
        end(number, {"status": "hit", "exit_code": 0} if hit else failed)


def _prepared(
    missing: list[int],
    plans: list[Plan],
    runs: list[Run],
    store: Store,
    sweep: str | None,
    show: _Show,
    end: Callable[[int, dict[str, Any]], None],
) -> list[int]:
    """Make the stages that jobs share, one after the other on all processors; the jobs that can go on."""
    failures: dict[tuple[str, ...], dict[str, Any]] = {}
    tasks = shared_plans([Task(plans[number], runs[number]) for number in missing])
    open_ = [task for task in tasks if any(status(node, store) != "hit" for node in task.plan.nodes)]

    def ended(number: int, outcome: dict[str, Any]) -> None:
        show.ended(missing[0], counts=False)
        if outcome["status"] == "failed":
            failures[tuple(node.key for node in open_[number].plan.nodes)] = outcome

    Basic().launch(open_, sweep, lambda n, event: show.hear(missing[0], event), ended)
    able = []
    for number in missing:
        before = tuple(node.key for node in plans[number].nodes[:-1])
        if before in failures:
            end(number, failures[before])
        else:
            able.append(number)
    return able


def writable(root: Path) -> None:
    """Refuse a store that could not be written, without leaving anything there.

    Raises:
        InputError: if it cannot be made, or nothing can be written into it.
    """
    place = next(path for path in (root, *root.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            f"the store {root} cannot be written ({error.strerror}: {place}); name another folder in KD_STORE or "
            "run.store"
        ) from error


class _Show:
    """A bar for each job that is going on, one for the sweep, and a line for each stage that is made."""

    def __init__(self, bars: Progress, plans: list[Plan], names: list[str], total: int | None) -> None:
        self.bars, self.plans, self.names = bars, plans, names
        self.overall = bars.add_task("sweep", total=total) if total is not None else None
        self._tasks: dict[int, TaskID] = {}
        self._ran: dict[int, list[str]] = {}  # told one by one: a job that fails later has still made these

    def ran(self, number: int) -> list[str]:
        """The stages that a job has made."""
        return self._ran.get(number, [])

    def hear(self, number: int, event: dict[str, Any]) -> None:
        """What a job's process tells."""
        kind = event.get("event")
        # A stage before the last is not this job's alone.
        name = self.names[number] if event.get("key") == self.plans[number].key else ""
        if number not in self._tasks:
            self._tasks[number] = self.bars.add_task("starting", total=None)
        if kind == "start":
            text = f"{event['stage']} {name or short(event['key'])}"
            self._tasks[number] = _fresh(self.bars, self._tasks[number], text)
        elif kind in ("step", "pass"):
            self.bars.update(self._tasks[number], total=event["total"], completed=event["step"])
        elif kind == "done":
            self._ran.setdefault(number, []).append(event["stage"])
            say(f"[green]made[/] {event['stage']} {short(event['key'])}  {escape(name)}".rstrip())
        elif kind == "say":
            say(escape(event["line"]))

    def ended(self, number: int, counts: bool = True) -> None:
        """A job is over."""
        if number in self._tasks:
            self.bars.remove_task(self._tasks.pop(number))
        if counts and self.overall is not None:
            self.bars.advance(self.overall)


def _fresh(bars: Progress, task: TaskID, text: str) -> TaskID:
    """A bar for the next stage in place of the last one's: a total cannot be taken back."""
    bars.remove_task(task)
    text = text.strip()
    return bars.add_task(escape(text if len(text) <= 40 else text[:39] + "…"), total=None)


def _as_error(outcome: dict[str, Any]) -> KDError:
    kind = InputError if outcome.get("exit_code") == 2 else KDError
    return kind(outcome["error"])


def reproduce(
    prefix: str, words: list[str], store_dir: str, threads: int | None, keep: bool
) -> tuple[Verdict, Plan, list[str]]:
    """Run a stored run again, in a scratch store, and judge it.

    Returns the verdict, the plan, and the lines that say what code, data and environment differ now.

    Raises:
        InputError: if the recorded config is not to be trusted.
        Inconclusive: if data or a parent's record is missing.
    """
    store = Store(store_dir)
    artifact = store.find(prefix)
    for word in words:
        if not word.startswith(("run.", "run/", "++run.", "+run.")):
            raise InputError(f"{word}: only run.* may be given to reproduce; anything else would be another run")
    run = Run(**jobs([f"run.store={store_dir}", "run.wandb=disabled", "run.latency=false", *words])[0][0].config["run"])
    plan = lineage(store, artifact, run.trusted)
    notes = [
        f"code {line}"
        for line in differences(artifact.card["fingerprints"]["code"], code_print(), ("commit", "digest"))
    ]
    recorded = artifact.card["fingerprints"].get("environment", {})
    writable(store.root)
    scratch = Path(tempfile.mkdtemp(prefix="reproduce-", dir=_ensure(store.root / "scratch")))
    try:
        again = replace(run, store=str(scratch))
        outcome = _again(plan, again, threads or recorded.get("threads"))
        if outcome["status"] != "done":
            raise Inconclusive(outcome["error"]) if outcome.get("exit_code") == 2 else _as_error(outcome)
        verdict = judge(store, Store(scratch), plan)
    finally:
        if keep:
            say(f"kept {escape(str(scratch))}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
            with contextlib.suppress(OSError):  # another reproduction is in there too
                scratch.parent.rmdir()
    return verdict, plan, notes


def _again(plan: Plan, run: Run, threads: int | None) -> dict[str, Any]:
    children.warm()
    with progress(run.progress) as bars:
        task = bars.add_task(f"reproducing {short(plan.key)}", total=None)

        def hear(event: dict[str, Any]) -> None:
            nonlocal task
            if event.get("event") == "start":
                task = _fresh(bars, task, f"again: {event['stage']}")
            elif event.get("event") in ("step", "pass"):
                bars.update(task, total=event["total"], completed=event["step"])

        return children.call(run_job, plan, run, None, threads, tell=hear)


def _ensure(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
