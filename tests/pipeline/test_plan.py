"""Plans: what is in a key and what is not."""

from __future__ import annotations

import dataclasses

import pytest

from kd.config import jobs
from kd.errors import InputError
from kd.pipeline.plan import plan, status
from kd.store import Store
from kd.training.settings import Run
from tests.pipeline.small import made, planned


def keys(store, *words):
    return {node.name: node.key for node in planned(store, *words)[0].nodes}


def test_the_stages_of_a_job_stand_in_order_with_their_inputs(tmp_path):
    one, _ = planned(tmp_path)
    teacher, labels, student = one.nodes
    assert [n.name for n in one.nodes] == ["teacher", "labels", "student"]
    assert labels.inputs == {"teacher": teacher.key}
    assert student.inputs == {"teacher": teacher.key, "labels": labels.key}
    assert one.key == student.key


def test_a_sweep_over_temperature_alpha_and_seed_has_one_teacher(tmp_path):
    found, sweep = jobs(["temperature=1,4,8", "alpha=0.1,0.9", "seed=0,1", f"run.store={tmp_path}"], multirun=True)
    plans = [plan(job.config) for job in found]
    assert sweep and len(plans) == 12
    assert len({p.nodes[0].key for p in plans}) == len({p.nodes[1].key for p in plans}) == 1
    assert len({p.key for p in plans}) == 12


OTHER = {
    "store": None, "data_dir": None, "accelerator": "cpu", "devices": 2, "workers": 0, "memory_gb": 0.5,
    "validate_every": 2, "log_every": 7, "gradients": 5, "checkpoint_seconds": 1, "wandb": "offline",
    "wandb_project": "x", "latency": "true", "progress": "true", "trusted": "[mine]", "logger": None,
}  # fmt: skip


def test_every_field_of_run_is_named_here():
    assert set(OTHER) == {f.name for f in dataclasses.fields(Run)}


@pytest.mark.parametrize("field", sorted(OTHER))
def test_no_field_of_run_moves_a_key(field, tmp_path):
    words = {
        "store": f"run.store={tmp_path / 'elsewhere'}",
        "data_dir": f"run.data_dir={tmp_path}",
        "logger": "run/logger=[csv]",
    }.get(field, f"run.{field}={OTHER[field]}")
    assert keys(tmp_path) == keys(tmp_path, words)


@pytest.mark.parametrize(
    ("word", "moved"),
    [
        ("teacher.name=seed_cnn_small", {"teacher", "labels", "student"}),
        ("teacher_fit.lr=0.1", {"teacher", "labels", "student"}),
        ("data.split_seed=1", {"teacher", "labels", "student"}),
        ("student.name=seed_cnn", {"student"}),
        ("fit.epochs=3", {"student"}),
        ("seed=1", {"student"}),
        ("temperature=2", {"student"}),
        ("loss=[ce,soft_ce]", {"student"}),
    ],
)
def test_a_change_moves_the_keys_of_what_it_reaches_and_no_others(word, moved, tmp_path):
    before, after = keys(tmp_path), keys(tmp_path, word)
    assert {name for name in before if before[name] != after[name]} == moved


def test_numbers_that_are_equal_have_one_key(tmp_path):
    assert keys(tmp_path, "temperature=8") == keys(tmp_path, "temperature=8.0") == keys(tmp_path, "temperature=8e0")


def test_random_views_use_the_live_teacher_and_say_why(tmp_path):
    one, _ = planned(tmp_path, "data.augment=shift")
    assert [n.name for n in one.nodes] == ["teacher", "student"]
    assert "live teacher" in one.nodes[-1].unused["labels"]


def test_a_feature_term_uses_the_live_teacher_and_says_why(tmp_path):
    bind = ("loss.hint.student=student.conv3", "loss.hint.teacher=teacher.conv3")
    one, _ = planned(tmp_path, "loss=[ce,kd,hint]", *bind)
    assert "labels" not in {n.name for n in one.nodes}
    assert one.nodes[-1].unused == {"labels": "the term hint reads teacher.conv3, so the live teacher runs"}


def test_an_input_that_names_no_earlier_stage_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no stage before it; did you mean 'teacher'"):
        planned(tmp_path, "pipeline.stages.student.inputs.teacher=techer")


def test_planning_runs_nothing_and_a_finished_stage_is_a_hit(tmp_path):
    one, _ = planned(tmp_path)
    assert [status(n, Store(tmp_path)) for n in one.nodes] == ["miss"] * 3
    assert not (tmp_path / "artifacts").exists()
    made(tmp_path)
    assert [status(n, Store(tmp_path)) for n in one.nodes] == ["hit"] * 3


CHAIN = ("pipeline=chain", "assistants=[seed_cnn,seed_cnn_small]")


def test_a_chain_without_assistants_and_one_teacher_of_several_have_the_keys_of_a_plain_distillation(tmp_path):
    plain = list(keys(tmp_path).values())
    for words in (["pipeline=chain"], ["pipeline=dense"], ["pipeline=teachers", "teachers=[seed_cnn]"]):
        assert list(keys(tmp_path, *words).values()) == plain, words


def test_the_last_hop_of_a_chain_moves_no_key_before_it(tmp_path):
    before, after = keys(tmp_path, *CHAIN), keys(tmp_path, *CHAIN, "student.name=seed_cnn", "seed=3")
    assert {name for name in before if before[name] != after[name]} == {"student"}
    after = keys(tmp_path, *CHAIN, "fit.lr=0.1")  # which is the assistants' too
    assert {name for name in before if before[name] == after[name]} == {"teacher", "teacher_labels"}
    longer = keys(tmp_path, "pipeline=chain", "assistants=[seed_cnn,seed_cnn]")
    assert longer["assistant1"] == before["assistant1"] and longer["assistant2"] != before["assistant2"]


def test_an_assistant_may_be_trained_otherwise(tmp_path):
    longer = planned(tmp_path, *CHAIN, "+assistant_fit.epochs=7")[0]
    epochs = {node.name: node.config.get("fit", {}).get("epochs") for node in longer.nodes}
    assert epochs["assistant1"] == epochs["assistant2"] == 7 and epochs["student"] == epochs["teacher"] == 2
    own = "{name: seed_cnn, with: {objective: {kd: {loss: {temperature: 2}}}}}"
    changed = planned(tmp_path, "pipeline=chain", f"assistants=[{own},seed_cnn_small]")[0]
    hops = [node for node in changed.nodes if node.name.startswith("assistant") and "objective" in node.config]
    assert [hop.config["objective"]["kd"]["loss"]["temperature"] for hop in hops] == [2, 4]
    assert [hop.dials["temperature"] for hop in hops] == [2, 4] and changed.dials["temperature"] == 4
    assert changed.nodes[0].dials == {}


def test_a_cycle_and_an_edge_to_nowhere_are_told(tmp_path):
    chain = (*CHAIN, "+pipeline.stages.teacher.inputs.teacher=student")
    with pytest.raises(InputError, match="reads itself: teacher <- student <- assistant2 <- assistant1 <- teacher"):
        planned(tmp_path, *chain)
    with pytest.raises(InputError, match="'asistant1' is no stage before it; did you mean 'assistant1'"):
        planned(tmp_path, *CHAIN, "pipeline.stages.student.inputs.teacher=asistant1")


def test_teachers_of_other_classes_and_twins_are_told_in_planning(tmp_path):
    config = jobs([f"run.store={tmp_path}", *CHAIN])[0][0].config
    config["pipeline"]["stages"]["assistant2"]["data"] = jobs(["data=synthetic", "data.samples=600"])[0][0].config[
        "data"
    ]
    with pytest.raises(InputError, match="'assistant1' knows 10 classes and the student learns 100"):
        plan(config)
    with pytest.raises(InputError, match="teacher1 and teacher2 are one and the same network"):
        planned(tmp_path, "pipeline=teachers", "teachers=[seed_cnn,seed_cnn]")
    planned(tmp_path, "pipeline=teachers", "teachers=[seed_cnn,{name: seed_cnn, with: {seed: 1}}]")
