"""How thin each layer may become: ranks by energy, by one share for all, or from one purse for the whole net.

The purse is spent where it buys most. Each layer offers what a rank keeps of it for what that rank costs, the layer as
it is being the last offer; the net starts at the cheapest offers and takes the step of the highest gain per cost until
the budget is spent. What is kept is a share of the layer's squared singular values, with its inputs taken into account
where they are known, times the root of its size; or, by sensitivity, what the loss does when it alone is thinner.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.compress.lowrank import factorise, ranks, spectrum, weights
from kd.compress.measure import looking, macs, watched
from kd.compress.structure import replace
from kd.errors import InputError

Layer = nn.Linear | nn.Conv2d
Layers = Mapping[str, tuple[Layer, str]]  # path: the layer and the form it would take
OFS = ("parameters", "macs")
SHRINK = 0.01  # of the mean square of an input, added to each: few samples leave directions unseen
LEVELS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the full rank, at which sensitivity is measured


@dataclass(frozen=True)
class Offer:
    """One rank of one layer, or with None the layer as it is: its price, and what it keeps."""

    rank: Any
    price: float
    kept: float


def offers(
    layers: Layers, prices: Callable[[str, Any], float], roots: Mapping[str, Tensor] | None = None
) -> dict[str, list[Offer]]:
    """Each layer's offers by what they keep of its energy, cheapest first, none dearer than the layer as it is.

    Args:
        layers: of `kd.compress.lowrank.candidates`.
        prices: of a path and a rank; of None as the layer is.
        roots: square roots of the inputs' second moments, for layers of form `svd`.
    """
    found = {}
    for path, (layer, form) in layers.items():
        size = layer.weight.numel() ** 0.5
        if form == "tucker":
            weight = layer.weight.detach().double()
            both = [torch.linalg.svdvals(m.flatten(1)) ** 2 for m in (weight.transpose(0, 1), weight)]
            lost = [1 - values.cumsum(0) / values.sum() for values in both]
            kept = [max(0.0, 1 - float(lost[0][r - 1]) - float(lost[1][s - 1])) for r, s in ranks(layer, form)]
        else:
            values = spectrum(layer, form, None if roots is None else roots.get(path))
            kept = (values.cumsum(0) / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).tolist()
        dense = prices(path, None)
        pairs = zip(ranks(layer, form), kept, strict=True)
        made = [Offer(rank, prices(path, rank), size * share) for rank, share in pairs]
        found[path] = [*(offer for offer in made if offer.price < dense), Offer(None, dense, size)]
    return found


def spend(every: Mapping[str, Sequence[Offer]], goal: float) -> dict[str, Any]:
    """The rank of each layer that keeps most for no more than the goal; None: the layer as it is.

    Args:
        every: each layer's offers, cheapest first.
        goal: what all of them may cost together.

    Raises:
        InputError: if the cheapest cost more.

    >>> spend({"a": [Offer(1, 1, 0.5), Offer(2, 2, 0.9)], "b": [Offer(1, 1, 0.1), Offer(2, 2, 0.2)]}, 3)
    {'a': 2, 'b': 1}
    """
    paths = {path: _hull(list(each)) for path, each in every.items()}
    at = dict.fromkeys(paths, 0)
    taken = {path: each[0] for path, each in paths.items()}
    left = goal - sum(offer.price for offer in taken.values())
    if left < 0:
        raise _short(goal - left, goal)
    queue: list[tuple[float, str, int]] = []

    def push(path: str) -> None:
        now, after = paths[path][at[path]], at[path] + 1
        if after < len(paths[path]):
            step = paths[path][after]
            heapq.heappush(queue, (-(step.kept - now.kept) / (step.price - now.price), path, after))

    for path in paths:
        push(path)
    while queue:
        _, path, after = heapq.heappop(queue)
        now, step = taken[path], paths[path][after]
        if step.price - now.price <= left:
            at[path] = after
            push(path)
        else:
            # Too large a step for what is left: the best that fits is the layer's last.
            step = max((o for o in every[path] if o.price - now.price <= left), key=lambda o: o.kept, default=now)
            step = step if step.kept > now.kept else now
        left -= step.price - now.price
        taken[path] = step
    return {path: offer.rank for path, offer in taken.items()}


def _hull(each: list[Offer]) -> list[Offer]:
    """The offers on the upper hull: none that another is as good as for less, none below a mix of two others."""
    found: list[Offer] = []
    for offer in sorted(each, key=lambda one: (one.price, -one.kept)):
        if found and offer.kept <= found[-1].kept:
            continue
        while len(found) > 1 and (found[-1].kept - found[-2].kept) * (offer.price - found[-1].price) <= (
            offer.kept - found[-1].kept
        ) * (found[-1].price - found[-2].price):
            found.pop()
        found.append(offer)
    return found


def uniform(layers: Layers, prices: Callable[[str, Any], float], goal: float) -> dict[str, Any]:
    """The largest share of the full rank, one for all layers, that costs no more than the goal; None: as it is.

    Raises:
        InputError: if even rank 1 costs more.
    """
    whole = {path: ranks(layer, form) for path, (layer, form) in layers.items()}

    def at(share: float) -> dict[str, Any]:
        chosen = {path: each[max(0, round(share * len(each)) - 1)] for path, each in whole.items()}
        return {path: rank if prices(path, rank) < prices(path, None) else None for path, rank in chosen.items()}

    steps = 1000
    for step in range(steps, -1, -1):
        chosen = at(step / steps)
        if sum(prices(path, rank) for path, rank in chosen.items()) <= goal:
            return chosen
    least = sum(prices(path, rank) for path, rank in at(0).items())
    raise _short(least, goal)


def _short(least: float, goal: float) -> InputError:
    return InputError(f"even rank 1 of every layer costs {least:.0f}, and the budget leaves {max(goal, 0):.0f}")


class Prices:
    """What a net's layers cost at each rank, in parameters or in multiply-accumulates of one sample.

    Args:
        net: as it is.
        layers: what may become thinner.
        of: one of `OFS`.
        shape: of one sample.

    >>> net = nn.Sequential(nn.Linear(10, 20))
    >>> prices = Prices(net, {"0": (net[0], "svd")}, "parameters", (10,))
    >>> prices("0", 2), prices("0", None), prices.rest
    (60.0, 200.0, 20.0)
    """

    def __init__(self, net: nn.Module, layers: Layers, of: str, shape: Sequence[int]) -> None:
        self.layers, self.of = layers, of
        self.places = _places(net, shape) if of == "macs" else {}
        self.total = float(macs(net, shape) if of == "macs" else sum(p.numel() for p in net.parameters()))
        self.rest = self.total - sum(self(path, None) for path in layers)  # what no rank changes

    def __call__(self, path: str, rank: Any) -> float:
        """The price of a layer at a rank; None: as it is."""
        layer, form = self.layers[path]
        if self.of == "parameters":
            return float(layer.weight.numel() if rank is None else weights(layer, form, rank))
        before, after = self.places[path]
        if rank is None:
            return float(layer.weight.numel() * after[0] * after[1])
        out, wide = layer.weight.shape[:2]
        if form == "spatial":
            high, broad = layer.weight.shape[2:]
            return float(rank * (wide * high * after[0] * before[1] + out * broad * after[0] * after[1]))
        if form == "tucker":
            core = rank[0] * rank[1] * layer.weight[0, 0].numel() + rank[1] * out
            return float(wide * rank[0] * before[0] * before[1] + core * after[0] * after[1])
        return float(weights(layer, form, rank) * after[0] * after[1])


def _places(net: nn.Module, shape: Sequence[int]) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Height and width of what goes into each layer and comes out; of linear layers the number of vectors and 1."""
    found: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}

    def note(path: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            count = output.numel() // output.shape[-1]
            found[path] = (count, 1), (count, 1)
        else:
            sides = [(int(t.shape[-2]), int(t.shape[-1])) for t in (inputs[0], output)]
            found[path] = sides[0], sides[1]

    watched(net, shape, lambda module: isinstance(module, nn.Linear | nn.Conv2d), note)
    return found


@torch.no_grad()
def moments(net: nn.Module, layers: Layers, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """For each layer of form `svd` a lower triangular R with R R^T = E[x x^T] of its inputs on some samples.

    Inputs of a convolution are what its kernel covers. A part of the mean square is added to each input, so that R can
    be inverted.

    Args:
        net: in any mode; is not changed.
        layers: of `kd.compress.lowrank.candidates`.
        batches: of the net's inputs.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []
    for path, (layer, form) in layers.items():
        if form != "svd":
            continue

        def note(module: Any, inputs: Any, output: Any, path: str = path) -> None:
            rows = _patches(module, inputs[0]).double()
            sums[path] = sums.get(path, torch.zeros((), dtype=torch.float64)) + rows.T @ rows
            counts[path] = counts.get(path, 0) + len(rows)

        handles.append(layer.register_forward_hook(note))
    with looking(net):
        for batch in batches:
            net(batch)
    for handle in handles:
        handle.remove()
    found = {}
    for path, total in sums.items():
        moment = total / counts[path]
        scale = float(moment.diagonal().mean())
        if scale > 0:
            moment = moment + SHRINK * scale * torch.eye(len(moment), dtype=moment.dtype)
            found[path] = torch.linalg.cholesky(moment)
    return found


def _patches(layer: Layer, inputs: Tensor) -> Tensor:
    """The rows that a layer's flattened weights are multiplied with."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    if isinstance(layer.padding, str):
        pads = [side for side in reversed(layer._reversed_padding_repeated_twice)]
        inputs = F.pad(inputs, list(reversed(pads)))
        padding: Any = 0
    elif layer.padding_mode != "zeros":
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    else:
        padding = layer.padding
    columns = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def by_sensitivity(
    net: nn.Module,
    layers: Layers,
    prices: Callable[[str, Any], float],
    loss: Callable[[nn.Module], float],
    roots: Mapping[str, Tensor] | None = None,
) -> dict[str, list[Offer]]:
    """Each layer's offers by what the loss does when that layer alone takes a rank: a few are measured and offered.

    Args:
        net: is not changed.
        layers: of `kd.compress.lowrank.candidates`.
        prices: as for `offers`.
        loss: of a net, on some samples.
        roots: as for `offers`.
    """
    subject = copy.deepcopy(net)
    whole = loss(subject)
    found = {}
    for path, (layer, form) in layers.items():
        each, dense = ranks(layer, form), prices(path, None)
        original = subject.get_submodule(path)
        made: list[Offer] = []
        for level in LEVELS:
            rank = each[max(0, round(level * len(each)) - 1)]
            if prices(path, rank) < dense and rank not in [offer.rank for offer in made]:
                root = None if roots is None else roots.get(path)
                replace(subject, path, factorise(layer, form, rank, root))
                made.append(Offer(rank, prices(path, rank), whole - loss(subject)))
                replace(subject, path, original)
        found[path] = [*made, Offer(None, dense, 0.0)]
    return found
