"""Units of recurrent layers go exactly, each layer's and direction's least, with what hears them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kd.compress.measure import macs
from kd.compress.prune import find, prune
from kd.compress.recurrent import Shell, shells, unit_scores
from kd.compress.sites import Tally, cut, zero
from kd.compress.structure import rebuild


class Speech(nn.Module):
    """Convolutions, two recurrent layers and a head, as speech recognisers have them."""

    def __init__(self, kind: Any, layers: int, both: bool, bias: bool = True) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU())
        self.embed = nn.Linear(5 * 8, 10)
        self.first = kind(10, 12, num_layers=layers, bidirectional=both, batch_first=True, bias=bias)
        self.second = kind(12 * (1 + both), 6, batch_first=True, bias=bias)
        self.head = nn.Linear(6, 4)

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        maps = self.front(sound).permute(0, 2, 1, 3).flatten(2)
        found: torch.Tensor = self.head(self.second(self.first(self.embed(maps).relu())[0])[0])
        return found


def speech(kind: Any = nn.GRU, layers: int = 2, both: bool = True, bias: bool = True) -> Speech:
    torch.manual_seed(0)
    return Speech(kind, layers, both, bias).eval()


SHAPE = (1, 9, 8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_zeroed_or_removed_the_outputs_are_the_same(kind: Any, layers: int, both: bool, bias: bool) -> None:
    net = speech(kind, layers, both, bias)
    inputs = torch.randn(2, *SHAPE)
    sites, whole = find(net, inputs, by="group_norm")
    assert {(s.path, s.kind, s.slots) for s in sites} == {
        ("front.0", "channels", 6), ("embed", "channels", 10), ("first", "units", 12), ("second", "units", 6),
    }  # fmt: skip
    assert set(whole) == {"head", "front.2"}  # channels before a permutation and a flattening
    choice = {n: torch.arange(site.slots // 2) for n, site in enumerate(sites)}
    with torch.no_grad():
        expected = zero(net, sites, choice)(inputs)
        narrow = cut(copy.deepcopy(net), sites, choice)
        assert float((narrow(inputs) - expected).abs().max()) < 1e-6
        assert float((net(inputs) - expected).abs().max()) > 1e-3
    assert (narrow.first.hidden_size, narrow.first.input_size, narrow.second.input_size) == (6, 5, 6 * (1 + both))
    found = Tally(net, SHAPE, sites).of(choice)
    assert found["parameters"] == sum(p.numel() for p in narrow.parameters())
    assert found["macs"] == macs(narrow, SHAPE)


def test_a_narrow_recurrent_net_reloads_and_trains() -> None:
    net = speech()
    made = prune(net, torch.randn(2, *SHAPE), amount=0.5, of="parameters")
    fresh = rebuild(speech(), [made.change])
    fresh.load_state_dict(made.net.state_dict(), strict=True)
    inputs = torch.randn(2, *SHAPE)
    assert fresh.eval()(inputs).equal(made.net.eval()(inputs))
    made.net.train()(inputs).sum().backward()
    assert all(p.grad is not None for p in made.net.parameters())


def test_the_units_that_do_nothing_go_first_in_each_layer_and_direction() -> None:
    net = speech()
    for name, value in net.first.named_parameters():
        gone = torch.arange(3) + (4 if name.endswith("reverse") else 0) + (1 if "l1" in name else 0)
        rows = (gone + 12 * torch.arange(3)[:, None]).flatten()
        value.data[rows] = 0
    inputs = torch.randn(2, *SHAPE)
    made = prune(net, inputs, amount=0.1, of="parameters", keep=["front", "embed", "second"])
    assert made.net.first.hidden_size < 12  # type: ignore[union-attr]
    torch.testing.assert_close(made.net(inputs), net(inputs), atol=1e-6, rtol=1e-5)


def test_taylor_weighs_units_by_the_gradient() -> None:
    layer = nn.GRU(3, 4)
    named = dict(layer.named_parameters())
    gradients = {name: torch.zeros_like(value) for name, value in named.items()}
    gradients["weight_ih_l0"][[1, 5]] = 1.0  # unit 1 alone, in two gates
    found = unit_scores(layer, "taylor", gradients)["unit0.0"]
    assert found.argmax() == 1 and int((found > 0).sum()) == 1


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_layer_that_cannot_be_cut_is_named() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc, self.head = nn.LSTM(4, 8, proj_size=3), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.fc(self.rnn(inputs)[0]).relu())
            return found

    sites, whole = find(Last(), torch.randn(2, 5, 4))
    assert [site.path for site in sites] == ["fc"]
    assert whole["rnn"] == "an LSTM with a projection stays whole"


def test_a_recurrent_layer_may_be_the_first() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 8, bidirectional=True), nn.Linear(16, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.rnn(inputs)[0])
            return found

    made = prune(First(), torch.randn(2, 5, 4), amount=0.5, of="parameters")
    assert made.net.rnn.hidden_size < 8 and made.net.head.in_features == 2 * made.net.rnn.hidden_size  # type: ignore[union-attr, operator]


def test_shells_leave_the_net_as_it_was_even_after_an_error() -> None:
    net = speech()
    with pytest.raises(RuntimeError, match="stop"), shells(net) as found:
        assert isinstance(net.first, Shell) and set(found) == {"first", "second"}
        raise RuntimeError("stop")
    assert isinstance(net.first, nn.GRU)
