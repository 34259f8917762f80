"""A net with a new end: what stands behind one of its layers gives way to layers that come from elsewhere.

So ships a student whose features were taught to be read by its teacher's classifier. On disk a graft is an entry of the
recipe's structure, plain data, and its weights lie beside those of the net:

    {"kind": "graft", "at": "layer3", "without": ["fc"], "tail": [{"_target_": "torch.nn.Conv2d", …}, …]}
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd import names
from kd.compress.measure import looking
from kd.errors import InputError, KDError, nearest
from kd.instantiate import resolve
from kd.models.frozen import Frozen
from kd.models.outline import outline
from kd.models.taps import Layout, _plan, _Tap

KIND = "graft"
_LAYERS = "torch.nn."


class Grafted(nn.Module):
    """A net as far as one of its layers, and other layers behind it.

    What the net has behind that layer is no part of it and takes no time. All else is the net's own, not a copy: where
    that learns, so does this. The net itself stays as it is.

    Args:
        net: the plain net, inside any wrapper.
        at: the layer's name as `Taps` takes it: a path, and behind it perhaps `:input`, `:maps` or `:pooled`.
        tail: what makes logits (N, classes) of what the layer gives, one layer after the other; of those that are
            `Frozen`, the net inside.
        shape: of one image, (C, H, W).

    Raises:
        InputError: if there is no such layer, or it does not run.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    >>> tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> made = Grafted(net, "1", tail, (1, 6, 6))
    >>> made(torch.zeros(2, 1, 6, 6)).shape, sum(p.numel() for p in made.trunk.parameters())
    (torch.Size([2, 3]), 40)
    """

    def __init__(self, net: nn.Module, at: str, tail: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.at = at
        self.steps = _plan(at, dict(net.named_modules()), net)
        self.layout = Layout.of(net)
        self.trunk, self.without = _without_end(net, names.layer(at), shape)
        self.tail = nn.Sequential(*_flat(tail))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (N, C, H, W)."""
        # For this pass alone: the layer is also the net's, and what it gives there is none of ours.
        tap = _Tap(self.at, self.steps, self.layout)
        layer = self.trunk.get_submodule(names.layer(self.at))
        handle = layer.register_forward_pre_hook(tap) if tap.reads_input else layer.register_forward_hook(tap)
        try:
            self.trunk(images)
        finally:
            handle.remove()
        assert tap.output is not None
        logits: Tensor = self.tail(tap.output)
        return logits

    @property
    def change(self) -> dict[str, Any]:
        """What `regrafted` makes the same of the net again.

        Raises:
            InputError: if a layer of the tail is none of torch's own.
        """
        return {"kind": KIND, "at": self.at, "without": list(self.without), "tail": described(self.tail)}


def part_of(net: nn.Module, name: str, shape: Sequence[int]) -> Frozen:
    """A copy of one of a net's layers, frozen, for what else is put into it; gradients go through to that.

    Args:
        net: the plain net, inside any wrapper.
        name: `classifier`, for the layer that gives the logits, or the path of one.
        shape: of one image, (C, H, W).

    Raises:
        InputError: if there is no such layer.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    >>> part_of(net, "classifier", (1, 6, 6)).module
    Linear(in_features=64, out_features=10, bias=True)
    """
    path = outline(net, shape).classifier if name == "classifier" else name
    if path is None:
        raise InputError(
            f"no linear layer gives the logits of {type(net).__name__}; name the path of the layer to read"
        )
    modules = dict(net.named_modules())
    if not path or path not in modules:
        raise InputError(f"{path!r} is no layer of {type(net).__name__}{nearest(path, modules)}")
    return Frozen(copy.deepcopy(modules[path]), through=True)


def regrafted(net: nn.Module, change: Mapping[str, Any], shape: Sequence[int]) -> Grafted:
    """A net with the graft that a recipe names; its weights have the right shapes and no meaning.

    Args:
        net: as it was before.
        change: plain data that may come from anywhere.
        shape: of one image, (C, H, W).

    Raises:
        KDError: if it is no graft, or does not fit this net.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    >>> made = Grafted(net, "0", nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (1, 6, 6))
    >>> regrafted(net, made.change, (1, 6, 6)).tail[1]
    Linear(in_features=64, out_features=3, bias=True)
    """
    at, tail = change.get("at"), change.get("tail")
    try:
        if not isinstance(at, str) or not isinstance(tail, list):
            raise InputError("it names no layer and no tail")
        return Grafted(net, at, nn.Sequential(*map(_layer, tail)), shape)
    except (InputError, TypeError, ValueError, RuntimeError) as error:
        raise KDError(f"the structure's graft is not to be had: {str(error).splitlines()[0]}") from error


def described(tail: nn.Module) -> list[dict[str, Any]]:
    """A chain of torch's layers as plain data, without weights: each with the arguments it was made with.

    Raises:
        InputError: if one of them is no layer of torch.nn, or is made of others.

    >>> described(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Flatten())))
    [{'_target_': 'torch.nn.ReLU', 'inplace': False}, {'_target_': 'torch.nn.Flatten', 'start_dim': 1, 'end_dim': -1}]
    """
    if type(tail) is nn.Sequential:
        return [layer for part in _flat(tail) for layer in described(part)]
    name = type(tail).__name__
    if getattr(nn, name, None) is not type(tail) or list(tail.children()):
        raise InputError(
            f"a {name} cannot stand in a graft, which is stored as layers of torch.nn; name another part, such as a "
            "linear layer or a 1x1 convolution"
        )
    found: dict[str, Any] = {"_target_": f"{_LAYERS}{name}"}
    for argument in inspect.signature(type(tail)).parameters:
        if argument in ("device", "dtype") or not hasattr(tail, argument):
            continue
        value = getattr(tail, argument)
        if argument == "bias":
            value = value is not None and value is not False
        found[argument] = list(value) if isinstance(value, tuple) else value
    return [found]


def _flat(tail: nn.Module) -> list[nn.Module]:
    """The layers of a chain, of chains within it, and what is frozen in it, one after the other."""
    if isinstance(tail, Frozen):
        return _flat(tail.module)
    return [layer for part in tail for layer in _flat(part)] if type(tail) is nn.Sequential else [tail]


def _layer(said: Any) -> nn.Module:
    """A layer of its description."""
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in dict(said).items()}
    target = str(arguments.pop("_target_", None))
    if not target.startswith(_LAYERS):
        raise InputError(f"{target!r} is no layer of torch.nn")
    made: nn.Module = resolve(target)(**arguments)
    return made


class _Absent(nn.Module):
    """In the place of a layer whose result nobody reads: zeros of its shape, so that the net runs on."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], several: bool) -> None:
        super().__init__()
        self.shapes, self.several = shapes, several

    def forward(self, *args: Any, **named: Any) -> Any:
        given = next(value for value in (*args, *named.values()) if isinstance(value, Tensor))
        found = tuple(given.new_zeros((given.shape[0], *shape[1:])) for shape in self.shapes)
        return found if self.several else found[0]


def _without_end(net: nn.Module, cut: str, shape: Sequence[int]) -> tuple[nn.Module, tuple[str, ...]]:
    """The net less the layers that run only after `cut` has, and their paths; those before are its own."""
    order: list[str] = []
    gave: dict[str, Any] = {}

    def before(path: str) -> None:
        order.append(path)

    def after(output: Any, path: str) -> None:
        gave[path] = output
        if path == cut:
            order.append("")  # from here on is behind it

    handles = []
    for path, module in net.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(lambda m, args, path=path: before(path)))
            handles.append(module.register_forward_hook(lambda m, args, output, path=path: after(output, path)))
    first = next(net.parameters(), None)
    try:
        with looking(net):
            net(torch.zeros(1, *shape, device=None if first is None else first.device))
    finally:
        for handle in handles:
            handle.remove()
    if "" not in order:
        raise InputError(f"the layer {cut!r} does not run; choose one that always does")
    behind = set(order[order.index("") :]) - set(order[: order.index("")])
    absent = {path: stand_in for path in behind if (stand_in := _absent(gave.get(path))) is not None}
    outermost = sorted(path for path in absent if not any(path.startswith(f"{other}.") for other in absent))
    return _copied(net, "", absent), tuple(outermost)


def _absent(output: Any) -> _Absent | None:
    several = isinstance(output, tuple | list)
    values = tuple(output) if several else (output,)
    if not values or not all(isinstance(value, Tensor) and value.ndim for value in values):
        return None  # it runs for nothing
    return _Absent(tuple(tuple(value.shape) for value in values), several)


def _copied(module: nn.Module, path: str, absent: Mapping[str, nn.Module]) -> nn.Module:
    """A container that is new where something in it is absent, and the module itself where nothing is."""
    if path in absent:
        return absent[path]
    inside = f"{path}." if path else ""
    if not any(name.startswith(inside) for name in absent):
        return module
    made = type(module).__new__(type(module))
    # Parameters and buffers are one dict for both; hooks are none of the copy's.
    hooks = {name: OrderedDict() for name in ("_forward_hooks", "_forward_pre_hooks")}  # type: ignore[var-annotated]
    made.__dict__ = {**module.__dict__, **hooks, "training": False, "_compiled_call_impl": None}
    children = {
        name: None if child is None else _copied(child, f"{inside}{name}", absent)
        for name, child in module._modules.items()
    }
    made.__dict__["_modules"] = children
    return made
