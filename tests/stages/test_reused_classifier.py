"""Students that read with their teacher's classifier: what is shipped, judged, resumed, read again, and teaches on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from kd.errors import InputError
from kd.models import Grafted, load
from kd.pipeline.execute import check, execute
from kd.pipeline.jobs import call
from kd.stages import Room
from kd.stages.splits import load_data
from kd.store import Store
from tests.pipeline.small import kill_at, made, planned

PAIR = ("teacher.name=cifar_resnet14", "student.name=cifar_resnet8", "run.checkpoint_seconds=0")
SIMKD, SRRL = ("loss=[simkd]", *PAIR), ("loss=[ce,srrl]", *PAIR)


def bits(card):
    return card["weights"], card["metrics"], card["trace"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A store with a student of each kind, and their cards."""
    root = tmp_path_factory.mktemp("reused")
    return root, made(root, *SIMKD)[1], made(root, *SRRL)[1]


def artifact(root, card):
    found = Store(root).get(card["key"])
    assert found is not None
    return found


def test_the_grafted_net_is_what_is_stored_and_paid_for(straight):
    root, card, _ = straight
    found = artifact(root, card)
    recipe = json.loads(found.file("model.json").read_text())
    (graft,) = recipe["structure"]
    assert graft["kind"] == "graft" and graft["at"] == "layer3" and graft["without"] == ["head", "pool"]
    weights = load_file(found.file("model.safetensors"))
    assert {name.partition(".")[0] for name in weights} == {"trunk", "tail"}
    assert not any(".head." in name for name in weights)
    teacher = load_file(artifact(root, {"key": card["document"]["inputs"]["teacher"]}).file("model.safetensors"))
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("tail."))
    assert weights[f"tail.{last}.weight"].equal(teacher["head.weight"])
    student, head, projector = 77_754, 650, 64 * 32 + 9 * 32**2 + 32 * 64 + 2 * (32 + 32 + 64)
    assert card["cost"]["parameters"] == student - head + projector + head
    assert card["cost"]["bytes"] == found.file("model.safetensors").stat().st_size


def test_it_is_read_again_in_a_fresh_process_and_scores_what_its_card_says(straight):
    root, card, _ = straight
    one, run = planned(root, *SIMKD)
    splits = load_data(one.nodes[-1].config["data"], Room(run, root))
    folder = artifact(root, card).path
    torch.save({"images": splits.test.images, "targets": splits.test.targets}, root / "test.pt")
    words = (
        "import torch; from pathlib import Path; from kd.models import load, weights_digest; "
        f"test = torch.load({str(root / 'test.pt')!r}, weights_only=True); net = load(Path({str(folder)!r})); "
        "logits = net(test['images'] / 255); "
        "print((logits.argmax(1) == test['targets']).double().mean().item(), weights_digest(net))"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    accuracy, digest = done.stdout.split()
    assert float(accuracy) == card["metrics"]["test/accuracy"] and digest == card["weights"]


def test_validation_judges_the_grafted_net_and_each_epochs_weights_are_its(straight):
    _, card, _ = straight
    last = card["trace"]["epochs"][-1]
    assert last["weights"] == card["weights"] and last["val/accuracy"] == card["metrics"]["val/accuracy"]
    assert set(last) & {"train/simkd", "train/ce"} == {"train/simkd"}


def test_the_best_epoch_brings_its_projector_with_it(tmp_path, straight):
    _, card, _ = straight
    _, best = made(tmp_path, *SIMKD, "fit.select=best", "fit.epochs=3", "fit.lr=0.05")
    chosen = best["trace"]["selected_epoch"]
    assert best["trace"]["epochs"][chosen]["weights"] == best["weights"] != card["weights"]
    assert best["trace"]["epochs"][chosen]["val/accuracy"] == best["metrics"]["val/accuracy"]


@pytest.mark.parametrize("kind", [0, 1], ids=["simkd", "srrl"])
def test_a_kill_leaves_the_same_bits(kind, tmp_path, straight):
    words, card = (SIMKD, SRRL)[kind], straight[1 + kind]
    one, run = planned(tmp_path, *words)
    assert "SIGKILL" in call(kill_at, "step", 8 + 6, one, run)["error"]  # the teacher takes eight
    execute(one, Store(tmp_path), run)
    found = artifact(tmp_path, card)
    assert found.card["resumed"] and not card["resumed"] and bits(found.card) == bits(card)


def test_of_srrl_the_student_alone_is_shipped_and_the_classifier_is_nobodys_weight(straight):
    root, _, card = straight
    found = artifact(root, card)
    assert "structure" not in json.loads(found.file("model.json").read_text())
    assert card["cost"]["parameters"] == 77_754
    assert not [name for name in load_file(found.file("model.safetensors")) if "projection" in name]


def test_stored_labels_and_features_serve_srrl_and_only_its_classifier_is_read_of_the_teacher(tmp_path, straight):
    _, _, live = straight
    words = (*SRRL, "labels.features=[embedding]")
    ran, card = made(tmp_path, *words)
    assert ran == ["teacher", "labels", "student"]
    assert set(card["document"]["inputs"]) == {"teacher", "labels"}
    assert card["trace"]["losses"] == pytest.approx(live["trace"]["losses"], rel=1e-4)


def test_a_grafted_student_teaches_the_next_one_in_a_chain_that_is_checked_before_it_runs(tmp_path):
    words = ("pipeline=chain", "assistants=[cifar_resnet8]", "loss=[simkd]", "teacher.name=cifar_resnet14",
             "student.name=cifar_resnet8", "+student.options.widths=[8,8,16,16]")  # fmt: skip
    one, run = planned(tmp_path, *words)
    check([one], Store(tmp_path), run)
    ran = execute(one, Store(tmp_path), run)
    assert len(ran) == 3, "a teacher, its assistant and the student: none asks for stored labels"
    nets = [load(artifact(tmp_path, {"key": node.key}).path).net for node in one.nodes]
    assert [isinstance(net, Grafted) for net in nets] == [False, True, True]
    assert nets[2].tail[-1].weight.equal(nets[0].head.weight), "the classifier is handed on"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["loss=[simkd]", "loss.simkd.teacher=teacher.last"],
            r"does not read the mean of teacher\.conv3.*loss\.simkd\.teacher=teacher\.embedding",
        ),
        ([*SIMKD, "loss.simkd.teacher=teacher.layer2"], "width 32 with the teacher's Linear, which takes 64"),
        ([*SIMKD, "loss.simkd.part=teacher.heat"], "'heat' is no layer of CifarNet; did you mean 'head'"),
        ([*SIMKD, "loss.simkd.part=student.head"], "borrows 'student.head'; a teacher's layer was meant"),
        ([*SIMKD, "loss.simkd.part=null"], r"SimKD needs a part of the teacher: set part=teacher\.classifier"),
        ([*SIMKD, "loss.simkd.student=student.logits"], "simkd"),
        (["loss=[ce,kd]", "+loss.kd.part=teacher.classifier", *PAIR], "SoftTargetKL takes no part"),
        (["pipeline=mutual", "loss=[ce,srrl]", *PAIR], "learn together"),
    ],
)
def test_what_cannot_be_grafted_is_refused_before_anything_is_made(words, said, tmp_path):
    with pytest.raises(InputError, match=said) as caught:
        one, run = planned(tmp_path, *words)
        check([one], Store(tmp_path), run)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "artifacts").exists()


def test_two_terms_cannot_ship_two_students(tmp_path):
    words = ("loss=[simkd]", *PAIR, "+loss.other=${loss.simkd}")
    one, run = planned(tmp_path, *words)
    with pytest.raises(InputError, match="the terms other and simkd would each ship another student"):
        check([one], Store(tmp_path), run)


def test_on_vectors_any_pair_of_networks_can_share_a_classifier(tmp_path):
    words = ("loss=[simkd]",)  # the teacher's classifier reads no mean of maps, so its vectors are compared
    ran, card = made(tmp_path, *words)
    assert ran == ["teacher", "student"]
    assert load(artifact(tmp_path, card).path).net.tail[-1].in_features == 64
