"""One purse for all layers: spent to the budget, where it keeps most; prices are what the thin net costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.compress.lowrank import candidates, factorise
from kd.compress.measure import macs
from kd.compress.ranks import Offer, Prices, by_sensitivity, moments, offers, spend, uniform
from kd.compress.structure import replace
from kd.errors import InputError

SHAPE = (8, 9, 9)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 2)), nn.ReLU(),
        nn.Conv2d(12, 10, 1), nn.ReLU(), nn.Conv2d(10, 8, 3, padding="same"), nn.Flatten(), nn.Linear(8 * 45, 16),
        nn.ReLU(), nn.Linear(16, 3),
    ).eval()  # fmt: skip


def thinned(whole: nn.Module, layers: Any, chosen: dict[str, Any], roots: dict[str, Tensor] | None = None) -> nn.Module:
    made = copy.deepcopy(whole)
    for path, rank in chosen.items():
        if rank is not None:
            layer, form = layers[path]
            replace(made, path, factorise(layer, form, rank, (roots or {}).get(path)))
    return made


@pytest.mark.parametrize("of", ["parameters", "macs"])
@pytest.mark.parametrize("form", ["svd", "spatial", "tucker"])
def test_prices_are_what_the_thin_net_costs(form: str, of: str) -> None:
    whole = net()
    layers = candidates(whole, form, 8, ["8"])
    prices = Prices(whole, layers, of, SHAPE)
    chosen: dict[str, Any] = {}
    for path, (layer, how) in layers.items():
        chosen[path] = [3, 4] if how == "tucker" else 3
        assert prices(path, None) > 0 and layer is whole.get_submodule(path)
    made = thinned(whole, layers, chosen)
    cost = macs(made, SHAPE) if of == "macs" else sum(p.numel() for p in made.parameters())
    assert prices.rest + sum(prices(path, rank) for path, rank in chosen.items()) == cost
    assert prices.total == (macs(whole, SHAPE) if of == "macs" else sum(p.numel() for p in whole.parameters()))


@pytest.mark.parametrize("of", ["parameters", "macs"])
@pytest.mark.parametrize("form", ["svd", "spatial", "tucker"])
@pytest.mark.parametrize("budget", [0.45, 0.7])
def test_the_budget_is_kept_and_nearly_spent(form: str, of: str, budget: float) -> None:
    whole = net()
    layers = candidates(whole, form, 8, ["8"])
    prices = Prices(whole, layers, of, SHAPE)
    for chosen in (
        spend(offers(layers, prices), budget * prices.total - prices.rest),
        uniform(layers, prices, budget * prices.total - prices.rest),
    ):
        spent = prices.rest + sum(prices(path, rank) for path, rank in chosen.items())
        assert 0.75 * budget < spent / prices.total <= budget


def test_the_purse_goes_where_it_keeps_most() -> None:
    torch.manual_seed(0)
    low, full = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    low.weight.data = torch.randn(16, 2) @ torch.randn(2, 16)
    nn.init.orthogonal_(full.weight)
    whole = nn.Sequential(low, full)
    layers = candidates(whole, "svd", 8)
    prices = Prices(whole, layers, "parameters", (16,))
    assert spend(offers(layers, prices), 0.63 * prices.total) == {"0": 2, "1": None}
    equal = uniform(layers, prices, 0.63 * prices.total)
    inputs = torch.randn(64, 16)
    chosen = {"0": 2, "1": None}
    errors = [(thinned(whole, layers, ranks)(inputs) - whole(inputs)).pow(2).mean() for ranks in (chosen, equal)]
    assert errors[0] < 1e-6 < 0.1 < errors[1]


def test_a_dearer_offer_that_keeps_less_is_never_taken_and_a_convex_one_is_jumped_over() -> None:
    every = {"a": [Offer(1, 1, 0.1), Offer(2, 3, 0.05), Offer(3, 4, 0.2), Offer(None, 5, 1.0)]}
    assert [spend(every, goal)["a"] for goal in (1, 3.9, 4.9, 5)] == [1, 1, 3, None]


def test_a_budget_below_rank_1_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match="even rank 1 of every layer costs 3, and the budget leaves 2"):
        spend({"a": [Offer(1, 3, 0.5)]}, 2)
    whole = net()
    layers = candidates(whole, "svd", 8, ["8"])
    with pytest.raises(InputError, match="even rank 1"):
        uniform(layers, Prices(whole, layers, "parameters", SHAPE), 10)


def test_moments_are_of_what_the_weights_are_multiplied_with() -> None:
    whole = net()
    layers = candidates(whole, "svd", 8, ["8"])
    batches = [torch.randn(6, *SHAPE), torch.randn(5, *SHAPE)]
    roots = moments(whole, layers, batches)
    assert set(roots) == {"0", "2", "4", "6"}
    seen: dict[str, list[Tensor]] = {path: [] for path in layers}
    handles = [
        layer.register_forward_hook(lambda _, inputs, out, path=path: seen[path].append((inputs[0], out)))
        for path, (layer, _) in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            whole(batch)
    for handle in handles:
        handle.remove()
    for path, (layer, _) in layers.items():
        assert roots[path].tril().equal(roots[path])
        # E |W x|^2 = tr(W M W^T), but for what was added to the diagonal
        bias = layer.bias.detach()
        bias = bias.view(-1, 1, 1) if layer.weight.ndim > 2 else bias
        energy = sum(float(((out - bias) ** 2).sum()) for _, out in seen[path])
        count = sum(out.numel() // len(layer.bias) for _, out in seen[path])
        moment = roots[path] @ roots[path].T
        added = moment.diagonal().mean() * 0.01 / 1.01
        flat = layer.weight.detach().double().flatten(1)
        expected = torch.trace(flat @ (moment - added * torch.eye(len(moment))) @ flat.T) * count
        assert energy == pytest.approx(float(expected), rel=1e-4)


def test_a_layer_that_hears_nothing_has_no_moment() -> None:
    whole = nn.Sequential(nn.Linear(8, 8))
    assert moments(whole, candidates(whole, "svd", 8), [torch.zeros(2, 8)]) == {}


def test_looking_at_inputs_makes_the_same_rank_err_less() -> None:
    whole = net()
    layers = candidates(whole, "svd", 8, ["8"])
    batches = [torch.randn(64, 1, *SHAPE[1:]) * torch.logspace(0, -2, 8)[:, None, None]]
    roots = moments(whole, layers, batches)
    chosen = {path: 3 for path in layers}
    with torch.no_grad():
        plain, white = (
            float((thinned(whole, layers, chosen, r)(batches[0]) - whole(batches[0])).pow(2).mean())
            for r in ({}, roots)
        )
    assert white < 0.8 * plain


def test_sensitivity_is_the_rise_of_the_loss_and_leaves_the_net_alone() -> None:
    whole = net()
    layers = candidates(whole, "svd", 8, ["8"])
    prices = Prices(whole, layers, "parameters", SHAPE)
    before = copy.deepcopy(whole.state_dict())
    inputs = torch.randn(16, *SHAPE)
    with torch.no_grad():
        target = whole(inputs)

    def loss(candidate: nn.Module) -> float:
        with torch.no_grad():
            return float((candidate(inputs) - target).pow(2).mean())

    found = by_sensitivity(whole, layers, prices, loss)
    assert all(value.equal(before[name]) for name, value in whole.state_dict().items())
    for path, each in found.items():
        assert each[-1] == Offer(None, prices(path, None), 0.0)
        assert each[0].kept == pytest.approx(-loss(thinned(whole, layers, {path: each[0].rank})))
        assert sorted(each, key=lambda offer: offer.price) == each
    spent = spend(found, 0.5 * prices.total - prices.rest)
    assert prices.rest + sum(prices(path, rank) for path, rank in spent.items()) <= 0.5 * prices.total
