"""`kd pick` as it is typed: the table, the line that ships the choice, data, and one line where nothing fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd.cli import main
from kd.errors import InputError
from kd.picking import SHOWN, lines, pick
from kd.store import short
from tests.report.cards import compression
from tests.shelf import shelve


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shelve(tmp_path_factory.mktemp("picked"), compression()).root


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["pick", *map(str, words)])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_the_choice_is_the_first_line_and_the_last_says_how_to_ship_it(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = typed(capsys, "--store", store, "--max-bytes", "5k", "--max-drop", "3")
    lines = [line.rstrip() for line in out.splitlines()]
    head = next(i for i, line in enumerate(lines) if line.startswith("role"))
    assert code == 0 and lines[head + 1].split()[0] == "exported" and lines[head + 1].endswith("chosen")
    assert lines[head + 2].split()[0] == "exported" and "fits; 0.80 points less" in lines[head + 2]
    assert "points lost: " in out and "bytes: " in out
    chosen = next(word for word in lines[head + 1].split() if len(word) == 16)
    assert lines[-1] == f"kd export {chosen} out/"
    assert "the file that is written may differ" not in out  # it is the file


def test_of_a_network_it_says_that_its_file_is_still_to_be_made(store: Path) -> None:
    weighed, _ = pick([], {"--max-bytes": "20k"}, str(store))
    said = lines(weighed)
    assert weighed.fitting[0]["role"] == "recovered" and any("the file that is written may differ" in x for x in said)
    assert said[0] == "6 of 9 fit; accuracy and what is lost of it are those on validation" and SHOWN > 9


def test_as_data(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, "--store", store, "--max-bytes", "0.05x", "--json")
    found = json.loads(out)
    assert code == 0 and found["limits"] == {"--max-bytes": "0.05x"} and found["by"] == "val/accuracy"
    assert found["choice"] == found["models"][0] and found["ship"] == f"kd export {found['choice']['hash']} out/"
    assert [row["fits"] for row in found["models"]] == sorted((r["fits"] for r in found["models"]), reverse=True)
    assert len(found["models"]) == 9 and found["choice"]["n"] == 3 and isinstance(found["choice"]["bytes"], float)


def test_words_choose_the_runs_as_for_a_report(store: Path) -> None:
    made = compression()
    one = next(c for c in made if c["stage"] == "prune_recover")
    weighed, _ = pick([short(one["key"])], {"--max-bytes": "1M"}, str(store))
    roles = sorted(row["role"] for row in [*weighed.fitting, *weighed.others])
    assert roles == ["pruned", "recovered", "student alone", "student distilled", "teacher"]
    assert all(row["n"] == 1 for row in weighed.fitting if row["role"] in ("pruned", "recovered"))


def test_nothing_within_a_budget_is_one_line_and_exit_2(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = typed(capsys, "--store", store, "--max-bytes", "1k")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "no model is within --max-bytes 1k; the closest is exported (export) " in err and ": 945 over" in err


def test_without_a_limit_or_a_run_it_is_one_line(store: Path, tmp_path: Path) -> None:
    nothing: dict[str, str | None] = {"--max-bytes": None}
    with pytest.raises(InputError, match="give a limit: --max-bytes, --max-macs, --max-ms, --max-drop, "):
        pick([], nothing, str(store))
    with pytest.raises(InputError, match="there is no run in"):
        pick([], {"--max-bytes": "1k"}, str(tmp_path))
