"""The image stages: own folders of images, subsets, data that changes, what is refused before training."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import kd.data.cache
import kd.training.trainer
from kd.errors import InputError, KDError
from kd.models import load
from kd.pipeline.execute import check, execute
from kd.pipeline.jobs import call
from kd.stages import Room, SoftLabels, Train
from kd.stages.image import _subset, load_data
from kd.store import Store
from tests.pipeline.small import kill_at, made, planned

FOLDER = (
    "data=imagefolder", "teacher.name=seed_cnn_small", "fit.samples=null", "teacher_fit.samples=null",
    "fit.batch_size=8", "teacher_fit.batch_size=8", "run.memory_gb=0", "run.workers=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Forty images in two classes, PNG and JPEG, of several sizes; the classes can be told apart."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 8)):
        for label, level in (("dark", 60), ("light", 190)):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                shape = (int(generator.integers(9, 13)), int(generator.integers(9, 13)), 3)
                pixels = np.clip(generator.normal(level, 40, shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.{'jpg' if i % 2 else 'png'}")
    return folder


@pytest.fixture
def own(images, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(images, tmp_path / "images")
    return tmp_path / "images"


def bits(card):
    return card["weights"], card["metrics"], card["trace"]


@pytest.mark.parametrize("augment", ["resized_crop_flip", "none"])
def test_a_folder_of_images_gives_the_same_bits_with_any_workers_and_from_memory(augment, images, tmp_path):
    words = (*FOLDER, f"data.folder={images}", f"data.augment={augment}")
    ran, first = made(tmp_path / "0", *words)
    assert ran == (["teacher", "labels", "student"] if augment == "none" else ["teacher", "student"])
    assert (
        first["document"]["config"]["data"] | {"num_classes": 2, "channels": 3} == first["document"]["config"]["data"]
    )
    for name, more in (("2", ["run.workers=2"]), ("memory", ["run.memory_gb=1"])):
        assert bits(made(tmp_path / name, *words, *more)[1]) == bits(first)


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
    rows = _subset(splits, 256, 0)
    assert rows is not None and len(rows) == len(rows.unique()) == 256
    counts = splits.train.targets[rows].bincount(minlength=10)
    assert counts.min() >= 25 and counts.max() <= 26
    again, other = _subset(splits, 256, 0), _subset(splits, 256, 1)
    assert again is not None and other is not None and rows.equal(again) and not rows.equal(other)
    assert rows.equal(rows.sort().values)
    assert _subset(splits, None, 0) is _subset(splits, len(splits.train), 0) is None


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
    from kd.pipeline.execute import build

    with pytest.raises(KDError, match="belong to other samples"):
        build(one.nodes[2].document).run({"teacher": teacher, "labels": wrong}, tmp_path / "out", Room(run, tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit.precision=16-mixed", "run.accelerator=cpu"], "16-mixed needs a GPU; on the CPU use bf16-mixed"),
        (["fit.optimiser={_target_: torch.optim.lr_scheduler.StepLR}"], "StepLR' is no class of an allowed package"),
        (["fit.optimiser={_target_: torch.nn.Linear}"], "is no optimiser of torch.optim"),
        (["fit.optimiser.weight_decay=-1"], "torch.optim.AdamW refuses .*Invalid weight_decay value"),
        (["+fit.optimiser.lr=0.1"], "fit.optimiser.lr stands elsewhere: set fit.lr"),
        (["~loss.ce", "+loss.loss=${loss.kd}"], "a term cannot be called 'loss'"),
        (["loss=[ce,kd,hint]", "loss.hint.student=student.nope", "loss.hint.teacher=teacher.conv1"], "nope"),
        (["pipeline=baseline", "pipeline.stages.student.objective=${loss}"], "has a term that needs one"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(words, said, tmp_path):
    one, run = planned(tmp_path, *words)
    with pytest.raises(InputError, match=said):
        check([one], Store(tmp_path), run)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize("moment", ["evaluation", "storing"])
@pytest.mark.parametrize("words", [("fit.patience=1", "fit.lr=1e-9", "fit.epochs=3"), ()], ids=["patience", "last"])
def test_a_kill_after_the_last_step_loses_nothing(moment, words, tmp_path):
    words = ("pipeline=baseline", "run.checkpoint_seconds=0", "run.log_every=1", *words)
    straight = made(tmp_path / "a", *words)[1]
    assert len(straight["trace"]["epochs"]) == 2  # patience ended before a third, and the kill forgets none of it
    one, run = planned(tmp_path / "b", *words)
    store = Store(tmp_path / "b")
    assert "SIGKILL" in call(kill_at, moment, 1, one, run)["error"]
    execute(one, store, run)
    found = store.get(one.key)
    assert found is not None and bits(found.card) == bits(straight) and found.card["resumed"] == [8]
    history = found.file("history.jsonl").read_text()
    assert history == (Store(tmp_path / "a").folder(one.key) / "history.jsonl").read_text()


def test_a_stage_has_no_use_for_inputs_it_does_not_read():
    assert Train.unused({}, {}) == SoftLabels.unused({}, {"teacher": "x"}) == {}


@pytest.fixture
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.gpu
@pytest.mark.usefixtures("_gpu")
def test_on_a_gpu_the_labels_are_the_teachers_and_a_folder_of_images_gives_the_same_bits_twice(images, tmp_path):
    words = (*FOLDER, f"data.folder={images}", "data.augment=none", "run.accelerator=gpu")
    cards = [made(tmp_path / name, *words, f"run.workers={name}")[1] for name in "02"]
    assert bits(cards[0]) == bits(cards[1])
    stored = [next((tmp_path / name / "artifacts").glob("*/labels.safetensors")) for name in "02"]
    assert stored[0].read_bytes() == stored[1].read_bytes()
    on_cpu = made(tmp_path / "cpu", *words, "run.accelerator=cpu")[1]
    assert cards[0]["metrics"]["test/loss"] == pytest.approx(on_cpu["metrics"]["test/loss"], rel=0.05)


def test_memories_masks_and_lists_of_layers_survive_a_kill_to_the_bit(tmp_path):
    # CRD's memories and MGD's masks; a run that began them anew, or drew on, would end elsewhere.
    words = (
        "loss=[ce,crd,mgd,fsp]", "run.checkpoint_seconds=0", "loss.crd.loss.negatives=64",
        "loss.crd.student=student.dense", "loss.crd.teacher=teacher.dense",
        "loss.mgd.student=student.conv3", "loss.mgd.teacher=teacher.conv3",
        "loss.fsp.student=[student.conv1,student.conv2]", "loss.fsp.teacher=[teacher.conv1,teacher.conv2]",
    )  # fmt: skip
    _, straight = made(tmp_path / "a", *words)
    one, run = planned(tmp_path / "b", *words)
    call(kill_at, "step", 8 + 6, one, run)  # the teacher takes eight
    execute(one, Store(tmp_path / "b"), run)
    artifact = Store(tmp_path / "b").get(one.key)
    assert artifact is not None and artifact.card["resumed"] and not straight["resumed"]
    assert bits(artifact.card) == bits(straight)
    assert not [name for name in load_file(artifact.path / "model.safetensors") if "memory" in name or "crd" in name]
