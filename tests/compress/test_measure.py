"""Costs worked by hand, and a net left as it was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd.compress import measure
from kd.compress.measure import activation_bytes, cost, looking, macs, milliseconds, stored_bytes, watched
from kd.models import Normalised, Taps, create


def test_macs_of_a_convolution_are_those_worked_by_hand() -> None:
    # 6x6 outputs of 5 channels, each the product of 3 channels under a 3x3 kernel.
    assert macs(nn.Conv2d(3, 5, 3, bias=False), (3, 8, 8)) == 6 * 6 * 5 * 3 * 3 * 3
    assert macs(nn.Conv2d(3, 5, 3), (3, 8, 8)) == 6 * 6 * 5 * 3 * 3 * 3  # an added bias is no product
    assert macs(nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 8, 8)) == 8 * 8 * 6 * 3 * 3
    assert macs(nn.Conv2d(4, 8, 3, stride=2, padding=1), (4, 8, 8)) == 4 * 4 * 8 * 4 * 3 * 3


def test_macs_of_a_linear_layer_are_those_worked_by_hand() -> None:
    assert macs(nn.Linear(7, 11), (7,)) == 77
    assert macs(nn.Linear(7, 11), (5, 7)) == 5 * 77


def test_macs_of_a_net_are_the_sum_over_its_layers() -> None:
    layers = {
        "conv1": 26 * 26 * 32 * 1 * 9,
        "conv2": 11 * 11 * 64 * 32 * 9,
        "conv3": 3 * 3 * 64 * 64 * 9,
        "dense": 576 * 64,
        "head": 64 * 10,
    }
    assert macs(create("seed_cnn", num_classes=10, in_chans=1, size=28), (1, 28, 28)) == sum(layers.values())


def test_macs_of_a_transformer_hold_its_attention() -> None:
    net = create("vit_tiny_patch16_224", num_classes=10, in_chans=3, size=32)
    tokens, width = 5, 192
    block = tokens * width * 12 * width + 2 * tokens * tokens * width  # qkv, proj, mlp; scores and their sum
    assert macs(net, (3, 32, 32)) == 12 * block + 4 * (3 * 16 * 16) * width + width * 10


def test_macs_are_the_same_of_a_net_in_half_precision() -> None:
    assert macs(nn.Conv2d(3, 5, 3).bfloat16(), (3, 8, 8)) == 6 * 6 * 5 * 3 * 3 * 3


def test_stored_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    net = create("seed_cnn_small", num_classes=10, in_chans=1, size=28)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    size = (tmp_path / "net.safetensors").stat().st_size
    assert stored_bytes(net) == size > 4 * 6058
    assert stored_bytes(Normalised(net, [0.1], [0.3])) == size  # what is stored is the net inside


def test_cost_is_plain_data_with_all_its_keys() -> None:
    net = create("seed_cnn_small", num_classes=10, in_chans=1, size=28)
    found = cost(net, (1, 28, 28), repeats=3)
    assert json.loads(json.dumps(found)) == found
    assert list(found) == [
        "parameters",
        "nonzero",
        "macs",
        "bytes",
        "activation_bytes",
        "latency_ms_batch1",
        "latency_ms_batch64",
    ]
    assert found["parameters"] == 6058 and found["macs"] == 211_264
    assert all(found[f"latency_ms_batch{batch}"] > 0 for batch in measure.BATCHES)
    plain = ["parameters", "nonzero", "macs", "bytes", "activation_bytes"]
    assert list(cost(net, (1, 28, 28), latency=False)) == plain


class Restless(nn.Module):
    """Draws a number in each pass, and notes how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.calls: list[tuple[int, bool, bool]] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append((len(inputs), self.training, torch.is_grad_enabled()))
        noise = torch.rand(())
        output: torch.Tensor = self.norm(self.layer(inputs)) + noise
        return output


def test_latency_times_quiet_passes_after_a_warm_up() -> None:
    net = Restless().train()
    milliseconds(net, (3,), batch=4, repeats=5)
    assert net.calls == [(4, False, False)] * (measure.WARM_UP + 5)


def test_latency_is_the_median_and_knows_when_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([9.0, 9.0, 9.0, 0.001, 0.5, 0.002, 0.003, 0.004])
    monkeypatch.setattr(measure, "_timed", lambda net, inputs: next(given))
    assert milliseconds(nn.Linear(3, 5), (3,), batch=1, repeats=5) == 3.0
    given = iter([9.0, 9.0, 9.0, 0.001, 0.5, 0.002])
    assert milliseconds(nn.Linear(3, 5), (3,), batch=1, repeats=5, seconds=0) == 2.0


def test_cost_leaves_generator_modes_statistics_and_gradients_as_they_were() -> None:
    net = Restless().train()
    net.norm.eval()  # a norm may be frozen inside a net that trains
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in net.state_dict().items()}
    cost(net, (3,), repeats=2)
    assert torch.get_rng_state().equal(state)
    assert net.training and net.layer.training and not net.norm.training
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters()) and torch.is_grad_enabled()


def test_modes_come_back_even_after_an_error() -> None:
    net = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError, match="stop"), looking(net):
        raise RuntimeError("stop")
    assert net.training


def test_counting_does_not_run_the_net_itself() -> None:
    net = Restless()
    macs(net, (3,))
    assert not net.calls
    inner = nn.Sequential(nn.Linear(3, 5))
    taps = Taps(inner, ["0"])
    inner(torch.ones(1, 3))
    macs(inner, (3,))
    assert taps.pop()["0"].device.type == "cpu"  # and not the copy's, which has no data


def test_counting_takes_no_memory_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: torch.Tensor, memo: Any) -> torch.Tensor:
        raise AssertionError("weights were copied")

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    assert macs(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), (3,)) == 15


@pytest.mark.gpu
def test_cost_on_a_gpu_is_that_of_the_cpu_but_for_time() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    net = create("seed_cnn", num_classes=10, in_chans=1, size=28)
    here = cost(net, (1, 28, 28), latency=False)
    state = torch.cuda.get_rng_state()
    there = cost(net.cuda(), (1, 28, 28))
    assert {key: there[key] for key in here} == here and there["latency_ms_batch64"] > 0
    assert torch.cuda.get_rng_state().equal(state)


def test_what_modules_are_given_is_seen_without_data_in_the_nets_own_precision_and_leaves_no_trace() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 2)).bfloat16().train()
    seen: list[Any] = []
    watched(
        net,
        (3, 8, 8),
        lambda module: isinstance(module, nn.Linear | nn.Conv2d),
        lambda path, module, inputs, output: seen.append((path, inputs[0].shape, output.shape, output.dtype)),
    )
    assert seen == [
        ("0", (1, 3, 8, 8), (1, 4, 6, 6), torch.bfloat16),
        ("3", (1, 144), (1, 2), torch.bfloat16),
    ]
    assert net.training and not any(module._forward_hooks for module in net.modules())


def test_activations_are_counted_while_something_holds_them() -> None:
    # 4 bytes a number: the input of 4 stays, 8 are made, then 2 beside them; the 8 go before the next 2.
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False), nn.Linear(2, 2, bias=False))
    assert activation_bytes(net, (4,)) == 4 * (4 + 8 + 2)
    inplace = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(inplace=True))
    assert activation_bytes(inplace, (4,)) == 4 * (4 + 8)
    assert activation_bytes(nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU()), (4,)) == 4 * (4 + 8 + 8)


def test_nonzero_counts_what_pruning_leaves() -> None:
    net = nn.Linear(4, 2)
    net.weight.data[0] = 0
    nn.init.ones_(net.bias)
    assert cost(net, (4,), latency=False)["nonzero"] == 6
