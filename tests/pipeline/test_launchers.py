"""How jobs are spread: the same keys and, on one device, the same bits whatever the launcher; each fails alone."""

from __future__ import annotations

import os
import signal

import pytest

import kd.launch
from kd.errors import InputError
from kd.launch import launch
from kd.pipeline import launchers, work
from kd.pipeline.launchers import Basic, Joblib, Packed, Submitit, Task, packs_of, shared_plans, split_words
from kd.store import Store
from tests.pipeline.small import WORDS, planned

GRID = ["temperature=1,4", "alpha=0.5,0.9"]
VIEWS = ["data.augment=shift", "labels.views=2"]


def ran(store, *words, multirun=True):
    plans, outcomes, sweep, _ = launch([f"run.store={store}", *WORDS, *words], multirun, None)
    return plans, outcomes, sweep


def results(store, plans):
    found = [Store(store).get(p.key) for p in plans]
    return [a and (a.card["weights"], a.card["metrics"], a.card["trace"]) for a in found]


@pytest.fixture(scope="module")
def lone(tmp_path_factory):
    """The grid, each job in a process of its own."""
    folder = tmp_path_factory.mktemp("lone")
    plans, outcomes, _ = ran(folder, *GRID, *VIEWS)
    assert [o["status"] for o in outcomes] == ["done"] * 4
    return folder, plans, results(folder, plans)


def test_packed_jobs_have_the_keys_and_the_bits_of_lone_ones(lone, tmp_path):
    plans, outcomes, _ = ran(tmp_path, *GRID, *VIEWS, "hydra/launcher=packed", "hydra.launcher.together=3")
    assert [p.key for p in plans] == [p.key for p in lone[1]]
    assert [o["status"] for o in outcomes] == ["done"] * 4
    assert results(tmp_path, plans) == lone[2]
    assert [o["ran"] for o in outcomes] == [["teacher", "labels", "student"], *[["student"]] * 3]
    again = ran(tmp_path, *GRID, *VIEWS, "hydra/launcher=packed")[1]
    assert [o["status"] for o in again] == ["hit"] * 4


def test_packed_jobs_of_several_seeds_and_students_and_without_a_teacher(tmp_path):
    words = ("pipeline=distil,baseline", "seed=0,1", "+student.options.widths=[2,4,4,4],[3,4,4,4]")
    plans, outcomes, _ = ran(tmp_path / "a", *words, "hydra/launcher=packed")
    assert [o["status"] for o in outcomes] == ["done"] * 8
    one = plans[5]
    alone = ran(tmp_path / "b", *(w for w in one.overrides if "store" not in w), multirun=False)[0]
    assert alone[0].key == one.key
    assert results(tmp_path / "a", [one]) == results(tmp_path / "b", alone)


def test_one_job_that_diverges_stops_alone(tmp_path):
    words = ("fit.lr=0.005,1e30", "fit.optimiser={_target_:torch.optim.SGD}", "hydra/launcher=packed")
    plans, outcomes, sweep = ran(tmp_path, *words)
    assert [o["status"] for o in outcomes] == ["done", "failed"]
    assert "not finite" in outcomes[1]["error"]
    record = next(s for s in Store(tmp_path).sweeps() if s["id"] == sweep)
    assert [job["status"] for job in record["jobs"]] == ["done", "failed"]
    assert results(tmp_path, plans)[1] is None and not (Store(tmp_path).folder(plans[1].key)).exists()


def test_a_teacher_that_fails_is_tried_once_and_named_for_each_job(tmp_path):
    words = ("temperature=1,4", "teacher_fit.lr=1e30", "teacher_fit.optimiser={_target_:torch.optim.SGD}")
    _, outcomes, _ = ran(tmp_path, *words, "hydra/launcher=packed")
    assert [o["status"] for o in outcomes] == ["failed"] * 2
    assert outcomes[0]["error"] == outcomes[1]["error"]


def test_jobs_with_one_key_are_run_once(tmp_path):
    _, outcomes, _ = ran(tmp_path, "temperature=4,4.0", "hydra/launcher=packed")
    assert [o["status"] for o in outcomes] == ["done", "hit"]


def packed_and_killed(packs, sweep, tell):
    """`run_packed`, but its process is killed once the first job has ended."""
    from kd.pipeline.work import run_packed

    def told(event):
        tell(event)
        if event["event"] == "ended":
            os.kill(os.getpid(), signal.SIGKILL)

    return run_packed([packs[0][:1], packs[0][1:], *packs[1:]], sweep, told)


def test_what_the_end_of_the_packed_process_leaves_is_run_alone(lone, tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "run_packed", packed_and_killed)
    plans, outcomes, _ = ran(tmp_path, *GRID, *VIEWS, "hydra/launcher=packed")
    assert [o["status"] for o in outcomes] == ["done"] * 4
    assert results(tmp_path, plans) == lone[2]


def test_joblib_runs_several_processes_and_divides_the_threads(lone, tmp_path):
    plans, outcomes, _ = ran(tmp_path, *GRID, *VIEWS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert [o["status"] for o in outcomes] == ["done"] * 4 and [p.key for p in plans] == [p.key for p in lone[1]]
    threads = {a.card["stage"]: a.card["fingerprints"]["environment"]["threads"] for a in Store(tmp_path)}
    assert threads["student"] == max(1, launchers.processors() // 2)


@pytest.mark.slow
def test_submitit_runs_each_job_as_a_job_of_its_own(lone, tmp_path):
    pytest.importorskip("submitit")
    words = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "fit.lr=0.005,1e30",
             "fit.optimiser={_target_:torch.optim.SGD}")  # fmt: skip
    plans, outcomes, _ = ran(tmp_path, *VIEWS, *words)
    assert [o["status"] for o in outcomes] == ["done", "failed"] and "not finite" in outcomes[1]["error"]
    assert results(tmp_path, plans)[0] is not None


def test_jobs_are_packed_by_the_batches_that_they_see(tmp_path):
    found = [planned(tmp_path, *words) for words in (["seed=0"], ["seed=1"], ["seed=0", "alpha=0.1"], ["alpha=0.2"])]
    tasks = [Task(*one) for one in found]
    assert list(packs_of(tasks, 16)) == [[0, 2, 3], [1]]
    assert list(packs_of(tasks, 2)) == [[0, 2], [3], [1]]
    assert [len(task.plan.nodes) for task in shared_plans(tasks)] == [2]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ([], Basic()),
        (["hydra/launcher=basic"], Basic()),
        (["hydra/launcher=packed"], Packed()),
        (["hydra.launcher.together=2", "+hydra/launcher=packed"], Packed(2)),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"], Joblib(3)),
        (["hydra/launcher=submitit_slurm", "hydra.launcher.slurm_partition=gpu", "hydra.launcher.timeout_min=60"],
         Submitit("slurm", None, {"slurm_partition": "gpu", "timeout_min": 60})),
    ],
)  # fmt: skip
def test_a_launcher_and_its_options_are_taken_out_of_the_words(words, meant):
    if isinstance(meant, Submitit):
        pytest.importorskip("submitit")
    assert split_words(["alpha=0.5", *words]) == (["alpha=0.5"], meant)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra/launcher=pakced"], "hydra/launcher=pakced: no such launcher; did you mean 'packed'"),
        (["hydra/launcher=packed", "hydra.launcher.n_jobs=3"], "hydra.launcher.n_jobs is not an option of packed"),
        (["hydra/launcher=packed", "hydra.launcher.together=0"], "hydra.launcher.together=0 is out of range"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=two"], "hydra.launcher.n_jobs='two' is no whole number"),
        (["hydra.launcher.together=2"], "hydra.launcher.together is not an option of basic"),
    ],
)
def test_what_is_no_launcher_or_option_is_refused(words, said):
    with pytest.raises(InputError) as caught:
        split_words(words)
    assert str(caught.value).startswith(said)


def test_a_launcher_is_no_part_of_a_sweeps_name_or_of_its_record(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(kd.launch, "record_sweep", lambda store, sweep, words, *more: seen.update({sweep: words}))
    ran(tmp_path, "temperature=4", "hydra/launcher=packed")
    assert not any(word.startswith("hydra") for words in seen.values() for word in words) and seen


def test_a_packed_child_is_asked_by_a_function_that_it_can_import():
    assert work.run_packed.__module__ == "kd.pipeline.work"
