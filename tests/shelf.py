"""Stores of made-up cards, for the tests of what only reads; and how a view looks as text."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from kd.pipeline.plan import Node, Plan
from kd.stages.fingerprints import code_print
from kd.store import Artifact, Store
from tests.report.cards import family


def shelve(root: Path, cards: Iterable[dict[str, Any]]) -> Store:
    """A store that holds these cards, each beside one small file."""
    store = Store(root)
    for card in cards:
        source = root / "source"
        source.mkdir(parents=True)
        (source / "model.safetensors").write_bytes(card["key"].encode())
        store.put(card["key"], source, card)
    return store


def of_now(cards: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cards as this code would have made them."""
    made = list(cards)
    for card in made:
        card["fingerprints"]["code"] = code_print()
        card["fingerprints"]["environment"] = {"threads": 2}
    return made


def small_family() -> list[dict[str, Any]]:
    """A teacher, its labels, the student alone, and students at two temperatures; two epochs each."""
    return of_now(family(temperatures=(1, 4), alphas=(0.9,), seeds=(0,), epochs=2))


def plan_of(*artifacts: Artifact | dict[str, Any], overrides: tuple[str, ...] = ()) -> Plan:
    """A plan of these stages, in order."""
    cards = [a.card if isinstance(a, Artifact) else a for a in artifacts]
    nodes = [Node(c["stage"], c["key"], c["document"], dict(c["document"]["inputs"]), {}) for c in cards]
    return Plan(tuple(nodes), "distil", {}, overrides)


def text(thing: Any, width: int = 100) -> str:
    """What a terminal of that width would show, without colours and trailing blanks."""
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(thing)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
