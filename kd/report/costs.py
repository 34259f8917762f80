"""Accuracy against cost: a point a setting, a colour a step, filled once recovered; the Pareto front is a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from kd.report.figures import COLOURS, CYCLE, SYMBOLS, errors, label, percent, safe, styled
from kd.report.rows import ACCURACY, STEPS, TEACHER, Row, number, played, varying_settings
from kd.report.tables import cell, title

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PANELS = ("bytes", "macs", "latency_ms_batch1")
RECOVERED, FILE, FRONT = "recovered", "teacher, as a file", "Pareto front"
_UNITS = {"bytes": "bytes", "macs": "MACs", "latency_ms_batch1": "ms", "latency_ms_batch64": "ms"}
_BARS = "rgba(138,143,152,0.55)"  # of many points near each other, thinner than elsewhere
_FRONT = {"color": "#8a8f98", "width": 1.5, "dash": "dot", "shape": "hv"}


def front(groups: Iterable[Row], cost: str, column: str = ACCURACY) -> list[Row]:
    """The rows that no other is as cheap as and better, or as good as and cheaper; cheapest first.

    >>> rows = [{"bytes": b, "test/accuracy": a} for b, a in ((4, 0.9), (1, 0.5), (2, 0.4), (3, 0.9), (9, 0.95))]
    >>> [row["bytes"] for row in front(rows, "bytes")]
    [1, 3, 9]
    """
    found: list[Row] = []
    for group in sorted(groups, key=lambda g: (number(g[cost]) or 0.0, -(number(g[column]) or 0.0))):
        if not found or (number(group[column]) or 0.0) > (number(found[-1][column]) or 0.0):
            found.append(group)
    return found


def panels(groups: Sequence[Row]) -> list[str]:
    """The costs that there is something to draw of: time may not have been measured.

    >>> panels([{"bytes": 4, "macs": 1}, {"bytes": 3, "macs": 2}])
    ['bytes', 'macs']
    """
    return [cost for cost in PANELS if sum(bool(number(group.get(cost))) for group in groups) > 1]


def size_accuracy(groups: Sequence[Row], size: str = "parameters", column: str = ACCURACY) -> Figure:
    """One cost (log) against accuracy, as `accuracy_by_cost` draws each."""
    figure = accuracy_by_cost(groups, (size,), column)
    figure.update_layout(height=400)
    return figure


def accuracy_by_cost(groups: Sequence[Row], costs: Sequence[str] = PANELS, column: str = ACCURACY) -> Figure:
    """Accuracy against costs (log), side by side: teacher, students, each step of a compression and its recovery.

    A step has an open marker, what its recovery made of it the same one filled, and a thin line between them. The line
    of the front joins what is not beaten. Bars are the standard deviation over seeds. A network that only plays
    integers has no place in a panel of time; a teacher's file, of the same exporter as the files here, has one.
    """
    from plotly.subplots import make_subplots

    settings = varying_settings(groups)
    figure = make_subplots(rows=1, cols=len(costs), shared_yaxes=True, horizontal_spacing=0.025)
    named: set[str] = set()

    def add(place: int, name: str, **trace: Any) -> None:
        shown = {"legendgroup": safe(name), "showlegend": name not in named} if name else {"showlegend": False}
        named.add(name)
        figure.add_scatter(name=safe(name), row=1, col=place, **shown, **trace)

    for place, cost in enumerate(costs, start=1):
        shown = [g for g in groups if _has(g, cost, column)]
        for name in _ordered(map(_stage, shown)):
            members = [g for g in shown if _stage(g) == name]
            _links(add, place, [g for g in members if g.get("recovers")], shown, cost, column)
            add(
                place,
                name,
                x=[number(g[cost]) for g in members],
                y=[percent(column, g) for g in members],
                error_y={**errors(column, members), "color": _BARS, "thickness": 1},
                customdata=[_told(g, settings, cost, column) for g in members],
                hovertemplate="%{customdata}<extra></extra>",
                mode="markers",
                marker=_marker(name),
            )
        files = _files(shown, cost)
        for file in files:
            add(
                place,
                FILE,
                x=[file[cost]],
                y=[percent(column, file)],
                customdata=[f"{FILE}<br>{cell(column, file[column])}, {cell(cost, file[cost])} {_UNITS[cost]}"],
                hovertemplate="%{customdata}<extra></extra>",
                mode="markers",
                marker=_marker(FILE),
            )
        ends = front([*shown, *files], cost, column)
        if len(ends) > 1:
            points = {"x": [number(g[cost]) for g in ends], "y": [percent(column, g) for g in ends]}
            add(place, FRONT, mode="lines", line=_FRONT, hoverinfo="skip", **points)
    styled(figure, "", None, height=460)
    for place, cost in enumerate(costs, start=1):
        # Of a time, 0.02 and not 20m, which is what 20 thousandths of a millisecond would become.
        form = "~g" if cost.startswith("latency") else ".3~s"
        figure.update_xaxes(title_text=f"{title(cost)} (log)", tickformat=form, col=place)
    figure.update_xaxes(type="log", minor={"ticks": "outside"}, dtick="D2", tickangle=0)
    figure.update_yaxes(title_text=title(column), col=1)
    figure.update_layout(margin={"t": 24 + 22 * (1 + (len(named) - 1) // (6 if len(costs) > 1 else 3))})
    return figure


def _has(group: Row, cost: str, column: str) -> bool:
    timed = not (cost.startswith("latency") and played(group))
    return bool(number(group.get(cost))) and number(group.get(column)) is not None and timed


def _stage(group: Row) -> str:
    """What a point's colour and marker say."""
    of = group.get("recovers")
    return f"{of}, {RECOVERED}" if of else str(group["role"])


def _ordered(names: Iterable[str]) -> list[str]:
    """As they come in a pipeline; a step before its recovery."""
    places = list(COLOURS)

    def place(name: str) -> tuple[int, bool]:
        step = name.removesuffix(f", {RECOVERED}")
        return places.index(step) if step in places else len(places), step != name

    return sorted(set(names), key=place)


def _marker(name: str) -> dict[str, Any]:
    step = name.removesuffix(f", {RECOVERED}")
    step = TEACHER if name == FILE else step
    colour, symbol = COLOURS.get(step, CYCLE[2]), SYMBOLS.get(step, "diamond")
    opened = (step == name and step in STEPS.values() and step != STEPS["Export"]) or name == FILE
    return {
        "color": colour,
        "symbol": f"{symbol}-open" if opened and not symbol.endswith("-open") else symbol,
        "size": 10,
        "opacity": 0.85,
        "line": {"width": 1.5, "color": colour},
    }


def _links(add: Any, place: int, recovered: Sequence[Row], every: Sequence[Row], cost: str, column: str) -> None:
    """A thin line from each network as a step left it to what a recovery made of it."""
    before = {g["group"]: g for g in every}
    pairs = [(before[g["from"]], g) for g in recovered if g.get("from") in before]
    if not pairs:
        return
    xs: list[float | None] = []
    ys: list[float | None] = []
    for pair in pairs:
        xs += [*(number(g[cost]) for g in pair), None]
        ys += [*(percent(column, g) for g in pair), None]
    line = {"color": COLOURS.get(str(recovered[0]["recovers"]), CYCLE[2]), "width": 1}
    add(place, "", x=xs, y=ys, mode="lines", line=line, opacity=0.45, hoverinfo="skip")


def _files(groups: Sequence[Row], cost: str) -> list[Row]:
    """The teachers as files of the exporter that wrote the files here."""
    found: dict[float, list[float]] = {}
    for group in groups:
        accuracy, amount = number(group.get("teacher/accuracy")), number(group.get(f"teacher/{cost}"))
        if accuracy is not None and amount:
            found.setdefault(accuracy, []).append(amount)
    return [{cost: median(amounts), ACCURACY: accuracy} for accuracy, amounts in found.items()]


def _told(group: Row, settings: Iterable[str], cost: str, column: str) -> str:
    unit = _UNITS.get(cost, cost)
    step = f" ({group['step']})" if group.get("step") else ""
    return (
        f"{safe(label(group, settings))}{safe(step)}<br>{cell(column, group[column])}, {cell(cost, group[cost])} {unit}"
    )
