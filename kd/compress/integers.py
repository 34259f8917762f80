"""ONNX models whose layers compute with integers: what a net was quantised to, written out for ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.compress import grid
from kd.compress.export import INPUT, bare, quiet
from kd.compress.quantize import RECURRENT
from kd.errors import KDError

# What hands integers on besides the layers themselves; anything else stays in float between them.
PASSING: tuple[str, ...] = ("Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "MaxPool", "Pad")
PASSING += ("Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
PRODUCTS = ("Conv", "Gemm", "MatMul", "LSTM", "GRU")
MICROSOFT = "com.microsoft"


def to_integers(
    model: Any,
    places: Mapping[str, Sequence[str]],
    net: nn.Module,
    change: Mapping[str, Any],
    batches: Iterable[Tensor] = (),
) -> tuple[Any, list[str]]:
    """An ONNX model in floating point as the quantised net computes, and what could not be, a line each.

    Args:
        model: as `kd.compress.export.to_onnx` gives it; may be changed.
        places: likewise.
        net: the plain quantised net, whose weights are on their values.
        change: how it was quantised (`kd.compress.structure`).
        batches: normalised images of the training split, for the ranges of what the net does not know: `static`.

    Raises:
        KDError: if a quantised layer is not to be found in the model.
    """
    products = _products(model, places, change["layers"])
    if change["how"] == "static":
        return _static(model, products, net, change, batches), []
    if change["how"] == "dynamic":
        return _dynamic(model, products, net)
    return _weights(model, products, net, change), []


def _products(model: Any, places: Mapping[str, Sequence[str]], layers: Iterable[str]) -> dict[str, list[Any]]:
    """The nodes that multiply by each layer's weight."""
    nodes = {node.name: node for node in model.graph.node}
    constant = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, list[Any]] = {}
    for path in layers:
        own = [nodes[name] for name in places.get(path, ())]
        found[path] = [node for node in own if node.op_type in PRODUCTS and node.input[1] in constant]
        if not found[path]:
            raise KDError(f"the layer {path} cannot be found in the ONNX model that the exporter made of it")
    return found


def _static(
    model: Any,
    products: Mapping[str, list[Any]],
    net: nn.Module,
    change: Mapping[str, Any],
    batches: Iterable[Tensor],
) -> Any:
    """QDQ by ONNX Runtime's own quantiser, told the steps that the net knows."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    overrides: dict[str, list[dict[str, Any]]] = {}
    for path, nodes in products.items():
        known = change["layers"][path]
        step = grid.steps(_weight(net, path), change["bits"]).flatten().numpy()
        for node in nodes:
            given = {"scale": np.array(known["step"], np.float32), "zero_point": np.array(known["zero"], np.uint8)}
            overrides.setdefault(node.input[0], [{"quant_type": QuantType.QUInt8, **given}])
            axis = 1 if node.op_type == "MatMul" or not _transposed(node) else 0
            each = {"axis": axis, "quant_type": QuantType.QInt8, "zero_point": np.array(0, np.int8)}
            overrides.setdefault(node.input[1], [{**each, "scale": np.array(one)} for one in step])
    taken = {node.name for nodes in products.values() for node in nodes}
    left = [node.name for node in model.graph.node if node.name not in taken | _passing(model, taken)]

    def make(folder: Path) -> Any:
        quantize_static(
            model,
            folder / "model.onnx",
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", *PASSING],
            nodes_to_exclude=left,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            # What a product of a linear layer gives is an exact number already: rounding it would only lose.
            extra_options={"TensorQuantOverrides": overrides, "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )

    return _made(make)


def _passing(model: Any, taken: set[str]) -> set[str]:
    """The nodes that may hand on integers: all that they are given comes from quantised convolutions.

    The sums of a transformer stay in float: a few of their values are far from the rest.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    whole = {model.graph.input[0].name}
    found: set[str] = set()
    for node in model.graph.node:  # in the order in which they compute
        given = [name for name in node.input if name not in constant and name]
        if node.op_type in PASSING and given and all(name in whole for name in given):
            found.add(node.name)
            whole |= set(node.output)
        elif node.op_type == "Conv" and node.name in taken:
            whole |= set(node.output)
    return found


def _dynamic(model: Any, products: Mapping[str, list[Any]], net: nn.Module) -> tuple[Any, list[str]]:
    """Integers for the weights, and ranges that are found anew in each batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    gated = {p: nodes for p, nodes in products.items() if nodes[0].op_type == "GRU"}
    rest = {p: nodes for p, nodes in products.items() if p not in gated}
    said = [f"{path}: ONNX Runtime has no integer GRU; its weights alone are integers" for path in gated]
    if rest:
        taken = {node.name for nodes in rest.values() for node in nodes}
        left = [node.name for node in model.graph.node if node.op_type in PRODUCTS and node.name not in taken]

        def make(folder: Path) -> None:
            quantize_dynamic(
                model,
                folder / "model.onnx",
                op_types_to_quantize=["MatMul", "Gemm", "LSTM"],
                nodes_to_exclude=left,
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )

        model = _made(make)
    return _dequantised(model, gated, 8), said


def _weights(model: Any, products: Mapping[str, list[Any]], net: nn.Module, change: Mapping[str, Any]) -> Any:
    """At 4 bits, packed integers for linear layers; else integers that are made into numbers again."""
    bits, block = change["bits"], change["block"]
    blocks = {p for p in products if block is not None and isinstance(net.get_submodule(p), nn.Linear)}
    for path in sorted(blocks):
        for node in products[path]:
            _packed(model, node.name, _weight(net, path), bits, block)
    return _dequantised(model, {path: nodes for path, nodes in products.items() if path not in blocks}, bits)


def _packed(model: Any, name: str, weight: Tensor, bits: int, block: int) -> None:
    """A linear layer's product as `MatMulNBits`: blocks of unsigned integers, two of 4 bits in a byte."""
    from onnx import helper, numpy_helper

    whole, step = grid.integers(weight, bits, block)
    unsigned = (whole.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).numpy()
    if bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    node = next(node for node in model.graph.node if node.name == name)
    made = [f"{name}_{what}" for what in ("integers", "steps", "product")]
    tensors = (np.ascontiguousarray(unsigned), step.float().squeeze(-1).numpy())
    model.graph.initializer.extend(numpy_helper.from_array(t, n) for t, n in zip(tensors, made, strict=False))
    given, output, bias = node.input[0], node.output[0], node.input[2] if len(node.input) > 2 else None
    sizes: dict[str, Any] = {"K": weight.shape[1], "N": weight.shape[0], "bits": bits, "block_size": block}
    ends = [made[2] if bias else output]
    new = [helper.make_node("MatMulNBits", [given, *made[:2]], ends, f"{name}_packed", domain=MICROSOFT, **sizes)]
    if bias:
        new.append(helper.make_node("Add", [made[2], bias], [output], f"{name}_bias"))
    _put(model, {name: new}, instead=True)
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _dequantised(model: Any, products: Mapping[str, list[Any]], bits: int) -> Any:
    """In front of each weight of these nodes, its integers and their step for each output."""
    from onnx import TensorProto, helper, numpy_helper

    held = {tensor.name: tensor for tensor in model.graph.initializer}
    made: dict[str, str] = {}
    front: dict[str, list[Any]] = {}
    for name in [node.name for nodes in products.values() for node in nodes]:
        node = next(node for node in model.graph.node if node.name == name)
        recurrent = node.op_type in ("LSTM", "GRU")
        for place in (1, 2) if recurrent else (1,):
            weight = node.input[place]
            if weight not in made:
                values = torch.from_numpy(numpy_helper.to_array(held[weight]).copy())
                turned = not recurrent and not _transposed(node)
                rows = values.flatten(0, 1) if recurrent else values.T if turned else values
                whole, step = grid.integers(rows, bits)
                flat = (whole.T if turned else whole.view(rows.shape)).contiguous().numpy()
                names = [f"{weight}_{what}" for what in ("integers", "step", "numbers", "shape", "laid")]
                model.graph.initializer.extend(
                    [
                        helper.make_tensor(names[0], TensorProto.INT4, flat.shape, flat.flatten())
                        if bits == 4
                        else numpy_helper.from_array(flat, names[0]),
                        numpy_helper.from_array(step.float().flatten().numpy(), names[1]),
                    ]
                )
                axis = 1 if turned else 0
                new = [helper.make_node("DequantizeLinear", names[:2], [names[2]], names[2], axis=axis)]
                if recurrent:  # of each direction
                    model.graph.initializer.append(numpy_helper.from_array(np.array(values.shape, np.int64), names[3]))
                    new.append(helper.make_node("Reshape", [names[2], names[3]], [names[4]], names[4]))
                front.setdefault(name, []).extend(new)
                made[weight] = names[4] if recurrent else names[2]
            node.input[place] = made[weight]
    return _put(model, front)


def _put(model: Any, new: Mapping[str, Sequence[Any]], instead: bool = False) -> Any:
    """The model with nodes before, or in the place of, those named; what nothing reads any more is left out."""
    import onnx

    nodes: list[Any] = []
    for node in model.graph.node:
        nodes += new.get(node.name, ())
        if not (instead and node.name in new):
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | {one.name for one in model.graph.output}
    kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in model.graph.initializer if t.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _made(make: Any) -> Any:
    """What a quantiser that writes a file wrote."""
    import onnx

    with tempfile.TemporaryDirectory() as folder, quiet():
        make(Path(folder))
        model = onnx.load(Path(folder) / "model.onnx")
    return bare(model)


def _weight(net: nn.Module, path: str) -> Tensor:
    module = net.get_submodule(path)
    assert not isinstance(module, RECURRENT)
    return torch.as_tensor(module.weight).detach().cpu().float()


def _transposed(node: Any) -> bool:
    """Whether a product's weight has its outputs first."""
    return node.op_type == "Conv" or any(one.name == "transB" and one.i == 1 for one in node.attribute)


class _Reader:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.cpu().float().numpy()}
