"""The pruning stage: its key, patterns, schedules, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from kd.compress.masks import sparsity
from kd.errors import InputError
from kd.models import load, plain
from kd.stages.prune import Prune, pattern
from tests.pipeline.small import planned
from tests.stages.compressing import WORDS, cards, key


def test_a_share_of_all_weights_is_0_and_the_shapes_are_as_they_were(tmp_path: Path) -> None:
    _, found, folders = cards(tmp_path, "compress=[prune]", "prune.what=weights", "prune.recover=false", "fit.epochs=1")
    total, left = sparsity(plain(load(folders["prune"])))
    assert total == found["student"]["cost"]["parameters"] and left == pytest.approx(0.5 * total, rel=0.1)
    assert set(load_file(folders["prune"] / "model.safetensors")) == set(
        load_file(folders["student"] / "model.safetensors")
    )


def test_a_pattern_holds_through_training(tmp_path: Path) -> None:
    words = ("compress=[prune]", "prune.what=weights", "prune.pattern='2:4'", "fit.epochs=2")
    _, found, folders = cards(tmp_path, *words)
    weight = load_file(folders["prune_recover"] / "model.safetensors")["conv2.0.weight"]
    assert ((weight.movedim(1, -1).reshape(-1, 4) != 0).sum(dim=1) <= 2).all()
    assert found["prune"]["said"] == ["conv1.0.weight stays whole: its inputs are no multiple of 2:4"]


def test_in_steps_as_much_goes_as_at_once(tmp_path: Path) -> None:
    _, found, _ = cards(tmp_path, "compress=[prune]", "prune.steps=3", "prune.amount=0.6", "fit.epochs=1")
    macs = {name: card["cost"]["macs"] for name, card in found.items() if "cost" in card}
    assert [n for n in found if n.startswith("prune")] == [
        "prune", "prune_recover", "prune2", "prune2_recover", "prune3", "prune3_recover",
    ]  # fmt: skip
    for name, share in (("prune", 0.8), ("prune2", 0.6), ("prune3", 0.4)):
        assert share - 0.1 < macs[name] / macs["student"] <= share


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune.amount=1.5"], "prune.amount=1.5 is no share between 0 and 1"),
        (["prune.amount=1.5", "prune.steps=2"], "prune.amount=1.5 is no share between 0 and 1"),
        (["prune.by=talyor"], "did you mean 'taylor'"),
        (["prune.what=weights", "prune.by=group_norm"], "prune.by='group_norm' is none of taylor, magnitude, random"),
        (["prune.what=filters"], "prune.what='filters' is none of"),
        (["prune.of=flops"], "prune.of='flops' is none of"),
        (["prune.scope=local"], "prune.scope='local' is none of"),
        (["prune.most=1"], "prune.most=1 is no share"),
        (["prune.round_to=0"], "prune.round_to=0 is out of range"),
        (["prune.pattern='2:4'"], "prune.pattern=2:4 is of single weights; set prune.what=weights"),
        (["prune.what=weights", "prune.pattern='4:2'"], "no pattern N:M"),
        (["prune.samples=0"], "prune.samples=0 is no number of samples"),
        (["prune.keep=conv1"], "give a list of layers"),
        (["recover.fit.lr=-1"], "lr=-1 is out of range"),
        (["recover.fit.lrr=1"], "recover.fit.lrr is not in the config"),
        (["recover.teacher=nobody"], "teacher='nobody' is no stage"),
        (["compress=[prune,quantise]"], "'quantise' is no step"),
        (["compress=prune"], "compress='prune' is no list; write one, e.g. "),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_planning(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *WORDS, *words)


@pytest.mark.parametrize("text", ["4:2", "2:2", "2-4", "0:4", "2:4:8", "", None])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no pattern N:M"):
        pattern(text)


def test_fields_that_change_nothing_have_one_key() -> None:
    assert key("prune.by=magnitude", "prune.samples=3") == key("prune.by=magnitude")
    assert key("prune.samples=3") != key()
    weights = "prune.what=weights"
    assert key(weights, "prune.pattern='2:4'", "prune.amount=0.3") == key(weights, "prune.pattern='2:4'")
    assert key(weights, "prune.of=parameters", "prune.most=0.5", "prune.round_to=8") == key(weights)
    assert key("prune.of=parameters") != key()
    assert key("prune.keep=[conv2,conv1]") == key("prune.keep=[conv1,conv2,conv1]") != key()
    assert key("prune.steps=1") == key() != key("prune.steps=2")


def test_a_stage_reads_its_one_input_always() -> None:
    assert Prune.unused({}, {"model": {}}) == {}
