"""Execution: each stage once, whoever asks; nothing of `run/` moves a bit; a kill loses nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from kd.errors import KDError
from kd.pipeline.execute import execute
from kd.pipeline.jobs import call
from kd.pipeline.work import run_job
from kd.store import Store, short
from tests.pipeline.small import kill_at, made, planned


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The card of the job that nothing disturbed."""
    return made(tmp_path_factory.mktemp("straight"))[1]


def same(card, other):
    """Equal in every bit that training decides."""
    assert card["weights"] == other["weights"]
    assert card["metrics"] == other["metrics"]
    assert card["trace"]["losses"] == other["trace"]["losses"]
    strip = [{k: v for k, v in e.items() if not k.startswith("val/")} for e in card["trace"]["epochs"]]
    assert strip == [{k: v for k, v in e.items() if not k.startswith("val/")} for e in other["trace"]["epochs"]]


def test_a_second_run_runs_nothing(tmp_path):
    assert made(tmp_path)[0] == ["teacher", "labels", "student"]
    assert made(tmp_path)[0] == []
    assert made(tmp_path, "temperature=8")[0] == ["student"]


def test_the_card_holds_what_reproduction_needs(straight):
    assert straight["dials"] == {"temperature": 4, "alpha": 0.9, "seed": 0}
    assert len(straight["trace"]["losses"]) == 8 and len(straight["trace"]["epochs"]) == 2
    assert {"test/accuracy", "test/f1_per_class", "test/agreement", "val/loss"} <= set(straight["metrics"])
    assert set(straight["fingerprints"]) == {"data", "code", "environment"}
    assert straight["cost"]["parameters"] == 4778
    json.dumps(straight, allow_nan=False)


@pytest.mark.parametrize(
    "words",
    [
        ("run.workers=0",),
        ("run.memory_gb=0",),
        ("run.validate_every=0",),
        ("run.validate_every=2", "run.log_every=1"),
        ("run.log_every=0",),
        ("run.gradients=1",),
        ("run.gradients=3", "run.log_every=2"),
        ("run.checkpoint_seconds=0",),
        ("run/logger=[csv]",),
        ("run.wandb=offline",),
        ("run.accelerator=cpu",),
        ("run.latency=true",),
    ],
    ids=" ".join,
)
def test_nothing_under_run_moves_a_bit(words, tmp_path, straight):
    same(made(tmp_path, *words)[1], straight)


MOMENTS = [
    ("step", 2), ("step", 4), ("step", 5), ("step", 7), ("validation", 1), ("validation", 2),
    ("before the checkpoint of an epoch's end", 1), ("after the epoch's record", 2),
    ("the first checkpoint's writing", 1),
]  # fmt: skip


@pytest.mark.parametrize(("moment", "at"), MOMENTS)
def test_killed_and_resumed_the_bits_are_the_same(moment, at, tmp_path, straight):
    made(tmp_path, "alpha=0.5")  # the shared stages, so that the kill hits the student
    one, run = planned(tmp_path, "run.checkpoint_seconds=0")
    ended = call(kill_at, moment, at, one, run)
    assert "SIGKILL" in ended["error"]
    assert Store(tmp_path).get(one.key) is None
    lines: list[str] = []
    execute(one, Store(tmp_path), run, lambda e: lines.append(e["line"]) if e["event"] == "say" else None)
    found = Store(tmp_path).get(one.key)
    assert found is not None
    same(found.card, straight)
    if (moment, at) == ("step", 7):  # it did resume, and did not start over
        assert lines == ["resuming from step 6"] and found.card["resumed"] == [6]
    assert not Store(tmp_path).work(one.key).exists()


def test_a_checkpoint_of_the_epochs_end_resumes_too(tmp_path, straight):
    made(tmp_path, "alpha=0.5")
    one, run = planned(tmp_path, "run.checkpoint_seconds=0")
    call(kill_at, "step", 5, one, run)
    checkpoint = torch.load(Store(tmp_path).work(one.key) / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4  # exactly one epoch
    execute(one, Store(tmp_path), run)
    found = Store(tmp_path).get(one.key)
    assert found is not None
    same(found.card, straight)


def test_alpha_0_is_the_student_alone_to_the_last_bit(tmp_path):
    distilled, alone = made(tmp_path, "alpha=0")[1], made(tmp_path, "pipeline=baseline")[1]
    assert distilled["weights"] == alone["weights"]


def test_alpha_1_does_not_hear_the_labels(tmp_path, monkeypatch):
    import kd.training.module as module

    truth, half = made(tmp_path / "a", "alpha=1")[1], made(tmp_path / "a", "alpha=0.5")[1]
    views = module.Distiller.views

    def shuffled(self, batch):
        return views(self, {**batch, "target": batch["target"].flip(0)}) if self.training else views(self, batch)

    made(tmp_path / "b", "alpha=0.3")
    monkeypatch.setattr(module.Distiller, "views", shuffled)
    assert made(tmp_path / "b", "alpha=1")[1]["weights"] == truth["weights"]
    assert made(tmp_path / "b", "alpha=0.5")[1]["weights"] != half["weights"]


def test_stored_soft_labels_equal_the_live_teacher(tmp_path, monkeypatch):
    from kd.stages import Distil

    stored = made(tmp_path / "a")[1]
    monkeypatch.setattr(Distil, "unused", classmethod(lambda cls, config, inputs: {"labels": "for the test"}))
    live = made(tmp_path / "b")[1]
    assert "labels" in stored["document"]["inputs"] and "labels" not in live["document"]["inputs"]
    # Not to the bit: the pass that writes labels has larger batches than the step, and sums in another order.
    assert stored["trace"]["losses"] == pytest.approx(live["trace"]["losses"], rel=1e-5)


def test_a_hint_trains_its_projection_resumes_and_ships_the_student_alone(tmp_path):
    words = ("loss=[ce,kd,hint]", "loss.hint.student=student.conv2", "loss.hint.teacher=teacher.conv2")
    straight = made(tmp_path / "a", *words)[1]
    made(tmp_path / "b", "alpha=0.3")
    one, run = planned(tmp_path / "b", *words, "run.checkpoint_seconds=0")
    call(kill_at, "step", 7, one, run)
    checkpoint = torch.load(Store(tmp_path / "b").work(one.key) / "last.ckpt", weights_only=True)
    assert any("projection" in name for name in checkpoint["state_dict"])
    assert not any(name.startswith("teacher") for name in checkpoint["state_dict"])
    execute(one, Store(tmp_path / "b"), run)
    found = Store(tmp_path / "b").get(one.key)
    assert found is not None
    same(found.card, straight)
    assert found.card["cost"]["parameters"] == 4778


def test_a_damaged_teacher_is_made_again_and_kept_aside(tmp_path):
    made(tmp_path)
    one, run = planned(tmp_path, "temperature=2")
    teacher = Store(tmp_path).folder(one.nodes[0].key) / "model.safetensors"
    content = bytearray(teacher.read_bytes())
    content[-1] ^= 1
    teacher.write_bytes(bytes(content))
    said: list[str] = []
    ran = execute(one, Store(tmp_path), run, lambda e: said.append(e["line"]) if e["event"] == "say" else None)
    assert ran == ["teacher", "student"]
    assert "does not match its checksum" in said[0]
    assert len(list((tmp_path / "corrupt").iterdir())) == 1


def test_a_poisoned_checkpoint_is_refused_unread_and_training_starts_over(tmp_path, straight):
    class Poison:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    made(tmp_path, "alpha=0.3")
    one, run = planned(tmp_path)
    call(kill_at, "step", 2, one, run)
    work = Store(tmp_path).work(one.key)
    torch.save({"global_step": 3, "callbacks": Poison()}, work / "last.ckpt")
    said: list[str] = []
    execute(one, Store(tmp_path), run, lambda e: said.append(e["line"]) if e["event"] == "say" else None)
    assert not (tmp_path / "owned").exists()
    assert "more than plain tensors" in said[0]
    found = Store(tmp_path).get(one.key)
    assert found is not None
    same(found.card, straight)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    made(tmp_path, "alpha=0.3")
    before = sorted(p.name for p in (tmp_path / "artifacts").iterdir())
    one, run = planned(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kd.models.save", full)
        with pytest.raises(KDError, match=r"no space left for .*; free some"):
            execute(one, Store(tmp_path), run)
    assert sorted(p.name for p in (tmp_path / "artifacts").iterdir()) == before
    assert execute(one, Store(tmp_path), run) == ["student"]


def test_a_loss_that_is_not_finite_stops_with_step_and_term_and_keeps_the_checkpoint(tmp_path):
    made(tmp_path, "alpha=0.3")
    words = ("fit.lr=1e30", "fit.optimiser._target_=torch.optim.SGD", "run.checkpoint_seconds=0")
    one, run = planned(tmp_path, *words)
    with pytest.raises(KDError, match=r"step \d+: term .*(kd|ce).* not finite .*good checkpoint is kept"):
        execute(one, Store(tmp_path), run)
    checkpoint = torch.load(Store(tmp_path).work(one.key) / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(v).all() for n, v in checkpoint["state_dict"].items() if v.is_floating_point())


def test_best_of_validation_is_kept_and_patience_stops(tmp_path):
    words = ("fit.epochs=6", "fit.lr=0.05", "run.validate_every=0")
    card = made(tmp_path, *words, "fit.select=best")[1]
    accuracies = [e["val/accuracy"] for e in card["trace"]["epochs"]]
    assert card["trace"]["selected_epoch"] == accuracies.index(max(accuracies))
    assert card["metrics"]["val/accuracy"] == max(accuracies)
    chosen = card["trace"]["epochs"][card["trace"]["selected_epoch"]]
    assert card["weights"] == chosen["weights"]
    short_ = made(tmp_path, "fit.epochs=30", "fit.lr=1e-9", "fit.patience=2")[1]
    assert len(short_["trace"]["epochs"]) == 3


def test_two_sweeps_at_once_do_the_shared_work_once(tmp_path):
    code = (
        "import sys; from tests.pipeline.small import made\n"
        f"print('ran', *made({str(tmp_path)!r}, 'alpha=' + sys.argv[1])[0])"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, alpha], stdout=subprocess.PIPE, text=True)
        for alpha in ("0.2", "0.7")
    ]
    said = [process.communicate(timeout=300)[0].split()[1:] for process in started]
    assert sorted(said[0] + said[1]) == ["labels", "student", "student", "teacher"]


def test_a_job_in_a_child_gives_the_bits_of_one_here(tmp_path, straight):
    one, run = planned(tmp_path)
    assert call(run_job, one, run, None, torch.get_num_threads())["value"] == ["teacher", "labels", "student"]
    found = Store(tmp_path).get(one.key)
    assert found is not None and short(found.key) == short(straight["key"])
    same(found.card, straight)


@pytest.mark.gpu
def test_a_gpu_run_is_bit_identical_to_itself(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    first, second = (made(tmp_path / name, "run.accelerator=gpu")[1] for name in "ab")
    same(first, second)
