"""The stage that writes layers as chains of thinner ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.errors import InputError
from kd.stages.base import Config, Room, Stage
from kd.stages.compress import (
    Calibration,
    _classifier,
    _compressed,
    _known,
    _paths,
    _samples,
    _share,
    listed,
    loss_of,
    normalised,
)
from kd.store import Artifact
from kd.training.settings import one_of, require

if TYPE_CHECKING:
    from kd.models import Normalised

BYS, OFS, FORMS = ("budget", "sensitivity", "energy", "uniform"), ("parameters", "macs"), ("svd", "spatial", "tucker")


@dataclass(frozen=True)
class LowRank:
    """Write layers as chains of thinner ones.

    Args:
        data: the data set: what inputs are looked at, and what is measured.
        seed: of the samples drawn.
        by: `budget` spends one budget over all layers where it keeps most of their energy; `sensitivity` where it keeps
            the loss lowest; `energy` keeps the same share of each layer's energy, `uniform` the same of each rank.
        budget: share of the network's cost that stays; None for `energy`.
        of: what the budget is of, `parameters` or `macs`; None for `energy`.
        energy: share of each layer's squared singular values that stays; None but for `energy`.
        form: `svd`, `spatial` or `tucker`; linear layers and 1x1 convolutions know `svd` alone.
        whiten: whether energy is that of the outputs on the layer's own inputs, for `svd`.
        least: layers of fewer inputs stay whole.
        samples: of the training split, for `whiten` and `sensitivity`.
        keep: layers that stay whole.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}
    PHASE: ClassVar[str] = "structure"

    data: Config
    seed: int
    by: str
    budget: float | None
    of: str | None
    energy: float | None
    form: str
    whiten: bool
    least: int
    samples: int
    keep: list[str]

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What changes nothing beside the others is neutral.

        Raises:
            InputError: at a value out of range.
        """
        found = {**config, "keep": sorted(set(_paths("lowrank.keep", config["keep"])))}
        one_of("lowrank.by", found["by"], BYS)
        one_of("lowrank.form", found["form"], FORMS)
        if found["by"] == "energy":
            _share("lowrank.energy", found["energy"])
            found |= {"budget": None, "of": None}
        else:
            _share("lowrank.budget", found["budget"])
            one_of("lowrank.of", str(found["of"]), OFS)
            found["energy"] = None
        _samples("lowrank.samples", found["samples"])
        require(isinstance(found["whiten"], bool), "lowrank.whiten", found["whiten"], "true or false")
        least = found["least"]
        require(type(least) is int and least >= 1, "lowrank.least", least, "a whole number, 1 or more")
        if not found["whiten"] and found["by"] != "sensitivity":
            found["samples"] = 0
        return found

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It reads its one input always."""
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Factorise a stand-in with weights that mean nothing.

        Raises:
            InputError: if a layer to keep is not there, or the budget cannot be met.
        """
        room.stand_in(self)

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The network as this stage will shape it, with weights that mean nothing."""
        net = room.stand_in(inputs["model"])
        self._factorised(net, None)
        return net

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Factorise, measure, save."""
        return _compressed(self, inputs, out, room, self._factorised)

    def _factorised(self, net: Normalised, calibration: Calibration | None) -> tuple[list[dict[str, Any]], list[str]]:
        from kd.compress.lowrank import candidates, factorise
        from kd.compress.ranks import moments
        from kd.compress.structure import replace

        _known(net, self.keep, "lowrank.keep")
        layers = candidates(net.net, self.form, self.least, [*self.keep, _classifier(net, self.data)])
        if not layers:
            raise InputError(
                f"lowrank finds no layer of {type(net.net).__name__} to factorise: plain linear layers and "
                f"convolutions of {self.least} inputs or more that lowrank.keep does not name"
            )
        roots: Mapping[str, Any] = {}
        if self.whiten and calibration is not None:
            roots = moments(net.net, layers, normalised(net, calibration))
        ranks = self._ranks(net, layers, roots, calibration)
        chosen = {path: {"form": layers[path][1], "rank": rank} for path, rank in ranks.items() if rank is not None}
        for path, how in chosen.items():
            replace(net.net, path, factorise(layers[path][0], how["form"], how["rank"], roots.get(path)))
        whole = [path for path, rank in ranks.items() if rank is None]
        said = [f"{listed(whole)} whole: thinner layers would not pay"] if whole else []
        return [{"kind": "lowrank", "layers": chosen}], said

    def _ranks(
        self, net: Normalised, layers: Any, roots: Mapping[str, Any], calibration: Calibration | None
    ) -> dict[str, Any]:
        """The rank of each layer; None where it stays whole."""
        from kd.compress.lowrank import rank_of_energy, weights
        from kd.compress.ranks import Prices, by_sensitivity, offers, spend, uniform

        if self.by == "energy":
            assert self.energy is not None
            found = {p: rank_of_energy(layer, form, self.energy, roots.get(p)) for p, (layer, form) in layers.items()}
            pays = {p: weights(layer, form, found[p]) < layer.weight.numel() for p, (layer, form) in layers.items()}
            return {path: rank if pays[path] else None for path, rank in found.items()}
        assert self.budget is not None and self.of is not None
        shape = (int(self.data["channels"]), int(self.data["size"]), int(self.data["size"]))
        prices = Prices(net.net, layers, self.of, shape)
        goal = self.budget * prices.total - prices.rest
        try:
            if self.by == "uniform":
                return uniform(layers, prices, goal)
            if self.by == "sensitivity" and calibration is not None:
                each = by_sensitivity(net.net, layers, prices, lambda plain: loss_of(plain, net, calibration), roots)
            else:
                each = offers(layers, prices, roots)
            return spend(each, goal)
        except InputError as error:
            raise InputError(
                f"lowrank.budget={self.budget} of {prices.total:.0f} {self.of} cannot be met: {error} (what is not "
                f"factorised costs {prices.rest:.0f}); raise it, or lower lowrank.least"
            ) from error
