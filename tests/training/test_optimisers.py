"""Optimisers and schedules: the rate at each step by hand, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from kd.errors import InputError
from kd.training.optimisers import configure, scale
from kd.training.settings import Fit
from tests.training.tiny import fitted


def factors(steps_per_epoch=4, **settings):
    factor = scale(Fit(**settings), steps_per_epoch)
    return [factor(step) for step in range(int(settings["epochs"] * steps_per_epoch))]


def test_constant_is_constant():
    assert factors(epochs=2, schedule="constant") == [1.0] * 8


def test_cosine_falls_from_one_to_nothing():
    """Loshchilov and Hutter, SGDR (2017), equation 5, without restarts: (1 + cos(pi t / T)) / 2."""
    found = factors(epochs=1, schedule="cosine")
    assert found == pytest.approx([1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2])
    assert scale(Fit(epochs=1, schedule="cosine"), 4)(4) == 0.0


def test_steps_fall_by_gamma_at_each_milestone():
    found = factors(2, epochs=4, schedule="step", milestones=[1, 3], gamma=0.1)
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_is_linear_and_the_schedule_begins_after_it():
    assert factors(epochs=2, schedule="constant", warmup_epochs=1) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    # Two steps of warm-up, six of cosine.
    found = factors(epochs=2, schedule="cosine", warmup_epochs=0.5)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873])


def test_a_warm_up_longer_than_the_training_ends_with_it():
    assert factors(epochs=1, schedule="cosine", warmup_epochs=2) == [0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "cosine", "warmup_epochs": 1},
        {"schedule": "step", "milestones": [1], "gamma": 0.5},
        {"schedule": "constant"},
    ],
    ids=str,
)
def test_a_training_steps_at_those_rates(settings, tmp_path):
    fit = Fit(epochs=2, batch_size=4, lr=0.2, optimiser={"_target_": "torch.optim.SGD"}, **settings)
    _module, trace = fitted(tmp_path, fit)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    factor = scale(fit, 5)
    # A row holds the rate that the next step will have.
    assert [row["lr"] for row in rows if "train/loss" in row] == pytest.approx([0.2 * factor(s) for s in range(1, 11)])
    assert trace.steps == 10


def test_a_step_moves_the_weights_by_rate_times_gradient(tmp_path):
    fit = Fit(epochs=1, batch_size=4, lr=0.2, schedule="constant", optimiser={"_target_": "torch.optim.SGD"})
    module, _ = fitted(tmp_path / "whole", fit, count=4)
    once = module.student.net[1].weight.detach()
    slower, _ = fitted(tmp_path / "half", Fit(**{**vars(fit), "lr": 0.1}), count=4)
    before = fitted(tmp_path / "none", Fit(**{**vars(fit), "lr": 1e-30}), count=4)[0].student.net[1].weight.detach()
    torch.testing.assert_close(once - before, 2 * (slower.student.net[1].weight.detach() - before))


def test_the_optimiser_gets_its_own_fields_and_the_rate():
    parameters = [torch.nn.Parameter(torch.ones(2))]
    fit = Fit(lr=0.3, optimiser={"_target_": "torch.optim.SGD", "momentum": 0.9, "nesterov": True})
    found = configure(fit, 4)(parameters)
    group = found["optimizer"].param_groups[0]
    assert isinstance(found["optimizer"], torch.optim.SGD)
    assert (group["initial_lr"], group["momentum"], group["nesterov"]) == (0.3, 0.9, True)
    assert found["lr_scheduler"]["interval"] == "step"


@pytest.mark.parametrize(
    ("optimiser", "said"),
    [
        ({}, "_target_='' is no optimiser of torch.optim"),
        ({"_target_": "torch.nn.Linear"}, "is no optimiser of torch.optim"),
        ({"_target_": "timm.optim.Lamb"}, "is no optimiser of torch.optim"),
        ({"_target_": "torch.load"}, "is no optimiser of torch.optim"),
        ({"_target_": "torch.optim.AdamX"}, "has no 'AdamX'; did you mean"),
        ({"_target_": "torch.optim.lr_scheduler.StepLR"}, "is no class of an allowed package"),
        ({"_target_": "torch.optim.SGD", "momentun": 0.9}, "momentun is not a field of torch.optim.SGD; did you mean"),
        ({"_target_": "torch.optim.SGD", "lr": 0.1}, "fit.optimiser.lr stands elsewhere: set fit.lr"),
        ({"_target_": "torch.optim.SGD", "params": []}, "fit.optimiser.params stands elsewhere"),
    ],
    ids=str,
)
def test_what_is_no_optimiser_of_torchs_is_refused(optimiser, said):
    with pytest.raises(InputError) as refused:
        configure(Fit(optimiser=optimiser), 4)
    assert said in str(refused.value)


@pytest.mark.parametrize("value", [-1, "much", [1]])
def test_a_value_that_the_optimiser_refuses_is_one_line(value):
    build = configure(Fit(optimiser={"_target_": "torch.optim.AdamW", "weight_decay": value}), 4)
    with pytest.raises(InputError, match=r"torch\.optim\.AdamW refuses"):
        build([torch.nn.Parameter(torch.ones(2))])
