"""Programs of ExecuTorch: what they cannot is said without it; with it (`kd[edge]`), they give what the net gives."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kd.compress.edge import fits, program, to_pte
from kd.compress.measure import looking
from kd.compress.quantize import begin, candidates, finish, ranges_of
from kd.compress.shipping import preprocessing, script
from kd.errors import InputError
from kd.models import create

THERE = importlib.util.find_spec("executorch") is not None
SHAPE = (1, 8, 8)
IMAGES = torch.rand(32, *SHAPE, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return create("seed_cnn_small", num_classes=10, in_chans=1, size=8).eval()


@pytest.mark.parametrize(("how", "bits"), [("static", 4), ("weights", 8), ("dynamic", 8)])
def test_integers_that_it_has_no_kernels_for_are_refused(how: str, bits: int) -> None:
    with pytest.raises(InputError, match=rf"quantize.how=static and 8 bits alone, not {how} of {bits}: use"):
        fits(small(), {"how": how, "bits": bits})
    fits(small(), {"how": "static", "bits": 8})
    fits(small(), None)


def test_recurrent_layers_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"would unroll 0, a GRU, step by step: use onnx"):
        fits(nn.Sequential(nn.GRU(2, 2)), None)


@pytest.mark.skipif(THERE, reason="ExecuTorch is there")
def test_without_executorch_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^export needs executorch: pip install 'kd\[edge\]'$"):
        to_pte(small(), SHAPE, tmp_path / "model.pte", None)
    with pytest.raises(InputError, match=r"pip install 'kd\[edge\]'"):
        program(tmp_path / "model.pte")


@pytest.mark.skipif(not THERE, reason="needs kd[edge]")
def test_a_program_gives_what_the_net_gives_in_float_and_with_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    net, path = small(), tmp_path / "model.pte"
    to_pte(net, SHAPE, path, None)
    with looking(net):
        assert torch.allclose(program(path)(IMAGES), net(IMAGES), atol=1e-5)
    layers = [name for name in candidates(net, "static")[0] if name != "conv2.0"]
    ranges: Any = ranges_of(net, layers, [IMAGES])
    begin(net, "static", 8, None, ranges)
    change = {"how": "static", "bits": 8, "block": None, "layers": finish(net)}
    contents = []
    for _ in range(2):
        to_pte(net, SHAPE, path, change, [IMAGES])
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    with looking(net):
        expected, found = net(IMAGES), program(path)(IMAGES)
    assert (found - expected).norm() / expected.norm() < 0.02
    recipe = {"in_chans": 1, "size": 8, "mean": [0.0], "std": [1.0], "num_classes": 10}
    (tmp_path / "preprocessing.json").write_text(json.dumps(preprocessing(recipe)))
    (tmp_path / "run.py").write_text(script("pte"))
    Image.fromarray((IMAGES[0, 0] * 255).numpy().astype(np.uint8)).save(tmp_path / "image.png")
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "image.png")])
    runpy.run_path(str(tmp_path / "run.py"))
    assert capfd.readouterr().out.splitlines()[0].startswith(f"{int(found[0].argmax())}: ")
