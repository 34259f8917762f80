"""Losses before a ReLU: pinned numbers, margins, and what each layer weighs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.boundary import AB, OFD, ab, expected_below, ofd
from kd.losses.checks import BadValue
from tests.losses.waves import tensors, wave

STUDENT, TEACHER = wave(5, 3, 4, 4), wave(5, 3, 4, 4, phase=1.0)
S, T = tensors(STUDENT, TEACHER)


@pytest.mark.parametrize("margin", [1.0, 0.5])
def test_ab_is_that_of_the_numpy_formula(margin: float) -> None:
    s, t = STUDENT, TEACHER
    wrong = (s + margin) ** 2 * ((s > -margin) & (t <= 0)) + (s - margin) ** 2 * ((s <= margin) & (t > 0))
    assert ab(S, T, margin).item() == pytest.approx(wrong.sum() / 5 * 3 / 1000, rel=1e-5)


def test_ab_asks_for_the_side_and_not_for_the_height() -> None:
    assert ab(torch.where(T > 0, 1.0, -1.0), T).item() == 0
    assert_close(ab(S, T), ab(S, 100 * T))


def test_ofd_is_that_of_the_numpy_formula() -> None:
    margin = np.array([-0.5, -1.0, -2.0])
    t = np.maximum(TEACHER, margin[:, None, None])
    expected = ((STUDENT - t) ** 2 * ((t < STUDENT) | (t > 0))).sum() / 5
    assert ofd(S, T, tensor(margin)).item() == pytest.approx(expected, rel=1e-5)


def test_ofd_lets_the_student_be_as_far_below_as_it_likes() -> None:
    below = torch.full((1, 1, 1, 1), -9.0)
    assert ofd(below, tensor([[[[-5.0]]]]), tensor([-1.0])).item() == 0


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1.0, 2.0), (-2.0, 0.5)])
def test_the_margin_is_the_mean_of_a_gaussian_below_zero(mean: float, deviation: float) -> None:
    points = np.linspace(mean - 12 * deviation, 0, 200_001)
    density = np.exp(-(((points - mean) / deviation) ** 2) / 2)
    expected = (points * density).sum() / density.sum()
    assert expected_below(tensor(mean), tensor(deviation)).item() == pytest.approx(expected, rel=1e-3)


def test_the_margin_of_a_channel_that_is_hardly_ever_below_is_three_deviations() -> None:
    assert expected_below(tensor(8.0), tensor(2.0)).item() == -6
    assert math.isfinite(expected_below(tensor(0.0), tensor(0.0)).item())


def test_the_last_layer_counts_once_and_each_before_it_half_of_the_next() -> None:
    loss = AB()
    loss.bind([S.shape] * 3, [T.shape] * 3)
    assert not list(loss.parameters())
    assert_close(loss(student=[S] * 3, teacher=[T] * 3), ab(S, T) * 1.75)


def test_connectors_are_without_activation_and_always_there_for_ofd() -> None:
    narrow, same = AB(), OFD()
    narrow.bind((5, 3, 4, 4), (5, 6, 4, 4))
    same.bind((5, 3, 4, 4), (5, 3, 4, 4))
    for loss in (narrow, same):
        assert loss.connectors is not None
        assert [type(part).__name__ for part in loss.connectors[0]] == ["Conv2d", "BatchNorm2d"]


def test_ofd_takes_its_margin_from_the_teachers_channels() -> None:
    loss = OFD().eval()
    loss.bind(S.shape, T.shape)
    assert loss.connectors is not None
    expected = ofd(loss.eval().connectors[0](S), T, expected_below(T.mean((0, 2, 3)), T.std((0, 2, 3), correction=0)))
    assert_close(loss(student=S, teacher=T), expected)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BadValue, match="margin"):
        AB(margin=0)
    with pytest.raises(InputError, match="one margin a channel"):
        ofd(S, T, torch.zeros(2))
    with pytest.raises(InputError, match="call bind"):
        OFD()(student=S, teacher=T)
