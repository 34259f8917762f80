"""ONE's sum over branches and ensemble, by hand, and who learns from whom."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.logits import soft_target_kl
from kd.losses.native import ONE, one, sigmoid_rise

TARGET = torch.tensor([0, 1, 2, 0])
BRANCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
TOGETHER = torch.randn(4, 3, generator=torch.Generator().manual_seed(9))


def test_by_hand() -> None:
    # Two branches at (0, 0), label 0: CE ln 2 each. The ensemble at (ln 9, 0): CE ln(10/9); at T 2 it is (3/4, 1/4),
    # and the KL from it to halves ln 2 - H(1/4), times T² = 4.
    together = torch.tensor([[math.log(9.0), 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = 2 * (math.log(2) + 4 * (math.log(2) - entropy)) + math.log(10 / 9)
    found = one([torch.zeros(1, 2)] * 2, together, torch.tensor([0]), temperature=2.0)
    assert_close(found, torch.tensor(expected))
    assert expected == pytest.approx(2.5382, abs=1e-4)


def test_the_parts_add_up() -> None:
    expected = F.cross_entropy(TOGETHER, TARGET)
    for branch in BRANCHES:
        expected = expected + F.cross_entropy(branch, TARGET) + 0.25 * soft_target_kl(branch, TOGETHER, 3.0)
    assert_close(one(BRANCHES, TOGETHER, TARGET, 3.0, 0.25), expected)


def test_the_ensemble_learns_from_the_label_alone_and_each_branch_from_both() -> None:
    together, branches = TOGETHER.clone().requires_grad_(), [b.clone().requires_grad_() for b in BRANCHES]
    ONE()(student=branches, feature=together, target=TARGET).backward()
    assert_close(together.grad, (TOGETHER.softmax(1) - F.one_hot(TARGET, 3)) / 4)
    for branch in branches:
        label = (branch.detach().softmax(1) - F.one_hot(TARGET, 3)) / 4
        heard = 3.0 * ((branch.detach() / 3).softmax(1) - (TOGETHER / 3).softmax(1)) / 4
        assert_close(branch.grad, label + heard)


def test_the_ramp_is_a_function_of_the_epoch() -> None:
    loss = ONE(rampup=4)
    assert loss.share == sigmoid_rise(0, 4) == pytest.approx(math.exp(-5))
    loss.at(2.9, 300)
    assert loss.share == pytest.approx(math.exp(-5 / 4))
    loss.at(4, 300)
    assert loss.share == 1 and ONE().share == 1


@pytest.mark.parametrize(("settings", "said"), [({"temperature": 0}, "temperature"), ({"rampup": -1}, "rampup")])
def test_numbers_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ONE(**settings)


def test_it_is_used_on_the_branches_that_it_was_bound_to() -> None:
    loss = ONE()
    with pytest.raises(InputError, match="one needs two branches or more, and is given 1"):
        loss.bind([(4, 3)], (4, 3))
    loss.bind([(4, 3)] * 3, (4, 3))
    with pytest.raises(InputError, match="one was bound to 3 branches and is given 2"):
        loss(student=BRANCHES[:2], feature=TOGETHER, target=TARGET)
