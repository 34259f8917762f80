"""A teacher that learns to teach: from how well its student would do, one step on, on samples kept from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from kd.training.loaders import EpochLoader

if TYPE_CHECKING:
    from kd.training.circle import Circle

Batch = dict[str, Tensor]


class Tutor:
    """MetaDistil's pilot update, before each step of the student's.

    The student is moved as its terms would move it, on a copy and by a plain gradient step; the copy's cross-entropy on
    held-out samples (the quiz) is differentiated through that step to the teacher, which takes a step of its own. The
    student's real step then hears the teacher as it is now. What the student's terms train themselves is a constant to
    the copy.

    Zhou, Xu and McAuley, "BERT Learns to Teach: Knowledge Distillation with Meta Learning" (2022), algorithm 1.

    Args:
        quiz: batches of the held-out samples; entered by the step, whatever the steps before it were.
        optimiser: from the teacher's parameters to what steps them.
        factor: of the teacher's learning rate at a step.
        teacher: the member that learns so.
        student: the member that it teaches.
    """

    def __init__(
        self,
        quiz: EpochLoader,
        optimiser: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        factor: Callable[[int], float],
        teacher: str = "teacher",
        student: str = "student",
    ) -> None:
        self.quiz, self.make, self.factor, self.teacher, self.student = quiz, optimiser, factor, teacher, student
        self.optimiser: torch.optim.Optimizer | None = None
        self.kept: dict[str, Any] | None = None
        self.rates: list[float] = []
        self.next = -1
        self.batches: Iterator[Batch] = iter(())

    def __call__(self, circle: Circle, batch: Batch) -> None:
        """Let the teacher learn from what its student would make of a batch."""
        step = int(circle.global_step)
        optimiser = self._stepper(circle)
        for group, rate in zip(optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.factor(step)
        loss = self.loss(circle, batch, self._quiz(step))
        learning = [p for group in optimiser.param_groups for p in group["params"]]
        for parameter, gradient in zip(learning, torch.autograd.grad(loss, learning, allow_unused=True), strict=True):
            parameter.grad = gradient
        optimiser.step()
        optimiser.zero_grad()

    def loss(self, circle: Circle, batch: Batch, quiz: Batch) -> Tensor:
        """The cross-entropy on the quiz of the student after the step that its terms would have it take on a batch.

        Args:
            circle: where teacher and student are.
            batch: of the training.
            quiz: of the held-out samples.
        """
        student, teacher = circle.members[self.student].net, circle.members[self.teacher].net
        weights = dict(student.named_parameters())
        buffers = {name: value.clone() for name, value in student.named_buffers()}  # a trial leaves no statistics
        aside = {name: value.clone() for name, value in teacher.named_buffers()}
        images = circle.laid(batch["image"])
        own = {"logits": functional_call(student, {**weights, **buffers}, (images,)), **circle.taps[self.student].pop()}
        taught = {"logits": functional_call(teacher, {**dict(teacher.named_parameters()), **aside}, (images,))}
        taught |= circle.taps[self.teacher].pop()
        views = {"batch.target": batch["target"]}
        views |= {f"student.{path}": value for path, value in own.items()}
        views |= {f"teacher.{path}": value for path, value in taught.items()}  # not detached: this is the way back
        total, _ = circle.objective(views)
        moving = {name: p for name, p in weights.items() if p.requires_grad}
        slopes = torch.autograd.grad(total, list(moving.values()), create_graph=True, allow_unused=True)
        rate = circle.rate()
        moved = {
            name: p if slope is None else p - rate * slope
            for (name, p), slope in zip(moving.items(), slopes, strict=True)
        }
        found = functional_call(student, {**weights, **moved, **buffers}, (circle.laid(quiz["image"]),))
        circle.taps[self.student].pop()
        return F.cross_entropy(found, quiz["target"])

    def _stepper(self, circle: Circle) -> torch.optim.Optimizer:
        if self.optimiser is None:
            net = circle.members[self.teacher].net
            self.optimiser = self.make([p for p in net.parameters() if p.requires_grad])
            self.rates = [float(group["lr"]) for group in self.optimiser.param_groups]
            if self.kept is not None:
                self.optimiser.load_state_dict(self.kept)
                self.kept = None
        return self.optimiser

    def _quiz(self, step: int) -> Batch:
        """The batch of this step, from the position alone."""
        epoch, first = divmod(step, len(self.quiz))
        if step != self.next or first == 0:
            self.batches = self.quiz.batches(epoch, first)
        self.next = step + 1
        return next(self.batches)

    def state_dict(self) -> dict[str, Any]:
        """What the teacher's optimiser remembers."""
        return {} if self.optimiser is None else {"optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep it until there is an optimiser to give it to."""
        self.kept = state.get("optimiser")
