"""Each verdict says ok where all is well, and what is wrong where it is not."""

from __future__ import annotations

import math
import re

import pytest

from kd.doctoring.verdicts import (
    FAIL,
    OK,
    WARN,
    class_order,
    disk,
    frozen,
    losses,
    normalisation,
    shares,
    stored_labels,
    teacher_accuracy,
    unmoved,
    worst,
)


@pytest.mark.parametrize(
    ("given", "state", "said"),
    [
        (
            (0.97, 240, 240, 0.1, 0.97, (0.9, "f69d")),
            OK,
            "240 validation samples; the student alone has 90.00",
        ),
        ((0.97, 240, 240, 0.1, None, None), OK, "97.00 % of 240 validation samples"),
        (
            (0.97, 240, 500, 0.1, 0.5, None),
            OK,
            "of the first 240 of 500 validation",
        ),
        (
            (0.80, 240, 240, 0.1, 0.80, (0.9, "f69d")),
            WARN,
            r"less than its student: .* 90.00 % \(f69d\)",
        ),
        ((0.15, 240, 240, 0.1, 0.15, None), WARN, r"near chance \(10.00 %\)"),
        ((0.52, 240, 240, 0.5, 0.52, None), WARN, "near chance"),
        ((0.31, 240, 240, 0.1, 0.97, None), FAIL, "and its card says 97.00 %"),
    ],
)
def test_a_teachers_accuracy_is_held_against_chance_its_card_and_its_student(given, state, said):
    check = teacher_accuracy(*given)
    assert check.state == state
    assert re.search(said, check.said)


DIGITS = ([0.3], [0.2])


@pytest.mark.parametrize(
    ("own", "data", "seen", "pretrained", "state", "said"),
    [
        (DIGITS, DIGITS, ([0.31], [0.21]), False, OK, "as the data say"),
        (([0.5], [0.2]), DIGITS, DIGITS, False, FAIL, "mean 0.500, std 0.200, and the data say mean 0.300"),
        (([0.3], [0.4]), DIGITS, DIGITS, False, FAIL, "std 0.400, and the data say"),
        (([0.3, 0.3, 0.3], [0.2] * 3), DIGITS, DIGITS, False, FAIL, "and the data say"),
        (([0.45], [0.25]), DIGITS, DIGITS, True, OK, "its own, of its pretraining"),
        (DIGITS, DIGITS, ([0.6], [0.2]), False, WARN, "but training images have mean 0.600"),
        (DIGITS, DIGITS, ([0.3], [0.05]), False, WARN, "set data.mean and data.std"),
    ],
)
def test_normalisation_is_held_against_config_and_pixels(own, data, seen, pretrained, state, said):
    check = normalisation("teacher", own, data, seen, pretrained)
    assert (check.state, check.name) == (state, "teacher normalisation") and said in check.said


@pytest.mark.parametrize(
    ("teacher", "state", "said"),
    [
        (["a", "b", "c"], OK, "3 classes"),
        (["a", "c", "b"], FAIL, "class 1 is 'c' to the teacher and 'b' in the data (2 of 3 differ)"),
        (["a", "b"], FAIL, "the teacher has 2 classes, the data 3"),
        (None, WARN, "names no classes"),
    ],
)
def test_classes_stand_in_one_order(teacher, state, said):
    check = class_order(teacher, ["a", "b", "c"])
    assert check.state == state and said in check.said


def test_a_teacher_stands_still():
    assert frozen([], []).state == OK
    assert frozen(["bn1", "bn2"], ["conv1"]).said.startswith("bn1 and 1 more are in train mode")
    assert (frozen([], ["conv1"]).state, unmoved(["bn1.running_mean"], 3).state) == (FAIL, FAIL)
    assert "3 batch norms" in unmoved([], 3).said


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    parts = [{"ce": 1.0, "kd": 2.0}, {"ce": 1.0}]  # a schedule may leave a term out
    assert losses([3.0, 1.0], parts).said == "finite over 2 steps, 3 at the first (ce 1, kd 2)"
    assert losses([math.nan, 1.0], [{"ce": 1.0, "kd": math.inf}, {"ce": 1.0}]).said == "step 1: term 'kd' is not finite"
    assert losses([math.inf], [{"ce": 1e38}]).said == "step 1: the weighted sum is not finite"


@pytest.mark.parametrize(
    ("own", "trained", "state", "said"),
    [
        ({"ce": 0.4, "kd": 0.6}, True, OK, "ce 40.0 %, kd 60.0 %"),
        ({"ce": 1.0}, True, OK, "ce 100.0 %"),  # one term alone has all of it
        ({"ce": 0.9995, "kd": 0.0005}, True, WARN, "kd 0.05 %: kd hardly moves the student"),
        ({"ce": 0.002, "kd": 0.003, "hint": 0.995}, True, WARN, "ce and kd hardly move the student"),
        ({"ce": 0.9995, "kd": 0.0005}, False, OK, "these will change"),
        ({"ce": math.nan, "kd": 0.5}, True, FAIL, "not finite"),
    ],
)
def test_a_term_without_a_say_is_named(own, trained, state, said):
    check = shares({f"grad_share/{name}": value for name, value in own.items()}, trained)
    assert check.state == state and said in check.said


def test_stored_labels_and_disk_have_their_limits():
    assert stored_labels(1.0, 1e-6, 64, 1e-3).state == OK
    assert "they are another teacher's" in stored_labels(1.0, 0.2, 64, 1e-3).said
    assert stored_labels(0.5, 0.0, 64, 1e-3).state == FAIL
    assert [disk(needed, 100, "x").state for needed in (10, 60, 101)] == [OK, WARN, FAIL]
    assert worst([disk(10, 100, "x"), disk(101, 100, "x")]) == FAIL and worst([]) == OK
