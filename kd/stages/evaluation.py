"""What a trained network is worth: its metrics on validation and, once, on test."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kd.roles import teachers
from kd.stages.base import Config, Room
from kd.store import Artifact, canonical

if TYPE_CHECKING:
    import torch

    from kd.data import Splits
    from kd.models import Normalised

CHOSEN = "predictions.safetensors"


def peers_of(
    inputs: Mapping[str, Artifact], nets: Mapping[str, Normalised], data: Config
) -> dict[str, Normalised | torch.Tensor]:
    """What stands for each teacher on test: the classes it chose when it was evaluated, else the network itself.

    Args:
        inputs: the artifacts by role; those of teachers count.
        nets: teachers that are loaded already.
        data: that the student is evaluated on.
    """
    from safetensors.torch import load_file

    from kd.models import load

    found: dict[str, Normalised | torch.Tensor] = {}
    for role in teachers(inputs):
        artifact = inputs[role]
        theirs, mine = (
            {name: value for name, value in config.items() if name != "augment"}
            for config in (artifact.card["document"]["config"]["data"], data)
        )
        if CHOSEN in artifact.card["files"] and canonical(theirs) == canonical(mine):
            found[role] = load_file(artifact.file(CHOSEN))["test"]
        else:
            found[role] = nets[role] if role in nets else load(artifact.path)
    return found


def evaluated(
    student: Normalised, peers: Mapping[str, Normalised | torch.Tensor], splits: Splits, data: Config, room: Room
) -> tuple[dict[str, Any], torch.Tensor]:
    """Metrics of validation and test, and the classes chosen on test.

    With a teacher there is `test/agreement`; with several it is the mean of `test/agreement_teacher1` and so on.
    """
    import torch

    from kd.tasks.image import agreement, evaluate

    metrics: dict[str, Any] = {}
    for name, split in (("val", splits.validation), ("test", splits.test)):
        logits = logits_of(student, split, data, room)
        metrics |= {f"{name}/{k}": v for k, v in evaluate(logits, split.targets.cpu()).items()}
    each = {
        role: agreement(logits, peer if isinstance(peer, torch.Tensor) else logits_of(peer, splits.test, data, room))
        for role, peer in peers.items()
    }
    if each:
        metrics["test/agreement"] = fmean(each.values())
    if len(each) > 1:
        metrics |= {f"test/agreement_{role}": share for role, share in each.items()}
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
