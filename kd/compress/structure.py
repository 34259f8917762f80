"""What compression made of a net's structure, as plain data, and the same made of a fresh net before its weights come.

A structure is a list of changes in the order they were made:

    {"kind": "pruned", "modules": {"conv1": {"out_channels": 12}}, "tensors": {"conv1.weight": [12, 3, 3, 3]}}
    {"kind": "lowrank", "layers": {"dense.0": {"form": "svd", "rank": 7}}}
    {"kind": "masked", "tensors": {"conv1.weight": "2:4", "dense.0.weight": null}}
    {"kind": "folded", "norms": {"bn1": "conv1"}}
    {"kind": "graft", "at": "layer3", "without": ["fc"], "tail": […]}                      (kd.models.graft)
    {"kind": "quantized", "how": "static", "bits": 8, "block": null, "layers": {"conv1": {"step": 0.0157, "zero": 0}}}

A mask changes no shape: it is where these weights are 0, and training keeps them so. A folded norm is in the layer
before it; a quantised layer computes as its integers will, on weights that are moved to their values already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.compress.folding import refold
from kd.compress.lowrank import FORMS, factors
from kd.compress.quantize import restore
from kd.errors import KDError, nearest

Change = dict[str, Any]
# What a layer knows of its own widths: torch's layers, and the attention of timm.
WIDTHS: tuple[str, ...] = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features")
WIDTHS += ("num_channels", "num_groups", "normalized_shape", "num_heads", "head_dim", "attn_dim")
WIDTHS += ("input_size", "hidden_size", "num_attention_heads", "all_head_size")
SCALES = ("scale",)  # of a product of queries and keys


def difference(before: nn.Module, after: nn.Module) -> Change:
    """What pruning changed, as a `pruned` change: widths of layers and shapes of tensors, by their paths.

    >>> wide, narrow = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 1))
    >>> difference(wide, narrow)["modules"], difference(wide, narrow)["tensors"]["0.weight"]
    ({'0': {'out_features': 1}}, [1, 2])
    """
    old, new = dict(before.named_modules()), dict(after.named_modules())
    modules = {path: found for path, module in new.items() if (found := _widths(old[path], module))}
    shapes = {name: value.shape for name, value in before.state_dict().items()}
    tensors = {n: list(v.shape) for n, v in after.state_dict().items() if v.shape != shapes[n]}
    return {"kind": "pruned", "modules": modules, "tensors": tensors}


def _widths(old: nn.Module, new: nn.Module) -> dict[str, Any]:
    found = {}
    for name in (*WIDTHS, *SCALES):
        before, after = vars(old).get(name), vars(new).get(name)
        if after is not None and before != after:
            found[name] = list(after) if isinstance(after, tuple) else after
    return found


def rebuild(net: nn.Module, structure: Sequence[Mapping[str, Any]]) -> nn.Module:
    """The net with each change made of it again, in place; its weights have the right shapes and no meaning.

    Args:
        net: fresh, as it was before the first change.
        structure: the changes, plain data that may come from anywhere.

    Raises:
        KDError: if a change does not fit this net.

    >>> change = {"kind": "lowrank", "layers": {"0": {"form": "svd", "rank": 2}}}
    >>> net = rebuild(nn.Sequential(nn.Linear(8, 8)), [change])
    >>> [tuple(p.shape) for p in net.parameters()]
    [(2, 8), (8, 2), (8,)]
    """
    for change in structure:
        kind = change.get("kind") if isinstance(change, Mapping) else None
        if kind == "pruned":
            _prune(net, change)
        elif kind == "lowrank":
            for path, how in _mapping(change, "layers").items():
                if not isinstance(how, Mapping) or how.get("form") not in FORMS:
                    raise KDError(f"the structure's form of {path} is {how!r}, and none of {', '.join(FORMS)}")
                replace(net, path, factors(module_at(net, path), how["form"], how.get("rank")))
        elif kind == "masked":
            if unknown := sorted(_mapping(change, "tensors").keys() - dict(net.named_parameters()).keys()):
                raise KDError(f"the structure masks {unknown[0]!r}, which {type(net).__name__} has not")
        elif kind == "folded":
            refold(net, _mapping(change, "norms"))
        elif kind == "quantized":
            restore(net, change)
        else:
            raise KDError(f"the structure holds {change!r}, which is no change that this kd knows")
    return net


def _prune(net: nn.Module, change: Mapping[str, Any]) -> None:
    for path, widths in _mapping(change, "modules").items():
        module = module_at(net, path)
        for name, value in widths.items() if isinstance(widths, Mapping) else [("", None)]:
            old = vars(module).get(name)
            if name not in (*WIDTHS, *SCALES) or old is None:
                raise KDError(f"the structure sets {name!r} of {path}, which a {type(module).__name__} has not")
            numbers = value if isinstance(value, list) else [value]
            if isinstance(old, tuple) != isinstance(value, list) or not all(_sound(name, n) for n in numbers):
                raise KDError(f"the structure sets {name} of {path} to {value!r}, which is no width")
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
    state = net.state_dict(keep_vars=True)
    made: dict[int, Tensor] = {}
    for name, shape in _mapping(change, "tensors").items():
        old = state.get(name)
        sound = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
        fits = old is not None and sound and len(shape) == old.ndim
        if old is None or not fits or any(new > side for new, side in zip(shape, old.shape, strict=True)):
            raise KDError(
                f"the structure gives {name} the shape {shape!r}; "
                + (f"it was {tuple(old.shape)}, and pruning only shrinks" if old is not None else "there is none")
            )
        owner, _, last = name.rpartition(".")
        if id(old) not in made:  # one tensor may stand under several names
            empty = torch.zeros(shape, dtype=old.dtype, device=old.device)
            made[id(old)] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
        setattr(module_at(net, owner), last, made[id(old)])


def _sound(name: str, value: Any) -> bool:
    return (type(value) is int and value > 0) or (name in SCALES and type(value) is float and value > 0)


def module_at(net: nn.Module, path: str) -> nn.Module:
    """The layer at a path of `named_modules`.

    Raises:
        KDError: if there is none.
    """
    try:
        return net.get_submodule(path)
    except AttributeError as error:
        known = [name for name, _ in net.named_modules()]
        raise KDError(f"{path!r} is no layer of {type(net).__name__}{nearest(path, known)}") from error


def replace(net: nn.Module, path: str, new: nn.Module) -> None:
    """Put another layer where one stands; its path now names the new one."""
    owner, _, last = path.rpartition(".")
    parent = module_at(net, owner)
    new.train(parent._modules[last].training)  # type: ignore[union-attr]
    parent._modules[last] = new


def masked(structure: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """The weights whose zeros training keeps, with their pattern: those masked, and not factorised since.

    >>> masked([{"kind": "masked", "tensors": {"a.weight": None, "b.weight": "2:4"}},
    ...         {"kind": "lowrank", "layers": {"a": {"form": "svd", "rank": 1}}}])
    {'b.weight': '2:4'}
    >>> masked([{"kind": "masked", "tensors": {"a.weight": None, "fc.weight": None}},
    ...         {"kind": "graft", "at": "a", "without": ["fc"], "tail": []}])
    {'trunk.a.weight': None}
    """
    found: dict[str, str | None] = {}
    for change in structure:
        if change["kind"] == "masked":
            found |= change["tensors"]
        elif change["kind"] == "lowrank":
            found = {name: how for name, how in found.items() if name.rpartition(".")[0] not in change["layers"]}
        elif change["kind"] == "graft":  # what is left of the net has other names
            gone = tuple(f"{path}." for path in change["without"])
            found = {f"trunk.{name}": how for name, how in found.items() if not name.startswith(gone)}
        elif change["kind"] == "pruned":  # a pattern counts inputs, and these are other ones now
            found = {name: None if name in change["tensors"] else how for name, how in found.items()}
    return found


def _mapping(change: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = change.get(name)
    if not isinstance(found, Mapping) or not all(isinstance(path, str) for path in found):
        raise KDError(f"the structure's {name} are {found!r}, which is no mapping of paths")
    return found
