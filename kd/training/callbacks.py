"""What watches a training: records, checkpoints, selection of the epoch to keep, progress. None of it moves a bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from kd.errors import KDError
from kd.models import weights_digest
from kd.store import write_text
from kd.training.circle import Circle
from kd.training.module import Distiller
from kd.training.pruning import Pruned, Trial, report
from kd.training.ranks import alone, averaged
from kd.training.seeds import seed_step
from kd.training.settings import CHECKPOINT, HISTORY, Fit

FIRST = 10  # losses recorded one by one, so that an early divergence tells where
_MEND = "the last good checkpoint is kept. Lower fit.lr, set fit.clip=1, or raise the temperature"


Learner = Distiller | Circle


def _learner(module: pl.LightningModule) -> Learner:
    if not isinstance(module, Learner):
        raise TypeError(f"expected a Distiller or a Circle, got {type(module).__name__}")
    return module


class Reseed(pl.Callback):
    """Set what a step depends on from (seed, step): neither dropout nor a loss's schedule knows what ran before."""

    def __init__(self, seed: int) -> None:
        """Keep the seed."""
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Reseed from the global step, and tell the losses that have a schedule where it stands."""
        seed_step(self.seed, trainer.global_step, trainer.global_rank)
        _learner(pl_module).at(trainer.global_step / trainer.num_training_batches, trainer.max_epochs or 1)


class Masks(pl.Callback):
    """Keep weights at 0: what a step moved away from it is put back before anything sees it."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        """``masks``, by the names of the student's parameters, are True where a weight may be other than 0."""
        self.masks = masks
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the parameters where they are now."""
        parameters = dict(_learner(pl_module).student.net.named_parameters())
        self.pairs = [(parameters[name], mask.to(parameters[name].device)) for name, mask in self.masks.items()]
        self.on_train_batch_end()

    def on_train_batch_end(self, *_: Any) -> None:
        """Put them back."""
        with torch.no_grad():
            for parameter, mask in self.pairs:
                parameter.mul_(mask)


class Recorder(pl.Callback):
    """The run's own record: line-flushed history, epoch means, weights digest per epoch, first losses, NaN watch.

    Loggers see what this writes; they are views of it.
    """

    def __init__(self, folder: Path, log_every: int, steps_per_epoch: int) -> None:
        """Write `history.jsonl` into ``folder``; log the parts every ``log_every`` steps (0: never)."""
        self.path = folder / HISTORY
        self.log_every, self.steps_per_epoch = log_every, steps_per_epoch
        self.losses: list[float] = []
        self.epochs: list[dict[str, Any]] = []
        self.resumed: list[int] = []
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # a term that a schedule leaves out of a step is not in that step's sum
        self.sound = 0  # the last step at which all was seen to be finite

    def state_dict(self) -> dict[str, Any]:
        """Plain data and numbers only: a checkpoint is loaded without pickle."""
        return {
            "losses": self.losses,
            "epochs": self.epochs,
            "resumed": self.resumed,
            "sums": {name: value.item() for name, value in self.sums.items()},
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the record up where the checkpoint left it."""
        self.losses, self.epochs = list(state_dict["losses"]), [dict(e) for e in state_dict["epochs"]]
        self.resumed = list(state_dict["resumed"])
        self.sums = {name: torch.tensor(v, dtype=torch.float64) for name, v in state_dict["sums"].items()}
        self.counts = {name: int(value) for name, value in state_dict["counts"].items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the lines that a killed run wrote after its last checkpoint."""
        if trainer.global_step:
            self.resumed.append(trainer.global_step)
        self.sound = trainer.global_step
        if not trainer.is_global_zero:
            return
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                if json.loads(line)["step"] <= trainer.global_step:
                    kept.append(line)
            except (ValueError, KeyError):
                break  # a line the kill cut short
        write_text(self.path, "".join(f"{line}\n" for line in kept))  # whole: the next kill may come now

    def due(self, step: int) -> bool:
        """Whether a step has a line of its own: the first one, and then each so many."""
        return self.log_every > 0 and (step % self.log_every == 0 or step == 1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Add the step to the epoch's sums, watch for numbers that are not finite, log where due."""
        module, step = _learner(pl_module), trainer.global_step
        total = outputs["loss"].detach()
        if not alone():
            names = list(module.parts)
            total, *parts = averaged(torch.stack([total, *(module.parts[n].detach() for n in names)])).unbind()
            module.parts = dict(zip(names, parts, strict=True))
        for name, value in {"loss": total, **module.parts}.items():
            if name in self.sums:
                self.sums[name] = self.sums[name].to(value.device).add_(value.detach())
            else:
                self.sums[name] = value.detach().double()
            self.counts[name] = self.counts.get(name, 0) + 1
        due = self.due(step)
        # On the CPU reading a number is free; on a GPU it would make each step wait, so there only where one is due.
        # The sum of an epoch stays not finite once a step was.
        if trainer.is_last_batch:
            self.check_weights(module, step)  # before validation, which knows neither step nor term
        elif due or total.device.type == "cpu" or step <= FIRST:
            self.check_losses(module, step)
        if step <= FIRST:
            self.losses.append(total.item())
        if due:
            row = {"train/loss": total.item(), **{f"train/{n}": p.item() for n, p in module.parts.items()}}
            row |= {name: value.item() for name, value in module.gradients.items()}
            row |= module.objective.balance.told()
            row |= {"lr": trainer.optimizers[0].param_groups[0]["lr"], "epoch": (step - 1) // self.steps_per_epoch}
            self.write(trainer, step, row)

    def check_losses(self, module: Learner, step: int) -> None:
        """Look whether each loss of this epoch was finite, up to ``step``.

        Raises:
            KDError: naming the step and the terms.
        """
        if not self.sums or bool(torch.isfinite(self.sums["loss"])):
            self.sound = step
            return
        bad = [name for name in module.parts if not bool(torch.isfinite(self.sums[name]))]
        named = f"term {' and '.join(map(repr, bad))} is" if bad else "the weighted sum of the terms is"
        now = ", ".join(f"{name}={part.item():.4g}" for name, part in module.parts.items())
        raise KDError(f"{self._when(step)}: {named} not finite ({now}); {_MEND}")

    def check_weights(self, module: Learner, step: int) -> None:
        """Look whether losses and weights are finite: a step's gradient can spoil these unseen by its loss.

        Raises:
            KDError: naming the step and the term or the weight.
        """
        self.check_losses(module, step)
        # Not every buffer: a mask of -inf is no divergence.
        learnt = [*module.named_parameters(), *(b for b in module.named_buffers() if "running_" in b[0])]
        wrong = [name for name, value in learnt if not value.isfinite().all()]
        if wrong:
            raise KDError(f"step {step}: after it {wrong[0]} is not finite, though the loss was; {_MEND}")

    def _when(self, step: int) -> str:
        return f"step {step}" if self.sound >= step - 1 else f"a step from {self.sound + 1} to {step}"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the epoch: means, validation metrics, weights digest."""
        module, step = _learner(pl_module), trainer.global_step
        self.check_losses(module, step)
        means = {f"train/{name}": value.item() / self.counts[name] for name, value in self.sums.items()}
        valid = {f"val/{n}": v for n, v in module.validation.items() if isinstance(v, (int, float))}
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        epoch = {
            "epoch": trainer.current_epoch,
            "step": step,
            "lr": lr,
            **means,
            **valid,
            **module.objective.balance.told(),
        }
        self.epochs.append({**epoch, "weights": weights_digest(module.net)})
        self.sums, self.counts = {}, {}
        module.validation = {}
        self.write(trainer, step, {f"epoch/{k}" if k.startswith("train/") else k: v for k, v in epoch.items()})

    def write(self, trainer: pl.Trainer, step: int, row: Mapping[str, Any]) -> None:
        """One line into the record, then to the loggers."""
        if not trainer.is_global_zero:
            return
        with self.path.open("a", buffering=1) as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=step)


class Selection(pl.Callback):
    """Keep the weights of the best validation epoch, and stop early, on validation alone; test is never seen."""

    def __init__(self, fit: Fit) -> None:
        """Read `select` and `patience`."""
        self.fit = fit
        self.best: float | None = None
        self.epoch = -1
        self.weights: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The best so far, weights included, so that a resumed run can still return to it."""
        return {"best": self.best, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best so far from the checkpoint."""
        self.best, self.epoch, self.weights = state_dict["best"], state_dict["epoch"], state_dict["weights"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at once if patience had ended when the checkpoint was written: Lightning keeps no note of it."""
        trainer.should_stop = self._patience_ended(trainer.current_epoch - 1)

    def _patience_ended(self, epoch: int) -> bool:
        return self.fit.patience is not None and self.best is not None and epoch - self.epoch >= self.fit.patience

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare this epoch's validation accuracy with the best."""
        module = _learner(pl_module)
        if trainer.sanity_checking or not self.fit.needs_validation:
            return
        score = float(module.validation["accuracy"])
        if self.best is None or score > self.best:
            self.best, self.epoch = score, trainer.current_epoch
            if self.fit.select == "best":
                self.weights = {k: v.detach().cpu().clone() for k, v in module.net.state_dict().items()}
        if self._patience_ended(trainer.current_epoch):
            trainer.should_stop = True

    def restore(self, module: Learner) -> None:
        """Put the chosen epoch's weights back into the student."""
        if self.fit.select == "best" and self.weights:
            module.net.load_state_dict(self.weights)


class Checkpoint(pl.Callback):
    """Write `last.ckpt` every so many seconds and at each epoch's end, whole or not at all, and only of finite weights.

    Never at an epoch's last batch: Lightning would resume after the validation that had not run yet.
    """

    def __init__(self, folder: Path, seconds: float, recorder: Recorder) -> None:
        """Write into ``folder`` what ``recorder`` finds sound."""
        self.path, self.seconds, self.last = folder / CHECKPOINT, seconds, time.monotonic()
        self.recorder = recorder

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write if it is time."""
        # Ranks write together or wait for ever, and their clocks differ.
        if time.monotonic() - self.last >= self.seconds and not trainer.is_last_batch and alone():
            self.write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write at the epoch's end if it is time, or the epoch was long enough to be worth it."""
        if not alone() or time.monotonic() - self.last >= min(self.seconds, 5.0):
            self.write(trainer, pl_module)

    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write beside, then rename."""
        self.recorder.check_weights(_learner(pl_module), trainer.global_step)
        temporary = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            temporary.replace(self.path)
        self.last = time.monotonic()


class Progress(pl.Callback):
    """Tell the parent process how far the training is, a few times a second."""

    def __init__(self, tell: Callable[[dict[str, Any]], None], total: int) -> None:
        """``tell`` sends an event; ``total`` is the number of steps."""
        self.tell, self.total, self.last = tell, total, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Send the step if the last message is old enough."""
        now = time.monotonic()
        if now - self.last > 0.2:
            self.last = now
            self.tell({"event": "step", "step": trainer.global_step, "total": self.total})


class Pruning(pl.Callback):
    """Report each epoch's validation to a trial, and stop where it gives the training up."""

    def __init__(self, trial: Trial) -> None:
        """Open the trial in this process."""
        self.metric, self.trial = trial.metric, trial.open()
        self.values: dict[int, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What the epochs so far were worth: another trial may resume this training."""
        return {"values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from the checkpoint."""
        self.values = dict(state_dict["values"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the epoch's value; the recorder clears it away."""
        value = _learner(pl_module).validation.get(self.metric.removeprefix("val/"))
        if isinstance(value, (int, float)):
            self.values[trainer.current_epoch + 1] = float(value)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report, after the record and the checkpoint of this epoch; a training that ends here anyway is kept.

        Raises:
            Pruned: if the trial is given up.
        """
        over = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if report(self.trial, self.values) and not over:
            raise Pruned(f"given up after epoch {trainer.current_epoch + 1} of {trainer.max_epochs}")


class EachStep(pl.Callback):
    """Call a function after each step, for what measures a training from outside."""

    def __init__(self, call: Callable[[], None]) -> None:
        """Keep the function."""
        self.call = call

    def on_train_batch_end(self, *_: Any) -> None:
        """Call it."""
        self.call()


class Together(pl.Callback):
    """Several callbacks as one: Lightning enters a context per callback and hook, which a small step feels."""

    HOOKS = ("on_train_start", "on_train_batch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end")

    def __init__(self, parts: Sequence[pl.Callback]) -> None:
        """``parts`` are called in this order at each hook of `HOOKS`, the only ones they may have."""
        self.parts = parts
        calls = {
            hook: [getattr(part, hook) for part in parts if getattr(type(part), hook) is not getattr(pl.Callback, hook)]
            for hook in self.HOOKS
        }
        self.starts, self.ends = calls["on_train_batch_start"], calls["on_train_batch_end"]
        self.calls = calls

    def on_train_start(self, *arguments: Any) -> None:
        """Pass on."""
        for call in self.calls["on_train_start"]:
            call(*arguments)

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Pass on."""
        for call in self.starts:
            call(*arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Pass on."""
        for call in self.ends:
            call(*arguments)

    def on_validation_end(self, *arguments: Any) -> None:
        """Pass on."""
        for call in self.calls["on_validation_end"]:
            call(*arguments)

    def on_train_epoch_end(self, *arguments: Any) -> None:
        """Pass on."""
        for call in self.calls["on_train_epoch_end"]:
            call(*arguments)

    def state_dict(self) -> dict[str, Any]:
        """Each part's state under its class's name."""
        return {type(part).__name__: state for part in self.parts if (state := part.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each part its own."""
        for part in self.parts:
            if type(part).__name__ in state_dict:
                part.load_state_dict(state_dict[type(part).__name__])
