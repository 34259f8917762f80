"""Trainings: the same bits for the same words, whatever the precision, the clipping and the remainder of an epoch."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch
from torch import nn

from kd.errors import InputError
from kd.losses.logits import cross_entropy
from kd.models import weights_digest
from kd.objective import Objective
from kd.pipeline.execute import execute
from kd.pipeline.jobs import call
from kd.store import Store
from kd.training.settings import Fit, Run
from kd.training.trainer import check_precision, device_of, evaluation_loader, quiet, resumable, train
from tests.pipeline.small import kill_at, made, planned
from tests.training.tiny import fitted, label_term, run_of, split, teacher_term

SGD = {"_target_": "torch.optim.SGD"}


def test_the_same_words_give_the_same_bits(tmp_path):
    found = [fitted(tmp_path / name)[1] for name in "ab"]
    assert found[0].epochs == found[1].epochs and found[0].losses == found[1].losses
    assert found[0].steps == 10 and found[0].resumed == []


def test_what_was_drawn_before_does_not_matter(tmp_path):
    class Dropped(nn.Module):
        def forward(self, student, target):
            return nn.functional.dropout(student, 0.5).square().mean()

    terms = {"drop": label_term(1.0, Dropped())}
    first = fitted(tmp_path / "a", terms=terms)[1]
    torch.rand(17)
    assert fitted(tmp_path / "b", terms=terms)[1].losses == first.losses


def test_bf16_mixed_trains_on_the_cpu_and_keeps_weights_in_float32(tmp_path):
    terms = {"ce": label_term(0.5), "kd": teacher_term(0.5)}
    labels = torch.rand(22, 3, generator=torch.Generator().manual_seed(0))
    whole, half = (
        fitted(tmp_path / word, Fit(epochs=2, batch_size=4, optimiser=SGD, precision=word), terms=terms, labels=labels)
        for word in ("32-true", "bf16-mixed")
    )
    assert half[1].losses != whole[1].losses
    assert half[1].losses == pytest.approx(whole[1].losses, rel=0.02)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in half[0].student.parameters())


def test_bf16_mixed_and_64_true_go_through_a_whole_pipeline(tmp_path):
    cards = {
        word: made(tmp_path / word, f"fit.precision={word}", f"teacher_fit.precision={word}")[1]
        for word in ("bf16-mixed", "64-true", "32-true")
    }
    assert len({card["weights"] for card in cards.values()}) == len({card["key"] for card in cards.values()}) == 3
    for card in cards.values():
        assert card["trace"]["losses"] == pytest.approx(cards["32-true"]["trace"]["losses"], rel=0.05)
        assert card["cost"]["bytes"] == cards["32-true"]["cost"]["bytes"]


def test_float16_is_refused_on_the_cpu_rather_than_replaced(tmp_path):
    with pytest.raises(InputError, match="16-mixed needs a GPU; on the CPU use bf16-mixed"):
        fitted(tmp_path, Fit(precision="16-mixed", batch_size=4))
    check_precision(Fit(precision="bf16-mixed"), run_of(tmp_path))


@pytest.mark.parametrize("clip", [0.01, 0.3])
def test_clipping_bounds_each_step(clip, tmp_path):
    fit = Fit(epochs=1, batch_size=4, lr=1.0, schedule="constant", optimiser=SGD, clip=clip)
    far = {"ce": label_term(100.0)}
    start = fitted(tmp_path / "start", Fit(**{**vars(fit), "lr": 1e-30}), terms=far, count=4)[0].student.net[1]
    clipped = fitted(tmp_path / "clipped", fit, terms=far, count=4)[0].student.net[1]
    free = fitted(tmp_path / "free", Fit(**{**vars(fit), "clip": None}), terms=far, count=4)[0].student.net[1]

    def moved(layer):
        pairs = zip(layer.parameters(), start.parameters(), strict=True)
        return torch.cat([(a - b).detach().flatten() for a, b in pairs]).norm().item()

    assert moved(clipped) == pytest.approx(clip, rel=1e-3) and moved(free) > 1


def test_the_recorded_norms_are_those_before_clipping(tmp_path):
    norms = []
    for name, clip in (("a", None), ("b", 0.01)):
        fitted(tmp_path / name, Fit(epochs=1, batch_size=4, optimiser=SGD, clip=clip), count=4)
        norms.append(json.loads((tmp_path / name / "history.jsonl").read_text().splitlines()[0])["grad/ce"])
    assert norms[0] == norms[1] > 0.01


@pytest.mark.parametrize(("drop_last", "steps", "seen"), [(True, 5, 20), (False, 6, 22)])
def test_the_rest_of_an_epoch_is_dropped_or_seen(drop_last, steps, seen, tmp_path):
    counted = []

    class Counting(nn.Module):
        def forward(self, student, target):
            counted.append(len(student))
            return nn.functional.cross_entropy(student, target)

    fit = Fit(epochs=2, batch_size=4, optimiser=SGD, drop_last=drop_last)
    _, trace = fitted(tmp_path, fit, terms={"ce": label_term(1.0, Counting())})
    assert trace.steps == 2 * steps and [epoch["step"] for epoch in trace.epochs] == [steps, 2 * steps]
    assert sum(counted) == 2 * seen


def test_an_epoch_with_a_rest_resumes_to_the_same_bits(tmp_path):
    words = ("pipeline=baseline", "fit.drop_last=false", "fit.batch_size=60", "run.checkpoint_seconds=0")
    straight = made(tmp_path / "a", *words)[1]
    one, run = planned(tmp_path / "b", *words)
    call(kill_at, "step", 7, one, run)
    execute(one, Store(tmp_path / "b"), run)
    found = Store(tmp_path / "b").get(one.key)
    assert found is not None and found.card["resumed"] == [6]
    assert (found.card["weights"], found.card["trace"]) == (straight["weights"], straight["trace"])
    assert straight["trace"]["epochs"][0]["step"] == 5  # four batches of 60 and one of 16


class Scheduled(nn.Module):
    """The labels, weighed by the epochs that are done; it notes what it was told, and stops the run where told to."""

    def __init__(self, kill=None):
        super().__init__()
        self.told, self.kill, self.weight = [], kill, 1.0

    def at(self, epoch, epochs):
        self.told.append((epoch, epochs))
        self.weight = epoch
        if len(self.told) == self.kill:
            raise RuntimeError("killed")

    def forward(self, student, target):
        return self.weight * cross_entropy(student, target)


def test_a_loss_with_a_schedule_is_told_before_each_step_and_a_resumed_run_tells_it_the_same(tmp_path):
    steps = [(step / 5, 2) for step in range(10)]
    run = run_of(tmp_path, checkpoint_seconds=0)
    whole, cut, rest = Scheduled(), Scheduled(kill=4), Scheduled()
    module, _ = fitted(tmp_path / "whole", terms={"ce": label_term(1.0, whole)}, run=run)
    assert whole.told == steps
    with pytest.raises(RuntimeError, match="killed"):
        fitted(tmp_path / "cut", terms={"ce": label_term(1.0, cut)}, run=run)
    resumed, trace = fitted(tmp_path / "cut", terms={"ce": label_term(1.0, rest)}, run=run)
    assert trace.resumed == [3] and rest.told == steps[3:]
    assert weights_digest(resumed.student.net) == weights_digest(module.student.net)


def test_a_batch_larger_than_the_split_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"fit.batch_size=64 is larger than the 22 training samples"):
        fitted(tmp_path, Fit(batch_size=64))
    assert fitted(tmp_path, Fit(epochs=1, batch_size=64, drop_last=False))[1].steps == 1


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        assert device_of(Run(accelerator="gpu")).type == device_of(Run()).type == "cuda"
    else:
        with pytest.raises(InputError, match=r"torch sees no GPU; use run\.accelerator=auto or cpu"):
            device_of(Run(accelerator="gpu"))
    assert device_of(Run(accelerator="cpu")).type == "cpu"


def test_evaluation_sees_each_sample_once_in_order_and_unaugmented(tmp_path):
    samples = split(9)
    [batch] = list(evaluation_loader(samples, 4, run_of(tmp_path)))
    assert batch["row"].tolist() == list(range(9)) and samples.images is not None
    assert batch["image"].equal(samples.images / 255)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"no checkpoint at all"])
def test_a_damaged_checkpoint_is_put_aside_and_told(content, tmp_path):
    told: list[dict] = []
    assert resumable(tmp_path, told.append) is None and told == []
    (tmp_path / "last.ckpt").write_bytes(content)
    assert resumable(tmp_path, told.append) is None
    assert "starting over" in told[0]["line"] and (tmp_path / "last.refused").exists()
    assert resumable(tmp_path, told.append) is None and len(told) == 1


def test_a_checkpoint_without_a_step_is_put_aside(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    assert resumable(tmp_path, lambda event: None) is None
    torch.save({"global_step": 12}, tmp_path / "last.ckpt")
    assert resumable(tmp_path, lambda event: None) == 12


def test_quiet_silences_what_is_meant_and_puts_the_rest_back():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet():
            assert logging.getLogger("pytorch_lightning").level == logging.ERROR
            warnings.warn("Found 3 module(s) in eval mode", UserWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
        warnings.warn("Found 3 module(s) in eval mode", UserWarning, stacklevel=1)
    assert [str(w.message) for w in heard] == ["something else", "Found 3 module(s) in eval mode"]


@pytest.fixture
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.gpu
@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_on_a_gpu_a_training_is_bit_identical_to_itself(precision, tmp_path):
    words = (f"fit.precision={precision}", f"teacher_fit.precision={precision}", "run.accelerator=gpu")
    first, second = (made(tmp_path / name, *words, *more)[1] for name, more in (("a", ()), ("b", ("run.log_every=1",))))
    assert (first["weights"], first["metrics"], first["trace"]) == (
        second["weights"], second["metrics"], second["trace"],
    )  # fmt: skip
    assert all(loss == loss for loss in first["trace"]["losses"])


@pytest.mark.gpu
@pytest.mark.usefixtures("_gpu")
def test_on_a_gpu_a_batch_stays_there_and_a_loss_that_is_not_finite_is_still_told(tmp_path):
    made(tmp_path, "run.accelerator=gpu")
    words = ("fit.lr=1e30", "fit.optimiser._target_=torch.optim.SGD", "run.accelerator=gpu", "run.log_every=0")
    one, run = planned(tmp_path, *words, "fit.epochs=8", "run.checkpoint_seconds=0")
    with pytest.raises(Exception, match="not finite"):
        execute(one, Store(tmp_path), run)
    kept = Store(tmp_path).work(one.key) / "last.ckpt"
    if kept.exists():
        state = torch.load(kept, weights_only=True, map_location="cpu")["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


def test_a_training_ends_with_the_weights_of_its_last_epoch(tmp_path):
    module, trace = fitted(tmp_path)
    assert weights_digest(module.student.net) == trace.epochs[-1]["weights"]


@pytest.mark.gpu
def test_on_a_gpu_no_step_waits_for_the_host(tmp_path):
    """Between two log lines nothing reads a number back: in this mode of CUDA's whatever does raises."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    import pytorch_lightning as pl

    class Guard(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            torch.cuda.set_sync_debug_mode("error" if 12 < trainer.global_step < 20 else "default")

    labels = torch.rand(200, 3)
    terms = {"ce": label_term(0.5), "kd": teacher_term(0.5)}
    fit = Fit(epochs=1, batch_size=8, optimiser=SGD)
    run = run_of(tmp_path, accelerator="gpu", log_every=0)
    _, trace = fitted(tmp_path, fit, run, terms=terms, labels=labels, count=200, watching=[Guard()])
    assert trace.steps == 25


@pytest.mark.parametrize("word", ["channels_last", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_layout_or_a_compiler_changes_no_more_than_rounding(word, tmp_path):
    """Conv nets on the same batches; the compiled one is tapped too, and is stored as it was built."""
    from kd.models import Normalised, create
    from kd.training.module import Distiller
    from kd.training.optimisers import configure

    losses = []
    for name, on in (("a", False), ("b", True)):
        torch.manual_seed(0)
        student = Normalised(create("seed_cnn_small", num_classes=3, in_chans=1, size=4), [0.5], [0.25])
        fit = Fit(epochs=1, batch_size=4, lr=0.01, optimiser=SGD, **{word: on})
        module = Distiller(student, Objective({"ce": label_term()}), configure(fit, 5), channels_last=fit.channels_last)
        (tmp_path / name).mkdir()
        trace = train(
            module, (split(), split(9, seed=1)), fit, run_of(tmp_path / name), seed=0, size=4, augment="none",
            work=tmp_path / name, tell=lambda event: None,
        )  # fmt: skip
        losses.append(trace.losses)
        assert not any("_orig_mod" in key for key in module.student.state_dict())
        assert module.student._compiled_call_impl is None
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
