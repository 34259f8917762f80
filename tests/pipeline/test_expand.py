"""Templates of a pipeline are written out into plain stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from kd.errors import InputError
from kd.pipeline.expand import expand
from kd.stages.building import MODEL

TEACHER = {"_target_": "Train", "inputs": {}}


def chain(items: object, **more: object) -> dict[str, object]:
    template = {
        "for_each": items,
        "start": "teacher",
        "stage": {"_target_": "Distil", "inputs": {"teacher": "@previous"}, "student": "@model", **more},
    }
    return {"teacher": TEACHER, "assistant": template, "student": {"inputs": {"teacher": "assistant"}}}


def test_each_item_hears_the_one_before_and_a_later_stage_the_last() -> None:
    made = expand(chain(["a", {"name": "b", "options": {"depth": 2}}]))
    assert list(made) == ["teacher", "assistant1", "assistant2", "student"]
    assert [made[n]["inputs"]["teacher"] for n in list(made)[1:]] == ["teacher", "assistant1", "assistant2"]
    assert made["assistant1"]["student"] == {**MODEL, "name": "a"}
    assert made["assistant2"]["student"] == {**MODEL, "name": "b", "options": {"depth": 2}}


def test_a_model_by_its_name_is_what_the_group_of_models_gives() -> None:
    by_name = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf" / "model" / "by_name.yaml"))
    assert isinstance(by_name, dict)
    assert {**MODEL, "name": by_name["name"]} == by_name


def test_an_empty_list_is_no_stage_and_its_name_means_the_start() -> None:
    assert expand(chain([])) == {"teacher": TEACHER, "student": {"inputs": {"teacher": "teacher"}}}


def test_earlier_names_all_that_stand_before() -> None:
    stages = chain(["a", "b"])
    stages["assistant"]["stage"]["inputs"] = {"teacher*": "@earlier"}  # type: ignore[index]
    stages["student"]["inputs"] = {"teacher*": "assistant*"}  # type: ignore[index]
    made = expand(stages)
    assert made["assistant2"]["inputs"] == {"teacher1": "teacher", "teacher2": "assistant1"}
    assert made["student"]["inputs"] == {"teacher1": "assistant1", "teacher2": "assistant2"}


def test_a_mapping_names_its_stages_and_lays_fields_over_an_item() -> None:
    steps = {
        "for_each": {"prune": {"_target_": "Prune", "amount": 0.5}, "int8": {"_target_": "Quantise"}},
        "start": "teacher",
        "stages": {
            "": {"_from_": "@item", "inputs": {"model": "@previous"}, "data": "d"},
            "recovered": {
                "_target_": "Distil",
                "inputs": {"model": "@previous", "teacher": "teacher"},
                "step": "@name",
            },
        },
    }
    made = expand({"teacher": TEACHER, "steps": steps, "last": {"inputs": {"model": "steps"}}})
    assert list(made) == ["teacher", "prune", "prune_recovered", "int8", "int8_recovered", "last"]
    assert made["prune"] == {"_target_": "Prune", "amount": 0.5, "inputs": {"model": "teacher"}, "data": "d"}
    assert made["int8"]["inputs"] == {"model": "prune_recovered"}
    assert made["prune_recovered"]["step"] == "prune"
    assert made["last"]["inputs"] == {"model": "int8_recovered"}


def test_a_pipeline_without_templates_is_left_as_it_is() -> None:
    plain = {"teacher": TEACHER, "student": {"_target_": "Distil", "inputs": {"teacher": "teacher"}, "x": "@y"}}
    assert expand(plain) == plain


SOFT = {"_target_": "Labels", "inputs": {"teacher": "@previous"}}


def dense(items: object, inputs: object) -> dict[str, object]:
    """A teacher with its labels, assistants with theirs, and a last stage."""
    template = {
        "for_each": items,
        "start": "teacher",
        "end": "net",
        "stages": {
            "net": {"_target_": "Distil", "inputs": {"teacher*": "@earlier", "labels*": "@earlier_labels"}},
            "labels": SOFT,
        },
    }
    labels = {"_target_": "Labels", "inputs": {"teacher": "teacher"}}
    return {"teacher": TEACHER, "teacher_labels": labels, "assistant": template, "student": {"inputs": inputs}}


def test_a_stage_beside_the_one_that_stands_for_an_item_is_named_with_it() -> None:
    last = {"teacher*": ["teacher", "assistant*"], "labels*": ["teacher_labels", "assistant*_labels"]}
    made = expand(dense(["a", "b"], last))
    assert list(made) == [
        "teacher", "teacher_labels", "assistant1", "assistant1_labels", "assistant2", "assistant2_labels", "student"
    ]  # fmt: skip
    assert made["assistant1"]["inputs"] == {"teacher1": "teacher", "labels1": "teacher_labels"}
    assert made["assistant2"]["inputs"] == {
        "teacher1": "teacher", "teacher2": "assistant1", "labels1": "teacher_labels", "labels2": "assistant1_labels"
    }  # fmt: skip
    assert made["assistant2_labels"]["inputs"] == {"teacher": "assistant2"}
    assert list(made["student"]["inputs"]) == ["teacher1", "teacher2", "teacher3", "labels1", "labels2", "labels3"]
    assert made["student"]["inputs"]["labels3"] == "assistant2_labels"


def test_before_is_what_stands_for_the_item_before() -> None:
    stages = dense(["a", "b"], {"teacher": "assistant", "labels": "assistant_labels"})
    stages["assistant"]["stages"]["net"]["inputs"] = {"teacher": "@before", "labels": "@before_labels"}  # type: ignore[index]
    made = expand(stages)
    assert made["assistant1"]["inputs"] == {"teacher": "teacher", "labels": "teacher_labels"}
    assert made["assistant2"]["inputs"] == {"teacher": "assistant1", "labels": "assistant1_labels"}
    assert made["student"]["inputs"] == {"teacher": "assistant2", "labels": "assistant2_labels"}
    stages["assistant"]["for_each"] = []  # type: ignore[index]
    assert expand(stages)["student"]["inputs"] == {"teacher": "teacher", "labels": "teacher_labels"}


def test_an_item_lays_fields_over_its_stage() -> None:
    change = {"seed": 1, "objective": {"kd": {"weight": 0.5}}}
    own = {"seed": 0, "objective": {"kd": {"weight": 0.9, "student": "s"}, "ce": {"weight": 0.1}}}
    made = expand(chain([{"name": "a", "with": change}, "b"], **own))
    assert made["assistant1"]["student"] == {**MODEL, "name": "a"}
    assert made["assistant1"]["seed"] == 1 and made["assistant2"]["seed"] == 0
    assert made["assistant1"]["objective"] == {"kd": {"weight": 0.5, "student": "s"}, "ce": {"weight": 0.1}}
    several = dense([{"name": "a", "with": {"seed": 3}}], {})
    made = expand(several)
    assert made["assistant1"]["seed"] == 3 and "seed" not in made["assistant1_labels"]


def test_mappings_are_laid_one_over_the_other() -> None:
    made = expand(chain(["a"], fit={"_from_": [{"epochs": 30, "lr": 1}, {"epochs": 3}], "clip": None}))
    assert made["assistant1"]["fit"] == {"epochs": 3, "lr": 1, "clip": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"for_each": "resnet18"}, "is no list"),
        ({"for_each": [3]}, "3 is no model"),
        ({"stages": {"": {}}}, "and not both"),
        ({"each": 1}, "is no field of a template"),
        ({"start": None}, "names nothing at the first item"),
        ({"stage": {"x": "@itme"}}, "@itme is no token; did you mean '@item'"),
        ({"stage": {"_from_": "@item"}}, "is no mapping to start from"),
        ({"stage": {"inputs": {"teacher*": "nobody*"}}}, "several inputs are a list of stages"),
        ({"stage": {"inputs": {"teacher*": ["a", "nobody*"]}}}, "several inputs are a list of stages"),
        ({"end": "net"}, "end='net' is none of its stages"),
        ({"start": None, "stage": {"inputs": {"labels": "@before_labels"}}}, "@before names nothing at the first item"),
    ],
)
def test_a_template_that_is_none_is_refused(change: dict[str, object], said: str) -> None:
    stages = chain(["a"])
    stages["assistant"] |= change  # type: ignore[operator]
    with pytest.raises(InputError) as refused:
        expand(stages)
    assert said in str(refused.value)


def test_a_stage_made_twice_is_refused() -> None:
    with pytest.raises(InputError, match="assistant1 would be made twice"):
        expand({"assistant1": TEACHER, **chain(["a"])})


def test_a_template_without_start_and_items_cannot_be_an_input() -> None:
    stages = chain([])
    stages["assistant"]["start"] = None  # type: ignore[index]
    with pytest.raises(InputError, match="its list is empty"):
        expand(stages)


def test_a_number_is_as_many_of_the_item_and_each_may_have_a_seed_of_its_own() -> None:
    stage = {"_target_": "Distil", "student": "@model", "seed": {"_sum_": [5, "@index"]}}
    made = expand({"net": {"for_each": 2, "item": {"name": "a"}, "stage": stage}})
    assert {name: (one["student"]["name"], one["seed"]) for name, one in made.items()} == {
        "net1": ("a", 6),
        "net2": ("a", 7),
    }
    with pytest.raises(InputError, match="for_each=2 is no list"):
        expand({"net": {"for_each": 2, "stage": stage}})
    with pytest.raises(InputError, match=r"_sum_ adds up whole numbers, and is given \['a', 1\]"):
        expand({"net": {"for_each": ["x"], "stage": {"_target_": "A", "seed": {"_sum_": ["a", "@index"]}}}})


def test_an_item_that_is_null_is_none() -> None:
    stage = {"_target_": "A", "how": "@item"}
    assert expand({"more": {"for_each": {"whole": None}, "stage": stage}}) == {}
    assert list(expand({"more": {"for_each": [None, "x"], "stage": stage}})) == ["more1"]
    assert expand({"more": {"for_each": {"whole": "x"}, "stage": stage}}) == {"whole": {"_target_": "A", "how": "x"}}
