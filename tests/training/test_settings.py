"""Settings: each range and type, and one line for what is outside."""

from __future__ import annotations

import dataclasses
import math

import pytest

from kd.errors import InputError
from kd.training.settings import Fit, Run, one_of, require, typed

BAD_FIT = [
    ("epochs", 0), ("batch_size", 0), ("lr", 0), ("lr", -1.0), ("lr", math.nan), ("warmup_epochs", -0.5), ("clip", 0),
    ("samples", 0), ("patience", 0), ("schedule", "cosin"), ("select", "test"), ("precision", "32"),
]  # fmt: skip
BAD_RUN = [
    ("accelerator", "cuda"), ("wandb", "on"), ("workers", -1), ("memory_gb", -0.1), ("validate_every", -1),
    ("log_every", -1), ("checkpoint_seconds", -1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_FIT, ids=str)
def test_a_fit_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"fit\.{name}={value!r} is (out of range|none of)"):
        Fit(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_RUN, ids=str)
def test_a_run_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"run\.{name}={value!r} is (out of range|none of)"):
        Run(**{name: value})


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"epochs": 1.5}, "fit.epochs=1.5 is no whole number"),
        ({"epochs": True}, "fit.epochs=True is no whole number"),
        ({"lr": "0.1"}, "fit.lr='0.1' is no number"),
        ({"clip": "no"}, "fit.clip='no' is no number or null"),
        ({"drop_last": 1}, "fit.drop_last=1 is no true or false"),
        ({"optimiser": "AdamW"}, "fit.optimiser='AdamW' is no mapping"),
        ({"milestones": 3}, "fit.milestones=3 is no list"),
        ({"epoch": 3}, "fit.epoch is not a field of fit; did you mean 'epochs'?"),
    ],
)
def test_a_value_of_another_type_is_refused(node, said):
    with pytest.raises(InputError) as refused:
        typed(Fit, node, "fit")
    assert str(refused.value) == said


def test_a_whole_number_is_a_number_and_null_is_one_where_it_may_be():
    fit = typed(Fit, {"lr": 1, "clip": None, "patience": 3, "warmup_epochs": 0}, "fit")
    assert (fit.lr, fit.clip, fit.patience) == (1, None, 3)


@pytest.mark.parametrize(
    ("settings", "needs"),
    [({}, False), ({"select": "best"}, True), ({"patience": 1}, True), ({"select": "last", "patience": None}, False)],
)
def test_validation_is_needed_where_it_decides_something(settings, needs):
    assert Fit(**settings).needs_validation is needs


@pytest.mark.parametrize("kind", [Fit, Run])
def test_settings_are_frozen_and_each_field_has_a_default(kind):
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().epochs = 3
    assert typed(kind, dataclasses.asdict(kind()), "x") == kind()


def test_a_word_and_a_range_are_told_with_what_was_meant():
    with pytest.raises(InputError, match=r"x='bets' is none of last, best; did you mean 'best'\?"):
        one_of("x", "bets", ("last", "best"))
    with pytest.raises(InputError, match=r"x=3 is out of range: it must be less than 3"):
        require(False, "x", 3, "less than 3")
