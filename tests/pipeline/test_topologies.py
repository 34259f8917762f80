"""Who teaches whom, end to end on the digits: chains, dense chains, several teachers, several students."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import kd.training.trainer
from kd.errors import InputError
from kd.models import load
from kd.pipeline.execute import check, execute
from kd.pipeline.jobs import call
from kd.pipeline.work import branches, run_packed
from kd.report.rows import collect
from kd.stages.base import Room
from kd.stages.splits import load_data
from kd.store import Store
from kd.training.loaders import EpochLoader
from kd.training.settings import Run
from tests.pipeline.small import kill_at, made, planned
from tests.stages.folder import bits

TINY = "{name: seed_cnn_small, options: {widths: [2, 3, 4, 5]}}"
SMALL = "+student.options.widths=[2,3,4,5]"
CHAIN = ("pipeline=chain", "assistants=[seed_cnn_small]", SMALL)
TEACHERS = ("pipeline=teachers", "teachers=[seed_cnn_small,{name: seed_cnn_small, with: {seed: 1}}]", SMALL)
MIXES = ("mean_probabilities", "mean_logits", "confidence", "cross_entropy", "gate", "random", "each")


def cards(store: Any, *words: str) -> dict[str, Any]:
    """The cards of a job's stages by name."""
    one, _ = planned(store, *words)
    home = Store(store)
    return {node.name: found.card for node in one.nodes if (found := home.get(node.key)) is not None}


def test_a_chain_trains_hop_by_hop_and_a_new_last_hop_only_that(tmp_path):
    ran, card = made(tmp_path, *CHAIN)
    assert ran == ["teacher", "teacher_labels", "assistant1", "assistant1_labels", "student"]
    found = cards(tmp_path, *CHAIN)
    assert found["student"]["document"]["inputs"]["teacher"] == found["assistant1"]["key"]
    assert found["assistant1"]["dials"] == {"temperature": 4, "alpha": 0.9, "seed": 0}
    assert found["teacher"]["dials"] == {}
    assert 0 <= card["metrics"]["test/agreement"] <= 1
    assert made(tmp_path, *CHAIN[:2], "+student.options.widths=[2,2,2,2]")[0] == ["student"]
    assert made(tmp_path, *CHAIN)[0] == []
    # The distilled student becomes the next teacher, as it is.
    longer = made(tmp_path, *CHAIN[:2], f"assistants=[seed_cnn_small,{TINY}]", "+student.options.widths=[2,2,2,2]")[0]
    assert longer == ["assistant2_labels", "student"]


def test_a_hop_hears_what_the_assistant_says(tmp_path, monkeypatch):
    inner, seen = kd.training.trainer.train, []

    def spy(module, data, *arguments, **keywords):
        seen.append((keywords["labels"], data[0]))
        return inner(module, data, *arguments, **keywords)

    monkeypatch.setattr(kd.training.trainer, "train", spy)
    made(tmp_path, *CHAIN)
    one, _ = planned(tmp_path, *CHAIN)
    assistant = Store(tmp_path).get(next(node.key for node in one.nodes if node.name == "assistant1"))
    labels, split = seen[-1]
    assert assistant is not None
    with torch.no_grad():
        said = load(assistant.path)(split.images[:50] / 255)
    torch.testing.assert_close(labels.at(0, torch.arange(50))["teacher.logits"], said)


def test_in_a_dense_chain_each_hop_hears_all_before_it(tmp_path):
    words = ("pipeline=dense", f"assistants=[seed_cnn_small,{TINY}]", "+student.options.widths=[2,2,2,2]")
    ran, card = made(tmp_path, *words)
    assert len(ran) == 7
    inputs = {name: set(found["document"]["inputs"]) for name, found in cards(tmp_path, *words).items()}
    assert inputs["assistant1"] == {"teacher", "labels"}
    assert inputs["assistant2"] == {"teacher1", "teacher2", "labels1", "labels2"}
    assert inputs["student"] == {f"{role}{n}" for role in ("teacher", "labels") for n in (1, 2, 3)}
    loss = card["document"]["config"]["objective"]["kd"]["loss"]
    assert (loss["_target_"], loss["reduce"], loss["drop"]) == ("kd.losses.ensemble.Each", "sum", 1)
    shares = [card["metrics"][f"test/agreement_teacher{n}"] for n in (1, 2, 3)]
    assert card["metrics"]["test/agreement"] == pytest.approx(sum(shares) / 3)
    # The first hop is that of a plain chain: nothing is trained twice.
    assert made(tmp_path, *CHAIN)[0] == ["student"]


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_trains_a_student_of_two_teachers(mix, tmp_path_factory):
    store = tmp_path_factory.getbasetemp() / "mixes"
    ran, card = made(store, *TEACHERS, f"mix={mix}")
    assert ran[-1] == "student" and len(ran) in (1, 5)
    assert all(row["train/kd"] > 0 for row in card["trace"]["epochs"])
    weights = {name: found["weights"] for name, found in cards(store, *TEACHERS).items() if "weights" in found}
    assert weights["teacher1"] != weights["teacher2"]


def test_several_teachers_heard_through_labels_or_live_give_the_same_bits(tmp_path):
    words = (*TEACHERS, "fit.batch_size=64")
    stored, live = made(tmp_path / "a", *words)[1], made(tmp_path / "b", *words, "labels.live=true")[1]
    assert set(stored["document"]["inputs"]) == {"teacher1", "teacher2", "labels1", "labels2"}
    assert set(live["document"]["inputs"]) == {"teacher1", "teacher2"}
    assert stored["weights"] == live["weights"]


def test_a_term_on_layers_hears_each_teacher_and_labels_serve_where_no_layer_is_read(tmp_path):
    words = (*TEACHERS, "loss=[ce,kd,hint]", "loss.hint.student=student.conv3")
    card = made(tmp_path, *words, "loss.hint.teacher=teacher.conv3")[1]
    assert set(card["document"]["inputs"]) == {"teacher1", "teacher2"}
    assert {"train/hint_teacher1", "train/hint_teacher2", "train/kd"} <= set(card["trace"]["epochs"][0])
    last = planned(tmp_path, *words, "loss.hint.teacher=teacher2.conv3")[0].nodes[-1]
    assert set(last.inputs) == {"teacher1", "teacher2", "labels1"}
    assert "the live teacher2 runs" in last.unused["labels2"]
    assert made(tmp_path, *words, "loss.hint.teacher=teacher2.conv3")[0] == ["teacher1_labels", "student"]


BORN = ("pipeline=born_again", "teacher.name=seed_cnn_small", "+teacher.options.widths=[2,3,4,5]")


def test_generations_teach_one_another_and_a_further_one_trains_that_alone(tmp_path):
    ran, card = made(tmp_path, *BORN)
    assert ran == ["teacher", "generation1_labels", "generation1", "generation2_labels", "generation2"]
    found = cards(tmp_path, *BORN)
    assert found["generation2"]["document"]["inputs"]["teacher"] == found["generation1"]["key"]
    assert found["generation1"]["document"]["inputs"]["teacher"] == found["teacher"]["key"]
    nets = {name: found[name]["document"]["config"] for name in ("teacher", "generation1", "generation2")}
    assert nets["teacher"]["model"] == nets["generation1"]["student"] == nets["generation2"]["student"]
    assert [config["seed"] for config in nets.values()] == [0, 1, 2]
    assert len({found[name]["weights"] for name in nets}) == 3
    three, _ = planned(tmp_path, *BORN, "born_again.generations=3")
    status = [Store(tmp_path).get(node.key) is not None for node in three.nodes]
    assert [node.name for node in three.nodes][-2:] == ["generation3_labels", "generation3"]
    assert status == [True] * 5 + [False] * 2 and three.nodes[4].key == card["key"]
    assert made(tmp_path, *BORN, "born_again.generations=3")[0] == ["generation3_labels", "generation3"]
    assert made(tmp_path, *BORN, "born_again.generations=1")[0] == []


def test_the_generations_together_are_a_row_that_trains_nothing(tmp_path):
    words = (*BORN, "born_again.ensemble=mean_logits")
    _, card = made(tmp_path, *words)
    found = cards(tmp_path, *words)
    home = Store(tmp_path)
    nets = [load(home.get(found[name]["key"]).path) for name in ("generation1", "generation2")]
    data = load_data(card["document"]["config"]["data"], Room(Run(store=str(tmp_path)), tmp_path))
    with torch.no_grad():
        said = sum(net(data.test.images / 255) for net in nets)
    right = (said.argmax(1) == data.test.targets).double().mean().item()
    assert card["metrics"]["test/accuracy"] == pytest.approx(right)
    assert card["cost"]["parameters"] == 2 * found["generation1"]["cost"]["parameters"]
    assert made(tmp_path, *BORN, "born_again.ensemble=mean_probabilities")[0] == ["ensemble"]
    rows = collect([card], {one["key"]: one for one in found.values()})
    assert (rows[0]["role"], rows[0]["model"]) == ("ensemble", "seed_cnn_small + seed_cnn_small")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("born_again.generations=0",), "born_again.generations=0 is out of range: it must be a number of them"),
        (("born_again.generations=[]",), "or a list of networks"),
        (("born_again.ensemble=mean_logit",), "born_again.ensemble='mean_logit' is none of .* did you mean 'mean_logi"),
    ],
)
def test_generations_that_cannot_be_are_refused(words, said, tmp_path):
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *BORN, *words)


def test_generations_may_be_other_networks(tmp_path):
    nodes = planned(tmp_path, *BORN, f"born_again.generations=[seed_cnn_small,{TINY}]")[0].nodes
    found = {node.name: node.config["student"] for node in nodes if "student" in node.config}
    assert found["generation1"]["options"] == {} and found["generation2"]["options"] == {"widths": [2, 3, 4, 5]}


def test_several_students_of_one_teacher_are_compared(tmp_path):
    words = ("pipeline=students", f"students=[seed_cnn_small,{TINY}]")
    ran, card = made(tmp_path, *words)
    assert ran == ["teacher", "teacher_labels", "student1", "student2", "compare"]
    artifact = Store(tmp_path).get(card["key"])
    assert artifact is not None
    table = json.loads(artifact.file("comparison.json").read_text())
    assert [row["role"] for row in table["rows"]] == ["student1", "student2"]
    best = max(table["rows"], key=lambda row: row["val/accuracy"])
    assert table["best"] == best["role"] and card["metrics"]["best/test/accuracy"] == best["test/accuracy"]
    assert table["rows"][1]["parameters"] < table["rows"][0]["parameters"]
    # Each is the run of a plain distillation, by the same key.
    assert made(tmp_path, "student.name=seed_cnn_small")[0] == []
    assert cards(tmp_path, *words)["student1"]["dials"]["temperature"] == 4


@pytest.mark.parametrize(
    "words",
    [
        CHAIN,
        (*TEACHERS, "mix=random"),
        (*TEACHERS, "mix=each", "mix.loss.drop=1", "loss=[ce,dkd]", "labels.live=true"),
    ],
    ids=["second hop of a chain", "random choice of teachers", "live teachers, one dropped"],
)
def test_killed_in_the_last_training_the_bits_are_the_same(words, tmp_path):
    words = (*words, "run.checkpoint_seconds=0")
    straight = made(tmp_path / "a", *words)[1]
    one, run = planned(tmp_path / "b", *words)
    home = Store(tmp_path / "b")
    execute(dataclasses.replace(one, nodes=one.nodes[:-1]), home, run)  # what comes before is whole
    assert "SIGKILL" in call(kill_at, "step", 6, one, run)["error"]
    assert home.get(one.key) is None
    assert execute(one, home, run) == ["student"]
    found = home.get(one.key)
    assert found is not None and bits(found.card) == bits(straight) and found.card["resumed"]


def test_an_assistant_larger_than_its_teacher_is_told_before_any_training(tmp_path):
    one, run = planned(tmp_path, "pipeline=chain", "assistants=[seed_cnn]", "teacher.name=seed_cnn_small")
    lines: list[str] = []
    check([one], Store(tmp_path), run, lambda event: lines.append(event.get("line", "")))
    assert any("assistant1" in line and "more than the" in line and "of its teacher" in line for line in lines), lines
    assert not (tmp_path / "artifacts").exists()


def test_a_comparison_of_what_is_no_network_is_refused(tmp_path):
    words = ("pipeline=students", "students=[seed_cnn_small]", "+pipeline.stages.compare.inputs.b=teacher_labels")
    one, run = planned(tmp_path, *words)
    with pytest.raises(InputError, match="b is no trained network"):
        check([one], Store(tmp_path), run)


def test_packed_the_students_share_their_batches_and_each_has_the_bits_of_its_lone_run(tmp_path, monkeypatch):
    words = ("pipeline=students", f"students=[seed_cnn_small,{TINY},seed_cnn]")
    assert len(branches(planned(tmp_path, *words)[0])) == 3 and branches(planned(tmp_path, *CHAIN)[0]) == []
    made(tmp_path / "a", *words)
    one, run = planned(tmp_path / "b", *words)
    inner, made_of, events = EpochLoader.batches, [], []

    def counted(loader, *place):
        made_of.append((loader.shuffle, id(loader)))
        return inner(loader, *place)

    monkeypatch.setattr(EpochLoader, "batches", counted)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    run_packed([[(0, one, run)]], None, events.append)
    assert events[-1]["outcome"]["status"] == "done"
    # Two epochs of the teacher's own, and two that all three students saw.
    assert [shuffled for shuffled, _ in made_of].count(True) == 4
    alone, packed = cards(tmp_path / "a", *words), cards(tmp_path / "b", *words)
    assert [bits(packed[name]) for name in ("student1", "student2", "student3")] == [
        bits(alone[name]) for name in ("student1", "student2", "student3")
    ]
