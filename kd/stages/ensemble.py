"""The stage that asks several trained networks together: one row for what they say as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.errors import InputError
from kd.stages.base import Config, Room, Stage
from kd.store import Artifact
from kd.training.settings import one_of

if TYPE_CHECKING:
    import torch

HOW = ("mean_probabilities", "mean_logits")
ADDED = ("parameters", "nonzero", "macs", "bytes", "latency_ms_batch1", "latency_ms_batch64")


@dataclass(frozen=True)
class Ensemble:
    """Evaluate all networks among its inputs as one, by the mean of what they say; nothing is trained.

    Furlanello et al., "Born-Again Neural Networks" (2018), average the predictions of the generations.

    Args:
        data: that they are evaluated on.
        how: `mean_probabilities`, or `mean_logits` (the geometric mean of the probabilities).
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}

    data: Config
    how: str

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Without the augmentation of training, which nothing here sees.

        Raises:
            InputError: at a mean that is none.
        """
        one_of("born_again.ensemble", config["how"], HOW)
        return {**config, "data": {**config["data"], "augment": "none"}}

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It reads all of its inputs.

        Raises:
            InputError: if they know other classes.
        """
        mine = config["data"].get("num_classes")
        for role, theirs in inputs.items():
            if (count := theirs.get("data", {}).get("num_classes")) != mine:
                raise InputError(f"{role} of an ensemble knows {count} classes, and the data have {mine}")
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Look whether each input is a network.

        Raises:
            InputError: if there is none, or one holds no network.
        """
        if not inputs:
            raise InputError("there is no network to ask; name the stages among its inputs, e.g. {member1: teacher}")
        for role, source in inputs.items():
            found = (
                "model.json" in source.card["files"] if isinstance(source, Artifact) else hasattr(source, "stand_in")
            )
            if not found:
                raise InputError(f"{role} is no trained network, so an ensemble cannot ask it")

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Evaluate the mean on validation and test; what it costs is the sum over the networks."""
        from safetensors.torch import save_file

        from kd.models import load
        from kd.stages.evaluation import CHOSEN, logits_of
        from kd.stages.splits import data_print, load_data
        from kd.tasks.image import evaluate
        from kd.training.loggers import loggers, summarise

        splits = load_data(self.data, room)
        nets = [load(artifact.path) for artifact in inputs.values()]
        metrics: dict[str, Any] = {}
        for name, split in (("val", splits.validation), ("test", splits.test)):
            logits = self.mean([logits_of(net, split, self.data, room) for net in nets])
            metrics |= {f"{name}/{k}": v for k, v in evaluate(logits, split.targets.cpu()).items()}
        save_file({"test": logits.argmax(dim=1)}, out / CHOSEN)
        cards = [artifact.card.get("cost", {}) for artifact in inputs.values()]
        costs = {name: sum(card[name] for card in cards) for name in ADDED if all(name in card for card in cards)}
        if all("activation_bytes" in card for card in cards):  # one network runs after the other
            costs["activation_bytes"] = max(card["activation_bytes"] for card in cards)
        with loggers(
            room.run, key=room.key, stage=room.stage, document=room.document, dials=room.dials, sweep=room.sweep
        ) as sinks:
            summarise(sinks, {**metrics, **{f"cost/{name}": value for name, value in costs.items()}}, 0)
        return {"metrics": metrics, "cost": costs, "fingerprints": {"data": data_print(self.data, room)}}

    def mean(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """What networks that give these logits (N, C) say as one, as logits (N, C).

        >>> import torch
        >>> said = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
        >>> Ensemble({}, "mean_logits").mean(said), Ensemble({}, "mean_probabilities").mean(said).softmax(1)
        (tensor([[1., 0.]]), tensor([[0.6904, 0.3096]]))
        """
        from kd.losses.mixing import mean_logits, mixture

        return mean_logits(logits) if self.how == "mean_logits" else mixture(logits)
