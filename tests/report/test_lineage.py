"""Who taught whom, as a picture."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from kd.report.lineage import hops, outline, picture, section
from kd.report.rows import ASSISTANT, DISTILLED, TEACHER, collect
from tests.report.cards import STUDENT, card, lookup
from tests.report.cards import TEACHER as LARGE

DIALS = {"temperature": 4.0, "alpha": 0.9}


def chain() -> list[dict[str, Any]]:
    """A teacher, two assistants and a student that hears all three of them."""
    teacher = card("Train", LARGE, 0.99)
    labels = card("SoftLabels", LARGE, 0.0, inputs={"teacher": teacher["key"]})
    inputs = {"teacher": teacher["key"], "labels": labels["key"]}
    first = card("Distil", STUDENT, 0.98, inputs=inputs, dials=DIALS, lr=0.1)
    second = card("Distil", STUDENT, 0.97, inputs={"teacher1": teacher["key"], "teacher2": first["key"]}, dials=DIALS)
    first["stage"], second["stage"] = "assistant1", "assistant2"
    three = {f"teacher{n}": one["key"] for n, one in enumerate((teacher, first, second), 1)}
    student = card("Distil", STUDENT, 0.96, inputs=three, dials=DIALS, lr=0.3)
    return [teacher, labels, first, second, student]


def test_each_network_is_a_box_and_each_edge_a_path() -> None:
    cards = chain()
    svg = picture(cards[-1], lookup(cards))
    root = ElementTree.fromstring(svg)
    texts = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert [texts.count(name) for name in ("teacher", "assistant1", "assistant2", "student")] == [1, 1, 1, 1]
    paths = [node for node in root.iter() if node.tag.endswith("path") and node.get("marker-end")]
    assert len(paths) == 6 == hops(cards[-1], lookup(cards))
    assert sum(node.get("stroke-dasharray") is not None for node in paths) == 1  # the one through stored labels
    assert {"teacher1", "teacher2", "teacher3"} <= set(texts) and "98.00 %, 6,058 parameters" in texts


def test_boxes_stand_right_of_what_they_hear_and_inside_the_picture() -> None:
    cards = chain()
    root = ElementTree.fromstring(picture(cards[-1], lookup(cards)))
    boxes = [node for node in root.iter() if node.tag.endswith("rect") and node.get("rx") == "8"]
    places = sorted(float(node.get("x", 0)) for node in boxes)
    assert places == sorted(set(places)) and len(places) == 4
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for node in boxes:
        assert float(node.get("x", 0)) + float(node.get("width", 0)) <= width
        assert float(node.get("y", 0)) + float(node.get("height", 0)) <= height


def test_each_graph_is_drawn_once_and_a_single_hop_not_at_all() -> None:
    cards = chain()
    again = card("Distil", STUDENT, 0.95, inputs=cards[-1]["document"]["inputs"], dials=DIALS, lr=0.5)
    plain = card("Distil", STUDENT, 0.95, inputs=cards[2]["document"]["inputs"], dials=DIALS, lr=0.7)
    known = lookup([*cards, again, plain])
    assert outline(cards[-1], known) == outline(again, known) != outline(plain, known)
    assert len(section([*cards, again, plain], known)) == 1
    assert section([plain, *cards[:2]], known) == []


def test_a_name_is_text_and_nothing_else() -> None:
    cards = chain()
    cards[2]["document"]["config"]["student"] = {"name": "<script>alert(1)</script>"}
    assert "<script" not in picture(cards[-1], lookup(cards))


def test_rows_know_assistants_and_several_teachers() -> None:
    cards = chain()
    rows = {row["key"]: row for row in collect(cards)}
    teacher, _, first, second, student = (made["key"] for made in cards)
    assert [rows[key]["role"] for key in (teacher, first, second, student)] == [
        TEACHER,
        ASSISTANT,
        ASSISTANT,
        DISTILLED,
    ]
    assert rows[student]["teacher"] == "seed_cnn + seed_cnn_small + seed_cnn_small"
    assert rows[student]["teacher/accuracy"] == 0.99 and rows[student]["compression"] == 93322 / 6058
