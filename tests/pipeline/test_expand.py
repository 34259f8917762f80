"""Templates of a pipeline are written out into plain stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from kd.errors import InputError
from kd.pipeline.expand import MODEL, expand

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
