"""A student of several branches: what is shipped, what is told of the others, what a kill leaves."""

from __future__ import annotations

import pytest
import torch

from kd.errors import InputError
from kd.models import load, weights_digest
from kd.pipeline.execute import check, execute
from kd.pipeline.jobs import call
from kd.stages import Branches
from kd.stages.base import Room
from kd.stages.splits import load_data
from kd.store import Store
from kd.training.settings import Run
from tests.pipeline.small import kill_at, made, planned
from tests.stages.folder import bits

ONE = ("pipeline=one", "student.name=seed_cnn_small")


def accuracy(store, card):
    """Of the stored network, on the test set, here."""
    home = Store(store)
    net = load(home.get(card["key"]).path)
    data = load_data(card["document"]["config"]["data"], Room(Run(store=str(store)), store)).test
    with torch.no_grad():
        return (net(data.images / 255).argmax(1) == data.targets).double().mean().item()


def test_the_student_is_a_plain_network_with_the_accuracy_of_its_branch(tmp_path):
    ran, card = made(tmp_path, *ONE)
    assert ran == ["student"] and card["document"]["inputs"] == {}
    net = load(Store(tmp_path).get(card["key"]).path)
    assert type(net.net).__name__ == "SeedCNN" and not any("branch" in name for name in net.state_dict())
    metrics = card["metrics"]
    assert accuracy(tmp_path, card) == metrics["test/accuracy"] == metrics["branch1/test_accuracy"]
    assert {"branch3/val_accuracy", "ensemble/test_accuracy"} <= set(metrics) and metrics["branch/shipped"] == 1
    alone = made(tmp_path, "pipeline=baseline", "student.name=seed_cnn_small")[1]
    assert card["cost"]["parameters"] == alone["cost"]["parameters"]


def test_another_branch_is_another_network_of_the_same_training(tmp_path):
    first, second = made(tmp_path, *ONE)[1], made(tmp_path, *ONE, "one.ship=2")[1]
    assert first["weights"] != second["weights"]
    assert first["trace"]["losses"] == second["trace"]["losses"]
    assert accuracy(tmp_path, second) == second["metrics"]["test/accuracy"] == first["metrics"]["branch2/test_accuracy"]
    best = made(tmp_path, *ONE, "one.ship=best")[1]["metrics"]
    scores = [best[f"branch{number}/val_accuracy"] for number in (1, 2, 3)]
    assert scores.index(max(scores)) + 1 == best["branch/shipped"]


@pytest.mark.parametrize(("moment", "at"), [("step", 5), ("after the epoch's record", 1)])
def test_killed_and_resumed_the_bits_are_the_same(moment, at, tmp_path):
    words = (*ONE, "loss.one.loss.rampup=2", "run.checkpoint_seconds=0")
    straight = made(tmp_path / "a", *words)[1]
    one, run = planned(tmp_path / "b", *words)
    assert "SIGKILL" in call(kill_at, moment, at, one, run)["error"]
    execute(one, Store(tmp_path / "b"), run)
    card = Store(tmp_path / "b").get(one.key).card
    assert card["resumed"] and bits(card) == bits(straight)
    assert card["metrics"] == straight["metrics"]  # of every branch and the ensemble


def test_any_term_goes_beside_it_and_a_teacher_is_heard_where_one_names_it(tmp_path):
    words = (*ONE, "loss=[one,kd,at]", "teacher.name=seed_cnn_small", "loss.at.weight=10")
    ran, card = made(tmp_path, *words)
    assert ran == ["teacher", "student"]
    assert {"train/one", "train/kd", "train/at"} <= set(card["trace"]["epochs"][0])
    assert "at: student.net.conv3 (16, 2, 2) <- teacher.conv3 (16, 2, 2)" in card["bindings"]
    stored = planned(tmp_path, *ONE, "loss=[one,kd]")[0].nodes[-1]
    assert set(stored.inputs) == {"teacher", "labels"}


def test_the_best_epoch_is_that_of_all_branches(tmp_path):
    card = made(tmp_path, *ONE, "fit.select=best", "fit.epochs=3")[1]
    chosen = card["trace"]["selected_epoch"]
    assert card["metrics"]["val/accuracy"] == card["trace"]["epochs"][chosen]["val/accuracy"]
    assert weights_digest(load(Store(tmp_path).get(card["key"]).path)) == card["weights"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("one.branches=1",), "one.branches=1 is out of range"),
        (("one.ship=4",), "one.ship=4 is out of range: it must be the number of a branch, 1 to 3, or best"),
        (("one.at=3",), "one.at=3 is out of range"),
        (("loss=[ce]",), "no term of a weight above 0 teaches the branches; add one that does"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_planning(words, said, tmp_path):
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *ONE, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*ONE, "one.at=conv9"), "one.at='conv9' is no layer of SeedCNN"),
        ((*ONE, "loss=[one,simkd]"), "the term 'simkd' ships another end of the network, and so does a branch"),
        (("loss=[ce,one]",), "the term 'one': SeedCNN has no branches; only pipeline=one gives a network branches"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(words, said, tmp_path):
    one, run = planned(tmp_path, *words)
    with pytest.raises(InputError, match=said):
        check([one], Store(tmp_path), run)
    assert not (tmp_path / "artifacts").exists()


def test_where_the_branches_begin_is_in_the_key(tmp_path):
    keys = {
        planned(tmp_path, *ONE, *words)[0].key for words in ((), ("one.at=conv1",), ("student.stages=[conv1,conv3]",))
    }
    assert len(keys) == 3 and Branches.VERSION == 1
