"""Which stored model to ship: the most accurate within limits of bytes, products, milliseconds and lost accuracy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isinf
from typing import Any

from kd.errors import InputError
from kd.report.rows import (
    ACCURACY,
    ALONE,
    CHOICE,
    COST,
    DISTILLED,
    TEACHER,
    Card,
    Row,
    number,
    over_seeds,
    played,
)
from kd.report.tables import cell

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
COLUMNS = {"--max-bytes": "bytes", "--max-macs": "macs", "--max-ms": "latency_ms_batch1", "--max-drop": "drop"}
_NOUNS = {"bytes": "bytes", "macs": "MACs", "latency_ms_batch1": "ms", "drop": "points lost"}
# Not what is chosen by; the page has them.
_ASIDE = {"teacher/accuracy", "before/accuracy", "alone/accuracy", "gain", "marks", "compression", "epochs", "samples"}
_ASIDE |= {name for name in COST if name not in COLUMNS.values()}
_SIZE = re.compile(r"(\d+\.?\d*|\.\d+)\s*(x|(?:[kmg]i?)?b?)", re.IGNORECASE)


@dataclass(frozen=True)
class Limit:
    """The most that a model may have of something.

    Args:
        option: as it is typed, a key of `COLUMNS`.
        text: what was typed behind it.
        amount: as the column counts, or a share of the teacher's.
        share: whether it is one.
    """

    option: str
    text: str
    amount: float
    share: bool = False

    @property
    def column(self) -> str:
        """The row's column that it is about."""
        return COLUMNS[self.option]


def limit(option: str, text: str) -> Limit:
    """A limit as it is typed: 200k, 1.5M, 512Ki, 200000, or 0.1x of the teacher's; points of accuracy for --max-drop.

    Raises:
        InputError: if it is none of these.

    >>> limit("--max-bytes", "1.5M").amount, limit("--max-bytes", "64Ki").amount, limit("--max-macs", "0.1x").share
    (1500000.0, 65536.0, True)
    >>> limit("--max-drop", "0.5").amount
    0.005
    """
    if option == "--max-drop":
        try:
            return Limit(option, text, float(text) / 100)
        except ValueError:
            raise InputError(f"--max-drop {text!r} is no number of points, e.g. 0.5") from None
    found = _SIZE.fullmatch(text.strip())
    timed = option == "--max-ms"
    unit = found[2].lower() if found else ""
    if found is None or (timed and unit not in ("", "x")):
        examples = "0.5" if timed else "200k, 1.5M, 200000"
        raise InputError(f"{option} {text!r}: give {examples}, or 0.1x of the teacher's")
    return Limit(option, text, float(found[1]) * UNITS.get(unit.removesuffix("b"), 1), unit == "x")


@dataclass(frozen=True)
class Weighed:
    """Configurations beside limits.

    Args:
        by: the column that the most accurate is chosen by.
        fitting: those within all limits, the most accurate first.
        others: the rest, the most accurate first; `why` says what they miss.
    """

    by: str
    fitting: list[Row]
    others: list[Row]


def weigh(rows: Sequence[Row], known: Mapping[str, Card], limits: Sequence[Limit]) -> Weighed:
    """Which configurations are within the limits; each is the mean over its seeds, and its hash that of the median one.

    A row gets `drop` (accuracy beside its teacher's, by `Weighed.by`), `why` and `miss`: by how many times what is
    allowed it is over, summed (of `drop`, by how many points where less than one is allowed). The seed that would be
    shipped has to be within the limits of cost as well.

    Args:
        rows: of `kd.report.rows.collect`, one a run.
        known: key -> card of all they descend from.
        limits: none twice.

    Raises:
        InputError: if the rows are of several data sets, whose accuracies do not compare.
    """
    names = list(dict.fromkeys(str(row["data"]) for row in rows))
    if len(names) > 1:
        raise InputError(f"these models are of {len(names)} data sets ({', '.join(names)}): name runs of one of them")
    by = CHOICE if all(number(row.get(CHOICE)) is not None for row in rows) else ACCURACY
    teachers = _teachers(rows, known, by)
    seeds: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        seeds.setdefault((row["group"], row["role"]), []).append(_beside(row, teachers.get(row["key"]), by))
    groups = [_judged(members, teachers, limits, by) for members in seeds.values()]
    groups.sort(key=lambda group: (-_mean(group, by), _mean(group, "bytes")))
    return Weighed(by, [g for g in groups if g["miss"] == 0], [g for g in groups if g["miss"] > 0])


def closest(weighed: Weighed, limits: Sequence[Limit]) -> str:
    """One line for when nothing fits: what misses least, and by how much."""
    near = min(weighed.others, key=lambda row: row["miss"], default=None)
    asked = " ".join(f"{one.option} {one.text}" for one in limits)
    if near is None or isinf(near["miss"]):
        return f"no model is within {asked}" + (f": {near['why']}" if near else "")
    step = f" ({near['step']})" if near.get("step") else ""
    return f"no model is within {asked}; the closest is {near['role']}{step} {near['hash']}: {near['why']}"


def _mean(group: Row, column: str) -> float:
    value = number(group.get(column))
    return inf if value is None else value


def _teachers(rows: Sequence[Row], known: Mapping[str, Card], by: str) -> dict[str, Row]:
    """What each row is compared with: the best teacher it descends from, else what it was compressed from.

    Else, as for a network that was trained alone, it is the best of all teachers. A teacher is compared with itself.
    """
    scored = {row["key"]: row for row in rows}
    every = [row for row in rows if row["role"] == TEACHER]
    best = max(every, key=lambda row: _mean(row, by), default=None)
    found = {}
    for row in rows:
        before = [scored[key] for key in _ancestors(row["key"], known) if key in scored]
        above = [one for one in before if one["role"] == TEACHER]
        start = [one for one in before if one["role"] in (ALONE, DISTILLED)] if "step" in row else []
        chosen = row if row["role"] == TEACHER else max(above or start, key=lambda one: _mean(one, by), default=best)
        if chosen is not None:
            found[row["key"]] = chosen
    return found


def _ancestors(key: str, known: Mapping[str, Card]) -> list[str]:
    found: dict[str, None] = {}
    queue = [key]
    while queue:
        card = known.get(queue.pop())
        fresh = [one for one in (card["document"].get("inputs", {}).values() if card else ()) if one not in found]
        found |= dict.fromkeys(fresh)
        queue += fresh
    return list(found)


def _beside(row: Row, teacher: Row | None, by: str) -> Row:
    drop = None if teacher is None else teacher[by] - row[by]
    return {**row, "drop": drop}


def _judged(members: Sequence[Row], teachers: Mapping[str, Row], limits: Sequence[Limit], by: str) -> Row:
    [group] = over_seeds(members)
    ordered = sorted(members, key=lambda row: row[by])
    shipped = ordered[(len(ordered) - 1) // 2]  # of an even number, the lower of the two in the middle
    reasons, miss = [], 0.0
    for one in limits:
        if one.column.startswith("latency") and played(group):
            reasons.append("torch only plays its integers: kd export times its file")
            miss = inf
            continue
        value = number(group.get(one.column))
        most = _most(one, members, teachers)
        if value is None or most is None:
            of = f"its teacher's {_NOUNS[one.column]} are" if value is not None else f"its {_NOUNS[one.column]} are"
            reasons.append(f"{'no teacher to compare with' if one.column == 'drop' else f'{of} not known'}")
            miss = inf
            continue
        own = number(shipped.get(one.column))
        median = one.column != "drop" and own is not None and value <= most < own
        value = own if median and own is not None else value
        if value - most > 1e-9:
            said = f"{_amount(one.column, value)} {_NOUNS[one.column]}" + (" of its median seed" if median else "")
            reasons.append(f"{said}: {_amount(one.column, value - most)} over")
            allowed = max(most, 0.01) if one.column == "drop" else most
            miss += (value - most) / allowed if allowed else inf
    return {**group, "hash": shipped["hash"], "key": shipped["key"], "miss": miss, "why": "; ".join(reasons) or None}


def _most(one: Limit, members: Sequence[Row], teachers: Mapping[str, Row]) -> float | None:
    """A limit as an amount; of a share, the mean over the teachers of the seeds."""
    if not one.share:
        return one.amount
    amounts = [_theirs(one.column, row, teachers.get(row["key"])) for row in members]
    if any(amount is None for amount in amounts):
        return None
    return one.amount * sum(amount or 0.0 for amount in amounts) / len(amounts)


def _theirs(column: str, row: Row, teacher: Row | None) -> float | None:
    """What the teacher has of something: a file is compared with what the same exporter made of the teacher."""
    same = number(row.get(f"teacher/{column}"))
    return same if same is not None else number(teacher.get(column)) if teacher else None


def _amount(column: str, value: float) -> str:
    return f"{100 * value:.2f}" if column == "drop" else cell(column, value)


def told(weighed: Weighed) -> list[Row]:
    """The rows of a table: the choice, those that fit too, those that do not, each with why."""
    first = weighed.fitting[0] if weighed.fitting else None
    rows = []
    for row in [*weighed.fitting, *weighed.others]:
        why = row["why"]
        if row is first:
            why = "chosen"
        elif why is None and first is not None:
            why = f"fits; {100 * (_mean(first, weighed.by) - _mean(row, weighed.by)):.2f} points less"
        rows.append({name: value for name, value in row.items() if name not in _ASIDE} | {"why": why})
    return rows
