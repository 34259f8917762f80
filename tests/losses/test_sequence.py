"""Divergences over tokens: pinned numbers, numpy formulas, limits, and mistakes that others published."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from kd.benching.memory import peak_bytes
from kd.losses import tokens
from kd.losses.checks import BadValue
from kd.losses.likeliest import TopKKL, top_k, top_k_kl
from kd.losses.logits import soft_target_kl
from kd.losses.sequence import (
    ForwardKL,
    GeneralisedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from tests.losses.waves import Array, kl, softmax, tensors, wave

STUDENT, TEACHER = wave(3, 4, 6), wave(3, 4, 6, phase=1.0)
S, T = tensors(STUDENT, TEACHER)
COUNTS = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]], dtype=bool)
MASK = torch.from_numpy(COUNTS)
LABELS = torch.where(MASK, 5, -100)


def mean(per_token: Array) -> float:
    return float(per_token[COUNTS].mean())


def jsd(s: Array, t: Array, beta: float) -> Array:
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


Formula = Callable[[Array, Array], Array]
FORMULAS: dict[str, tuple[Callable[..., Tensor], dict[str, float], int, Formula]] = {
    # function, its settings, the power of the temperature that it carries, and the formula of two distributions
    "forward": (forward_kl, {}, 2, lambda s, t: kl(t, s)),
    "reverse": (reverse_kl, {}, 2, lambda s, t: kl(s, t)),
    "symmetric": (symmetric_kl, {}, 2, lambda s, t: (kl(t, s) + kl(s, t)) / 2),
    "symmetric at 0.9": (symmetric_kl, {"balance": 0.9}, 2, lambda s, t: 0.1 * kl(t, s) + 0.9 * kl(s, t)),
    "jsd": (generalised_jsd, {}, 0, lambda s, t: jsd(s, t, 0.5)),
    "jsd at 0.1": (generalised_jsd, {"beta": 0.1}, 0, lambda s, t: jsd(s, t, 0.1)),
    "jsd at 0": (generalised_jsd, {"beta": 0.0}, 0, lambda s, t: kl(t, s)),
    "jsd at 1": (generalised_jsd, {"beta": 1.0}, 0, lambda s, t: kl(s, t)),
    "skew forward": (skew_forward_kl, {}, 2, lambda s, t: kl(t, 0.1 * t + 0.9 * s)),
    "skew forward at 0.5": (skew_forward_kl, {"skew": 0.5}, 2, lambda s, t: kl(t, (t + s) / 2)),
    "skew reverse": (skew_reverse_kl, {}, 2, lambda s, t: kl(s, 0.9 * t + 0.1 * s)),
    "total variation": (total_variation, {}, 0, lambda s, t: np.abs(t - s).sum(axis=-1) / 2),
}


@pytest.mark.parametrize("temperature", [1.0, 0.9, 2.0])
@pytest.mark.parametrize("name", FORMULAS)
def test_it_is_that_of_the_numpy_formula_over_the_tokens_that_count(name: str, temperature: float) -> None:
    loss, settings, power, formula = FORMULAS[name]
    expected = temperature**power * mean(formula(softmax(STUDENT, temperature), softmax(TEACHER, temperature)))
    for target in (LABELS, MASK):
        assert loss(S, T, target, temperature, **settings).item() == pytest.approx(expected, rel=1e-5)
    flat = S[MASK], T[MASK]
    assert loss(*flat, None, temperature, **settings).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "pinned"),
    [
        ("forward", 1.3621774),
        ("reverse", 1.4613748),
        ("symmetric", 1.4117761),
        ("jsd", 0.26418966),
        ("jsd at 0.1", 0.10713875),
        ("skew forward", 0.88238275),
        ("skew reverse", 0.89914049),
        ("total variation", 0.57963486),
    ],
)
def test_it_is_pinned(name: str, pinned: float) -> None:
    loss, settings, _, _ = FORMULAS[name]
    assert loss(S, T, LABELS, **settings).item() == pytest.approx(pinned, rel=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_it_is_zero_at_identity(name: str) -> None:
    """A published forward KL gives 2.0 for the same logits on both sides: it is the cross-entropy."""
    loss, settings, _, _ = FORMULAS[name]
    assert loss(S, S, LABELS, **settings).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_where_no_token_counts_it_is_zero_and_never_nan(name: str) -> None:
    loss, settings, _, _ = FORMULAS[name]
    student = S.clone().requires_grad_()
    value = loss(student, T, torch.zeros_like(MASK), **settings)
    value.backward()
    assert value.item() == 0 and student.grad is not None and student.grad.eq(0).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_class_that_one_side_bars_adds_nothing(name: str) -> None:
    loss, settings, _, formula = FORMULAS[name]
    student, teacher = S.clone(), T.clone()
    student[..., 0], teacher[..., :2] = -math.inf, -math.inf
    s, t = (softmax(np.where(np.isinf(z), -1e9, z)) for z in (student.numpy(), teacher.numpy()))
    expected = mean(formula(s[..., 2:], t[..., 2:]))
    student.requires_grad_()
    value = loss(student, teacher, LABELS, **settings)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert student.grad is not None and student.grad.isfinite().all()


def test_the_forward_kl_of_a_batch_is_the_kl_of_images() -> None:
    student, teacher = S[0], T[0]
    assert_close(forward_kl(student, teacher, torch.arange(4), 4.0), soft_target_kl(student, teacher, 4.0))


def test_the_divisor_is_the_number_of_tokens_and_not_of_logits() -> None:
    """Means over batch and classes are smaller by the vocabulary's size."""
    wider = (torch.cat([z, torch.full_like(z, -math.inf)], dim=-1) for z in (S, T))
    assert_close(forward_kl(*wider, LABELS), forward_kl(S, T, LABELS))


def test_beta_is_the_teachers_share() -> None:
    """With beta near 0 the mixture is the student: what is left of the sum is beta · KL(teacher ‖ student)."""
    student, teacher = S.double(), T.double()
    assert_close(generalised_jsd(student, teacher, beta=1e-6) / 1e-6, forward_kl(student, teacher), rtol=1e-3, atol=0)
    near_one = generalised_jsd(student, teacher, beta=1 - 1e-6) / 1e-6
    assert_close(near_one, reverse_kl(student, teacher), rtol=1e-3, atol=0)
    assert_close(generalised_jsd(student, teacher, beta=0.3), generalised_jsd(teacher, student, beta=0.7))


def test_at_the_ends_of_a_share_one_divergence_alone_is_computed() -> None:
    assert symmetric_kl(S, T, LABELS, balance=0.0).equal(forward_kl(S, T, LABELS))
    assert symmetric_kl(S, T, LABELS, balance=1.0).equal(reverse_kl(S, T, LABELS))
    assert skew_forward_kl(S, T, LABELS, skew=0.0).equal(forward_kl(S, T, LABELS))
    assert skew_reverse_kl(S, T, LABELS, skew=0.0).equal(reverse_kl(S, T, LABELS))
    assert generalised_jsd(S, T, LABELS, beta=0.0).equal(forward_kl(S, T, LABELS))
    assert generalised_jsd(S, T, LABELS, beta=1.0).equal(reverse_kl(S, T, LABELS))
    for loss in (skew_forward_kl, skew_reverse_kl):
        assert loss(S, T, LABELS, skew=1.0).item() == 0


@pytest.mark.parametrize("loss", [skew_forward_kl, skew_reverse_kl])
def test_a_skewed_kl_has_a_ceiling_where_the_plain_one_has_none(loss: Callable[..., Tensor]) -> None:
    apart = tensor([[500.0, 0.0]]), tensor([[0.0, 500.0]])
    assert loss(*apart).item() == pytest.approx(-math.log(0.1), rel=1e-6)
    assert forward_kl(*apart).item() == pytest.approx(500)


# What all refuse.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ForwardKL(temperature=0.0), "temperature is 0.0"),
        (lambda: ReverseKL(temperature=-1.0), "temperature is -1.0"),
        (lambda: SymmetricKL(balance=1.5), "balance is 1.5; it must be a finite number from 0 to 1"),
        (lambda: GeneralisedJSD(beta=-0.1), "beta is -0.1"),
        (lambda: SkewForwardKL(skew=1.1), "skew is 1.1"),
        (lambda: SkewReverseKL(skew=math.nan), "skew is nan"),
        (lambda: TotalVariation(temperature=math.inf), "temperature is inf"),
    ],
)
def test_a_number_out_of_range_is_refused_in_one_line(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(BadValue, match=words.replace(".", r"\.")) as caught:
        make()
    assert "\n" not in str(caught.value)


MODULES = (ForwardKL, ReverseKL, SymmetricKL, GeneralisedJSD, SkewForwardKL, SkewReverseKL, TotalVariation, TopKKL)
HELD = 12  # pieces in single precision that a loss may hold beside the gradient


def rows(tokens: int, classes: int, dtype: torch.dtype, phase: int = 0) -> Tensor:
    """Logits (8, tokens / 8, classes) that share their memory: each row is the one before, shifted by one."""
    numbers = 3 * torch.randn(tokens + classes + phase, generator=torch.Generator().manual_seed(0))
    return numbers.to(dtype)[phase:].unfold(0, classes, 1)[:tokens].view(8, tokens // 8, classes)


def beyond_the_inputs(loss: Callable[..., Tensor], student: Tensor, *others: Tensor) -> tuple[int, int]:
    """The most bytes that value and gradient hold beside logits and labels, and what a gradient alone needs."""
    leaf = student.detach().requires_grad_()
    peak = peak_bytes(lambda: loss(leaf, *others).backward())
    assert leaf.grad is not None and leaf.grad.shape == student.shape and leaf.grad.dtype is student.dtype
    assert leaf.grad[-1, -1].abs().sum() > 0
    return peak, leaf.grad.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODULES)
def test_beside_the_gradient_a_loss_holds_a_few_pieces(
    kind: type[nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PIECE", 2**12)
    target = torch.arange(1024).view(8, 128)
    peak, gradient = beyond_the_inputs(kind(), rows(1024, 500, dtype), rows(1024, 500, dtype, 7), target)
    kept = target.numel() * (1 + 64 * 12)  # the mask, and top_k's numbers and indices
    assert gradient < peak < gradient + HELD * 2**12 * 4 + kept


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODULES)
def test_the_logits_of_gpt2_need_less_than_four_gigabytes_beside_them(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    student, teacher = rows(8192, 50257, dtype), rows(8192, 50257, dtype, 77)
    peak, gradient = beyond_the_inputs(kind(), student, teacher, torch.zeros(8, 1024, dtype=torch.long))
    assert gradient == 8 * 1024 * 50257 * dtype.itemsize
    assert peak < gradient + HELD * tokens.PIECE * 4 < 4 * 2**30
    if dtype is torch.bfloat16:  # with the logits of both, too; in single precision these alone are 3.07 GiB
        assert peak + 2 * gradient < 4 * 2**30


@pytest.mark.slow
def test_with_a_stored_top_of_the_teacher_all_fits_into_four_gigabytes_in_single_precision() -> None:
    student = rows(8192, 50257, torch.float32)
    values, indices = top_k(rows(8192, 50257, torch.bfloat16, 77), 64)
    peak, gradient = beyond_the_inputs(lambda s: top_k_kl(s, values, indices), student)
    assert gradient + values.nbytes + indices.nbytes + peak < 4 * 2**30
