"""The smallest training without a pipeline: a linear net on random images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from kd.data import Split
from kd.data.labels import StoredLabels
from kd.losses.logits import CrossEntropy, SoftTargetKL
from kd.models import Normalised
from kd.objective import Objective, Term
from kd.training.module import Distiller
from kd.training.optimisers import configure
from kd.training.settings import Fit, Run
from kd.training.trainer import Trace, train

CLASSES, SIDE, COUNT = 3, 4, 22


def split(count: int = COUNT, seed: int = 0) -> Split:
    """Random images, whose label is their brightest third."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return Split(torch.arange(count), torch.arange(count) % CLASSES, images)


def net(seed: int = 0, inputs: int = SIDE * SIDE, classes: int = CLASSES) -> Normalised:
    """One linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Normalised(nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes)), [0.5], [0.25])


def label_term(weight: float = 1.0, loss: nn.Module | None = None) -> Term:
    """A term on the labels."""
    return Term(loss or CrossEntropy(), weight, student="student.logits", target="batch.target")


def teacher_term(weight: float = 1.0, temperature: float = 4.0) -> Term:
    """A term on the teacher's logits."""
    return Term(SoftTargetKL(temperature), weight, student="student.logits", teacher="teacher.logits")


def run_of(folder: Path, **settings: Any) -> Run:
    """Settings that write nothing beside the record."""
    return Run(**{"store": str(folder), "wandb": "disabled", "accelerator": "cpu", **settings})


def fitted(
    folder: Path,
    fit: Fit | None = None,
    run: Run | None = None,
    terms: dict[str, Term] | None = None,
    watching: Sequence[pl.Callback] = (),
    teacher: Normalised | None = None,
    labels: Tensor | None = None,
    count: int = COUNT,
    **more: Any,
) -> tuple[Distiller, Trace]:
    """Train it; five steps an epoch unless told otherwise."""
    fit = fit or Fit(epochs=2, batch_size=4, lr=0.1, optimiser={"_target_": "torch.optim.SGD"})
    steps = count // fit.batch_size if fit.drop_last else -(-count // fit.batch_size)
    module = Distiller(
        net(),
        Objective(terms or {"ce": label_term()}),
        configure(fit, steps),
        teacher,
        stored=("teacher",) if labels is not None else (),
    )
    folder.mkdir(parents=True, exist_ok=True)
    trace = train(
        module,
        (split(count), split(9, seed=1)),
        fit,
        run or run_of(folder, log_every=1),
        seed=0,
        size=SIDE,
        augment="none",
        work=folder,
        tell=more.pop("tell", lambda event: None),
        labels=None if labels is None else StoredLabels.of(labels),
        watching=watching,
        **more,
    )
    return module, trace
