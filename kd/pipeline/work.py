"""What a child process is asked to do; each function's last argument tells the parent how it goes."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from kd.pipeline.execute import check, execute
from kd.pipeline.plan import Node, Plan
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
        execute(plan, Store(run.store), run, tell, sweep, trial=trial)
    except Pruned as pruned:
        return str(pruned)
    return None


def branches(plan: Plan) -> list[Plan]:
    """The trainings that only the last stage brings together, each with all it needs; none where there is but one.

    They may take turns at the same batches, as jobs do.
    """
    last = plan.nodes[-1]
    ends = [node for node in plan.nodes if node.key in last.inputs.values() and node.config.get("fit") is not None]
    found = [dataclasses.replace(plan, nodes=ancestry(plan, node)) for node in ends]
    # One that another reads is no branch beside it.
    apart = [one for one in found if not any(one.key in {n.key for n in other.nodes[:-1]} for other in found)]
    return apart if len(apart) > 1 and last.config.get("fit") is None else []


def shared(plan: Plan) -> list[Plan]:
    """What several branches of a plan descend from, as one plan; none where there are no branches."""
    keys = [node.key for branch in branches(plan) for node in branch.nodes]
    nodes = tuple(node for node in plan.nodes if keys.count(node.key) > 1)
    return [dataclasses.replace(plan, nodes=nodes)] if nodes else []


def ancestry(plan: Plan, node: Node) -> tuple[Node, ...]:
    """A stage of a plan and all it descends from, in order."""
    wanted = {node.key}
    for one in reversed(plan.nodes):
        if one.key in wanted:
            wanted |= set(one.inputs.values())
    return tuple(one for one in plan.nodes if one.key in wanted)


def run_packed(packs: Sequence[Sequence[tuple[int, Plan, Run]]], sweep: str | None, tell: Tell) -> None:
    """Execute plans in one process, pack after pack; in a pack the jobs take turns at their batches.

    ``tell`` hears of each job's events under its number (``job``), and of its end (``ended``, with its ``outcome``).
    """
    from kd.pipeline.jobs import outcome_of
    from kd.stages.base import Company
    from kd.training.trainer import quiet
    from kd.training.turns import Turns

    company = Company(Turns())
    stores: dict[str, Store] = {}  # one for all: what it has checked need not be read again for each job
    # A job would swallow the interrupt that means all of them.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    def job(number: int, plan: Plan, run: Run) -> Callable[[], dict[str, Any]]:
        def told(event: dict[str, Any]) -> None:
            tell({**event, "job": number})

        def work(_: Tell) -> list[str]:
            store = stores.setdefault(run.store, Store(run.store))
            return execute(plan, store, run, told, sweep, company)

        return lambda: outcome_of(work)

    with quiet():  # once around all: each training puts back what it found, in any order
        for pack in packs:
            numbers = [number for number, _, _ in pack]
            # What they share comes first, or all but one would wait for its maker to the very end. What fails here
            # fails again, and is told, with the job itself.
            for before in (shared, branches):
                if apart := [job(number, part, run) for number, plan, run in pack for part in before(plan)]:
                    company.turns.run(apart, lambda place, outcome: None)

            def ended(place: int, outcome: dict[str, Any], numbers: list[int] = numbers) -> None:
                tell({"event": "ended", "job": numbers[place], "outcome": outcome})

            company.turns.run([job(*entry) for entry in pack], ended)
            for key in [key for key in company.kept if key[0] != "data"]:
                del company.kept[key]


def check_jobs(plans: list[Plan], run: Run, tell: Tell) -> None:
    """Rehearse all plans; what their terms are bound to is told."""
    check(plans, Store(run.store), run, tell)
