"""What is removed is what matters least, as much as was asked, and exactly: on each family of networks."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

import kd.models  # noqa: F401  (registers our networks)
from kd.compress.measure import macs
from kd.compress.prune import choose, find, prune
from kd.compress.sites import Site, Tally, Touch, cut, drawn, zero
from kd.compress.structure import rebuild
from kd.errors import InputError
from kd.models import create

FAST = ("cifar_resnet8", "cifar_vgg8", "cifar_shufflenetv2", "seed_cnn", "resnet10t", "mobilenetv3_small_050")
FAMILIES = (
    *("resnet18", "resnet50", "seresnext26d_32x4d", "resnext50_32x4d", "densenet121", "vgg11_bn", "inception_v3"),
    *("mobilenetv2_050", "mobilenetv3_large_100", "efficientnet_b0", "regnety_002", "ghostnet_050", "ghostnetv2_100"),
    *("convnext_atto", "vit_tiny_patch16_224", "mixer_s32_224", "cifar_resnet20", "cifar_wrn_16_1", "cifar_resnet50"),
    *("cifar_mobilenetv2", "cifar_vgg13"),
)


def built(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    shape = (1, 16, 16) if name == "seed_cnn" else (3, 96 if name == "inception_v3" else 64, 0)
    shape = (*shape[:2], shape[1])
    if name.startswith("cifar"):
        shape = (3, 32, 32)
    net = create(name, num_classes=10, in_chans=shape[0], size=shape[1])
    return net.eval(), shape


def half(net: nn.Module, shape: tuple[int, int, int]) -> None:
    """Half of each site goes, in a net of random norms: the outputs are those with that half at 0."""
    inputs = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    sites, whole = find(net, inputs, by="group_norm")
    assert sites and set(whole.values()) <= {
        "it makes the outputs", "a LayerNorm mixes its channels", "a LayerNorm2d mixes its channels",
        "a Shuffle deals its channels out anew", "it could not be cut exactly",
    }  # fmt: skip
    subject = drawn(net, inputs).float()
    choice = {n: s.scores.argsort()[: s.slots // 2] for n, s in enumerate(sites)}
    with torch.no_grad():
        expected = zero(subject, sites, choice)(inputs)
        narrow = cut(copy.deepcopy(subject), sites, choice)
        found = narrow(inputs)
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    tally = Tally(net, shape, sites).of(choice)
    assert tally["macs"] == pytest.approx(macs(narrow, shape), rel=1e-6)
    assert tally["parameters"] == pytest.approx(sum(p.numel() for p in narrow.parameters()))


@pytest.mark.parametrize("name", FAST)
def test_zeroed_or_removed_the_outputs_are_the_same(name: str) -> None:
    half(*built(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_zeroed_or_removed_the_outputs_are_the_same_on_every_family(name: str) -> None:
    half(*built(name))


@pytest.mark.parametrize("of", ["macs", "parameters", "channels"])
@pytest.mark.parametrize("scope", ["global", "isomorphic", "layer"])
def test_as_much_goes_as_was_asked_and_hardly_more(of: str, scope: str) -> None:
    net, shape = built("cifar_resnet8")
    before = copy.deepcopy(net.state_dict())
    made = prune(net, torch.randn(2, *shape), amount=0.4, of=of, scope=scope)
    assert 0.54 < made.left[of] <= 0.6
    assert made.left["macs"] == pytest.approx(macs(made.net, shape) / macs(net, shape))
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    fresh = rebuild(built("cifar_resnet8")[0], [made.change])
    fresh.load_state_dict(made.net.state_dict(), strict=True)
    images = torch.randn(2, *shape)
    assert fresh.eval()(images).equal(made.net.eval()(images))


def test_a_pruned_net_can_be_pruned_again_and_trained() -> None:
    net, shape = built("mobilenetv3_small_050")
    inputs = torch.randn(2, *shape)
    once = prune(net, inputs, amount=0.3)
    twice = prune(once.net, inputs, amount=0.3)
    assert macs(twice.net, shape) < 0.5 * macs(net, shape)
    fresh = rebuild(built("mobilenetv3_small_050")[0], [once.change, twice.change])
    fresh.load_state_dict(twice.net.state_dict(), strict=True)
    twice.net.train()(torch.randn(8, *shape)).sum().backward()
    assert all(p.grad is not None for p in twice.net.parameters())


@pytest.mark.parametrize("by", ["taylor", "magnitude", "group_norm"])
def test_what_does_nothing_goes_first(by: str) -> None:
    net, shape = built("cifar_vgg8")
    dead = {}
    for path, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            dead[path] = torch.randperm(conv.out_channels)[: conv.out_channels // 4]
            for value in (conv.weight, conv.bias):
                value.data[dead[path]] *= 1e-4
    for path, norm in net.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            gone = dead[path.replace("bn", "conv")]
            norm.weight.data[gone] = norm.bias.data[gone] = 1e-4
    inputs = torch.randn(4, *shape)
    loss = net(inputs).logsumexp(dim=1).mean()
    named = dict(net.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    made = prune(net, inputs, amount=0.3, by=by, gradients=gradients, scope="layer")
    with torch.no_grad():
        assert float((made.net(inputs) - net(inputs)).abs().max()) < 0.02 * float(net(inputs).abs().max())


def test_random_is_drawn_by_the_seed() -> None:
    net, shape = built("seed_cnn")
    inputs = torch.randn(2, *shape)
    made = [prune(net, inputs, amount=0.5, by="random", seed=seed).net for seed in (0, 0, 1)]
    first, again, other = (net.state_dict()["head.weight"] for net in made)
    assert first.equal(again) and (first.shape != other.shape or not first.equal(other))


def test_layers_that_are_kept_stay_as_wide_as_they_are() -> None:
    net, shape = built("seed_cnn")
    made = prune(net, torch.randn(2, *shape), amount=0.3, keep=["conv2", "dense"])
    assert made.net.conv2[0].out_channels == 64 and made.net.dense[0].out_features == 64  # type: ignore[index, union-attr]
    assert made.whole["conv2.0"] == "as it was asked"


def test_widths_are_multiples_where_they_can_be() -> None:
    net, shape = built("cifar_resnet8")
    made = prune(net, torch.randn(2, *shape), amount=0.4, round_to=8)
    assert {m.out_channels % 8 for m in made.net.modules() if isinstance(m, nn.Conv2d)} == {0}


def test_no_layer_loses_more_than_it_may() -> None:
    net, shape = built("seed_cnn")
    made = prune(net, torch.randn(2, *shape), amount=0.7, most=0.5)
    assert made.net.conv1[0].out_channels == 16  # type: ignore[index, union-attr]


def test_what_cannot_be_reached_is_said_in_one_line() -> None:
    net, shape = built("cifar_shufflenetv2")
    with pytest.raises(InputError, match=r"amount=0.9 of the macs cannot go: .* lower amount, raise most") as caught:
        prune(net, torch.randn(2, *shape), amount=0.9, most=0.3)
    assert "\n" not in str(caught.value)


def test_scopes_rank_what_their_names_say() -> None:
    def one(path: str, scores: list[float], tag: str) -> Site:
        touches = [Touch(path, "out", torch.arange(4))]
        return Site(path, "channels", 4, touches, torch.tensor(scores, dtype=torch.float64), tag=tag)

    net = nn.ModuleDict({name: nn.Linear(3, 4, bias=False) for name in "abc"})

    class Tallied(Tally):
        def __init__(self) -> None:
            self.sites, self.modules = sites, dict(net.named_modules())
            self.sizes, self.parameters, self.total, self.channels, self.macs = {}, 36, 0, 12, {}

    sites = [one("a", [1, 2, 3, 4], "x"), one("b", [5, 6, 7, 8], "x"), one("c", [0.1, 0.2, 0.3, 0.4], "y")]
    gone: dict[str, Any] = {}
    for scope in ("global", "isomorphic", "layer"):
        choice = choose(sites, Tallied(), amount=0.5, of="channels", scope=scope)
        gone[scope] = [len(choice.get(n, ())) for n in range(3)]
    assert gone == {"global": [3, 0, 3], "isomorphic": [3, 1, 2], "layer": [2, 2, 2]}


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InputError, match=r"needs torch-pruning: pip install 'kd\[compress\]'"):
        find(nn.Sequential(nn.Linear(3, 3)), torch.rand(2, 3))
