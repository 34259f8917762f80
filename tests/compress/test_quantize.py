"""Layers that compute as integers will: names, hooks and copies stay; what is left is plain data and plain weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.compress.grid import nearest
from kd.compress.measure import looking, macs
from kd.compress.quantize import (
    begin,
    candidates,
    chosen,
    finish,
    only,
    quantised,
    ranges_of,
    reach,
    restore,
    strip,
)
from kd.errors import InputError, KDError
from kd.models import Taps, create


def small() -> nn.Module:
    torch.manual_seed(0)
    return create("seed_cnn_small", num_classes=10, in_chans=1, size=8)


IMAGES = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def begun(how: str = "static", bits: int = 8, block: int | None = None) -> nn.Module:
    net = small()
    layers = candidates(net, how)[0]
    begin(net, how, bits, block, {path: ranges_of(net, layers, [IMAGES])[path] for path in layers})
    return net


def test_modules_names_hooks_and_copies_stay() -> None:
    net = small()
    taps = Taps(net, ["conv2", "dense.0"])
    paths = [(path, id(module)) for path, module in net.named_modules()]
    layers = candidates(net, "static")[0]
    begin(net, "static", 8, None, ranges_of(net, layers, [IMAGES]))  # type: ignore[arg-type]
    assert [(path, id(module)) for path, module in net.named_modules()] == paths
    taps.pop()
    net.train()(IMAGES).sum().backward()
    assert {name: value.shape[0] for name, value in taps.pop().items()} == {"conv2": 16, "dense.0": 16}
    assert all(parameter.grad is not None for parameter in net.parameters())
    twin = copy.deepcopy(net)
    with looking(net), looking(twin):
        assert torch.equal(net(IMAGES), twin(IMAGES))
    finish(net)
    assert set(net.state_dict()) == set(small().state_dict())
    assert isinstance(net.get_submodule("conv2.0"), nn.Conv2d)


@pytest.mark.parametrize(("how", "bits", "most"), [("static", 8, 0.05), ("static", 4, 0.4), ("weights", 8, 0.02)])
def test_the_outputs_are_near_those_in_float(how: str, bits: int, most: float) -> None:
    exact, net = small(), begun(how, bits, 32 if how == "weights" else None)
    with looking(exact), looking(net):
        error = (net(IMAGES) - exact(IMAGES)).norm() / exact(IMAGES).norm()
    assert 0 < error < most


def test_finishing_changes_nothing_and_a_structure_makes_it_again() -> None:
    for how, bits, block in (("static", 8, None), ("static", 4, None), ("weights", 4, 16), ("dynamic", 8, None)):
        net = begun(how, bits, block)
        with looking(net):
            before = net(IMAGES)
        change = {"kind": "quantized", "how": how, "bits": bits, "block": block, "layers": finish(net)}
        with looking(net):
            after = net(IMAGES)
        assert torch.allclose(before, after, atol=1e-6), how
        again = small()
        restore(again, change)
        again.load_state_dict(net.state_dict(), strict=True)
        with looking(again):
            assert torch.equal(again(IMAGES), after)
        assert macs(again, (1, 8, 8)) == macs(small(), (1, 8, 8))


def test_ranges_follow_the_batches_while_it_trains_and_not_else() -> None:
    net = begun()
    layer: Any = net.get_submodule("conv1.0")
    before = float(layer.input_high)
    with looking(net):
        net(IMAGES * 9)
    assert float(layer.input_high) == before
    net.train()(IMAGES * 9)
    assert float(layer.input_high) == pytest.approx(before + 0.01 * (9 * float(IMAGES.max()) - before), rel=1e-5)


def test_ranges_of_all_batches_and_those_without_the_outermost() -> None:
    net = nn.Sequential(nn.Identity())
    batches = [torch.arange(20000.0), torch.arange(20000.0) - 10000]
    assert ranges_of(net, ["0"], batches) == {"0": (-10000.0, 19999.0)}
    assert ranges_of(net, ["0"], batches, "percentile") == {"0": (-4999.0, 14998.0)}
    assert reach(torch.tensor([2.0]), "percentile") == (torch.tensor(2.0), torch.tensor(2.0))


class Odd(nn.Module):
    """Layers that can and cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.own = type("OwnLinear", (nn.Linear,), {})(4, 4)
        self.attention = nn.MultiheadAttention(4, 1)
        self.up = nn.ConvTranspose2d(1, 1, 2)
        self.conv = nn.Conv2d(1, 1, 1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.lstm, self.norm = nn.LSTM(4, 4), nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)


def test_a_layer_that_cannot_is_named_with_the_reason() -> None:
    can, cannot = candidates(Odd(), "static")
    assert list(can) == ["conv", "linear"]
    assert cannot == {
        "own": "a OwnLinear is none of the layers that can",
        "attention": "MultiheadAttention reads its weights past it",
        "attention.out_proj": "MultiheadAttention reads its weights past it",
        "up": "a ConvTranspose2d is none of the layers that can",
        "first": "it shares its weight with second",
        "second": "it shares its weight with first",
        "lstm": "a LSTM knows dynamic and weights alone",
    }
    assert list(candidates(Odd(), "dynamic")[0]) == ["lstm", "linear"]
    assert list(candidates(Odd(), "weights")[0]) == ["conv", "lstm", "linear"]


def test_recurrent_weights_move_when_training_is_over() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LSTM(5, 4))
    weight = net[0].weight_hh_l0.detach().clone()
    begin(net, "dynamic", 8, None, {"0": None})
    assert torch.equal(net[0].weight_hh_l0, weight)
    assert finish(net) == {"0": {}} and torch.equal(net[0].weight_hh_l0, nearest(weight, 8))
    strip(net)
    restore(net, {"how": "dynamic", "bits": 8, "block": None, "layers": {"0": {}}})
    assert net[0].quant.how == "dynamic"


def test_only_some_layers_can_be_active_and_all_can_be_stripped() -> None:
    exact, net = small(), begun()
    with looking(exact), looking(net):
        with only(net, []):
            assert torch.equal(net(IMAGES), exact(IMAGES))
        assert not torch.equal(net(IMAGES), exact(IMAGES))
    strip(net, ["conv1.0"])
    assert type(net.get_submodule("conv1.0")) is nn.Conv2d
    strip(net)
    with looking(net), looking(exact):
        assert torch.equal(net(IMAGES), exact(IMAGES)) and set(net.state_dict()) == set(exact.state_dict())


def test_names_reach_down_and_wrong_ones_are_refused() -> None:
    assert chosen(small(), ["conv1"], "quantize.keep") == {"conv1", "conv1.0", "conv1.1"}
    with pytest.raises(InputError, match=r"quantize.keep: 'conv9' is no layer of SeedCNN; did you mean 'conv"):
        chosen(small(), ["conv9"], "quantize.keep")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 5}, "at 5 bits"),
        ({"how": "magic"}, "quantises 'magic'"),
        ({"layers": {"conv7": {}}}, "quantises 'conv7', which is no such layer"),
        ({"layers": {"conv1.0": {"step": -1.0, "zero": 0}}}, "the step -1.0"),
        ({"layers": {"conv1.0": {"step": 1.0, "zero": 256}}}, "zero 256"),
        ({"layers": None}, "which this kd cannot"),
        ({"how": "weights", "layers": {"conv1.0": {"step": 1.0}}}, "weights knows no ranges"),
    ],
)
def test_a_structure_that_may_come_from_anywhere_is_checked(change: dict[str, Any], said: str) -> None:
    whole = {"kind": "quantized", "how": "static", "bits": 8, "block": None, "layers": {}, **change}
    with pytest.raises(KDError, match=said):
        restore(small(), whole)


def test_the_last_change_counts() -> None:
    first, second = ({"kind": "quantized", "bits": bits} for bits in (8, 4))
    assert quantised([first, {"kind": "masked"}, second]) is second and quantised([]) is None


def test_a_net_that_is_quantised_is_quantised_anew() -> None:
    net = begun()
    finish(net)
    told = {"how": "weights", "bits": 4, "block": 16, "layers": {"dense.0": {}}}
    restore(net, told)
    assert type(net.get_submodule("conv1.0")) is nn.Conv2d and net.get_submodule("dense.0").quant.bits == 4


def test_a_layer_given_more_than_images_takes_them() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(3, 3, 1)
            self.linear = nn.Linear(5, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.linear(self.mix(tokens))
            return out

    net, tokens = Tokens(), torch.randn(2, 3, 5)
    begin(net, "static", 8, None, ranges_of(net, ["mix", "linear"], [tokens]))  # type: ignore[arg-type]
    finish(net)
    with looking(net):
        assert net(tokens).shape == (2, 3, 5)
