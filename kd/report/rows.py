"""Cards into flat rows, one per scored model; rows into groups, one per setting over its seeds.

A row is a plain dict. The shape of a column's name says what it is: a slash is a metric (`test/accuracy`),
`config.` is a leaf of the hashed config, the rest are the names below and the dials.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, TypeAlias

from kd.roles import teachers
from kd.schedules import weighs
from kd.store import short

Card: TypeAlias = Mapping[str, Any]
Row: TypeAlias = dict[str, Any]

TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student distilled"
ASSISTANT = "assistant"  # a distilled student that was made to teach the next
ACCURACY = "test/accuracy"
CHOICE = "val/accuracy"  # what "best" is chosen by: choosing by the test split would flatter the choice
COST: tuple[str, ...] = ("parameters", "nonzero", "macs", "bytes", "gzip_bytes", "activation_bytes")
COST += ("latency_ms_batch1", "latency_ms_batch64")
# Columns that a second run of the same setting may measure differently; metrics are known by their slash.
MEASURED = ("gain", "drop", "latency_ms_batch1", "latency_ms_batch64", "wall_s")
# Sizes too, where what is left of a network depends on the seed; they are the same over seeds of most others.
SIZES = ("compression", *(name for name in COST if name not in MEASURED))
# What a row is compared with, measured on another run: one teacher for all seeds has no spread.
REFERENCES = ("teacher/accuracy", "alone/accuracy")
# What the stages of a compression leave, each a row of its own.
STEPS = {"Prune": "pruned", "LowRank": "low-rank", "Quantize": "quantized", "FineTune": "recovered"}
STEPS |= {"Export": "exported"}
# Who learns from whom, by the stage and whether a trained teacher comes in.
WAYS = {("Distil", True): "one way", ("Circle", True): "both ways", ("Circle", False): "each other"}
WAYS |= {("MetaDistil", True): "meta", ("Branches", False): "branches"}
HEARS = ("Distil", "Circle", "MetaDistil", "Branches")  # the stages whose student hears another network
ENSEMBLE = "ensemble"
ROLES = (TEACHER, ASSISTANT, ALONE, DISTILLED, ENSEMBLE, *STEPS.values())
# Settings with a column of their own.
_NAMED = ("model", "data", "teacher", "way", "loss", "after", "epochs", "samples")
_ELSEWHERE = ("data", "seed", "objective")  # of a step's config, what stands in columns that all rows have
_OWN = {"config.seed", "config.fit.epochs", "config.fit.samples", "config.model.name", "config.data.name"}


@dataclass(frozen=True)
class Spread:
    """A measured value over seeds: mean, sample standard deviation (None for one seed) and their number.

    >>> Spread.of([0.98, 0.97])
    Spread(mean=0.975, sd=0.007071067811865481, n=2)
    """

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one or more values."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def collect(cards: Iterable[Card], lookup: Mapping[str, Card] | None = None) -> list[Row]:
    """One row for each card that holds a scored model, in the order given; soft labels give none.

    ``lookup`` (key -> card, usually the whole store) is where parents and the student alone are found.

    >>> collect([])
    []
    """
    given = {card["key"]: card for card in cards}
    known = {**(lookup or {}), **given}
    taught_by = {key for card in known.values() for key in _heard(card)}
    alone = _alone_by_student(known)
    rows = [_row(card, known, taught_by, alone) for card in given.values() if _scored(card)]
    if any("step" in row for row in rows):  # a compression reads from its start to its end
        rows.sort(key=lambda row: _depth(known[row["key"]], known))
    return rows


def related(cards: Iterable[Card], lookup: Mapping[str, Card]) -> list[Card]:
    """The cards with all they descend from, and the students trained alone that they compare with."""
    found = {card["key"]: card for card in cards}
    alone = _alone_by_student({**lookup, **found})
    queue = list(found.values())
    while queue:
        card = queue.pop()
        near = [lookup[key] for key in _inputs(card).values() if key in lookup]
        near += alone.get(_student(card), []) if _is(card, *HEARS) else []
        for other in near:
            if other["key"] not in found:
                found[other["key"]] = other
                queue.append(other)
    return list(found.values())


def over_seeds(rows: Iterable[Row]) -> list[Row]:
    """Rows that are equal in everything but the seed, joined: measured columns become a `Spread`.

    So do sizes where they differ; other columns keep their value where it is the same, and become a tuple of the
    distinct values where it is not.

    >>> [group] = over_seeds([{"group": "a", "seed": 0, "test/accuracy": 0.5}, {"group": "a", "seed": 1}])
    >>> group["seed"], group["n"], group["test/accuracy"]
    ((0, 1), 2, Spread(mean=0.5, sd=None, n=1))
    """
    gathered: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:  # one seed's model may be the teacher of a student that is its equal
        gathered.setdefault((row["group"], row.get("role")), []).append(row)
    return [_join(members) for members in gathered.values()]


def best(rows: Iterable[Row], role: str = DISTILLED) -> Row | None:
    """The row or group of that role with the highest validation accuracy; test accuracy where none was measured."""
    candidates = [row for row in rows if row.get("role") == role and number(row.get(ACCURACY)) is not None]
    measured = [row for row in candidates if number(row.get(CHOICE)) is not None]
    column = CHOICE if measured else ACCURACY
    return max(measured or candidates, key=lambda row: number(row[column]) or 0.0, default=None)


def number(value: Any) -> float | None:
    """The number of a cell: a spread's mean, a plain number, or None.

    >>> number(Spread(0.5, None, 1)), number(3), number("x"), number(True)
    (0.5, 3, None, None)
    """
    if isinstance(value, Spread):
        return value.mean
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def played(row: Row) -> bool:
    """Whether a network computes with integers as torch plays them: its time says nothing of its file's.

    >>> played({"role": "quantized"}), played({"role": "recovered", "recovers": "quantized"})
    (True, True)
    >>> played({"role": "exported"})
    False
    """
    return STEPS["Quantize"] in (row.get("role"), row.get("recovers"))


def is_measured(column: str) -> bool:
    """Whether a column is a result, not a setting.

    >>> is_measured("test/accuracy"), is_measured("temperature")
    (True, False)
    """
    return "/" in column or column in MEASURED


def same(value: Any) -> str:
    """A text by which two cells are compared, lists by their content.

    >>> same(4) == same(4.0), same(1) == same(True), same([8, 16]) == same((8, 16))
    (True, False, True)
    """
    amount = number(value)
    return _text(value) if amount is None else repr(float(amount))


def _text(data: Any) -> str:
    """Plain data as one text; a card's own check (`kd.store.plain`) would let one odd card spoil a whole report."""
    return json.dumps(data, sort_keys=True, default=str)


def varying_settings(rows: Sequence[Row], roles: Iterable[str] = ROLES) -> list[str]:
    """The settings in which rows of the same role differ, less those that follow from another column.

    A weight that equals a dial (or one minus it) follows from that dial; a model's width follows from its name.
    """
    found: dict[str, None] = {}
    for role in roles:
        members = [row for row in rows if row.get("role") == role]
        dials = [c for c in dial_names(members) if c != "seed"]
        for column in dict.fromkeys(column for row in members for column in row):
            leaf = column.startswith("config.")  # there, null is a value; elsewhere it means "has none"
            if column in _OWN or not (leaf or column in (*_NAMED, *dials)):
                continue
            values = {same(row[column]) for row in members if column in row and (leaf or row[column] is not None)}
            if column == "after" and not orders(members):  # it follows from the step
                continue
            if len(values) > 1 and not (leaf and _follows(column, members, dials)):
                found[column] = None
    return sorted(found, key=lambda column: column.startswith("config."))


def orders(rows: Iterable[Row]) -> bool:
    """Whether one step of a compression stands behind other steps in one row than in another.

    >>> orders([{"step": "quantize", "after": "student"}, {"step": "quantize", "after": "student > prune"}])
    True
    """
    found: dict[tuple[Any, Any], set[Any]] = {}
    for row in rows:
        if row.get("after") is not None:
            found.setdefault((row.get("role"), row.get("step")), set()).add(row["after"])
    return any(len(ways) > 1 for ways in found.values())


def dial_names(rows: Iterable[Row]) -> list[str]:
    """The dials of the rows, temperature and alpha first."""
    names = dict.fromkeys(name for row in rows for name in row.get("dials", ()))
    return sorted(names, key=lambda name: {"temperature": 0, "alpha": 1, "seed": 3}.get(name, 2))


def _inputs(card: Card) -> dict[str, str]:
    return dict(card["document"].get("inputs", {}))


def _is(card: Card, *stages: str) -> bool:
    return str(card["document"]["stage"]).rpartition(".")[2] in stages


def _scored(card: Card) -> bool:
    return ACCURACY in card.get("metrics", {})


def _model(card: Card) -> Mapping[str, Any]:
    config = card["document"]["config"]
    return config.get("student") or config.get("model") or {}


def _depth(card: Card, known: Mapping[str, Card]) -> int:
    """How many stages stand before it, one behind the other."""
    return max((1 + _depth(known[key], known) for key in _inputs(card).values() if key in known), default=0)


def _origin(card: Card, known: Mapping[str, Card]) -> Card:
    """The card of the network that a step of a compression began with; of any other card, itself."""
    while (source := _inputs(card).get("model")) in known and source is not None:
        card = known[source]
    return card


def _steps(card: Card, known: Mapping[str, Card]) -> Row:
    """What a step of a compression and those before it were told, under their names, as they are set: prune.amount."""
    found: Row = {}
    own = {f"config.{card['stage']}.fit.{name}" for name in ("epochs", "samples")}  # columns by themselves
    while (source := _inputs(card).get("model")) is not None:
        config = {name: value for name, value in card["document"]["config"].items() if name not in _ELSEWHERE}
        found |= dict(_leaves(config, f"config.{card['stage']}"))
        if source not in known:
            break
        card = known[source]
    return {name: value for name, value in found.items() if name not in own}


def _after(card: Card, known: Mapping[str, Card]) -> str:
    """The stages that a step stands behind, first to last."""
    before: list[str] = []
    while (source := _inputs(card).get("model")) in known and source is not None:
        card = known[source]
        before.insert(0, str(card["stage"]))
    return " > ".join(before)


def _recovers(card: Card, known: Mapping[str, Card]) -> str | None:
    """Which step a recovery is of, as its role; None of what is no recovery."""
    if not _is(card, "FineTune"):
        return None
    while _is(card, "FineTune") and (source := _inputs(card).get("model")) in known and source is not None:
        card = known[source]
    return STEPS.get(str(card["document"]["stage"]).rpartition(".")[2]) if not _is(card, "FineTune") else None


def _beside(card: Card) -> Row:
    """What the teacher's file is beside a file: bytes from the same exporter, milliseconds in the same rounds."""
    found: Row = {"teacher/bytes": (card.get("export") or {}).get("teacher_bytes")}
    for batch, timed in (card.get("latency") or {}).items():
        found[f"teacher/latency_ms_{batch}"] = (timed.get("teacher_runtime") or {}).get("median")
    return {name: value for name, value in found.items() if value is not None}


def _student(card: Card) -> str:
    """What a student alone and a distilled one must share to be compared: model, data and schedule."""
    config = card["document"]["config"]
    return _text([_model(card), config.get("data"), config.get("fit")])


def _alone_by_student(known: Mapping[str, Card]) -> dict[str, list[Card]]:
    found: dict[str, list[Card]] = {}
    for card in known.values():
        if _is(card, "Train") and _scored(card):
            found.setdefault(_student(card), []).append(card)
    return found


def _heard(card: Card) -> list[str]:
    """The keys of its teachers."""
    inputs = _inputs(card)
    return [inputs[role] for role in teachers(inputs)]


def _teachers(card: Card, known: Mapping[str, Card]) -> list[Card]:
    """The nearest ancestors that came in as teachers: of the card itself, else of what it was made from."""
    if heard := _heard(card):
        return [known[key] for key in heard if key in known]
    parents = (known[key] for key in _inputs(card).values() if key in known)
    return next((found for parent in parents if (found := _teachers(parent, known))), [])


def _members(card: Card, known: Mapping[str, Card]) -> str | None:
    """The networks of an ensemble by name."""
    names = [str(_model(known[key]).get("name")) for key in _inputs(card).values() if key in known]
    return " + ".join(names) if _is(card, "Ensemble") and names else None


def _group(card: Card, known: Mapping[str, Card]) -> str:
    """A name for the card's setting: its document less the seed, with its parents' settings for their keys."""
    document = card["document"]
    config = {name: value for name, value in document["config"].items() if name != "seed"}
    parents = {name: _group(known[key], known) if key in known else key for name, key in _inputs(card).items()}
    return hashlib.sha256(_text([document["stage"], document["version"], config, parents]).encode()).hexdigest()


def _row(card: Card, known: Mapping[str, Card], taught_by: set[str], alone: Mapping[str, list[Card]]) -> Row:
    config, metrics = card["document"]["config"], card["metrics"]
    model, fit, heard = _model(_origin(card, known)), config.get("fit") or {}, _teachers(card, known)
    shown = short(card["key"])
    # The dials stand in every command; a model that had no teacher did not hear them.
    deaf = ("temperature", "alpha") if _is(card, "Train") else ()
    dials = {name: value for name, value in (card.get("dials") or {}).items() if name not in deaf}
    named = model.get("name") or _members(card, known)
    row: Row = {"role": _role(card, taught_by), "model": named, "data": config.get("data", {}).get("name")}
    if _is(card, *HEARS):
        names = [str(_model(teacher).get("name")) for teacher in heard]
        way = WAYS.get((str(card["document"]["stage"]).rpartition(".")[2], bool(names)))
        row |= {"teacher": " + ".join(names) or None, "way": way, "loss": _loss(config.get("objective", {}))}
    row |= {name: value for name, value in dials.items() if name not in ("seed", *row)}
    row |= {"epochs": fit.get("epochs"), "samples": fit.get("samples") or "all", "seed": config.get("seed")}
    row |= {name: value for name, value in metrics.items() if "/" in name and isinstance(value, (int, float))}
    if (source := _inputs(card).get("model")) is not None:
        given = known.get(source, {}).get("metrics", {})
        row |= {"step": card["stage"], "after": _after(card, known), "before/accuracy": given.get(ACCURACY)}
        row |= {"recovers": _recovers(card, known), "from": _group(known[source], known) if source in known else None}
        row |= _beside(card)
        row["marks"] = ", ".join(card.get("marks", ())) or None
    scores = [teacher["metrics"][ACCURACY] for teacher in heard if ACCURACY in teacher["metrics"]]
    row["teacher/accuracy"] = max(scores, default=None)  # of several, the best
    row["alone/accuracy"] = _alone_accuracy(card, alone)
    row["gain"] = None if row["alone/accuracy"] is None else row[ACCURACY] - row["alone/accuracy"]
    cost = card.get("cost") or {}
    row |= {name: cost.get(name) for name in COST}
    sizes = [size for teacher in heard if (size := (teacher.get("cost") or {}).get("parameters"))]
    large, own = max(sizes, default=None), cost.get("parameters")
    row["compression"] = large / own if large and own else None
    row["wall_s"] = card.get("time", {}).get("wall_s")
    row |= {"hash": shown, "command": f"kd reproduce {shown}", "key": card["key"], "stage": card["stage"]}
    row |= {"started": card.get("time", {}).get("started"), "sweep": card.get("run", {}).get("sweep")}
    row |= {"group": _group(card, known), "dials": tuple(dials)}
    # A student's config is named as a teacher's is, so that both stand in one column.
    leaves = {("model" if name == "student" else name): value for name, value in config.items()}
    if source is not None:  # the rest stands under the step's name
        leaves = {name: value for name, value in leaves.items() if name in _ELSEWHERE}
    return row | dict(_leaves(leaves, "config")) | _steps(card, known)


def _loss(terms: Mapping[str, Any]) -> str | None:
    """The terms that were heard, by name."""
    return "+".join(sorted(name for name, term in terms.items() if weighs(term.get("weight", 1)))) or None


def _role(card: Card, taught_by: set[str]) -> str:
    if _is(card, "Train"):
        return TEACHER if card["key"] in taught_by else ALONE
    if card["key"] in taught_by and str(card["stage"]).startswith("assistant"):
        return ASSISTANT
    if _is(card, *HEARS):
        return DISTILLED
    name = str(card["document"]["stage"]).rpartition(".")[2]
    return STEPS.get(name, name.lower())


def _alone_accuracy(card: Card, alone: Mapping[str, list[Card]]) -> float | None:
    """Accuracy of the same student trained alone: with the same seed, else the mean over the seeds there are."""
    if not _is(card, *HEARS):
        return None
    others = alone.get(_student(card), [])
    seed = card["document"]["config"].get("seed")
    paired = [other for other in others if other["document"]["config"].get("seed") == seed]
    values = [float(other["metrics"][ACCURACY]) for other in paired or others]
    return fmean(values) if values else None


def _leaves(node: Mapping[str, Any], path: str) -> Iterable[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", value


def _join(members: list[Row]) -> Row:
    group: Row = {}
    for column in dict.fromkeys(column for row in members for column in row):
        values = [row[column] for row in members if row.get(column) is not None]
        distinct = [] if is_measured(column) and column not in REFERENCES else _distinct(values)
        if len(distinct) == 1:
            group[column] = distinct[0]
        elif is_measured(column) or column in SIZES:
            group[column] = Spread.of(values) if values else None
        else:
            group[column] = tuple(distinct) or None
    return group | {"n": len(members)}


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({same(value): value for value in values}.values())


def _follows(column: str, rows: Sequence[Row], dials: Sequence[str]) -> bool:
    owner = column.split(".")[1]
    owner = {"objective": "loss"}.get(owner, owner)
    if owner in ("model", "data", "loss"):
        pairs = {(same(row.get(owner)), same(row[column])) for row in rows if column in row}
        if owner == "loss" and len(pairs) != len({name for name, _ in pairs}):
            return any(all(_is_dial(row.get(column), row.get(dial)) for row in rows) for dial in dials)
        return len(pairs) == len({name for name, _ in pairs})
    return any(all(_is_dial(row.get(column), row.get(dial)) for row in rows) for dial in dials)


def _is_dial(value: Any, dial: Any) -> bool:
    one, other = number(value), number(dial)
    return one is not None and other is not None and min(abs(one - other), abs(one + other - 1)) < 1e-9
