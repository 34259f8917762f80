"""What every loss refuses, in one line."""

from __future__ import annotations

import math

import pytest
import torch

from kd.errors import InputError
from kd.losses import checks


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan, math.inf, -math.inf, "4", None, True])
def test_only_a_finite_number_above_zero_is_positive(value: object) -> None:
    with pytest.raises(checks.BadValue, match=r"temperature is .*; it must be a finite number above 0"):
        checks.positive("temperature", value)


def test_a_bad_value_is_an_input_error_and_a_value_error() -> None:
    assert issubclass(checks.BadValue, InputError) and issubclass(checks.BadValue, ValueError)
    assert checks.BadValue("x").exit_code == 2


def test_half_precision_is_widened_and_more_is_kept() -> None:
    for dtype, wide in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert checks.widened(torch.zeros(1, dtype=dtype)).dtype is wide


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (torch.zeros(4, 10), torch.zeros(4, 9), "10 classes and the teacher's 9"),
        (torch.zeros(4, 10), torch.zeros(3, 10), "of 4 samples and the teacher's of 3"),
        (torch.zeros(4), torch.zeros(4, 10), r"student's logits are float32 of shape \(4,\)"),
        (torch.zeros(4, 10), torch.zeros(4, 10, 1), r"teacher's logits are float32 of shape \(4, 10, 1\)"),
        (torch.zeros(4, 10, dtype=torch.long), torch.zeros(4, 10), "student's logits are int64"),
        (torch.zeros(0, 10), torch.zeros(0, 10), "without samples"),
        (torch.zeros(4, 0), torch.zeros(4, 0), "without samples"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_in_one_line(
    student: torch.Tensor, teacher: torch.Tensor, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        checks.pair(student, teacher)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, "0.5", None, True])
def test_a_number_outside_its_span_is_refused(value: object) -> None:
    with pytest.raises(checks.BadValue, match=r"share is .*; it must be a finite number from 0 to 1"):
        checks.within("share", value, high=1.0)


@pytest.mark.parametrize("value", [0, 1, 0.5])
def test_both_ends_of_a_span_belong_to_it(value: float) -> None:
    found = checks.within("share", value, high=1.0)
    assert found == value and type(found) is float
    assert checks.within("share", 1e9) == 1e9 and checks.within("end", -3, -math.inf) == -3


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.arange(3), "need 4 class indices"),
        (torch.zeros(4, 1, dtype=torch.long), r"the target is int64 of shape \(4, 1\)"),
        (torch.zeros(4), "the target is float32"),
        (torch.ones(4, dtype=torch.bool), "the target is bool"),
        (torch.tensor([0, 1, 2, 10]), "no class of the student's 10: they go from 0 to 10"),
        (torch.tensor([0, 1, 2, -100]), "no class of the student's 10: they go from -100 to 2"),
    ],
)
def test_labels_that_are_none_are_refused_in_one_line(target: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        checks.labels(target, torch.zeros(4, 10))
    assert "\n" not in str(caught.value)


def test_narrow_labels_are_widened() -> None:
    assert checks.labels(torch.arange(4, dtype=torch.uint8), torch.zeros(4, 10)).dtype is torch.int64


def test_rows_are_flat_and_wide() -> None:
    student, teacher = checks.rows(torch.zeros(4, 2, 3, dtype=torch.bfloat16), torch.zeros(4, 9, dtype=torch.float64))
    assert student.shape == (4, 6) and student.dtype is torch.float32
    assert teacher.shape == (4, 9) and teacher.dtype is torch.float64


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (torch.zeros(4, 3), torch.zeros(3, 3), "of 4 samples and the teacher's of 3"),
        (torch.zeros(4), torch.zeros(4, 3), r"the student's features are float32 of shape \(4,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long), "the teacher's features are int64"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "not empty"),
    ],
)
def test_features_without_rows_are_refused_in_one_line(
    student: torch.Tensor, teacher: torch.Tensor, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        checks.rows(student, teacher)
    assert "\n" not in str(caught.value)


def test_what_is_shown_of_a_module_is_read_from_it() -> None:
    class Own(torch.nn.Module):
        extra_repr = checks.shown("beta", "keep")
        beta, keep = 0.5, None

    assert repr(Own()) == "Own(beta=0.5, keep=None)"


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None, True])
def test_only_a_whole_number_of_one_or_more_is_whole(value: object) -> None:
    with pytest.raises(checks.BadValue, match=r"width is .*; it must be a whole number of 1 or more"):
        checks.whole("width", value)
