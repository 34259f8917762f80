"""Channels that go together are found, with what ties them: sums, concatenations, halves, shuffles, flattening."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kd.compress.channels import channel_sites
from kd.errors import InputError


def sites_of(net: nn.Module, *shape: int) -> tuple[dict[str, int], dict[str, str]]:
    found, whole = channel_sites(net, torch.randn(1, *shape))
    return {site.path: site.slots for site in found}, whole


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.after, self.head = nn.Conv2d(10, 5, 1), nn.Linear(5 * 4, 2)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.a(images) + self.b(images), self.c(images)], dim=1)
        found: Tensor = self.head(self.after(both.relu()).flatten(1))
        return found


def test_sums_tie_channels_and_concatenations_do_not() -> None:
    torch.manual_seed(0)
    net = Branches()
    found, whole = channel_sites(net, torch.randn(1, 3, 2, 2))
    slots = {site.path: site for site in found}
    tied = slots.get("a", slots.get("b"))
    assert sorted(site.slots for site in found) == [4, 5, 6]
    assert tied is not None and {t.path for t in tied.touches} == {"a", "b", "after"}
    assert next(t.owner for t in slots["c"].touches if t.path == "after").tolist() == [-1] * 4 + list(range(6))
    assert next(t.owner for t in slots["after"].touches if t.path == "head").tolist() == [i // 4 for i in range(20)]
    assert whole == {"head": "it makes the outputs"}


def test_a_grouped_convolution_ties_the_same_places_of_its_groups() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    found, _ = channel_sites(net, torch.randn(1, 3, 4, 4))
    sites = {site.path: site for site in found}
    assert sites["0"].slots == sites["2"].slots == 4 and sites["0"].sizes.tolist() == [2, 2, 2, 2]
    assert next(t.owner for t in sites["0"].touches if t.side == "in").tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_module_that_makes_half_of_its_channels_from_the_others_ties_both() -> None:
    class Ghost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cheap, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(8, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            half = self.first(images).relu()
            found: Tensor = self.head(torch.cat([half, self.cheap(half)], dim=1))
            return found

    found, _ = channel_sites(Ghost(), torch.randn(1, 3, 2, 2))
    assert [site.slots for site in found] == [4]
    assert next(t.owner for t in found[0].touches if t.path == "head").tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_shuffle_and_a_norm_over_channels_keep_them_whole_and_say_so() -> None:
    class Deal(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    net = nn.Sequential(nn.Conv2d(3, 8, 1), Deal(), nn.Conv2d(8, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 1))
    found, whole = sites_of(net, 3, 2, 2)
    assert found == {}
    assert whole == {
        "0": "a Deal deals its channels out anew", "2": "a GroupNorm mixes its channels", "4": "it makes the outputs",
    }  # fmt: skip


def test_a_net_that_cannot_be_traced_is_one_line() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            raise ValueError("first\nsecond")

    with pytest.raises((InputError, ValueError), match="first"):
        sites_of(Odd(), 3)


def test_nothing_of_the_net_is_changed() -> None:
    net = Branches().train()
    net.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sites_of(net, 3, 2, 2)
    assert net.training and not any(p.requires_grad for p in net.parameters())
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
