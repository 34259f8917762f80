"""Frozen means frozen: modes, gradients, state, copies."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kd.models.frozen import Frozen


def teacher() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 3))


class Owner(nn.Module):
    """As a trainer sees it: a student that learns, a teacher that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(3, 3)
        self.teacher = Frozen(teacher())


def test_it_stays_in_eval_mode_whatever_its_owner_does() -> None:
    owner = Owner().train()
    assert owner.student.training and not owner.teacher.training
    assert not any(module.training for module in owner.teacher.module.modules())


def test_batch_statistics_stay_as_they_were_and_outputs_repeat() -> None:
    frozen = Frozen(teacher())
    before = {name: value.clone() for name, value in frozen.module.state_dict().items()}
    frozen.train()
    images = torch.randn(8, 1, 8, 8) + 5
    assert frozen(images).equal(frozen(images))  # dropout is off
    assert all(value.equal(before[name]) for name, value in frozen.module.state_dict().items())


def test_nothing_of_it_asks_for_gradients() -> None:
    frozen = Frozen(teacher())
    images = torch.randn(2, 1, 8, 8, requires_grad=True)
    assert not frozen(images).requires_grad
    assert not any(parameter.requires_grad for parameter in frozen.module.parameters())


def test_a_feature_of_its_may_be_saved_for_backward() -> None:
    # Under inference_mode this is a RuntimeError.
    student = torch.randn(2, 3, requires_grad=True)
    nn.functional.mse_loss(student, Frozen(teacher())(torch.randn(2, 1, 8, 8))).backward()
    assert student.grad is not None


def test_its_owners_state_and_optimiser_hold_nothing_of_it() -> None:
    owner = Owner()
    assert set(owner.state_dict()) == {"student.weight", "student.bias"}
    assert len(list(owner.parameters())) == 2 and not list(owner.teacher.buffers())
    owner.load_state_dict(owner.state_dict(), strict=True)


def test_a_copy_is_a_frozen_net_of_its_own() -> None:
    owner = Owner()
    twin = copy.deepcopy(owner).train()
    images = torch.randn(2, 1, 8, 8)
    assert twin.teacher(images).equal(owner.teacher(images))
    assert twin.teacher.module is not owner.teacher.module and not twin.teacher.module.training
    with torch.no_grad():
        twin.teacher.module[4].weight.zero_()
    assert not twin.teacher(images).equal(owner.teacher(images))


def test_it_moves_with_its_owner() -> None:
    owner = Owner().to(torch.float64)
    found: Tensor = owner.teacher(torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    assert found.dtype is torch.float64
    assert all(p.device.type == "meta" for p in Owner().to("meta").teacher.module.parameters())


def test_where_gradients_go_through_they_reach_what_is_given_and_no_weight() -> None:
    part = Frozen(nn.Linear(3, 2), through=True).train()
    given = torch.rand(4, 3, requires_grad=True)
    part(given).sum().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0 and not part.module.training
    assert all(p.grad is None for p in part.module.parameters())
    assert not Frozen(nn.Linear(3, 2))(given).requires_grad
