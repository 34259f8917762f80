"""Terms are written out for the teachers that there are."""

from __future__ import annotations

from typing import Any

import pytest

from kd.config import jobs
from kd.errors import InputError
from kd.pipeline.hearing import heard

KD = {"weight": 0.9, "student": "student.logits", "teacher": "teacher.logits", "loss": {"_target_": "KL"}}
CE = {"weight": 0.1, "student": "student.logits", "target": "batch.target", "loss": {"_target_": "CE"}}
MIX = {"loss": {"_target_": "Mean", "weights": None}}
TWO = {"teacher1": "a", "teacher2": "b", "labels1": "c", "labels2": "d"}


def stage(objective: dict[str, Any], mix: Any = MIX, inputs: dict[str, str] = TWO) -> dict[str, Any]:
    return heard({"_target_": "Distil", "inputs": inputs, "objective": objective, "mix": mix, "seed": 0}, "student")


def test_a_term_on_logits_goes_through_the_mix() -> None:
    found = stage({"ce": CE, "kd": KD})
    assert found["objective"]["ce"] == CE and "mix" not in found and found["inputs"] == TWO
    assert found["objective"]["kd"] == {
        **KD,
        "teacher": ["teacher1.logits", "teacher2.logits"],
        "loss": {"_target_": "Mean", "weights": None, "loss": {"_target_": "KL"}},
    }


def test_a_term_takes_over_what_the_mix_reads_and_keeps_its_own() -> None:
    mix = {**MIX, "target": "batch.target", "feature": "student.conv3"}
    found = stage({"kd": KD, "dkd": {**KD, "target": "mine", "feature": None}}, mix)["objective"]
    assert found["kd"]["target"] == "batch.target" and found["kd"]["feature"] == "student.conv3"
    assert found["dkd"]["target"] == "mine" and found["dkd"]["feature"] == "student.conv3"
    assert "feature" not in stage({"kd": KD}, {**MIX, "feature": None})["objective"]["kd"]


def test_a_term_on_layers_becomes_one_for_each_teacher_with_its_share_of_the_weight() -> None:
    hint = {**KD, "weight": 1.0, "teacher": "teacher.conv3"}
    rising = {"_target_": "kd.schedules.Linear", "start": 0, "end": 4}
    several = {**KD, "weight": rising, "teacher": ["teacher.a", "teacher.b"]}
    found = stage({"hint": hint, "at": several})["objective"]
    assert list(found) == ["hint_teacher1", "hint_teacher2", "at_teacher1", "at_teacher2"]
    assert found["hint_teacher2"] == {**hint, "teacher": "teacher2.conv3", "weight": 0.5}
    assert found["at_teacher1"]["teacher"] == ["teacher1.a", "teacher1.b"]
    assert found["at_teacher1"]["weight"] == {**rising, "end": 2.0}


def test_a_term_under_an_interchange_becomes_one_for_each_teacher() -> None:
    term = {**KD, "weight": 1.0, "under": {"_target_": "I", "student": "student.last", "teacher": "teacher.last"}}
    several = {**term, "under": {**term["under"], "teacher": ["teacher.a", "teacher.b"]}}
    found = stage({"diito": term, "more": several})["objective"]
    assert found["diito_teacher2"] == {
        **KD, "weight": 0.5, "teacher": "teacher2.logits", "under": {**term["under"], "teacher": "teacher2.last"},
    }  # fmt: skip
    assert found["more_teacher1"]["under"]["teacher"] == ["teacher1.a", "teacher1.b"]
    assert stage({"diito": term}, inputs={"teacher1": "a"})["objective"] == {"diito": term}


def test_terms_that_name_one_of_the_teachers_stay_as_they_are() -> None:
    own = {**KD, "teacher": "teacher2.conv3"}
    listed = {**KD, "teacher": ["teacher1.logits", "teacher2.logits"]}
    assert stage({"own": own, "listed": listed})["objective"] == {"own": own, "listed": listed}


def test_one_teacher_is_the_teacher_whatever_the_mix() -> None:
    found = stage({"kd": KD}, inputs={"teacher1": "a", "labels1": "c"})
    assert found == {
        "_target_": "Distil",
        "inputs": {"teacher": "a", "labels": "c"},
        "objective": {"kd": KD},
        "seed": 0,
    }
    assert stage({"kd": KD}, mix=None, inputs={"teacher": "a"})["objective"] == {"kd": KD}


def test_a_stage_without_a_mix_is_left_as_it_is() -> None:
    plain = {"_target_": "Distil", "inputs": TWO, "objective": {"kd": KD}}
    assert heard(plain, "student") == plain


@pytest.mark.parametrize(
    ("objective", "mix", "said"),
    [
        ({"kd": {**KD, "teacher": ["teacher.a", "teacher1.b"]}}, MIX, "name `teacher` alone, or each by its number"),
        ({"kd": KD}, "mean", "is no mix of teachers"),
        ({"kd": KD}, {"loss": {}}, "is no mix of teachers"),
        ({"h": {**KD, "teacher": "teacher.a"}, "h_teacher1": KD}, MIX, "two terms are called 'h_teacher1'"),
    ],
)
def test_what_cannot_be_heard_is_refused(objective: dict[str, Any], mix: Any, said: str) -> None:
    with pytest.raises(InputError) as refused:
        stage(objective, mix)
    assert said in str(refused.value)


def stages(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = jobs(list(words))[0][0].config["pipeline"]["stages"]
    return found


def test_any_mix_is_a_word_for_any_loss() -> None:
    two = ("pipeline=teachers", "teachers=[seed_cnn,{name: seed_cnn, with: {seed: 1}}]")
    for mix, name in (("random", "RandomChoice"), ("gate", "Gate"), ("cross_entropy", "ByCrossEntropy")):
        dkd = stages(*two, "loss=[ce,dkd]", f"mix={mix}")["student"]["objective"]["dkd"]
        assert dkd["loss"]["_target_"] == f"kd.losses.ensemble.{name}" and dkd["target"] == "batch.target"
        assert dkd["loss"]["loss"]["_target_"] == "kd.losses.response.DKD"
    kd = stages(*two, "mix.loss.weights=[2,1]")["student"]["objective"]["kd"]
    assert kd["loss"]["weights"] == [2, 1]


def test_an_empty_list_of_teachers_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="names no stage: its list is empty"):
        stages("pipeline=teachers")
    with pytest.raises(InputError, match="names no stage: its list is empty"):
        stages("pipeline=students")


def test_a_weighting_gives_each_term_that_weighs_anything_a_log_variance() -> None:
    terms = {"ce": CE, "kd": KD, "off": {**KD, "weight": 0.0}, "own": {**KD, "log_variance": 1.0}}
    found = heard({"objective": terms, "weighting": "uncertainty", "inputs": {"teacher": "a"}}, "student")
    assert "weighting" not in found
    learnt = {name: term.get("log_variance") for name, term in found["objective"].items()}
    assert learnt == {"ce": 0.0, "kd": 0.0, "off": None, "own": 1.0}
    assert heard({"objective": terms, "weighting": "fixed"}, "student") == {"objective": terms}
    two = {
        "inputs": TWO,
        "mix": MIX,
        "weighting": "uncertainty",
        "objective": {"at": {**KD, "teacher": "teacher.last"}},
    }
    assert {term["log_variance"] for term in heard(two, "student")["objective"].values()} == {0.0}
    with pytest.raises(InputError, match=r"objective\.weights='uncertain' is none of fixed, uncertainty"):
        heard({"objective": terms, "weighting": "uncertain"}, "student")
