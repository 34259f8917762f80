"""A training under the eye of a trial: each epoch is reported once, and who is given up leaves nothing behind."""

from __future__ import annotations

import json
import pickle

import optuna
import pytest
from optuna.trial import TrialState

from kd.errors import KDError
from kd.models import weights_digest
from kd.training import pruning
from kd.training.callbacks import Pruning
from kd.training.pruning import Pruned, Trial, journal, report
from kd.training.settings import Fit
from tests.training.tiny import fitted

SGD = {"_target_": "torch.optim.SGD"}
FIT = Fit(epochs=3, batch_size=4, lr=0.1, optimiser=SGD)


@pytest.fixture
def study(tmp_path):
    """A study in its file."""
    pruning.quiet()
    return optuna.create_study(study_name="s", storage=journal(tmp_path / "s.log"), direction="maximize")


def asked(study, tmp_path, pruner="hyperband", epochs=2):
    """A trial that runs now, as its child process would be told of it."""
    return Trial(str(tmp_path / "s.log"), "s", study.ask().number, "val/accuracy", pruner, epochs)


def known(study, number=-1):
    return study.get_trials()[number].intermediate_values


def test_what_a_child_is_told_is_plain_data(study, tmp_path):
    trial = asked(study, tmp_path)
    assert pickle.loads(pickle.dumps(trial)) == trial and trial.open().number == trial.number


def test_an_epoch_is_reported_once(study, tmp_path):
    trial = asked(study, tmp_path)
    assert not report(trial.open(), {1: 0.5})
    assert not report(trial.open(), {1: 0.9, 2: 0.6})  # with warnings as errors: Optuna would say so
    assert known(study) == {1: 0.5, 2: 0.6}
    assert not report(trial.open(), {})


def test_hyperband_gives_up_who_is_worse_after_the_first_epoch_and_counts_who_was_only_read_back(study, tmp_path):
    assert not report(asked(study, tmp_path).open(), {1: 0.5, 2: 0.6})
    study.tell(0, 0.6)
    assert report(asked(study, tmp_path).open(), {1: 0.4})
    assert not report(asked(study, tmp_path).open(), {1: 0.55})


def test_the_median_gives_up_the_lower_half_once_five_trials_are_done(study, tmp_path):
    for value in (0.1, 0.2, 0.3, 0.4, 0.5):
        number = study.ask().number
        report(Trial(str(tmp_path / "s.log"), "s", number, "val/accuracy", "median", 9).open(), {1: value})
        study.tell(number, value)
    assert report(asked(study, tmp_path, "median").open(), {1: 0.25})
    assert not report(asked(study, tmp_path, "median").open(), {1: 0.35})


# --- the callback


def test_a_training_reports_each_epoch_and_its_weights_are_those_of_one_that_does_not(study, tmp_path):
    plain, straight = fitted(tmp_path / "plain", FIT)
    watched, trace = fitted(tmp_path / "watched", FIT, watching=[Pruning(asked(study, tmp_path))])
    assert weights_digest(plain.student.net) == weights_digest(watched.student.net)
    assert trace.epochs == straight.epochs
    assert known(study) == {epoch["epoch"] + 1: epoch["val/accuracy"] for epoch in trace.epochs}


def test_a_training_that_is_given_up_ends_there(study, tmp_path):
    report(asked(study, tmp_path).open(), {1: 2.0, 2: 2.0})
    with pytest.raises(Pruned, match="given up after epoch 1 of 3") as ended:
        fitted(tmp_path, FIT, watching=[Pruning(asked(study, tmp_path))])
    assert isinstance(ended.value, KDError)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "val/accuracy" in line] == [0] and list(known(study)) == [1]


def test_the_last_epoch_is_not_given_up_for_there_is_nothing_to_save(study, tmp_path):
    report(asked(study, tmp_path, epochs=1).open(), {1: 2.0})
    fit = Fit(epochs=1, batch_size=4, optimiser=SGD)
    _, trace = fitted(tmp_path, fit, watching=[Pruning(asked(study, tmp_path, epochs=1))])
    assert len(trace.epochs) == 1


def test_another_trial_that_resumes_a_training_hears_of_its_earlier_epochs(study, tmp_path):
    class Stops(Pruning):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise Pruned("enough")

    class Resumes(Pruning):
        pass

    for kind in (Stops, Resumes):
        kind.__name__ = "Pruning"  # a state is kept under its class's name
    with pytest.raises(Pruned):
        fitted(tmp_path, FIT, watching=[Stops(asked(study, tmp_path))])
    study.tell(0, state=TrialState.PRUNED)
    _, trace = fitted(tmp_path, FIT, watching=[Resumes(asked(study, tmp_path))])
    assert trace.resumed == [10]
    assert known(study) == {epoch["epoch"] + 1: epoch["val/accuracy"] for epoch in trace.epochs}
    assert list(known(study, 0)) == [1, 2]
