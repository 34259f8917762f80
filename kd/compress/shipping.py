"""What goes with a model's file to where it is used: how its input is made, and a script that does so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd.compress.export import INPUT, OUTPUT, UNPACK

PREPROCESSING, SCRIPT = "preprocessing.json", "run.py"


def preprocessing(recipe: Mapping[str, Any], side: int | None = None, unpack: bool = False) -> dict[str, Any]:
    """How an image becomes what the file takes: plain data.

    An image's centre square is brought to `side` pixels (bilinear), of these the middle `size` are taken, as numbers in
    [0, 1] less `mean`, over `std`, channels first.

    Args:
        recipe: of the network, as `kd.models.files` keeps it.
        side: pixels before the crop; None: as many as after it.
        unpack: whether the file is to be opened with its integers made into numbers.

    >>> found = preprocessing({"in_chans": 1, "size": 8, "mean": [0.3], "std": [0.4], "classes": ["a", "b"]})
    >>> found["mode"], found["side"], found["classes"], found["session"]
    ('L', 8, ['a', 'b'], [])
    """
    return {
        "input": INPUT,
        "output": OUTPUT,
        "mode": "L" if recipe["in_chans"] == 1 else "RGB",
        "channels": recipe["in_chans"],
        "side": side or recipe["size"],
        "size": recipe["size"],
        "mean": _each(recipe["mean"], recipe["in_chans"]),
        "std": _each(recipe["std"], recipe["in_chans"]),
        "layout": "NCHW",
        "classes": list(recipe.get("classes") or map(str, range(recipe["num_classes"]))),
        "session": [list(UNPACK)] if unpack else [],
    }


def _each(values: Sequence[float], channels: int) -> list[float]:
    return list(values) * (channels if len(values) == 1 else 1)


_HEAD = '''"""python run.py IMAGE: the classes that {file} sees in an image, the likeliest first. Needs {needs}."""
import json, pathlib, sys
{imports}

here, p = pathlib.Path(__file__).parent, json.loads((pathlib.Path(__file__).parent / "preprocessing.json").read_text())
image = Image.open(sys.argv[1]).convert(p["mode"])
(w, h), n, cut = image.size, min(image.size), slice((p["side"] - p["size"]) // 2, (p["side"] + p["size"]) // 2)
box = ((w - n) / 2, (h - n) / 2, (w + n) / 2, (h + n) / 2)
pixels = np.asarray(image.resize((p["side"], p["side"]), Image.Resampling.BILINEAR, box), np.float32)[cut, cut] / 255
images = ((pixels.reshape(p["size"], p["size"], -1) - np.float32(p["mean"])) / np.float32(p["std"])).transpose(2, 0, 1)
'''
_ONNX = """options = onnxruntime.SessionOptions()
for entry in p["session"]: options.add_session_config_entry(*entry)
logits = onnxruntime.InferenceSession(here / "model.onnx", options).run([p["output"]], {p["input"]: images[None]})[0][0]
"""
_PT2 = """logits = torch.export.load(here / "model.pt2").module()(torch.from_numpy(images[None])).detach().numpy()[0]
"""
_PTE = """program = runtime.Runtime.get().load_program(here / "model.pte")
logits = program.load_method("forward").execute([torch.from_numpy(np.ascontiguousarray(images[None]))])[0].numpy()[0]
"""
_TAIL = """shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
for i in np.argsort(-logits)[:5]: print(f"{p['classes'][i]}: {shares[i]:.4f}")
"""


def script(form: str) -> str:
    """A program that runs the file on an image, with nothing of this package.

    >>> "onnxruntime" in script("onnx"), "torch" in script("onnx"), "torch" in script("pt2")
    (True, False, True)
    """
    needs, body = {"onnx": ("onnxruntime", _ONNX), "pt2": ("torch", _PT2), "pte": ("executorch", _PTE)}[form]
    lines = ["import numpy as np", "import torch" if form == "pte" else f"import {needs}", "from PIL import Image"]
    lines += ["from executorch import runtime"] if form == "pte" else []
    imports = "\n".join(lines)
    return _HEAD.format(file=f"model.{form}", needs=f"{needs}, numpy and pillow", imports=imports) + body + _TAIL
