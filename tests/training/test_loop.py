"""The short way through a step: the same bits, counters and checkpoints as Lightning's own."""

from __future__ import annotations

import pytest
import torch

from kd.training import loop
from kd.training.settings import Fit
from tests.training.test_trainer import SGD
from tests.training.tiny import fitted, label_term, run_of, teacher_term


def trained(folder, monkeypatch, short, **settings):
    """Weights, trace and last checkpoint, by the short way or by Lightning's."""
    seen = []
    inner = loop.lean
    monkeypatch.setattr(loop, "lean", lambda trainer: seen.append(inner(trainer)) or (short and inner(trainer)))
    fit = Fit(**{"epochs": 2, "batch_size": 4, "optimiser": SGD, "warmup_epochs": 1.0, **settings})
    terms = {"ce": label_term(0.5), "kd": teacher_term(0.5)}
    labels = torch.rand(22, 3, generator=torch.Generator().manual_seed(0))
    run = run_of(folder, log_every=2, checkpoint_seconds=0)
    module, trace = fitted(folder, fit, run, terms=terms, labels=labels)
    state = torch.load(folder / "last.ckpt", weights_only=True)
    monkeypatch.undo()
    return module.student.state_dict(), trace, state, seen


@pytest.mark.parametrize("settings", [{}, {"clip": 0.1}, {"precision": "bf16-mixed"}], ids=str)
def test_the_short_way_leaves_the_same_bits_and_the_same_checkpoint(settings, tmp_path, monkeypatch):
    weights, trace, state, seen = trained(tmp_path / "a", monkeypatch, True, **settings)
    own, own_trace, own_state, _ = trained(tmp_path / "b", monkeypatch, False, **settings)
    assert seen == [True]
    assert all(weights[name].equal(own[name]) for name in own)
    assert trace.losses == own_trace.losses and trace.epochs == own_trace.epochs
    assert state["loops"] == own_state["loops"] and state["global_step"] == own_state["global_step"]
    assert state["lr_schedulers"] == own_state["lr_schedulers"]


def test_what_needs_more_goes_lightnings_way(tmp_path, monkeypatch):
    *_, seen = trained(tmp_path, monkeypatch, True, precision="64-true")
    assert seen == [False]
