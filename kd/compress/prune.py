"""Narrower nets: the channels, heads and units that matter least go, until a share of the net's cost is gone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kd.compress.channels import channel_sites
from kd.compress.heads import head_sites
from kd.compress.recurrent import ranked, unit_scores
from kd.compress.sites import Choice, Site, Tally, Touch, cut, exact, sound
from kd.compress.structure import Change, difference
from kd.errors import InputError, KDError

OFS = ("macs", "parameters", "channels")
SCOPES = ("global", "isomorphic", "layer")
BYS = ("taylor", "magnitude", "group_norm", "random")


@dataclass(frozen=True)
class Pruned:
    """A net made narrower.

    Args:
        net: a copy of what was given.
        change: what was done, for its structure.
        left: share of each of `OFS` that is left.
        whole: layers that could not be cut, with the reason.
    """

    net: nn.Module
    change: Change
    left: dict[str, float]
    whole: dict[str, str]


def find(
    net: nn.Module,
    inputs: Tensor,
    *,
    by: str = "magnitude",
    gradients: Mapping[str, Tensor] | None = None,
    keep: Sequence[str] = (),
    seed: int = 0,
) -> tuple[list[Site], dict[str, str]]:
    """Where a net can be cut exactly, with the importance of each slot; and what stays whole, with the reason.

    Args:
        net: on the CPU; is not changed.
        inputs: samples as the net takes them, two or more.
        by: one of `BYS`; the scores of each site have a mean of 1.
        gradients: of a loss, by the parameters' names, for `taylor`.
        keep: layers whose outputs stay as wide as they are, and all inside them.
        seed: of `random`.
    """
    shape = tuple(inputs.shape[1:])
    heads, apart = head_sites(net, shape)
    sites, whole = channel_sites(net, inputs[:1], apart)
    sites = [scored(net, site, by, gradients) for site in (*sites, *heads)]
    kept = [site for site in sites if not _asked(site, keep)]
    whole |= {site.path: "as it was asked" for site in sites if site not in kept}
    good = sound(net, kept, inputs)
    whole |= {site.path: "it could not be cut exactly" for i, site in enumerate(kept) if i not in good}
    generator = torch.Generator().manual_seed(seed)
    found = [kept[number] for number in good]
    for site in found:
        if by == "random":
            site.scores = torch.rand(site.slots, generator=generator)
        site.scores = (site.scores / site.scores.mean().clamp(min=1e-30)).double().cpu()
    return found, whole


def scored(net: nn.Module, site: Site, by: str, gradients: Mapping[str, Tensor] | None = None) -> Site:
    """The site with the importance of its slots.

    `taylor` sums |weight x gradient| over all weights that go with a slot (Molchanov et al. 2019, arXiv:1906.10771, of
    single weights), `group_norm` their squares (Fang et al. 2023), `magnitude` the squares of those that make it.
    """
    if site.kind == "units":
        module = net.get_submodule(site.path)
        assert isinstance(module, nn.RNNBase)
        own = None
        if gradients is not None:
            own = {name: gradients[f"{site.path}.{name}"] for name, _ in module.named_parameters()}
        return ranked(site, module, unit_scores(module, by, own))
    total = torch.zeros(site.slots + 1, dtype=torch.float64)
    for touch in site.touches:
        made = touch.side != "in" and touch.path == site.path
        if site.kind == "channels" and by == "magnitude" and not made:
            continue
        slot = torch.where(touch.owner < 0, site.slots, touch.owner)  # the last is that of no slot
        total.index_add_(0, slot, _weighed(net, touch, by, gradients))
    return replace(site, scores=total[:-1])


def _weighed(net: nn.Module, touch: Touch, by: str, gradients: Mapping[str, Tensor] | None) -> Tensor:
    """What each index of one side of a layer weighs."""
    name = touch.path if touch.side.startswith("dim") else f"{touch.path}.weight"
    value = dict(net.named_parameters()).get(name)
    if value is None:
        return torch.zeros(len(touch.owner), dtype=torch.float64)
    weighed = (value * gradients[name]).abs() if by == "taylor" and gradients is not None else value**2
    weighed = weighed.detach().double().cpu()
    if touch.side.startswith("dim"):
        return weighed.movedim(int(touch.side[3:]), 0).flatten(1).sum(dim=1)
    module: Any = net.get_submodule(touch.path)
    if getattr(module, "transposed", False):
        weighed = weighed.transpose(0, 1)
    if touch.side != "in":
        found = weighed.flatten(1).sum(dim=1) if weighed.ndim > 1 else weighed
    else:
        # Inputs of a grouped convolution: place by place in each group of its outputs.
        groups = getattr(module, "groups", 1)
        grouped = weighed.view(groups, -1, *weighed.shape[1:]).transpose(1, 2).flatten(0, 1)
        found = grouped.flatten(1).sum(dim=1)
    return found if len(found) == len(touch.owner) else found.repeat(len(touch.owner) // len(found))


def _asked(site: Site, keep: Sequence[str]) -> bool:
    made = [site.path, *(touch.path for touch in site.touches if touch.side != "in")]
    return any(path == name or path.startswith(f"{name}.") for path in made for name in keep)


def choose(
    sites: Sequence[Site],
    tally: Tally,
    *,
    amount: float,
    of: str = "macs",
    scope: str = "global",
    most: float = 0.95,
    round_to: int = 1,
) -> Choice:
    """The fewest of the least important slots whose going takes `amount` of the cost.

    Args:
        sites: with scores.
        tally: of the net.
        amount: share of the cost that goes.
        of: one of `OFS`.
        scope: `global` ranks all slots together, `isomorphic` those of sites of the same kind, `layer` takes the same
            share of each site.
        most: largest share of a site that may go; one slot always stays.
        round_to: what is left of a site is a multiple of this where it can be.

    Raises:
        InputError: if so much cannot go.
    """
    places = _places(sites, scope)
    orders = [site.scores.argsort(stable=True) for site in sites]
    whole = tally.of({})[of]
    goal = whole * (1 - amount)

    def at(share: float) -> Choice:
        chosen = {}
        for number, site in enumerate(sites):
            count = int((places[number] <= share).sum())
            count = min(count, int(most * site.slots + 1e-9), site.slots - 1)
            if round_to > 1 and site.kind == "channels":
                # Fewer go where that makes the width a multiple: cutting deeper might take what matters.
                left = site.sizes.sum() - site.sizes[orders[number][:count]].cumsum(0)
                even = (left % round_to == 0).nonzero().flatten().tolist()
                count = even[-1] + 1 if even else 0
            if count:
                chosen[number] = orders[number][:count]
        return chosen

    if not sites or tally.of(at(1.0))[of] > goal:
        least = tally.of(at(1.0))[of] / whole if sites else 1.0
        raise InputError(
            f"amount={amount} of the {of} cannot go: with every width at its least {1 - least:.3f} of them do; lower "
            "amount, raise most, or keep fewer layers"
        )
    low, high = 0, sum(site.slots for site in sites)  # as counts of slots over all sites
    while high - low > 1:
        middle = (low + high) // 2
        if tally.of(at(middle / sum(site.slots for site in sites)))[of] <= goal:
            high = middle
        else:
            low = middle
    return at(high / sum(site.slots for site in sites))


def _places(sites: Sequence[Site], scope: str) -> list[Tensor]:
    """Where each slot stands among those it is ranked with, in (0, 1], the least important first."""
    found = [torch.empty(0, dtype=torch.float64) for _ in sites]
    groups: dict[str, list[int]] = {}
    for number, site in enumerate(sites):
        name = {"global": "", "isomorphic": f"{site.kind} {site.tag}", "layer": str(number)}[scope]
        groups.setdefault(name, []).append(number)
    for members in groups.values():
        scores = torch.cat([sites[number].scores for number in members])
        rank = torch.empty(len(scores), dtype=torch.float64)
        rank[scores.argsort(stable=True)] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
        parts = torch.split(rank / len(scores), [sites[number].slots for number in members])
        for number, part in zip(members, parts, strict=True):
            found[number] = part
    return found


def prune(
    net: nn.Module,
    inputs: Tensor,
    *,
    amount: float,
    of: str = "macs",
    by: str = "magnitude",
    gradients: Mapping[str, Tensor] | None = None,
    scope: str = "global",
    most: float = 0.95,
    round_to: int = 1,
    keep: Sequence[str] = (),
    seed: int = 0,
) -> Pruned:
    """A narrower copy of a net that gives what the net would give with the least important slots at 0.

    Args:
        net: any net of one input that torch-pruning can trace, on the CPU.
        inputs: samples as it takes them, two or more.
        amount: as for `choose`.
        of: as for `choose`.
        by: as for `find`.
        gradients: as for `find`.
        scope: as for `choose`.
        most: as for `choose`.
        round_to: as for `choose`.
        keep: as for `find`.
        seed: as for `find`.

    Raises:
        InputError: if so much cannot go, or the net cannot be traced.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2))
    >>> made = prune(net, torch.randn(2, 3, 8, 8), amount=0.5, of="parameters")
    >>> made.left["parameters"] <= 0.5, made.net(torch.randn(1, 3, 8, 8)).shape
    (True, torch.Size([1, 2]))
    """
    sites, whole = find(net, inputs, by=by, gradients=gradients, keep=keep, seed=seed)
    tally = Tally(net, tuple(inputs.shape[1:]), sites)
    choice = choose(sites, tally, amount=amount, of=of, scope=scope, most=most, round_to=round_to)
    if not exact(copy.deepcopy(net).double().eval(), sites, choice, inputs.double(), 1e-6):
        raise KDError("a cut changed what the net gives; this is a fault of kd: keep some layers whole with `keep`")
    made = cut(copy.deepcopy(net), sites, choice)
    before, after = tally.of({}), tally.of(choice)
    return Pruned(made, difference(net, made), {name: after[name] / max(before[name], 1) for name in OFS}, whole)
