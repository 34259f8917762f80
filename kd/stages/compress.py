"""What the stages that make a trained network smaller have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import InputError
from kd.stages.base import Config, Room
from kd.store import Artifact
from kd.training.settings import Run

if TYPE_CHECKING:
    import torch

    from kd.data import Splits
    from kd.models import Normalised

STARTED = "started_from"  # of a card: the accuracy on validation that the network had before its first step
LOST = 0.5  # of what a network had above chance: when a stage loses more, the network is marked as collapsed


@dataclass(frozen=True)
class Calibration:
    """What a stage may learn about a network from a few training samples.

    Args:
        images: (N, C, H, W), as they are in the split: in [0, 1].
        targets: (N,).
    """

    images: torch.Tensor
    targets: torch.Tensor


def _compressed(
    stage: Any,
    inputs: Mapping[str, Artifact],
    out: Path,
    room: Room,
    change: Callable[[Normalised, Calibration | None], tuple[list[dict[str, Any]], list[str]]],
) -> dict[str, Any]:
    """Load the model, change it, measure what came of it, save it with its structure."""
    from safetensors.torch import save_file

    from kd.compress.measure import cost, file_bytes
    from kd.models import load, recipe_of, save, weights_digest
    from kd.models.files import WEIGHTS
    from kd.stages.evaluation import CHOSEN, evaluated, peers_of
    from kd.stages.splits import data_print, load_data
    from kd.training.loggers import loggers, summarise

    model, data = inputs["model"], stage.data
    splits = load_data(data, room)
    recipe, net = recipe_of(model.path), load(model.path)
    calibration = _calibration(splits, getattr(stage, "samples", 0), stage.seed, int(data["size"]), room.run)
    made, said = change(net, calibration)
    for line in said:
        room.tell({"event": "say", "line": f"{room.stage}: {line}"})
    recipe["structure"] = [*recipe.get("structure", []), *made]
    with loggers(
        room.run, key=room.key, stage=room.stage, document=room.document, dials=room.dials, sweep=room.sweep
    ) as sinks:
        metrics, chosen = evaluated(net, peers_of({"teacher": model}, {}, data), splits, data, room)
        net = net.cpu().eval()
        save(net, recipe, out)
        costs = cost(net, shape_of(data), latency=False)
        costs["gzip_bytes"] = file_bytes(out / WEIGHTS)["gzip_bytes"]
        timings = in_turns(net, load(model.path), shape_of(data)) if room.run.latency else {}
        costs |= {f"latency_ms_{batch}": found["torch"]["median"] for batch, found in timings.items()}
        summarise(sinks, {**metrics, **{f"cost/{name}": value for name, value in costs.items()}}, 0)
    save_file({"test": chosen}, out / CHOSEN)
    result = {
        "metrics": metrics,
        "cost": costs,
        "weights": weights_digest(net.net),
        "said": said,
        **({"latency": timings} if timings else {}),
        "fingerprints": {"data": data_print(data, room)},
    }
    return {**result, **_mark(result, model, splits, room)}


def shape_of(data: Config) -> tuple[int, int, int]:
    """Of one sample."""
    return int(data["channels"]), int(data["size"]), int(data["size"])


def in_turns(net: Normalised, before: Normalised, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Milliseconds of a network and of the one it was made from, in turns, at batch 1 and 64: by batch, by whom."""
    import torch

    from kd.compress.latency import interleaved
    from kd.compress.measure import BATCHES, looking

    found = {}
    for batch in BATCHES:
        images = torch.linspace(0, 1, batch * int(torch.Size(shape).numel())).reshape(batch, *shape)
        with looking(net), looking(before):
            passes = {"torch": partial(net, images), "before_torch": partial(before, images)}
            found[f"batch{batch}"] = interleaved(passes)
    return found


def _mark(result: Mapping[str, Any], before: Artifact, splits: Splits, room: Room) -> dict[str, Any]:
    """For the card: the validation accuracy before the first step, and `marks` where most of it above chance is lost.

    A recovery follows a step that may have lost all of it, so what a network began with is handed on from step to step.
    """
    chance = 1 / len(splits.classes)
    now = result["metrics"]["val/accuracy"]
    given = before.card.get("metrics", {}).get("val/accuracy")
    was = max((value for value in (before.card.get(STARTED), given) if value is not None), default=now)
    kept = {STARTED: was}
    if was <= chance or now - chance >= LOST * (was - chance):
        return kept
    room.tell(
        {
            "event": "say",
            "line": f"{room.stage}: the accuracy on validation collapsed from {was:.3f} to {now:.3f} (chance is "
            f"{chance:.3f}); the network is kept and marked",
        }
    )
    return {**kept, "marks": ["collapsed"]}


def _calibration(splits: Splits, samples: int, seed: int, size: int, run: Run) -> Calibration | None:
    """Samples of the training split, balanced over classes; None where none are asked for.

    Raises:
        InputError: if there are not as many.
    """
    import torch

    from kd.stages.splits import taken
    from kd.training.trainer import evaluation_loader

    if not samples:
        return None
    if samples > len(splits.train):
        raise InputError(
            f"samples={samples} to find importance on, and the training split has {len(splits.train)}: ask for fewer"
        )
    split = taken(splits, samples, seed)
    batches = list(evaluation_loader(split, size, run, torch.device("cpu")))
    return Calibration(torch.cat([b["image"] for b in batches]), torch.cat([b["target"] for b in batches]))


def gradients(net: Normalised, calibration: Calibration) -> dict[str, torch.Tensor]:
    """The gradient of the mean cross-entropy on the samples, by the names of the plain net's parameters."""
    import torch
    import torch.nn.functional as F

    named = dict(net.net.named_parameters())
    found = {name: torch.zeros_like(value) for name, value in named.items()}
    modes = {module: module.training for module in net.modules()}
    net.eval()
    for images, targets in zip(torch.split(calibration.images, 64), torch.split(calibration.targets, 64), strict=True):
        loss = F.cross_entropy(net(images), targets, reduction="sum") / len(calibration.targets)
        for name, value in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True):
            if value is not None:
                found[name] += value
    for module, mode in modes.items():
        module.training = mode
    return found


def normalised(net: Normalised, calibration: Calibration) -> list[torch.Tensor]:
    """The samples in batches as the plain net takes them."""
    import torch

    return [(batch - net.mean) / net.std for batch in torch.split(calibration.images, 64)]


def loss_of(plain: torch.nn.Module, net: Normalised, calibration: Calibration) -> float:
    """The mean cross-entropy on the samples of a net that stands behind another's statistics."""
    import torch
    import torch.nn.functional as F

    from kd.compress.measure import looking

    total = 0.0
    with looking(plain):
        for batch, targets in zip(normalised(net, calibration), torch.split(calibration.targets, 64), strict=True):
            total += F.cross_entropy(plain(batch).double(), targets, reduction="sum").item()
    return total / len(calibration.targets)


def listed(paths: Sequence[str]) -> str:
    """Some layers and a verb, as a sentence begins.

    >>> from kd.stages.compress import listed
    >>> listed(["a"]), listed(["a", "b", "c", "d"])
    ('a stays', 'a, b, c and 1 more stay')
    """
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{', '.join(paths[:3])}{more} {'stays' if len(paths) == 1 else 'stay'}"


def probe(net: Normalised, data: Config) -> torch.Tensor:
    """Two samples that are noise as the plain net takes it, the same ones always."""
    import torch

    shape = (2, int(data["channels"]), int(data["size"]), int(data["size"]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _classifier(net: Normalised, data: Config) -> str:
    """The path of the layer that makes the logits, which stays whole: the last of those with a matrix to be run."""
    from torch import nn

    from kd.compress.measure import looking

    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path, module in net.net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with looking(net.net):
        net.net(probe(net, data))
    for handle in handles:
        handle.remove()
    return ran[-1] if ran else ""


def _known(net: Normalised, paths: Sequence[str], where: str) -> None:
    from kd.errors import nearest

    modules = dict(net.net.named_modules())
    for path in paths:
        if path not in modules:
            raise InputError(f"{where}: {path!r} is no layer of {type(net.net).__name__}{nearest(path, modules)}")


def _share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InputError(f"{name}={value!r} is no share between 0 and 1, e.g. {name}=0.5")


def _samples(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise InputError(f"{name}={value!r} is no number of samples; give 1 or more")


def _paths(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(path, str) for path in value):
        raise InputError(f"{name}={value!r}: give a list of layers, e.g. [conv1] (`kd list layers NAME`)")
    return list(value)
