"""A student that sees images made from its teacher, and no others."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kd.training.trainer
from kd.data import dreams
from kd.errors import InputError, KDError
from kd.models import load
from kd.pipeline.execute import check, execute
from kd.pipeline.jobs import call
from kd.pipeline.plan import outlook
from kd.stages import Dream, Room
from kd.stages.splits import images_in, learnt_from
from kd.store import Store
from kd.training.settings import Run
from tests.pipeline.small import kill_at, made, planned

FREE = ("pipeline=data_free", "teacher.name=cifar_resnet8", "student.name=seed_cnn_small")
SMALL = (*FREE, "dream.samples=50", "dream.batch_size=20", "dream.steps=4", "fit.batch_size=25", "fit.samples=null")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store with a teacher that knows the digits, images, and a student of these."""
    root = tmp_path_factory.mktemp("home")
    made(root, *SMALL)
    return root


def stored(home, *words):
    """The artifacts of a job by the names of their stages."""
    store = Store(home)
    return {node.name: store.get(node.key) for node in planned(home, *words)[0].nodes}


def test_the_student_sees_the_made_images_alone_under_the_teachers_words_on_them(home, monkeypatch):
    inner, seen = kd.training.trainer.train, []

    def spy(module, data, *arguments, **keywords):
        seen.append((data, keywords["labels"]))
        return inner(module, data, *arguments, **keywords)

    monkeypatch.setattr(kd.training.trainer, "train", spy)
    ran, card = made(home, *SMALL, "seed=1")
    assert ran == ["student"] and len(seen) == 1
    (learnt, validation), labels = seen[0]
    found = stored(home, *SMALL, "seed=1")
    images = dreams.read(found["dream"].file(dreams.IMAGES), 1, 8)
    assert learnt.images.equal(images.images) and len(learnt) == 50
    assert learnt.targets.tolist() == [number % 10 for number in range(50)]
    with torch.no_grad():
        said = load(found["teacher"].path)(images.images / 255)
    torch.testing.assert_close(labels.at(0, torch.arange(50))["teacher.logits"], said)
    # It is judged on the real test set, as its teacher.
    real = made(home, "pipeline=baseline", "student.name=seed_cnn_small")[1]
    for name in ("digest", "name"):
        assert card["fingerprints"]["data"][name] == real["fingerprints"]["data"][name]
    assert len(validation) > 50 and 0 <= card["metrics"]["test/agreement"] <= 1


def test_a_student_learns_far_above_chance_without_a_real_image(tmp_path):
    teacher = ("teacher_fit.epochs=10", "teacher_fit.samples=null", "dream.samples=256", "dream.batch_size=128")
    words = (*FREE, *teacher, "fit.samples=null", "fit.batch_size=32", "fit.epochs=40")
    dreamt, noise = ("dream.steps=60", "dream.statistics=0.3"), ("dream.steps=1", "dream.lr=0.000001")
    card = made(tmp_path, *words, *dreamt)[1]
    assert stored(tmp_path, *words, *dreamt)["dream"].card["metrics"]["dream/teacher_accuracy"] > 0.8
    # Chance is 0.1, and the noise that the images begin with teaches little more.
    assert card["metrics"]["test/accuracy"] > 0.5 > 0.35 > made(tmp_path, *words, *noise)[1]["metrics"]["test/accuracy"]


def test_killed_between_two_batches_the_images_are_the_same(home, tmp_path):
    one, _ = planned(home, *SMALL)
    again, run_ = planned(tmp_path, *SMALL)
    execute(dataclasses.replace(again, nodes=again.nodes[:1]), Store(tmp_path), run_)
    assert "SIGKILL" in call(kill_at, "a batch of images", 3, again, run_)["error"]
    lines = []
    execute(again, Store(tmp_path), run_, lambda event: lines.append(event.get("line", "")))
    assert "images: 2 of 3 batches are there" in lines
    files = [Store(root).get(plan.nodes[1].key).card["files"] for root, plan in ((home, one), (tmp_path, again))]
    assert files[0]["images.safetensors"]["sha256"] == files[1]["images.safetensors"]["sha256"]


def test_its_key_knows_no_data_but_the_teachers_and_a_batch_is_no_larger_than_all(home):
    node = planned(home, *SMALL)[0].nodes[1]
    assert node.name == "dream" and "data" not in node.config and list(node.inputs) == ["teacher"]
    other = planned(home, *SMALL, "fit.epochs=9", "data.augment=shift")[0].nodes
    assert other[1].inputs["teacher"] != node.inputs["teacher"]  # it saw shifted digits
    assert planned(home, *SMALL, "dream.batch_size=99")[0].nodes[1].config["batch_size"] == 50
    assert planned(home, *SMALL, "dream.seed=1")[0].nodes[1].key != node.key


def test_views_of_made_images_are_stored_as_those_of_any(home):
    words = (*SMALL, "data.augment=shift", "labels.views=2", "teacher_fit.epochs=1")
    one, run = planned(home, *words)
    (text,) = outlook([one], Store(home), run).values()
    assert text.startswith("2 views of 50 samples")
    made(home, *words)
    assert set(stored(home, *words)["student"].card["document"]["inputs"]) == {"teacher", "labels", "images"}


def test_a_teacher_without_batch_norm_is_refused_before_anything_runs(tmp_path):
    one, run = planned(tmp_path, "pipeline=data_free")
    with pytest.raises(InputError, match=r"the teacher SeedCNN has no batch normalisation.*teacher.name=cifar_resnet8"):
        check([one], Store(tmp_path), run)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("dream.samples=1",), "dream.samples=1 is out of range"),
        (("dream.steps=0",), "dream.steps=0 is out of range"),
        (("dream.lr=0",), "dream.lr=0 is out of range: it must be a number above 0"),
        (("dream.variation=-1",), "dream.variation=-1 is out of range"),
        (("dream.samples=41",), "dream.batch_size=20 leaves a last batch of one image"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_planning(words, said, tmp_path):
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *SMALL, *words)


def test_labels_of_other_images_are_refused(home):
    found = stored(home, *SMALL)
    data = found["student"].card["document"]["config"]["data"]
    room = Room(Run(store=str(home)), home)
    inputs = {"labels": found["labels"], "images": found["dream"]}
    assert len(learnt_from(data, inputs, room).train) == 50 and images_in(inputs) == 50
    with pytest.raises(KDError, match="labels are of other images than the student sees"):
        learnt_from(data, {"labels": found["labels"]}, room)
    with pytest.raises(InputError, match="images must name a stage that makes images"):
        images_in({"images": found["labels"]})
    assert Dream.VERSION == 1 and images_in({}) is None
