from __future__ import annotations

import io

import pytest
from rich.console import Console

from kd.report.rows import Spread, collect, over_seeds
from kd.report.tables import cell, constants_line, layout, markdown, terminal, values
from tests.report.cards import STUDENT, card, family


def printed(rows, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(terminal(rows, width=width))
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("test/accuracy", 0.98765, "98.77"),
        ("test/accuracy", Spread(0.98, 0.0012, 3), "98.00 ± 0.12"),
        ("test/accuracy", Spread(0.98, None, 1), "98.00"),
        ("test/loss", 0.123456, "0.1235"),
        ("gain", -0.0042, "-0.42"),
        ("gain", Spread(0.0123, 0.001, 3), "+1.23 ± 0.10"),
        ("parameters", 1234567, "1,234,567"),
        ("samples", "all", "all"),
        ("samples", 1000, "1,000"),
        ("compression", 15.4048, "15.4x"),
        ("latency_ms_batch1", 0.21234, "0.212"),
        ("latency_ms_batch1", Spread(0.21234, 0.000998, 3), "0.212 ± 0.001"),
        ("drop", 0.0042, "0.42"),
        ("parameters", Spread(2034.3, 155.6, 3), "2,034 ± 156"),
        ("temperature", 4.0, "4"),
        ("alpha", 0.1, "0.1"),
        ("epochs", 200, "200"),
        ("config.fit.lr", 0.002, "0.002"),
        ("config.fit.nesterov", True, "True"),
        ("config.model.options.widths", [8, 16], "8, 16"),
        ("alpha", None, "-"),
    ],
)
def test_cells(column, value, text):
    assert cell(column, value) == text


def test_what_varies_is_a_column_and_what_does_not_is_said_once():
    columns, constants = layout(collect(family((1, 4), (0.9,), (0, 1))))
    assert columns[:4] == ["role", "model", "temperature", "seed"]
    assert {"test/accuracy", "test/f1", "gain", "parameters", "hash"} <= set(columns)
    assert constants["alpha"] == 0.9 and constants["epochs"] == 5 and constants["data"] == "mnist"
    assert not set(columns) & set(constants)
    assert constants_line(constants).startswith("data mnist, alpha 0.9, epochs 5, samples all, teacher 99.10 %")


def test_a_setting_without_a_name_of_its_own_becomes_a_column():
    columns, _ = layout(collect([card("Train", STUDENT, 0.9, lr=lr) for lr in (0.1, 0.01)]))
    assert "config.fit.lr" in columns


def test_a_headline_metric_stays_a_column_though_it_is_the_same():
    columns, constants = layout(collect([card("Train", STUDENT, 0.9, lr=lr) for lr in (0.1, 0.01)]))
    assert "test/accuracy" in columns and "test/accuracy" not in constants


def test_markdown_of_groups():
    lines = markdown(over_seeds(collect(family((4,), (0.9,), (0, 1))))).splitlines()
    assert lines[0].startswith("Same in all rows: data mnist, temperature 4, alpha 0.9") and lines[1] == ""
    assert lines[2].startswith("| role | model | seeds | accuracy % |")
    assert set(lines[3]) <= set("|:- ")
    assert len(lines) == 4 + 3
    assert lines[-1].startswith("| student distilled | seed_cnn_small | 2 | 96.99 ± 0.21 | ")
    assert lines[-1].count(" | ") == lines[2].count(" | ")


def test_markdown_holds_no_markup_of_a_card():
    made = [card("Train", STUDENT, 0.9, data=name) for name in ("a|b\nc", "<!-- /kd:table -->")]
    text = markdown(collect(made))
    assert "a\\|b c" in text and "<!--" not in text and "&lt;!-- /kd:table --&gt;" in text
    assert len(text.splitlines()) == len(markdown(collect([*made[:1], card("Train", STUDENT, 0.9)])).splitlines())


def test_the_terminal_does_not_read_markup():
    made = [card("Train", STUDENT, 0.9, data=name) for name in ("[red]x[/red]", "[link=http://y]z")]
    text = printed(collect(made), 200)
    assert "[red]x[/red]" in text and "[link=http://y]z" in text


def test_a_wide_terminal_has_all_columns():
    text = printed(collect(family((1, 4), (0.9,), (0, 1))), 250)
    assert "MACs" in text and "not shown" not in text and "same in all: data mnist" in text
    assert text.count("distilled") == 4


def test_few_rows_are_laid_on_their_side_rather_than_cut():
    text = printed(collect(family((4,), (0.9,), (0,))), 80)
    assert "not shown" not in text
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    for word in ("accuracy %", "precision %", "recall %", "F1 %", "parameters", "MACs", "bytes", "hash"):
        assert any(line.startswith(word) for line in text.splitlines()), word


def test_many_rows_lose_the_least_asked_for_columns_by_name():
    rows = over_seeds(collect(family((1, 2, 4, 8), (0.1, 0.5, 0.9), (0, 1, 2))))
    text = printed(rows, 80)
    assert "not shown for want of width: model, seeds" in " ".join(text.split())
    table = [line for line in text.splitlines() if line.startswith(("teacher ", "alone", "distilled"))]
    assert len(table) == len(rows)
    for row, line in zip(rows, table, strict=True):  # one line each, nothing folded
        shown = row["hash"][0] if isinstance(row["hash"], tuple) else row["hash"]
        assert shown in line and cell("test/accuracy", row["test/accuracy"]) in line


def test_a_column_of_numbers_and_a_word_is_text_throughout():
    rows = [
        {"model": "a", "samples": 1000, "test/accuracy": 0.5},
        {"model": "a", "samples": "all", "test/accuracy": 0.6},
    ]
    columns, data = values(rows)
    assert [line[columns.index("samples")] for line in data] == ["1,000", "all"]


def test_values_are_one_kind_a_column_and_hold_what_is_the_same_too():
    columns, data = values(over_seeds(collect(family((4,), (0.9,), (0, 1)))))
    made = [dict(zip(columns, line, strict=True)) for line in data]
    assert [line["role"] for line in made] == ["teacher", "student alone", "student distilled"]
    assert made[-1]["temperature"] == 4 and made[0]["temperature"] is None
    assert made[0]["test/accuracy"] == 0.991 and made[-1]["hash"].endswith(" +1")


def test_no_rows_are_an_empty_table():
    assert layout([]) == ([], {})
    assert printed([], 80).strip() == ""
