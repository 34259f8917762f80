"""What differs between two runs: config, code, data, environment, result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kd.report.rows import Card

ABSENT = "(absent)"
SECTIONS = ("config", "code", "data", "environment", "result")


class Difference(NamedTuple):
    """One leaf that differs: its dotted path and both values, `ABSENT` where one has none."""

    path: str
    a: Any
    b: Any


def diff(card_a: Card, card_b: Card) -> dict[str, list[Difference]]:
    """The leaves that differ between two cards, by section; a section without a difference is left out.

    >>> diff({"metrics": {"test/accuracy": 0.5}}, {"metrics": {"test/accuracy": 0.6}})
    {'result': [Difference(path='metrics.test/accuracy', a=0.5, b=0.6)]}
    """
    a, b = _sections(card_a), _sections(card_b)
    found = {name: _differences(a[name], b[name]) for name in SECTIONS}
    return {name: leaves for name, leaves in found.items() if leaves}


def _sections(card: Card) -> dict[str, Mapping[str, Any]]:
    document, fingerprints = card.get("document", {}), card.get("fingerprints", {})
    config = {"stage": document.get("stage"), "version": document.get("version"), **document.get("config", {})}
    result = {name: card.get(name) for name in ("weights", "metrics", "cost")}
    return {
        "config": {**config, "inputs": document.get("inputs", {})},
        **{name: fingerprints.get(name, {}) for name in ("code", "data", "environment")},
        "result": result,
    }


def _differences(a: Any, b: Any, path: str = "") -> list[Difference]:
    # A subtree that one side lacks is listed leaf by leaf, not as one lump.
    a, b = ({} if one == ABSENT and isinstance(other, Mapping) and other else one for one, other in ((a, b), (b, a)))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = []
        for name in dict.fromkeys([*a, *b]):
            inner = f"{path}.{name}" if path else str(name)
            found += _differences(a.get(name, ABSENT), b.get(name, ABSENT), inner)
        return found
    # 1 and True are equal in Python, and not the same setting.
    alike = a == b and isinstance(a, bool) == isinstance(b, bool)
    return [] if alike else [Difference(path, a, b)]
