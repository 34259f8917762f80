"""Masks drop the share they are asked to, by the scores, and a pattern is what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd.compress.masks import bake, choose, choose_pattern, maskable, sparsity, zeros


def test_what_may_be_masked_is_matrices_and_kernels() -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 3), "norm": nn.BatchNorm2d(2), "rnn": nn.GRU(2, 2)})
    assert list(maskable(net)) == ["conv.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert list(maskable(net, keep=["rnn"])) == ["conv.weight"]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("amount", [0.0, 0.25, 0.5, 0.9])
def test_the_amount_goes_and_it_is_the_lowest_scores(scope: str, amount: float) -> None:
    torch.manual_seed(0)
    scores = {"a": torch.rand(20, 10), "b": 10 * torch.rand(40, 5, 1, 1)}
    masks = choose(scores, amount, scope)
    for one in masks.values() if scope == "layer" else [torch.cat([m.flatten() for m in masks.values()])]:
        assert int((~one).sum()) == round(amount * one.numel())
    for name, mask in masks.items():
        assert mask.shape == scores[name].shape
        if not mask.all() and mask.any():
            assert scores[name][~mask].max() <= scores[name][mask].min()


def test_equal_scores_are_dropped_by_position_and_never_too_many() -> None:
    assert choose({"a": torch.ones(4)}, 0.5)["a"].tolist() == [False, False, True, True]


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3, 3)])
def test_of_each_four_inputs_in_a_row_the_two_highest_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    score = torch.rand(shape)
    mask = choose_pattern(score, 2, 4)
    assert mask is not None and mask.shape == score.shape
    rows, kept = (t.movedim(1, -1).reshape(-1, 4) for t in (score, mask))
    assert (kept.sum(dim=1) == 2).all()
    assert (rows.masked_fill(~kept, 9).amin(dim=1) >= rows.masked_fill(kept, -9).amax(dim=1)).all()


def test_inputs_that_are_no_multiple_have_no_mask() -> None:
    assert choose_pattern(torch.rand(4, 6), 2, 4) is None


def test_baked_zeros_are_counted_and_found_again() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    masks = choose({name: value.abs() for name, value in maskable(net).items()}, 0.5)
    before = [p.detach().clone() for p in net.parameters()]
    bake(net, masks)
    assert sparsity(net) == (90, 90 - 40)
    assert all(mask.equal(masks[name]) for name, mask in zeros(net, list(masks)).items())
    assert net[0].weight.equal(before[0] * masks["0.weight"]) and net[0].bias.equal(before[1])
    assert zeros(net, ["gone.weight"]) == {}
