"""The gaps of two matrices' products: the plain formulas, their gradients, and what is kept near identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kd.benching.memory import peak_bytes
from kd.losses.products import product_gaps
from tests.losses.waves import wave


def matrices(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    first, second = (torch.from_numpy(wave(rows, columns, phase=p)) for p in (0.0, 1.0))
    return first, second


def plain(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return (t @ t.T - s @ s.T).square().sum(), (t.T @ t - s.T @ s).square().sum()


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (1, 3), (3, 1)])
def test_both_gaps_are_those_of_the_plain_products(shape: tuple[int, int]) -> None:
    assert_close(product_gaps(*matrices(*shape)), plain(*matrices(*shape)))


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_the_gradient_on_either_is_that_of_the_value(shape: tuple[int, int]) -> None:
    inputs = [matrix.requires_grad_() for matrix in matrices(*shape)]
    assert torch.autograd.gradcheck(product_gaps, inputs)
    for side in (0, 1):
        grads = [
            torch.autograd.grad(2 * f(*inputs)[0] + 3 * f(*inputs)[1], inputs[side])[0] for f in (product_gaps, plain)
        ]
        assert_close(*grads)


def test_where_both_nearly_agree_single_precision_keeps_what_the_plain_products_lose() -> None:
    teacher = torch.full((16, 32), 1 / 32, dtype=torch.float64)
    student = teacher + 1e-7 * matrices(16, 32)[0]
    student, teacher = student.float(), teacher.float()
    exact = torch.stack(plain(student.double(), teacher.double()))
    assert_close(torch.stack(product_gaps(student, teacher)).double(), exact, rtol=1e-4, atol=0)
    assert ((torch.stack(plain(student, teacher)).double() - exact) / exact).abs().max() > 1e-3


def test_at_identity_value_and_gradient_are_zero_to_the_bit() -> None:
    student = matrices(4, 7)[0].float().requires_grad_()
    rows, columns = product_gaps(student, student.detach().clone())
    (rows + columns).backward()
    assert rows.item() == columns.item() == 0 and student.grad is not None and student.grad.eq(0).all()


def test_the_larger_product_is_not_made() -> None:
    student, teacher = (matrix.float() for matrix in matrices(4, 300))

    def step() -> None:
        sum(product_gaps(student.detach().requires_grad_(), teacher)).backward()

    assert peak_bytes(step) < 8 * student.nbytes < 300 * 300 * 4


def test_half_precision_around_it_does_not_reach_its_products() -> None:
    inputs = [matrix.float() for matrix in matrices(4, 7)]
    with torch.autocast("cpu", torch.bfloat16):
        assert product_gaps(*inputs)[0].equal(product_gaps(*inputs)[0].float())
        found = product_gaps(*inputs)
    assert_close(found, product_gaps(*inputs), rtol=0, atol=0)
