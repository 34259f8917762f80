"""What a child process is asked to do; each function's last argument tells the parent how it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kd.pipeline.execute import check, execute
from kd.pipeline.plan import Plan
from kd.store import Store
from kd.training.pruning import Pruned, Trial
from kd.training.settings import Run, require

Tell = Callable[[dict[str, Any]], None]


def run_job(plan: Plan, run: Run, sweep: str | None, threads: int | None, tell: Tell) -> list[str]:
    """Execute one plan; returns the stages that were run.

    Raises:
        InputError: if ``threads`` is given and is no number of threads.
        KDError: if a stage fails.
    """
    if threads is not None:
        import torch

        require(type(threads) is int and threads > 0, "threads", threads, "a whole number, 1 or more")
        torch.set_num_threads(threads)
    return execute(plan, Store(run.store), run, tell, sweep)


def run_trial(plan: Plan, run: Run, sweep: str | None, trial: Trial | None, tell: Tell) -> str | None:
    """Execute one plan for a trial; returns why its training was given up, or None where it was not.

    Raises:
        KDError: if a stage fails.
    """
    try:
        execute(plan, Store(run.store), run, tell, sweep, trial)
    except Pruned as pruned:
        return str(pruned)
    return None


def check_jobs(plans: list[Plan], run: Run, tell: Tell) -> None:
    """Rehearse all plans."""
    check(plans, Store(run.store), run)
