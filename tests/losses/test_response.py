"""Losses on the teacher's response: pinned numbers, numpy formulas, schedules, and mistakes that others published."""

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
from kd.losses.logits import soft_target_kl
from kd.losses.response import (
    DIST,
    DKD,
    MLKD,
    NKD,
    WSLD,
    dist,
    dkd,
    mlkd,
    nkd,
    wsld,
)
from tests.losses.waves import Array, kl, softmax, tensors, wave

STUDENT, TEACHER = wave(6, 5), wave(6, 5, phase=1.0)
TARGET = np.array([0, 3, 2, 4, 1, 0])
S, T = tensors(STUDENT, TEACHER)
Y = torch.from_numpy(TARGET)
ROWS = np.arange(6)


def others(logits: Array, temperature: float = 1.0) -> Array:
    """(6, 4): the label's column taken out before the softmax."""
    return softmax(np.array([np.delete(row, y) for row, y in zip(logits, TARGET, strict=True)]), temperature)


def label_and_rest(logits: Array, temperature: float) -> Array:
    p = softmax(logits, temperature)[ROWS, TARGET]
    return np.stack([p, 1 - p], axis=1)


def entropy_with_label(logits: Array) -> Array:
    return np.asarray(-np.log(softmax(logits)[ROWS, TARGET]))


# DKD.


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (1.0, 2.0), (0.5, 0.0), (0.0, 3.0)])
def test_dkd_is_that_of_the_numpy_formula(alpha: float, beta: float, temperature: float) -> None:
    label = kl(label_and_rest(TEACHER, temperature), label_and_rest(STUDENT, temperature)).mean()
    rest = kl(others(TEACHER, temperature), others(STUDENT, temperature)).mean()
    expected = temperature**2 * (alpha * label + beta * rest)
    assert dkd(S, T, Y, alpha, beta, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_dkd_is_pinned() -> None:
    assert dkd(S, T, Y).item() == pytest.approx(30.806243, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_weighed_by_what_the_teacher_leaves_the_other_classes_is_the_kl(temperature: float) -> None:
    """The paper's identity for one sample: KL = TCKD + (1 - p_label) NCKD."""
    for i in range(6):
        left = 1 - softmax(TEACHER, temperature)[i, TARGET[i]]
        row = slice(i, i + 1)
        found = dkd(S[row], T[row], Y[row], alpha=1.0, beta=float(left), temperature=temperature)
        assert_close(found, soft_target_kl(S[row], T[row], temperature), rtol=1e-5, atol=1e-6)


def test_dkd_is_a_mean_over_the_batch_and_not_its_sum() -> None:
    assert_close(dkd(S.repeat(3, 1), T.repeat(3, 1), Y.repeat(3)), dkd(S, T, Y))


@pytest.mark.parametrize("part", [{"alpha": 0.0}, {"beta": 0.0}])
def test_a_part_of_dkd_at_weight_zero_leaves_the_other_its_temperature_squared(part: dict[str, float]) -> None:
    (name,) = part
    at_zero, near = dkd(S, T, Y, **part), dkd(S, T, Y, **{name: 1e-6})
    assert at_zero.item() == pytest.approx(near.item(), rel=1e-4)


def test_dkd_of_a_net_that_is_sure_stays_finite() -> None:
    student = tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    value = dkd(student, tensor([[-200.0, 0.0, 100.0]]), tensor([0]), temperature=1.0)
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_dkd_warms_up_linearly_and_a_resumed_run_gets_the_same() -> None:
    loss, full = DKD(), dkd(S, T, Y)
    assert_close(loss(S, T, Y), full)  # no schedule asked for
    for epoch, factor in ((0.0, 0.05), (0.9, 0.05), (1.0, 0.1), (10.5, 0.55), (19.0, 1.0), (200.0, 1.0), (3.2, 0.2)):
        loss.at(epoch, 240)
        assert_close(loss(S, T, Y), factor * full)
    without = DKD(warmup=0)
    without.at(0.0, 240)
    assert without.factor == 1.0
    assert not loss.state_dict()


# NKD.


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0), (0.0, 1.0)])
def test_nkd_is_that_of_the_numpy_formula(gamma: float, temperature: float) -> None:
    p = softmax(TEACHER)[ROWS, TARGET]
    rest = -(others(TEACHER, temperature) * np.log(others(STUDENT, temperature))).sum(axis=1)
    expected = (p * entropy_with_label(STUDENT)).mean() + gamma * temperature**2 * rest.mean()
    assert nkd(S, T, Y, gamma, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_nkd_is_pinned() -> None:
    assert nkd(S, T, Y).item() == pytest.approx(4.2796846, rel=1e-5)


# WSLD.


def weights_of_wsld() -> Array:
    return np.asarray(1 - np.exp(-entropy_with_label(STUDENT) / (entropy_with_label(TEACHER) + 1e-7)))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_wsld_is_that_of_the_numpy_formula(temperature: float) -> None:
    cross = -(softmax(TEACHER, temperature) * np.log(softmax(STUDENT, temperature))).sum(axis=1)
    expected = temperature**2 * (weights_of_wsld() * cross).mean()
    assert wsld(S, T, Y, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_wsld_is_pinned() -> None:
    assert wsld(S, T, Y).item() == pytest.approx(17.905308, rel=1e-5)


def test_the_weights_of_wsld_are_constants_to_the_gradient() -> None:
    """d/dz of w T² CE(p, softmax(z / T)) is w T (q - p), over the batch."""
    student = torch.from_numpy(STUDENT).requires_grad_()
    wsld(student, torch.from_numpy(TEACHER), Y, 2.0).backward()
    expected = weights_of_wsld()[:, None] * 2.0 * (softmax(STUDENT, 2.0) - softmax(TEACHER, 2.0)) / 6
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-6)


# DIST.


def dist_in_numpy(student: Array, teacher: Array, beta: float, gamma: float, temperature: float) -> float:
    p, q = softmax(student, temperature), softmax(teacher, temperature)
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return float(temperature**2 * (beta * rows + gamma * columns))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (2.0, 0.5), (0.0, 1.0)])
def test_dist_is_that_of_the_numpy_formula(beta: float, gamma: float, temperature: float) -> None:
    expected = dist_in_numpy(STUDENT, TEACHER, beta, gamma, temperature)
    assert dist(S, T, beta, gamma, temperature).item() == pytest.approx(expected, rel=2e-5)


def test_dist_of_its_example_and_the_pinned_case() -> None:
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    assert dist_in_numpy(logits, logits[::-1], 1.0, 1.0, 1.0) == pytest.approx(3.3355, abs=1e-3)
    assert dist(S, T).item() == pytest.approx(1.5901649, rel=1e-5)


def test_dist_is_zero_at_identity_and_largest_where_the_classes_are_turned_round() -> None:
    """A published version adds the class part's correlation, so that the same features cost 1 and opposite ones -1."""
    assert dist(S, S).item() == pytest.approx(0, abs=1e-4)
    assert dist(S, S, beta=0.0).item() == pytest.approx(0, abs=1e-4)
    two = tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    assert dist(two, two.flip(1)).item() == pytest.approx(4, abs=1e-4)  # correlation -1 in rows and in columns


def test_dist_of_one_sample_is_finite() -> None:
    student = S[:1].clone().requires_grad_()
    dist(student, T[:1]).backward()
    assert student.grad is not None and student.grad.isfinite().all()


# MLKD.


def mlkd_in_numpy(student: Array, teacher: Array, temperatures: list[float], keep: float | None) -> float:
    samples = classes = 1.0
    if keep is not None:
        p = softmax(teacher)
        samples = float(np.mean(p.max(1) <= np.percentile(p.max(1), 100 * keep)))
        classes = float(np.mean(p.sum(0) <= np.percentile(p.sum(0), 100 * keep)))
    total = 0.0
    for t in temperatures:
        p, q = softmax(student, t), softmax(teacher, t)
        total += samples * t**2 * float(kl(q, p).mean())
        total += classes * float(((q.T @ q - p.T @ p) ** 2).sum()) / p.shape[1]
        total += samples * float(((q @ q.T - p @ p.T) ** 2).sum()) / p.shape[0]
    return total


@pytest.mark.parametrize("keep", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperatures", [[4.0], [2.0, 3.0, 4.0, 5.0, 6.0]])
def test_mlkd_is_that_of_the_numpy_formula(temperatures: list[float], keep: float | None) -> None:
    expected = mlkd_in_numpy(STUDENT, TEACHER, temperatures, keep)
    assert mlkd(S, T, temperatures, keep).item() == pytest.approx(expected, rel=1e-5)


def test_mlkd_is_pinned() -> None:
    assert mlkd(S, T).item() == pytest.approx(8.0988091, rel=1e-5)


def test_each_temperature_of_mlkd_adds_its_class_part_for_the_views_it_is_given() -> None:
    """The published code reads another view at two of five temperatures, and drops one of its class parts."""
    temperatures = [2.0, 3.0, 4.0, 5.0, 6.0]
    assert_close(mlkd(S, T, temperatures, None), torch.stack([mlkd(S, T, [t], None) for t in temperatures]).sum())
    for t in temperatures:
        p, q = softmax(STUDENT, t), softmax(TEACHER, t)
        by_class, by_sample = ((q.T @ q - p.T @ p) ** 2).sum() / 5, ((q @ q.T - p @ p.T) ** 2).sum() / 6
        left = mlkd(S, T, [t], None) - soft_target_kl(S, T, t)
        assert left.item() == pytest.approx(by_class + by_sample, rel=1e-4) and by_class > 0.05 * left.item()


def test_mlkd_without_a_temperature_is_refused() -> None:
    with pytest.raises(InputError, match="mlkd has no temperature"):
        mlkd(S, T, [])


# What all refuse.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DKD(alpha=-1.0), "alpha is -1.0; it must be a finite number of 0 or more"),
        (lambda: DKD(beta=math.nan), "beta is nan"),
        (lambda: DKD(temperature=0.0), "temperature is 0.0"),
        (lambda: DKD(warmup=-1.0), "warmup is -1.0"),
        (lambda: NKD(gamma=math.inf), "gamma is inf"),
        (lambda: WSLD(temperature=-4.0), "temperature is -4.0"),
        (lambda: DIST(gamma=-0.5), "gamma is -0.5"),
        (lambda: MLKD(temperatures=[4.0, 0.0]), "temperature is 0.0"),
        (lambda: MLKD(keep=1.5), "keep is 1.5; it must be a finite number from 0 to 1"),
    ],
)
def test_a_number_out_of_range_is_refused_in_one_line(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(BadValue, match=words.replace(".", r"\.")) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", [dkd, nkd])
def test_one_class_has_no_others(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(InputError, match="no class beside the label"):
        loss(torch.zeros(2, 1), torch.zeros(2, 1), tensor([0, 0]))


@pytest.mark.parametrize("loss", [dkd, nkd, wsld])
@pytest.mark.parametrize("target", [torch.full((6,), 5), torch.full((6,), -1), torch.zeros(5, dtype=torch.long)])
def test_labels_that_do_not_fit_are_refused(loss: Callable[..., Tensor], target: Tensor) -> None:
    with pytest.raises(InputError, match=r"no class of the student's 5|need 6 class indices"):
        loss(S, T, target)
