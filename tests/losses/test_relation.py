"""Losses on relations: pinned numbers, numpy formulas sample by sample, and mistakes that others published."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.relation import CC, CCRBF, RKD, Embedded, cc, cc_rbf, pkt, rkd, sp
from tests.losses.waves import Array, tensors, wave

STUDENT, TEACHER, WIDE = wave(5, 4, size=1.0), wave(5, 4, phase=1.0, size=1.0), wave(5, 7, phase=2.0, size=1.0)
S, T, W = tensors(STUDENT, TEACHER, WIDE)
PAIRS = [(STUDENT, TEACHER), (STUDENT, WIDE)]
both = pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=["one width", "two widths"])
ALL = [sp, cc, cc_rbf, rkd, pkt]


def found(loss: Callable[..., Tensor], *arrays: Array, **settings: float) -> float:
    return float(loss(*tensors(*arrays), **settings))


# Similarity-preserving.


@both
def test_sp_is_that_of_the_numpy_formula(student: Array, teacher: Array) -> None:
    ours, theirs = (x @ x.T / np.linalg.norm(x @ x.T, axis=1, keepdims=True) for x in (student, teacher))
    assert found(sp, student, teacher) == pytest.approx(((ours - theirs) ** 2).sum() / 25, rel=1e-5)


def test_sp_is_pinned() -> None:
    assert sp(S, T).item() == pytest.approx(0.0050996454, rel=1e-5)


def test_sp_normalises_rows_by_their_l2_norm_and_not_by_their_sum() -> None:
    # Rows (1, 0) against (1, 1): over L2 norms (1 - 0.7071)² + 0.7071² = 0.5858 a row; over sums ½ a row.
    assert_close(sp(torch.eye(2), torch.ones(2, 1)), tensor((2 - math.sqrt(2)) / 2))


def test_sp_of_maps_takes_all_of_a_sample_as_one_vector() -> None:
    assert_close(sp(S.reshape(5, 2, 2, 1), T), sp(S, T))


# Correlation congruence: the authors' form, and the kernel.


def test_cc_is_that_of_the_numpy_formula_and_pinned() -> None:
    apart = np.abs(STUDENT - TEACHER)
    expected = np.mean([apart[i] @ apart[i + 1] for i in range(4)])
    assert cc(S, T).item() == pytest.approx(expected, rel=1e-5) == pytest.approx(1.6045037, rel=1e-5)


def test_cc_of_two_widths_says_what_brings_them_to_one() -> None:
    with pytest.raises(InputError, match=r"width 4 \(student\) and 7 \(teacher\).*Embedded"):
        cc(S, W)


@both
@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (0.4, 1), (0.1, 4)])
def test_cc_rbf_is_that_of_the_numpy_formula(student: Array, teacher: Array, gamma: float, order: int) -> None:
    def kernel(x: Array, y: Array) -> float:
        return math.exp(-2 * gamma) * sum((2 * gamma * x @ y) ** p / math.factorial(p) for p in range(order + 1))

    squares = [
        (kernel(student[i], student[j]) - kernel(teacher[i], teacher[j])) ** 2 for i, j in product(range(5), repeat=2)
    ]
    assert found(cc_rbf, student, teacher, gamma=gamma, order=order) == pytest.approx(
        math.sqrt(sum(squares)) / 25, rel=1e-5
    )


def test_cc_rbf_is_pinned_and_its_kernel_nears_the_gaussian_of_unit_vectors() -> None:
    assert cc_rbf(S, T).item() == pytest.approx(0.040859081, rel=1e-5)
    unit = nn.functional.normalize(S.double())
    nothing = torch.zeros(5, 1, dtype=torch.float64)
    gaussian = (-0.4 * torch.cdist(unit, unit) ** 2).exp() - math.exp(-0.8)
    assert_close(cc_rbf(unit, nothing, 0.4, order=20), gaussian.norm() / 25)


# Relational.


def rkd_in_numpy(student: Array, teacher: Array) -> tuple[float, float]:
    """The two parts, pair by pair and triple by triple."""
    n = len(student)

    def distances(rows: Array) -> Array:
        d = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
        return np.asarray(d / (d.sum() / (n * n - n)))

    def cosine(rows: Array, i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        first, second = rows[j] - rows[i], rows[k] - rows[i]
        return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))

    def smooth(x: float) -> float:
        return x * x / 2 if abs(x) < 1 else abs(x) - 0.5

    gaps = distances(student) - distances(teacher)
    turns = [cosine(student, *at) - cosine(teacher, *at) for at in product(range(n), repeat=3)]
    return float(np.mean([smooth(x) for x in gaps.flat])), float(np.mean([smooth(x) for x in turns]))


@both
def test_rkd_is_that_of_the_numpy_formula(student: Array, teacher: Array) -> None:
    distance, angle = rkd_in_numpy(student, teacher)
    assert found(rkd, student, teacher, distance=1.0, angle=0.0) == pytest.approx(distance, rel=1e-5)
    assert found(rkd, student, teacher, distance=0.0, angle=1.0) == pytest.approx(angle, rel=1e-5)
    assert found(rkd, student, teacher) == pytest.approx(25 * distance + 50 * angle, rel=1e-5)


def test_rkd_is_pinned() -> None:
    assert rkd(S, T).item() == pytest.approx(0.057076292, rel=1e-5)


def test_rkd_of_a_part_at_weight_zero_is_the_other_alone() -> None:
    assert_close(rkd(S, T, 25.0, 0.0) + rkd(S, T, 0.0, 50.0), rkd(S, T))


# Probabilistic.


def pkt_in_numpy(student: Array, teacher: Array) -> float:
    def similar(rows: Array) -> Array:
        unit = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-7)
        cosines = (unit @ unit.T + 1) / 2
        return np.asarray(cosines / cosines.sum(axis=1, keepdims=True))

    p, q = similar(teacher), similar(student)
    return float((p * np.log((p + 1e-7) / (q + 1e-7))).mean())


@both
def test_pkt_is_that_of_the_numpy_formula(student: Array, teacher: Array) -> None:
    exact = pkt_in_numpy(student, teacher)
    assert pkt(*map(torch.from_numpy, (student, teacher))).item() == pytest.approx(exact, rel=1e-9)
    # A sum of logarithms of ratios near 1, which single precision holds to four digits and a processor's own fifth.
    assert found(pkt, student, teacher) == pytest.approx(exact, rel=1e-4)


def test_pkt_is_pinned() -> None:
    assert pkt(S.double(), T.double()).item() == pytest.approx(0.00049376483, rel=1e-5)


# All of them.


@pytest.mark.parametrize("loss", ALL)
def test_the_order_of_the_dimensions_is_no_relation_but_for_the_authors_cc(loss: Callable[..., Tensor]) -> None:
    turned = loss(S, T.flip(1))
    assert (loss is cc) == (not math.isclose(turned.item(), loss(S, T).item(), rel_tol=1e-4))


@pytest.mark.parametrize("loss", ALL)
def test_a_batch_of_one_has_no_relation_or_one_with_itself_and_is_finite(loss: Callable[..., Tensor]) -> None:
    student = S[:1].clone().requires_grad_()
    value = loss(student, T[:1])
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()
    assert loss is cc_rbf or value.item() == 0


@pytest.mark.parametrize("loss", ALL)
def test_samples_that_are_all_the_same_or_zero_give_a_finite_gradient(loss: Callable[..., Tensor]) -> None:
    for rows in (torch.ones(5, 4), torch.zeros(5, 4)):
        student = rows.clone().requires_grad_()
        loss(student, T).backward()
        assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL)
def test_half_precision_around_it_does_not_reach_its_products(loss: Callable[..., Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(S, T)
    assert inside.dtype is torch.float32 and inside.item() == pytest.approx(loss(S, T).item(), rel=1e-6)


# The embedding before a loss.


def test_an_embedding_brings_both_to_one_width_and_is_registered() -> None:
    torch.manual_seed(0)
    loss = Embedded(CC(), 3)
    assert not loss.state_dict()
    loss.bind((5, 2, 2, 1), (5, 7))
    assert set(loss.state_dict()) == {"student.weight", "student.bias", "teacher.weight", "teacher.bias"}
    assert loss.student is not None and loss.teacher is not None
    assert_close(loss(S.reshape(5, 2, 2, 1), W), cc(loss.student(S), loss.teacher(W)))
    loss(S, W).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    kept = loss.student
    loss.bind((9, 2, 2, 1), (9, 7))
    assert loss.student is kept


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (wave(5, 3), WIDE, "features are float32 of shape"),
        (STUDENT, wave(5, 6), "was bound to 7 of them a sample"),
    ],
)
def test_features_that_an_embedding_was_not_bound_to_are_refused(student: Array, teacher: Array, words: str) -> None:
    loss = Embedded(CC(), 3)
    with pytest.raises(InputError, match="call bind"):
        loss(*tensors(student, teacher))
    loss.bind((5, 4), (5, 7))
    with pytest.raises(InputError, match=words):
        loss(*tensors(student, teacher))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CCRBF(gamma=0.0), "gamma is 0.0"),
        (lambda: CCRBF(order=0), "order is 0; it must be a whole number of 1 or more"),
        (lambda: CCRBF(order=2.0), "order is 2.0"),
        (lambda: RKD(distance=-1.0), "distance is -1.0"),
        (lambda: RKD(angle=math.inf), "angle is inf"),
        (lambda: Embedded(CC(), 0), "width is 0; it must be a whole number of 1 or more"),
    ],
)
def test_a_number_out_of_range_is_refused_in_one_line(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(BadValue, match=words.replace(".", r"\.")) as caught:
        make()
    assert "\n" not in str(caught.value)
