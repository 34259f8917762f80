"""Reference numbers of the losses on logits: by hand, and by an independent float64 formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.logits import (
    CrossEntropy,
    SoftTargetCrossEntropy,
    SoftTargetKL,
    Standardised,
    cross_entropy,
    logit_mse,
    soft_target_cross_entropy,
    soft_target_kl,
    standardised,
)
from kd.losses.response import DKD, dkd

Array = NDArray[np.float64]

# Literal logits of four samples and five classes, with the margins of a trained net.
STUDENT = [
    [1.25, -2.5, -0.25, -4.75, -8.5],
    [5.0, 0.25, -2.5, -5.0, -2.5],
    [3.75, -2.75, -5.0, 0.5, 1.75],
    [0.75, 4.0, -0.75, 0.75, -4.0],
]
TEACHER = [
    [1.0, 4.0, 3.25, 1.0, 5.75],
    [1.0, 3.0, -2.0, -2.5, 10.0],
    [-3.75, -3.5, 1.75, 12.0, 4.0],
    [1.5, -4.5, -3.25, 1.0, -1.75],
]


def softmax(logits: Array, temperature: float) -> Array:
    powers = np.exp(logits / temperature)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def wave(rows: int, classes: int, phase: float) -> Array:
    """A generated case: logits between -6 and 6 from literal arithmetic."""
    return np.asarray(6 * np.sin(1.7 * np.arange(rows * classes) + phase).reshape(rows, classes))


CASES = [
    (np.array(STUDENT), np.array(TEACHER)),
    (wave(16, 10, phase=0.0), wave(16, 10, phase=1.0)),
]


def test_kl_matches_hand_computation() -> None:
    # p = (e²/(e²+1), 1/(e²+1)) = (0.8808, 0.1192) against (½, ½): ln 2 - entropy(p) = 0.6931 - 0.3653.
    assert_close(soft_target_kl(tensor([[0.0, 0.0]]), tensor([[2.0, 0.0]]), 1.0), tensor(0.3278), atol=1e-4, rtol=0)


def test_the_square_of_the_temperature_is_inside() -> None:
    # Logits twice as far apart at twice the temperature are the same distributions, so only T² = 4 is left.
    once = soft_target_kl(tensor([[0.0, 0.0]]), tensor([[2.0, 0.0]]), 1.0)
    assert_close(soft_target_kl(tensor([[0.0, 0.0]]), tensor([[4.0, 0.0]]), 2.0), 4 * once)


def test_kl_is_of_the_teacher_to_the_student_and_not_the_reverse() -> None:
    # KL((¾, ¼) ‖ (½, ½)) = ¾ ln 1.5 + ¼ ln 0.5 = 0.1308; the reverse is 0.1438.
    even, three_to_one = tensor([[0.0, 0.0]]), tensor([[math.log(3), 0.0]])
    assert_close(soft_target_kl(even, three_to_one, 1.0), tensor(0.1308), atol=1e-4, rtol=0)
    assert_close(soft_target_kl(three_to_one, even, 1.0), tensor(0.1438), atol=1e-4, rtol=0)


def test_the_mean_is_over_the_batch_and_the_sum_over_classes() -> None:
    student, teacher = tensor([[0.0, 0.0]]), tensor([[2.0, 0.0]])
    alone = soft_target_kl(student, teacher, 1.0)
    assert_close(soft_target_kl(student.repeat(7, 1), teacher.repeat(7, 1), 1.0), alone)
    unlike = soft_target_kl(torch.cat([student, student]), torch.cat([teacher, student]), 1.0)
    assert_close(unlike, alone / 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("student", "teacher"), CASES)
def test_kl_is_that_of_the_float64_formula(student: Array, teacher: Array, temperature: float) -> None:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()
    found = soft_target_kl(tensor(student).float(), tensor(teacher).float(), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 5.344827), (4.0, 13.279435)])
def test_kl_of_the_literal_case_is_pinned(temperature: float, expected: float) -> None:
    assert soft_target_kl(tensor(STUDENT), tensor(TEACHER), temperature).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("student", "teacher"), CASES)
def test_soft_cross_entropy_is_the_kl_plus_the_teachers_entropy(
    student: Array, teacher: Array, temperature: float
) -> None:
    p = softmax(teacher, temperature)
    entropy = -(p * np.log(p)).sum(axis=1).mean()
    kl = soft_target_kl(tensor(student), tensor(teacher), temperature).item()
    found = soft_target_cross_entropy(tensor(student), tensor(teacher), temperature)
    assert found.item() == pytest.approx(kl + temperature**2 * entropy, rel=1e-9)


def test_both_teacher_terms_give_the_student_the_same_gradient() -> None:
    gradients = []
    for loss in (SoftTargetKL(4.0), SoftTargetCrossEntropy(4.0)):
        student = tensor(STUDENT, dtype=torch.float64, requires_grad=True)
        loss(student=student, teacher=tensor(TEACHER, dtype=torch.float64)).backward()
        gradients.append(student.grad)
    assert_close(gradients[0], gradients[1])


def test_the_gradient_keeps_its_size_while_the_temperature_grows() -> None:
    # Without T² it falls as 1/T²: from 4 to 16 by a factor of 16.
    sizes = []
    for temperature in (16.0, 64.0):
        student = tensor(STUDENT, requires_grad=True)
        soft_target_kl(student, tensor(TEACHER), temperature).backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_cross_entropy_matches_hand_computation() -> None:
    # Logits (ln 3, 0) are probabilities (¾, ¼): -ln ¾ = 0.2877 and -ln ¼ = 1.3863, mean 0.8370.
    student = tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    assert_close(cross_entropy(student, tensor([0, 1])), tensor(0.8370), atol=1e-4, rtol=0)


def test_cross_entropy_takes_narrow_integers() -> None:
    student = tensor(STUDENT)
    assert_close(
        cross_entropy(student, tensor([0, 1, 2, 3], dtype=torch.uint8)), cross_entropy(student, torch.arange(4))
    )


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.arange(3), "need 4 class indices"),
        (torch.zeros(4, 1, dtype=torch.long), r"the target is int64 of shape \(4, 1\)"),
        (torch.zeros(4), "the target is float32"),
        (tensor([0, 1, 2, 5]), "no class of the student's 5"),
        (tensor([0, 1, 2, -1]), "no class of the student's 5"),
    ],
)
def test_targets_that_do_not_fit_are_refused_in_one_line(target: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        CrossEntropy()(student=tensor(STUDENT), target=target)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [SoftTargetKL, SoftTargetCrossEntropy])
@pytest.mark.parametrize("temperature", [0, -4.0, math.nan, math.inf])
def test_a_temperature_that_divides_nothing_is_refused(make: type[SoftTargetKL], temperature: float) -> None:
    with pytest.raises(BadValue, match="temperature"):
        make(temperature)


@pytest.mark.parametrize("loss", [soft_target_kl, soft_target_cross_entropy])
def test_the_functions_refuse_it_too(loss: type[SoftTargetKL]) -> None:
    with pytest.raises(ValueError, match="temperature"):
        loss(tensor(STUDENT), tensor(TEACHER), 0.0)


def test_far_apart_logits_stay_finite() -> None:
    assert soft_target_kl(tensor([[1e4, -1e4]]), tensor([[-1e4, 1e4]]), 1.0).item() == pytest.approx(2e4)


def test_kl_is_exactly_zero_at_identity() -> None:
    assert soft_target_kl(tensor(STUDENT), tensor(STUDENT), 4.0).item() == 0


def test_kl_at_a_learned_temperature_pulls_the_temperature() -> None:
    student, teacher = (tensor(rows, dtype=torch.float64) for rows in (STUDENT, TEACHER))
    temperature = tensor(4.0, dtype=torch.float64, requires_grad=True)
    value = soft_target_kl(student, teacher, temperature)
    value.backward()
    at, up, down = (soft_target_kl(student, teacher, t).item() for t in (4.0, 4.001, 3.999))
    assert value.item() == pytest.approx(at, rel=1e-12)
    assert temperature.grad is not None and temperature.grad.item() == pytest.approx((up - down) / 0.002, rel=1e-6)


def test_logit_mse_is_a_mean_over_all_elements_and_sees_what_a_softmax_does_not() -> None:
    # Differences 1, 2, 0, -3: squares 1, 4, 0, 9. A constant added to a row changes no probability.
    student, teacher = tensor([[2.0, 2.0], [0.0, 1.0]]), tensor([[1.0, 0.0], [0.0, 4.0]])
    assert_close(logit_mse(student, teacher), tensor(3.5))
    assert_close(logit_mse(student + 1, student), tensor(1.0))
    found = logit_mse(tensor(STUDENT), tensor(TEACHER)).item()
    assert found == pytest.approx(np.square(np.array(STUDENT) - np.array(TEACHER)).mean(), rel=1e-6)


def test_standardised_logits_have_mean_zero_and_a_samples_deviation_of_one() -> None:
    rows = np.array(STUDENT)
    expected = (rows - rows.mean(1, keepdims=True)) / (1e-7 + rows.std(1, ddof=1, keepdims=True))
    np.testing.assert_allclose(standardised(tensor(STUDENT)).numpy(), expected, rtol=1e-5)


def test_a_row_of_equal_logits_is_zero_and_its_gradient_finite() -> None:
    # A net whose head begins at zero gives such rows, and the slope of a root at 0 is none.
    student = torch.zeros(2, 3, requires_grad=True)
    value = Standardised(SoftTargetKL(2.0))(student=student, teacher=tensor([[1.0, 2.0, 3.0]] * 2))
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all() and student.grad.any()


def test_any_loss_on_logits_can_be_given_standardised_ones() -> None:
    student, teacher, target = tensor(STUDENT), tensor(TEACHER), torch.arange(4)
    given = {"student": student, "teacher": teacher}
    plain = standardised(student), standardised(teacher)
    assert_close(Standardised(SoftTargetKL(2.0))(**given), soft_target_kl(*plain, 2.0))
    assert_close(Standardised(DKD())(**given, target=target), dkd(*plain, target))
    # Only the shape of the logits counts, neither their scale nor their level.
    moved = {"student": 3 * student + 1, "teacher": teacher / 2 - 5}
    assert_close(Standardised(SoftTargetKL(2.0))(**moved), Standardised(SoftTargetKL(2.0))(**given))


def test_standardised_logits_of_the_literal_case_are_pinned() -> None:
    given = {"student": tensor(STUDENT), "teacher": tensor(TEACHER)}
    p, q = (softmax((z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True), 2.0) for z in CASES[0])
    expected = 4 * (q * np.log(q / p)).sum(axis=1).mean()
    found = Standardised(SoftTargetKL(2.0))(**given).item()
    assert found == pytest.approx(expected, rel=1e-5) and found == pytest.approx(0.95591081, rel=1e-5)


def test_a_schedule_goes_through_the_standardisation() -> None:
    loss = Standardised(DKD())
    loss.at(4.0, 240)
    assert isinstance(loss.loss, DKD) and loss.loss.factor == 0.25
    Standardised(SoftTargetKL(2.0)).at(4.0, 240)  # has none


def test_logits_of_one_class_have_no_spread() -> None:
    with pytest.raises(InputError, match="need two classes"):
        standardised(torch.zeros(2, 1))
