"""The data of a stage: read once, a subset drawn by the seed, and refused where they changed."""

from __future__ import annotations

import shutil

import pytest

import kd.data.cache
from kd.errors import InputError, KDError
from kd.pipeline.execute import execute
from kd.stages import Room
from kd.stages.splits import load_data, subset
from kd.store import Store
from tests.pipeline.small import made, planned
from tests.stages.folder import FOLDER, bits


@pytest.fixture
def own(images, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(images, tmp_path / "images")
    return tmp_path / "images"


def test_files_are_read_for_their_digest_once(images, tmp_path, monkeypatch):
    words = (*FOLDER, f"data.folder={images}")
    planned(tmp_path, *words)
    read = []
    monkeypatch.setattr(kd.data.cache, "_sha256", lambda path: read.append(path))
    made(tmp_path, *words)
    assert read == []


def spoiling(file, stage, moment):
    """A listener that empties a data file at a moment of a stage."""
    now = [None]

    def tell(event):
        now[0] = event.get("stage", now[0])
        if now[0] == stage and event["event"] == moment:
            file.write_bytes(b"")

    return tell


def test_data_that_change_while_a_stage_runs_fail_it_and_leave_nothing_to_resume_from(own, tmp_path):
    words = (*FOLDER, f"data.folder={own}", "data.augment=none", "run.memory_gb=1", "run.checkpoint_seconds=0")
    straight = made(tmp_path / "straight", *words)[1]
    store = Store(tmp_path / "store")
    one, run = planned(store.root, *words)
    file = own / "train" / "dark" / "1.jpg"
    content = file.read_bytes()
    with pytest.raises(KDError, match=r"imagefolder was \w{16} when student began, and changed while it ran .*nothing"):
        execute(one, store, run, spoiling(file, "student", "step"))
    assert store.get(one.key) is None and store.get(one.nodes[0].key) is not None
    assert not list(store.work(one.key).glob("*.ckpt"))
    with pytest.raises(InputError, match="has changed: its content is"):
        execute(one, store, run)
    file.write_bytes(content)
    assert execute(one, store, run) == ["student"]
    found = store.get(one.key)
    assert found is not None and bits(found.card) == bits(straight)


def test_data_that_vanish_while_a_stage_runs_fail_it_too(own, tmp_path):
    words = (*FOLDER, f"data.folder={own}", "pipeline=baseline", "run.memory_gb=1")
    store = Store(tmp_path / "store")
    one, run = planned(store.root, *words)
    gone = []
    with pytest.raises(KDError, match=r"changed while it ran \(imagefolder: no train/"):
        execute(one, store, run, lambda e: gone or e["event"] != "step" or gone.append(shutil.rmtree(own)))
    assert store.get(one.key) is None


def test_labels_of_data_that_changed_are_not_stored(own, tmp_path):
    words = (*FOLDER, f"data.folder={own}", "data.augment=none", "run.memory_gb=1")
    store = Store(tmp_path / "store")
    one, run = planned(store.root, *words)
    file = own / "val" / "dark" / "0.png"
    with pytest.raises(KDError, match="when labels began"):
        execute(one, store, run, spoiling(file, "labels", "pass"))
    assert [node.name for node in one.nodes if store.get(node.key)] == ["teacher"]


def test_a_subset_is_balanced_and_drawn_by_the_seed(tmp_path):
    one, run = planned(tmp_path)
    splits = load_data(one.nodes[0].config["data"], Room(run, tmp_path))
    rows = subset(splits, 256, 0)
    assert rows is not None and len(rows) == len(rows.unique()) == 256
    counts = splits.train.targets[rows].bincount(minlength=10)
    assert counts.min() >= 25 and counts.max() <= 26
    again, other = subset(splits, 256, 0), subset(splits, 256, 1)
    assert again is not None and other is not None and rows.equal(again) and not rows.equal(other)
    assert rows.equal(rows.sort().values)
    assert subset(splits, None, 0) is subset(splits, len(splits.train), 0) is None
