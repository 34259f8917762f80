"""The teacher's likeliest classes: what is kept, numpy formulas with and without a tail, masks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.likeliest import TopKKL, top_k, top_k_kl
from kd.losses.sequence import forward_kl
from tests.losses.waves import Array, kl, softmax, tensors, wave

STUDENT, TEACHER = wave(3, 4, 6), wave(3, 4, 6, phase=1.0)
S, T = tensors(STUDENT, TEACHER)
COUNTS = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]], dtype=bool)
MASK = torch.from_numpy(COUNTS)
LABELS = torch.where(MASK, 5, -100)


def mean(per_token: Array) -> float:
    return float(per_token[COUNTS].mean())


def test_the_top_of_a_teacher_is_its_log_probabilities_and_their_classes() -> None:
    values, indices = top_k(T, 2, 2.0)
    p = softmax(TEACHER, 2.0)
    np.testing.assert_array_equal(indices.numpy(), np.argsort(-p, axis=-1)[..., :2])
    np.testing.assert_allclose(values.exp().numpy(), np.sort(p, axis=-1)[..., :-3:-1], rtol=1e-5)
    assert top_k(T.bfloat16(), 2)[0].dtype is torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_kl_to_the_top_is_that_of_the_numpy_formula(k: int, tail: bool, temperature: float) -> None:
    s, t = softmax(STUDENT, temperature), softmax(TEACHER, temperature)
    top = np.argsort(-t, axis=-1)[..., :k]
    given, goal = (np.take_along_axis(x, top, axis=-1) for x in (s, t))
    if tail:
        given, goal = (np.concatenate([x, 1 - x.sum(axis=-1, keepdims=True)], axis=-1) for x in (given, goal))
    else:
        goal = goal / goal.sum(axis=-1, keepdims=True)
    found = top_k_kl(S, *top_k(T, k, temperature), LABELS, temperature, tail)
    assert found.item() == pytest.approx(temperature**2 * mean(kl(goal, given)), rel=2e-5)
    assert_close(TopKKL(k, temperature, tail)(S, T, LABELS), found)


def test_a_kl_to_the_top_two_is_pinned() -> None:
    assert top_k_kl(S, *top_k(T, 2), LABELS).item() == pytest.approx(1.386788, rel=1e-5)
    assert top_k_kl(S, *top_k(T, 2), LABELS, tail=True).item() == pytest.approx(1.167193, rel=1e-5)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("k", [6, 64])
def test_with_all_classes_known_it_is_the_forward_kl(k: int, tail: bool) -> None:
    assert_close(TopKKL(k, 2.0, tail)(S, T, LABELS), forward_kl(S, T, LABELS, 2.0))


def test_without_a_tail_it_is_the_forward_kl_to_a_teacher_that_bars_all_else() -> None:
    barred = T.masked_fill(T.topk(3, dim=-1).values[..., -1:] > T, -math.inf)
    assert_close(top_k_kl(S, *top_k(T, 3), LABELS), forward_kl(S, barred, LABELS))


@pytest.mark.parametrize("tail", [False, True])
def test_of_logits_that_a_mask_leaves_out_nothing_reaches_it(tail: bool) -> None:
    student = S.masked_fill(~MASK[..., None], math.nan).requires_grad_()
    value = TopKKL(2, tail=tail)(student, T, MASK)
    value.backward()
    assert_close(value, TopKKL(2, tail=tail)(S, T, MASK))
    assert student.grad is not None and student.grad.isfinite().all()
    assert TopKKL(2, tail=tail)(S, T, torch.zeros_like(MASK)).item() == 0


def test_a_sure_student_keeps_the_slope_of_its_tail() -> None:
    """1 less the probabilities at the top would be 0 in single precision, and what the student leaves has no slope."""
    student = tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    value = top_k_kl(student, tensor([[math.log(0.5)]]), tensor([[0]]), tail=True)
    value.backward()
    exact = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 40 - math.log(2))
    assert value.item() == pytest.approx(exact, rel=1e-5)
    assert_close(student.grad, tensor([[0.5, -0.25, -0.25]]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "indices"),
    [
        (torch.zeros(3, 4, 2), torch.zeros(3, 4, 1, dtype=torch.long)),
        (torch.zeros(3, 5, 2), torch.zeros(3, 5, 2, dtype=torch.long)),
        (torch.zeros(3, 4, 0), torch.zeros(3, 4, 0, dtype=torch.long)),
        (torch.zeros(3, 4, 2, dtype=torch.long), torch.zeros(3, 4, 2, dtype=torch.long)),
    ],
)
def test_a_top_that_does_not_fit_is_refused_in_one_line(values: Tensor, indices: Tensor) -> None:
    with pytest.raises(InputError, match="need k of both a token") as caught:
        top_k_kl(S, values, indices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TopKKL(k=0), "k is 0; it must be a whole number of 1 or more"),
        (lambda: TopKKL(k=2.0), "k is 2.0"),  # type: ignore[arg-type]
        (lambda: top_k(T, 7), "k is 7; there are 6 classes"),
    ],
)
def test_a_number_out_of_range_is_refused_in_one_line(make: Callable[[], object], words: str) -> None:
    with pytest.raises(BadValue, match=words.replace(".", r"\.")) as caught:
        make()
    assert "\n" not in str(caught.value)
