"""Keys: one text for one meaning, and pinned for ever."""

from __future__ import annotations

import pytest

from kd.errors import InputError
from kd.store import canonical, digest, document, plain, without_neutral

# Literal documents and the keys they have had since schema 1. If one moves, every stored run is lost: never edit these.
GOLDEN = [
    (
        {"schema": 1, "stage": "kd.stages.Train", "version": 1, "config": {"seed": 0, "lr": 0.002}, "inputs": {}},
        "84735fd8a83b80fc12742dcfb207ab6e6089dc02aaed3955aee31daeec572818",
    ),
    (
        {
            "schema": 1,
            "stage": "kd.stages.Distil",
            "version": 1,
            "config": {"fit": {"epochs": 3, "clip": None}, "objective": {"kd": {"weight": 0.9, "on": True}}},
            "inputs": {"teacher": "ab" * 32},
        },
        "e01e1a2cd8736c9964a189dcfc317630f94c8f9d8e8ad04da111d83533286328",
    ),
]


@pytest.mark.parametrize(("text", "key"), GOLDEN)
def test_golden_keys_never_move(text, key):
    assert digest(text) == key


@pytest.mark.parametrize("same", [8, 8.0, 8e0, float("8")])
def test_one_number_has_one_text(same):
    assert canonical({"t": same}) == '{"t":8}'


def test_a_boolean_is_no_number():
    assert canonical(True) != canonical(1)


def test_tuples_are_lists_and_keys_are_sorted():
    assert canonical({"b": (1, 2), "a": -0.0}) == canonical({"a": 0, "b": [1, 2]})


def test_floats_keep_their_shortest_exact_text():
    assert canonical(0.1) == "0.1" and plain(0.30000000000000004) != plain(0.3)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"a": {"b": "???"}}, "a.b is not set"),
        ({"a": ["${run.store}"]}, "a[0] still holds"),
        ({"a": float("nan")}, "finite"),
        ({"a": float("inf")}, "finite"),
        ({1: 2}, "no string"),
        ({"a": object()}, "plain data"),
    ],
)
def test_what_has_no_single_meaning_is_refused_with_its_path(bad, said):
    with pytest.raises(InputError, match=r".") as error:
        canonical(bad)
    assert said in str(error.value)


def test_a_new_knob_at_its_neutral_value_moves_no_key():
    old = document("kd.stages.Train", 1, {"fit": {"epochs": 3}}, {}, {})
    since = {"fit.ema": None, "fit.mixup": 0}
    new = document("kd.stages.Train", 1, {"fit": {"epochs": 3, "ema": None, "mixup": 0.0}}, {}, since)
    on = document("kd.stages.Train", 1, {"fit": {"epochs": 3, "ema": 0.99, "mixup": 0.0}}, {}, since)
    assert digest(old) == digest(new) != digest(on)


def test_neutral_values_are_dropped_only_where_they_are_named():
    assert without_neutral({"a": None, "b": {"a": None}}, {"a": None}) == {"b": {"a": None}}


@pytest.mark.parametrize(
    "change", [{"stage": "kd.stages.Other"}, {"version": 2}, {"config": {"x": 2}}, {"inputs": {"t": "k"}}]
)
def test_every_part_of_the_document_is_in_the_key(change):
    base = {"schema": 1, "stage": "kd.stages.Train", "version": 1, "config": {"x": 1}, "inputs": {}}
    assert digest(base) != digest({**base, **change})
