"""Start jobs and show how they go: plan in this process, train in children, one progress line each."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kd.config import Job, jobs
from kd.errors import InputError, KDError
from kd.pipeline import jobs as children
from kd.pipeline.execute import record_sweep
from kd.pipeline.plan import Plan, plan, status
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


def planned(words: list[str], multirun: bool, config_dir: str | None) -> tuple[list[Plan], list[Job], Run, bool]:
    """The plans of all jobs a command line asks for."""
    found, sweep = jobs(words, multirun, config_dir)
    run = Run(**found[0].config["run"])
    for job in found:
        if Run(**job.config["run"]).store != run.store:
            raise InputError("run.store may not vary within a sweep: its jobs share teachers through the store")
    return [plan(job.config, job.overrides) for job in found], found, run, sweep


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
    sweep = sweep_id(plans) if is_sweep else None
    runs = [Run(**job.config["run"]) for job in configs]
    missing = [p for p in plans if any(status(n, store) != "hit" for n in p.nodes)]
    if missing:
        children.warm()
        with console.status("checking every job") if console.is_terminal else contextlib.nullcontext():
            outcome = children.call(check_jobs, missing, run)
        if outcome["status"] != "done":
            raise _as_error(outcome)
    outcomes: list[dict[str, Any]] = []
    with progress(run.progress) as bars:
        overall = bars.add_task("sweep", total=len(plans)) if is_sweep else None
        for i, (one, how) in enumerate(zip(plans, runs, strict=True)):
            label = " ".join(w for w in one.overrides if not w.startswith("run.")) if is_sweep else ""
            outcomes.append(_one(one, how, store, sweep, bars, label))
            if outcomes[-1]["status"] == "failed":
                console.print(f"[red]failed[/] {escape(label or short(one.key))}: {escape(outcomes[-1]['error'])}")
            if is_sweep:
                # After each job, so that a killed sweep is still found; the last writing is the whole one.
                rest = [{"status": "pending"}] * (len(plans) - i - 1)
                record_sweep(store, str(sweep), words, plans, [*outcomes, *rest])
                bars.advance(overall) if overall is not None else None
    return plans, outcomes, sweep, run


def _one(plan: Plan, run: Run, store: Store, sweep: str | None, bars: Progress, label: str) -> dict[str, Any]:
    if all(status(node, store) == "hit" for node in plan.nodes):
        return {"status": "hit", "ran": [], "exit_code": 0}
    task = bars.add_task(label or "starting", total=None)

    def hear(event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "start":
            bars.update(task, description=f"{event['stage']} {short(event['key'])}", total=None, completed=0)
        elif kind in ("step", "pass"):
            bars.update(task, total=event["total"], completed=event["step"])
        elif kind == "done":
            console.print(
                f"[green]made[/] {event['stage']} {short(event['key'])}" + (f"  {escape(label)}" if label else "")
            )
        elif kind == "say":
            console.print(escape(event["line"]))

    outcome = children.call(run_job, plan, run, sweep, None, tell=hear)
    bars.remove_task(task)
    return {**outcome, "ran": outcome.get("value") or []}


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
    from kd.errors import Inconclusive

    store = Store(store_dir)
    artifact = store.find(prefix)
    plan = lineage(store, artifact)
    for word in words:
        if not word.startswith(("run.", "run/", "++run.", "+run.")):
            raise InputError(f"{word}: only run.* may be given to reproduce; anything else would be another run")
    run = Run(**jobs([f"run.store={store_dir}", "run.wandb=disabled", "run.latency=false", *words])[0][0].config["run"])
    notes = [
        f"code {line}"
        for line in differences(artifact.card["fingerprints"]["code"], code_print(), ("commit", "digest"))
    ]
    recorded = artifact.card["fingerprints"].get("environment", {})
    scratch = tempfile.mkdtemp(prefix="reproduce-", dir=_ensure(store.root / "scratch"))
    again = replace(run, store=scratch)
    children.warm()
    with progress(run.progress) as bars:
        task = bars.add_task(f"reproducing {short(plan.key)}", total=None)

        def hear(event: dict[str, Any]) -> None:
            if event.get("event") == "start":
                bars.update(task, description=f"again: {event['stage']}", total=None, completed=0)
            elif event.get("event") in ("step", "pass"):
                bars.update(task, total=event["total"], completed=event["step"])

        outcome = children.call(run_job, plan, again, None, threads or recorded.get("threads"), tell=hear)
    try:
        if outcome["status"] != "done":
            raise Inconclusive(outcome["error"]) if outcome.get("exit_code") == 2 else _as_error(outcome)
        verdict = judge(store, Store(scratch), plan)
    finally:
        if not keep:
            import shutil

            shutil.rmtree(scratch, ignore_errors=True)
    return verdict, plan, notes


def _ensure(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
