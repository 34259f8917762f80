"""One training from its first step, or from its last checkpoint, to the weights that are kept."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import PassThroughProfiler

from kd.data import Split
from kd.data.several import Labels
from kd.errors import InputError
from kd.training.callbacks import Checkpoint, Masks, Progress, Recorder, Reseed, Selection, Together
from kd.training.circle import Circle
from kd.training.gradients import Gradients
from kd.training.loaders import EpochLoader
from kd.training.loop import install
from kd.training.module import Distiller
from kd.training.ranks import check as check_ranks
from kd.training.ranks import spread, strategy
from kd.training.settings import CHECKPOINT, Fit, Run
from kd.training.turns import Shared, Turns

EVALUATION_BATCH = 512
_COMPILERS = (os.environ.get("CXX", ""), "g++", "clang++")


@dataclass
class Trace:
    """What a training leaves beside its weights."""

    losses: list[float]
    epochs: list[dict[str, Any]]
    resumed: list[int]
    steps: int = 0
    selected_epoch: int | None = None
    gradients: list[dict[str, Any]] = field(default_factory=list)


def device_of(run: Run) -> torch.device:
    """The device a run trains on.

    Raises:
        InputError: if a GPU is asked for and there is none.
    """
    if run.accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("run.accelerator=gpu, but torch sees no GPU; use run.accelerator=auto or cpu")
    return torch.device("cuda" if run.accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def blank(data: Mapping[str, Any], count: int) -> torch.Tensor:
    """Black images of the shape that a data set's config names: (count, channels, size, size)."""
    return torch.zeros(count, int(data["channels"]), int(data["size"]), int(data["size"]))


def check_precision(fit: Fit, run: Run) -> None:
    """Refuse a precision that the device has not.

    Raises:
        InputError: for float16 on the CPU, where Lightning would train in another precision than the key names.
    """
    if fit.precision == "16-mixed" and device_of(run).type == "cpu":
        raise InputError("fit.precision=16-mixed needs a GPU; on the CPU use bf16-mixed or 32-true")


def check_compiler(name: str, on: bool, run: Run) -> None:
    """Refuse compilation for the CPU where there is nothing to compile with.

    Raises:
        InputError: naming the field and what is missing.
    """
    if on and device_of(run).type == "cpu" and not any(map(shutil.which, _COMPILERS)):
        raise InputError(
            f"{name}=true needs a C++ compiler ({' or '.join(filter(None, _COMPILERS))}); install one, or leave it"
        )


def evaluation_loader(split: Split, size: int, run: Run, device: torch.device | None = None) -> EpochLoader:
    """All of a split in its own order, unaugmented, on the run's device or another."""
    return EpochLoader(split, EVALUATION_BATCH, size=size, device=device or device_of(run), workers=run.workers)


def train(
    module: Distiller | Circle,
    data: tuple[Split, Split],
    fit: Fit,
    run: Run,
    *,
    seed: int,
    size: int,
    augment: str,
    work: Path,
    tell: Callable[[dict[str, Any]], None],
    views: int | None = None,
    view_seed: int | None = None,
    labels: Labels | None = None,
    turns: Turns | None = None,
    loggers: list[Logger] | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
    watching: Sequence[pl.Callback] = (),
) -> Trace:
    """Train ``module`` on (train, validation) under ``fit``; resumes from ``work`` if a checkpoint lies there.

    ``masks``, by the names of the student's parameters, are True where a weight may be other than 0.

    Raises:
        InputError: if the split is smaller than a batch, or the device has not the precision.
        KDError: if the loss is not finite.
    """
    check_precision(fit, run)
    train_split = data[0]
    if len(train_split) < fit.batch_size and fit.drop_last:
        raise InputError(
            f"fit.batch_size={fit.batch_size} is larger than the {len(train_split)} training samples; "
            "lower it, or set fit.drop_last=false"
        )
    if not fit.drop_last and len(train_split) % fit.batch_size == 1 and _normalises(module):
        raise InputError(
            f"fit.batch_size={fit.batch_size} leaves a last batch of one sample, which batch normalisation cannot "
            "learn from; change it by one, or set fit.drop_last=true"
        )
    gpu = device_of(run).type == "cuda"
    check_compiler("fit.compile", fit.compile, run)
    if isinstance(module, Distiller):
        check_ranks(fit, run.devices, gpu, module.student, module.objective)
    place = _Place(seed, size, augment, work, views, view_seed, labels, turns, masks)
    with spread(run.devices, tell) as rank:
        if rank:
            return _fit(module, data, fit, run, place, lambda event: None, None, (), rank)
        return _fit(module, data, fit, run, place, tell, loggers, watching, 0)


@dataclass
class _Place:
    """What the batches are made of, and where a training works."""

    seed: int
    size: int
    augment: str
    work: Path
    views: int | None
    view_seed: int | None
    labels: Labels | None
    turns: Turns | None
    masks: Mapping[str, torch.Tensor] | None


def _fit(
    module: Distiller | Circle,
    data: tuple[Split, Split],
    fit: Fit,
    run: Run,
    place: _Place,
    tell: Callable[[dict[str, Any]], None],
    loggers: list[Logger] | None,
    watching: Sequence[pl.Callback],
    rank: int,
) -> Trace:
    """The training of one rank."""
    train_split, validation = data
    work = place.work
    device = device_of(run)
    gpu = device.type == "cuda"
    if gpu and run.devices > 1:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    labels = None if place.labels is None else place.labels.on(device)
    trainer: pl.Trainer
    loader: EpochLoader | Shared

    def position() -> tuple[int, int]:
        tell({"event": "ready"})
        # From the step alone: what Lightning keeps of its own position is not needed to resume.
        return divmod(trainer.global_step, len(loader))

    def make(position: Callable[[], tuple[int, int]] | None) -> EpochLoader:
        return EpochLoader(
            train_split,
            fit.batch_size,
            seed=place.seed,
            augment=place.augment,
            size=place.size,
            shuffle=True,
            drop_last=fit.drop_last,
            device=device,
            workers=run.workers,
            views=place.views,
            view_seed=place.view_seed,
            labels=labels,
            position=position,
            part=(rank, run.devices),
        )

    turns = place.turns
    if turns is None:
        loader = make(position)
    else:
        # The split and the labels are one object for all jobs that read the same.
        words = (fit.batch_size, place.seed, place.augment, place.size, fit.drop_last, place.views, place.view_seed)
        loader = turns.shared((id(train_split), id(labels), *words), lambda: make(None), position)
    recorder = Recorder(work, run.log_every, len(loader))
    gradients = Gradients(recorder, run.gradients)
    selection = Selection(fit)
    judged = isinstance(module, Circle) and bool(module.judges)
    every = 1 if fit.needs_validation or judged else run.validate_every
    # Filling fresh memory costs a write a tensor and hides no error here.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    together = Together(
        [
            Reseed(place.seed),
            *([Masks(place.masks)] if place.masks else []),  # before what looks at the weights
            recorder,
            gradients,
            selection,
            Progress(tell, fit.epochs * len(loader)),
            Checkpoint(work, run.checkpoint_seconds, recorder),
            *watching,
        ]
    )
    with quiet():
        trainer = pl.Trainer(
            accelerator="gpu" if gpu else "cpu",
            devices=run.devices,
            strategy="auto" if run.devices == 1 else strategy(gpu),
            sync_batchnorm=run.devices > 1 and gpu,
            precision=fit.precision,  # type: ignore[arg-type]
            max_epochs=fit.epochs,
            gradient_clip_val=fit.clip,
            # On the CPU the same bits come with and without (run, see docs/decisions.md), and without is faster.
            deterministic=fit.deterministic if gpu else False,
            check_val_every_n_epoch=max(1, every),
            limit_val_batches=1.0 if every else 0,
            num_sanity_val_steps=0,
            logger=loggers or False,
            log_every_n_steps=max(1, run.log_every),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            profiler=_Unprofiled(),
            default_root_dir=work,
            callbacks=[together],
        )
        install(trainer, together)
        if fit.compile:
            module.compile_nets()
        resumed = resumable(work, tell)
        started = time.monotonic()
        trainer.fit(
            module,
            loader,
            evaluation_loader(validation, place.size, run, device),
            ckpt_path=str(work / CHECKPOINT) if resumed is not None else None,
        )
    module.plain_nets()
    if resumed is not None and recorder.resumed[-1:] != [resumed]:
        recorder.resumed.append(resumed)  # nothing was left to train, so the recorder was not called
    selection.restore(module)
    tell({"event": "trained", "seconds": time.monotonic() - started})
    return Trace(
        recorder.losses,
        recorder.epochs,
        recorder.resumed,
        trainer.global_step,
        selection.epoch if fit.select == "best" else None,
        gradients.epochs,
    )


def resumable(work: Path, tell: Callable[[dict[str, Any]], None]) -> int | None:
    """The step of the checkpoint in ``work``, or None; one that holds more than plain tensors is put aside unread."""
    path = work / CHECKPOINT
    if not path.exists():
        return None
    try:
        step = int(torch.load(path, weights_only=True, map_location="cpu")["global_step"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError, TypeError):
        path.replace(path.with_suffix(".refused"))
        tell({"event": "say", "line": "the checkpoint holds more than plain tensors or is damaged: starting over"})
        return None
    tell({"event": "say", "line": f"resuming from step {step}"})
    return step


def _normalises(module: torch.nn.Module) -> bool:
    return any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in module.modules())


class _Unprofiled(PassThroughProfiler):
    """No profiling, without a generator for each of the 40 places in a step that could be profiled."""

    def profile(self, action_name: str) -> nullcontext[None]:  # type: ignore[override]
        """The one context that does nothing."""
        return _NOTHING


_NOTHING = nullcontext()


class quiet(warnings.catch_warnings):
    """Without Lightning's banners and the notices that say what we do on purpose."""

    def __enter__(self) -> None:
        """Silence them."""
        super().__enter__()
        for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        for text in (
            r"Found \d+ module",  # the frozen teacher sits in eval mode on purpose
            r".*does not have many workers.*",  # sets held in memory need none
            r".*GPU available but not used.*",
            r".*resuming from a checkpoint that ended before the epoch ended.*",  # the loader skips by itself
            r".*is smaller than the logging interval.*",
            r".*Experiment logs directory.*",  # of the attempt that was killed; the record in the store is whole
            r".*treespec, LeafSpec.*",
            r".*`isinstance\(treespec.*",
            r".*IterableDataset.*__len__.*",
        ):
            warnings.filterwarnings("ignore", message=text)
