"""Several teachers for one loss: their logits mixed into one teacher's, or the loss taken against each of them.

Each class wraps a loss that knows one teacher, and is given a list where that is given a tensor. `kd.losses.mixing` has
the formulas, and says what a temperature means for a mixture.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks
from kd.losses.mixing import confidence_weights, cross_entropy_weights, drawn, mean_logits, mixed, mixture, stacked

Teachers = Sequence[Tensor] | Tensor


class _Mixed(nn.Module):
    """A loss that knows one teacher, told as it is of shapes and of where training stands: what all mixes share."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def bind(self, student_shape: Any, teacher_shapes: Sequence[Any], *others: Any) -> None:
        """Let the loss make its parts."""
        _bind(self.loss, student_shape, teacher_shapes, *others)

    def at(self, epoch: float, epochs: int) -> None:
        """Pass on where training stands."""
        _tell(self.loss, epoch, epochs)


class MeanLogits(_Mixed):
    """A loss against `mean_logits` of the teachers.

    Args:
        loss: called as `loss(student=…, teacher=…)`, with the `target=…` that it takes.

    >>> import torch
    >>> from kd.losses.logits import LogitMSE
    >>> student, teachers = torch.zeros(1, 2), [torch.full((1, 2), 1.0), torch.full((1, 2), 3.0)]
    >>> MeanLogits(LogitMSE())(student=student, teacher=teachers)
    tensor(4.)
    """

    def forward(self, student: Tensor, teacher: Teachers, **others: Any) -> Tensor:
        """The scalar for logits (N, C) of the student's and a list of the teachers'."""
        return _against(self.loss, student, mean_logits(_listed(student, teacher)), others)


class MeanProbabilities(_Mixed):
    """A loss against the `mixture` of the teachers, each weighing the same or by fixed weights.

    Args:
        loss: called as `loss(student=…, teacher=…)`, with the `target=…` that it takes.
        weights: one a teacher, 0 or more; only their ratios count. None: all the same.
        temperature: at which probabilities are averaged; None: that of the loss, or 1 where it has none.

    Raises:
        InputError: if the weights are none.

    >>> import torch
    >>> from kd.losses.logits import SoftTargetKL
    >>> thirds = torch.tensor([[3.0, 1.0]]).log()
    >>> MeanProbabilities(SoftTargetKL(1.0), weights=[1, 0])(student=thirds, teacher=[thirds, torch.zeros(1, 2)])
    tensor(0.)
    """

    extra_repr = checks.shown("weights", "temperature")

    def __init__(
        self, loss: nn.Module, weights: Sequence[float] | None = None, temperature: float | None = None
    ) -> None:
        super().__init__(loss)
        self.weights, self.temperature = _weights(weights), _own(temperature)

    def forward(self, student: Tensor, teacher: Teachers, **others: Any) -> Tensor:
        """The scalar for logits (N, C) of the student's and a list of the teachers'.

        Raises:
            InputError: if there are more or fewer teachers than weights.
        """
        teachers = _listed(student, teacher)
        weights = None if self.weights is None else student.new_tensor(_as_many(self.weights, len(teachers)))
        return _against(self.loss, student, mixture(teachers, weights, _heat(self.temperature, self.loss)), others)


class ByConfidence(_Mixed):
    """A loss against the `mixture` of the teachers by their `confidence_weights`, sample by sample.

    Args:
        loss: called as `loss(student=…, teacher=…)`, with the `target=…` that it takes.
        temperature: at which probabilities are mixed; None: that of the loss, or 1 where it has none.

    >>> import torch
    >>> from kd.losses.logits import SoftTargetKL
    >>> teachers = [torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)]
    >>> ByConfidence(SoftTargetKL(1.0))(student=torch.zeros(1, 2), teacher=teachers)
    tensor(0.0386)
    """

    extra_repr = checks.shown("temperature")

    def __init__(self, loss: nn.Module, temperature: float | None = None) -> None:
        super().__init__(loss)
        self.temperature = _own(temperature)

    def forward(self, student: Tensor, teacher: Teachers, **others: Any) -> Tensor:
        """The scalar for logits (N, C) of the student's and a list of the teachers'."""
        teachers = _listed(student, teacher)
        mix = mixture(teachers, confidence_weights(teachers), _heat(self.temperature, self.loss))
        return _against(self.loss, student, mix, others)


class ByCrossEntropy(_Mixed):
    """A loss against the `mixture` of the teachers by their `cross_entropy_weights`, sample by sample.

    Args:
        loss: called as `loss(student=…, teacher=…)`, with the `target=…` if it takes one.
        temperature: at which probabilities are mixed; None: that of the loss, or 1 where it has none.

    >>> import torch
    >>> from kd.losses.logits import SoftTargetKL
    >>> teachers = [torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)]
    >>> ByCrossEntropy(SoftTargetKL(1.0))(student=torch.zeros(1, 2), teacher=teachers, target=torch.tensor([0]))
    tensor(0.0457)
    """

    extra_repr = checks.shown("temperature")

    def __init__(self, loss: nn.Module, temperature: float | None = None) -> None:
        super().__init__(loss)
        self.temperature = _own(temperature)

    def forward(self, student: Tensor, teacher: Teachers, target: Tensor, **others: Any) -> Tensor:
        """The scalar for logits (N, C) of the student's, a list of the teachers', and class indices (N,)."""
        teachers = _listed(student, teacher)
        mix = mixture(teachers, cross_entropy_weights(teachers, target), _heat(self.temperature, self.loss))
        return _against(self.loss, student, mix, {"target": target, **others})


class Gate(_Mixed):
    """A loss against the `mixture` of the teachers by weights that are learned from what the student makes of a sample.

    The weights are the softmax over the teachers of a linear map of a layer of the student's (maps are max-pooled over
    their positions), or of its logits where the term names no `feature`. The map begins at zero, where all teachers
    weigh the same, and is trained by the loss itself; the student is a constant to it.

    Liu, Zhang and Wang, "Adaptive Multi-Teacher Multi-level Knowledge Distillation" (2020);
    FLHonker/AMTML-KD-code, LR_adaptive_KD.ipynb, where the map is a product of two, which it also regularises.

    Args:
        loss: called as `loss(student=…, teacher=…)`, with the `target=…` that it takes.
        temperature: at which probabilities are mixed; None: that of the loss, or 1 where it has none.

    >>> from kd.losses.logits import SoftTargetKL
    >>> gate = Gate(SoftTargetKL(4.0))
    >>> gate.bind((8, 10), [(8, 10), (8, 10)], (8, 16, 4, 4))
    >>> gate.scores
    Linear(in_features=16, out_features=2, bias=False)
    """

    scores: nn.Module | None
    extra_repr = checks.shown("temperature")

    def __init__(self, loss: nn.Module, temperature: float | None = None) -> None:
        super().__init__(loss)
        self.temperature = _own(temperature)
        self.register_module("scores", None)

    def bind(
        self,
        student_shape: tuple[int, ...],
        teacher_shapes: Sequence[tuple[int, ...]],
        feature_shape: tuple[int, ...] | None = None,
    ) -> None:
        """Make the map; a second time it does nothing.

        Raises:
            InputError: if the feature is neither maps (N, D, H, W) nor vectors (N, D).
        """
        shape = student_shape if feature_shape is None else feature_shape
        if len(shape) not in (2, 4):
            raise InputError(f"a gate cannot read a layer of shape {tuple(shape)}; choose one of maps or vectors")
        if self.scores is None:
            self.scores = nn.Linear(shape[1], len(teacher_shapes), bias=False)
            nn.init.zeros_(self.scores.weight)
        super().bind(student_shape, teacher_shapes)

    def forward(self, student: Tensor, teacher: Teachers, feature: Tensor | None = None, **others: Any) -> Tensor:
        """The scalar for logits (N, C) of the student's, a list of the teachers', and a feature as bound.

        Raises:
            InputError: if `bind` was not called, or with others.
        """
        if not isinstance(self.scores, nn.Linear):
            raise InputError("a gate is used before it knows its shapes; call bind(student, teachers) first")
        teachers = _listed(student, teacher)
        seen = student if feature is None else feature
        if not checks.floats(seen) or seen.ndim not in (2, 4) or len(seen) != len(student) or not seen.numel():
            raise InputError(
                f"a gate is given a feature that is {checks.spelt(seen)} for {len(student)} samples; maps (N, D, H, W) "
                "or vectors (N, D) of the same samples were meant"
            )
        seen = checks.widened(seen.detach())
        seen = seen.amax(dim=(2, 3)) if seen.ndim == 4 else seen
        if (seen.shape[1], len(teachers)) != (self.scores.in_features, self.scores.out_features):
            raise InputError(
                f"a gate bound to {self.scores.in_features} features and {self.scores.out_features} teachers is given "
                f"{seen.shape[1]} and {len(teachers)}"
            )
        temperature = _heat(self.temperature, self.loss)
        with checks.exactly(seen):
            weights = F.linear(seen, checks.widened(self.scores.weight)).log_softmax(dim=1).T
        mix = mixed(F.log_softmax(stacked(teachers) / temperature, dim=2), weights, temperature)
        return _against(self.loss, student, mix, others)


class RandomChoice(_Mixed):
    """A loss against one of the teachers, drawn anew for each step.

    The draw is a function of the training's seed (`draws_from`) and of where it stands: a resumed run draws as if it
    had not stopped. The teachers that are not drawn are not asked.

    Fukuda et al., "Efficient Knowledge Distillation from an Ensemble of Teachers" (2017), there too a teacher for
    each minibatch.

    Args:
        loss: called as `loss(student=…, teacher=…)`, with the `target=…` that it takes.

    >>> import torch
    >>> from kd.losses.logits import LogitMSE
    >>> loss, student = RandomChoice(LogitMSE()), torch.zeros(1, 2)
    >>> for step in range(4):
    ...     loss.at(step / 4, epochs=1)
    ...     print(loss.heard(2), loss(student=student, teacher=[student + 1, student + 2]))
    [1] tensor(4.)
    [0] tensor(1.)
    [1] tensor(4.)
    [0] tensor(1.)
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__(loss)
        self.seed, self.position = 0, 0.0

    def draws_from(self, seed: int) -> None:
        """Take the seed of the draws."""
        self.seed = seed

    def at(self, epoch: float, epochs: int) -> None:
        """Draw for where training stands, and pass it on."""
        self.position = float(epoch)
        super().at(epoch, epochs)

    def heard(self, count: int) -> list[int]:
        """Which of ``count`` teachers this step asks."""
        return drawn(self.seed, self.position, count, 1)

    def forward(self, student: Tensor, teacher: Sequence[Tensor | None] | Tensor, **others: Any) -> Tensor:
        """The scalar for logits (N, C) of the student's and a list of the teachers', None for those not drawn."""
        teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        _listed(student, [one for one in teachers if one is not None])
        if not teachers:
            raise InputError("there is no teacher to draw; name a view or more, such as [teacher1.logits]")
        (index,) = self.heard(len(teachers))
        return _against(self.loss, student, teachers[index], others)


class Each(nn.Module):
    """A loss against each of the teachers, for any view of theirs: the mean, or the sum, over those of this step.

    Each teacher has its own copy of the loss, and so of what that trains. With `drop`, some teachers are left out of
    each step, drawn as in `RandomChoice`, and are not asked.

    Son et al., "Densely Guided Knowledge Distillation using Multiple Teacher Assistants" (2021); wonchulSon/DGKD,
    train.py, which sums (`reduce="sum"`) and leaves one out (`drop=1`).

    Args:
        loss: called as `loss(student=…, teacher=…)`, with what else it takes.
        reduce: `mean` or `sum`, over the teachers of a step.
        drop: how many teachers are left out of a step; one always stays.

    Raises:
        InputError: if a field is out of its range.

    >>> import torch
    >>> from kd.losses.logits import LogitMSE
    >>> loss, student = Each(LogitMSE()), torch.zeros(1, 2)
    >>> loss.bind((1, 2), [(1, 2), (1, 2)])
    >>> loss(student=student, teacher=[student + 1, student + 2])
    tensor(2.5000)
    """

    extra_repr = checks.shown("reduce", "drop")

    def __init__(self, loss: nn.Module, reduce: str = "mean", drop: int = 0) -> None:
        super().__init__()
        if reduce not in ("mean", "sum"):
            raise InputError(f"reduce is {reduce!r}; it must be 'mean' or 'sum'")
        if not (isinstance(drop, int) and not isinstance(drop, bool) and drop >= 0):
            raise InputError(f"drop is {drop!r}; it must be a whole number of teachers, 0 or more")
        self.reduce, self.drop = reduce, drop
        self.loss = nn.ModuleList([loss])  # a copy for each teacher, once they are known
        self.seed, self.position = 0, 0.0

    def draws_from(self, seed: int) -> None:
        """Take the seed of the draws."""
        self.seed = seed

    def bind(self, student_shape: Any, teacher_shapes: Sequence[Any], *others: Any) -> None:
        """Make a copy of the loss for each teacher, and let each make its own parts; a second time it does nothing."""
        if len(self.loss) > 1:
            return
        self.loss.extend(copy.deepcopy(self.loss[0]) for _ in teacher_shapes[1:])
        for loss, shape in zip(self.loss, teacher_shapes, strict=True):
            _bind(loss, student_shape, [shape], *others)

    def at(self, epoch: float, epochs: int) -> None:
        """Draw for where training stands, and pass it on."""
        self.position = float(epoch)
        for loss in self.loss:
            _tell(loss, epoch, epochs)

    def heard(self, count: int) -> list[int]:
        """Which of ``count`` teachers this step asks."""
        take = max(1, count - self.drop)
        return drawn(self.seed, self.position, count, take) if take < count else list(range(count))

    def forward(self, student: Any, teacher: Sequence[Tensor | None] | Tensor, **others: Any) -> Tensor:
        """The scalar for what the loss takes of the student, and a list of the teachers' views, None where dropped.

        Raises:
            InputError: if `bind` was not called, or for other teachers.
        """
        each = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        if len(self.loss) != len(each):
            raise InputError(f"{len(self.loss)} losses meet {len(each)} teachers; call bind(student, teachers) first")
        kept = self.heard(len(each))
        parts = [_against(self.loss[i], student, each[i], others) for i in kept]
        total = sum(parts[1:], start=parts[0])
        return total / len(kept) if self.reduce == "mean" else total


def _listed(student: Tensor, teacher: Teachers) -> list[Tensor]:
    teachers: list[Any] = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    for one in teachers:
        checks.pair(student, one)
    return teachers


def _against(loss: nn.Module, student: Any, teacher: Any, others: dict[str, Any]) -> Tensor:
    """The loss against one teacher, given of the other views those that it takes: a target may be for the mix alone."""
    names = inspect.signature(loss.forward).parameters
    open_ = any(one.kind is one.VAR_KEYWORD for one in names.values())
    found: Tensor = loss(
        student=student, teacher=teacher, **{name: view for name, view in others.items() if open_ or name in names}
    )
    return found


def _bind(loss: nn.Module, student_shape: Any, teacher_shapes: Sequence[Any], *others: Any) -> None:
    """Tell a loss that asks for them the shapes of its views; a mix has that of any of the teachers."""
    if callable(bind := getattr(loss, "bind", None)):
        bind(student_shape, teacher_shapes[0], *others)


def _tell(loss: nn.Module, epoch: float, epochs: int) -> None:
    if callable(at := getattr(loss, "at", None)):
        at(epoch, epochs)


def _heat(own: float | None, loss: nn.Module) -> float:
    return float(getattr(loss, "temperature", 1.0)) if own is None else own


def _own(temperature: float | None) -> float | None:
    return None if temperature is None else checks.positive("temperature", temperature)


def _weights(weights: Sequence[float] | None) -> list[float] | None:
    if weights is None:
        return None
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise InputError(f"weights are {weights!r}; give a number for each teacher, such as [2,1]")
    found = [checks.within("a teacher's weight", weight) for weight in weights]
    if not sum(found):
        raise InputError(f"weights are {list(weights)}; one of them must be above 0")
    return [weight / sum(found) for weight in found]


def _as_many(weights: list[float], count: int) -> list[float]:
    if len(weights) != count:
        raise InputError(f"there are {len(weights)} weights and {count} teachers; give one for each")
    return weights
