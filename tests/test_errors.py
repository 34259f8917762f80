"""Errors: an exit code each, and the nearest names."""

from __future__ import annotations

import pytest

from kd.errors import Inconclusive, InputError, KDError, nearest, offer


def test_each_kind_has_its_exit_code():
    assert (KDError.exit_code, InputError.exit_code, Inconclusive.exit_code) == (1, 2, 3)
    assert issubclass(InputError, KDError) and issubclass(Inconclusive, KDError)


@pytest.mark.parametrize(
    ("word", "options", "said"),
    [
        ("temprature", ["alpha", "temperature"], "; did you mean 'temperature'?"),
        ("Temperature", ["temperature"], "; did you mean 'temperature'?"),
        ("adamw", ["SGD", "AdamW", "Adam"], "; did you mean 'AdamW' or 'Adam'?"),
        ("lerning_rate", ["epochs", "lr"], "; did you mean 'lr'?"),  # by its initials
        ("momentumm", ["betas", "eps"], ""),
        ("", ["a"], ""),
        ("a", [], ""),
    ],
)
def test_the_nearest_names_are_offered(word, options, said):
    assert nearest(word, options) == said


def test_where_no_name_is_near_all_are_offered_unless_they_are_too_many():
    assert offer("x", ["alpha", "seed"]) == "; there are alpha, seed"
    assert offer("x", ["default"]) == "; there is default"
    assert offer("alfa", ["alpha", "seed"]) == "; did you mean 'alpha'?"
    assert offer("x", []) == offer("x", [f"name{i}" for i in range(31)]) == ""
