"""Rows or groups as a terminal table or a markdown table: what varies is a column, what does not is said once above."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kd.report.rows import Row, Spread, dial_names, is_measured, number, orders, same, varying_settings

if TYPE_CHECKING:
    from rich.console import Group

METRICS = ("test/accuracy", "test/precision", "test/recall", "test/f1")
# Shown as a column even where every row holds the same value: they are what the table is read for.
KEPT = (*METRICS, "published", "verdict", "gain", "drop", "marks", "hash", "why")
TITLES = {
    "test/accuracy": "accuracy %",
    "test/accuracy_top5": "top-5 %",
    "test/precision": "precision %",
    "test/recall": "recall %",
    "test/f1": "F1 %",
    "test/loss": "test loss",
    "test/ece": "ECE",
    "test/agreement": "agreement %",
    "val/accuracy": "val accuracy %",
    "val/f1": "val F1 %",
    "val/loss": "val loss",
    "teacher/accuracy": "teacher %",
    "before/accuracy": "before %",
    "alone/accuracy": "alone %",
    "gain": "gain (points)",
    "drop": "lost (points)",
    "why": "",
    "published": "published %",
    "compression": "smaller",
    "macs": "MACs",
    "gzip_bytes": "gzip bytes",
    "activation_bytes": "activation bytes",
    "latency_ms_batch1": "ms (batch 1)",
    "latency_ms_batch64": "ms (batch 64)",
    "wall_s": "wall s",
    "n": "seeds",
}
# What a narrow terminal does without, first to go first.
_SPARE: tuple[str, ...] = ("activation_bytes", "gzip_bytes", "nonzero")
_SPARE += ("latency_ms_batch64", "latency_ms_batch1", "macs", "bytes", "test/recall", "test/precision")
_SPARE += ("parameters", "test/f1", "n", "seed")
_TOLD = ("teacher", "way", "loss")  # said where they tell rows apart
_WHOLE = ("role", "hash")
_SHARES = ("accuracy", "accuracy_top5", "precision", "recall", "f1", "agreement")
_COUNTS = ("parameters", "nonzero", "macs", "bytes", "gzip_bytes", "activation_bytes", "samples", "step")
_COMPRESSED = ("nonzero", "gzip_bytes", "activation_bytes")  # worth a column beside what was compressed


def title(column: str) -> str:
    """What stands above a column.

    >>> title("test/f1"), title("config.fit.lr"), title("train/accuracy")
    ('F1 %', 'fit.lr', 'train/accuracy %')
    """
    if column in TITLES:
        return TITLES[column]
    return f"{column} %" if _is_share(column) else column.removeprefix("config.")


def cell(column: str, value: Any) -> str:
    """A value as people read it; a group's spread as mean ± sample standard deviation.

    >>> cell("test/accuracy", Spread(0.98123, 0.001, 3)), cell("parameters", 93322), cell("gain", 0.0123)
    ('98.12 ± 0.10', '93,322', '+1.23')
    >>> cell("hash", ("0123456789abcdef", "f" * 16)), cell("temperature", 4.0), cell("alpha", None)
    ('0123456789abcdef +1', '4', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, Spread):
        mean = cell(column, value.mean)
        if value.sd is None:
            return mean
        places = len(mean.partition(".")[2])  # of a time, whose digits are counted: no more than the mean has
        return f"{mean} ± {f'{value.sd:.{places}f}' if _is_time(column) else cell(column, value.sd).lstrip('+')}"
    if isinstance(value, tuple) and column == "hash":
        return f"{value[0]} +{len(value) - 1}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(column, item) for item in value)
    amount = number(value)
    return str(value) if amount is None else _figure(column, amount)


def _figure(column: str, amount: float) -> str:
    if column == "gain":
        return f"{100 * amount:+.2f}"
    if _is_share(column) or column in ("published", "drop"):
        return f"{100 * amount:.2f}"
    if column == "compression":
        return f"{amount:.1f}x"
    if column in _COUNTS:
        return f"{amount:,.0f}"
    if _is_time(column):
        return f"{amount:.3g}" if amount < 1000 else f"{amount:,.0f}"
    return f"{amount:.4f}" if "/" in column else f"{amount:.6g}"


def _is_time(column: str) -> bool:
    return column.startswith("latency") or column == "wall_s"


def _is_share(column: str) -> bool:
    return "/" in column and column.rpartition("/")[2] in _SHARES


def layout(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> tuple[list[str], dict[str, Any]]:
    """The columns to show, and the settings that are the same in every row that has them.

    >>> layout([{"model": "a", "test/accuracy": 0.5}, {"model": "b", "test/accuracy": 0.6}])
    (['model', 'test/accuracy'], {})
    """
    dials = [name for name in dial_names(rows) if name != "seed"]
    leaves = [column for column in varying_settings(rows) if column.startswith("config.")]
    # A group says over how many seeds it is, a run which one it had.
    seeds = "n" if any(row.get("n") is not None for row in rows) else "seed"
    order = [
        "role",
        "step",
        "after",
        "model",
        "data",
        "teacher",
        "way",
        "loss",
        *dials,
        "epochs",
        "samples",
        *leaves,
        seeds,
    ]
    order += [
        *(m for m in metrics if m in METRICS),
        "published",
        "verdict",
        "gain",
        "drop",
        "teacher/accuracy",
        "before/accuracy",
        "marks",
        *metrics,
        "parameters",
        "nonzero",
        "compression",
    ]
    order += [
        "macs",
        "bytes",
        "gzip_bytes",
        "activation_bytes",
        "latency_ms_batch1",
        "latency_ms_batch64",
        "hash",
        "why",
    ]
    columns: list[str] = []
    constants: dict[str, Any] = {}
    for column in dict.fromkeys(order):
        values = [row[column] for row in rows if row.get(column) is not None]
        if not values and column not in leaves:
            continue
        if column in _COMPRESSED and not any("step" in row for row in rows):
            continue
        if column == "after" and not orders(rows):
            continue
        kept = column in KEPT or column in leaves or len(rows) == 1
        if kept or len({_compare(column, value) for value in values}) > 1:
            columns.append(column)
        elif column not in _TOLD:
            constants[column] = values[0]
    return columns, constants


def _compare(column: str, value: Any) -> str:
    return cell(column, value) if isinstance(value, Spread) else same(value)


def constants_line(constants: dict[str, Any]) -> str:
    """What is the same in all rows, in one line.

    >>> constants_line({"data": "mnist", "epochs": 5, "teacher/accuracy": 0.99})
    'data mnist, epochs 5, teacher 99.00 %'
    """
    parts = []
    for column, value in constants.items():
        name = title(column)
        unit = " %" if name.endswith(" %") else ""
        parts.append(f"{name.removesuffix(' %')} {cell(column, value)}{unit}")
    return ", ".join(parts)


def terminal(
    rows: Sequence[Row], metrics: Sequence[str] = METRICS, width: int | None = None, keep: Sequence[str] = ()
) -> Group:
    """The rows for `rich.print`: one line of what is the same, then the table.

    Where the table is wider than ``width`` (the terminal), a few rows are laid on their side, so that nothing is lost;
    of many rows the least asked-for columns are left out, and named, but for those to ``keep``.
    """
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    room = width or Console().width
    columns, constants = layout(rows, metrics)
    line = constants_line(constants)
    # Text, not str: a name in a card may hold what rich would read as markup.
    parts: list[Any] = [Text(f"same in all: {line}", style="dim")] if line else []
    cells = [[title(column) for column in columns], *([_brief(c, row.get(c)) for c in columns] for row in rows)]
    turned = [list(column) for column in zip(*cells, strict=True)]
    side = columns and len(cells) <= len(columns) and _width(cells) > room >= _width(turned)
    left_out = []
    told = len({(row.get("role"), row.get("model")) for row in rows}) == len({row.get("role") for row in rows})
    # The role tells the model where each role has but one.
    spares = [name for name in (*_SPARE, *(("model",) if told else ())) if name not in keep]
    while not side and _width(cells) > room and (spare := next((c for c in spares if c in columns), None)):
        at = columns.index(spare)
        left_out.append(title(columns.pop(at)))
        cells = [texts[:at] + texts[at + 1 :] for texts in cells]
    head, *body = turned if side else cells
    table = Table(box=None, header_style="bold", pad_edge=False)
    for at, name in enumerate(head):
        right = at > 0 if side else _justify(columns[at], rows) == "right"
        table.add_column(Text(name), justify="right" if right else "left", no_wrap=not side and columns[at] in _WHOLE)
    for texts in body:
        table.add_row(*map(Text, texts))
    parts.append(table)
    if left_out:
        parts.append(Text(f"not shown for want of width: {', '.join(reversed(left_out))}", style="dim"))
    return Group(*parts)


def _brief(column: str, value: Any) -> str:
    return cell(column, value).removeprefix("student ") if column == "role" else cell(column, value)


def _width(cells: Sequence[Sequence[str]]) -> int:
    """What a table needs: the longest cell of each column, its heading broken between words, and two spaces between."""
    head, *body = cells
    widths = [max(map(len, (*name.split(), *column))) for name, *column in zip(head, *body, strict=True)]
    return sum(widths) + 2 * max(len(widths) - 1, 0)


def markdown(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> str:
    r"""The rows as a markdown table, with what is the same in all of them above it.

    >>> print(markdown([{"model": "a|b", "test/accuracy": 0.5}, {"model": "c", "test/accuracy": 0.6}]))
    | model | accuracy % |
    | :-- | --: |
    | a\|b | 50.00 |
    | c | 60.00 |
    """
    columns, constants = layout(rows, metrics)
    line = constants_line(constants)
    head = [f"Same in all rows: {_plain(line)}.", ""] if line else []
    rule = ["--:" if _justify(column, rows) == "right" else ":--" for column in columns]
    body = [[_plain(cell(column, row.get(column))) for column in columns] for row in rows]
    lines = [[_plain(title(column)) for column in columns], rule, *body]
    return "\n".join(head + [f"| {' | '.join(cells)} |" for cells in lines])


def values(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> tuple[list[str], list[list[float | str | None]]]:
    """The same table as bare values, for a program: column names, then a number, a text or None for each cell.

    A column is of one kind: one that holds a text anywhere (samples: 1000 and "all") is text throughout.

    >>> values([{"model": "a", "test/accuracy": 0.5}, {"model": "b", "test/accuracy": Spread(0.6, None, 1)}])
    (['model', 'test/accuracy'], [['a', 0.5], ['b', 0.6]])
    """
    columns, constants = layout(rows, metrics)
    columns = [*columns, *constants]
    data = [[_bare(column, row.get(column)) for column in columns] for row in rows]
    texts = {i for line in data for i, value in enumerate(line) if isinstance(value, str)}
    return columns, [
        [
            cell(columns[i], value) if i in texts and isinstance(value, (int, float)) else value
            for i, value in enumerate(line)
        ]
        for line in data
    ]


def _bare(column: str, value: Any) -> float | str | None:
    amount = number(value)
    return amount if amount is not None or value is None else cell(column, value)


def _justify(column: str, rows: Sequence[Row]) -> Any:
    numeric = is_measured(column) or all(number(row.get(column)) is not None for row in rows if row.get(column))
    return "right" if numeric else "left"


def _plain(text: str) -> str:
    """Text that ends no cell, starts no line and opens no tag (a table marker is a comment)."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
