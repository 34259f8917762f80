"""Losses without another network as the teacher: pinned numbers, numpy formulas, schedules, the weak classifier."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.logits import cross_entropy, soft_target_kl
from kd.losses.self_taught import (
    PSKD,
    USKD,
    LabelSmoothing,
    TfKDReg,
    TfKDSelf,
    label_smoothing,
    pskd,
    tfkd_reg,
    tfkd_self,
    uskd,
)
from tests.losses.waves import Array, kl, softmax, tensors, wave

STUDENT, TEACHER = wave(6, 5), wave(6, 5, phase=1.0)
TARGET = np.array([0, 3, 2, 4, 1, 0])
S, T = tensors(STUDENT, TEACHER)
Y = torch.from_numpy(TARGET)
LABEL = np.eye(5)[TARGET]


def cross(goal: Array, logits: Array) -> float:
    return float(-(goal * np.log(softmax(logits))).sum(axis=1).mean())


# Smoothed labels.


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_label_smoothing_spreads_its_share_over_all_classes(smoothing: float) -> None:
    goal = (1 - smoothing) * LABEL + smoothing / 5
    assert label_smoothing(S, Y, smoothing).item() == pytest.approx(cross(goal, STUDENT), rel=1e-5)


def test_label_smoothing_is_pinned_and_at_zero_the_cross_entropy() -> None:
    assert label_smoothing(S, Y).item() == pytest.approx(3.6127971, rel=1e-5)
    assert label_smoothing(S, Y, 0.0).equal(cross_entropy(S, Y))


# Teacher-free KD.


@pytest.mark.parametrize("correct", [0.99, 1.0, 0.2])
@pytest.mark.parametrize("temperature", [1.0, 20.0, 40.0])
def test_tfkd_reg_is_that_of_the_numpy_formula(temperature: float, correct: float) -> None:
    made_up = np.where(LABEL == 1, correct, (1 - correct) / 4)
    expected = kl(softmax(made_up, temperature), softmax(STUDENT)).mean() / 5
    assert tfkd_reg(S, Y, temperature, correct).item() == pytest.approx(expected, rel=1e-5)


def test_tfkd_reg_is_pinned() -> None:
    assert tfkd_reg(S, Y).item() == pytest.approx(0.49218969, rel=1e-5)


def test_tfkd_self_is_a_mean_over_classes_too_and_carries_the_temperature_squared() -> None:
    expected = 400 * kl(softmax(TEACHER, 20), softmax(STUDENT, 20)).mean() / 5
    assert tfkd_self(S, T).item() == pytest.approx(expected, rel=1e-5)
    assert tfkd_self(S, T).item() == pytest.approx(0.70324335, rel=1e-5)
    assert_close(5 * tfkd_self(S, T, 4.0), soft_target_kl(S, T, 4.0))


# An earlier self.


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_pskd_is_that_of_the_numpy_formula(alpha: float) -> None:
    expected = cross((1 - alpha) * LABEL + alpha * softmax(TEACHER), STUDENT)
    assert pskd(S, T, Y, alpha).item() == pytest.approx(expected, rel=1e-5)


def test_pskd_is_pinned() -> None:
    assert pskd(S, T, Y).item() == pytest.approx(2.6606460, rel=1e-5)


def test_pskd_at_either_end_is_one_cross_entropy_alone() -> None:
    assert pskd(S, torch.full_like(T, math.nan), Y, 0.0).equal(cross_entropy(S, Y))
    assert_close(pskd(S, T, Y, 1.0), nn.functional.cross_entropy(S, T.softmax(1)))


def test_pskd_trusts_its_earlier_self_more_with_each_epoch_and_a_resumed_run_does_the_same() -> None:
    loss = PSKD()
    assert_close(loss(S, T, Y), pskd(S, T, Y, 0.8))  # no schedule asked for
    for epoch, share in ((0.0, 0.08), (0.9, 0.08), (4.0, 0.4), (9.5, 0.8), (1.0, 0.16), (12.0, 0.8)):
        loss.at(epoch, 10)
        assert_close(loss(S, T, Y), pskd(S, T, Y, share))
    assert not loss.state_dict()


# USKD.


WEAK = wave(6, 5, phase=2.5)


def uskd_in_numpy(student: Array, weak: Array, alpha: float, beta: float, mu: float) -> float:
    """Sample by sample, with ranks found by sorting."""
    p, w = softmax(student), softmax(weak)
    sure = [p[i, TARGET[i]] ** 2 for i in range(6)]
    total = 0.0
    for i, y in enumerate(TARGET):
        label = (sure[i] + 1 - np.mean(sure)) * -np.log(p[i, y])
        score = w[i] / (1 - w[i, y] + 1e-6) + np.log(p[i]) / (1 - np.log(p[i, y]) + 1e-6)
        zipf = np.zeros(5)
        for rank, c in enumerate(sorted(range(5), key=lambda c: -score[c])):
            zipf[c] = 1 / (rank + 1)
        zipf = np.delete(zipf, y) / np.delete(zipf, y).sum()
        rest = -(zipf * np.log(softmax(np.delete(student[i], y)))).sum()
        smooth = 0.1 / 5 + 0.9 * LABEL[i]
        total += alpha * label + beta * rest + mu * -(smooth * np.log(w[i])).sum()
    return float(total / 6)


@pytest.mark.parametrize(
    ("alpha", "beta", "mu"), [(1.0, 0.1, 0.005), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (2.0, 1.0, 1.0)]
)
def test_uskd_is_that_of_the_numpy_formula(alpha: float, beta: float, mu: float) -> None:
    expected = uskd_in_numpy(STUDENT, WEAK, alpha, beta, mu)
    assert uskd(S, *tensors(WEAK), Y, alpha, beta, mu).item() == pytest.approx(expected, rel=1e-5)


def test_uskd_is_pinned() -> None:
    assert uskd(S, *tensors(WEAK), Y).item() == pytest.approx(3.1135555, rel=1e-5)


def test_the_weights_and_ranks_of_uskd_are_constants_to_the_gradient() -> None:
    """The label's part alone: d/dz of -c log p_y is c (p - y), with c = p_y² + 1 - mean p_y², over the batch."""
    student = torch.from_numpy(STUDENT).requires_grad_()
    uskd(student, torch.from_numpy(WEAK), Y, beta=0.0, mu=0.0).backward()
    p = softmax(STUDENT)
    square = (p * LABEL).sum(axis=1) ** 2
    expected = (square + 1 - square.mean())[:, None] * (p - LABEL) / 6
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-6)


def test_its_weak_classifier_is_trained_on_the_feature_and_registered() -> None:
    torch.manual_seed(0)
    loss = USKD()
    assert not loss.state_dict()
    loss.bind((6, 5), (6, 3, 2, 2))
    assert set(loss.state_dict()) == {"weak.weight", "weak.bias"}
    feature = tensors(wave(6, 3, 2, 2))[0].requires_grad_()
    assert loss.weak is not None
    assert_close(loss(S, feature, Y), uskd(S, loss.weak(feature.mean((2, 3))), Y))
    assert_close(loss(S, feature.mean((2, 3)), Y), loss(S, feature, Y))
    loss(S, feature, Y).backward()
    assert feature.grad is not None and all(p.grad is not None for p in loss.parameters())
    kept = loss.weak
    loss.bind((9, 5), (9, 3, 4, 4))
    assert loss.weak is kept


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: USKD()(S, S, Y), "call bind"),
        (lambda: USKD().bind((6, 5), (6, 3, 4)), "choose a layer that gives maps"),
        (lambda: USKD().bind((6, 2, 5), (6, 3)), "choose a layer that gives maps"),
    ],
)
def test_a_weak_classifier_on_what_is_no_layer_is_refused(use: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_a_feature_of_another_width_is_refused() -> None:
    loss = USKD()
    loss.bind((6, 5), (6, 3))
    with pytest.raises(InputError, match="uskd was bound to width 3"):
        loss(S, torch.zeros(6, 4), Y)


# What all refuse.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LabelSmoothing(-0.1), "smoothing is -0.1; it must be a finite number from 0 to 1"),
        (lambda: TfKDReg(temperature=0.0), "temperature is 0.0"),
        (lambda: TfKDReg(correct=1.01), "correct is 1.01"),
        (lambda: TfKDSelf(temperature=math.inf), "temperature is inf"),
        (lambda: PSKD(alpha=1.1), "alpha is 1.1"),
        (lambda: USKD(mu=-0.005), "mu is -0.005"),
    ],
)
def test_a_number_out_of_range_is_refused_in_one_line(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(BadValue, match=words.replace(".", r"\.")) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_one_class_has_no_others() -> None:
    one, zero = torch.zeros(2, 1), tensor([0, 0])
    with pytest.raises(InputError, match="no class beside the label"):
        tfkd_reg(one, zero)
    with pytest.raises(InputError, match="no class beside the label"):
        uskd(one, one, zero)
