"""A job looked at before it runs: all is well with what was just made, and each thing that is broken is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd.doctoring.examine import examine
from kd.doctoring.verdicts import FAIL, OK, WARN
from kd.models import Frozen
from kd.store import Store
from tests.pipeline.small import made, planned

WORDS = ("teacher_fit.epochs=4",)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store with a teacher, its labels and a student."""
    folder = tmp_path_factory.mktemp("store")
    made(folder, *WORDS)
    return folder


def looked_at(folder, *words):
    """State and words of each check."""
    plan, run = planned(folder, *WORDS, *words)
    [found] = examine([plan], [run], [0], lambda event: None)
    return {check.name: (check.state, check.said) for check in found.checks}, found.costs


def files(folder: Path):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "data" not in path.parts}


def spoilt(home, folder, stage, change):
    """A copy of the store in which the files of one artifact were changed, with checksums that fit them."""
    shutil.copytree(home, folder)
    store = Store(folder)
    node = next(n for n in planned(folder, *WORDS)[0].nodes if n.name == stage)
    artifact = store.get(node.key)
    assert artifact is not None
    out = folder / "work" / "out"
    shutil.copytree(artifact.path, out)
    (out / "card.json").unlink()
    change(out)
    card = {name: value for name, value in artifact.card.items() if name != "files"}
    store.remove(node.key)
    store.put(node.key, out, card)
    return folder


def recipe(**fields):
    """A change of what the network is built from again."""

    def change(out):
        path = out / "model.json"
        text = json.loads(path.read_text())
        path.write_text(json.dumps({**text, **{name: make(text) for name, make in fields.items()}}))

    return change


def test_all_is_well_with_what_was_made_and_nothing_is_written(home):
    before = files(home)
    found, costs = looked_at(home, "temperature=2")
    assert {state for state, _ in found.values()} == {OK}
    assert list(found) == [
        "stages", "teacher accuracy", "class order", "teacher normalisation", "student normalisation", "bindings",
        "stored labels", "teacher frozen", "loss", "gradient shares", "memory", "time", "disk",
    ]  # fmt: skip
    assert "kd(student.logits, teacher.logits)" in found["bindings"][1] and len(costs) == 1
    assert "stored labels speak for it" in found["teacher frozen"][1]
    assert files(home) == before
    again, costs = looked_at(home)
    assert again["time"] == (OK, "nothing is left to run") and costs == {}


def test_a_store_without_the_teacher_says_so_and_tells_what_all_of_it_will_cost(tmp_path):
    found, costs = looked_at(tmp_path)
    assert found["teacher accuracy"] == (WARN, "the teacher is not trained yet; ask again when it is")
    assert {state for state, _ in found.values()} == {OK, WARN} and "these will change" in found["gradient shares"][1]
    assert found["teacher frozen"] == (OK, "in eval mode, without gradients")
    plan, _ = planned(tmp_path, *WORDS)
    assert set(costs) == {node.key for node in plan.nodes}
    assert all(cost.seconds > 0 and cost.bytes > 0 for cost in costs.values())
    teacher, student = costs[plan.nodes[0].key], costs[plan.key]
    assert "4 steps of" in student.said and "2 epochs" in student.said and "4 epochs" in teacher.said
    longer = planned(tmp_path, *WORDS, "fit.epochs=20")
    pair = [planned(tmp_path, *WORDS), longer]  # one kind of stage is timed once
    short_, long_ = examine([plan for plan, _ in pair], [run for _, run in pair], [0], lambda event: None)
    assert 1.5 < long_.costs[longer[0].key].seconds / short_.costs[plan.key].seconds <= 10 and not long_.checks
    assert not list(tmp_path.glob("artifacts/*")) and not list(tmp_path.glob("work/*"))


def test_permuted_classes_are_seen(home, tmp_path):
    folder = spoilt(home, tmp_path / "s", "teacher", recipe(classes=lambda text: text["classes"][::-1]))
    found, _ = looked_at(folder, "temperature=2")
    assert found["class order"][0] == FAIL and "(10 of 10 differ)" in found["class order"][1]


def test_another_mean_and_std_are_seen_and_what_they_do_to_the_accuracy(home, tmp_path):
    folder = spoilt(home, tmp_path / "s", "teacher", recipe(mean=lambda text: [3.0], std=lambda text: [0.1]))
    found, _ = looked_at(folder, "temperature=2")
    assert found["teacher normalisation"][0] == FAIL and "mean 3.000, std 0.100" in found["teacher normalisation"][1]
    assert found["teacher accuracy"][0] == FAIL and "its card says" in found["teacher accuracy"][1]
    assert found["stored labels"][0] == FAIL  # they were made with the right ones
    assert found["student normalisation"][0] == OK


def test_labels_of_another_teacher_are_seen(home, tmp_path):
    def change(out):
        stored = load_file(out / "labels.safetensors")
        save_file({**stored, "logits": stored["logits"].roll(1, 1).contiguous()}, out / "labels.safetensors")

    found, _ = looked_at(spoilt(home, tmp_path / "s", "labels", change), "temperature=2")
    assert found["stored labels"][0] == FAIL and "another teacher's" in found["stored labels"][1]


def test_a_teacher_near_chance_and_a_student_that_knows_more(tmp_path):
    words = ("teacher_fit.lr=1e-30",)
    made(tmp_path, *WORDS, *words)
    assert "near chance" in looked_at(tmp_path, *words)[0]["teacher accuracy"][1]
    made(tmp_path, *WORDS)
    made(tmp_path, *WORDS, "pipeline=baseline", "student.name=seed_cnn", "fit.epochs=12")
    found, _ = looked_at(tmp_path, "student.name=seed_cnn")
    assert found["teacher accuracy"][0] == WARN and "less than its student" in found["teacher accuracy"][1]


def test_a_live_teacher_that_follows_its_trainer_is_seen(home, monkeypatch):
    assert looked_at(home, "labels.live=true")[0]["teacher frozen"] == (OK, "in eval mode, without gradients")
    monkeypatch.setattr(Frozen, "train", lambda self, mode=True: (self.module.train(mode), self)[1])
    found, _ = looked_at(home, "labels.live=true")
    assert found["teacher frozen"][0] == FAIL and "in train mode" in found["teacher frozen"][1]


def test_a_term_without_a_say_and_one_that_is_not_finite(home):
    found, _ = looked_at(home, "alpha=0.9999")
    assert found["gradient shares"][0] == WARN and "ce hardly moves the student" in found["gradient shares"][1]
    found, _ = looked_at(home, "loss.kd.weight=1e39")
    assert found["loss"][0] == FAIL and "the weighted sum is not finite" in found["loss"][1]


def test_what_kd_run_would_refuse_is_one_line(home):
    words = ("loss=[ce,kd,hint]", "loss.hint.student=student.nope", "loss.hint.teacher=teacher.conv1")
    found, _ = looked_at(home, *words)
    assert list(found) == ["config"] and found["config"][0] == FAIL and "nope" in found["config"][1]


def test_a_baseline_has_no_teacher_to_look_at(home):
    found, costs = looked_at(home, "pipeline=baseline")
    assert {state for state, _ in found.values()} == {OK} and not any("teacher" in name for name in found)
    assert len(costs) == 1


def test_peers_are_looked_at_as_they_learn_together(home):
    found, costs = looked_at(home, "pipeline=mutual", "student.name=seed_cnn_small", "students=[seed_cnn]")
    assert {state for state, _ in found.values()} == {OK} and not any("teacher" in name for name in found)
    assert "kd(student.logits, teacher.logits)" in found["bindings"][1]
    assert "peer1_ce(student.logits, batch.target)" in found["bindings"][1]
    assert set(found["gradient shares"][1].split(" %")[0].split(", ")[0].split()) >= {"ce"}
    [cost] = costs.values()
    assert "4 steps of" in cost.said


@pytest.mark.parametrize(("words", "steps"), [(("bidirectional",), 4), (("meta", "circle.quiz=0.25"), 3)])
def test_a_teacher_that_learns_is_looked_at_with_its_student(words, steps, home):
    words = (f"pipeline={words[0]}", *words[1:])
    found, costs = looked_at(home, *words)
    assert {state for state, _ in found.values()} == {OK}
    assert found["teacher frozen"] == (OK, "it learns too: all at 0.1 of fit.lr")
    assert {"teacher accuracy", "class order", "teacher normalisation", "loss", "time"} <= set(found)
    assert ("teacher_hint(" in found["bindings"][1]) == (steps == 4)
    [cost] = costs.values()
    assert f"{steps} steps of" in cost.said
    found, costs = looked_at(home, *words, "teacher.name=seed_cnn_small")
    assert found["teacher accuracy"][0] == WARN and len(costs) == 2


def test_memory_that_runs_out_is_one_line(home, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("kd.training.probe.probe", full)
    found, _ = looked_at(home, "temperature=2")
    assert found["memory"] == (FAIL, "CUDA out of memory. Tried to allocate 2 GiB; lower fit.batch_size")
