"""KDCL's four targets, against values worked out by hand and against a plain search."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.collaborative import (
    General,
    Linear,
    MinLogit,
    Naive,
    best_logits,
    generalisation_weights,
    linear_logits,
    min_logits,
)
from kd.losses.feature import Hint
from kd.losses.logits import SoftTargetKL
from kd.losses.response import DKD

WAYS = (Naive, Linear, MinLogit, General)


@pytest.fixture
def circle() -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    nets = [3 * torch.randn(6, 5, generator=generator) for _ in range(3)]
    return nets, torch.randint(0, 5, (6,), generator=generator)


def test_the_best_net_is_chosen_sample_by_sample() -> None:
    one, other = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert_close(best_logits([one, other], torch.tensor([0, 1])), torch.stack([one[0], other[1]]))


def test_two_nets_are_combined_where_the_slope_is_zero() -> None:
    # With label 0 at 0: a(1, 0) + (1 - a)(0, 2) against it; e^a = 2 e^(2 - 2a), so a = (2 + ln 2) / 3.
    nets = [torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0]])]
    share = (2 + torch.log(torch.tensor(2.0))) / 3
    expected = torch.stack([torch.tensor(0.0), share, 2 * (1 - share)])[None]
    assert_close(linear_logits(nets, torch.tensor([0])), expected, atol=1e-5, rtol=0)


def test_no_combination_on_a_grid_beats_the_linear_one(circle: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    nets, target = circle
    ours = F.cross_entropy(linear_logits(nets, target), target, reduction="none")
    every = torch.stack(nets)
    steps = [(i / 40, j / 40, (40 - i - j) / 40) for i in range(41) for j in range(41 - i)]
    grid = torch.stack(
        [F.cross_entropy((torch.tensor(w)[:, None, None] * every).sum(0), target, reduction="none") for w in steps]
    )
    assert (ours <= grid.amin(dim=0) + 2e-3).all()
    assert (ours <= F.cross_entropy(best_logits(nets, target), target, reduction="none") + 1e-5).all()


def test_the_smallest_logit_against_the_label_is_taken() -> None:
    nets = [torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[2.0, 1.0, -4.0]])]
    assert_close(min_logits(nets, torch.tensor([0])), torch.tensor([[0.0, -2.0, -6.0]]))


def test_weights_are_those_of_the_least_squared_error() -> None:
    # Errors of two nets on two classes, label 0: (-a, a). Net one errs 0.1 and 0.5, net two 0.4 and 0.1.
    def logits(wrong: list[float]) -> torch.Tensor:
        return torch.tensor([[1 - p, p] for p in wrong]).log()

    # C = [[0.26, 0.09], [0.09, 0.17]]: weights to 0.08 and 0.17, of 0.25; the ridge moves them by a thousandth.
    found = generalisation_weights([logits([0.1, 0.5]), logits([0.4, 0.1])], torch.tensor([0, 0]))
    assert_close(found, torch.tensor([0.32, 0.68]), atol=1e-3, rtol=0)


def test_a_weight_below_zero_is_none_and_equal_nets_share() -> None:
    good, worse = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.zeros(2, 2)
    assert_close(generalisation_weights([good, worse], torch.tensor([0, 0])), torch.tensor([1.0, 0.0]))
    assert_close(generalisation_weights([good, good], torch.tensor([0, 0])), torch.tensor([0.5, 0.5]))


def test_general_weighs_alike_until_it_has_judged_and_keeps_what_it_found(
    circle: tuple[list[torch.Tensor], torch.Tensor],
) -> None:
    nets, target = circle
    loss = General(SoftTargetKL(2.0))
    loss.bind((6, 5), [(6, 5)] * 3)
    before = loss(student=nets[0], teacher=nets)
    loss.judge(nets, target)
    after = loss(student=nets[0], teacher=nets)
    assert not torch.equal(before, after)
    other = General(SoftTargetKL(2.0))
    other.bind((6, 5), [(6, 5)] * 3)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(student=nets[0], teacher=nets), after)


@pytest.mark.parametrize("way", WAYS)
def test_each_moves_the_student_and_is_finite_in_half_precision(way: type, circle) -> None:
    nets, target = circle
    loss = way(SoftTargetKL(4.0))
    if way is General:
        loss.bind((6, 5), [(6, 5)] * 3)
    student = nets[0].clone().requires_grad_()
    given = {} if way is General else {"target": target}
    value = loss(student=student, teacher=[student.detach(), *nets[1:]], **given)
    value.backward()
    assert torch.isfinite(value) and student.grad is not None and student.grad.abs().sum() > 0
    half = loss(student=nets[0].bfloat16(), teacher=[net.bfloat16() for net in nets], **given)
    assert_close(half.float(), value.detach(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_inside_is_bound_and_told_where_training_stands(way: type, circle) -> None:
    nets, target = circle
    loss = way(Hint())
    loss.bind((6, 5), [(6, 5)] * 3)
    assert loss.loss.projection is not None
    assert loss(student=nets[0], teacher=nets, **({} if way is General else {"target": target})) > 0
    told = way(DKD(warmup=20))
    told.at(4.5, 240)
    assert told.loss.factor == 0.25


@pytest.mark.parametrize("way", WAYS)
def test_nets_of_other_classes_are_refused(way: type) -> None:
    loss = way(SoftTargetKL(1.0))
    if way is General:
        loss.bind((2, 3), [(2, 3), (2, 3)])
    given = {} if way is General else {"target": torch.tensor([0, 1])}
    with pytest.raises(InputError, match="classes"):
        loss(student=torch.zeros(2, 3), teacher=[torch.zeros(2, 3), torch.zeros(2, 4)], **given)


def test_general_refuses_nets_that_were_not_bound() -> None:
    with pytest.raises(InputError, match="2 nets are heard; call bind"):
        General(SoftTargetKL(1.0))(student=torch.zeros(2, 3), teacher=[torch.zeros(2, 3)] * 2)
