"""Accuracies that papers and their code's pages give for the CIFAR-100 benchmark, beside ours."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from kd.report.rows import ACCURACY, ALONE, DISTILLED, TEACHER, Row, Spread, number

# Between reruns of one published number: mdistiller's users saw 0.4 points, DIST states 0.18 to 0.30.
NOISE = 0.004
# What the numbers were made with; a run of another schedule or of fewer samples is no reproduction of them.
RECIPE = {"config.data.name": "cifar100", "epochs": 240, "samples": "all", "config.fit.batch_size": 64}


@cache
def _known() -> dict[tuple[str | None, str, str], tuple[float, str]]:
    entries = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    found: dict[tuple[str | None, str, str], tuple[float, str]] = {}
    for entry in entries:
        number_ = round(entry["accuracy"] / 100, 6), entry["source"]
        if entry["loss"] == "teacher":
            found[None, entry["teacher"], "teacher"] = number_
        elif entry["loss"] == "alone":
            found[None, entry["student"], "alone"] = number_
        else:
            found[entry["teacher"], entry["student"], entry["loss"]] = number_
    return found


def published(row: Row) -> tuple[float, str] | None:
    """The published accuracy of a row's pair and loss, and where it stands; None where there is none.

    Args:
        row: of `kd.report.rows`, a run or a group over seeds.

    >>> row = {"role": "student distilled", "model": "cifar_resnet8x4", "teacher": "cifar_resnet32x4", "loss": "ce+kd"}
    >>> published(row)
    (0.7333, 'RepDistiller README')
    """
    model = str(row.get("model"))
    keys = {
        TEACHER: (None, model, "teacher"),
        ALONE: (None, model, "alone"),
        DISTILLED: (row.get("teacher"), model, str(row.get("loss"))),
    }
    return _known().get(keys.get(str(row.get("role")), (None, "", "")))


def judged(rows: Iterable[Row]) -> list[Row]:
    """The rows with what was published for them and how ours compares.

    `published` is that accuracy; `verdict` is `within noise`, `above` or `below` (noise: two standard deviations of
    ours, and 0.4 points at least), or `other recipe` where ours was not trained as the published one.

    Args:
        rows: groups over seeds, as `kd.report.rows.over_seeds` gives them.
    """
    return [_judged(row) for row in rows]


def _judged(row: Row) -> Row:
    found, ours = published(row), row.get(ACCURACY)
    if found is None or ours is None:
        return row
    mean, sd = (ours.mean, ours.sd) if isinstance(ours, Spread) else (number(ours), None)
    if mean is None:
        return row
    if any(row.get(name) != value for name, value in RECIPE.items()):
        verdict = "other recipe"
    elif abs(mean - found[0]) <= max(NOISE, 2 * (sd or 0.0)) + 1e-12:
        verdict = "within noise"
    else:
        verdict = "above" if mean > found[0] else "below"
    return {**row, "published": found[0], "verdict": verdict}
