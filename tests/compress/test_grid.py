"""The values of integers: nearest is nearest, zeros stay, what is moved once is not moved again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd.compress.grid import affine, as_bytes, integers, nearest, passed, rows, steps


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [None, 16])
def test_each_weight_goes_to_the_nearest_value_of_its_row(bits: int, block: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 20)
    whole, step = integers(weight, bits, block)
    assert whole.abs().max() == 2 ** (bits - 1) - 1
    assert (rows(weight, block) - whole * step).abs().le(step / 2 * 1.0001).all()
    moved = nearest(weight, bits, block)
    assert torch.allclose(nearest(moved, bits, block), moved, rtol=1e-6)  # the steps are found again
    assert torch.equal(integers(moved, bits, block)[0], whole)
    assert moved.shape == weight.shape


def test_zeros_stay_and_a_row_of_them_has_a_step() -> None:
    weight = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert torch.equal(nearest(weight, 4) == 0, weight == 0) and steps(weight, 4)[0] == 1


def test_a_kernel_has_a_step_for_each_output() -> None:
    weight = torch.randn(4, 3, 2, 2)
    assert steps(weight, 8).shape == (4, 1) and nearest(weight, 8).shape == weight.shape


def test_the_gradient_of_a_moved_weight_is_the_weights_own() -> None:
    weight = torch.tensor([[1.0, 0.3]], requires_grad=True)
    moved = passed(weight, 4)
    assert torch.equal(moved.detach(), nearest(weight.detach(), 4))
    moved.mul(torch.tensor([[2.0, 5.0]])).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[2.0, 5.0]]


def test_bytes_are_those_of_onnx_with_a_gradient_inside_their_range() -> None:
    step, zero = affine(-1.0, 3.0)
    values = torch.linspace(-2, 5, 57, requires_grad=True)
    moved = as_bytes(values, step, zero)
    exact = values.detach().numpy()
    whole = np.clip(np.rint(exact / np.float32(step)) + zero, 0, 255)
    assert np.array_equal(moved.detach().numpy(), ((whole - zero) * np.float32(step)).astype(np.float32))
    moved.sum().backward()
    assert values.grad is not None
    inside = (exact >= -1.0) & (exact <= 3.0)
    assert np.array_equal(values.grad.numpy(), inside.astype(np.float32))


def test_a_range_holds_zero() -> None:
    assert affine(2.0, 510.0) == (2.0, 0) and affine(-255.0, -3.0) == (1.0, 255)
    assert affine(-1.0, 1.0)[1] in (127, 128)
