"""Mixtures of teachers, their weights and draws, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.logits import soft_target_kl
from kd.losses.mixing import (
    confidence_weights,
    cross_entropy_weights,
    drawn,
    mean_logits,
    mixture,
)

SURE, UNSURE = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)  # (0.75, 0.25) and (0.5, 0.5)


def logits(*shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_mean_logits_is_the_geometric_mean_of_the_distributions() -> None:
    found = mean_logits([SURE, UNSURE]).softmax(dim=1)
    # sqrt(0.75 * 0.5) : sqrt(0.25 * 0.5) is sqrt(3) : 1
    assert_close(found, torch.tensor([[math.sqrt(3) / (1 + math.sqrt(3)), 1 / (1 + math.sqrt(3))]]))


def test_a_mixture_is_the_arithmetic_mean_at_temperature_one() -> None:
    assert_close(mixture([SURE, UNSURE]).exp(), torch.tensor([[0.625, 0.375]]))


def test_a_loss_at_the_temperature_of_the_mixture_sees_exactly_the_mean_of_softened_distributions() -> None:
    teachers = list(logits(3, 8, 5))
    for temperature in (0.5, 1.0, 4.0):
        seen = (mixture(teachers, temperature=temperature) / temperature).softmax(dim=1)
        meant = torch.stack([(z / temperature).softmax(dim=1) for z in teachers]).mean(dim=0)
        assert_close(seen, meant, rtol=0, atol=1e-12)


def test_one_teacher_is_its_own_mixture() -> None:
    (teacher,) = logits(1, 8, 5)
    assert_close((mixture([teacher], temperature=4.0) / 4).softmax(dim=1), (teacher / 4).softmax(dim=1))


@pytest.mark.parametrize("each", [False, True], ids=["fixed", "by sample"])
def test_the_kl_against_a_mixture_pulls_as_the_weighted_sum_of_kls(each: bool) -> None:
    teachers, temperature = list(logits(3, 8, 5)), 4.0
    shape = (3, 8) if each else (3,)
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights / weights.sum(dim=0)
    student = torch.linspace(-2, 2, 40, dtype=torch.float64).reshape(8, 5).requires_grad_()
    (mixed,) = torch.autograd.grad(
        soft_target_kl(student, mixture(teachers, weights, temperature), temperature), student
    )
    rows = weights.expand(8, 3).T if not each else weights
    total = sum(
        rows[k, n] * soft_target_kl(student[n : n + 1], teachers[k][n : n + 1], temperature) / 8
        for k in range(3)
        for n in range(8)
    )
    assert isinstance(total, Tensor)
    (summed,) = torch.autograd.grad(total, student)
    assert_close(mixed, summed, rtol=0, atol=1e-12)


def test_a_teacher_of_weight_zero_is_not_heard() -> None:
    assert_close(mixture([SURE, UNSURE], torch.tensor([1.0, 0.0])), SURE.log_softmax(dim=1))


def test_confidence_weights_by_hand() -> None:
    # Entropies 0.562335 and 0.693147: their shares of the sum are 0.447904 and 0.552096, which change places.
    assert_close(confidence_weights([SURE, UNSURE]), torch.tensor([[0.552096], [0.447904]]), atol=1e-6, rtol=0)
    # Of three, with ln 2 twice: shares 0.288580, 0.355710, 0.355710; (1 - share) / 2.
    found = confidence_weights([SURE, UNSURE, UNSURE])
    assert_close(found, torch.tensor([[0.355710], [0.322145], [0.322145]]), atol=1e-5, rtol=0)


def test_teachers_without_doubt_weigh_the_same() -> None:
    certain = torch.tensor([[2000.0, 0.0]])
    assert confidence_weights([certain, certain.flip(1)]).tolist() == [[0.5], [0.5]]
    assert confidence_weights([UNSURE]).tolist() == [[1.0]]
    hidden = torch.tensor([[0.0, -math.inf]])
    assert confidence_weights([hidden, UNSURE]).tolist() == [[1.0], [0.0]]


def test_cross_entropy_weights_by_hand() -> None:
    # Cross-entropies -ln 0.75 and ln 2; their softmax is 4/3 : 2, that is 0.4 and 0.6; the rest is 0.6 and 0.4.
    assert_close(cross_entropy_weights([SURE, UNSURE], torch.tensor([0])), torch.tensor([[0.6], [0.4]]))
    # At the other label they are 2 ln 2 and ln 2: 4 : 2.
    assert_close(cross_entropy_weights([SURE, UNSURE], torch.tensor([1])), torch.tensor([[1 / 3], [2 / 3]]))
    assert cross_entropy_weights([SURE], torch.tensor([0])).tolist() == [[1.0]]


@pytest.mark.parametrize("weigh", [confidence_weights, lambda z: cross_entropy_weights(z, torch.arange(8) % 5)])
def test_weights_add_up_to_one(weigh: object) -> None:
    assert callable(weigh)
    assert_close(weigh(list(logits(4, 8, 5))).sum(dim=0), torch.ones(8, dtype=torch.float64))


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    places = [step / 7 for step in range(300)]
    first = [drawn(0, place, 3, 1) for place in places]
    assert first == [drawn(0, place, 3, 1) for place in places] != [drawn(1, place, 3, 1) for place in places]
    counts = [sum(one == [k] for one in first) for k in range(3)]
    assert all(70 < count < 130 for count in counts), counts
    assert all(len(set(drawn(0, place, 4, 3))) == 3 for place in places)
    assert drawn(0, 0.5, 3, 3) == [0, 1, 2]
    assert drawn(0, 1, 3, 1) == drawn(0, 1.0, 3, 1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mixture([]), "there is no teacher to hear"),
        (lambda: mean_logits([SURE, torch.zeros(1, 3)]), "of shapes (1, 2) and (1, 3)"),
        (lambda: mixture([SURE, UNSURE], torch.ones(3)), "weights of shape (3,) meet 2 teachers"),
        (lambda: mixture([SURE], temperature=0), "temperature is 0"),
        (lambda: cross_entropy_weights([SURE], torch.tensor([2])), "a label is no class"),
    ],
)
def test_what_is_no_mixture_is_refused(call: object, said: str) -> None:
    assert callable(call)
    with pytest.raises(InputError) as refused:
        call()
    assert said in str(refused.value)
