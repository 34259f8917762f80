"""The stage that writes layers as chains of thinner ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.stages.base import Config, Room, Stage
from kd.stages.compress import Calibration, _classifier, _compressed, _known, _paths, _share
from kd.store import Artifact
from kd.training.settings import one_of

if TYPE_CHECKING:
    from kd.models import Normalised

RANKS, FORMS = ("energy", "uniform"), ("svd", "spatial", "tucker")


@dataclass(frozen=True)
class LowRank:
    """Write layers as chains of thinner ones.

    Args:
        data: the data set, on which the network is measured.
        seed: of the samples drawn.
        by: `energy` or `uniform`.
        budget: share of each layer's parameters that stays (`uniform`).
        energy: share of each layer's squared singular values that stays (`energy`).
        form: `svd`, `spatial` or `tucker`; linear layers know `svd` alone.
        least: layers of fewer inputs stay whole.
        keep: layers that stay whole.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}
    PHASE: ClassVar[str] = "structure"

    data: Config
    seed: int
    by: str
    budget: float
    energy: float
    form: str
    least: int
    keep: list[str]

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What changes nothing beside the others is neutral.

        Raises:
            InputError: at a value out of range.
        """
        found = {**config, "keep": sorted(set(_paths("lowrank.keep", config["keep"])))}
        one_of("lowrank.by", found["by"], RANKS)
        one_of("lowrank.form", found["form"], FORMS)
        _share("lowrank.budget", found["budget"])
        _share("lowrank.energy", found["energy"])
        found["budget" if found["by"] == "energy" else "energy"] = None
        return found

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It reads its one input always."""
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Factorise a stand-in with weights that mean nothing.

        Raises:
            InputError: if a layer to keep is not there.
        """
        self.stand_in(inputs, room)

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The network as this stage will shape it, with weights that mean nothing."""
        net = room.stand_in(inputs["model"])
        self._factorised(net, None)
        return net

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Factorise, measure, save."""
        return _compressed(self, inputs, out, room, self._factorised)

    def _factorised(self, net: Normalised, calibration: Calibration | None) -> tuple[list[dict[str, Any]], list[str]]:
        from kd.compress.lowrank import candidates, factorise, pays, rank_of_energy, rank_of_share
        from kd.compress.structure import replace

        _known(net, self.keep, "lowrank.keep")
        layers = candidates(net.net, self.form, self.least, [*self.keep, _classifier(net, self.data)])
        chosen, said = {}, []
        for path, (layer, form) in layers.items():
            if self.by == "energy":
                rank = rank_of_energy(layer, form, self.energy)
            else:
                rank = rank_of_share(layer, form, self.budget)
            if rank is None or not pays(layer, form, rank):
                said.append(f"{path} stays whole: thinner layers would not be smaller")
                continue
            replace(net.net, path, factorise(layer, form, rank))
            chosen[path] = {"form": form, "rank": rank}
        return [{"kind": "lowrank", "layers": chosen}], said
