"""The low-rank stage: its key, what it makes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.errors import InputError
from kd.models import load
from kd.pipeline.execute import check
from kd.stages import LowRank
from kd.store import Store
from tests.pipeline.small import planned
from tests.stages.compressing import WORDS, cards, key


def test_layers_become_chains_and_views_of_them_still_resolve(tmp_path: Path) -> None:
    words = ("compress=[lowrank]", "lowrank.by=uniform", "lowrank.budget=0.5", "loss=[ce,kd,hint]", "lowrank.least=4")
    hint = ("loss.hint.student=student.conv2", "loss.hint.teacher=teacher.conv2", "fit.epochs=1")
    _, found, folders = cards(tmp_path, *words, *hint)
    net = load(folders["lowrank_recover"]).net
    assert [type(layer).__name__ for layer in net.conv2[0]] == ["Conv2d", "Conv2d"]
    assert found["lowrank"]["cost"]["parameters"] < found["student"]["cost"]["parameters"]


@pytest.mark.parametrize(
    "words",
    [
        ["lowrank.of=macs"],
        ["lowrank.by=sensitivity"],
        ["lowrank.by=uniform", "lowrank.form=spatial"],
        ["lowrank.form=tucker", "lowrank.whiten=false"],
    ],
    ids=" ".join,
)
def test_the_budget_is_of_the_whole_network(words: list[str], tmp_path: Path) -> None:
    more = ("compress=[lowrank]", "lowrank.budget=0.6", "lowrank.least=4", "lowrank.recover=false", "fit.epochs=1")
    _, found, _ = cards(tmp_path, *more, *words)
    of = "macs" if "lowrank.of=macs" in words else "parameters"
    share = found["lowrank"]["cost"][of] / found["student"]["cost"][of]
    assert 0.4 < share <= 0.6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lowrank.budget=0.05"], r"lowrank.budget=0.05 of 4778 parameters cannot be met: even rank 1 .* raise it"),
        (["lowrank.least=1000"], "lowrank finds no layer of SeedCNN to factorise"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_anything_is_made(words: list[str], said: str, tmp_path: Path) -> None:
    one, run = planned(tmp_path, *WORDS, "compress=[lowrank]", *words)
    with pytest.raises(InputError, match=said):
        check([one], Store(tmp_path), run)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lowrank.by=rank", "lowrank.by='rank' is none of"),
        ("lowrank.form=cp", "lowrank.form='cp' is none of svd, spatial, tucker"),
        ("lowrank.budget=2", "lowrank.budget=2 is no share"),
        ("lowrank.of=bytes", "lowrank.of='bytes' is none of parameters, macs"),
        ("lowrank.whiten=3", "lowrank.whiten=3 is out of range: it must be true or false"),
        ("lowrank.samples=0", "lowrank.samples=0 is no number of samples"),
        ("lowrank.least=0", "lowrank.least=0 is out of range"),
        ("lowrank.keep=3", "give a list of layers"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_planning(word: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *WORDS, "compress=[lowrank]", word)


def test_fields_that_change_nothing_have_one_key() -> None:
    words = ("compress=[lowrank]", "lowrank.by=energy")
    assert key(*words, "lowrank.budget=0.1", "lowrank.of=macs") == key(*words) != key(*words, "lowrank.energy=0.5")
    words = ("compress=[lowrank]",)
    assert key(*words, "lowrank.energy=0.1") == key(*words) != key(*words, "lowrank.budget=0.1")
    assert key(*words, "lowrank.samples=9") != key(*words)
    plain = (*words, "lowrank.whiten=false")
    assert key(*plain, "lowrank.samples=9") == key(*plain) != key(*words)
    assert key(*plain, "lowrank.by=sensitivity", "lowrank.samples=9") != key(*plain, "lowrank.by=sensitivity")
    assert LowRank.unused({}, {"model": {}}) == {}
