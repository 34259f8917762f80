"""The one LightningModule: methods differ by the terms their objective holds, never by subclass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from kd.errors import InputError
from kd.models import Frozen, Grafted, Normalised, Taps, plain
from kd.objective import Objective
from kd.roles import by_role
from kd.tasks.image import evaluate
from kd.training.again import again
from kd.training.gradients import keep_buffers, of_terms

Batch = dict[str, Tensor]
_PLAIN = frozenset({"_current_fx_name", "parts", "gradients", "gradients_due", "validation"})


class Distiller(pl.LightningModule):
    """A student under an objective; each teacher speaks live, or through the soft labels it wrote before.

    Args:
        student: what is trained and shipped.
        objective: the weighted terms, bound to their shapes.
        optimisers: from trainable parameters to what `configure_optimizers` returns.
        teachers: run frozen, one after the other, on each batch where a term of the step needs them; one, or by role.
        channels_last: give images to both networks with the channels innermost.
        stored: the teachers of which batches bring what they said of them before, so that these need not run.
        graft: what is shipped in the student's place, where a term asks for another end; its layers are the student's
            and the objective's own.
    """

    graft: Grafted | None

    def __init__(
        self,
        student: Normalised,
        objective: Objective,
        optimisers: Callable[[list[torch.nn.Parameter]], dict[str, Any]],
        teachers: Normalised | Mapping[str, Normalised] | None = None,
        stored: Collection[str] = (),
        channels_last: bool = False,
        graft: Grafted | None = None,
    ) -> None:
        """Install the taps: before any compilation, or hooks never fire."""
        super().__init__()
        self.student, self.objective, self.optimisers = student, objective, optimisers
        self.student_taps = Taps(student.net, objective.paths("student"))
        given: Mapping[str, Normalised] = by_role(teachers)
        self.stored = frozenset(objective.teachers) & frozenset(stored)
        for name, term in objective.active.items():
            if term.under is not None and self.stored & set(term.under.sides):
                raise InputError(
                    f"the term {name} runs the teacher again, which stored labels cannot: labels.live=true"
                )
        live = [role for role in objective.teachers if role not in self.stored]
        for role in live:
            if role not in given:
                raise ValueError(f"a term of the objective hears {role}, and there is neither that net nor its labels")
        self.channels_last = channels_last
        if channels_last:
            for net in (student, *given.values()):
                net.to(memory_format=torch.channels_last)
        self.teachers = torch.nn.ModuleDict({role: Frozen(given[role]) for role in live})
        self.teacher_taps = {role: Taps(given[role].net, objective.paths(role)) for role in live}
        # Past nn.Module's own __setattr__: its layers have their names in the state already.
        object.__setattr__(self, "graft", graft)
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
            views.update({name: value for name, value in batch.items() if name.startswith("teacher")})
        if self.teacher_taps:
            asked = {view.partition(".")[0] for view in self.objective.asks}
            for role, taps in self.teacher_taps.items():
                if role in asked:
                    views[f"{role}.logits"] = self.teachers[role](images)
                    views.update({f"{role}.{path}": value for path, value in taps.pop().items()})
        if self.objective.again:
            nets = {role: (self.live[role], taps) for role, taps in self.teacher_taps.items()}
            views |= again(self.objective, {"student": (self.student, self.student_taps), **nets}, images, views)
        return views

    def _laid(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def compile_nets(self) -> None:
        """Compile student and teachers in place: paths, taps and state stay as they are."""
        keep_buffers()
        self.student.compile()
        for net in self.live.values():
            net.compile()

    def plain_nets(self) -> None:
        """Leave compilation behind: what judges and stores the student runs it as it was built."""
        for net in (self.student, *self.live.values()):
            net._compiled_call_impl = None

    @property
    def live(self) -> dict[str, Normalised]:
        """The teachers that run, by role."""
        return {role: frozen.module for role, frozen in self.teachers.items()}  # type: ignore[misc]

    @property
    def net(self) -> torch.nn.Module:
        """The plain net that is judged, kept and stored."""
        return plain(self.student) if self.graft is None else self.graft

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
        return of_terms(self.parts, self.objective.pulls, [p for p in self.student.parameters() if p.requires_grad])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the logits; metrics are made of the whole split."""
        images = self._laid(batch["image"])
        logits = self.student(images) if self.graft is None else self.graft(self.student.normalised(images))
        self.seen.append((logits, batch["target"]))
        self.student_taps.clear()  # else the last batch's features stay alive

    def on_validation_epoch_end(self) -> None:
        """The split's metrics, in `validation`."""
        logits, targets = (torch.cat(column) for column in zip(*self.seen, strict=True))
        self.seen.clear()
        self.validation = evaluate(logits.float(), targets)

    def configure_optimizers(self) -> Any:
        """Student and the objective's own trainable parts (projections), which are checkpointed but never shipped."""
        trained = [*self.student.parameters(), *self.objective.parameters()]
        return self.optimisers([p for p in trained if p.requires_grad])
