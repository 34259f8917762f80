"""Start jobs and show how they go: plan in this process, train in children, one progress line each."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
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


def planned(words: list[str], multirun: bool, config_dir: str | None) -> tuple[list[Plan], list[Job], Run, bool]:
    """The plans of all jobs a command line asks for."""
    found, sweep = jobs(words, multirun, config_dir)
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
            outcome = children.call(check_jobs, missing, run)
        if outcome["status"] != "done":
            raise _as_error(outcome)
    names = labels(p.overrides for p in plans) if is_sweep else [""]
    outcomes: list[dict[str, Any]] = []
    with progress(run.progress) as bars:
        overall = bars.add_task("sweep", total=len(plans)) if is_sweep else None
        for i, (one, how, name) in enumerate(zip(plans, runs, names, strict=True)):
            outcomes.append(_one(one, how, store, sweep, bars, name))
            if outcomes[-1]["status"] == "failed":
                if not is_sweep:
                    raise _as_error(outcomes[-1])
                say(f"[red]failed[/] {escape(name or short(one.key))}: {escape(outcomes[-1]['error'])}")
            if overall is not None:
                # After each job, so that a killed sweep is still found; the last writing is the whole one.
                rest = [{"status": "pending"}] * (len(plans) - i - 1)
                record_sweep(store, str(sweep), words, plans, [*outcomes, *rest])
                bars.advance(overall)
    return plans, outcomes, sweep, run


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


def _one(plan: Plan, run: Run, store: Store, sweep: str | None, bars: Progress, label: str) -> dict[str, Any]:
    if all(status(node, store) == "hit" for node in plan.nodes):
        return {"status": "hit", "ran": [], "exit_code": 0}
    task = bars.add_task("starting", total=None)
    ran: list[str] = []  # told one by one: a job that fails later has still made these

    def hear(event: dict[str, Any]) -> None:
        nonlocal task
        kind = event.get("event")
        name = label if event.get("key") == plan.key else ""  # a stage before the last is not this job's alone
        if kind == "start":
            task = _fresh(bars, task, f"{event['stage']} {name or short(event['key'])}")
        elif kind in ("step", "pass"):
            bars.update(task, total=event["total"], completed=event["step"])
        elif kind == "done":
            ran.append(event["stage"])
            say(f"[green]made[/] {event['stage']} {short(event['key'])}  {escape(name)}".rstrip())
        elif kind == "say":
            say(escape(event["line"]))

    outcome = children.call(run_job, plan, run, sweep, None, tell=hear)
    bars.remove_task(task)
    return {**outcome, "ran": ran}


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
