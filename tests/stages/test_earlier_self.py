"""A student that learns from its own earlier self: `kd run loss=[pskd]`, without a teacher, killed and resumed."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from kd.errors import InputError
from kd.pipeline.execute import check, execute
from kd.pipeline.jobs import call
from kd.report.rows import collect
from kd.store import Store
from tests.pipeline.small import kill_at, made, planned

WORDS = ("loss=[pskd]", "fit.epochs=3", "run.checkpoint_seconds=0")


def bits(card):
    return card["weights"], card["metrics"], card["trace"]


def test_no_teacher_is_planned_or_run_and_the_earlier_self_is_heard_from_the_second_epoch_on(tmp_path):
    one, _ = planned(tmp_path, *WORDS)
    assert [node.name for node in one.nodes] == ["student"]
    assert one.nodes[0].unused["teacher"] == "the student's own earlier.logits take its place"
    ran, card = made(tmp_path, *WORDS)
    assert ran == ["student"] and card["document"]["inputs"] == {}
    _, labels = made(tmp_path, "loss=[ce]", "loss.ce.weight=1", *WORDS[1:])
    pairs = list(zip(card["trace"]["epochs"], labels["trace"]["epochs"], strict=True))
    assert pairs[0][0]["train/pskd"] == pairs[0][1]["train/ce"], "in the first epoch the label stands for it"
    assert pairs[1][0]["weights"] != pairs[1][1]["weights"]
    assert not [name for name in load_file(tmp_path / "artifacts" / card["key"][:16] / "model.safetensors")
                if "said" in name]  # fmt: skip
    (row,) = collect([card])
    assert row["role"] == "student distilled" and row["teacher"] is None


@pytest.mark.parametrize("step", [6, 9])
def test_a_kill_in_the_second_or_third_epoch_leaves_the_same_bits(step, tmp_path):
    straight = made(tmp_path / "a", *WORDS)[1]
    one, run = planned(tmp_path / "b", *WORDS)
    assert "SIGKILL" in call(kill_at, "step", step, one, run)["error"]
    execute(one, Store(tmp_path / "b"), run)
    artifact = Store(tmp_path / "b").get(one.key)
    assert artifact is not None and artifact.card["resumed"] and not straight["resumed"]
    assert bits(artifact.card) == bits(straight)


def test_beside_a_teachers_term_both_are_heard(tmp_path):
    ran, card = made(tmp_path, "loss=[kd,pskd]")
    assert ran == ["teacher", "labels", "student"] and "test/agreement" in card["metrics"]


def test_on_several_devices_it_is_refused_before_anything_runs(tmp_path):
    one, run = planned(tmp_path, *WORDS, "run.devices=2", "run.accelerator=cpu")
    with pytest.raises(InputError, match=r"reads earlier\.logits.*use run\.devices=1"):
        check([one], Store(tmp_path), run)
