"""The image stages: own folders of images, what is refused before training, kills."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from kd.errors import InputError
from kd.pipeline.execute import check, execute
from kd.pipeline.jobs import call
from kd.stages import SoftLabels, Train
from kd.store import Store
from tests.pipeline.small import kill_at, made, planned
from tests.stages.folder import FOLDER, bits


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


def keys(store, *words):
    return [node.key for node in planned(store, *words)[0].nodes]


def test_named_stages_are_in_the_keys_of_what_reads_stages_alone(tmp_path):
    both = ("student.stages=[conv2,conv3]", "teacher.stages=[conv1,conv3]")
    assert keys(tmp_path, *both) == keys(tmp_path), "no term asks for a stage"
    preset = keys(tmp_path, "loss=[ce,at]")
    found = [keys(tmp_path, "loss=[ce,at]", word) for word in both]
    assert [key[0] for key in found] == [preset[0]] * 2, "a teacher is the same, whatever its stages are called"
    assert len({preset[-1], *(key[-1] for key in found)}) == 3
    layers = ("loss=[ce,at]", "loss.at.student=student.conv2", "loss.at.teacher=teacher.conv2")
    assert keys(tmp_path, *layers, *both) == keys(tmp_path, *layers)
    embedding = ("loss=[ce,rkd]",)
    assert keys(tmp_path, *embedding, *both) == keys(tmp_path, *embedding)
    alone = ("pipeline=baseline", "student.stages=[conv2,conv3]")
    assert keys(tmp_path, *alone) == keys(tmp_path, "pipeline=baseline")


def test_named_stages_are_what_terms_read_and_stand_on_the_card(tmp_path):
    ran, card = made(tmp_path, "loss=[ce,at]", "student.stages=[conv2,conv3]", "teacher.stages=[conv1,conv2]")
    assert ran == ["teacher", "student"]
    assert card["bindings"] == [
        "at: student.conv2 (16, 4, 4) <- teacher.conv1 (32, 8, 8), the teacher's 8x8->4x4",
        "at: student.conv3 (16, 2, 2) <- teacher.conv2 (64, 4, 4), the teacher's 4x4->2x2",
    ]
    found = (Store(tmp_path).folder(card["key"]) / "model.json").read_text()
    assert "stages" not in found, "they are no part of what is shipped"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["student.stages=[conv2,conv9]"], "stages: 'conv9' is no layer of SeedCNN"),
        (["teacher.stages=[conv2,conv9]"], "stages: 'conv9' is no layer of SeedCNN that runs"),
        (["teacher.stages=[dense]"], r"stages: 'dense' of SeedCNN gives \(1, 64\), and no maps or tokens"),
        (["student.stages=conv2"], "stages are 'conv2'; a list of layers was meant"),
        (["loss.at.student=student.dense"], r"the term 'at' reads student.dense \(16\) and teacher.conv1 \(32, 8, 8\)"),
    ],
)
def test_stages_that_are_none_are_refused_before_anything_is_made(words, said, tmp_path):
    one, run = planned(tmp_path, "loss=[ce,at]", *words)
    with pytest.raises(InputError, match=said):
        check([one], Store(tmp_path), run)
    assert not (tmp_path / "artifacts").exists()


def test_a_term_that_runs_its_networks_again_wants_the_teacher_live_and_is_drawn_from_the_seed(tmp_path):
    words = ("loss=[ce,kd,diito]", "loss.diito.weight=1")
    ran, card = made(tmp_path, *words)
    assert ran == ["teacher", "student"]
    [why] = [why for role, why in planned(tmp_path, *words)[0].nodes[-1].unused.items() if role == "labels"]
    assert why == "the term diito runs its networks again, so the live teacher runs"
    assert card["bindings"] == [
        "diito: student.conv2 (16, 4, 4) <- teacher.conv2 (64, 4, 4), 50 % of the channels exchanged"
    ]
    again, plain = made(tmp_path / "again", *words)[1], made(tmp_path, "loss=[ce,kd]", "labels.live=true")[1]
    assert bits(again) == bits(card) and bits(card) != bits(plain)
    assert card["trace"]["epochs"][0]["train/diito"] > 0
    off = ("loss.diito.weight=0", "alpha=0.9")
    assert (
        made(tmp_path, "loss=[ce,kd,diito]", *off)[1]["weights"]
        == made(tmp_path, "loss=[ce,kd]", *off[1:])[1]["weights"]
    )


def test_stages_that_are_exchanged_are_in_the_key(tmp_path):
    words = ("loss=[ce,diito]", "loss.diito.under.student=student.stages", "loss.diito.under.teacher=teacher.stages")
    both = ("student.stages=[conv2,conv3]", "teacher.stages=[conv1,conv3]")
    assert len({keys(tmp_path, *words, *more)[-1] for more in ((), both[:1], both[1:], both)}) == 4
    layers = [f"loss.diito.under.{side}={side}.conv2" for side in ("student", "teacher")]
    assert keys(tmp_path, "loss=[ce,diito]", *layers, *both) == keys(tmp_path, "loss=[ce,diito]", *layers)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.diito.under.student=student.conv9"], "'conv9' is no layer of SeedCNN; did you"),
        (["loss.diito.under.teacher=teacher.stages"], "names student.conv2 of the student and teacher.conv"),
        (["loss.diito.under.fraction=0"], "fraction is 0"),
        (["loss.diito.loss.cosine=1"], "DIITO at cosine=1 compares 2 views of each network, and is given 1 and 1"),
        (["loss.diito.under.fraction={_target_: kd.schedules.Linear, start: 0.1, end: 1}"], "cannot be scheduled"),
        (["loss.diito.under.teacher=student.last"], "'student.last' as a layer of the teacher"),
        (["run.devices=2", "fit.batch_size=64"], "the term diito compares the samples of a batch"),
        (["pipeline=meta"], "the term diito runs its networks again, which pipeline=meta does not"),
    ],
)
def test_an_interchange_that_cannot_be_is_refused_before_anything_is_made(words, said, tmp_path):
    with pytest.raises(InputError) as refused:
        one, run = planned(tmp_path, "loss=[ce,diito]", *words)
        check([one], Store(tmp_path), run)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "artifacts").exists()


def test_what_is_bound_is_told_once_before_training(tmp_path):
    found = [planned(tmp_path, "loss=[ce,fsp]", word) for word in ("seed=0", "seed=1", "loss.fsp.weight=2")]
    said: list[str] = []
    check([one for one, _ in found], Store(tmp_path), found[0][1], lambda event: said.append(event["line"]))
    assert said == [
        "fsp: student.conv1 (8, 8, 8) <- teacher.conv1 (32, 8, 8), connector 8->32",
        "fsp: student.conv2 (16, 4, 4) <- teacher.conv2 (64, 4, 4), connector 16->64",
        "fsp: student.conv3 (16, 2, 2) <- teacher.conv3 (64, 2, 2), connector 16->64",
    ]


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


def test_interchanges_and_contexts_survive_a_kill_to_the_bit(tmp_path):
    # What was drawn, and the contexts of the first epoch: a run that began them anew would end elsewhere.
    hidden = ("student", "teacher")
    words = (
        "loss=[kd,diito,cid]", "run.checkpoint_seconds=0", "loss.diito.loss.cosine=0.5", "loss.diito.weight=1",
        "loss.diito.under.student=student.stages", "loss.diito.under.teacher=teacher.stages",
        *(f"loss.diito.{side}=[{side}.logits,{side}.embedding]" for side in hidden),
    )  # fmt: skip
    _, straight = made(tmp_path / "a", *words)
    one, run = planned(tmp_path / "b", *words)
    assert "SIGKILL" in call(kill_at, "step", 8 + 6, one, run)["error"]
    execute(one, Store(tmp_path / "b"), run)
    artifact = Store(tmp_path / "b").get(one.key)
    assert artifact is not None and artifact.card["resumed"] and not straight["resumed"]
    assert bits(artifact.card) == bits(straight)
    assert not [name for name in load_file(artifact.path / "model.safetensors") if "diito" in name or "cid" in name]


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
