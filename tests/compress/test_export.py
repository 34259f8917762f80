"""Files: they give what the net gives, for any number of images, in the same bytes each time."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd.compress.export import answer, needs, quiet, session, shortened, to_onnx, to_pt2, told
from kd.compress.integers import to_integers
from kd.compress.measure import file_bytes, looking
from kd.compress.quantize import begin, candidates, finish, ranges_of
from kd.errors import InputError, KDError
from kd.models import create

SHAPE = (1, 8, 8)
IMAGES = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return create("seed_cnn_small", num_classes=10, in_chans=1, size=8).eval()


def quantised(how: str = "static", bits: int = 8, block: int | None = None) -> nn.Module:
    net = small()
    layers = candidates(net, how)[0]
    begin(net, how, bits, block, {path: ranges_of(net, layers, [IMAGES])[path] for path in layers})
    finish(net)
    return net.eval()


def test_onnx_gives_what_the_net_gives_for_any_number_of_images_and_knows_its_layers() -> None:
    net = small()
    modules = {path: type(module) for path, module in net.named_modules()}
    model, places = to_onnx(net, SHAPE)
    opened = session(model.SerializeToString())
    with looking(net):
        for count in (1, 5):
            assert torch.allclose(answer(opened, IMAGES[:count]), net(IMAGES[:count]), atol=1e-5)
    assert {path: type(module) for path, module in net.named_modules()} == modules
    nodes = {node.name: node.op_type for node in model.graph.node}
    assert [nodes[name] for name in places["conv2.0"]] == ["Conv"] and [nodes[n] for n in places["head"]] == ["Gemm"]
    assert told(model)["Conv"] == 3


def test_the_same_net_gives_the_same_bytes_and_none_of_this_machine(tmp_path: Path) -> None:
    first, second = (to_onnx(small(), SHAPE)[0].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    for name in ("a", "b"):
        to_pt2(quantised(), SHAPE, tmp_path / f"{name}.pt2")
    contents = [(tmp_path / f"{name}.pt2").read_bytes() for name in ("a", "b")]
    assert contents[0] == contents[1]
    assert all(word.encode() not in text for word in ("kd/models", sys.prefix) for text in (first, contents[0]))


@pytest.mark.parametrize("how", [None, "static", "dynamic", "weights"])
def test_short_names_leave_a_smaller_file_that_gives_the_same(how: str | None) -> None:
    net, change = small(), {}
    if how is not None:
        layers = candidates(net, how)[0]
        begin(net, how, 8, None, {path: ranges_of(net, layers, [IMAGES])[path] for path in layers})
        change = {"how": how, "bits": 8, "block": None, "layers": finish(net)}
    model, places = to_onnx(net, SHAPE)
    if change:
        model, _ = to_integers(model, places, net, change, [IMAGES])
    full = model.SerializeToString()
    short = shortened(model).SerializeToString()
    assert len(short) < len(full) - 500
    opened = [session(text, unpack=how in ("dynamic", "weights")) for text in (full, short)]
    assert [part.name for part in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    assert torch.equal(answer(opened[0], IMAGES), answer(opened[1], IMAGES))
    contents = [(c.data_type, tuple(c.dims), c.raw_data) for c in model.graph.initializer if c.raw_data]
    assert len(set(contents)) == len(contents)


def test_a_model_with_a_scope_within_keeps_its_names() -> None:
    from onnx import TensorProto, helper

    inner = helper.make_graph(
        [helper.make_node("Identity", ["images"], ["kept"])], "inner", [],
        [helper.make_tensor_value_info("kept", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    node = helper.make_node("If", ["chosen"], ["logits"], name="branch", then_branch=inner, else_branch=inner)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("images", "logits")]
    given = [ends[0], helper.make_tensor_value_info("chosen", TensorProto.BOOL, [1])]
    model = helper.make_model(helper.make_graph([node], "net", given, ends[1:]))
    before = model.SerializeToString()
    assert shortened(model).SerializeToString() == before


@pytest.mark.parametrize(("how", "bits", "block"), [("static", 8, None), ("weights", 4, 16), ("dynamic", 8, None)])
def test_a_program_of_torch_computes_as_the_quantised_net_from_integers(
    how: str, bits: int, block: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = quantised(how, bits, block)
    before = copy.deepcopy(net.state_dict())
    to_pt2(net, SHAPE, tmp_path / "model.pt2")
    assert list(net.state_dict()) == list(before)  # the net is as it was
    monkeypatch.setattr(pickle, "load", None)
    program = torch.export.load(tmp_path / "model.pt2")
    kinds = {str(value.dtype) for value in program.state_dict.values()}
    assert "torch.int8" in kinds
    with looking(net):
        assert torch.allclose(program.module()(IMAGES), net(IMAGES), atol=1e-5)


class Odd(nn.Module):
    """Does what ONNX has no word for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(torch.special.bessel_j0(images).flatten(1))
        return logits


class Torn(Odd):
    """Does one thing or another, as the numbers are."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + 1 if images.sum() > 0 else images)


def test_an_operator_that_the_exporter_lacks_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KDError, match=r"^Odd cannot be written as ONNX: the exporter has no prims.bessel_j0$"):
        to_onnx(Odd(), SHAPE)
    with pytest.raises(KDError, match=r"^Torn cannot be written as ONNX: Could not guard on data-dependent [^\n]*$"):
        to_onnx(Torn(), SHAPE)
    with pytest.raises(KDError, match=r"^Torn cannot be written as torch.export: Could not guard"):
        to_pt2(Torn(), SHAPE, tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists() and capfd.readouterr() == ("", "")


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str) -> object:
        if name in ("onnx", "onnxscript"):
            raise ImportError(name)
        return real(name)

    needs()
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"^export needs onnx, onnxscript: pip install 'kd\[export\]'$"):
        needs()
    with pytest.raises(InputError, match="export needs onnx, onnxscript"):
        to_onnx(small(), SHAPE)


def test_zeros_cost_bytes_until_they_are_packed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10000))
    found = file_bytes(tmp_path / "x")
    assert found["bytes"] == 10000 and found["gzip_bytes"] < 100


def test_quiet_puts_logging_back() -> None:
    import logging

    before = logging.root.manager.disable
    with pytest.raises(ValueError, match="x"), quiet():
        assert logging.root.manager.disable == logging.ERROR
        raise ValueError("x")
    assert logging.root.manager.disable == before
