"""Transport between two batches of features: closed forms, all assignments tried, and maps that stretch nothing."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.transport import transport, transport_plan, unstretched, within_ball
from tests.losses.waves import tensors, wave

STUDENT, TEACHER = wave(6, 5), wave(6, 5, phase=1.0)
S, T = tensors(STUDENT, TEACHER)


def costs() -> torch.Tensor:
    ours, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (STUDENT, TEACHER))
    return torch.from_numpy(1 - ours @ theirs.T)


def test_the_plan_of_two_and_two_is_that_of_the_closed_form() -> None:
    """Half of [[p, 1 - p], [1 - p, p]] with (p / (1 - p))² = exp((c12 + c21 - c11 - c22) / r): one free number."""
    found = transport_plan(tensor([[0.1, 0.7], [0.4, 0.3]]), regularisation=0.2)
    p = 1 / (1 + math.exp(-(0.7 + 0.4 - 0.1 - 0.3) / 0.4))
    assert p == pytest.approx(0.85195280, rel=1e-7)
    assert_close(found, tensor([[p, 1 - p], [1 - p, p]]) / 2, atol=1e-6, rtol=0)


def test_a_batch_of_two_is_pinned() -> None:
    """Unit vectors at 0° and 90°, and at 30° and 120°: costs 1 - √3/2 twice, 1 - ½ and 1 + ½; r = ½."""
    angles = [torch.deg2rad(tensor([0.0, 90.0]) + turn) for turn in (0.0, 30.0)]
    ours, theirs = (torch.stack([a.cos(), a.sin()], dim=1) for a in angles)
    p = 1 / (1 + math.exp(-(1.5 + 0.5 - 2 * (1 - math.sqrt(3) / 2)) / (2 * 0.5)))
    expected = p * (1 - math.sqrt(3) / 2) + (1 - p) * (1.5 + 0.5) / 2
    assert expected == pytest.approx(0.26416025, rel=1e-7)
    assert transport(ours, theirs, regularisation=0.5).item() == pytest.approx(expected, rel=1e-5)


def test_rows_and_columns_weigh_the_same() -> None:
    plan = transport_plan(costs(), 0.2, rounds=500)
    assert_close(plan.sum(1), torch.full((6,), 1 / 6, dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64))
    wide = transport_plan(costs()[:3], 0.2, rounds=500)
    assert_close(wide.sum(1), torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(wide.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64))


def test_with_little_entropy_it_is_the_cheapest_of_all_assignments() -> None:
    cheapest = min(costs()[range(6), list(order)].mean().item() for order in permutations(range(6)))
    assert transport(S.double(), T.double(), 0.002, rounds=2000).item() == pytest.approx(cheapest, rel=1e-3)
    assert transport(S, T, 1e3).item() == pytest.approx(costs().mean().item(), rel=1e-3)  # and with much, of none


def test_whose_features_they_are_is_not_asked() -> None:
    assert_close(transport(S, T.flip(0)), transport(S, T))
    assert transport(S, S.flip(0), 0.002).item() == pytest.approx(0, abs=1e-5)


def test_the_gradient_is_that_of_the_costs_at_the_plan() -> None:
    ours = S.double().requires_grad_()
    plan = transport_plan(costs())
    (found,) = torch.autograd.grad(transport(ours, T.double()), ours)

    def at_the_plan(student: torch.Tensor) -> torch.Tensor:
        return (plan * (1 - torch.nn.functional.cosine_similarity(student[:, None], T.double()[None], dim=2))).sum()

    assert_close(found, torch.autograd.grad(at_the_plan(ours), ours)[0])
    assert torch.autograd.gradcheck(at_the_plan, [ours])


def test_where_the_plan_is_the_best_its_constancy_costs_the_gradient_nothing() -> None:
    ours, way = S.double().requires_grad_(), torch.from_numpy(wave(6, 5, phase=2.0, size=1.0))
    value = transport(ours, T.double(), 0.002, 2000)
    (found,) = torch.autograd.grad(value, ours)
    with torch.no_grad():
        ahead, behind = (transport(ours + h * way, T.double(), 0.002, 2000) for h in (1e-4, -1e-4))
    assert ((ahead - behind) / 2e-4).item() == pytest.approx((found * way).sum().item(), rel=1e-2)


def test_bfloat16_is_computed_in_single_precision() -> None:
    ours, theirs = S.bfloat16(), T.bfloat16()
    assert transport(ours, theirs).equal(transport(ours.float(), theirs.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert transport(S, T).equal(transport(S.clone(), T)) and transport(S, T).dtype == torch.float32


def test_what_is_no_cost_or_no_number_is_refused() -> None:
    for wrong in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 2).long()):
        with pytest.raises(InputError, match=r"costs are .*; floats of shape \(N, M\)"):
            transport_plan(wrong)
    with pytest.raises(InputError, match="bring both to one width"):
        transport(S, T[:, 1:])
    with pytest.raises(BadValue, match="regularisation is 0"):
        transport(S, T, regularisation=0)
    with pytest.raises(InputError, match="rounds"):
        transport(S, T, rounds=0)


def test_after_some_turns_the_layers_largest_singular_value_is_one_whatever_it_has_learned() -> None:
    torch.manual_seed(0)
    layer = unstretched(5, 4)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(7).add_(tensor([0.0, 1.0, 0.0, 3.0, 0.0]))  # type: ignore[union-attr,operator]
    for _ in range(30):
        layer(S)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-4)
    kept = layer.eval().weight.clone()
    layer(S)
    assert layer.weight.equal(kept)  # in evaluation nothing turns


def test_the_ball_moves_no_two_vectors_apart() -> None:
    vectors = torch.cat([S, S / 10, torch.zeros(1, 5)])
    placed = within_ball(vectors)
    assert placed.norm(dim=1).max() <= 1 + 1e-6 and placed[6:][vectors[6:].norm(dim=1) < 1].equal(
        vectors[6:][vectors[6:].norm(dim=1) < 1]
    )
    assert (torch.cdist(placed, placed) <= torch.cdist(vectors, vectors) + 1e-5).all()
