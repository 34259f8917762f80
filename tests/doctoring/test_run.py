"""`kd doctor run`: lines, data and exit codes; a sweep's jobs in one table, what they share counted once."""

from __future__ import annotations

import json

import pytest

from kd.cli import main
from kd.doctoring.run import LOOKED_AT, _spread, as_lines, doctor_run, failed, merge
from kd.doctoring.verdicts import Check
from tests.pipeline.small import WORDS


def kd(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(["doctor", *words])
    told = capsys.readouterr()
    return end.value.code, told.out, told.err


def test_lines_and_data_say_the_same_and_the_exit_code_what_they_come_to(capsys):
    code, out, _ = kd(capsys, "run", *WORDS)
    assert code == 0 and out.splitlines()[0].startswith("ok    stages                teacher ")
    assert "warn  teacher accuracy      the teacher is not trained yet" in out
    code, out, _ = kd(capsys, "run", *WORDS, "loss.kd.weight=1e39", "--json")
    rows = json.loads(out)
    assert code == 1 and {"state", "check", "said"} == set(rows[0])
    assert [row["check"] for row in rows if row["state"] == "FAIL"] == ["loss", "gradient shares"]


def test_what_is_not_right_is_refused_with_2(capsys):
    code, out, err = kd(capsys, "run", "temprature=3")
    assert (code, out) == (2, "") and "temperature" in err
    code, _, err = kd(capsys, "rnu")
    assert code == 2 and "'rnu' is no command" in err and "run" in err


def test_a_sweep_is_one_table_and_shared_stages_count_once():
    words = [*WORDS, "temperature=1,4", "alpha=0.5,0.9"]
    found = doctor_run(words, True, None)
    assert not failed(found)
    named = {check.name: (check, job) for check, job in found}
    assert "6 stages of 4 jobs, shared ones once" in named["sweep time"][0].said  # a teacher, labels, four students
    assert named["teacher frozen"][1] == "" and named["stages"][1] == "temperature=1 alpha=0.5"
    assert any(line.startswith("ok    sweep disk ") for line in as_lines(found))


def test_where_jobs_differ_the_worst_is_shown_with_its_name():
    good, bad = Check("ok", "loss", "a"), Check("warn", "loss", "b")
    assert merge([[good], [good]], ["x", "y"]) == [(good, "")]
    assert merge([[good], [bad], [Check("warn", "loss", "c")]], ["x", "y", "z"]) == [
        (Check("warn", "loss", "b (2 of 3 jobs)"), "y")
    ]
    assert merge([[good], [Check("FAIL", "config", "no")]], ["x", "y"]) == [
        (good, "x"), (Check("FAIL", "config", "no"), "y"),
    ]  # fmt: skip


def test_of_a_large_sweep_some_jobs_are_looked_at_from_first_to_last():
    assert _spread(3) == [0, 1, 2]
    many = _spread(1000)
    assert len(many) == LOOKED_AT and (many[0], many[-1]) == (0, 999)
