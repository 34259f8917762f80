"""A search as figures and as one page: what each trial was worth, over time, over each field, against its cost."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.report.figures import COLOURS, safe, styled
from kd.report.page import write_html
from kd.report.rows import ALONE, DISTILLED, TEACHER
from kd.report.tables import cell, title
from kd.store import short

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Trial = Mapping[str, Any]
DONE = ("done", "hit")
_SHOWN = {
    DONE: ("run to its end", COLOURS[DISTILLED], "circle"),
    ("pruned",): ("pruned", COLOURS[ALONE], "x-thin-open"),
}
_BEST = {"color": COLOURS[TEACHER], "symbol": "circle-open", "size": 15, "line": {"width": 2}}
COLUMNS = 3  # figures of fields beside each other


def history(trials: Iterable[Trial], objective: str, direction: str) -> Figure:
    """What each trial was worth in the order in which they were asked for, and the best so far."""
    from plotly import graph_objects as go

    figure = go.Figure()
    ordered = sorted(trials, key=lambda trial: int(trial["trial"]))
    ended = [trial for trial in ordered if trial["state"] in DONE]
    best: list[float] = []
    for trial in ended:
        value = _scale(objective) * float(trial["values"][objective])
        best.append((max if direction == "maximize" else min)([*best[-1:], value]))
    if ended:
        figure.add_scatter(
            name="best so far",
            x=[trial["trial"] for trial in ended],
            y=best,
            mode="lines",
            line={"shape": "hv", "color": COLOURS[TEACHER], "width": 1.5},
            hoverinfo="skip",
        )
    for members, look in _groups(ordered):
        x = [trial["trial"] for trial in members]
        figure.add_scatter(x=x, y=[_value(trial, objective) for trial in members], **_dots(members, objective, look))
    styled(figure, "trial", _title(objective), height=380)
    return figure


def slices(trials: Iterable[Trial], objective: str, log: Iterable[str] = ()) -> Figure:
    """What each trial was worth over each field that was searched; a field of ``log`` on a logarithmic axis."""
    from plotly.subplots import make_subplots

    members = [trial for trial in trials if trial["params"]]
    fields = list(dict.fromkeys(name for trial in members for name in trial["params"]))
    columns = min(COLUMNS, max(len(fields), 1))
    rows = math.ceil(max(len(fields), 1) / columns)
    figure = make_subplots(rows=rows, cols=columns, shared_yaxes=True, vertical_spacing=0.35 / rows)
    styled(figure, "", None, height=70 + 290 * rows)
    for index, name in enumerate(fields):
        row, column = divmod(index, columns)
        place = {"row": row + 1, "col": column + 1}
        texts = [str(trial["params"][name]) for trial in members if trial["params"][name] is not None]
        numeric = all(_number(text) is not None for text in texts)
        for group, look in _groups(members):
            at = [str(trial["params"][name]) for trial in group]
            x = [_number(text) for text in at] if numeric else [safe(text) for text in at]
            dots = _dots(group, objective, look) | {"showlegend": index == 0, "legendgroup": look[0]}
            figure.add_scatter(x=x, y=[_value(trial, objective) for trial in group], **dots, **place)
        kind = "category" if not numeric else "log" if name in log else "linear"
        figure.update_xaxes(title_text=safe(name), type=kind, **place)
        if kind == "log":
            figure.update_xaxes(dtick=1, exponentformat="e", **place)
        figure.update_yaxes(title_text=safe(_title(objective)) if column == 0 else "", **place)
    return figure


def front(trials: Iterable[Trial], objectives: Sequence[str], best: Iterable[int]) -> Figure:
    """The first objective against the second, with the trials that no other beats ringed."""
    from plotly import graph_objects as go

    y, x = objectives[:2]
    ended = [trial for trial in trials if trial["state"] in DONE]
    ringed = sorted((t for t in ended if t["trial"] in set(best)), key=lambda trial: float(trial["values"][x]))
    figure = go.Figure()
    figure.add_scatter(
        name="Pareto front",
        x=[_value(trial, x) for trial in ringed],
        y=[_value(trial, y) for trial in ringed],
        mode="lines+markers" if len(objectives) == 2 else "markers",
        marker=_BEST,
        line={"color": COLOURS[TEACHER], "dash": "dot", "width": 1.5},
        hoverinfo="skip",
    )
    for members, look in _groups(ended):
        dots = _dots(members, y, look)
        figure.add_scatter(x=[_value(t, x) for t in members], y=[_value(t, y) for t in members], **dots)
    styled(figure, _title(x), _title(y), height=400)
    return figure


def epochs(trials: Iterable[Trial], objective: str) -> Figure:
    """What each trial was worth after each epoch: where the pruned ones ended."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for members, (name, colour, _) in _groups(trials):
        for index, trial in enumerate(members):
            at = sorted(int(epoch) for epoch in trial["epochs"])
            figure.add_scatter(
                name=name,
                legendgroup=name,
                showlegend=index == 0,
                x=at,
                y=[_scale(objective) * float(trial["epochs"][epoch]) for epoch in at],
                mode="lines+markers" if len(at) < 12 else "lines",
                line={"color": colour, "width": 1.2},
                marker={"size": 4},
                opacity=0.7,
                hovertemplate=f"epoch %{{x}}: %{{y:.4~f}}<extra>{_named(trial)}</extra>",
            )
    styled(figure, "epoch", _title(objective), height=380)
    return figure


def write_study(
    out: Path,
    name: str,
    asked: str,
    trials: Sequence[Trial],
    objectives: Mapping[str, str],
    best: Sequence[int],
    log: Iterable[str] = (),
) -> Path:
    """Write the page of a search; returns its path.

    Args:
        out: the HTML file; it appears whole or not at all.
        name: the study's.
        asked: the command that asks for it.
        trials: rows, best first.
        objectives: each with its direction.
        best: the numbers of the trials that no other beats.
        log: the fields that are searched by their logarithm.
    """
    figures: dict[str, Figure] = {}
    states = [str(trial["state"]) for trial in trials]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    body = [
        f'<p class="dim">{html.escape(asked)}</p><p class="dim">{html.escape(f"{len(states)} trials: {counted}")}</p>'
    ]
    body += [_tiles(trials, objectives, best)]
    ended = any(state in DONE for state in states)
    if len(objectives) > 1 and ended:
        body.append(_section("Pareto front", _place("front", front(trials, list(objectives), best), figures)))
    for index, (objective, direction) in enumerate(objectives.items()):
        if ended:
            parts = _place(f"history-{index}", history(trials, objective, direction), figures)
            if index == 0 and len(objectives) == 1 and any(len(trial["epochs"]) > 1 for trial in trials):
                parts += _place("epochs", epochs(trials, objective), figures)
            over = _place(f"slices-{index}", slices(trials, objective, log), figures, "card wide")
            parts = f'<div class="pair">{parts}</div><div class="pair" style="margin-top:12px">{over}</div>'
            body.append(_section(_title(objective), parts))
    body.append(_section("Trials", _table(trials, list(objectives), set(best))))
    return write_html(out, f"study {name}", "\n".join(body), figures)


def _tiles(trials: Sequence[Trial], objectives: Mapping[str, str], best: Sequence[int]) -> str:
    """The best value of each objective, and the trial that has it."""
    tiles = []
    for objective, direction in objectives.items():
        members = [trial for trial in trials if trial["trial"] in best]
        if members:
            pick, said = (max, "largest") if direction == "maximize" else (min, "smallest")
            value, top = pick(((float(t["values"][objective]), t) for t in members), key=lambda pair: pair[0])
            tiles.append(
                f'<div class="card tile"><span class="dim">{html.escape(f"{said} {_title(objective)}")}</span>'
                f"<b>{html.escape(_text(objective, value))}</b>"
                f'<span class="dim">{html.escape(_words(top))}</span></div>'
            )
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _table(trials: Sequence[Trial], objectives: Sequence[str], best: set[int]) -> str:
    fields = list(dict.fromkeys(name for trial in trials for name in trial["params"]))
    heads = [("trial", True), *((name, False) for name in fields), *((_title(name), True) for name in objectives)]
    heads += [("state", False), ("hash", False), ("command", False)]
    head = "".join(
        f'<th scope="col"{_num(numeric)}><button>{html.escape(name)}</button></th>' for name, numeric in heads
    )
    body = []
    for trial in trials:
        cells = [f'<td class="num" data-value="{int(trial["trial"])}">{int(trial["trial"])}</td>']
        cells += [f"<td>{html.escape(str(trial['params'][name] or '-'))}</td>" for name in fields]
        for name in objectives:
            value = trial["values"].get(name)
            data = "" if value is None else f' data-value="{float(value)!r}"'
            cells.append(f'<td class="num"{data}>{html.escape(_text(name, value))}</td>')
        error = f' class="error" title="{html.escape(str(trial["error"]))}"' if trial["error"] else ""
        cells += [f"<td{error}>{html.escape(str(trial['state']))}</td>"]
        cells += [f"<td><code>{html.escape(short(str(trial['key'] or '-')))}</code></td>"]
        command = html.escape(str(trial["command"] or ""))
        cells += [f'<td><button class="copy" title="copy the command"><code>{command}</code></button></td>']
        body.append(f"<tr{' class=best' if trial['trial'] in best else ''}>{''.join(cells)}</tr>")
    table = f'<table id="trials"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="card wide">{table}</div>'


def _num(numeric: bool) -> str:
    return ' class="num"' if numeric else ""


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{content}</section>"


def _place(name: str, figure: Figure, figures: dict[str, Figure], kind: str = "card") -> str:
    figures[name] = figure
    return (
        f'<div class="{kind}"><div class="figure" id="{name}" style="height:{int(figure.layout.height)}px"></div></div>'
    )


def _groups(trials: Iterable[Trial]) -> list[tuple[list[Trial], tuple[str, str, str]]]:
    """The trials that have a value, those run to their end before those given up, each with its look."""
    found = [trial for trial in trials if trial["values"]]
    groups = [([trial for trial in found if trial["state"] in states], look) for states, look in _SHOWN.items()]
    return [(members, look) for members, look in groups if members]


def _dots(members: Sequence[Trial], objective: str, look: tuple[str, str, str]) -> dict[str, Any]:
    name, colour, symbol = look
    said = [
        f"{_named(trial)}<br>{safe(_title(objective))} {_text(objective, _raw(trial, objective))}" for trial in members
    ]
    return {
        "name": name,
        "mode": "markers",
        "marker": {"color": colour, "symbol": symbol, "size": 9, "line": {"width": 1.5, "color": colour}},
        "customdata": said,
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _named(trial: Trial) -> str:
    return safe(f"trial {trial['trial']}: {_words(trial)}")


def _words(trial: Trial) -> str:
    return ", ".join(f"{name.lstrip('+')} {value}" for name, value in trial["params"].items())


def _raw(trial: Trial, objective: str) -> float | None:
    value = trial["values"].get(objective)
    return None if value is None else float(value)


def _value(trial: Trial, objective: str) -> float | None:
    value = _raw(trial, objective)
    return None if value is None else value * _scale(objective)


def _column(objective: str) -> str:
    """A cost's name as the tables have it."""
    return objective.removeprefix("cost/")


def _title(objective: str) -> str:
    return title(_column(objective))


def _text(objective: str, value: float | None) -> str:
    return cell(_column(objective), value)


def _scale(objective: str) -> int:
    return 100 if _title(objective).endswith("%") else 1


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
