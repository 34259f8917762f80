"""One self-contained HTML page: figures, tables, failed jobs; it fetches nothing."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from kd.report.lineage import section
from kd.report.published import judged
from kd.report.rows import (
    ACCURACY,
    ALONE,
    CHOICE,
    DISTILLED,
    TEACHER,
    Card,
    Row,
    Spread,
    best,
    collect,
    dial_names,
    number,
    over_seeds,
    related,
    same,
    varying_settings,
)
from kd.report.tables import METRICS, cell, constants_line, layout, title
from kd.store import write_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

METRICS_SHOWN = (*METRICS, "test/agreement", "test/loss", "test/ece", CHOICE)
CURVES = 8
MOVERS = 4
HEATMAPS = 6


def write_page(
    cards: Iterable[Card],
    out: Path,
    title: str,
    sweep: Mapping[str, Any] | None = None,
    lookup: Mapping[str, Card] | None = None,
) -> Path:
    """Write the page about these cards; returns its path.

    Args:
        cards: the runs to show.
        out: the HTML file; it appears whole or not at all.
        title: the page's heading.
        sweep: the sweep's record; its failed jobs are listed.
        lookup: key -> card of the whole store; teachers and students alone that the runs refer to are shown too.
    """
    shown = related(cards, lookup or {})
    figures: dict[str, Figure] = {}
    return write_html(out, title, _body(shown, collect(shown, lookup), figures, sweep), figures)


def write_html(out: Path, title: str, body: str, figures: Mapping[str, Figure]) -> Path:
    """Write a page that fetches nothing; returns its path.

    Args:
        out: the HTML file; it appears whole or not at all.
        title: its heading.
        body: HTML with a place for each figure, by its id.
        figures: by the id of their place.
    """
    from plotly.offline import get_plotlyjs

    data = ",".join(f'"{name}":{figure.to_json()}' for name, figure in figures.items())
    page = Template((files("kd.report") / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        body=body,
        plotly=get_plotlyjs() if figures else "",
        # JSON inside a script element: no "<" may stand in it, or a name could close the element.
        figures="{" + data.replace("<", "\\u003c") + "}",
    )
    write_text(out, page)
    return out


def _body(cards: Sequence[Card], rows: list[Row], figures: dict[str, Figure], sweep: Mapping[str, Any] | None) -> str:
    groups = judged(over_seeds(rows))
    parts = [_summary(rows, groups, sweep)]
    if not rows:
        parts.append('<section class="card"><p>No finished runs.</p></section>')
    else:
        parts += [_tiles(groups), _taught(cards, rows), _heatmaps(groups, figures, sweep), _pair(groups, figures)]
        parts += [_curves(cards, rows, figures), _movers(cards, rows, figures)]
        if any(group["n"] > 1 for group in groups):
            # A setting has as many commands as seeds: they stand with the runs.
            settings = [{**group, "hash": None} for group in groups]
            parts.append(_table(settings, "settings", "Settings, over their seeds", "mean ± sample standard deviation"))
        parts.append(_table(rows, "runs", "Runs", "click a heading to sort, a command to copy it"))
    return "\n".join(part for part in [*parts, _failed(sweep)] if part)


def _summary(rows: Sequence[Row], groups: Sequence[Row], sweep: Mapping[str, Any] | None) -> str:
    words = [_count(len(rows), "run"), _count(len(groups), "setting")]
    if sweep:
        states = [str(job.get("status")) for job in sweep.get("jobs", ())]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        words.append(f"sweep {sweep.get('id', '')}: {_count(len(states), 'job')} ({counted})")
        words += [str(sweep["started"])] if sweep.get("started") else []
        words += [" ".join(map(str, sweep["overrides"]))] if sweep.get("overrides") else []
    return f'<p class="dim">{html.escape(" | ".join(words))}</p>'


def _tiles(groups: Sequence[Row]) -> str:
    """The headline: the best student by validation accuracy, and what it is measured against."""
    top = best(groups)
    settings = varying_settings(groups)
    if top is None:
        tiles = [
            _tile(role, cell(ACCURACY, group[ACCURACY]), "%", f"{group['model']}, {_size(group)}")
            for role in (TEACHER, ALONE)
            if (group := best(groups, role))
        ]
        return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""
    dials = [name for name in dial_names([top]) if name != "seed" and top.get(name) is not None]
    named = dict.fromkeys([*dials, *(name for name in settings if not name.startswith("config.") and name != "model")])
    words = [str(top["model"])] + [f"{name} {cell(name, top[name])}" for name in named if top.get(name) is not None]
    chosen = "chosen by validation accuracy" if top.get(CHOICE) else "chosen by test accuracy"
    several = varying_settings([group for group in groups if group["role"] == DISTILLED])
    tiles = [_tile("best student", cell(ACCURACY, top[ACCURACY]), "%", ", ".join([*words, _seeds(top)]))]
    if top.get("teacher/accuracy") is not None:
        tiles.append(_tile("its teacher", cell(ACCURACY, top["teacher/accuracy"]), "%", _teacher_words(top, groups)))
    if top.get("gain") is not None:
        tiles.append(
            _tile("student alone", cell(ACCURACY, top["alone/accuracy"]), "%", "same model, data and schedule")
        )
        tiles.append(_tile("gain of distillation", cell("gain", top["gain"]), "points", "distilled less alone"))
    if top.get("compression") is not None:
        tiles.append(_tile("smaller than its teacher", cell("compression", top["compression"]), "", _size(top)))
    note = f'<p class="dim">Test accuracy; the best student is {chosen}.</p>' if several else ""
    return f'<section class="tiles">{"".join(tiles)}</section>{note}'


def _taught(cards: Sequence[Card], rows: Sequence[Row]) -> str:
    """A picture of each graph with more than one hop, that of the best student first."""
    scores = {row["key"]: number(row.get(CHOICE)) or 0.0 for row in rows}
    ordered = sorted(cards, key=lambda card: scores.get(card["key"], 0.0), reverse=True)
    drawn = section(ordered, {card["key"]: card for card in cards})
    if not drawn:
        return ""
    note = '<p class="dim">An arrow goes from who teaches to who learns; dashed: through stored soft labels.</p>'
    return _section("Who teaches whom", note + "".join(f'<div class="card wide">{svg}</div>' for svg in drawn))


def _tile(name: str, value: str, unit: str, words: str) -> str:
    mean, _, deviation = value.partition(" ± ")
    rest = " ".join(part for part in (f"± {deviation}" if deviation else "", unit) if part)
    return (
        f'<div class="card tile"><span class="dim">{html.escape(name)}</span>'
        f"<b>{html.escape(mean)} <small>{html.escape(rest)}</small></b>"
        f'<span class="dim">{html.escape(words)}</span></div>'
    )


def _teacher_words(top: Row, groups: Sequence[Row]) -> str:
    teachers = [g for g in groups if g["role"] == TEACHER and _about(g[ACCURACY], top["teacher/accuracy"])]
    return f"{teachers[0]['model']}, {_size(teachers[0])}" if len(teachers) == 1 else ""


def _about(one: Any, other: Any) -> bool:
    a, b = number(one), number(other)
    return a is not None and b is not None and abs(a - b) < 1e-9


def _size(row: Row) -> str:
    return f"{cell('parameters', row['parameters'])} parameters" if row.get("parameters") else ""


def _seeds(group: Row) -> str:
    return _count(int(group["n"]), "seed")


def _count(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def _heatmaps(groups: Sequence[Row], figures: dict[str, Figure], sweep: Mapping[str, Any] | None) -> str:
    """Temperature x alpha, one figure for each setting of everything else."""
    from kd.report.figures import heatmap, label

    students = [g for g in groups if g["role"] == DISTILLED]
    students = [g for g in students if g.get("temperature") is not None and g.get("alpha") is not None]
    settings = varying_settings(students)
    if not {"temperature", "alpha"} & set(settings):
        return ""
    others = [name for name in settings if name not in ("temperature", "alpha")]
    facets: dict[str, list[Row]] = {}
    for group in students:
        facets.setdefault(label({**group, "role": ""}, others), []).append(group)
    if not any(map(_fills_a_grid, facets.values())):
        return ""  # as after a search: no two of its runs share a setting
    axes = {name: _failed_values(sweep, name) for name in ("temperature", "alpha")}
    values = [100 * mean for group in students if (mean := number(group[ACCURACY])) is not None]
    limits = (min(values), max(values)) if values else None
    cards: list[str] = []
    for name, members in list(facets.items())[:HEATMAPS]:
        if len({str(g["group"]) for g in members}) == len({(str(g["temperature"]), str(g["alpha"])) for g in members}):
            cards.append(_figure(f"heatmap-{len(cards)}", heatmap(members, axes=axes, limits=limits), figures, name))
    rest = len(facets) - len(cards)
    note = f'<p class="dim">{_count(rest, "further setting")} not drawn; the tables hold all.</p>' if rest else ""
    return _section("Accuracy by temperature and alpha", f'<div class="pair">{"".join(cards)}</div>{note}')


def _fills_a_grid(members: Sequence[Row]) -> bool:
    """Whether at least a third of the cells of temperature x alpha are there, and more cells than one."""
    cells = len({same(g["temperature"]) for g in members}) * len({same(g["alpha"]) for g in members})
    return 1 < cells <= 3 * len(members)


def _failed_values(sweep: Mapping[str, Any] | None, dial: str) -> list[float]:
    """The values of a dial that only failed jobs had, so that their cells are there and empty."""
    found = []
    for job in (sweep or {}).get("jobs", ()):
        for override in job.get("overrides", ()):
            name, _, text = str(override).partition("=")
            if job.get("status") == "failed" and name.lstrip("+") == dial:
                try:
                    found.append(float(text))
                except ValueError:
                    continue  # a job may have failed because the value was no number
    return found


def _pair(groups: Sequence[Row], figures: dict[str, Figure]) -> str:
    from kd.report.costs import accuracy_by_cost, panels, size_accuracy
    from kd.report.figures import gain

    cards = []
    above = ""
    sized = sum(bool(group.get("parameters")) for group in groups) > 1
    if sized and any("step" in group for group in groups):
        note = (
            '<p class="dim">Each step is open, what its recovery made of it filled. Files run in their own runtime and '
            "networks in torch, where integers are only played, so that these have no time.</p>"
        )
        figure = _figure("costs", accuracy_by_cost(groups, panels(groups)), figures, "", "card wide")
        above = _section("Accuracy against bytes, products and time", note + figure)
    elif sized:
        cards.append(_figure("size", size_accuracy(groups), figures, "Size against accuracy"))
    gains = [group for group in groups if group.get("gain") is not None]
    settings = varying_settings(gains)
    if len(gains) > 1:
        name = "Gain of distillation over the student alone, in points"
        if {"epochs", "samples"} < set(settings):
            name += "; each cell the setting that validated best"
        cards.append(_figure("gain", gain(gains), figures, name))
    return above + (_section("Size and gain", f'<div class="pair">{"".join(cards)}</div>') if cards else "")


def _curves(cards: Sequence[Card], rows: Sequence[Row], figures: dict[str, Figure]) -> str:
    """The best teacher and student alone, and the best distilled students, up to `CURVES` runs."""
    from kd.report.figures import curves, label

    traced = {str(card["key"]): card for card in cards if card.get("trace", {}).get("epochs")}
    candidates = [row for row in rows if row["key"] in traced]
    chosen = [row for role in (TEACHER, ALONE) if (row := best(candidates, role))]
    students = [row for row in candidates if row["role"] not in (TEACHER, ALONE)]
    students.sort(key=lambda row: number(row.get(CHOICE)) or number(row.get(ACCURACY)) or 0.0, reverse=True)
    chosen = (students[: CURVES - len(chosen)] + chosen)[:CURVES]
    if not chosen:
        return ""
    settings = [*varying_settings(rows), *(["seed"] if len({row.get("seed") for row in rows}) > 1 else [])]
    figure = curves([traced[row["key"]] for row in chosen], [label(row, settings) for row in chosen])
    some = f"the best {len(chosen)} of {len(candidates)} runs" if len(chosen) < len(candidates) else ""
    return _section("Training", _figure("curves", figure, figures, some, "card wide"))


def _movers(cards: Sequence[Card], rows: Sequence[Row], figures: dict[str, Figure]) -> str:
    """The gradients of the best students that have several terms, up to `MOVERS` runs."""
    from kd.report.figures import label, movers

    recorded = {str(card["key"]): card for card in cards if len(_terms_of(card)) > 1}
    students = [row for row in rows if row["key"] in recorded]
    students.sort(key=lambda row: number(row.get(CHOICE)) or number(row.get(ACCURACY)) or 0.0, reverse=True)
    chosen = students[:MOVERS]
    if not chosen:
        return ""
    settings = [*varying_settings(rows), *(["seed"] if len({row.get("seed") for row in rows}) > 1 else [])]
    figure = movers([recorded[row["key"]] for row in chosen], [label(row, settings) for row in chosen])
    some = f"the best {len(chosen)} of {len(students)} runs" if len(chosen) < len(students) else ""
    return _section("Which term moves the student", _figure("movers", figure, figures, some, "card wide"))


def _terms_of(card: Card) -> set[str]:
    return {name for epoch in card.get("gradients") or () for name in epoch if name.startswith("grad_share/")}


def _figure(name: str, figure: Figure, figures: dict[str, Figure], heading: str, kind: str = "card") -> str:
    figures[name] = figure
    head = f"<h3>{html.escape(heading)}</h3>" if heading else ""
    height = int(figure.layout.height or 400)
    return f'<div class="{kind}">{head}<div class="figure" id="{name}" style="height:{height}px"></div></div>'


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{content}</section>"


def _table(rows: Sequence[Row], name: str, heading: str, note: str) -> str:
    columns, constants = layout(rows, METRICS_SHOWN)
    columns.sort(key=lambda column: column != "hash")  # first, or it is beyond the right edge
    numeric = {
        column
        for column in columns
        if all(number(row.get(column)) is not None for row in rows if row.get(column) is not None)
    }
    head = "".join(
        f'<th scope="col"{_num(column in numeric)}><button>{html.escape(_heading(column))}</button></th>'
        for column in columns
    )
    top = best(rows)
    body = "".join(
        ('<tr class="best">' if row is top else "<tr>")
        + "".join(_cell(column, row.get(column), column in numeric) for column in columns)
        + "</tr>"
        for row in rows
    )
    line = f"; the same in all: {constants_line(constants)}" if constants else ""
    return _section(
        heading,
        f'<p class="dim">{html.escape(note + line)}</p>'
        f'<div class="card wide"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
    )


def _heading(column: str) -> str:
    return "command and hash" if column == "hash" else title(column)


def _num(numeric: bool) -> str:
    return ' class="num"' if numeric else ""


def _cell(column: str, value: Any, numeric: bool) -> str:
    if column == "hash":
        hashes = value if isinstance(value, tuple) else (value,)
        return f"<td>{'<br>'.join(_command(str(one)) for one in hashes)}</td>"
    amount = number(value.mean if isinstance(value, Spread) else value)
    data = f' data-value="{amount!r}"' if numeric and amount is not None else ""
    return f"<td{_num(numeric)}{data}>{html.escape(cell(column, value))}</td>"


def _command(name: str) -> str:
    return f'<button class="copy" title="copy the command"><code>kd reproduce {html.escape(name)}</code></button>'


def _failed(sweep: Mapping[str, Any] | None) -> str:
    jobs = [job for job in (sweep or {}).get("jobs", ()) if job.get("status") == "failed"]
    if not jobs:
        return ""
    body = "".join(
        f'<tr><td class="text"><code>{html.escape(" ".join(map(str, job.get("overrides", ()))))}</code></td>'
        f'<td class="error">{html.escape(str(job.get("error") or "no reason was recorded"))}</td></tr>'
        for job in jobs
    )
    head = '<tr><th scope="col">job</th><th scope="col">error</th></tr>'
    table = f'<div class="card wide"><table id="failed"><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    return _section(f"Failed jobs ({len(jobs)})", table)
