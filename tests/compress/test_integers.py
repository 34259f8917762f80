"""ONNX models with integers: as the quantised net computes, smaller, and with the operators they should have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.compress.export import answer, session, to_onnx, told
from kd.compress.folding import fold, pairs
from kd.compress.integers import to_integers
from kd.compress.measure import looking
from kd.compress.quantize import begin, candidates, finish, ranges_of
from kd.errors import KDError
from kd.models import create


def images(*shape: int, count: int = 64) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def made(
    net: nn.Module, how: str, bits: int, block: int | None, given: Tensor, keep: tuple[str, ...] = ()
) -> tuple[nn.Module, Any, list[str], int]:
    """The net quantised, its ONNX model with integers, what was said, and the bytes of that in float."""
    layers = {path: layer for path, layer in candidates(net, how)[0].items() if path not in keep}
    ranges = ranges_of(net, layers, [given])
    begin(net, how, bits, block, {path: ranges[path] for path in layers})
    change = {"how": how, "bits": bits, "block": block, "layers": finish(net)}
    model, places = to_onnx(net, given.shape[1:])
    size = len(model.SerializeToString())
    model, said = to_integers(model, places, net, change, given.split(32))
    return net, model, said, size


def error(net: nn.Module, model: Any, given: Tensor, how: str) -> float:
    """How far the model is from the net, as a share of what the net gives."""
    opened = session(model.SerializeToString(), unpack=how != "static")
    with looking(net):
        expected = net(given)
    return float((answer(opened, given) - expected).norm() / expected.norm())


def small() -> nn.Module:
    torch.manual_seed(0)
    return create("seed_cnn_small", num_classes=10, in_chans=1, size=8).eval()


@pytest.mark.parametrize(
    ("how", "bits", "block", "nodes", "most"),
    [
        ("static", 8, None, {"QuantizeLinear"}, 0.01),
        ("static", 4, None, {"QuantizeLinear"}, 0.01),
        ("dynamic", 8, None, {"DynamicQuantizeLinear", "MatMulInteger"}, 1e-5),
        ("weights", 8, None, {"DequantizeLinear"}, 1e-5),
        ("weights", 4, 16, {"DequantizeLinear", "MatMulNBits"}, 1e-5),
    ],
)
def test_it_computes_as_the_quantised_net(how: str, bits: int, block: int | None, nodes: set[str], most: float) -> None:
    given = images(1, 8, 8)
    net, model, said, _ = made(small(), how, bits, block, given)
    assert nodes <= told(model).keys() and said == []
    assert error(net, model, given, how) < most
    again = made(small(), how, bits, block, given)[1]
    assert model.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


def test_static_is_unsigned_activations_and_signed_weights_by_channel() -> None:
    from onnx import TensorProto

    _, model, _, _ = made(small(), "static", 8, None, images(1, 8, 8))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    whole = [t for name, t in tensors.items() if name.endswith("weight_quantized")]
    assert len(whole) == 5 and all(tensor.data_type == TensorProto.INT8 for tensor in whole)
    assert tensors["conv2.0.weight_scale"].dims == [16]
    zeros = [tensors[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert zeros and all(tensor.data_type == TensorProto.UINT8 for tensor in zeros)


def test_a_residual_net_with_norms_folded_is_integers_all_through_and_a_quarter_of_the_size() -> None:
    torch.manual_seed(0)
    net = create("cifar_resnet8", num_classes=10, in_chans=3, size=16).eval()
    given = images(3, 16, 16)
    fold(net, pairs(net, given[:4]))
    net, model, _, size = made(net, "static", 8, None, given)
    nodes = told(model)
    adds = [node for node in model.graph.node if node.op_type == "Add"]
    dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert len(adds) == 3 and all(set(node.input) <= dequantised for node in adds)
    assert nodes["Conv"] == 9 and size / len(model.SerializeToString()) > 2.5  # scales weigh in a net of 78,000
    assert error(net, model, given, "static") < 0.05


def test_layers_left_in_float_are_in_float() -> None:
    given = images(1, 8, 8)
    net, model, _, _ = made(small(), "static", 8, None, given, keep=("conv1.0", "head"))
    tensors = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert tensors["conv1.0.weight"] == tensors["head.weight"] == 1
    assert error(net, model, given, "static") < 0.01


@pytest.mark.parametrize(("how", "bits", "block"), [("static", 8, None), ("dynamic", 8, None), ("weights", 4, 16)])
def test_a_transformer_keeps_its_sums_in_float(how: str, bits: int, block: int | None) -> None:
    torch.manual_seed(0)
    options = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    net = create("vit_tiny_patch16_224", num_classes=10, in_chans=3, size=32, options=options).eval()
    given = images(3, 32, 32)
    net, model, _, _ = made(net, how, bits, block, given)
    assert error(net, model, given, how) < (1e-5 if how == "weights" else 0.05)
    if how == "weights":
        assert told(model)["MatMulNBits"] == 9 and told(model)["MatMul"] == 4  # of attention
    if how == "static":
        summed = {node.output[0] for node in model.graph.node if node.op_type == "Add"}
        rounded = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
        assert not summed & rounded


class Recurrent(nn.Module):
    """Sequences (N, T, 12) through two layers in both directions."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cells = kind(12, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, frames: Tensor) -> Tensor:
        logits: Tensor = self.head(self.cells(frames)[0])
        return logits


@pytest.mark.parametrize(
    ("kind", "how", "bits", "node", "most"),
    [
        (nn.LSTM, "dynamic", 8, "DynamicQuantizeLSTM", 0.02),  # inside an LSTM nothing is simulated
        (nn.LSTM, "weights", 4, "LSTM", 1e-5),
        (nn.GRU, "dynamic", 8, "GRU", 1e-4),
        (nn.GRU, "weights", 8, "GRU", 1e-5),
    ],
)
def test_recurrent_layers(kind: type[nn.Module], how: str, bits: int, node: str, most: float) -> None:
    torch.manual_seed(0)
    given = images(9, 12, count=6)
    net, model, said, size = made(Recurrent(kind).eval(), how, bits, 16 if bits == 4 else None, given)
    assert told(model)[node] == 2 and size / len(model.SerializeToString()) > 2
    assert error(net, model, given, how) < most
    gated = kind is nn.GRU and how == "dynamic"
    assert said == (["cells: ONNX Runtime has no integer GRU; its weights alone are integers"] if gated else [])


def test_a_layer_that_the_exporter_left_no_trace_of_is_named() -> None:
    net = small()
    model, places = to_onnx(net, (1, 8, 8))
    places.pop("conv3.0")
    begin(net, "weights", 8, None, {"conv3.0": None})
    change = {"how": "weights", "bits": 8, "block": None, "layers": finish(net)}
    with pytest.raises(KDError, match=r"the layer conv3\.0 cannot be found in the ONNX model"):
        to_integers(model, places, net, change)
