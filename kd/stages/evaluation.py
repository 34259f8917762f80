"""What a trained network is worth: its metrics on validation and, once, on test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kd.stages.base import Config, Room
from kd.store import Artifact, canonical

if TYPE_CHECKING:
    import torch

    from kd.data import Splits
    from kd.models import Normalised

CHOSEN = "predictions.safetensors"


def peer_of(
    inputs: Mapping[str, Artifact], teacher: Normalised | None, data: Config
) -> Normalised | torch.Tensor | None:
    """What stands for the teacher on test: the classes it chose when it was evaluated, else the network itself."""
    from safetensors.torch import load_file

    from kd.models import load

    if "teacher" not in inputs:
        return None
    theirs, mine = (
        {name: value for name, value in found.items() if name != "augment"}
        for found in (inputs["teacher"].card["document"]["config"]["data"], data)
    )
    if CHOSEN in inputs["teacher"].card["files"] and canonical(theirs) == canonical(mine):
        return load_file(inputs["teacher"].file(CHOSEN))["test"]
    return teacher if teacher is not None else load(inputs["teacher"].path)


def evaluated(
    student: Normalised, peer: Normalised | torch.Tensor | None, splits: Splits, data: Config, room: Room
) -> tuple[dict[str, Any], torch.Tensor]:
    """Metrics of validation and test, with agreement where there is a teacher; and the classes chosen on test."""
    import torch

    from kd.tasks.image import evaluate

    metrics: dict[str, Any] = {}
    for name, split in (("val", splits.validation), ("test", splits.test)):
        logits = logits_of(student, split, data, room)
        other = peer if name == "test" else None
        if other is not None and not isinstance(other, torch.Tensor):
            other = logits_of(other, split, data, room)
        metrics |= {f"{name}/{k}": v for k, v in evaluate(logits, split.targets.cpu(), other).items()}
    return metrics, logits.argmax(dim=1)


def logits_of(net: Normalised, split: Any, data: Config, room: Room) -> torch.Tensor:
    """A network's logits on a whole split, in its order, on the CPU."""
    import torch

    from kd.training.trainer import device_of, evaluation_loader

    net = net.to(device_of(room.run)).eval()
    found = []
    loader = evaluation_loader(split, int(data["size"]), room.run)
    with torch.no_grad():
        for i, batch in enumerate(loader):
            found.append(net(batch["image"]).float().cpu())
            room.tell({"event": "pass", "step": i + 1, "total": len(loader)})
    return torch.cat(found)
