"""What goes with a file: numbers that are the data's own, and a script that makes the same images of them."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd.compress.export import to_onnx
from kd.compress.shipping import preprocessing, script
from kd.data.augment import augment
from kd.data.readers import decode
from kd.models import create

RECIPE: dict[str, Any] = {
    "in_chans": 3,
    "size": 16,
    "num_classes": 4,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
    "classes": ["a", "b", "c", "d"],
}


def test_one_number_serves_all_channels_and_classes_without_names_have_numbers() -> None:
    found = preprocessing({**RECIPE, "mean": [0.5], "std": [0.2], "classes": None}, unpack=True)
    assert found["mean"] == [0.5] * 3 and found["std"] == [0.2] * 3 and found["classes"] == ["0", "1", "2", "3"]
    assert found["mode"] == "RGB" and found["session"] == [["session.disable_quant_qdq", "1"]]


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_script_is_short_and_needs_nothing_of_this_package(form: str) -> None:
    tree = ast.parse(script(form))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"json", "pathlib", "sys", "numpy", "PIL", {"onnx": "onnxruntime", "pt2": "torch"}[form]}
    body = [node for node in tree.body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(body) <= 12


def test_the_script_sees_an_image_as_the_data_sets_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    net = create("seed_cnn_small", num_classes=4, in_chans=3, size=16).eval()
    (tmp_path / "model.onnx").write_bytes(to_onnx(net, (3, 16, 16))[0].SerializeToString())
    (tmp_path / "preprocessing.json").write_text(json.dumps(preprocessing(RECIPE, side=20)))
    (tmp_path / "run.py").write_text(script("onnx"))
    pixels = np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "image.png")])
    runpy.run_path(str(tmp_path / "run.py"))
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    ours = torch.from_numpy(decode(tmp_path / "image.png", 20, 3))[None]
    ours = augment(ours, "none", 0, torch.tensor([0]), 0, 16)
    mean, std = (torch.tensor(RECIPE[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        shares = net((ours - mean) / std).softmax(dim=1)[0]
    order = shares.argsort(descending=True)
    assert [name for name, _ in lines] == ["abcd"[i] for i in order]
    assert [float(share) for _, share in lines] == pytest.approx([float(shares[i]) for i in order], abs=2e-4)
