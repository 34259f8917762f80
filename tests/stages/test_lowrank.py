"""The low-rank stage: its key, what it makes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.errors import InputError
from kd.models import load
from kd.stages import LowRank
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
    ("word", "said"),
    [
        ("lowrank.by=rank", "lowrank.by='rank' is none of"),
        ("lowrank.form=cp", "lowrank.form='cp' is none of svd, spatial, tucker"),
        ("lowrank.budget=2", "lowrank.budget=2 is no share"),
        ("lowrank.energy=0", "lowrank.energy=0 is no share"),
        ("lowrank.keep=3", "give a list of layers"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_planning(word: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *WORDS, "compress=[lowrank]", word)


def test_fields_that_change_nothing_have_one_key() -> None:
    words = ("compress=[lowrank]", "lowrank.by=energy")
    assert key(*words, "lowrank.budget=0.1") == key(*words) != key(*words, "lowrank.energy=0.5")
    assert LowRank.unused({}, {"model": {}}) == {}
