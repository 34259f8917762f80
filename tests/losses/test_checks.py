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
