"""A network trained further: masks stay, a kill loses nothing, the teacher is whoever the config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kd.pipeline.execute import execute
from kd.pipeline.jobs import call
from kd.store import Store
from tests.pipeline.small import kill_at, planned
from tests.stages.compressing import WORDS, cards, key

MASKED = ("compress=[prune]", "prune.what=weights")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cards(tmp_path_factory.mktemp("masked"), *MASKED)


def test_masks_survive_training_and_are_baked_in(masked: Any) -> None:
    _, _, folders = masked
    before, after = (load_file(folders[name] / "model.safetensors") for name in ("prune", "prune_recover"))
    names = [name for name, value in before.items() if (value == 0).any() and name.endswith("weight")]
    assert names and all((after[name] == 0).equal(before[name] == 0) for name in names)
    assert not all(after[name].equal(before[name]) for name in names)
    assert set(after) == set(load_file(folders["student"] / "model.safetensors"))


def test_a_killed_recovery_goes_on_to_the_same_bits_with_its_masks(masked: Any, tmp_path: Path) -> None:
    _, found, _ = masked
    one, run = planned(tmp_path, *WORDS, *MASKED, "run.checkpoint_seconds=0")
    steps = 8 + 24  # teacher and student
    assert "SIGKILL" in call(kill_at, "step", steps + 7, one, run)["error"]
    assert execute(one, Store(tmp_path), run) == ["prune_recover"]
    artifact = Store(tmp_path).get(one.key)
    assert artifact is not None and artifact.card["resumed"] == [6]
    assert artifact.card["weights"] == found["prune_recover"]["weights"]
    assert artifact.card["trace"] == found["prune_recover"]["trace"]


def test_the_teacher_is_the_original_or_the_student_before_compression(tmp_path: Path) -> None:
    def inputs(*words: str) -> set[str]:
        one, _ = planned(tmp_path, *WORDS, *words)
        names = {node.key: node.name for node in one.nodes}
        return {names[source] for source in one.nodes[-1].inputs.values()}

    assert inputs() == {"prune", "teacher", "labels"}
    assert inputs("recover.teacher=student") == {"prune", "student"}
    assert inputs("pipeline.stages.compress.start=teacher") == {"prune", "teacher", "labels"}
    assert inputs("recover.teacher=null", "alpha=0") == {"prune"}


def test_it_has_its_own_schedule_and_terms() -> None:
    assert len({key(), key("recover.fit.lr=0.1"), key("recover.fit.epochs=1"), key("loss@recover.terms=[ce]")}) == 4
