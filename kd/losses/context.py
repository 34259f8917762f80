"""Losses that intervene on the context that a class stands in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks
from kd.losses.layers import each_shape, listed

_SMALL = 1e-12


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two vectors over the squared length of the teacher's: mean over samples.

    Deng and Zhang, "Comprehensive Knowledge Distillation with Causal Intervention" (2021); Xiang-Deng-DL/CID,
    distiller_zoo/mse_norm.py.

    Args:
        student: features (N, …), already projected to the teacher's width.
        teacher: features (N, …).

    Raises:
        InputError: if one holds no floats or nothing, or they are of two batches or widths.

    >>> relative_error(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))  # 1/4 and 0
    tensor(0.1250)
    """
    student, teacher = checks.rows(student, teacher)
    if student.shape != teacher.shape:
        raise InputError(f"features of width {student.shape[1]} and {teacher.shape[1]} have no distance; project one")
    return ((student - teacher).square().sum(dim=1) / teacher.square().sum(dim=1).clamp(min=_SMALL)).mean()


def within_classes(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Squared difference of the cosines of any two samples of a class: mean over its n² pairs, then over classes.

    Classes of one sample in the batch are left out; where there are no others it is 0.

    Deng and Zhang, "Comprehensive Knowledge Distillation with Causal Intervention" (2021); Xiang-Deng-DL/CID,
    helper/loops.py, distiller_zoo/COS.py.

    Args:
        student: features (N, …).
        teacher: features (N, …), of any width.
        target: class indices (N,).

    Raises:
        InputError: if one holds no floats or nothing, or they are of two batches.

    >>> same, apart = torch.tensor([[1.0, 0.0], [2.0, 0.0], [5.0, 5.0]]), torch.tensor([[1.0], [-1.0], [1.0]])
    >>> within_classes(same, apart, torch.tensor([0, 0, 1]))  # cosines 1 against -1 in two of four pairs
    tensor(2.)
    """
    student, teacher = checks.rows(student, teacher)
    if not checks.whole_numbers(target) or target.shape != student.shape[:1]:
        raise InputError(f"the target is {checks.spelt(target)}; {len(student)} class indices were meant")
    with checks.exactly(student):
        ours, theirs = (rows @ rows.T for rows in (F.normalize(student, dim=1), F.normalize(teacher, dim=1)))
    alike = target[:, None] == target
    members = alike.sum(dim=1)  # of each sample's class
    several = members > 1
    # Each of a class's n samples carries 1/n of its class; so do the n pairs of each of them.
    share = (several / members).to(ours.dtype)
    each = ((ours - theirs).square() * alike).sum(dim=1) / members
    return (share * each).sum() / share.sum().clamp(min=1.0)


class CID(nn.Module):
    """Features that are right relative to their length, alike within classes, and a classifier that is told contexts.

    A linear layer brings the student's features to the teacher's width for `relative_error`; `within_classes` takes
    them as they are. The intervention: a second classifier is given a sample's features beside its context, which is
    the mean of all classes' features by how likely the student finds each class, so that a class is not known by the
    company that it keeps. A class's features are means over the epoch before, each sample by how sure the teacher is of
    its label. This part begins when a share of the epochs, `warmup`, is done, and not before one is.

    Layer and classifier are trained and checkpointed with the objective, with the contexts, and never shipped. The
    authors ship the second classifier and its contexts; here the student keeps its own, so its accuracy is not theirs.

    Deng and Zhang, "Comprehensive Knowledge Distillation with Causal Intervention" (2021); Xiang-Deng-DL/CID,
    helper/loops.py, train_student.py.

    Args:
        sample: weight of `relative_error`.
        classes: weight of `within_classes`.
        context: weight of the second classifier's cross-entropy.
        temperature: at which teacher and student say how likely a class is.
        warmup: share of the epochs before contexts are used, from 0 to 1.

    Raises:
        BadValue: if one is out of its range.

    >>> loss = CID(sample=1.0)
    >>> loss.bind((8, 3), [(8, 6), (8, 5)], (8, 5))
    >>> loss.projection, loss.classifier, loss.contexts.shape
    (Linear(in_features=3, out_features=6, bias=True), Linear(in_features=6, out_features=5, bias=True), \
torch.Size([5, 3]))
    """

    projection: nn.Module | None
    classifier: nn.Module | None
    contexts: Tensor | None
    sums: Tensor | None
    sure: Tensor | None
    counted: Tensor
    extra_repr = checks.shown("sample", "classes", "context", "temperature", "warmup")

    COMPARES_SAMPLES = True

    def __init__(
        self,
        sample: float = 10.0,
        classes: float = 1.0,
        context: float = 1.0,
        temperature: float = 4.0,
        warmup: float = 1 / 12,
    ) -> None:
        super().__init__()
        self.sample, self.classes = checks.within("sample", sample), checks.within("classes", classes)
        self.context = checks.within("context", context)
        self.temperature = checks.positive("temperature", temperature)
        self.warmup = checks.within("warmup", warmup, high=1.0)
        for name in ("projection", "classifier"):
            self.register_module(name, None)
        for name in ("contexts", "sums", "sure"):
            self.register_buffer(name, None)
        self.register_buffer("counted", torch.zeros((), dtype=torch.long))  # the epoch that the sums are of
        self.epoch, self.begins = 0, 1
        self._counted: int | None = None  # what `counted` holds, so that no step waits for a GPU to read it

    def bind(self, student_shape: Sequence[int], teacher_shape: Any, feature_shape: Sequence[int]) -> None:
        """Make layer, classifier and contexts, drawing from the global generator; a second time it does nothing.

        Args:
            student_shape: of the student's features, batch first.
            teacher_shape: of the teacher's features and of its logits.
            feature_shape: of the student's logits.
        """
        if self.projection is not None:
            return
        theirs = each_shape(teacher_shape)
        _counted_views(len(theirs))
        wide, classes = math.prod(student_shape[1:]), feature_shape[1]
        self.projection = nn.Linear(wide, math.prod(theirs[0][1:]))
        self.classifier = nn.Linear(2 * wide, classes)
        self.contexts, self.sums = torch.zeros(classes, wide), torch.zeros(classes, wide)
        self.sure = torch.zeros(classes)

    def at(self, epoch: float, epochs: int) -> None:
        """Know the epoch, for the contexts of the one before; and from which on they are used."""
        self.epoch, self.begins = int(epoch), max(1, round(self.warmup * epochs))

    def forward(self, student: Tensor, teacher: Sequence[Tensor], target: Tensor, feature: Tensor) -> Tensor:
        """The scalar for the student's features (N, …), the teacher's features and logits, labels, own logits (N, C).

        Raises:
            InputError: if `bind` was not called, or the views are others than it was told.
        """
        theirs = listed(teacher)
        _counted_views(len(theirs))
        checks.rows(student, theirs[0])
        said, heard, target = checks.labelled(feature, theirs[1], target)
        rows = checks.widened(student.flatten(1))
        if not isinstance(self.projection, nn.Linear) or not isinstance(self.classifier, nn.Linear):
            raise InputError("cid is used before it knows its shapes; call bind(student, teacher, feature) first")
        if (rows.shape[1], said.shape[1]) != (self.projection.in_features, self.classifier.out_features):
            raise InputError(
                f"cid was bound to {self.projection.in_features} features and {self.classifier.out_features} classes, "
                f"and is given {rows.shape[1]} and {said.shape[1]}"
            )
        contexts = self._contexts(rows.detach(), heard, target)
        total = self.classes * within_classes(rows, theirs[0], target)
        total = total + self.sample * relative_error(self.projection(student.flatten(1)), theirs[0])
        if contexts is None or not self.context:
            return total
        likely = (said.detach() / self.temperature).softmax(dim=1)
        with checks.exactly(rows):
            own = likely @ contexts.to(likely.dtype)
            found = F.linear(
                torch.cat([rows, own], dim=1),
                *(checks.widened(p) for p in (self.classifier.weight, self.classifier.bias)),
            )
        return total + self.context * F.cross_entropy(found, target)

    @torch.no_grad()
    def _contexts(self, rows: Tensor, teacher: Tensor, target: Tensor) -> Tensor | None:
        """The classes' features of the epoch before, where they are used; in training these samples are counted too."""
        assert self.contexts is not None and self.sums is not None and self.sure is not None
        if self._counted is None:
            self._counted = int(self.counted)
        if self.training:
            if self._counted != self.epoch:
                there = self.sure > 0
                means = self.sums / self.sure.clamp(min=_SMALL)[:, None]
                self.contexts = torch.where(there[:, None], means, self.contexts)
                self.sums, self.sure = torch.zeros_like(self.sums), torch.zeros_like(self.sure)
                self._counted = self.epoch
                self.counted.fill_(self.epoch)
            sure = (teacher / self.temperature).softmax(dim=1)
            # A product, and no sum by index, whose order a GPU does not keep.
            weights = F.one_hot(target, teacher.shape[1]).to(sure.dtype) * sure
            with checks.exactly(rows):
                self.sums += weights.T @ rows.to(weights.dtype)
            self.sure += weights.sum(dim=0)
        return self.contexts if self.epoch >= self.begins else None


def _counted_views(count: int) -> None:
    if count != 2:
        raise InputError(
            f"cid is given {count} view{'s' if count != 1 else ''} of the teacher; features and logits were meant: "
            "[teacher.embedding,teacher.logits]"
        )
