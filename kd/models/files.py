"""A net on disk: `model.safetensors` and, to build it again, `model.json`. Nothing is ever pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd.compress.structure import rebuild
from kd.errors import KDError
from kd.models.build import Normalised, create
from kd.models.frozen import Frozen
from kd.models.graft import KIND, regrafted

NAME = "model"
WEIGHTS, RECIPE = f"{NAME}.safetensors", f"{NAME}.json"


def plain(net: nn.Module) -> nn.Module:
    """The net inside `Frozen` and `Normalised`: what is saved, tapped and counted.

    >>> inner = nn.Identity()
    >>> plain(Frozen(Normalised(inner, [0.0], [1.0]))) is inner
    True
    """
    while isinstance(net, Frozen | Normalised):
        net = net.module if isinstance(net, Frozen) else net.net
    return net


def save(net: nn.Module, spec: Mapping[str, Any], folder: Path, name: str = NAME) -> None:
    """Write a net's weights and its recipe into a folder.

    Args:
        net: a `Normalised`, whose mean and std are written with it, or a plain net if `spec` holds both.
        spec: `{"model": {"name", "options"}, "num_classes", "in_chans", "size"}`, plain data; further entries stay.
            `structure` is what was made of that model (`kd.compress.structure`, `kd.models.graft`); without, it is as
            built.
        folder: made if it is not there.
        name: of the files, for a folder that holds several nets.

    Raises:
        KDError: if the recipe lacks something or is no plain data.

    >>> import tempfile
    >>> recipe = {"model": {"name": "seed_cnn_small", "options": {}}, "num_classes": 10, "in_chans": 1, "size": 8}
    >>> net = Normalised(create("seed_cnn_small", num_classes=10, in_chans=1, size=8), [0.5], [0.5])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(net, recipe, Path(folder))
    ...     weights_digest(load(Path(folder))) == weights_digest(net)
    True
    """
    recipe = dict(spec)
    if isinstance(net, Normalised):
        recipe |= dict(zip(("mean", "std"), net.statistics, strict=True))
    _checked(recipe, "the recipe to save")
    try:
        text = json.dumps(recipe, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise KDError(f"the recipe to save is no plain data: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, for safetensors refuses tensors that share memory.
    state = {n: v.detach().cpu().contiguous().clone() for n, v in plain(net).state_dict().items()}
    save_file(state, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def load(folder: Path, name: str = NAME) -> Normalised:
    """The net that `save` wrote, in eval mode, on the CPU.

    Args:
        folder: where it lies.
        name: of its files.

    Raises:
        KDError: if files are missing, damaged, or not of one another.
    """
    folder = Path(folder)
    recipe, weights = recipe_of(folder, name), folder / f"{name}.safetensors"
    try:
        stored = load_file(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise KDError(f"no net can be read from {folder}: {str(error).splitlines()[0]}") from error
    model = recipe["model"]
    with torch.random.fork_rng(devices=[]):  # weights are drawn only to be replaced
        net = create(
            model["name"],
            num_classes=recipe["num_classes"],
            in_chans=recipe["in_chans"],
            size=recipe["size"],
            options=model["options"],
        )
        net = _restructured(net, recipe)
    expected, found = _layout(net.state_dict()), _layout(stored)
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise KDError(
            f"{weights} does not hold the weights of {model['name']}: {wrong[0]} is "
            f"{found.get(wrong[0], 'missing')}, expected {expected.get(wrong[0], 'nothing by that name')} "
            f"({len(wrong)} such)"
        )
    net.load_state_dict(stored, strict=True)
    return Normalised(net, recipe["mean"], recipe["std"]).eval()


def _restructured(net: nn.Module, recipe: Mapping[str, Any]) -> nn.Module:
    shape = recipe["in_chans"], recipe["size"], recipe["size"]
    for change in recipe.get("structure", []):
        grafted = isinstance(change, Mapping) and change.get("kind") == KIND
        net = regrafted(net, change, shape) if grafted else rebuild(net, [change])
    return net


def recipe_of(folder: Path, name: str = NAME) -> dict[str, Any]:
    """What the net in a folder is built from: the `spec` that `save` was given, with mean and std.

    Args:
        folder: where it lies.
        name: of its files.

    Raises:
        KDError: if it is missing, damaged, or no recipe.
    """
    try:
        recipe = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KDError(f"no net can be read from {folder}: {str(error).splitlines()[0]}") from error
    _checked(recipe, str(folder / f"{name}.json"))
    found: dict[str, Any] = recipe
    return found


def weights_digest(net: nn.Module) -> str:
    """sha256 of a plain net's state: names, types, shapes and bytes, in the order of the names.

    Wrappers, device and memory layout make no difference.

    >>> weights_digest(nn.Identity())
    'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    """
    digest = hashlib.sha256()
    for name, value in sorted(plain(net).state_dict().items()):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode() + b"\n")
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checked(recipe: Any, where: str) -> None:
    """Refuse what `load` could not build a net from."""
    fields = {"model": dict, "num_classes": int, "in_chans": int, "size": int, "mean": list, "std": list}
    for name, kind in fields.items():
        if not isinstance(recipe, dict) or type(recipe.get(name)) is not kind:
            raise KDError(f"{where} is no recipe of a net: {name!r} is missing or no {kind.__name__}")
    model = recipe["model"]
    if not isinstance(model.get("name"), str) or not isinstance(model.get("options"), dict):
        raise KDError(f"{where} is no recipe of a net: 'model' needs a 'name' and 'options'")
    if not isinstance(recipe.get("structure", []), list):
        raise KDError(f"{where} is no recipe of a net: 'structure' must be a list of changes")
    if not all(type(value) in (int, float) for value in recipe["mean"] + recipe["std"]):
        raise KDError(f"{where} is no recipe of a net: 'mean' and 'std' must be numbers")


def _layout(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {n: f"{str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" for n, v in state.items()}
