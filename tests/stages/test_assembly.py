"""What a training is given: stored labels row by row, and those of other samples refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import kd.training.trainer
from kd.errors import KDError
from kd.models import load
from kd.pipeline.execute import build, execute
from kd.stages import Room
from kd.stages.assembly import assemble
from kd.stages.splits import load_data
from kd.store import Store
from tests.pipeline.small import made, planned


def test_stored_labels_follow_the_rows_of_the_subset(tmp_path, monkeypatch):
    inner, seen = kd.training.trainer.train, []

    def spy(module, data, *arguments, **keywords):
        seen.append((keywords["labels"], data[0]))
        return inner(module, data, *arguments, **keywords)

    monkeypatch.setattr(kd.training.trainer, "train", spy)
    made(tmp_path, "fit.samples=100", "fit.batch_size=50")
    (none, _), (labels, split) = seen
    assert none is None and len(split) == 100
    one, _ = planned(tmp_path, "fit.samples=100", "fit.batch_size=50")
    artifact = Store(tmp_path).get(one.nodes[0].key)
    assert artifact is not None
    with torch.no_grad():
        live = load(artifact.path)(split.images / 255)
    torch.testing.assert_close(labels.at(0, torch.arange(100))["teacher.logits"], live)


def test_labels_of_other_samples_are_refused(tmp_path):
    made(tmp_path)
    one, run = planned(tmp_path, "temperature=2")
    labels = Store(tmp_path).folder(one.nodes[1].key) / "labels.safetensors"
    stored = load_file(labels)
    other, _ = planned(tmp_path, "data.split_seed=1", "temperature=2")
    execute(other, Store(tmp_path), run)
    moved = load_file(Store(tmp_path).folder(other.nodes[1].key) / "labels.safetensors")
    assert not stored["ids"].equal(moved["ids"])
    teacher, wrong = (Store(tmp_path).get(key) for key in (one.nodes[0].key, other.nodes[1].key))
    assert teacher is not None and wrong is not None
    with pytest.raises(KDError, match="belong to other samples"):
        build(one.nodes[2].document).run({"teacher": teacher, "labels": wrong}, tmp_path / "out", Room(run, tmp_path))


def test_with_stored_labels_no_teacher_is_loaded_and_without_a_given_one_stands_in(tmp_path):
    made(tmp_path)
    one, run = planned(tmp_path, "temperature=2")
    teacher, labels = (Store(tmp_path).get(node.key) for node in one.nodes[:2])
    assert teacher is not None and labels is not None
    stage, room = build(one.nodes[2].document), Room(run, tmp_path)
    splits = load_data(stage.data, room)

    def put(inputs, given=None):
        from kd.stages.building import build as network

        return assemble(stage, network(stage.student, stage.data, splits, 0, room), inputs, splits, room, given)

    stored = put({"teacher": teacher, "labels": labels})
    assert stored.labels is not None and not stored.teachers and not stored.module.teachers
    assert stored.module.stored == {"teacher"}
    live = put({"teacher": teacher})
    assert live.labels is None and live.module.teachers["teacher"].module is live.teachers["teacher"]
    given = load(teacher.path)
    assert put({}, given).teachers == {"teacher": given}
    assert (live.steps, len(live.split)) == (4, 256)
