"""Losses on maps: pinned numbers, numpy formulas, and the two readings of attention transfer kept apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.maps import AT, CATKD, CWD, NST, ParaphrasedFT, at, at_norm, catkd, cwd, ft, nst
from tests.losses.waves import Array, kl, softmax, tensors, wave

STUDENT, TEACHER, WIDE = wave(5, 3, 4, 4), wave(5, 3, 4, 4, phase=1.0), wave(5, 6, 4, 4, phase=2.0)
S, T, W = tensors(STUDENT, TEACHER, WIDE)
both = pytest.mark.parametrize(("student", "teacher"), [(STUDENT, TEACHER), (STUDENT, WIDE)], ids=["one", "two"])


def unit(rows: Array) -> Array:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def attention(maps: Array) -> Array:
    return unit((maps**2).mean(axis=1).reshape(len(maps), -1))


@both
def test_the_three_on_attention_are_those_of_the_numpy_formulas(student: Array, teacher: Array) -> None:
    ours, theirs = tensors(student, teacher)
    gap = attention(student) - attention(teacher)
    assert at(ours, theirs).item() == pytest.approx((gap**2).mean(), rel=1e-5)
    assert at_norm(ours, theirs).item() == pytest.approx(np.sqrt((gap**2).sum(axis=1)).mean(), rel=1e-5)
    assert ft(ours, theirs).item() == pytest.approx(np.abs(gap).mean(), rel=1e-5)


def test_attention_transfer_of_the_authors_is_the_mean_of_squares_and_of_the_paper_the_norm() -> None:
    # Attention (1, 0) against (0, 1) in two samples: squares 1 and 1, mean 1; norm √2.
    student, teacher = tensor([[[[1.0, 0.0]]]]).repeat(2, 1, 1, 1), tensor([[[[0.0, 3.0]]]]).repeat(2, 1, 1, 1)
    assert_close(at(student, teacher), tensor(1.0))
    assert_close(at_norm(student, teacher), tensor(2.0).sqrt())


def test_attention_does_not_see_how_large_the_teachers_activations_are() -> None:
    assert_close(at(S, T), at(S, 10 * T))


@both
def test_nst_is_that_of_the_numpy_formula(student: Array, teacher: Array) -> None:
    def kernel(a: Array, b: Array) -> float:
        rows = [unit(m.reshape(*m.shape[:2], -1)) for m in (a, b)]
        return float(np.mean([[(x @ y) ** 2 for x in xs for y in ys] for xs, ys in zip(*rows, strict=True)]))

    expected = kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)
    assert nst(*tensors(student, teacher)).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_is_the_divergence_over_positions_times_the_squared_temperature(temperature: float) -> None:
    p, q = (softmax(m.reshape(5, 3, -1), temperature) for m in (TEACHER, STUDENT))
    expected = temperature**2 * kl(p, q).mean()
    assert cwd(S, T, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_cwd_is_over_the_positions_of_a_channel_and_not_over_channels() -> None:
    # A channel that is the same everywhere is even, whatever its height.
    flat = torch.arange(3.0)[None, :, None, None].expand(2, 3, 4, 4)
    assert cwd(flat, 5 * flat).item() == pytest.approx(0, abs=1e-6)


def test_catkd_is_that_of_the_numpy_formula() -> None:
    def quarters(maps: Array) -> Array:
        return unit(maps.reshape(5, 3, 2, 2, 2, 2).mean(axis=(3, 5)).reshape(5, 3, 4))

    assert catkd(S, T).item() == pytest.approx(((quarters(STUDENT) - quarters(TEACHER)) ** 2).mean(), rel=1e-5)


def test_each_is_pinned() -> None:
    found = {f.__name__: f(S, T).item() for f in (at, at_norm, ft, nst, cwd, catkd)}
    assert found == pytest.approx(PINNED, rel=1e-4)


PINNED = {
    "at": 9.2855503e-05,
    "at_norm": 0.03852437,
    "ft": 0.0088413625,
    "nst": 0.0012821559,
    "cwd": 1.578148,
    "catkd": 0.24588623,
}


@pytest.mark.parametrize("make", [AT, NST])
def test_several_layers_are_added_up(make: type[AT]) -> None:
    loss = make()
    assert_close(loss(student=[S, T], teacher=[T, W]), loss(student=S, teacher=T) + loss(student=T, teacher=W))


def test_one_layer_against_two_is_refused() -> None:
    with pytest.raises(InputError, match="student has 1 layers and the teacher 2"):
        AT()(student=S, teacher=[T, W])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadValue, match="temperature"):
        CWD(temperature=0)
    with pytest.raises(BadValue, match="grid"):
        CATKD(grid=0)
    with pytest.raises(BadValue, match="rate"):
        ParaphrasedFT(rate=0)


def paraphrased() -> ParaphrasedFT:
    torch.manual_seed(0)
    loss = ParaphrasedFT(rate=0.5)
    loss.bind((5, 3, 4, 4), (5, 6, 4, 4))
    return loss


def test_the_paraphraser_learns_to_rebuild_the_teacher_and_nothing_of_the_student() -> None:
    loss = paraphrased()

    def gradient(student: Tensor) -> Tensor:
        loss.zero_grad()
        loss(student=student, teacher=W).backward()
        assert loss.paraphraser is not None
        return torch.cat([p.grad.flatten() for p in loss.paraphraser.parameters() if p.grad is not None])

    first = gradient(S)
    assert first.abs().sum() > 0 and first.equal(gradient(T))


def test_its_three_nets_are_in_the_state_and_the_factor_has_its_rate() -> None:
    loss = paraphrased()
    assert {name.partition(".")[0] for name in loss.state_dict()} == {"translator", "paraphraser", "rebuilder"}
    assert loss.paraphraser is not None and loss.translator is not None
    assert loss.paraphraser(W).shape[1] == loss.translator(S).shape[1] == 3


def test_paraphrased_layers_that_are_no_maps_or_not_bound_are_refused() -> None:
    with pytest.raises(InputError, match="choose two layers that both give maps"):
        ParaphrasedFT().bind((5, 3), (5, 6))
    with pytest.raises(InputError, match="call bind"):
        ParaphrasedFT()(student=S, teacher=W)
