"""Accuracy against cost, step by step, and the front of what is not beaten."""

from __future__ import annotations

from typing import Any

import pytest

from kd.report.costs import FILE, FRONT, accuracy_by_cost, front, panels, size_accuracy
from kd.report.rows import ACCURACY, ALONE, DISTILLED, TEACHER, collect, number, over_seeds
from tests.report.cards import card, compression, family


def groups_of(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return over_seeds(collect(cards))


def drawn(figure: Any, place: int = 1) -> dict[str, Any]:
    """The named traces of a panel."""
    axis = "x" if place == 1 else f"x{place}"
    return {trace.name: trace for trace in figure.data if trace.xaxis in (axis, None) and trace.name}


def test_size_against_accuracy_tells_the_roles_apart() -> None:
    made = groups_of(family((1, 4), (0.9,), (0, 1)))
    for size, value in (("parameters", 93322), ("bytes", 375000)):
        figure = size_accuracy(made, size)
        found = drawn(figure)
        assert list(found) == [TEACHER, ALONE, DISTILLED, FRONT]
        assert len({found[role].marker.symbol for role in (TEACHER, ALONE, DISTILLED)}) == 3
        assert figure.layout.xaxis.type == "log"
        assert list(found[TEACHER].x) == [value] and list(found[TEACHER].y) == pytest.approx([99.1])
        assert len(found[DISTILLED].x) == 2
        assert found[TEACHER].error_y.array == (None,)  # one seed has no deviation
        assert found[ALONE].error_y.array[0] == pytest.approx(100 * 0.002 / 2**0.5)


def test_each_step_has_a_colour_and_a_marker_and_its_recovery_the_same_filled() -> None:
    made = groups_of(compression())
    figure = accuracy_by_cost(made)
    found = drawn(figure)
    assert list(found) == [TEACHER, ALONE, DISTILLED, "pruned", "pruned, recovered", "exported", FILE, FRONT]
    pruned, recovered = found["pruned"].marker, found["pruned, recovered"].marker
    assert pruned.color == recovered.color and pruned.symbol == f"{recovered.symbol}-open"
    named = [t for t in found.values() if t.name not in (FRONT, FILE, "pruned, recovered")]
    assert len({t.marker.color for t in named}) == len({t.marker.symbol for t in named}) == len(named)
    # Over seeds whose sizes differ it is the mean that is drawn.
    assert sorted(found["pruned"].x) == [7780, 18020]
    links = [t for t in figure.data if not t.name and t.xaxis in ("x", None)]
    assert len(links) == 1 and links[0].line.color == pruned.color
    places = dict(zip(found["pruned, recovered"].x, found["pruned, recovered"].y, strict=True))
    assert {(x, y) for x, y in zip(links[0].x[1::3], links[0].y[1::3], strict=True)} == set(places.items())


def test_the_front_is_what_none_beats() -> None:
    made = groups_of(compression())
    figure = accuracy_by_cost(made)
    line = drawn(figure)[FRONT]
    assert list(line.x) == sorted(line.x) and list(line.y) == sorted(line.y) and line.line.shape == "hv"
    points = [(number(g["bytes"]) or 0, 100 * (number(g[ACCURACY]) or 0)) for g in made]
    for x, y in zip(line.x, line.y, strict=True):
        assert not any((a <= x and b > y + 1e-9) or (a < x and b >= y - 1e-9) for a, b in points)
    assert len(line.x) == 4  # both files, the student with a larger share recovered, the teacher
    assert front([], "bytes") == []


def test_time_is_a_panel_where_it_was_measured_and_integers_that_are_played_have_none() -> None:
    made = compression(seeds=(0,))
    quantized = {**made[-2], "stage": "quantize"}
    quantized["document"] = {**made[-2]["document"], "stage": "kd.stages.Quantize"}
    quantized["key"] = "f" * 64
    figure = accuracy_by_cost(groups_of([*made, quantized]))
    assert "quantized" in drawn(figure, 1) and "quantized" not in drawn(figure, 3)
    file = drawn(figure, 3)[FILE]
    assert list(file.x) == [0.5] and list(file.y) == pytest.approx([99.1])
    assert figure.layout.xaxis3.tickformat == "~g" and len(panels(groups_of(made))) == 3
    for one in made:
        one.get("cost", {}).pop("latency_ms_batch1", None)
    assert panels(groups_of(made)) == ["bytes", "macs"]


def test_a_legend_says_each_name_once_over_all_panels() -> None:
    figure = accuracy_by_cost(groups_of(compression()))
    shown = [t.name for t in figure.data if t.showlegend]
    assert len(shown) == len(set(shown)) and set(shown) == set(drawn(figure))


def test_names_from_a_card_are_escaped() -> None:
    bad = "<b>%{x}$"
    rows = groups_of([card("Train", {"name": "seed_cnn"}, 0.9, data=bad), card("Train", {"name": "seed_cnn"}, 0.8)])
    rows[0]["role"] = rows[0]["step"] = bad
    text = accuracy_by_cost(rows, ["bytes"]).to_json()
    assert "<b>" not in text and "\\u003cb\\u003e" not in text and "%{x}" not in text
