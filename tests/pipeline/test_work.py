"""What children are asked to do."""

from __future__ import annotations

import optuna
import pytest
import torch

from kd.errors import InputError
from kd.pipeline.work import check_jobs, run_job, run_trial
from kd.store import Store
from kd.training.pruning import Trial, journal, quiet, report
from tests.pipeline.small import planned


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_a_job_runs_under_the_threads_it_is_given_and_its_card_says_so(tmp_path):
    one, run = planned(tmp_path, "pipeline=baseline")
    told = []
    assert run_job(one, run, "5" * 16, 1, told.append) == ["student"]
    found = Store(tmp_path).get(one.key)
    assert found is not None
    assert found.card["fingerprints"]["environment"]["threads"] == torch.get_num_threads() == 1
    assert found.card["run"]["sweep"] == "5" * 16
    assert [event["event"] for event in told if event["event"] in ("start", "done")] == ["start", "done"]


@pytest.mark.parametrize("threads", [0, -1, True, "2"])
def test_threads_that_are_no_number_are_refused_before_anything_runs(threads, tmp_path):
    one, run = planned(tmp_path)
    with pytest.raises(InputError, match="threads="):
        run_job(one, run, None, threads, lambda event: None)
    assert not (tmp_path / "artifacts").exists()


def test_the_last_stage_alone_is_under_a_trials_eye_and_stores_nothing_if_it_is_given_up(tmp_path):
    quiet()
    study = optuna.create_study(study_name="s", storage=journal(tmp_path / "s.log"), direction="maximize")
    one, run = planned(tmp_path / "store")

    def asked():
        return Trial(str(tmp_path / "s.log"), "s", study.ask().number, "val/accuracy", "hyperband", 2)

    report(asked().open(), {1: 2.0, 2: 2.0})  # better than anything can be
    told = []
    assert run_trial(one, run, "5" * 16, asked(), told.append) == "given up after epoch 1 of 2"
    assert [event["stage"] for event in told if event["event"] == "done"] == ["teacher", "labels"]
    assert list(study.trials[1].intermediate_values) == [1]
    assert Store(tmp_path / "store").get(one.key) is None
    assert run_trial(one, run, None, None, told.append) is None
    assert Store(tmp_path / "store").get(one.key) is not None


def test_a_rehearsal_finds_what_cannot_run_and_makes_nothing(tmp_path):
    good, run = planned(tmp_path)
    bad, _ = planned(tmp_path, "student.name=vit_tiny_patch16_224")
    check_jobs([good], run, lambda event: None)
    with pytest.raises(InputError, match="vit_tiny_patch16_224"):
        check_jobs([good, bad], run, lambda event: None)
    assert not (tmp_path / "artifacts").exists() and not (tmp_path / "work").exists()
