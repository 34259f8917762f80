"""`kd bench step`: four loops of the same steps, and ratios within one round."""

from __future__ import annotations

import pytest

from kd.benching.step import LOOPS, RATIOS, WARM, Clock, _summary, bench_step
from kd.errors import InputError
from tests.shelf import text


def test_a_round_times_all_four_loops_on_the_same_steps():
    data, table = bench_step(["fit.batch_size=8", "run.workers=0"], rounds=1, steps=2)
    assert set(data) == {"steps_per_second", "ratios", "seconds", "steps"} and data["steps"] == 2
    assert set(data["seconds"]) == set(LOOPS) and all(len(s) == 1 and s[0] > 0 for s in data["seconds"].values())
    assert set(data["ratios"]) == {"b/a", "d/b", "c/b"}
    shown = text(table)
    assert all(line in shown for line in LOOPS.values()) and "(b)/(a)" in shown


def test_a_term_that_asks_the_teacher_again_has_no_loop_of_stored_labels():
    data, table = bench_step(["data=synthetic", "fit.batch_size=8", "loss=[ce,kd,diito]"], steps=2, rounds=1)
    assert set(data["steps_per_second"]) == {"a", "b", "c"} and set(data["ratios"]) == {"b/a", "c/b"}
    assert "a term runs the teacher again" in text(table)


def test_the_clock_starts_after_the_warm_up_and_stops_after_the_steps(monkeypatch):
    now = iter([10.0, 12.5])
    monkeypatch.setattr("kd.benching.step.time.perf_counter", lambda: next(now))
    clock = Clock(3)
    for _ in range(WARM + 3 + 5):
        clock.tick()
    assert clock.seconds == 2.5


def test_ratios_are_medians_over_rounds_so_that_a_slow_round_moves_none():
    seconds = {"a": [1.0, 10.0, 1.0], "b": [2.0, 20.0, 2.0], "c": [4.0, 40.0, 4.0], "d": [1.0, 10.0, 1.0]}
    data, table = _summary(seconds, 10)
    assert data["ratios"] == {"b/a": 0.5, "d/b": 2.0, "c/b": 0.5}
    assert data["steps_per_second"] == {"a": 10.0, "b": 5.0, "c": 2.5, "d": 10.0}
    lines = [line.split() for line in text(table).splitlines()]
    assert lines[1][-3:] == ["10", "1", "10"]
    assert [line for line in lines if line[0] == "(b)/(a)"] == [["(b)/(a)", "target", "0.9", "0.50", "0.50", "0.50"]]
    assert len(RATIOS) == len(data["ratios"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pipeline=baseline"], "compares with a teacher; use pipeline=distil"),
        (["fit.batch_size=64"], r"20 \+ 2 steps of 64 need 1408 samples, digits has 1197: lower --steps or"),
        (["tempratur=3"], "did you mean 'temperature'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, said):
    with pytest.raises(InputError, match=said):
        bench_step(words, rounds=1, steps=2)
