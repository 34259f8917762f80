"""A teacher that learns to teach: what moves, what is refused, what a kill leaves."""

from __future__ import annotations

import pytest

from kd.errors import InputError
from kd.models import load, weights_digest
from kd.pipeline.execute import check, execute
from kd.pipeline.jobs import call
from kd.store import Store
from tests.pipeline.small import kill_at, made, planned

META = ("pipeline=meta", "circle.quiz=0.25")


def test_killed_and_resumed_student_and_teacher_have_the_same_bits(tmp_path):
    words = (*META, "run.checkpoint_seconds=0")
    _, straight = made(tmp_path / "a", *words)
    made(tmp_path / "b", "pipeline=distil")  # the teacher, so that the kill hits the student
    one, run = planned(tmp_path / "b", *words)
    assert "SIGKILL" in call(kill_at, "step", 4, one, run)["error"]
    execute(one, Store(tmp_path / "b"), run)
    card = Store(tmp_path / "b").get(one.key).card
    assert card["resumed"] and card["weights"] == straight["weights"]
    teachers = [load(Store(tmp_path / s).get(one.key).path, "teacher") for s in ("a", "b")]
    assert weights_digest(teachers[0]) == weights_digest(teachers[1])
    assert 0 < card["metrics"]["teacher/drift"] < 1
    untouched = load(Store(tmp_path / "b").get(one.nodes[0].key).path)
    assert weights_digest(untouched) != weights_digest(teachers[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("circle.quiz=0",), "circle.quiz=0"),
        (("circle.rate=0",), "circle.rate=0"),
        (("fit.precision=bf16-mixed",), "differentiates through a step; use 32-true"),
        (("fit.compile=true",), "differentiates through a step"),
        (("loss=[ce,crd]",), "the term crd remembers samples"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_planning(words, said, tmp_path):
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *META, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("circle.quiz=0.001",), "circle.quiz=0.001 of 256 samples leaves 0 to the teacher, which needs 2"),
        (("circle.quiz=0.9",), "leaves 230 to the teacher, which needs 2, and 26 to the student, which needs a batch"),
        (("fit.optimiser._target_=torch.optim.AdamWW",), "AdamWW"),
        (("fit.optimiser.weight_decay=-1",), "fit.optimiser: torch.optim.AdamW refuses"),
    ],
)
def test_what_would_fail_only_after_the_teacher_is_refused_before_it(words, said, tmp_path):
    one, run = planned(tmp_path, *META, *words)
    with pytest.raises(InputError) as refused:
        check([one], Store(tmp_path), run)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "artifacts").exists()


def test_a_teacher_that_nobody_hears_is_refused_before_anything_is_made(tmp_path):
    one, run = planned(tmp_path, *META, "loss=[ce]", "alpha=0.5")
    with pytest.raises(InputError, match="no term of a weight above 0 hears the teacher"):
        check([one], Store(tmp_path), run)
