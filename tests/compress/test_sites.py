"""Slots that go change nothing but what they gave; the tally says what is left; sites that are none are found."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kd.compress.measure import macs
from kd.compress.sites import Site, Tally, Touch, cut, drawn, exact, gathered, sound, zero


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4),
    ).eval()  # fmt: skip


def site(through: int = 16) -> Site:
    own = torch.arange(6)
    touches = [Touch("0", "out", own), Touch("1", "both", own), Touch("3", "both", own)]
    return Site("0", "channels", 6, [*touches, Touch("6", "in", own.repeat_interleave(through))])


def test_a_net_without_slots_gives_what_it_gives_with_them_at_0() -> None:
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    net, choice = drawn(chain(), images), {0: torch.tensor([1, 4])}
    narrow = cut(copy.deepcopy(net), [site()], choice)
    torch.testing.assert_close(narrow(images), zero(net, [site()], choice)(images))
    assert not torch.allclose(narrow(images), net(images))
    assert (narrow[0].out_channels, narrow[1].num_features, narrow[3].groups, narrow[6].in_features) == (4, 4, 4, 64)
    assert narrow[1].running_mean.equal(net[1].running_mean[[0, 2, 3, 5]])


def test_the_tally_is_what_the_narrow_net_costs() -> None:
    net, choice = chain(), {0: torch.tensor([0, 5, 2])}
    tally = Tally(net, (3, 8, 8), [site()])
    narrow = cut(copy.deepcopy(net), [site()], choice)
    assert tally.of({}) == {"macs": macs(net, (3, 8, 8)), "parameters": count(net), "channels": 6}
    assert tally.of(choice) == {"macs": macs(narrow, (3, 8, 8)), "parameters": count(narrow), "channels": 3}


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_a_site_that_is_not_what_it_says_is_found_and_the_others_stay() -> None:
    net = chain()
    wrong = site()
    wrong.touches[-1] = Touch("6", "in", torch.arange(6).repeat(16))  # channels do not come by turns there
    missing = site()
    missing.touches.pop(1)
    images = torch.rand(2, 3, 8, 8)
    assert sound(net, [wrong], images) == sound(net, [missing], images) == []
    assert sound(net, [site()], images) == [0]
    two = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2))
    first, second = (
        Site(at, "channels", 8, [Touch(at, "out", torch.arange(8)), Touch(to, "in", torch.arange(8))])
        for at, to in (("0", "2"), ("2", "4"))
    )
    assert sound(two, [first, second], torch.rand(2, 8)) == [0]  # a sigmoid gives 0.5 of nothing


def test_one_site_in_a_hundred_is_found() -> None:
    layers = [nn.Linear(4, 4) for _ in range(40)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    net = nn.Sequential(*layers)
    sites = [
        Site(str(i), "channels", 4, [Touch(str(i), "out", torch.arange(4)), Touch(str(i + 1), "in", torch.arange(4))])
        for i in range(39)
    ]
    sites[17].touches[1] = Touch("18", "in", torch.arange(4).flip(0))
    assert sound(net, sites, torch.rand(2, 4)) == [n for n in range(39) if n != 17]


def test_a_branch_that_zeros_hide_is_looked_into_all_the_same() -> None:
    net = chain()
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    nn.init.zeros_(net[3].bias)
    wrong = site()
    wrong.touches[-1] = Touch("6", "in", torch.arange(6).repeat(16))
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert exact(copy.deepcopy(net).double(), [wrong], {0: torch.tensor([1])}, images)
    assert sound(net, [wrong], images) == []


def test_indices_of_several_sites_on_one_layer_go_together() -> None:
    a = Site("a", "channels", 2, [Touch("c", "in", torch.tensor([0, 1, -1, -1]))])
    b = Site("b", "channels", 2, [Touch("c", "in", torch.tensor([-1, -1, 0, 1]))])
    found = gathered([a, b], {0: torch.tensor([1]), 1: torch.tensor([0])})
    assert found[("c", "in")].tolist() == [1, 2]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_grouped_convolution_loses_the_same_places_in_each_group(transposed: bool) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    net = nn.Sequential(nn.Conv2d(2, 8, 1), kind(8, 4, 3, groups=2))
    grouped = Site("0", "channels", 4, [Touch("0", "out", torch.arange(8) % 4), Touch("1", "in", torch.arange(8) % 4)])
    assert exact(net.double(), [grouped], {0: torch.tensor([2])}, torch.rand(2, 2, 6, 6, dtype=torch.float64))
    narrow = cut(net, [grouped], {0: torch.tensor([2])})
    assert narrow[1].in_channels == 6 and narrow[1].groups == 2
