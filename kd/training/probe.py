"""A few real steps of a training that nobody keeps: what they cost, what each term does, whether the teacher moved."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from kd.data import Split
from kd.data.several import Labels
from kd.models import Normalised
from kd.training.circle import Circle
from kd.training.loaders import Batch, EpochLoader
from kd.training.module import Distiller
from kd.training.seeds import seed_step
from kd.training.settings import Fit, Run
from kd.training.trainer import device_of, evaluation_loader

LOOKED, TIMED = 3, 5  # steps whose gradients are looked at; steps that are timed behind them
PATIENCE = 30.0  # seconds after which no further step is timed
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class Probed:
    """What some steps of a training showed.

    Args:
        losses: the weighted sum at each step.
        parts: each step's terms with their own loss.
        gradients: `grad/T`, `grad_share/T` and `grad_cosine/A/B`, means over the first steps.
        step_s: median seconds of a step, its batch included.
        training: modules of the teacher in train mode while the student trained.
        learning: weights of the teacher that ask for a gradient or were given one.
        moved: weights and statistics of the teacher that are not what they were.
        peak: bytes held at most; on the CPU those of the whole process.
    """

    losses: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    gradients: dict[str, float] = field(default_factory=dict)
    step_s: float = 0.0
    training: list[str] = field(default_factory=list)
    learning: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    peak: int = 0


def loader_of(
    split: Split, fit: Fit, run: Run, data: dict[str, Any], seed: int, views: int | None, view_seed: int | None,
    labels: Labels | None = None,
) -> EpochLoader:  # fmt: skip
    """The batches that a training sees, from its first epoch on."""
    device = device_of(run)
    return EpochLoader(
        split,
        fit.batch_size,
        seed=seed,
        augment=data["augment"],
        size=int(data["size"]),
        shuffle=True,
        drop_last=fit.drop_last,
        device=device,
        workers=run.workers,
        views=views,
        view_seed=view_seed,
        labels=None if labels is None else labels.on(device),
    )


def probe(
    module: Distiller | Circle,
    loader: EpochLoader,
    fit: Fit,
    run: Run,
    seed: int,
    looked: int = LOOKED,
    timed: int = TIMED,
) -> Probed:
    """Take ``looked`` steps with an eye on each term, then ``timed`` ones against the clock.

    The module is trained by it and good for nothing else afterwards. Networks are not compiled here, and an fp16
    training is not scaled: neither decides what is asked.

    Args:
        module: student, teacher and objective; or networks that learn together.
        loader: its batches.
        fit: its schedule.
        run: where.
        seed: of the steps.
        looked: steps that are looked at.
        timed: steps that are timed.
    """
    device = device_of(run)
    module.to(device)
    if fit.precision == "64-true":
        module.double()
    # What a trainer does: it flips the mode of all that it can reach.
    module.train()
    teacher = listened(module)
    before = _state(teacher)
    optimiser = module.configure_optimizers()["optimizer"]
    found, seconds = Probed(), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seen: dict[str, list[float]] = {}
    batches = for_ever(loader)
    begun = time.perf_counter()
    for step in range(looked + timed):
        if step >= looked + 1 and time.perf_counter() - begun > PATIENCE:
            break
        started = time.perf_counter()
        seed_step(seed, step)
        module.at(step / len(loader), fit.epochs)
        module.gradients_due = step < looked
        total = _step(module, in_precision(next(batches), fit), step, optimiser, mixed(fit, device), found)
        found.parts.append({name: part.item() for name, part in module.parts.items()})
        found.losses.append(total)
        if step < looked:
            for name, value in module.gradients.items():
                seen.setdefault(name, []).append(value.item())
        elif device.type == "cuda":
            torch.cuda.synchronize(device)
        if step >= looked:
            seconds.append(time.perf_counter() - started)
    found.gradients = {name: fmean(values) for name, values in seen.items()}
    found.step_s = median(seconds) if seconds else 0.0
    found.moved = _moved(teacher, before)
    found.peak = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _resident()
    return found


def listened(module: Distiller | Circle) -> nn.Module | None:
    """The teacher that runs; of several, all of them as one; None if none does."""
    live = module.live
    return next(iter(live.values())) if len(live) == 1 else nn.ModuleDict(live) if live else None


def _step(
    module: Distiller | Circle,
    batch: Batch,
    step: int,
    optimiser: torch.optim.Optimizer,
    mixed: Callable[[], AbstractContextManager[Any]],
    found: Probed,
) -> float:
    """One step of the optimiser; gives the loss."""
    teacher = listened(module)

    def closure() -> float:
        optimiser.zero_grad()
        with mixed():
            loss = module.training_step(batch, step)
        if teacher is not None:
            found.training = found.training or [
                name or type(part).__name__ for name, part in teacher.named_modules() if part.training
            ]
        loss.backward()  # type: ignore[no-untyped-call]
        if teacher is not None:
            found.learning = found.learning or [
                name for name, weight in teacher.named_parameters() if weight.requires_grad or weight.grad is not None
            ]
        return float(loss.detach())

    first: list[float] = []
    optimiser.step(lambda: first.append(closure()) or first[-1])  # type: ignore[func-returns-value]
    return first[0]


def mixed(fit: Fit, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context for each step: autocast where the precision is a mixed one."""
    kind = _MIXED.get(fit.precision)
    return nullcontext if kind is None else lambda: torch.autocast(device.type, kind)


def in_precision(batch: Batch, fit: Fit) -> Batch:
    """A batch as a training in double precision is given it, or as it is."""
    if fit.precision != "64-true":
        return batch
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def for_ever(loader: EpochLoader) -> Iterator[Batch]:
    """The batches of all epochs, from the first one on."""
    epoch = 0
    while True:
        yield from loader.batches(epoch)
        epoch += 1


def _state(net: nn.Module | None) -> dict[str, Tensor]:
    return {} if net is None else {name: value.detach().clone() for name, value in net.state_dict().items()}


def _moved(net: nn.Module | None, before: dict[str, Tensor]) -> list[str]:
    """Names of what is another now."""
    return [] if net is None else [name for name, value in net.state_dict().items() if not value.equal(before[name])]


def _resident() -> int:
    """The most memory this process ever held, bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def speak(net: Normalised, split: Split, data: dict[str, Any], run: Run, samples: int) -> tuple[Tensor, Tensor, float]:
    """A network's logits on the first samples of a split, their targets, and seconds a sample.

    Args:
        net: in eval mode afterwards.
        split: in its own order, unaugmented.
        data: names the images' size.
        run: where.
        samples: at most so many.
    """
    device = device_of(run)
    net = net.to(device).eval()
    loader = evaluation_loader(split.subset(torch.arange(min(samples, len(split)))), int(data["size"]), run)
    logits, targets, seconds, timed = [], [], 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(loader):
            if number == 0:
                net(batch["image"][:8])  # the first pass makes what the later ones find made
            started = time.perf_counter()
            logits.append(net(batch["image"]).float().cpu())
            seconds += time.perf_counter() - started
            timed += len(batch["target"])
            targets.append(batch["target"].cpu())
    return torch.cat(logits), torch.cat(targets), seconds / max(1, timed)


def pixels(split: Split, data: dict[str, Any], run: Run, samples: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel of some training images in [0, 1], as they lie there."""
    rows = torch.linspace(0, len(split) - 1, min(samples, len(split))).long()
    loader = evaluation_loader(split.subset(rows), int(data["size"]), run)
    images = torch.cat([batch["image"].cpu() for batch in loader]).double().transpose(0, 1).flatten(1)
    return images.mean(1).tolist(), images.std(1).tolist()


def spoken(teacher: Normalised, loader: EpochLoader, run: Run, role: str = "teacher") -> tuple[Tensor, Tensor]:
    """(stored, live) logits of a teacher on the first batch of a training that reads stored labels."""
    device = device_of(run)
    batch = next(iter(loader.batches(0)))
    teacher = teacher.to(device).eval()
    with torch.no_grad():
        live = teacher(batch["image"]).float().cpu()
    return batch[f"{role}.logits"].float().cpu(), live
