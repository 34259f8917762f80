"""Rows, groups and cards as plotly figures; plotly is imported where one is drawn.

Backgrounds are transparent and no theme is set: the page gives both to fit light and dark.
Texts that come from a card are escaped, since plotly reads a little HTML in them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd.errors import InputError
from kd.report.rows import (
    ACCURACY,
    ALONE,
    ASSISTANT,
    CHOICE,
    DISTILLED,
    STEPS,
    TEACHER,
    Card,
    Row,
    Spread,
    best,
    is_measured,
    number,
    same,
    varying_settings,
)
from kd.report.tables import cell, title

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Okabe-Ito: told apart by colour-blind readers too; the marker's shape says the same again.
COLOURS = {TEACHER: "#d55e00", ASSISTANT: "#8057a8", ALONE: "#8a8f98", DISTILLED: "#1f83c4"}
COLOURS |= dict(zip(STEPS.values(), ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#6675d6"), strict=True))
SYMBOLS = {TEACHER: "square", ASSISTANT: "diamond", ALONE: "circle-open", DISTILLED: "circle"}
SYMBOLS |= dict(zip(STEPS.values(), ("triangle-down", "triangle-up", "pentagon", "hexagon", "star"), strict=True))
CYCLE = ("#1f83c4", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8f98", "#a6761d")
SEQUENTIAL = [[0.0, "#e8f1f8"], [0.5, "#7fb2d9"], [1.0, "#08519c"]]
DIVERGING = [[0.0, "#b2500a"], [0.5, "#f4f4f2"], [1.0, "#08519c"]]
_BARS = 24


def heatmap(
    groups: Sequence[Row],
    column: str = ACCURACY,
    x: str = "temperature",
    y: str = "alpha",
    axes: Mapping[str, Iterable[Any]] | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """One column over two settings; each cell says mean ± sample standard deviation over its seeds.

    ``axes`` adds values to an axis that no group has (a sweep's failed jobs): their cells stay empty.
    ``limits`` are the ends of the colour scale in the unit shown, for figures that stand side by side.

    Raises:
        InputError: if two groups share a cell, for then the figure would hide one.

    >>> group = {"temperature": 4, "alpha": 0.9, "test/accuracy": Spread(0.98, 0.001, 3)}
    >>> heatmap([group]).data[0].text[0][0]
    '98.00<br>± 0.10'
    """
    from plotly import graph_objects as go

    cells: dict[tuple[str, str], Row] = {}
    members = [g for g in groups if g.get(x) is not None and g.get(y) is not None and number(g.get(column)) is not None]
    for group in members:
        place = (same(group[x]), same(group[y]))
        if place in cells:
            others = [name for name in varying_settings(members) if name not in (x, y)] or ["seed"]
            raise InputError(f"several runs share a cell of {x} and {y}: choose one {' and one '.join(others)} first")
        cells[place] = group
    xs, ys = (_axis([*(g[name] for g in members), *(axes or {}).get(name, ())]) for name in (x, y))
    grid = [[cells.get((same(xv), same(yv))) for xv in xs] for yv in ys]
    values = [[percent(column, group) for group in line] for line in grid]
    if column == "gain":  # no gain is the middle of the scale
        furthest = max((abs(v) for line in values for v in line if v is not None), default=0.0) or 1.0
        limits = (-furthest, furthest)
    figure = go.Figure(
        go.Heatmap(
            x=[safe(cell(x, value)) for value in xs],
            y=[safe(cell(y, value)) for value in ys],
            z=values,
            text=[[_cell_text(column, group) for group in line] for line in grid],
            texttemplate="%{text}",
            customdata=[[_cell_hover(column, group) for group in line] for line in grid],
            hovertemplate=f"{safe(title(x))} %{{x}}, {safe(title(y))} %{{y}}<br>%{{customdata}}<extra></extra>",
            hoverongaps=False,
            colorscale=DIVERGING if column == "gain" else SEQUENTIAL,
            showscale=False,  # each cell says its number
            zmin=limits[0] if limits else None,
            zmax=limits[1] if limits else None,
            xgap=2,
            ygap=2,
        )
    )
    styled(figure, title(x), title(y), height=110 + 58 * max(len(ys), 1))
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    return figure


def curves(cards: Sequence[Card], names: Sequence[str] | None = None) -> Figure:
    """By epoch: the train loss, its parts by term, the validation accuracy; one colour a run."""
    from plotly.subplots import make_subplots

    dashes = ("solid", "dot", "dash", "dashdot", "longdash")
    terms = list(dict.fromkeys(name for card in cards for name in _terms(card)))
    key = ", ".join(f"{_term(term)} {dashes[i % len(dashes)]}" for i, term in enumerate(terms))
    heads = ("train loss", f"train loss by term ({key})", "validation accuracy %")
    figure = make_subplots(rows=1, cols=3, subplot_titles=heads)
    for index, card in enumerate(cards):
        run = safe(names[index] if names else str(card["key"])[:16])
        epochs = _epochs(card)
        at = [int(epoch["epoch"]) + 1 for epoch in epochs]
        style = {"legendgroup": str(index), "mode": "lines+markers" if len(at) < 12 else "lines"}
        lines = [(1, "train/loss", "solid", run)]
        lines += [(2, term, dashes[i % len(dashes)], f"{run} {_term(term)}") for i, term in enumerate(terms)]
        lines += [(3, CHOICE, "solid", run)]
        for place, column, dash, name in lines:
            values = [number(epoch.get(column)) for epoch in epochs]
            if all(value is None for value in values):
                continue
            scale = 100 if column == CHOICE else 1
            figure.add_scatter(
                x=at,
                y=[None if value is None else scale * value for value in values],
                name=name if place != 1 else run,
                showlegend=place == 1,
                line={"color": CYCLE[index % len(CYCLE)], "dash": dash, "width": 1.8},
                marker={"size": 4},
                hovertemplate=f"epoch %{{x}}: %{{y:.4~f}}<extra>{name}</extra>",
                row=1,
                col=place,
                **style,
            )
    legend = 22 * ((len(cards) + 1) // 2)
    styled(figure, "epoch", None, height=360 + legend)
    figure.update_layout(legend={"yref": "container", "y": 0.01, "yanchor": "bottom"}, margin={"b": 70 + legend})
    figure.update_annotations(font_size=13)
    figure.update_xaxes(rangemode="tozero")
    return figure


def movers(cards: Sequence[Card], names: Sequence[str] | None = None) -> Figure:
    """By epoch, what each term does to the student: its share of the gradient, its norm, the cosines of pairs.

    One colour a run, one dash a term or a pair; a card without recorded gradients draws nothing.
    """
    from plotly.subplots import make_subplots

    dashes = ("solid", "dot", "dash", "dashdot", "longdash")
    kinds = ("grad_share/", "grad/", "grad_cosine/")
    columns = {kind: _recorded(cards, kind) for kind in kinds}
    key = ", ".join(f"{safe(term)} {dashes[i % len(dashes)]}" for i, term in enumerate(columns[kinds[0]]))
    pairs = ", ".join(f"{safe(pair)} {dashes[i % len(dashes)]}" for i, pair in enumerate(columns[kinds[2]][:3]))
    heads = (f"share of the gradient % ({key})", "norm of the gradient (log)", f"cosine between terms ({pairs})")
    figure = make_subplots(rows=1, cols=3, subplot_titles=heads)
    for index, card in enumerate(cards):
        run = safe(names[index] if names else str(card["key"])[:16])
        epochs = list(card.get("gradients") or ())
        for place, kind in enumerate(kinds, start=1):
            for i, name in enumerate(columns[kind]):
                values = [number(epoch.get(kind + name)) for epoch in epochs]
                if all(value is None for value in values):
                    continue
                scale = 100 if kind == "grad_share/" else 1
                figure.add_scatter(
                    x=[int(epoch["epoch"]) + 1 for epoch in epochs],
                    y=[None if value is None else scale * value for value in values],
                    name=run,
                    legendgroup=str(index),
                    showlegend=place == 1 and i == 0,
                    mode="lines+markers" if len(epochs) < 12 else "lines",
                    line={"color": CYCLE[index % len(CYCLE)], "dash": dashes[i % len(dashes)], "width": 1.8},
                    marker={"size": 4},
                    hovertemplate=f"epoch %{{x}}: %{{y:.4~f}}<extra>{run} {safe(name)}</extra>",
                    row=1,
                    col=place,
                )
    legend = 22 * ((len(cards) + 1) // 2)
    styled(figure, "epoch", None, height=360 + legend)
    figure.update_layout(legend={"yref": "container", "y": 0.01, "yanchor": "bottom"}, margin={"b": 70 + legend})
    figure.update_annotations(font_size=13)
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(range=[0, 100], col=1)
    figure.update_yaxes(type="log", col=2)
    figure.update_yaxes(range=[-1.02, 1.02], col=3)
    return figure


def gain(groups: Sequence[Row]) -> Figure:
    """Accuracy of the distilled student less that of the same student alone, in points.

    A heatmap where exactly two settings vary, or the schedule's epochs and samples among others (then each cell is the
    setting with the best validation accuracy); bars otherwise.
    """
    members = [group for group in groups if number(group.get("gain")) is not None]
    settings = varying_settings(members)
    if "epochs" in settings and "samples" in settings:
        return heatmap(_best_of_each(members, ("samples", "epochs")), "gain", "samples", "epochs")
    if len(settings) == 2:
        return heatmap(members, "gain", settings[0], settings[1])
    return _gain_bars(members, settings)


def label(row: Row, settings: Iterable[str]) -> str:
    """A row in a few words: its role and the settings that set it apart.

    >>> label({"role": "student distilled", "temperature": 4.0, "model": "cnn"}, ["temperature", "model"])
    'student distilled: cnn, temperature 4'
    """
    named = [
        cell(name, row[name]) if name in ("model", "data") else f"{title(name)} {cell(name, row[name])}"
        for name in sorted(settings, key=lambda name: name not in ("model", "data"))
        if row.get(name) is not None and not is_measured(name)
    ]
    return ": ".join(part for part in (str(row.get("role", "")), ", ".join(named)) if part)


def _gain_bars(members: Sequence[Row], settings: Sequence[str]) -> Figure:
    from plotly import graph_objects as go

    shown = sorted(members, key=lambda group: number(group["gain"]) or 0.0)[-_BARS:]
    figure = go.Figure(
        go.Bar(
            orientation="h",
            x=[percent("gain", group) for group in shown],
            # The place, not the label, is the category: two settings may read the same.
            y=list(range(len(shown))),
            error_x=errors("gain", shown),
            marker={
                "color": [COLOURS[DISTILLED] if (number(g["gain"]) or 0) >= 0 else COLOURS[TEACHER] for g in shown]
            },
            customdata=[f"{safe(label(g, settings))}<br>{_cell_hover('gain', g)}" for g in shown],
            hovertemplate="%{customdata}<extra></extra>",
            width=0.7,
        )
    )
    styled(figure, title("gain"), None, height=120 + 26 * max(len(shown), 2))
    names = [label({**group, "role": ""}, settings) or str(group["model"]) for group in shown]
    figure.update_yaxes(
        tickvals=list(range(len(shown))),
        ticktext=[safe(name) for name in names],
        showgrid=False,
        automargin=True,
    )
    figure.update_xaxes(zeroline=True)
    return figure


def _best_of_each(members: Sequence[Row], settings: Sequence[str]) -> list[Row]:
    cells: dict[tuple[str, ...], list[Row]] = {}
    for group in members:
        cells.setdefault(tuple(same(group[name]) for name in settings), []).append(group)
    return [chosen for held in cells.values() if (chosen := best(held)) is not None]


def styled(figure: Figure, x: str, y: str | None, height: int) -> None:
    """What all figures have in common."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 16, "t": 36, "b": 50},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8a8f98", "activecolor": "#1f83c4"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(title_text=safe(x), title_font_size=13, zeroline=False, automargin=True)
    figure.update_yaxes(title_text=safe(y or ""), title_font_size=13, zeroline=False, automargin=True)


def _axis(values: Iterable[Any]) -> list[Any]:
    """Distinct values, numbers in order, words after them."""
    distinct = list({same(value): value for value in values}.values())
    return sorted(distinct, key=lambda value: (number(value) is None, number(value) or 0.0, str(value)))


def percent(column: str, group: Row | None) -> float | None:
    """A value as it is drawn: shares as per cent."""
    value = number(group.get(column)) if group else None
    return None if value is None else value * _scale(column)


def errors(column: str, groups: Sequence[Row]) -> dict[str, Any]:
    """Error bars of one standard deviation; none where there is but one seed."""
    spreads = [group.get(column) for group in groups]
    sds = [s.sd * _scale(column) if isinstance(s, Spread) and s.sd is not None else None for s in spreads]
    return {"type": "data", "array": sds, "thickness": 1.2, "width": 0, "color": "#8a8f98"}


def _scale(column: str) -> int:
    return 100 if column == "gain" or title(column).endswith("%") else 1


def _cell_text(column: str, group: Row | None) -> str:
    return cell(column, group[column]).replace(" ± ", "<br>± ") if group else ""


def _cell_hover(column: str, group: Row | None) -> str:
    if group is None:
        return ""
    spread = group[column]
    seeds = f", {spread.n} seeds" if isinstance(spread, Spread) and spread.n > 1 else ""
    return f"{safe(title(column))} {cell(column, spread)}{seeds}<br>{safe(cell('hash', group.get('hash')))}"


def safe(text: str) -> str:
    """Text as plotly shows it: no tag, no field of a hover template, no pair of $ to be read as a formula."""
    return html.escape(text, quote=False).replace("%{", "&#37;{").replace("$", "&#36;")


def _epochs(card: Card) -> list[Mapping[str, Any]]:
    return list(card.get("trace", {}).get("epochs", ()))


def _terms(card: Card) -> list[str]:
    names = dict.fromkeys(name for epoch in _epochs(card) for name in epoch)
    return [name for name in names if name.startswith("train/") and name != "train/loss"]


def _recorded(cards: Sequence[Card], kind: str) -> list[str]:
    """The terms (or pairs) whose gradients the cards hold, in order of appearance."""
    found = dict.fromkeys(name for card in cards for epoch in card.get("gradients") or () for name in epoch)
    return [name.removeprefix(kind) for name in found if name.startswith(kind)]


def _term(column: str) -> str:
    return safe(column.removeprefix("train/"))
