"""A value with known gradients: scaled by what comes, to those that ask, and to nothing beyond the first derivative."""

from __future__ import annotations

import pytest
import torch
from torch import tensor

from kd.losses.slopes import with_gradients


def test_each_tensor_that_asks_gets_its_own_gradient_times_what_comes() -> None:
    first, second = tensor([1.0, 2.0], requires_grad=True), tensor([[3.0]], requires_grad=True)
    silent = tensor([4.0])
    value = with_gradients(tensor(7.0), (first, tensor([5.0, 6.0])), (silent, tensor([0.0])), (second, tensor([[8.0]])))
    (value * 10).backward()
    assert value.item() == 7 and silent.grad is None
    assert first.grad is not None and first.grad.tolist() == [50, 60]
    assert second.grad is not None and second.grad.tolist() == [[80]]


def test_where_no_gradient_is_asked_for_it_is_the_value() -> None:
    value = tensor(7.0)
    found = with_gradients(value, (tensor([1.0]), tensor([5.0])))
    assert found == value and found is not value and not found.requires_grad


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x = tensor([1.0], requires_grad=True)
    weight = tensor(2.0, requires_grad=True)
    value = with_gradients(tensor(7.0), (x, tensor([5.0])))
    (slope,) = torch.autograd.grad(weight * value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
