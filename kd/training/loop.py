"""The inside of an epoch: Lightning's loop less what a training of ours does not use, which a small step feels.

Lightning asks about forty hooks, profilers and wrappers at each step, half a millisecond in all. Where none of them has
a part (one device, no gradient scaler, our callbacks), the step is these lines, in Lightning's order and with its
counters, so that the bits and the checkpoints are the same. Everything else goes Lightning's own way.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.strategies import SingleDeviceStrategy

from kd.training.callbacks import Together


class LeanEpochLoop(_TrainingEpochLoop):
    """Lightning's epoch loop with a shorter way through a step.

    Args:
        trainer: whose loop it becomes.
        together: the one callback.
    """

    def __init__(self, trainer: pl.Trainer, together: Together) -> None:
        super().__init__(trainer, min_steps=None, max_steps=-1)
        self.together = together
        self._lean: bool | None = None

    def advance(self, data_fetcher: Any) -> None:
        """One step."""
        if self._lean is None:
            self._lean = lean(self.trainer)
        if self.restarting or not self._lean:
            super().advance(data_fetcher)
            return
        self.val_loop.restarting = False
        trainer: Any = self.trainer
        module = trainer.lightning_module
        batch, _, _ = next(data_fetcher)
        progress = self.batch_progress
        progress.is_last_batch = data_fetcher.done
        progress.increment_ready()
        index = progress.current.ready - 1
        self.together.on_train_batch_start(trainer, module, batch, index)
        progress.increment_started()
        optimiser = trainer.optimizers[0]
        counted = self.automatic_optimization.optim_progress.optimizer
        counted.step.increment_ready()
        with trainer.precision_plugin.train_step_context():
            loss = module.training_step(batch, index)
        counted.zero_grad.increment_ready()
        counted.zero_grad.increment_started()
        optimiser.zero_grad()
        counted.zero_grad.increment_completed()
        loss.backward()
        if trainer.gradient_clip_val:
            trainer.precision_plugin.clip_gradients(optimiser, trainer.gradient_clip_val, "norm")
        optimiser.step()
        counted.step.increment_completed()
        progress.increment_processed()
        for config in trainer.strategy.lr_scheduler_configs:
            self.scheduler_progress.increment_ready()
            config.scheduler.step()
            self.scheduler_progress.increment_completed()
        self.together.on_train_batch_end(trainer, module, {"loss": loss.detach()}, batch, index)
        progress.increment_completed()

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validation is asked about at an epoch's last step only: it is counted in epochs."""
        if self._lean and not self.batch_progress.is_last_batch and not self.restarting and not self._skip_next_val:
            self._batches_that_stepped += 1
            if self.trainer.received_sigterm:
                super().on_advance_end(data_fetcher)
            return
        super().on_advance_end(data_fetcher)


def lean(trainer: Any) -> bool:
    """Whether a step of this trainer needs nothing of Lightning's that the short way leaves out."""
    plugin = trainer.precision_plugin
    plain = type(plugin) is Precision or (type(plugin) is MixedPrecision and plugin.scaler is None)
    if any(isinstance(optimiser, torch.optim.LBFGS) for optimiser in trainer.optimizers):
        return False  # it asks for the loss several times a step
    return plain and type(trainer.strategy) is SingleDeviceStrategy and trainer.accumulate_grad_batches == 1


def install(trainer: pl.Trainer, together: Together) -> None:
    """Put the short way into a trainer that has not begun."""
    trainer.fit_loop.epoch_loop = LeanEpochLoop(trainer, together)


__all__ = ["LeanEpochLoop", "install", "lean"]
