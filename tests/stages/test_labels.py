"""Stored views against the live teacher, kills in the middle, what planning finds."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from safetensors import safe_open

from kd.data import labels as files
from kd.errors import InputError, KDError
from kd.pipeline.execute import build, check, execute
from kd.pipeline.jobs import call
from kd.pipeline.plan import outlook
from kd.stages import SoftLabels
from kd.store import Store, digest
from tests.pipeline.small import made, planned

MOVING = ("data.augment=shift", "labels.views=2")


def weights(store, *words):
    return made(store, *MOVING, *words)[1]["weights"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store with a teacher, two views of its labels and a student."""
    folder = tmp_path_factory.mktemp("home")
    ran, card = made(folder, *MOVING)
    assert ran == ["teacher", "labels", "student"]
    return folder, card


@pytest.fixture
def copy(home, tmp_path):
    shutil.copytree(home[0], tmp_path / "store")
    return tmp_path / "store"


def test_as_many_views_as_epochs_are_the_live_teacher_to_the_last_bit(home, copy):
    ran, live = made(copy, *MOVING, "labels.live=true")
    assert ran == ["student"] and "labels" not in live["document"]["inputs"]
    assert live["weights"] == home[1]["weights"]
    assert [e["weights"] for e in live["trace"]["epochs"]] == [e["weights"] for e in home[1]["trace"]["epochs"]]
    assert live["trace"]["losses"] == home[1]["trace"]["losses"]


def test_other_views_are_another_training(home, copy):
    assert weights(copy, "labels.seed=1") != home[1]["weights"]
    assert weights(copy, "labels.views=1") != home[1]["weights"]


def test_float16_stays_within_a_tolerance_of_the_live_teacher(home, copy):
    card = made(copy, *MOVING, "labels.dtype=float16")[1]
    pairs = zip(card["trace"]["losses"], home[1]["trace"]["losses"], strict=True)
    assert card["weights"] != home[1]["weights"]
    assert all(a == pytest.approx(b, rel=2e-3) for a, b in pairs)


def test_students_of_all_seeds_share_the_views(copy):
    assert made(copy, *MOVING, "seed=1")[0] == ["student"]


def test_views_that_are_fewer_than_the_epochs_come_again(copy):
    """Epochs 0 and 2 show the same views, and the key says so."""
    ran, card = made(copy, *MOVING, "fit.epochs=4")
    assert ran == ["student"] and card["document"]["config"]["views"] == 2
    live = made(copy, *MOVING, "fit.epochs=4", "labels.live=true")[1]
    assert live["weights"] == card["weights"]
    every = made(copy, *MOVING, "fit.epochs=4", "labels.views=4")[1]
    assert every["weights"] != card["weights"]


def test_pooled_features_that_are_stored_are_the_live_ones(copy):
    words = (*MOVING, "loss=[ce,kd,hint]", "loss.hint.student=student.conv2:pooled",
             "loss.hint.teacher=teacher.conv2:pooled")  # fmt: skip
    ran, stored = made(copy, *words, "labels.features=[conv2]")
    assert ran == ["labels", "student"] and "labels" in stored["document"]["inputs"]
    ran, live = made(copy, *words)  # labels without features do not serve
    assert ran == ["student"] and "labels" not in live["document"]["inputs"]
    assert live["weights"] == stored["weights"]
    one, _ = planned(copy, *words)
    assert "(labels.features=[conv2] would store it)" in one.nodes[-1].unused["labels"]


def test_the_embedding_that_is_stored_is_the_live_one(copy):
    words = (*MOVING, "loss=[ce,rkd]")
    ran, stored = made(copy, *words, "labels.features=[embedding]")
    assert ran == ["labels", "student"] and "labels" in stored["document"]["inputs"]
    assert stored["bindings"] == ["rkd: student.head:input (16) <- teacher.embedding:pooled (64)"]
    one, _ = planned(copy, *words)
    assert "(labels.features=[embedding] would store it)" in one.nodes[-1].unused["labels"]
    ran, live = made(copy, *words)
    assert ran == ["student"] and live["weights"] == stored["weights"]
    assert live["bindings"] == ["rkd: student.head:input (16) <- teacher.head:input (64)"]


def test_any_part_is_stored_by_its_name_and_several_are_refused(copy):
    words = (*MOVING, "loss=[ce,rkd]", "loss.rkd.student=student.last", "loss.rkd.teacher=teacher.last:pooled")
    ran, card = made(copy, *words, "labels.features=[last]", "teacher.stages=[conv1,conv2]")
    assert ran == ["labels", "student"]
    assert card["bindings"] == ["rkd: student.conv3 (16, 2, 2) <- teacher.last:pooled (64)"]
    labels = planned(copy, *words, "labels.features=[last]", "teacher.stages=[conv1,conv2]")[0].nodes[1]
    assert labels.config["stages"] == ["conv1", "conv2"], "which layer is the last is a part of the key"
    with pytest.raises(InputError, match=r"labels.features: stages are several layers; name each, e.g. \[stage1"):
        planned(copy, *words, "labels.features=[stages]")
    one, run = planned(copy, *words, "loss.rkd.teacher=teacher.stage7:pooled", "labels.features=[stage7]")
    with pytest.raises(InputError, match=r"labels.features: SeedCNN has no stage7; it has 3 stages"):
        check([one], Store(copy), run)


def test_top_k_and_every_way_of_the_pass_make_labels_that_a_student_learns_from(copy, home):
    ways = ("labels.top_k=3", "labels.channels_last=true", "labels.precision=bf16-mixed", "labels.batch_size=100")
    keys = set()
    for word in ways:
        ran, card = made(copy, *MOVING, word)
        assert ran == ["labels", "student"]
        keys.add(card["document"]["inputs"]["labels"])
        assert card["trace"]["losses"][0] == pytest.approx(home[1]["trace"]["losses"][0], rel=0.05)
    assert len(keys) == len(ways)


def test_without_augmentation_there_is_one_view_under_the_key_it_always_had(tmp_path):
    plain = planned(tmp_path)[0]
    for words in (("labels.views=7",), ("labels.seed=3",), ("labels.batch_size=64",)):
        assert [n.key for n in planned(tmp_path, *words)[0].nodes] == [n.key for n in plain.nodes]
    assert set(plain.nodes[1].config) == {"data"}
    half = planned(tmp_path, "labels.dtype=float16")[0]
    assert half.nodes[1].config["views"] == 1


def test_a_teachers_choices_on_test_are_kept_so_that_students_need_not_ask(copy, monkeypatch):
    import kd.models

    def refuse(folder):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(kd.models, "load", refuse)
    card = made(copy, *MOVING, "temperature=2")[1]
    assert 0 <= card["metrics"]["test/agreement"] <= 1


def test_views_come_out_the_same_bytes_again(copy):
    from kd.launch import reproduce

    key = planned(copy, *MOVING)[0].key
    verdict, _, _ = reproduce(key[:16], [], str(copy), None, keep=False)
    assert verdict.word == "bit-identical", verdict.reasons


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("pipeline.stages.student.views=3", "other views than its labels"),
        ("pipeline.stages.student.view_seed=3", "other seed than its labels"),
    ],
)
def test_a_student_that_sees_other_views_than_its_labels_is_refused(word, said, tmp_path):
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *MOVING, word)


# --- kills


def kill_at_shard(at, one, run, tell):
    """Run a plan and die by SIGKILL as the ``at``-th shard is to be written."""
    from kd.training import labelling

    inner, count = labelling.write_shard, [0]

    def die(*arguments):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(*arguments)

    labelling.write_shard = die
    execute(one, Store(run.store), run)


def test_a_kill_leaves_whole_shards_and_the_rest_is_made(home, tmp_path):
    one, run = planned(tmp_path, *MOVING)
    assert "SIGKILL" in call(kill_at_shard, 2, one, run)["error"]
    store = Store(tmp_path)
    labels = one.nodes[1]
    assert store.get(labels.key) is None
    assert [p.name for p in store.work(labels.key).glob("labels-v*")] == [files.shard(0, 0)]
    text = outlook([one], store, run)[labels.key]
    assert "1 of 2 files are there" in text
    said = []
    execute(one, store, run, said.append)
    assert any("1 of 2 files are there" in event.get("line", "") for event in said)
    artifact = store.get(one.key)
    assert artifact is not None and artifact.card["weights"] == home[1]["weights"]


def test_a_half_written_shard_or_one_of_another_scheme_in_the_work_folder_is_made_again(home, tmp_path):
    one, run = planned(tmp_path, *MOVING)
    call(kill_at_shard, 2, one, run)
    store = Store(tmp_path)
    work = store.work(one.nodes[1].key)
    whole = work / files.shard(0, 0)
    shutil.copy(whole, work / files.shard(1, 0))  # says that it holds view 0
    whole.write_bytes(whole.read_bytes()[:-7])
    text = outlook([one], store, run)[one.nodes[1].key]
    assert "0 of 2 files are there, 2 half-written or of other views, to be made again" in text
    said = []
    execute(one, store, run, said.append)
    lines = [event["line"] for event in said if event.get("event") == "say"]
    assert any("half-written" in line and "making it again" in line for line in lines)
    artifact = store.get(one.key)
    assert artifact is not None and artifact.card["weights"] == home[1]["weights"]


# --- what planning finds


def test_labels_of_another_view_scheme_are_found_when_planning(copy):
    """Whole by its checksums, but its files say that they hold other views."""
    one, run = planned(copy, *MOVING)
    node = one.nodes[1]
    store = Store(copy)
    artifact = store.get(node.key)
    assert artifact is not None
    path = artifact.path / files.shard(1, 0)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    files.write_shard(path, tensors, files.scheme("shift", 5, 8), 1)
    source = copy / "again"
    shutil.copytree(artifact.path, source)
    store.remove(node.key)
    store.put(node.key, source, {k: v for k, v in artifact.card.items() if k != "files"})
    with pytest.raises(InputError, match=r"holds views of 'shift/1 seed 5 size 8'.*remove it with `kd rm"):
        outlook([one], Store(copy), run)


def test_a_shard_that_is_cut_short_in_the_store_is_damage(copy):
    from kd.pipeline.plan import status

    one, _ = planned(copy, *MOVING)
    path = Store(copy).folder(one.nodes[1].key) / files.shard(1, 0)
    path.write_bytes(path.read_bytes()[:-1])
    assert status(one.nodes[1], Store(copy)) == "damaged"
    assert "half-written" in str(Store(copy).broken(one.nodes[1].key))


def test_a_disk_that_is_too_small_is_found_before_anything_runs(tmp_path):
    one, run = planned(tmp_path, "data.augment=shift", "labels.views=10000000000")
    with pytest.raises(InputError, match=r"the labels take .* GB and .* free; store fewer bytes") as caught:
        outlook([one], Store(tmp_path), run)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("artifacts/*"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("labels.views=0", "labels.views=0"),
        ("labels.dtype=int8", "labels.dtype='int8'"),
        ("labels.precision=8-bit", "labels.precision='8-bit'"),
        ("labels.batch_size=0", "labels.batch_size=0"),
        ("labels.seed=-1", "labels.seed=-1"),
        ("labels.compile=1", "labels.compile=1"),
        ("labels.features=conv2", "labels.features='conv2'"),
    ],
)
def test_settings_out_of_range_are_refused_when_planning(word, said, tmp_path):
    with pytest.raises(InputError, match=said):
        planned(tmp_path, "data.augment=shift", "labels.views=2", word)


def test_a_layer_that_the_teacher_has_not_is_refused_before_it_is_trained(tmp_path):
    one, run = planned(tmp_path, *MOVING, "labels.features=[conv9]")
    with pytest.raises(InputError, match=r"labels.features: 'conv9' is no layer"):
        check([one], Store(tmp_path), run)


def test_features_that_the_disk_cannot_take_are_refused_before_the_teacher_is_trained(tmp_path, monkeypatch):
    import kd.stages.labels as stage

    free = 2 * 1500 * 10 * 4  # the logits of two views would fit, 64 features of each sample do not
    one, run = planned(tmp_path, *MOVING, "labels.features=[conv3]")
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda place: type("", (), {"free": free})())
    with pytest.raises(InputError, match=r"the labels take .* free; store fewer bytes"):
        check([one], Store(tmp_path), run)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda place: type("", (), {"free": 100 * free})())
    check([one], Store(tmp_path), run)


def test_the_disk_is_looked_at_again_before_the_pass(copy, monkeypatch):
    import kd.stages.labels as stage

    one, run = planned(copy, *MOVING, "labels.seed=9")
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda place: type("", (), {"free": 10})())
    with pytest.raises(KDError, match="has 10 bytes free"):
        execute(one, Store(copy), run)


def test_a_document_that_names_views_gives_the_stage_back(home):
    text = Store(home[0]).find(home[1]["document"]["inputs"]["labels"][:16]).card["document"]
    stage = build(text)
    assert isinstance(stage, SoftLabels) and stage.views == 2 and stage.dtype == "float32"
    assert digest(text) == home[1]["document"]["inputs"]["labels"]


@pytest.mark.gpu
def test_on_a_gpu_stored_views_are_the_live_teacher(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stored = made(tmp_path, *MOVING, "run.accelerator=gpu", "labels.batch_size=64")[1]
    live = made(tmp_path, *MOVING, "run.accelerator=gpu", "labels.live=true")[1]
    pairs = zip(stored["trace"]["losses"], live["trace"]["losses"], strict=True)
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in pairs)
