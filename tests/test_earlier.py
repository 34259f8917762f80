"""What a student said of each sample before: recalled by row, its label where there is nothing yet, in the state."""

from __future__ import annotations

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from kd.earlier import Earlier
from kd.errors import InputError


def earlier(samples: int = 5) -> Earlier:
    made = Earlier()
    made.bind(samples, 3)
    return made


def test_what_was_kept_last_is_recalled_for_its_row_alone() -> None:
    made = earlier()
    first, second = tensor([[1.0, 2.0, 3.0]]), tensor([[0.5, 0.0, -9.0]])
    made.keep(tensor([4]), first)
    made.keep(tensor([2]), first)
    made.keep(tensor([2]), second)
    assert made.recall(tensor([2, 4]), tensor([0, 0])).equal(torch.cat([second, first]))


def test_for_a_sample_that_was_never_seen_stands_its_label_at_any_temperature() -> None:
    found = earlier().recall(tensor([1, 0]), tensor([2, 1]))
    for temperature in (1.0, 20.0):
        assert (found / temperature).softmax(1).equal(tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))


def test_it_is_in_the_state_and_no_gradient_reaches_it() -> None:
    made = earlier()
    assert not list(made.parameters()) and list(made.state_dict()) == ["said"] and not Earlier().state_dict()
    logits = torch.rand(2, 3, requires_grad=True)
    made.keep(tensor([0, 3]), logits)
    again = earlier()
    again.load_state_dict(made.state_dict(), strict=True)
    row = torch.arange(5)
    assert_close(again.recall(row, row % 3), made.recall(row, row % 3))
    assert not made.recall(row, row % 3).requires_grad


def test_half_precision_is_kept_in_single() -> None:
    made = earlier()
    made.keep(tensor([0]), tensor([[0.1, 0.2, 0.3]]).bfloat16())
    assert made.recall(tensor([0]), tensor([0])).dtype is torch.float32


def test_binding_again_forgets_nothing() -> None:
    made = earlier()
    made.keep(tensor([0]), tensor([[1.0, 2.0, 3.0]]))
    made.bind(5, 3)
    assert made.recall(tensor([0]), tensor([0])).tolist() == [[1.0, 2.0, 3.0]]


def test_before_it_knows_the_split_and_a_row_beyond_are_refused() -> None:
    with pytest.raises(InputError, match="call bind"):
        Earlier().recall(tensor([0]), tensor([0]))
    with pytest.raises(InputError, match="they go from 0 to 4"):
        earlier().recall(tensor([5]), tensor([0]))
