"""A list of steps is written out into stages: names, recoveries, teachers, fields laid over."""

from __future__ import annotations

from typing import Any

import pytest

from kd.errors import InputError
from kd.pipeline.expand import expand

BEFORE: dict[str, Any] = {
    "teacher": {"_target_": "T", "inputs": {}},
    "labels": {"_target_": "kd.stages.SoftLabels", "inputs": {"teacher": "teacher"}},
    "student": {"_target_": "S", "inputs": {"teacher": "teacher", "labels": "labels"}},
}
PRUNE = {"_target_": "kd.stages.Prune", "what": "weights", "amount": 0.5, "pattern": None, "steps": 1, "recover": True}
LOWRANK = {"_target_": "kd.stages.LowRank", "recover": True}
RECOVER = {"_target_": "kd.stages.FineTune", "teacher": "teacher", "fit": {"epochs": 3}, "recover": False}


def chain(items: Any, **more: Any) -> dict[str, Any]:
    choices = {"prune": PRUNE, "lowrank": LOWRANK, "recover": RECOVER, **more.pop("choices", {})}
    return {**BEFORE, "steps": {"for_each": items, "start": "student", "choices": choices, "after": "recover", **more}}


def made(items: Any, **more: Any) -> dict[str, Any]:
    stages = expand(chain(items, **more))
    return {name: stage for name, stage in stages.items() if name not in BEFORE}


def test_each_step_is_followed_by_its_recovery_under_the_teacher_and_its_labels() -> None:
    found = made(["prune", "lowrank"])
    assert {name: stage["inputs"] for name, stage in found.items()} == {
        "prune": {"model": "student"},
        "prune_recover": {"model": "prune", "teacher": "teacher", "labels": "labels"},
        "lowrank": {"model": "prune_recover"},
        "lowrank_recover": {"model": "lowrank", "teacher": "teacher", "labels": "labels"},
    }
    assert not {"recover", "teacher", "steps"} & set().union(*found.values())


def test_a_step_may_come_twice_with_fields_of_its_own() -> None:
    found = made([{"prune": {"amount": 0.2}}, "prune"])
    assert list(found) == ["prune", "prune_recover", "prune2", "prune2_recover"]
    assert [found[name]["amount"] for name in ("prune", "prune2")] == [0.2, 0.5]


def test_a_schedule_makes_several_with_a_recovery_after_each() -> None:
    found = made([{"prune": {"steps": 2}}, "lowrank"])
    assert [n for n in found if "_" not in n] == ["prune", "prune2", "lowrank"]
    assert [found[name]["amount"] for name in ("prune", "prune2")] == [0.25, 0.5]
    assert found["prune2"]["inputs"] == {"model": "prune_recover"}


@pytest.mark.parametrize(
    "choices",
    [{"prune": {**PRUNE, "recover": False}}, {"recover": {**RECOVER, "fit": {"epochs": 0}}}],
    ids=["said of the step", "nothing to train"],
)
def test_a_recovery_can_be_left_out(choices: dict[str, Any]) -> None:
    assert list(made(["prune"], choices=choices)) == ["prune"]
    assert "lowrank_recover" in made(["prune", "lowrank"], choices={"prune": {**PRUNE, "recover": False}})


def test_a_recovery_can_be_a_step_and_hear_the_student_live() -> None:
    found = made(["recover", "prune"], choices={"recover": {**RECOVER, "teacher": "student"}})
    assert found["recover"]["inputs"] == {"model": "student", "teacher": "student"}
    assert found["prune_recover"]["inputs"] == {"model": "prune", "teacher": "student"}


def test_terms_of_its_own_stand_in_for_the_objective() -> None:
    for terms, expected in (({}, "theirs"), ({"ce": 1}, {"ce": 1})):
        recover = {**RECOVER, "objective": "theirs", "terms": terms}
        found = made(["prune"], choices={"recover": recover})["prune_recover"]
        assert found["objective"] == expected and "terms" not in found


def test_no_step_leaves_what_was_there_and_a_later_stage_gets_the_last() -> None:
    stages = chain([])
    stages["last"] = {"_target_": "L", "inputs": {"model": "steps"}}
    assert expand(stages)["last"]["inputs"] == {"model": "student"}
    stages["steps"]["for_each"] = ["prune"]
    assert expand(stages)["last"]["inputs"] == {"model": "prune_recover"}


@pytest.mark.parametrize(
    ("items", "more", "said"),
    [
        (["prun"], {}, "'prun' is no step; did you mean 'prune'"),
        ([{"prune": 3}], {}, "is no step"),
        ([{"prune": {"amout": 3}}], {}, "prune has no field 'amout'; did you mean 'amount'"),
        ("prune", {}, "is no list"),
        (["prune"], {"start": "pupil"}, "start='pupil' is no stage before it"),
        (["prune"], {"stage": {}}, "is no field of a chain"),
        (["recover"], {"choices": {"recover": {**RECOVER, "teacher": "nobody"}}}, "teacher='nobody' is no stage"),
        ([{"prune": {"steps": 0}}], {}, "prune.steps=0 is no number of steps"),
        ([{"prune": {"steps": 2, "pattern": "2:4"}}], {}, "a pattern is reached in one step"),
    ],
)
def test_what_is_no_chain_is_refused(items: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        made(items, **more)
