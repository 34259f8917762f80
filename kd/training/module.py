"""The one LightningModule: methods differ by the terms their objective holds, never by subclass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from kd.models import Frozen, Normalised, Taps
from kd.objective import Objective
from kd.tasks.image import evaluate
from kd.training.gradients import keep_buffers, of_terms

Batch = dict[str, Tensor]
_PLAIN = frozenset({"_current_fx_name", "parts", "gradients", "gradients_due", "validation"})


class Distiller(pl.LightningModule):
    """A student under an objective; the teacher speaks live, or through the soft labels it wrote before.

    Args:
        student: what is trained and shipped.
        objective: the weighted terms, bound to their shapes.
        optimisers: from trainable parameters to what `configure_optimizers` returns.
        teacher: runs frozen on each batch where a term needs it.
        channels_last: give images to both networks with the channels innermost.
        stored: whether batches bring what the teacher said of them before, so that it need not run.
    """

    def __init__(
        self,
        student: Normalised,
        objective: Objective,
        optimisers: Callable[[list[torch.nn.Parameter]], dict[str, Any]],
        teacher: Normalised | None = None,
        stored: bool = False,
        channels_last: bool = False,
    ) -> None:
        """Install the taps: before any compilation, or hooks never fire."""
        super().__init__()
        self.student, self.objective, self.optimisers = student, objective, optimisers
        self.student_taps = Taps(student.net, objective.paths("student"))
        live = objective.needs_teacher and not stored
        if live and teacher is None:
            raise ValueError("a term of the objective needs a teacher, and there is neither a teacher nor its labels")
        self.stored = objective.needs_teacher and stored
        self.channels_last = channels_last
        if channels_last:
            for net in (student, teacher):
                if net is not None:
                    net.to(memory_format=torch.channels_last)
        self.teacher = Frozen(teacher) if live and teacher is not None else None
        self.teacher_taps = Taps(teacher.net, objective.paths("teacher")) if live and teacher is not None else None
        self.parts: dict[str, Tensor] = {}
        self.gradients_due = False
        self.gradients: dict[str, Tensor] = {}
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.validation: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Plain attributes without nn.Module's search for parameters: Lightning sets one 50 times a step."""
        if name in _PLAIN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Nothing: the loader made the batch where it is used."""
        return batch

    def views(self, batch: Batch) -> dict[str, Tensor]:
        """The named tensors that terms bind to."""
        images = self._laid(batch["image"])
        views = {"batch.target": batch["target"], "student.logits": self.student(images)}
        if "row" in batch:
            views["batch.row"] = batch["row"]
        views.update({f"student.{path}": value for path, value in self.student_taps.pop().items()})
        if self.stored:
            views.update({name: value for name, value in batch.items() if name.startswith("teacher.")})
        elif self.teacher is not None and self.teacher_taps is not None:
            views["teacher.logits"] = self.teacher(images)
            views.update({f"teacher.{path}": value for path, value in self.teacher_taps.pop().items()})
        return views

    def _laid(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def compile_nets(self) -> None:
        """Compile student and teacher in place: paths, taps and state stay as they are."""
        keep_buffers()
        self.student.compile()
        if self.teacher is not None:
            self.teacher.module.compile()

    def plain_nets(self) -> None:
        """Leave compilation behind: what judges and stores the student runs it as it was built."""
        for net in (self.student, None if self.teacher is None else self.teacher.module):
            if net is not None:
                net._compiled_call_impl = None

    def at(self, epoch: float, epochs: int) -> None:
        """Tell the terms where training stands."""
        self.objective.at(epoch, epochs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted sum of the terms; the parts stay in `parts` for whoever records them."""
        total: Tensor
        total, self.parts = self.objective(self.views(batch))
        self.gradients = self.gradients_of_terms() if self.gradients_due else {}
        return total

    def gradients_of_terms(self) -> dict[str, Tensor]:
        """What each of the last step's terms does to the student, as `of_terms` has it."""
        return of_terms(self.parts, self.objective.weights, [p for p in self.student.parameters() if p.requires_grad])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the logits; metrics are made of the whole split."""
        self.seen.append((self.student(self._laid(batch["image"])), batch["target"]))
        self.student_taps.pop()  # else the last batch's features stay alive

    def on_validation_epoch_end(self) -> None:
        """The split's metrics, in `validation`."""
        logits, targets = (torch.cat(column) for column in zip(*self.seen, strict=True))
        self.seen.clear()
        self.validation = evaluate(logits.float(), targets)

    def configure_optimizers(self) -> Any:
        """Student and the objective's own trainable parts (projections), which are checkpointed but never shipped."""
        trained = [*self.student.parameters(), *self.objective.parameters()]
        return self.optimisers([p for p in trained if p.requires_grad])
