"""`kd bench sweep`: lone runs, ours and the floor, as whole commands."""

from __future__ import annotations

import sys

import pytest

from kd.benching.sweep import _grid, _summary, _timed, bench_sweep
from kd.config import jobs
from kd.errors import InputError, KDError
from tests.shelf import text

RESULT = {
    "lone": [{"wall_s": 10.0, "cpu_s": 20.0}, {"wall_s": 12.0, "cpu_s": 22.0}],
    "ours": {1: {"wall_s": 8.0, "cpu_s": 12.0}, 4: {"wall_s": 22.0, "cpu_s": 40.0}},
    "floor": {"wall_s": 20.0, "cpu_s": 38.0, "start_s": 4.0, "labels_s": 4.0, "students_s": [3.0, 3.0, 2.0, 4.0]},
    "ready_s": [5.0, 0.3, 0.2, 0.4],
}


def test_the_ratios_are_those_of_whole_commands():
    data, table = _summary(RESULT, [1, 4])
    assert data["ratios"]["b/c"] == 22 / 20 and data["ratios"]["a/b"] == 4 * 11 / 22
    assert data["ready_median_s"] == 0.3  # of the later jobs
    shown = text(table)
    assert "2 of them run" in shown and "0.73 of the floor for 1" in shown and "a student 3.00" in shown


def test_lone_runs_with_the_allocator_as_it_comes_have_a_ratio_of_their_own():
    data, table = _summary({**RESULT, "plain": [{"wall_s": 22.0, "cpu_s": 42.0}]}, [1, 4])
    assert data["ratios"]["plain/b"] == 4 * 22 / 22 and data["ratios"]["a/b"] == 4 * 11 / 22
    assert "1 of them run, with KD_MALLOC=system" in text(table)


def test_a_command_is_run_in_the_environment_that_is_asked_for():
    code = "import os, sys; sys.stdout.write(os.environ['KD_MALLOC'])"
    assert _timed([sys.executable, "-c", code], {"KD_MALLOC": "system"})["out"] == "system"


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (4, 4), (8, 8), (16, 16)])
def test_the_first_jobs_of_the_grid_are_asked_for(count, expected):
    assert len(jobs(_grid(count), multirun=True)[0]) == expected


@pytest.mark.parametrize("counts", [[], [0], [17], [5]])
def test_a_number_of_jobs_that_the_grid_has_not_is_refused(counts):
    with pytest.raises(InputError, match="--jobs"):
        _grid(counts[0]) if counts == [5] else bench_sweep([], 1, 1, 1, counts)


def test_a_command_is_timed_with_all_that_it_started():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(4_000_000))'])"
    found = _timed([sys.executable, "-c", code])
    assert found["cpu_s"] > 0.05 and found["wall_s"] > 0.05


def test_a_command_that_fails_is_named_in_one_line():
    with pytest.raises(KDError, match=r"a command of the benchmark failed \(oh\)"):
        _timed([sys.executable, "-c", "import sys; sys.stderr.write('first\\noh\\n'); sys.exit(2)"])


@pytest.mark.slow
def test_a_small_sweep_is_measured_three_ways():
    nets = ["teacher.name=cifar_resnet8", "student.name=cifar_resnet8"]
    data, _ = bench_sweep(nets, steps=1, epochs=1, lone=1, counts=[1, 2])
    assert set(data["ratios"]) == {"b/c", "a/b", "plain/b", "b/c cpu", "a/b cpu", "plain/b cpu"}
    assert len(data["floor"]["students_s"]) == 2 and len(data["ready_s"]) == 2
