"""Units of recurrent layers: a GRU, LSTM or RNN made narrower in each layer and direction, to the bit.

A unit whose gates have no weights and no biases gives 0 at every step, in all three kinds of cells, so it can go with
the columns that hear it. Each layer and direction loses as many of its own least important units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd.compress.sites import Site, Touch


class Cut(torch.autograd.Function):
    """What a recurrent layer gives, linked to what it got as if by one operation: its inside is not traced."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The outputs."""
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        """Nothing: the graph is looked at, and never run."""
        return None, None


class Shell(nn.Module):
    """Stands for a layer that must not be looked into while a net is traced."""

    inner: Any

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "inner", inner)  # no child: its weights stay the net's
        self.widths = (0, 0)

    def forward(self, inputs: Tensor, *state: Any) -> Any:
        """What the layer gives, cut off behind it; of a recurrent layer the outputs, and the state as it is."""
        with torch.no_grad():
            found = self.inner(inputs, *state)
        outputs, *rest = found if isinstance(found, tuple) else (found,)
        dim = -1 if isinstance(self.inner, nn.RNNBase) else 1
        self.widths = inputs.shape[dim], outputs.shape[dim]
        # A layer that hears the net's inputs would leave no trace without a gradient to ask for.
        linked = Cut.apply(inputs if inputs.requires_grad else inputs.detach().requires_grad_(), outputs)
        return (linked, *rest) if isinstance(found, tuple) else linked


@contextmanager
def shells(net: nn.Module, others: Sequence[str] = ()) -> Iterator[dict[str, Shell]]:
    """The net with each recurrent layer, and some others, inside a shell, by path; afterwards as it was.

    >>> net = nn.Sequential(nn.GRU(2, 3))
    >>> with shells(net) as found:
    ...     list(found), type(net[0]).__name__
    (['0'], 'Shell')
    >>> type(net[0]).__name__
    'GRU'
    """
    put = []
    found = {}
    for path, module in list(net.named_modules()):
        if path and (isinstance(module, nn.RNNBase) or path in others):
            owner, _, last = path.rpartition(".")
            parent = net.get_submodule(owner)
            found[path] = Shell(module)
            parent._modules[last] = found[path]
            put.append((parent, last, module))
    try:
        yield found
    finally:
        for parent, last, module in put:
            parent._modules[last] = module


def unit_touches(module: nn.RNNBase, path: str, outputs: Mapping[tuple[str, str], Tensor]) -> Site | str:
    """The units of a recurrent layer as a site, without an order yet; or why they are none.

    Args:
        module: the layer.
        path: of it.
        outputs: what hears it: for each layer and side, the output (0 to D * H - 1) that each index belongs to.
    """
    if module.proj_size:
        return "an LSTM with a projection stays whole"
    units, directions = module.hidden_size, 1 + module.bidirectional
    here = [
        Touch(path, f"unit{layer}.{direction}", torch.arange(units))
        for layer in range(module.num_layers)
        for direction in range(directions)
    ]
    there = [Touch(place, side, owner) for (place, side), owner in outputs.items()]
    sizes = torch.full((units,), directions * module.num_layers)
    return Site(path, "units", units, [*here, *there], sizes=sizes, tag=type(module).__name__)


def ranked(site: Site, module: nn.RNNBase, scores: Mapping[str, Tensor]) -> Site:
    """The site with its slots in the order of importance: slot k is the k-th least unit of each layer and direction.

    Args:
        site: of `unit_touches`.
        module: the layer.
        scores: of each unit, by `unit0.0`, ….
    """
    units = module.hidden_size
    order = {side: score.argsort(stable=True) for side, score in scores.items()}
    place = {side: torch.empty_like(o).scatter_(0, o, torch.arange(units)) for side, o in order.items()}
    last = torch.cat([place[f"unit{module.num_layers - 1}.{d}"] for d in range(1 + module.bidirectional)])
    touches = []
    for touch in site.touches:
        if touch.path == site.path and touch.side in place:
            touches.append(Touch(touch.path, touch.side, place[touch.side]))
        else:
            owner = torch.where(touch.owner < 0, touch.owner, last[touch.owner.clamp(min=0)])
            touches.append(Touch(touch.path, touch.side, owner))
    found = torch.stack([scores[side][o] for side, o in order.items()]).mean(dim=0)
    return replace(site, touches=touches, scores=found)


def unit_scores(module: nn.RNNBase, by: str, gradients: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The importance of each unit of each layer and direction: of the rows of its gates.

    Args:
        module: the layer.
        by: `taylor` (|weight x gradient|), else the squares of the weights.
        gradients: by the names of the layer's parameters.
    """
    units, found = module.hidden_size, {}
    for layer in range(module.num_layers):
        for direction in range(1 + module.bidirectional):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            total = torch.zeros(units)
            for name in ("weight_ih", "weight_hh"):
                value = getattr(module, name + suffix).detach()
                weighed = (value * gradients[name + suffix]).abs() if by == "taylor" and gradients else value**2
                total += weighed.view(-1, units, value.shape[1]).sum(dim=(0, 2)).cpu()
            found[f"unit{layer}.{direction}"] = total
    return found
