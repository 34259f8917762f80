"""Layers that compute as their integers will: the same modules under the same names, so taps and training go on.

A layer is given another class, `QuantConv2d` for a `Conv2d`, which moves what it is given and its weight to the values
that integers can stand for. Weights are signed and symmetric, with a step for each output or block of inputs;
activations are unsigned bytes with one step a tensor. While it learns, gradients pass straight through and ranges
follow the batches; `finish` moves the weights for good, and what is left is plain data (`kd.compress.structure`):

    {"kind": "quantized", "how": "static", "bits": 8, "block": null,
     "layers": {"conv1": {"step": 0.0157, "zero": 0}}, "samples": 256, "seed": 0}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.compress import grid
from kd.compress.lowrank import READERS
from kd.compress.measure import looking
from kd.errors import InputError, KDError, nearest

HOWS = ("static", "dynamic", "weights")
RANGES = ("minmax", "percentile")
TAIL = 1e-4  # of the values at each end that `percentile` cuts off
MOMENTUM = 0.01  # of a batch in the ranges, while training moves them


@dataclass
class Quant:
    """How one layer is quantised.

    Args:
        how: `static`, activations of a known range; `dynamic`, of each batch's own; `weights`, weights alone.
        bits: of a weight.
        block: inputs in a row that share a step; None: all of an output.
        step: of what the layer is given, once it is known.
        zero: the integer that stands for 0 in it.
        ranges: what of a batch its range is, while it is learned; None afterwards.
        active: without, the layer computes in float.
    """

    how: str
    bits: int
    block: int | None = None
    step: float | None = None
    zero: int = 0
    ranges: str | None = None
    active: bool = True


class _Layer(nn.Module):
    """What the quantised layers share; `quant` says how."""

    quant: Quant
    input_low: Tensor
    input_high: Tensor

    def given(self, inputs: Tensor) -> Tensor:
        """The inputs as bytes can hold them."""
        quant = self.quant
        if not quant.active or quant.how == "weights":
            return inputs
        inputs = inputs.float()
        if quant.how == "dynamic":
            return _as_bytes(inputs, *reach(inputs.detach(), "minmax"))
        if quant.ranges is None:
            assert quant.step is not None
            return grid.as_bytes(inputs, quant.step, quant.zero)
        if self.training:
            low, high = reach(inputs.detach(), quant.ranges)
            self.input_low.lerp_(low, MOMENTUM)
            self.input_high.lerp_(high, MOMENTUM)
        return _as_bytes(inputs, self.input_low, self.input_high)

    def moved(self, weight: Tensor) -> Tensor:
        """The weight at values that integers stand for; once it has been moved for good, it is left alone."""
        learning = self.quant.active and self.quant.ranges is not None
        return grid.passed(weight, self.quant.bits, self.quant.block) if learning else weight


class QuantConv1d(_Layer, nn.Conv1d):
    """A `Conv1d` as its integers compute."""

    def forward(self, inputs: Tensor) -> Tensor:
        """As the layer's, of inputs (N, C, L)."""
        output: Tensor = self._conv_forward(self.given(inputs), self.moved(self.weight), self.bias)
        return output


class QuantConv2d(_Layer, nn.Conv2d):
    """A `Conv2d` as its integers compute."""

    def forward(self, inputs: Tensor) -> Tensor:
        """As the layer's, of inputs (N, C, H, W)."""
        output: Tensor = self._conv_forward(self.given(inputs), self.moved(self.weight), self.bias)
        return output


class QuantLinear(_Layer, nn.Linear):
    """A `Linear` as its integers compute."""

    def forward(self, inputs: Tensor) -> Tensor:
        """As the layer's, of inputs (…, features)."""
        return F.linear(self.given(inputs), self.moved(self.weight), self.bias)


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
}
QUANT = {new: old for old, new in PLAIN.items()}
RECURRENT = (nn.LSTM, nn.GRU)  # their weights move when training is over; inside them nothing is simulated


def _as_bytes(inputs: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The inputs at the values that bytes of this range have; the gradient of what lies outside is 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low) / grid.LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return grid.as_bytes(inputs, step, (-low / step).round().clamp(0, grid.LEVELS))


def reach(values: Tensor, ranges: str) -> tuple[Tensor, Tensor]:
    """The range of some values: from the lowest to the highest, or without the outermost 0.01 % at each end.

    >>> reach(torch.arange(20001.0), "percentile")
    (tensor(2.), tensor(19998.))
    """
    flat = values.float().flatten()
    if ranges == "minmax":
        low, high = flat.aminmax()
        return low, high
    cut = math.ceil(TAIL * len(flat))
    return (flat.kthvalue(min(cut, len(flat))).values, flat.kthvalue(max(1, len(flat) + 1 - cut)).values)


def candidates(net: nn.Module, how: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that can be quantised, by path; and those with weights that cannot, with the reason.

    >>> can, cannot = candidates(nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2), nn.ReLU()), "static")
    >>> list(can), cannot
    (['0'], {'1': 'a GRU knows dynamic and weights alone'})
    """
    owners = {path: module for path, module in net.named_modules() if isinstance(module, READERS)}
    uses: dict[int, list[str]] = {}
    for name, value in net.named_parameters(remove_duplicate=False):
        uses.setdefault(id(value), []).append(name.rpartition(".")[0])
    can: dict[str, nn.Module] = {}
    cannot: dict[str, str] = {}
    for path, module in net.named_modules():
        heavy = [value for value in module.parameters(recurse=False) if value.ndim > 1]
        if not path or not heavy:
            continue
        kind = type(module).__name__
        reader = next((name for name in owners if path == name or path.startswith(f"{name}.")), None)
        others = [other for value in heavy for other in uses[id(value)] if net.get_submodule(other) is not module]
        if reader is not None:
            cannot[path] = f"{type(owners[reader]).__name__} reads its weights past it"
        elif others:
            cannot[path] = f"it shares its weight with {others[0]}"
        elif type(module) in PLAIN or type(module) in QUANT:
            can[path] = module
        elif type(module) in RECURRENT:
            if how == "static":
                cannot[path] = f"a {kind} knows dynamic and weights alone"
            else:
                can[path] = module
        else:
            cannot[path] = f"a {kind} is none of the layers that can"
    if how == "dynamic":  # a convolution whose range is looked for in each batch is slower than in float
        for path in [p for p, module in can.items() if isinstance(module, nn.Conv1d | nn.Conv2d)]:
            del can[path]
            cannot[path] = "dynamic is for linear and recurrent layers; a convolution would be slower than in float"
    return can, cannot


def ranges_of(
    net: nn.Module, paths: Iterable[str], batches: Iterable[Tensor], ranges: str = "minmax"
) -> dict[str, tuple[float, float]]:
    """The range of what each layer is given, over batches of what the net takes; none for a layer that does not run.

    `minmax` is the range of all batches, `percentile` the mean of each batch's.

    >>> ranges_of(nn.Sequential(nn.Identity()), ["0"], [torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    {'0': (1.0, 3.0)}
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def before(module: nn.Module, args: Any, path: str) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].numel():
            seen.setdefault(path, []).append(reach(args[0], ranges))

    handles = [
        net.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: before(m, args, path))
        for path in paths
    ]
    try:
        with looking(net):
            for batch in batches:
                net(batch)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, tuple[float, float]] = {}
    for path, pairs in seen.items():
        lows, highs = (torch.stack(column) for column in zip(*pairs, strict=True))
        if ranges == "minmax":
            found[path] = float(lows.min()), float(highs.max())
        else:
            found[path] = float(lows.double().mean()), float(highs.double().mean())
    return found


def begin(
    net: nn.Module,
    how: str,
    bits: int,
    block: int | None,
    layers: Mapping[str, tuple[float, float] | None],
    ranges: str = "minmax",
) -> None:
    """Let the layers compute as their integers will and, in training, learn it; in place.

    Args:
        net: the plain net.
        how: one of `HOWS`.
        bits: 8 or 4; `dynamic` knows 8 alone.
        block: inputs of a linear layer that share a step; None: all of an output.
        layers: by path, with the range of what each is given where `how` is static.
        ranges: what of a batch its range is.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> begin(net, "static", 8, None, {"0": (0.0, 1.0)})
    >>> type(net[0]).__name__, list(net.state_dict())
    ('QuantLinear', ['0.weight', '0.bias', '0.input_low', '0.input_high'])
    """
    for path, known in layers.items():
        module = net.get_submodule(path)
        if isinstance(module, RECURRENT):
            setattr(module, "quant", Quant(how, bits))  # noqa: B010
            continue
        module.__class__ = PLAIN[type(module)]
        own = block if isinstance(module, nn.Linear) else None
        module.quant = Quant(how, bits, own, ranges=ranges)  # type: ignore[assignment]
        if how == "static":
            assert known is not None
            weight = torch.as_tensor(module.weight)
            for name, value in zip(("input_low", "input_high"), known, strict=True):
                module.register_buffer(name, torch.tensor(value, dtype=torch.float32, device=weight.device))


@torch.no_grad()
def finish(net: nn.Module) -> dict[str, dict[str, Any]]:
    """Move the weights for good and fix the ranges; returns what each layer needs to be told again, by path.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> begin(net, "static", 8, None, {"0": (0.0, 255.0)})
    >>> finish(net), list(net.state_dict())
    ({'0': {'step': 1.0, 'zero': 0}}, ['0.weight', '0.bias'])
    """
    found: dict[str, dict[str, Any]] = {}
    for path, module in _quantised(net):
        quant: Quant = module.quant  # type: ignore[assignment]
        for value in module.parameters(recurse=False):
            if value.ndim > 1:
                value.copy_(grid.nearest(value, quant.bits, quant.block))
        if quant.how == "static":
            quant.step, quant.zero = grid.affine(float(module.input_low), float(module.input_high))  # type: ignore[arg-type]
            del module.input_low, module.input_high
        quant.ranges = None
        found[path] = {} if quant.step is None else {"step": quant.step, "zero": quant.zero}
    return found


def restore(net: nn.Module, change: Mapping[str, Any]) -> None:
    """What `finish` left, made of a fresh net whose weights are still to come.

    Raises:
        KDError: if the change does not fit this net.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> restore(net, {"how": "static", "bits": 8, "block": None, "layers": {"0": {"step": 1.0, "zero": 0}}})
    >>> net[0].quant
    Quant(how='static', bits=8, block=None, step=1.0, zero=0, ranges=None, active=True)
    """
    how: Any = change.get("how")
    bits: Any = change.get("bits")
    block, layers = change.get("block"), change.get("layers")
    sound = how in HOWS and bits in grid.BITS and (block is None or (type(block) is int and block > 0))
    if not sound or not isinstance(layers, Mapping):
        raise KDError(f"the structure quantises {how!r} at {bits!r} bits in blocks of {block!r}, which this kd cannot")
    modules = dict(strip(net).named_modules())  # one that is quantised anew is so from its weights
    for path, told in layers.items():
        module = modules.get(path)
        if module is None or type(module) not in (*PLAIN, *RECURRENT):
            raise KDError(f"the structure quantises {path!r}, which is no such layer of {type(net).__name__}")
        step, zero = (told.get(name) for name in ("step", "zero")) if isinstance(told, Mapping) else (None, None)
        if how == "static":
            if type(step) is not float or not 0 < step < math.inf or type(zero) is not int or not 0 <= zero <= 255:
                raise KDError(f"the structure gives {path!r} the step {step!r} and zero {zero!r}, which are none")
        elif told != {}:
            raise KDError(f"the structure tells {path!r} {told!r}, and {how} knows no ranges")
        if type(module) in RECURRENT:
            setattr(module, "quant", Quant(how, bits))  # noqa: B010
            continue
        module.__class__ = PLAIN[type(module)]
        own = block if isinstance(module, nn.Linear) else None
        module.quant = Quant(how, bits, own, step, zero or 0)


def strip(net: nn.Module, paths: Iterable[str] | None = None) -> nn.Module:
    """The net's layers, or some of them, of their own class again, in place, with the weights that they have.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> begin(net, "weights", 8, None, {"0": None})
    >>> type(strip(net)[0]).__name__
    'Linear'
    """
    wanted = None if paths is None else set(paths)
    for path, module in _quantised(net):
        if wanted is not None and path not in wanted:
            continue
        for name in ("input_low", "input_high"):
            module._buffers.pop(name, None)
        del vars(module)["quant"]
        module.__class__ = QUANT.get(type(module), type(module))
    return net


@contextmanager
def only(net: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Within it, of the quantised layers these alone compute as integers do, the others in float.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> begin(net, "weights", 4, None, {"0": None})
    >>> with only(net, []):
    ...     net[0].quant.active
    False
    """
    wanted, layers = set(paths), list(_quantised(net))
    before = [module.quant.active for _, module in layers]  # type: ignore[union-attr]
    try:
        for path, module in layers:
            module.quant.active = path in wanted  # type: ignore[union-attr]
        yield
    finally:
        for (_, module), active in zip(layers, before, strict=True):
            module.quant.active = active  # type: ignore[union-attr]


def _quantised(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from [(path, module) for path, module in net.named_modules() if isinstance(vars(module).get("quant"), Quant)]


def quantised(structure: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The change that quantised a net last, if one did.

    >>> quantised([{"kind": "masked", "tensors": {}}]) is None
    True
    """
    return next((change for change in reversed(structure) if change["kind"] == "quantized"), None)


def described(net: nn.Module) -> dict[str, Any] | None:
    """How a net is quantised, as its layers tell it; None where it is not.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> begin(net, "weights", 4, None, {"0": None})
    >>> described(net)
    {'how': 'weights', 'bits': 4, 'layers': ['0']}
    """
    layers = list(_quantised(net))
    if not layers:
        return None
    quant: Quant = layers[0][1].quant  # type: ignore[assignment]
    return {"how": quant.how, "bits": quant.bits, "layers": [path for path, _ in layers]}


def chosen(net: nn.Module, paths: Sequence[str], where: str) -> set[str]:
    """The layers at and below some paths.

    Raises:
        InputError: if one is no layer.
    """
    modules = dict(net.named_modules())
    for path in paths:
        if path not in modules:
            raise InputError(f"{where}: {path!r} is no layer of {type(net).__name__}{nearest(path, modules)}")
    return {name for name in modules for path in paths if name == path or name.startswith(f"{path}.")}
