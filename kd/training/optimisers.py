"""Optimiser and learning-rate schedule of a fit; lengths come from the config, never from the Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from kd.errors import InputError
from kd.instantiate import resolve, signature_errors
from kd.training.settings import Fit


def scale(fit: Fit, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step: linear warm-up, then constant, cosine to 0, or steps.

    >>> scale(Fit(epochs=2, schedule="cosine"), 10)(10)
    0.5
    """
    warmup, total = round(fit.warmup_epochs * steps_per_epoch), fit.epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if fit.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        if fit.schedule == "step":
            return float(fit.gamma ** sum(step >= m * steps_per_epoch for m in fit.milestones))
        return 1.0

    return factor


def configure(fit: Fit, steps_per_epoch: int) -> Callable[[list[Any]], dict[str, Any]]:
    """What the module calls with its trainable parameters, or groups of them, in Lightning's form.

    Raises:
        InputError: if the optimiser is none of torch's, or has no such field; when called, if it refuses a value.
    """
    target = str(fit.optimiser.get("_target_", ""))
    if not target.startswith("torch.optim."):
        raise InputError(f"fit.optimiser._target_={target!r} is no optimiser of torch.optim, e.g. torch.optim.AdamW")
    kind = resolve(target)
    for name in ("lr", "params"):
        if name in fit.optimiser:
            raise InputError(f"fit.optimiser.{name} stands elsewhere: " + ("set fit.lr" if name == "lr" else "drop it"))
    signature_errors(fit.optimiser, "fit.optimiser", late=("params", "lr"))
    keywords = {key: value for key, value in fit.optimiser.items() if key != "_target_"}

    def build(parameters: list[Any]) -> dict[str, Any]:
        try:
            optimiser = kind(parameters, lr=fit.lr, **keywords)
        except (TypeError, ValueError) as error:
            raise InputError(f"fit.optimiser: {target} refuses {keywords}: {error}") from error
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, scale(fit, steps_per_epoch))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return build
