"""Losses softened by a power or a learned temperature: pinned numbers, numpy formulas, the schedule of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from torch import Tensor, nn
from torch.testing import assert_close

from kd.losses.checks import BadValue
from kd.losses.logits import soft_target_kl
from kd.losses.softened import TTM, WTTM, LearnedTemperatureKL, ttm, wttm
from tests.losses.waves import kl, softmax, tensors, wave

STUDENT, TEACHER = wave(6, 5), wave(6, 5, phase=1.0)
S, T = tensors(STUDENT, TEACHER)


# TTM and WTTM.


@pytest.mark.parametrize("gamma", [0.1, 0.2, 1.0, 2.0])
def test_ttm_and_wttm_are_those_of_the_numpy_formula(gamma: float) -> None:
    powered = softmax(TEACHER) ** gamma
    total = powered.sum(axis=1)
    each = kl(powered / total[:, None], softmax(STUDENT))
    assert ttm(S, T, gamma).item() == pytest.approx(each.mean(), rel=1e-5)
    assert wttm(S, T, gamma).item() == pytest.approx((total * each).mean(), rel=1e-5)


def test_ttm_and_wttm_are_pinned() -> None:
    assert ttm(S, T).item() == pytest.approx(2.1175329, rel=1e-5)
    assert wttm(S, T).item() == pytest.approx(7.4498912, rel=1e-5)


@pytest.mark.parametrize("loss", [ttm, wttm])
def test_at_power_one_they_are_the_kl_at_temperature_one(loss: Callable[..., Tensor]) -> None:
    assert_close(loss(S, T, 1.0), soft_target_kl(S, T, 1.0))


# The learned temperature.


def test_the_temperature_begins_at_one_plus_twenty_sigmoids_of_one() -> None:
    loss = LearnedTemperatureKL()
    temperature = 1 + 20 / (1 + math.exp(-1))
    assert loss.temperature().item() == pytest.approx(temperature, rel=1e-6)
    assert_close(loss(S, T), soft_target_kl(S, T, temperature), rtol=1e-5, atol=0)
    assert loss(S, T).item() == pytest.approx(3.5100184, rel=1e-5)


def test_what_is_learned_is_registered() -> None:
    loss = LearnedTemperatureKL()
    assert [name for name, _ in loss.named_parameters()] == list(loss.state_dict()) == ["theta"]


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0.0, -0.024472), (0.99, -0.024472), (1.0, -0.095492), (4.0, -0.5), (8.0, -0.975528), (9.0, -1.0), (99.0, -1.0)],
)
def test_the_gradients_factor_follows_the_half_cosine_of_the_published_code(epoch: float, factor: float) -> None:
    loss = LearnedTemperatureKL()
    loss.at(200.0, 240)
    loss.at(epoch, 240)  # whatever was before
    assert loss.factor == pytest.approx(factor, abs=1e-6)


def test_the_student_goes_down_where_the_temperature_goes_up() -> None:
    gradients = {}
    for factor in (1.0, 0.0, -0.5, -1.0):
        loss = LearnedTemperatureKL()
        loss.factor = factor
        student = S.clone().requires_grad_()
        loss(student, T).backward()
        assert loss.theta.grad is not None and student.grad is not None
        gradients[factor] = loss.theta.grad.item(), student.grad
    plain, pull = gradients[1.0]
    assert plain != 0 and all(found == pytest.approx(f * plain, abs=1e-9) for f, (found, _) in gradients.items())
    assert all(gradient.equal(pull) for _, gradient in gradients.values())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TTM(gamma=0.0), "gamma is 0.0"),
        (lambda: WTTM(gamma=-0.1), "gamma is -0.1"),
        (lambda: LearnedTemperatureKL(span=0.0), "span is 0.0"),
        (lambda: LearnedTemperatureKL(end=math.nan), "end is nan"),
    ],
)
def test_a_number_out_of_range_is_refused_in_one_line(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(BadValue, match=words.replace(".", r"\.")) as caught:
        make()
    assert "\n" not in str(caught.value)
