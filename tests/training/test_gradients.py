"""Which term moves the student: by hand, beside a step, in history and means, and never a bit of the weights."""

from __future__ import annotations

import json
import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from kd.data import Split
from kd.models import Normalised, create
from kd.objective import Objective
from kd.pipeline.execute import execute
from kd.pipeline.jobs import call
from kd.store import Store
from kd.training.gradients import of_terms
from kd.training.module import Distiller
from kd.training.optimisers import configure
from kd.training.settings import Fit, Run
from kd.training.trainer import train
from tests.pipeline.small import kill_at, made, planned
from tests.training.tiny import fitted, label_term, run_of, split, teacher_term

SGD = {"_target_": "torch.optim.SGD"}
TERMS = {"ce": label_term(0.3), "kd": teacher_term(0.7)}


def lines(path, name="grad/ce"):
    return [row for row in map(json.loads, path.read_text().splitlines()) if name in row]


def test_terms_that_pull_against_each_other_have_the_cosine_minus_one():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    found = of_terms({"a": w.sum(), "b": -2 * w.sum(), "c": w[0] - w[1]}, {"a": 2.0, "b": 0.5, "c": 1.0}, [w])
    root = math.sqrt(2)
    expected = {
        "grad/a": 2 * root, "grad/b": root, "grad/c": root,
        "grad_share/a": 0.5, "grad_share/b": 0.25, "grad_share/c": 0.25,
        "grad_cosine/a/b": -1, "grad_cosine/a/c": 0, "grad_cosine/b/c": 0,
    }  # fmt: skip
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_neither_small_nor_large_gradients_lose_their_share_or_their_direction(size):
    w = nn.Parameter(torch.tensor([1.0, 1.0]))
    found = of_terms({"a": w.sum(), "b": 3 * w.sum()}, {"a": size, "b": size}, [w])
    assert found["grad_share/b"].item() == pytest.approx(0.75)
    assert found["grad_cosine/a/b"].item() == pytest.approx(1)


def test_a_term_that_does_not_reach_the_student_pulls_at_nothing():
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    found = of_terms({"a": other.sum(), "b": torch.ones(())}, {"a": 1.0, "b": 1.0}, [w])
    assert set(found) == {"grad/a", "grad/b", "grad_share/a", "grad_share/b", "grad_cosine/a/b"}
    assert all(value.item() == 0 for value in found.values())
    assert of_terms({}, {}, [w]) == {}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_the_gradient_is_the_one_of_the_step_in_each_precision(precision, tmp_path):
    class Grads(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            whole = torch.cat([p.grad.flatten() for p in module.student.parameters()]).norm().item()
            found.append((whole, module.gradients["grad/ce"].item()))

    found: list[tuple[float, float]] = []
    fit = Fit(epochs=1, batch_size=4, optimiser=SGD, precision=precision)
    fitted(tmp_path, fit, terms={"ce": label_term(0.5)}, watching=[Grads()])
    assert len(found) == 5 and all(a == pytest.approx(b, rel=1e-6) and a > 0 for a, b in found)


@pytest.mark.parametrize(
    ("every", "log_every", "due", "more"),
    [(None, 4, [4, 8], 0), (0, 4, [], 0), (3, 4, [3, 6, 9], 3), (2, 4, [2, 4, 6, 8, 10], 3), (5, 0, [5, 10], 2)],
)
def test_they_are_recorded_where_they_are_due_and_in_one_line_with_the_losses(every, log_every, due, more, tmp_path):
    _, trace = fitted(
        tmp_path, terms=TERMS, labels=torch.rand(22, 3), run=run_of(tmp_path, log_every=log_every, gradients=every)
    )
    rows = lines(tmp_path / "history.jsonl")
    assert [row["step"] for row in rows] == due and sum("train/loss" not in row for row in rows) == more
    for row in rows:
        assert row["grad_share/ce"] + row["grad_share/kd"] == pytest.approx(1)
        assert -1 <= row["grad_cosine/ce/kd"] <= 1 and row["epoch"] == (row["step"] - 1) // 5
    for epoch in trace.gradients:
        own = [row["grad_share/kd"] for row in rows if row["epoch"] == epoch["epoch"]]
        assert epoch["count"] == len(own) and epoch["grad_share/kd"] == pytest.approx(sum(own) / len(own))
    assert sum(epoch["count"] for epoch in trace.gradients) == len(due)


@pytest.mark.parametrize("every", [0, 1, 3])
def test_recording_them_moves_no_bit(every, tmp_path):
    labels = torch.rand(22, 3, generator=torch.Generator().manual_seed(0))
    whole = fitted(tmp_path / "a", terms=TERMS, labels=labels)[1]
    found = fitted(tmp_path / "b", terms=TERMS, labels=labels, run=run_of(tmp_path, gradients=every))[1]
    assert (found.losses, found.epochs) == (whole.losses, whole.epochs)


def test_a_slope_that_is_not_finite_spoils_no_mean(tmp_path):
    w = nn.Parameter(torch.zeros(1))
    assert not of_terms({"a": w.sqrt().sum() * 0}, {"a": 1.0}, [w])["grad/a"].isfinite()


def test_a_kill_leaves_the_means_those_of_the_straight_run(tmp_path):
    words = ("run.gradients=1", "run.checkpoint_seconds=0")
    straight = made(tmp_path / "a", *words)[1]["gradients"]
    assert [epoch["count"] for epoch in straight] == [4, 4] and "grad_cosine/ce/kd" in straight[0]
    json.dumps(straight, allow_nan=False)
    one, run = planned(tmp_path / "b", *words)
    call(kill_at, "step", 8 + 3, one, run)  # the teacher takes eight
    execute(one, Store(tmp_path / "b"), run)
    artifact = Store(tmp_path / "b").get(one.key)
    assert artifact is not None and artifact.card["resumed"] == [2]
    assert artifact.card["gradients"] == straight


def both(store, words, tell):
    """A job of one process and the same of two; what each recorded."""
    return [made(store / str(n), *words, f"run.devices={n}")[1]["gradients"] for n in (1, 2)]


def test_ranks_record_the_gradient_of_the_whole_batch(tmp_path):
    outcome = call(both, tmp_path, ("run.gradients=1", "fit.lr=0.001"))
    assert outcome["status"] == "done", outcome
    one, two = outcome["value"]
    for name, value in one[0].items():
        assert two[0][name] == pytest.approx(value, rel=1e-2), name


def conv(folder, every, compiled):
    """Two epochs of a small residual net under a teacher, compiled or not."""
    torch._dynamo.reset()  # as in a process of its own: what an earlier training compiled would be used again
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        # With batch norms and a last batch of another size, compiled backward passes overwrite what they were given,
        # unless they are told not to.
        net = create("cifar_resnet8", num_classes=3, in_chans=1, size=8)
        nets.append(Normalised(net, [0.5], [0.25]))
    fit = Fit(epochs=2, batch_size=4, optimiser=SGD, compile=compiled, drop_last=False)
    module = Distiller(nets[0], Objective(TERMS), configure(fit, 6), nets[1])
    run: Run = run_of(folder, log_every=1, gradients=every)
    folder.mkdir()
    parts = [
        Split(s.ids, s.targets, torch.randint(0, 256, (len(s), 1, 8, 8), generator=draw, dtype=torch.uint8))
        for draw, s in ((torch.Generator().manual_seed(0), part) for part in (split(), split(9, seed=1)))
    ]
    trace = train(
        module, (parts[0], parts[1]), fit, run,
        seed=0, size=8, augment="none", work=folder, tell=lambda event: None,
    )  # fmt: skip
    return trace


@pytest.mark.slow
def test_compiled_networks_record_them_and_move_no_bit(tmp_path):
    asked = (("plain", 1, False), ("recorded", 1, True), ("silent", 0, True))
    plain, recorded, silent = (conv(tmp_path / name, every, compiled) for name, every, compiled in asked)
    assert recorded.epochs == silent.epochs and silent.gradients == []
    for a, b in zip(recorded.gradients, plain.gradients, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
