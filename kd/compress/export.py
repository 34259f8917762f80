"""A net as a file that runs without this package: ONNX in floating point, and torch's own program (`.pt2`).

What is written is the plain net: normalised images (N, C, H, W) go in under the name `images`, of any number, and its
output comes out as `logits`. The same net gives the same bytes.
"""

from __future__ import annotations

import ast
import copy
import importlib
import io
import itertools
import logging
import re
import string
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.compress import grid
from kd.compress.measure import looking
from kd.compress.quantize import QUANT, Quant, strip
from kd.errors import InputError, KDError

INPUT, OUTPUT = "images", "logits"
OPSET = 21  # the first whose integers may have 4 bits
UNPACK = ("session.disable_quant_qdq", "1")  # of ONNX Runtime
NEEDS = ("onnx", "onnxruntime", "onnxscript")
_NOTES = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "torch_fn",
    "from_node",
)  # paths of this machine, counters
# What an exporter says of torch's own insides, none of which is ours to mend.
_NOISE = (
    r".*_check_is_size will be removed.*",
    r".*The tensor attributes? self\..*_flat_weights.*",
    r".*`isinstance\(treespec, LeafSpec\)`.*",
    r".*LeafSpec.*",
    r"(?:read_text|open_text|read_binary|open_binary) is deprecated\. Use files\(\).*",  # ExecuTorch 1.5
    r"This API is experimental and subject to change without notice.",  # its runtime
)


def needs(modules: Sequence[str] = NEEDS, extra: str = "export") -> None:
    """Refuse to go on without the packages that a file is made with.

    Raises:
        InputError: naming those that are missing, and how to install them.
    """
    missing = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise InputError(f"export needs {', '.join(missing)}: pip install 'kd[{extra}]'")


def to_onnx(net: nn.Module, shape: Sequence[int]) -> tuple[Any, dict[str, list[str]]]:
    """A net in floating point as an ONNX model, and the names of each layer's nodes there, by the layer's path.

    Quantised layers are written as the plain ones that they are, with the weights that they have.

    Args:
        net: the plain net; left as it was found.
        shape: of one image, (C, H, W).

    Raises:
        KDError: if it does something that the exporter lacks.
    """
    needs()
    import onnx

    plain = strip(copy.deepcopy(net)).cpu().float()
    images = torch.zeros(2, *shape)
    with quiet(), looking(plain):
        try:
            program = torch.onnx.export(
                plain,
                (images,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # the exporter raises what it likes
            raise KDError(lacks(type(net).__name__, "ONNX", error)) from error
    assert program is not None
    model: Any = onnx.ModelProto.FromString(program.model_proto.SerializeToString())
    places: dict[str, list[str]] = {}
    for node in model.graph.node:
        told = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
        scopes = ast.literal_eval(told)
        if len(scopes) > 1:
            places.setdefault(str(scopes[-2]), []).append(node.name)
    return bare(model), places


def bare(model: Any) -> Any:
    """The model without what its exporter notes beside it (source lines and paths of this machine), in place."""
    model.producer_name, model.producer_version, model.doc_string = "kd", "", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string, graph.name = "", "net"
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    for function in model.functions:
        for part in (function, *function.node):
            del part.metadata_props[:]
            part.doc_string = ""
    return model


def shortened(model: Any) -> Any:
    """The model with names of a letter or two, no stated shapes within, and equal constants kept once, in place.

    Of a network of a few thousand weights, names are half of the file. What goes in and comes out keeps its name. A
    model with parts that have a scope of their own (`If`, `Loop`, `Scan`) or functions stays as it is.
    """
    graph = model.graph
    if model.functions or any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return model
    names = {part.name: part.name for part in (*graph.input, *graph.output)} | {"": ""}
    letters = (word for count in itertools.count(1) for word in itertools.product(string.ascii_letters, repeat=count))
    held: dict[bytes, str] = {}
    for constant in list(graph.initializer):
        name, constant.name = constant.name, ""
        content = constant.SerializeToString(deterministic=True)
        constant.name = name
        if name in names:
            continue
        if content in held:
            names[name] = held[content]
            graph.initializer.remove(constant)
            continue
        constant.name = names[name] = held[content] = _free(letters, names)
    for node in graph.node:
        node.name = ""
        for given in (node.input, node.output):
            for i, name in enumerate(given):
                if name not in names:
                    names[name] = _free(letters, names)
                given[i] = names[name]
    del graph.value_info[:]
    return model


def _free(words: Iterator[tuple[str, ...]], names: Mapping[str, str]) -> str:
    """The next word that nothing which keeps its name is called."""
    return next(word for word in map("".join, words) if names.get(word) != word)


def to_pt2(net: nn.Module, shape: Sequence[int], path: Path) -> None:
    """Write a net as a program of torch; weights that are quantised are in it as integers.

    Args:
        net: the plain net; left as it was found.
        shape: of one image, (C, H, W).
        path: of the file.

    Raises:
        KDError: if it does something that the exporter lacks.
    """
    plain = as_integers(copy.deepcopy(net)).cpu().float()
    with quiet(), looking(plain):
        try:
            program = torch.export.export(
                plain, (torch.zeros(2, *shape),), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
        except Exception as error:  # as above
            raise KDError(lacks(type(net).__name__, "torch.export", error)) from error
    for node in program.graph.nodes:
        for name in _NOTES:
            node.meta.pop(name, None)
    program.example_inputs = None
    held = io.BytesIO()  # into a file, the archive would bear its name
    torch.export.save(program, held)
    path.write_bytes(held.getvalue())


def as_integers(net: nn.Module) -> nn.Module:
    """The net whose quantised layers hold integers and make their weights of them, in place: for a file, not to train.

    >>> from kd.compress.quantize import begin, finish
    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> begin(net, "weights", 8, None, {"0": None})
    >>> _ = finish(net)
    >>> as_integers(net).state_dict()["0.parametrizations.weight.0.whole"].dtype
    torch.int8
    """
    for module in list(net.modules()):
        quant = vars(module).get("quant")
        if not isinstance(quant, Quant):
            continue
        for name, value in list(module.named_parameters(recurse=False)):
            if value.ndim > 1 and type(module) in QUANT:
                nn.utils.parametrize.register_parametrization(
                    module, name, _Integers(value.detach(), quant.bits, quant.block), unsafe=True
                )
    return net


class _Integers(nn.Module):
    """A weight made of its integers."""

    whole: Tensor
    step: Tensor

    def __init__(self, weight: Tensor, bits: int, block: int | None) -> None:
        super().__init__()
        whole, step = grid.integers(weight, bits, block)
        self.shape, self.count = weight.shape, weight[0].numel()
        self.register_buffer("whole", whole)
        self.register_buffer("step", step)

    def forward(self, nothing: Tensor) -> Tensor:
        """The weight, whatever stands in its place."""
        return (self.whole * self.step).flatten(1)[:, : self.count].reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Nothing is left of the weight itself."""
        return weight.new_zeros(0)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters and quantisers say on the way."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)
        # What cannot be exported is printed, graph and all, before it is raised.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            for text in _NOISE:
                warnings.filterwarnings("ignore", message=text)
            yield
    finally:
        logging.disable(before)


def lacks(net: str, what: str, error: BaseException) -> str:
    """One line that names the operator, or says what the exporter said first.

    >>> lacks("Net", "ONNX", ValueError("Error when translating node %x, target=torch.ops.aten.odd.default"))
    'Net cannot be written as ONNX: the exporter has no aten.odd.default'
    """
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    text = " ".join(str(one) for one in causes)
    if found := re.search(r"OpOverload\(op='([\w.:]+)'|translating node .*?target=torch\.ops\.([\w.]+)", text):
        return f"{net} cannot be written as {what}: the exporter has no {found[1] or found[2]}"
    line = next((one.strip() for one in str(causes[-1]).splitlines() if one.strip()), type(error).__name__)
    return f"{net} cannot be written as {what}: {line[:200]}"


def session(model: bytes | Path, threads: int = 1, unpack: bool = False) -> Any:
    """A session of ONNX Runtime on the CPU.

    Args:
        model: the file, or what stands in it.
        threads: of one operator.
        unpack: make numbers of all integers once, when it is opened: for files whose weights alone are integers, which
            would else be made into numbers at each pass.
    """
    needs(("onnxruntime",))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if unpack:
        options.add_session_config_entry(*UNPACK)
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def answer(opened: Any, images: Tensor) -> Tensor:
    """The logits of a session for normalised images."""
    (found,) = opened.run([OUTPUT], {INPUT: np.ascontiguousarray(images.cpu().float().numpy())})
    return torch.from_numpy(found)


def told(model: Any) -> Mapping[str, int]:
    """How many nodes of each kind an ONNX model has."""
    found: dict[str, int] = {}
    for node in model.graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return dict(sorted(found.items()))
