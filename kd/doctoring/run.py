"""`kd doctor run`: the same words as `kd run`, and instead of a run one line per check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kd.config import labels
from kd.data.labels import duration_text
from kd.doctoring.examine import Cost, Examined, disk_check, examine
from kd.doctoring.verdicts import FAIL, OK, STATES, Check
from kd.errors import InputError, KDError
from kd.launch import planned
from kd.pipeline import jobs as children
from kd.store import Store, short
from kd.training.settings import Run

LOOKED_AT = 12  # jobs of a sweep that are looked at whole; of the others the time is told


def doctor_run(words: list[str], multirun: bool, config_dir: str | None) -> list[tuple[Check, str]]:
    """The checks of one job, or of a sweep; with each the job that it is about, empty where it is all of them.

    Nothing is stored but what planning keeps too (digests and decoded images of the data).

    Raises:
        InputError: if the words are not right.
        KDError: if a job could not be looked at.
    """
    plans, configs, _, is_sweep = planned(words, multirun, config_dir)
    runs = [Run(**job.config["run"]) for job in configs]
    children.warm()
    chosen = _spread(len(plans))
    outcome = children.call(examine, plans, runs, chosen)
    if outcome["status"] != "done":
        raise (InputError if outcome.get("exit_code") == 2 else KDError)(outcome["error"])
    found: list[Examined] = outcome["value"]
    if not is_sweep:
        return [(check, "") for check in found[0].checks]
    names = [name or short(p.key) for name, p in zip(labels(p.overrides for p in plans), plans, strict=True)]
    merged = merge([found[i].checks for i in chosen], [names[i] for i in chosen])
    return [*merged, *[(check, "") for check in _sweep(found, len(chosen), Store(runs[0].store))]]


def merge(checks: Sequence[Sequence[Check]], names: Sequence[str]) -> list[tuple[Check, str]]:
    """One line a check: where jobs differ, that of the first of the worst, and how many are as bad.

    >>> one, other = Check("ok", "loss", "finite"), Check("FAIL", "loss", "step 1: not finite")
    >>> merge([[one], [other], [other]], ["a", "b", "c"])
    [(Check(state='FAIL', name='loss', said='step 1: not finite (2 of 3 jobs)'), 'b')]
    """
    found = []
    order = dict.fromkeys(check.name for job in checks for check in job)
    for name in order:
        mine = [(check, job) for job, own in zip(names, checks, strict=True) for check in own if check.name == name]
        if len({check for check, _ in mine}) == 1 and len(mine) == len(checks):
            found.append((mine[0][0], ""))
            continue
        state = max((check.state for check, _ in mine), key=STATES.index)
        as_bad = [(check, job) for check, job in mine if check.state == state]
        check, job = as_bad[0]
        several = f" ({len(as_bad)} of {len(checks)} jobs)" if state != OK and len(as_bad) > 1 else ""
        found.append((check._replace(said=check.said + several), job))
    return found


def as_data(found: Sequence[tuple[Check, str]]) -> list[dict[str, Any]]:
    """For a script."""
    return [{"state": c.state, "check": c.name, "said": c.said, **({"job": job} if job else {})} for c, job in found]


def as_lines(found: Sequence[tuple[Check, str]]) -> list[str]:
    """For a reader."""
    return [f"{c.state:4}  {c.name:21} {f'{job}: ' if job else ''}{c.said}" for c, job in found]


def failed(found: Sequence[tuple[Check, str]]) -> bool:
    """Whether a check says FAIL."""
    return any(check.state == FAIL for check, _ in found)


def _spread(count: int) -> list[int]:
    """Numbers of the jobs that are looked at: all, or some from first to last."""
    if count <= LOOKED_AT:
        return list(range(count))
    return sorted({round(i * (count - 1) / (LOOKED_AT - 1)) for i in range(LOOKED_AT)})


def _sweep(found: Sequence[Examined], looked: int, store: Store) -> list[Check]:
    """Time and bytes of all jobs, a stage that several share counted once."""
    costs: dict[str, Cost] = {key: cost for one in found for key, cost in one.costs.items()}
    seconds = sum(cost.seconds for cost in costs.values())
    some = "" if looked == len(found) else f"; {looked} of them were looked at"
    what = f"{len(costs)} stages of {len(found)} jobs, shared ones once"
    said = f"about {duration_text(seconds)} one after the other: {what}"
    time = Check(OK, "sweep time", f"{said}{some}" if costs else "nothing is left to run")
    return [time, disk_check(store, costs)._replace(name="sweep disk")]
