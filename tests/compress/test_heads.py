"""Whole heads of attention go, exactly, the least important first."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from kd.compress.heads import head_sites
from kd.compress.measure import macs
from kd.compress.prune import find, prune, scored
from kd.compress.sites import Tally, cut, zero
from kd.compress.structure import rebuild


class SelfAttention(nn.Module):
    """As BERT's in transformers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, width // heads, width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        def split(layer: nn.Linear) -> Tensor:
            return layer(tokens).unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)

        mixed = nn.functional.scaled_dot_product_attention(*(split(m) for m in (self.query, self.key, self.value)))
        return mixed.transpose(1, 2).reshape(*tokens.shape[:2], self.all_head_size)


class Parted(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self = SelfAttention(width, heads)
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.output["dense"](self.self(tokens))
        return found


class Encoder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention = {
            "fused": lambda: Attention(16, num_heads=4, qkv_bias=True),
            "normed": lambda: Attention(16, num_heads=4, qk_norm=True, norm_layer=nn.LayerNorm),
            "parted": lambda: Parted(16, 4),
        }[kind]()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm(tokens))
        found: Tensor = self.head((tokens + self.fc2(nn.functional.gelu(self.fc1(self.norm(tokens))))).mean(dim=1))
        return found


def encoder(kind: str) -> Encoder:
    torch.manual_seed(0)
    return Encoder(kind).eval()


@pytest.mark.parametrize("kind", ["fused", "normed", "parted"])
def test_zeroed_or_removed_the_outputs_are_the_same(kind: str) -> None:
    net, inputs = encoder(kind), torch.randn(2, 5, 16)
    sites, whole = find(net, inputs, by="group_norm")
    assert {site.kind: site.slots for site in sites} == {"heads": 4, "channels": 24}
    assert "a LayerNorm mixes its channels" in whole.values()
    choice = {n: torch.arange(site.slots // 2) for n, site in enumerate(sites)}
    with torch.no_grad():
        expected, narrow = zero(net, sites, choice)(inputs), cut(copy.deepcopy(net), sites, choice)
        assert float((narrow(inputs) - expected).abs().max()) < 1e-6
    tally = Tally(net, (5, 16), sites).of(choice)
    assert tally["parameters"] == sum(p.numel() for p in narrow.parameters())
    assert tally["macs"] == macs(narrow, (5, 16))


@pytest.mark.parametrize("kind", ["fused", "parted"])
def test_a_net_of_fewer_heads_reloads(kind: str) -> None:
    net, inputs = encoder(kind), torch.randn(2, 5, 16)
    made = prune(net, inputs, amount=0.5)
    fresh = rebuild(encoder(kind), [made.change])
    fresh.load_state_dict(made.net.state_dict(), strict=True)
    assert fresh(inputs).equal(made.net(inputs))


@pytest.mark.parametrize("by", ["group_norm", "taylor"])
def test_a_head_that_does_nothing_goes_first(by: str) -> None:
    net, inputs = encoder("fused"), torch.randn(2, 5, 16)
    net.attention.qkv.weight.data.view(3, 4, 4, 16)[:, 2] *= 1e-3
    net.attention.proj.weight.data[:, 8:12] *= 1e-3
    named = dict(net.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(net(inputs).sum(), list(named.values())), strict=True))
    (site,), apart = head_sites(net, (5, 16))
    assert scored(net, site, by, gradients).scores.argmin() == 2 and apart == ["attention.qkv"]


def test_attention_of_torch_itself_is_named_and_stays_whole() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            entered = self.enter(tokens)
            found: Tensor = self.head(self.mix(entered, entered, entered, need_weights=False)[0])
            return found

    sites, whole = find(Net(), torch.randn(2, 5, 6))
    assert sites == [] and "enter" in whole
