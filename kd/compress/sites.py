"""Where a net can be made narrower: sites and their slots, what a slot touches, what the net costs without some."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd.compress.measure import looking, macs, watched

CONVS = (nn.modules.conv._ConvNd,)
NORMS = (nn.modules.batchnorm._BatchNorm,)
MIXING = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)  # what they give of a channel needs others


@dataclass(frozen=True)
class Touch:
    """The indices along one side of a layer or parameter that belong to a site's slots.

    Args:
        path: of the module; of the parameter for side `dim…`.
        side: `out`, `in` or `both` (of a depthwise convolution, a norm); `dim0`, … of a bare parameter; `unit0.1` of
            the recurrent layer 0, direction 1.
        owner: int64, the slot that each index belongs to; -1: none.
    """

    path: str
    side: str
    owner: Tensor


@dataclass
class Site:
    """A width that can be cut: a group of coupled channels, the heads of an attention, the units of a recurrent layer.

    Args:
        path: of the layer that makes it.
        kind: `channels`, `heads` or `units`.
        slots: how many there are.
        touches: all that changes with them.
        scores: importance of each slot, once it is known.
        sizes: channels that each slot stands for; 1 each where none are given.
        tag: equal for sites of the same kind of layers.
        macs: multiply-accumulates a slot costs beside those of the layers it touches.
        finish: called with the net and the number of slots removed, after the layers are cut.
    """

    path: str
    kind: str
    slots: int
    touches: list[Touch]
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    sizes: Tensor = field(default_factory=lambda: torch.empty(0))
    tag: str = ""
    macs: float = 0.0
    finish: Callable[[nn.Module, int], None] | None = None

    def __post_init__(self) -> None:
        """One channel a slot, where nothing else is said."""
        if not len(self.sizes):
            self.sizes = torch.ones(self.slots, dtype=torch.int64)

    def removed(self, slots: Tensor) -> dict[tuple[str, str], Tensor]:
        """The indices that go with some slots, for each layer and side."""
        gone = torch.zeros(self.slots + 1, dtype=torch.bool)  # the last is that of no slot
        gone[slots] = True
        return {(t.path, t.side): gone[t.owner].nonzero().flatten() for t in self.touches}


Choice = Mapping[int, Tensor]  # a site's number: its slots that go


def gathered(sites: Sequence[Site], choice: Choice) -> dict[tuple[str, str], Tensor]:
    """All indices that go, for each layer and side."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for number, slots in choice.items():
        for place, indices in sites[number].removed(slots).items():
            found.setdefault(place, []).append(indices)
    return {place: torch.unique(torch.cat(parts)) for place, parts in found.items()}


@torch.no_grad()
def zero(net: nn.Module, sites: Sequence[Site], choice: Choice) -> nn.Module:
    """A copy of the net whose chosen slots give 0: what removing them must equal."""
    made = copy.deepcopy(net)
    for (path, side), gone in gathered(sites, choice).items():
        if side.startswith("dim"):
            made.get_parameter(path).index_fill_(int(side[3:]), gone, 0)
            continue
        module: Any = made.get_submodule(path)
        if side in ("out", "both"):
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if name == "running_mean" or (name in ("weight", "bias") and value.ndim):
                    dim = 1 if name == "weight" and getattr(module, "transposed", False) else 0
                    value.index_fill_(dim, gone, 0)
        elif side.startswith("unit"):
            suffix, units = _direction(side), module.hidden_size
            for name, value in module.named_parameters(recurse=False):
                if name.endswith(suffix):
                    value.index_fill_(0, (gone + units * torch.arange(len(value) // units)[:, None]).flatten(), 0)
    return made


def _direction(side: str) -> str:
    """`unit0.1` -> `_l0_reverse`."""
    layer, _, direction = side.removeprefix("unit").partition(".")
    return f"_l{layer}" + ("_reverse" if direction == "1" else "")


@torch.no_grad()
def cut(net: nn.Module, sites: Sequence[Site], choice: Choice) -> nn.Module:
    """The net without the chosen slots, in place: layers narrower, everything else as it was."""
    places = gathered(sites, choice)
    for (path, side), gone in places.items():
        if not len(gone):
            continue
        if side.startswith("dim"):
            owner, _, last = path.rpartition(".")
            _set(net.get_submodule(owner), last, gone, int(side[3:]))
        elif not side.startswith("unit"):
            _cut_layer(net.get_submodule(path), side, gone)
    for path in dict.fromkeys(path for path, _ in places if isinstance(_module(net, path), nn.RNNBase)):
        _cut_recurrent(net.get_submodule(path), {s: gone for (p, s), gone in places.items() if p == path})
    for number, slots in choice.items():
        if (finish := sites[number].finish) is not None and len(slots):
            finish(net, len(slots))
    return net


def _module(net: nn.Module, path: str) -> nn.Module | None:
    """The module of a path; None for that of a parameter."""
    try:
        return net.get_submodule(path)
    except AttributeError:
        return None


def _set(module: nn.Module, name: str, gone: Tensor, dim: int) -> None:
    """A parameter or buffer without some indices along a dimension."""
    old = getattr(module, name)
    new = old.detach().index_select(dim, _kept(old.shape[dim], gone).to(old.device)).clone()
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _kept(count: int, gone: Tensor) -> Tensor:
    stay = torch.ones(count, dtype=torch.bool)
    stay[gone] = False
    return stay.nonzero().flatten()


def _cut_layer(module: Any, side: str, gone: Tensor) -> None:
    count = len(gone)
    if isinstance(module, nn.RNNBase):
        return  # cut whole, with its units
    if isinstance(module, CONVS):
        outs, ins = (1, 0) if module.transposed else (0, 1)
        grouped = module.groups > 1 and side != "both"
        if side in ("out", "both"):
            # Of a grouped transposed convolution the weights hold the outputs of one group, of another the inputs.
            size = module.out_channels // module.groups
            _set(module, "weight", torch.unique(gone % size) if grouped and module.transposed else gone, outs)
            module.out_channels -= count
            if module.bias is not None:
                _set(module, "bias", gone, 0)
        if side == "both":
            module.in_channels -= count
            module.groups -= count
        if side == "in":
            size = module.in_channels // module.groups
            _set(module, "weight", torch.unique(gone % size) if grouped and not module.transposed else gone, ins)
            module.in_channels -= count
    elif isinstance(module, nn.Linear):
        _set(module, "weight", gone, 0 if side == "out" else 1)
        if side == "out":
            module.out_features -= count
            if module.bias is not None:
                _set(module, "bias", gone, 0)
        else:
            module.in_features -= count
    else:
        for name in ("weight", "bias", "running_mean", "running_var"):
            if isinstance(getattr(module, name, None), Tensor) and getattr(module, name).ndim:
                _set(module, name, gone, 0)
        for name in ("num_features", "num_parameters"):
            if hasattr(module, name):
                setattr(module, name, getattr(module, name) - count)


def _cut_recurrent(module: Any, places: Mapping[str, Tensor]) -> None:
    """Units of each layer and direction go: rows of their gates, columns of what hears them."""
    units, directions = module.hidden_size, 1 + module.bidirectional
    nothing = torch.empty(0, dtype=torch.int64)
    gone = {
        _direction(side): places.get(side, nothing)
        for layer in range(module.num_layers)
        for direction in range(directions)
        for side in [f"unit{layer}.{direction}"]
    }
    for layer in range(module.num_layers):
        below = places.get("in", nothing)
        if layer:
            before = [_direction(f"unit{layer - 1}.{direction}") for direction in range(directions)]
            below = torch.cat([gone[suffix] + number * units for number, suffix in enumerate(before)])
        for direction in range(directions):
            suffix = _direction(f"unit{layer}.{direction}")
            gates = len(getattr(module, f"weight_hh{suffix}")) // units
            rows = (gone[suffix] + units * torch.arange(gates)[:, None]).flatten()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                if hasattr(module, name + suffix):
                    _set(module, name + suffix, rows, 0)
            _set(module, f"weight_hh{suffix}", gone[suffix], 1)
            if len(below):
                _set(module, f"weight_ih{suffix}", below, 1)
    module.hidden_size -= len(next(iter(gone.values())))
    module.input_size -= len(places.get("in", ()))


class Tally:
    """What a net costs when some of its slots are gone, from one count of it whole.

    Args:
        net: whole.
        shape: of one sample.
        sites: what may go.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    >>> site = Site("0", "channels", 6, [Touch("0", "out", torch.arange(6)), Touch("1", "in", torch.arange(6))])
    >>> tally = Tally(net, (4,), [site])
    >>> tally.of({})
    {'macs': 36.0, 'parameters': 44.0, 'channels': 6.0}
    >>> tally.of({0: torch.arange(3)})
    {'macs': 18.0, 'parameters': 23.0, 'channels': 3.0}
    """

    def __init__(self, net: nn.Module, shape: Sequence[int], sites: Sequence[Site]) -> None:
        self.sites = sites
        self.modules = dict(net.named_modules())
        self.sizes = {name: value.shape for name, value in net.named_parameters()}
        self.parameters = sum(value.numel() for value in net.parameters())
        self.total = macs(net, shape)
        self.channels = sum(int(site.sizes.sum()) for site in sites)
        self.macs = _layer_macs(net, shape)

    def of(self, choice: Choice) -> dict[str, float]:
        """Multiply-accumulates of a sample, parameters, and channels of all sites, without these slots."""
        counts: dict[str, dict[str, int]] = {}
        for (path, side), gone in gathered(self.sites, choice).items():
            counts.setdefault(path, {})[side] = len(gone)
        saved, fewer = 0.0, 0.0
        for path, sides in counts.items():
            share, parameters = self._left(path, sides)
            saved += self.macs.get(path, 0) * (1 - share)
            fewer += parameters
        removed = sum(int(self.sites[number].sizes[slots].sum()) for number, slots in choice.items())
        saved += sum(self.sites[number].macs * len(slots) for number, slots in choice.items())
        return {
            "macs": self.total - saved,
            "parameters": self.parameters - fewer,
            "channels": float(self.channels - removed),
        }

    def _left(self, path: str, sides: Mapping[str, int]) -> tuple[float, float]:
        """The share of a layer's products that is left, and the parameters that went."""
        if path not in self.modules:
            ((side, count),) = sides.items()
            shape = self.sizes[path]
            return 1.0, shape.numel() * count / shape[int(side[3:])]
        module: Any = self.modules[path]
        own = {name: value.numel() for name, value in module.named_parameters(recurse=False)}
        if isinstance(module, nn.RNNBase):
            after = _recurrent_weights(module, sides.get("in", 0), sides.get("unit0.0", 0))
            before = _recurrent_weights(module, 0, 0)
            return after[0] / before[0], float(before[1] - after[1])
        out = 1 - (sides.get("out", 0) + sides.get("both", 0)) / _width(module, "out")
        wide = 1 - sides.get("in", 0) / _width(module, "in")
        # An index of a grouped convolution's inputs is a place in one group; the same goes in all of them.
        kept = {name: value * out * (wide if name == "weight" else 1) for name, value in own.items()}
        return out * wide, sum(own.values()) - sum(kept.values())


def _width(module: Any, side: str) -> int:
    names = ("out_channels", "out_features") if side == "out" else ("in_channels", "in_features")
    for name in (*names, "num_features", "num_parameters"):
        if hasattr(module, name):
            return int(getattr(module, name))
    return 1


def _recurrent_weights(module: Any, fewer_inputs: int, fewer_units: int) -> tuple[int, int]:
    """Weights of the gates, which is products a step, and parameters, of a recurrent layer so much narrower."""
    units, directions = module.hidden_size - fewer_units, 1 + module.bidirectional
    gates = len(module.weight_hh_l0) // module.hidden_size
    weights = parameters = 0
    for layer in range(module.num_layers):
        wide = module.input_size - fewer_inputs if layer == 0 else directions * units
        weights += directions * gates * units * (wide + units)
        parameters += directions * 2 * gates * units if module.bias else 0
    return weights, weights + parameters


def _layer_macs(net: nn.Module, shape: Sequence[int]) -> dict[str, float]:
    """Products of each convolution, linear and recurrent layer, for one sample."""
    found: dict[str, float] = {}

    def note(path: str, module: Any, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.RNNBase):
            steps = inputs[0].numel() // inputs[0].shape[-1]
            count = steps * _recurrent_weights(module, 0, 0)[0]
        elif isinstance(module, nn.Linear):
            count = output.numel() * module.in_features
        elif module.transposed:
            count = inputs[0].numel() * module.weight[0].numel()
        else:
            count = output.numel() * module.weight[0].numel()
        found[path] = found.get(path, 0) + count

    watched(net, shape, lambda module: isinstance(module, (*CONVS, nn.Linear, nn.RNNBase)), note)
    return found


def sound(net: nn.Module, sites: Sequence[Site], inputs: Tensor) -> list[int]:
    """The sites that a net can really be cut at: without their slots it gives what it gives with them at 0.

    Tried in double precision, on a copy whose norms and scales are drawn anew: none hides a branch behind zeros.

    Args:
        net: whole.
        sites: as they were found.
        inputs: a batch of two or more.
    """
    subject = drawn(net, inputs)
    inputs = inputs.double()

    def good(numbers: Sequence[int]) -> bool:
        choice = {n: torch.arange(0, sites[n].slots - 1, 3) for n in numbers if sites[n].slots > 1}
        return exact(subject, sites, choice, inputs)

    def search(numbers: list[int]) -> list[int]:
        if not numbers or good(numbers):
            return numbers
        if len(numbers) == 1:
            return []
        half = len(numbers) // 2
        left, right = search(numbers[:half]), search(numbers[half:])
        if good(left + right):
            return left + right
        for number in right:  # each is sound alone, and some of them not beside others
            if good([*left, number]):
                left.append(number)
        return left

    return search([number for number, site in enumerate(sites) if site.slots > 1])


def exact(net: nn.Module, sites: Sequence[Site], choice: Choice, inputs: Tensor, tolerance: float = 1e-8) -> bool:
    """Whether the net without slots gives what it gives with them at 0, relative to the largest output."""
    zeroed = zero(net, sites, choice)
    try:
        narrow = cut(copy.deepcopy(net), sites, choice)
        with looking(zeroed), looking(narrow):
            expected, found = first_tensor(zeroed(inputs)), first_tensor(narrow(inputs))
    except Exception:  # a net that does not fit together raises what it likes
        return False
    if expected.shape != found.shape or not expected.isfinite().all():
        return False
    largest = (expected.amax() - expected.amin()).clamp(min=torch.finfo(expected.dtype).tiny)
    return bool((expected - found).abs().amax() <= tolerance * largest)


def first_tensor(output: Any) -> Tensor:
    """The output, or the first of several."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output


@torch.no_grad()
def drawn(net: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy in double precision whose norms, biases and bare scales hold random numbers away from 0.

    Batch norms hold the statistics of the inputs, so that signals neither die nor grow on their way through.
    """
    made = copy.deepcopy(net).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def between(value: Tensor, low: float, high: float) -> None:
        value.copy_(low + (high - low) * torch.rand(value.shape, generator=generator, dtype=torch.float64))

    for module in made.modules():
        named: Iterable[tuple[str, Tensor]] = [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]
        for name, value in named:
            if not value.is_floating_point():
                continue
            if name == "gamma" or (isinstance(module, (*NORMS, *MIXING)) and name == "weight"):
                between(value, 0.5, 1.5)
            elif value.ndim == 1 and not name.startswith("running_"):
                between(value, -0.5, 0.5)
    norms: list[Any] = [module for module in made.modules() if isinstance(module, NORMS) and module.track_running_stats]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
        norm.train()
    with contextlib.suppress(Exception):  # it is then judged with the statistics it has
        made(inputs.double())
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.eval()
    return made
