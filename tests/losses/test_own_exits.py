"""BYOT's sum over the exits, by hand, and who learns from it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.logits import soft_target_kl
from kd.losses.own_exits import BYOT, byot

GENERATOR = torch.Generator().manual_seed(0)
MAPS = [torch.rand(4, 6, 8, 8, generator=GENERATOR), torch.rand(4, 8, 4, 4, generator=GENERATOR),
        torch.rand(4, 10, 2, 2, generator=GENERATOR)]  # fmt: skip
LOGITS, TARGET = torch.randn(4, 5, generator=GENERATOR), torch.tensor([0, 1, 2, 3])


def bound(**settings: float) -> BYOT:
    torch.manual_seed(0)
    loss = BYOT(**settings)
    loss.bind([tuple(m.shape) for m in MAPS], (4, 5))
    return loss


def test_by_hand() -> None:
    # Exits at (0, 0), the end at (ln 3, 0) and T 1: CE ln 2; KL of (3/4, 1/4) from halves: ln 2 - H(1/4).
    end = torch.tensor([[math.log(3.0), 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    one = 0.9 * math.log(2) + 0.1 * (math.log(2) - entropy)
    found = byot([torch.zeros(1, 2)] * 2, end, torch.tensor([0]), alpha=0.1, temperature=1.0)
    assert_close(found, torch.tensor(2 * one))


def test_the_module_is_the_sum_of_its_exits_and_their_distances() -> None:
    loss = bound(alpha=0.3, temperature=2.0, features=0.5).eval()
    expected = torch.zeros(())
    for head, maps in zip(loss.heads, MAPS, strict=False):
        vector = head.body(maps).mean((2, 3))
        logits = head.classifier(vector)
        expected = expected + 0.7 * F.cross_entropy(logits, TARGET) + 0.3 * soft_target_kl(logits, LOGITS, 2.0)
        expected = expected + 0.25 * (vector - MAPS[-1].mean((2, 3))).square().sum()
    assert_close(loss(student=MAPS, feature=LOGITS, target=TARGET), expected)


def test_the_end_is_a_constant_and_the_shallow_layers_learn() -> None:
    loss = bound(features=1.0)
    logits, maps = LOGITS.clone().requires_grad_(), [m.clone().requires_grad_() for m in MAPS]
    loss(student=maps, feature=logits, target=TARGET).backward()
    assert logits.grad is None and maps[-1].grad is None
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in maps[:-1])
    assert all(p.grad is not None for p in loss.parameters())


def test_half_precision_is_finite_and_near() -> None:
    loss = bound().eval()
    whole = loss(student=MAPS, feature=LOGITS, target=TARGET)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(student=[m.bfloat16() for m in MAPS], feature=LOGITS.bfloat16(), target=TARGET)
    assert_close(half.float(), whole, rtol=0.02, atol=0)


def test_the_gradient_is_right_in_double_precision() -> None:
    loss = bound().double().eval()
    first = MAPS[1].double().requires_grad_()

    def value(maps: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = loss(
            student=[MAPS[0].double(), maps, MAPS[2].double()], feature=LOGITS.double(), target=TARGET
        )
        return found

    assert torch.autograd.gradcheck(value, (first,), fast_mode=True)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (([(4, 6, 8, 8)], (4, 5)), "two layers or more"),
        (([(4, 6), (4, 6, 2, 2)], (4, 5)), "that give maps"),
    ],
)
def test_layers_that_cannot_be_exits_are_refused(shapes, said) -> None:
    with pytest.raises(InputError, match=said):
        BYOT().bind(*shapes)


def test_other_layers_than_were_bound_are_refused() -> None:
    with pytest.raises(InputError, match="bound to 3 layers and is given 2"):
        bound()(student=MAPS[:2], feature=LOGITS, target=TARGET)
    with pytest.raises(InputError, match="call bind"):
        BYOT()(student=MAPS, feature=LOGITS, target=TARGET)
