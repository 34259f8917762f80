"""What watches a training: the record is whole and true, checkpoints are sound, selection sees validation alone."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from kd.errors import KDError
from kd.models import weights_digest
from kd.pipeline.execute import execute
from kd.pipeline.jobs import call
from kd.store import Store
from kd.training import callbacks
from kd.training.callbacks import Checkpoint, EachStep, Progress, Recorder, Selection, Together
from kd.training.gradients import Gradients
from kd.training.settings import Fit
from tests.pipeline.small import kill_at, made, planned
from tests.training.tiny import fitted, label_term, net, run_of, teacher_term

SGD = {"_target_": "torch.optim.SGD"}


def rows(path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The record's lines of steps and of epochs; each line must be whole."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_text().endswith("\n")
    return [r for r in found if "train/loss" in r], [r for r in found if "epoch/train/loss" in r]


# The record.


def test_an_epochs_means_are_the_means_of_its_steps(tmp_path):
    terms = {"ce": label_term(0.3), "kd": teacher_term(0.7)}
    _, trace = fitted(tmp_path, terms=terms, labels=torch.rand(22, 3))
    steps, epochs = rows(tmp_path / "history.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 11)) and [row["step"] for row in epochs] == [5, 10]
    for number, epoch in enumerate(epochs):
        own = [row for row in steps if row["epoch"] == number]
        for name in ("loss", "ce", "kd"):
            mean = math.fsum(row[f"train/{name}"] for row in own) / 5
            assert epoch[f"epoch/train/{name}"] == pytest.approx(mean, rel=1e-15)
            assert trace.epochs[number][f"train/{name}"] == epoch[f"epoch/train/{name}"]
        for row in own:
            assert row["train/loss"] == pytest.approx(0.3 * row["train/ce"] + 0.7 * row["train/kd"], rel=1e-6)
    assert trace.losses == [row["train/loss"] for row in steps]


def test_an_epochs_digest_is_that_of_its_weights(tmp_path):
    class Digests(pl.Callback):
        def __init__(self):
            self.found = []

        def on_train_epoch_end(self, trainer, module):
            self.found.append(weights_digest(module.student.net))

    watch = Digests()
    module, trace = fitted(tmp_path, watching=[watch])
    assert [epoch["weights"] for epoch in trace.epochs] == watch.found and len(set(watch.found)) == 2
    assert weights_digest(module.student.net) == watch.found[-1]


@pytest.mark.parametrize(("every", "due"), [(1, range(1, 11)), (4, [1, 4, 8]), (0, [])])
def test_steps_are_recorded_where_they_are_due(every, due, tmp_path):
    fitted(tmp_path, run=run_of(tmp_path, log_every=every))
    steps, epochs = rows(tmp_path / "history.jsonl")
    assert [row["step"] for row in steps] == list(due) and len(epochs) == 2
    assert all({"train/loss", "lr", "epoch"} <= set(row) for row in steps)
    # The norms cost a backward pass each: they stand in every line but that of a first step.
    assert [row["step"] for row in steps if "grad/ce" in row] == [step for step in due if step % every == 0]


@pytest.mark.parametrize("every", [0, 1, 3])
def test_how_much_is_recorded_moves_no_bit(every, tmp_path):
    terms = {"ce": label_term(0.3), "kd": teacher_term(0.7)}
    whole = fitted(tmp_path / "a", terms=terms, labels=torch.rand(22, 3).fill_(1), run=run_of(tmp_path, log_every=2))[1]
    found = fitted(
        tmp_path / "b", terms=terms, labels=torch.rand(22, 3).fill_(1), run=run_of(tmp_path, log_every=every)
    )[1]
    assert (found.losses, found.epochs) == (whole.losses, whole.epochs)


def test_validation_is_in_the_record_of_the_epochs_that_have_it(tmp_path):
    fit = Fit(epochs=4, batch_size=4, optimiser=SGD)
    _, trace = fitted(tmp_path, fit, run_of(tmp_path, validate_every=2))
    assert ["val/accuracy" in epoch for epoch in trace.epochs] == [False, True, False, True]
    assert {"val/loss", "val/f1", "val/precision", "val/recall", "val/ece"} <= set(trace.epochs[1])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The record of the small job that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    card = made(folder, "run.log_every=1")[1]
    return (Store(folder).folder(card["key"]) / "history.jsonl").read_text()


@pytest.mark.parametrize(
    ("moment", "at", "seconds"), [("step", 3, 0), ("step", 7, 60), ("after the epoch's record", 2, 0)]
)
def test_a_kill_leaves_a_record_that_is_whole_and_resuming_makes_it_that_of_the_straight_run(
    moment, at, seconds, tmp_path, straight
):
    made(tmp_path, "alpha=0.5")
    one, run = planned(tmp_path, "run.log_every=1", f"run.checkpoint_seconds={seconds}")
    call(kill_at, moment, at, one, run)
    work = Store(tmp_path).work(one.key) / "history.jsonl"
    steps, _ = rows(work)  # each line is written as it happens: nothing is lost, nothing is cut
    assert [row["step"] for row in steps] == list(range(1, 1 + (at if moment == "step" else 4 * at)))
    with work.open("a") as file:
        file.write('{"step": 99, "train/lo')  # what a kill within a line would leave
    execute(one, Store(tmp_path), run)
    assert (Store(tmp_path).folder(one.key) / "history.jsonl").read_text() == straight


# What is not finite.


class At(nn.Module):
    """The batch's mean logit; at one call, something else."""

    def __init__(self, call: int, spoil: Any) -> None:
        super().__init__()
        self.call, self.spoil, self.count = call, spoil, 0

    def forward(self, student, target):
        self.count += 1
        value = student.mean()
        return self.spoil(value) if self.count == self.call else value


def nan(value):
    return value * float("nan")


def nan_gradient(value):
    return value + (value * 0).sqrt()  # sqrt has no slope at 0: the loss is finite, its gradient is not


@pytest.mark.parametrize("log_every", [0, 1, 100])
def test_a_term_that_is_not_finite_stops_at_its_step_by_name_and_the_checkpoint_before_it_stays(log_every, tmp_path):
    terms = {"ce": label_term(0.5), "odd": label_term(0.5, At(4, nan))}
    with pytest.raises(KDError, match=r"^step 4: term 'odd' is not finite \(ce=[\d.]+, odd=nan\); the last good"):
        fitted(tmp_path, terms=terms, run=run_of(tmp_path, log_every=log_every, checkpoint_seconds=0))
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 3
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_terms_that_are_finite_under_a_sum_that_is_not_are_told_as_such(tmp_path):
    terms = {"big": label_term(1e30, At(2, lambda value: value * 0 + 1e30))}
    with pytest.raises(KDError, match=r"^step 2: the weighted sum of the terms is not finite \(big=1e\+30\)"):
        fitted(tmp_path, terms=terms)


@pytest.mark.parametrize(("step", "kept"), [(3, 2), (5, 4), (1, None)])
def test_weights_that_a_finite_loss_spoilt_are_never_written(step, kept, tmp_path):
    terms = {"ce": label_term(0.5), "odd": label_term(0.5, At(step, nan_gradient))}
    with pytest.raises(KDError) as stopped:
        fitted(tmp_path, terms=terms, run=run_of(tmp_path, checkpoint_seconds=0))
    assert f"step {step}: after it student.net.1.weight is not finite, though the loss was" in str(stopped.value)
    if kept is None:
        assert not (tmp_path / "last.ckpt").exists()
    else:
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == kept


def test_spoilt_weights_are_found_by_the_next_steps_loss_where_no_checkpoint_is_due(tmp_path):
    terms = {"ce": label_term(0.5), "odd": label_term(0.5, At(2, nan_gradient))}
    with pytest.raises(KDError, match=r"^step 3: term 'ce' and 'odd' is not finite \(ce=nan, odd=nan\)"):
        fitted(tmp_path, terms=terms, run=run_of(tmp_path, checkpoint_seconds=60))


def test_between_two_looks_the_step_is_a_range_and_the_term_is_still_named(tmp_path):
    """On a GPU each look waits, so there are few; the epoch's sums do not forget a step that was not finite."""
    recorder = Recorder(tmp_path, 100, 400)
    module = SimpleNamespace(parts={"ce": torch.tensor(0.5), "kd": torch.tensor(0.25)})
    good = {name: torch.tensor(1.0, dtype=torch.float64) for name in ("loss", "ce", "kd")}
    recorder.sums = good
    recorder.check_losses(module, 100)
    recorder.sums = {**good, "loss": torch.tensor(math.nan), "kd": torch.tensor(math.inf)}
    with pytest.raises(KDError, match=r"^a step from 101 to 200: term 'kd' is not finite \(ce=0.5, kd=0.25\)"):
        recorder.check_losses(module, 200)
    with pytest.raises(KDError, match="from 101 to 150: term 'kd'"):
        recorder.check_weights(module, 150)  # as it is asked before a checkpoint, wherever that falls


# Checkpoints.


def test_a_checkpoint_holds_plain_numbers_and_nothing_of_the_teacher(tmp_path):
    terms = {"ce": label_term(0.5), "kd": teacher_term(0.5)}
    fitted(tmp_path, terms=terms, teacher=net(1), run=run_of(tmp_path, checkpoint_seconds=0))
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(kept["state_dict"]) == {"student.net.1.weight", "student.net.1.bias"}
    record = kept["callbacks"]["Together"]["Recorder"]
    assert len(record["losses"]) == 10 and len(record["epochs"]) == 2


def test_a_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    def cut(self, path, *_, **__):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    fitted(tmp_path, run=run_of(tmp_path, checkpoint_seconds=0))
    before = (tmp_path / "last.ckpt").read_bytes()
    with (tmp_path / "last.ckpt").open("rb") as reader:
        fitted(tmp_path, Fit(epochs=3, batch_size=4, optimiser=SGD), run_of(tmp_path, checkpoint_seconds=0))
        assert reader.read() == before != (tmp_path / "last.ckpt").read_bytes()  # who reads it sees one or the other
    before = (tmp_path / "last.ckpt").read_bytes()
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", cut)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    module, _ = fitted(tmp_path / "other")
    with pytest.raises(OSError, match="No space"):
        Checkpoint(tmp_path, 0, Recorder(tmp_path, 0, 5)).write(trainer, module)
    assert (tmp_path / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    ("seconds", "tick", "steps"),
    [(0, 1, range(1, 11)), (2, 1, [2, 4, 6, 8, 10]), (60, 1, [5, 10]), (60, 0.5, [10]), (60, 0.1, [])],
)
def test_a_checkpoint_is_written_when_it_is_time_and_never_before_the_validation_of_its_epoch(
    seconds, tick, steps, tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    written, validated = [], []
    write = Checkpoint.write

    def spy(self, trainer, module):
        written.append((trainer.global_step, len(validated)))
        return write(self, trainer, module)

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_):
            now[0] += tick

        def on_validation_end(self, *_):
            validated.append(True)

    monkeypatch.setattr(Checkpoint, "write", spy)
    fitted(tmp_path, run=run_of(tmp_path, checkpoint_seconds=seconds), watching=[Clock()])
    assert [step for step, _ in written] == list(steps)
    assert all(done == step // 5 for step, done in written)


# Selection.


def scores(monkeypatch, values):
    """Let validation find these accuracies, one an epoch."""
    left = list(values)

    def evaluate(logits, targets):
        return {"accuracy": left.pop(0), "loss": 1.0}

    monkeypatch.setattr("kd.training.module.evaluate", evaluate)


def test_the_first_of_the_best_epochs_is_kept(tmp_path, monkeypatch):
    scores(monkeypatch, [0.2, 0.6, 0.6, 0.1])
    module, trace = fitted(tmp_path, Fit(epochs=4, batch_size=4, lr=0.1, optimiser=SGD, select="best"))
    assert trace.selected_epoch == 1 and len(trace.epochs) == 4
    assert weights_digest(module.student.net) == trace.epochs[1]["weights"] != trace.epochs[3]["weights"]


def test_the_last_epoch_is_kept_unless_asked(tmp_path, monkeypatch):
    scores(monkeypatch, [0.9, 0.1])
    module, trace = fitted(tmp_path)
    assert trace.selected_epoch is None
    assert weights_digest(module.student.net) == trace.epochs[-1]["weights"]


def test_patience_counts_epochs_without_a_better_one(tmp_path, monkeypatch):
    scores(monkeypatch, [0.2, 0.6, 0.6, 0.5, 0.9])
    _, trace = fitted(tmp_path, Fit(epochs=9, batch_size=4, optimiser=SGD, patience=2))
    assert [epoch["epoch"] for epoch in trace.epochs] == [0, 1, 2, 3]


def test_patience_that_ended_before_a_kill_has_ended_after_it():
    selection = Selection(Fit(patience=2))
    trainer: Any = SimpleNamespace(current_epoch=4, should_stop=False)
    selection.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert trainer.should_stop is False  # a fresh training
    selection.load_state_dict({"best": 0.5, "epoch": 1, "weights": {}})
    for finished, stop in ((3, True), (2, False)):
        trainer.current_epoch = finished + 1
        selection.on_train_start(trainer, None)  # type: ignore[arg-type]
        assert trainer.should_stop is stop


# Several as one.


class Note(pl.Callback):
    """Notes what is called."""

    def __init__(self, name, heard):
        self.name, self.heard = name, heard

    def on_train_start(self, *_):
        self.heard.append((self.name, "start"))

    def on_train_epoch_end(self, *_):
        self.heard.append((self.name, "epoch"))


def test_together_calls_each_in_order_and_only_what_it_has():
    heard: list[tuple[str, str]] = []

    class Other(Note):
        def state_dict(self):
            return {"kept": 1}

        def load_state_dict(self, state_dict):
            self.heard.append((self.name, state_dict["kept"]))

    both = Together([Note("a", heard), Other("b", heard)])
    both.on_train_start(None, None)
    both.on_train_batch_end(None, None, None, None, 0)
    both.on_train_epoch_end(None, None)
    assert heard == [("a", "start"), ("b", "start"), ("a", "epoch"), ("b", "epoch")]
    assert both.state_dict() == {"Other": {"kept": 1}}
    both.load_state_dict({"Other": {"kept": 2}, "Gone": {}})
    assert heard[-1] == ("b", 2)


def test_no_hook_of_ours_is_one_that_together_does_not_pass_on():
    ours = [kind for kind in vars(callbacks).values() if isinstance(kind, type) and issubclass(kind, pl.Callback)]
    for kind in [*ours, Gradients]:
        hooks = {name for name in vars(kind) if name.startswith("on_")}
        assert hooks <= set(Together.HOOKS), kind


def test_progress_and_each_step_are_called(tmp_path):
    heard: list[dict] = []
    steps: list[int] = []
    fitted(tmp_path, tell=heard.append, watching=[EachStep(lambda: steps.append(1))])
    assert len(steps) == 10
    told = [event for event in heard if event["event"] == "step"]
    assert told[0] == {"event": "step", "step": 1, "total": 10} and len(told) <= 10
    assert heard[-1]["event"] == "trained" and heard[-1]["seconds"] > 0


def test_progress_speaks_a_few_times_a_second(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    heard: list[dict] = []
    progress = Progress(heard.append, 100)
    for step in range(1, 101):
        now[0] += 0.05
        progress.on_train_batch_end(SimpleNamespace(global_step=step), None, None)  # type: ignore[arg-type]
    assert 15 <= len(heard) <= 26 and heard[0]["step"] == 1
