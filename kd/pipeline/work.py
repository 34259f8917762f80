"""What a child process is asked to do; each function's last argument tells the parent how it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kd.pipeline.execute import check, execute
from kd.pipeline.plan import Plan
from kd.store import Store
from kd.training.settings import Run

Tell = Callable[[dict[str, Any]], None]


def run_job(plan: Plan, run: Run, sweep: str | None, threads: int | None, tell: Tell) -> list[str]:
    """Execute one plan; returns the stages that were run."""
    if threads:
        import torch

        torch.set_num_threads(threads)
    return execute(plan, Store(run.store), run, tell, sweep)


def check_jobs(plans: list[Plan], run: Run, tell: Tell) -> None:
    """Rehearse all plans."""
    check(plans, Store(run.store), run)
