"""The two halves of how a run is trained: `Fit` changes numbers and is hashed, `Run` changes none and is not."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from kd.errors import InputError, nearest

SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
CHECKPOINT, HISTORY = "last.ckpt", "history.jsonl"  # what a training keeps in its work folder
WANDB = ("auto", "online", "offline", "disabled")


def require(ok: bool, name: str, value: object, meant: str) -> None:
    """Refuse a value outside its range in one line.

    Raises:
        InputError: naming the field, its value and what it may be.
    """
    if not ok:
        raise InputError(f"{name}={value!r} is out of range: it must be {meant}")


T = TypeVar("T")
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a word",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


def typed(kind: type[T], node: Mapping[str, Any], where: str) -> T:
    """A settings object from a config's mapping, each field of the declared type.

    Raises:
        InputError: at an unknown field, with the nearest right one, or at a value of another type.

    >>> typed(Fit, {"epochs": "x"}, "fit")
    Traceback (most recent call last):
        ...
    kd.errors.InputError: fit.epochs='x' is no whole number
    """
    hints = get_type_hints(kind)
    for name, value in node.items():
        if name not in hints:
            raise InputError(f"{where}.{name} is not a field of {where}{nearest(str(name), hints)}")
        options = get_args(hints[name]) if get_origin(hints[name]) in (Union, types.UnionType) else (hints[name],)
        kinds = tuple(get_origin(option) or option for option in options)
        if not any(_fits(value, option) for option in kinds):
            words = " or ".join(_WORDS.get(option, "null") for option in kinds)
            raise InputError(f"{where}.{name}={value!r} is no {words.removeprefix('a ')}")
    return kind(**node)


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    """Refuse a word that is none of the options, with the nearest ones.

    Raises:
        InputError: if it is none of them.
    """
    if value not in options:
        raise InputError(f"{name}={value!r} is none of {', '.join(options)}{nearest(str(value), options)}")


@dataclass(frozen=True)
class Fit:
    """A training schedule: all of it is hashed."""

    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.002
    optimiser: dict[str, Any] = field(default_factory=lambda: {"_target_": "torch.optim.AdamW", "weight_decay": 1e-4})
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    clip: float | None = None
    samples: int | None = None
    drop_last: bool = True
    select: str = "last"
    patience: int | None = None
    precision: str = "32-true"
    deterministic: bool = True
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        """Check each range.

        Raises:
            InputError: at the first field out of range.
        """
        require(self.epochs >= 1, "fit.epochs", self.epochs, "1 or more")
        require(self.batch_size >= 1, "fit.batch_size", self.batch_size, "1 or more")
        require(self.lr > 0, "fit.lr", self.lr, "greater than 0")
        require(self.warmup_epochs >= 0, "fit.warmup_epochs", self.warmup_epochs, "0 or more")
        require(self.clip is None or self.clip > 0, "fit.clip", self.clip, "greater than 0, or null for no clipping")
        require(self.samples is None or self.samples >= 1, "fit.samples", self.samples, "1 or more, or null for all")
        require(self.patience is None or self.patience >= 1, "fit.patience", self.patience, "1 or more epochs, or null")
        one_of("fit.schedule", self.schedule, SCHEDULES)
        rising = all(type(m) is int and m > 0 for m in self.milestones) and self.milestones == sorted(self.milestones)
        require(rising, "fit.milestones", self.milestones, "whole epochs in rising order, e.g. [15,18]")
        one_of("fit.select", self.select, ("last", "best"))
        one_of("fit.precision", self.precision, PRECISIONS)

    @property
    def needs_validation(self) -> bool:
        """Whether validation decides something, so that it runs each epoch whatever `run.validate_every` says."""
        return self.select == "best" or self.patience is not None


@dataclass(frozen=True)
class Run:
    """Where a run happens and how loudly: none of it is hashed, and none of it moves a bit of the result.

    `accelerator` and `devices` are environment, as the number of threads is: they stand on the card and move rounding.
    """

    store: str = ".kd"
    data_dir: str = "~/.cache/kd/data"
    accelerator: str = "auto"
    devices: int = 1
    workers: int = 2
    memory_gb: float = 2.0
    validate_every: int = 1
    log_every: int = 100
    gradients: int | None = None
    checkpoint_seconds: float = 60.0
    wandb: str = "auto"
    wandb_project: str = "kd"
    logger: dict[str, Any] = field(default_factory=dict)
    latency: bool = True
    progress: bool = True
    trusted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check each range.

        Raises:
            InputError: at the first field out of range.
        """
        one_of("run.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        one_of("run.wandb", self.wandb, WANDB)
        require(self.devices >= 1, "run.devices", self.devices, "1 or more")
        require(self.workers >= 0, "run.workers", self.workers, "0 or more")
        require(self.memory_gb >= 0, "run.memory_gb", self.memory_gb, "0 or more")
        require(self.validate_every >= 0, "run.validate_every", self.validate_every, "0 (never) or more epochs")
        require(self.log_every >= 0, "run.log_every", self.log_every, "0 (never) or more steps")
        steps = self.gradients is None or self.gradients >= 0
        require(steps, "run.gradients", self.gradients, "0 (never), more steps, or null (at run.log_every)")
        require(self.checkpoint_seconds >= 0, "run.checkpoint_seconds", self.checkpoint_seconds, "0 or more")
