"""Who taught whom, as a picture: an SVG in the colours of its page, from cards alone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd.report.rows import ACCURACY, Card
from kd.report.tables import cell
from kd.roles import labels_of, teachers

WIDE, HIGH, ACROSS, BETWEEN, ARC = 190, 62, 92, 22, 34  # pixels: a box, the gaps beside and below it, a bow's height
NAMES = 24  # letters of a model's name that fit into a box


@dataclass
class _Box:
    """A network, or a stage that has none; where it stands."""

    card: Card
    edges: list[tuple[str, str, bool]]  # (role, key, whether it is heard through stored labels)
    column: int = 0
    row: float = 0.0
    words: list[str] = field(default_factory=list)


def hops(card: Card, known: Mapping[str, Card]) -> int:
    """The edges of the graph that leads to a card; soft labels are no stage of their own here.

    >>> hops({"key": "a", "document": {"inputs": {}}}, {})
    0
    """
    return sum(len(box.edges) for box in _boxes(card, known).values())


def outline(card: Card, known: Mapping[str, Card]) -> str:
    """A text that cards of the same graph, with the same models in it, share."""
    boxes = _boxes(card, known).values()
    return repr([(box.card["stage"], _model(box.card), [role for role, _, _ in box.edges]) for box in boxes])


def picture(card: Card, known: Mapping[str, Card]) -> str:
    """The graph that leads to a card, from left to right.

    Args:
        card: of the last stage.
        known: key to card; what is not there is left out.
    """
    boxes = _boxes(card, known)
    _place(boxes)
    bows = max((_bow(boxes, key, source) for key, box in boxes.items() for _, source, _ in box.edges), default=0)
    top = 10 + bows * ARC
    rows = {box.column: 0 for box in boxes.values()}
    for box in boxes.values():
        rows[box.column] += 1
    tall = max(rows.values())
    height = top + tall * (HIGH + BETWEEN)
    width = (max(rows) + 1) * WIDE + max(rows) * ACROSS + 4
    drawn = [_edge(boxes, key, *edge, top) for key, box in boxes.items() for edge in box.edges]
    drawn += [_node(box, top) for box in boxes.values()]
    said = html.escape(", ".join(f"{b.card['stage']} {_model(b.card)}" for b in boxes.values()))
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{said}" '
        'class="lineage"><defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="var(--dim)"/></marker></defs>' + "".join(drawn) + "</svg>"
    )


def _boxes(card: Card, known: Mapping[str, Card]) -> dict[str, _Box]:
    """All that a card descends from, nearest first."""
    found: dict[str, _Box] = {}
    queue = [card]
    while queue:
        one = queue.pop(0)
        if one["key"] in found:
            continue
        inputs = dict(one["document"].get("inputs", {}))
        heard = teachers(inputs)
        through = {labels_of(role) for role in heard}
        edges = [(role, inputs[role], labels_of(role) in inputs) for role in heard]
        edges += [(role, key, False) for role, key in inputs.items() if role not in {*heard, *through}]
        found[one["key"]] = _Box(one, [edge for edge in edges if edge[1] in known])
        queue += [known[key] for _, key, _ in found[one["key"]].edges]
    return found


def _place(boxes: Mapping[str, _Box]) -> None:
    """A column for each box, right of all that it reads, and a row beside its neighbours."""

    def depth(key: str) -> int:
        return max((depth(source) + 1 for _, source, _ in boxes[key].edges), default=0)

    for key, box in boxes.items():
        box.column = depth(key)
    columns: dict[int, list[_Box]] = {}
    for box in reversed(list(boxes.values())):  # what came first of a stage's inputs stands above
        columns.setdefault(box.column, []).insert(0, box)
    tall = max(map(len, columns.values()))
    for column in columns.values():
        for place, box in enumerate(column):
            box.row = place + (tall - len(column)) / 2


def _bow(boxes: Mapping[str, _Box], key: str, source: str) -> int:
    """How many columns an edge leaps over."""
    return boxes[key].column - boxes[source].column - 1


def _edge(boxes: Mapping[str, _Box], key: str, role: str, source: str, stored: bool, top: int) -> str:
    one, other = boxes[source], boxes[key]
    (x1, y1), (x2, y2) = _corner(one, top), _corner(other, top)
    x1, over = x1 + WIDE, _bow(boxes, key, source)
    if over:  # above the boxes in between
        y1, y2, lift = y1 + 12, y2 + 12, max(y1, y2) + 12 - (min(y1, y2) - over * ARC * 1.3)
        path = f"M{x1} {y1}C{x1 + 60} {y1 - lift},{x2 - 60} {y2 - lift},{x2 - 2} {y2}"
        middle, level = (x1 + x2) / 2, min(y1, y2) - lift * 0.75 - 4
    else:
        y1, y2 = y1 + HIGH / 2, y2 + HIGH / 2
        path = f"M{x1} {y1}C{x1 + ACROSS / 2} {y1},{x2 - ACROSS / 2} {y2},{x2 - 2} {y2}"
        middle, level = (x1 + x2) / 2, (y1 + y2) / 2 - 5
    dashes = ' stroke-dasharray="5 4"' if stored else ""
    # What a student is called where students are compared says nothing; nor does the only teacher.
    word = "" if role == "teacher" or role.startswith("student") else html.escape(role)
    text = f'<text x="{middle}" y="{level}" text-anchor="middle" class="edge">{word}</text>' if word else ""
    return f'<path d="{path}" fill="none" stroke="var(--dim)" stroke-width="1.4" marker-end="url(#tip)"{dashes}/>{text}'


def _node(box: _Box, top: int) -> str:
    x, y = _corner(box, top)
    card = box.card
    measured, cost = card.get("metrics", {}).get(ACCURACY), (card.get("cost") or {}).get("parameters")
    words = [f"{cell(ACCURACY, measured)} %" if measured is not None else "", f"{cost:,} parameters" if cost else ""]
    lines = [(str(card["stage"]), "dim"), (_model(card)[:NAMES], "name"), (", ".join(filter(None, words)), "dim")]
    texts = "".join(
        f'<text x="{x + 11}" y="{y + 18 + 18 * place}" class="{kind}">{html.escape(line)}</text>'
        for place, (line, kind) in enumerate(lines)
    )
    return (
        f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="8" fill="var(--back)" stroke="var(--line)"/>'
        f'<rect x="{x}" y="{y}" width="4" height="{HIGH}" rx="2" fill="{_colour(card)}"/>{texts}'
    )


def _corner(box: _Box, top: int) -> tuple[float, float]:
    return 2 + box.column * (WIDE + ACROSS), top + box.row * (HIGH + BETWEEN)


def _model(card: Card) -> str:
    config: Mapping[str, Any] = card["document"].get("config", {})
    model = config.get("student") or config.get("model") or {}
    return str(model.get("name") or card["document"].get("stage", "")).rpartition(".")[2]


def _colour(card: Card) -> str:
    from kd.report.figures import COLOURS
    from kd.report.rows import ASSISTANT, DISTILLED, TEACHER

    if str(card["document"].get("stage", "")).endswith(".Train"):
        return COLOURS[TEACHER]
    return COLOURS[ASSISTANT if str(card["stage"]).startswith("assistant") else DISTILLED]


def section(cards: Sequence[Card], known: Mapping[str, Card], most: int = 4) -> list[str]:
    """A picture for each graph among the cards that has more than one edge, each once.

    Args:
        cards: those to look at first come first.
        known: key to card.
        most: pictures at most.
    """
    read = {key for card in cards for key in dict(card["document"].get("inputs", {})).values()}
    found: dict[str, str] = {}
    for card in cards:
        if card["key"] not in read and hops(card, known) > 1 and (name := outline(card, known)) not in found:
            found[name] = picture(card, known)
            if len(found) == most:
                break
    return list(found.values())
