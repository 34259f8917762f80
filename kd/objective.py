"""What is minimised: named terms, each a loss with its weight and the views it binds to.

A view is one named tensor: `student.logits`, `teacher.logits`, a layer's output such as `student.layer3`, or
`batch.target`; or a part that any network has, such as `student.last`, or several, `student.stages` (`kd.names`). Of
several teachers the views are `teacher1.logits`, `teacher2.layer3`, …; `earlier.logits` is what the student said of a
sample when it saw it last.
Terms name views; losses see tensors, and a list of them where a term names a list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kd import binding
from kd.balance import Uncertainty
from kd.binding import Finds, Views
from kd.binding import each as _each
from kd.earlier import Earlier
from kd.errors import InputError, nearest
from kd.interchange import Interchange
from kd.names import EARLIER
from kd.roles import is_teacher
from kd.schedules import Schedule

Value = TypeVar("Value")

LOGITS = "logits"
_NUMBER = r"\d*"  # of one among several teachers
_SIDES = {"student": "student", "teacher": "teacher", "feature": "student", "target": "batch", "row": "batch"}


@dataclass(frozen=True, eq=False)
class Term:
    """One loss, what it weighs, and the views it is given.

    Args:
        loss: called as `loss(student=…)` with `teacher=…`, `feature=…`, `target=…` and `row=…` where those are named;
            gives a scalar.
        weight: 0 or more. At exactly 0 the term is not computed at all.
        student: `student.logits`, or `student.` and the path of a layer; or a list of such, for a loss on several.
        teacher: `teacher.logits`, or `teacher.` and the path of a layer; or a list of such; or `earlier.logits`.
        target: `batch.target`.
        feature: a second view of the student's, for a loss that reads its logits and a layer; or a list of such.
        row: `batch.row`, each sample's place in the split, for a loss that remembers samples.
        part: `teacher.classifier`, or `teacher.` and the path of a layer: a loss is lent a frozen copy of it.
        schedule: numbers that change over training, by the path of their field: `weight`, `loss.temperature`.
        log_variance: where a learned log-variance starts, which weighs the term further (`kd.balance`); None: none.
        under: an interchange of activations; then the loss is given what the networks say and compute in a pass of
            their own, in which some channels are those of another sample. Needs teachers that run.

    Raises:
        InputError: if the weight is negative or no finite number, a name does not begin as it must, or a field that is
            scheduled is no number of the loss's.

    >>> from kd.losses.logits import CrossEntropy
    >>> Term(CrossEntropy(), 0.1, student="logits", target="batch.target")
    Traceback (most recent call last):
        ...
    kd.errors.InputError: a term reads 'logits' as its student; a name that begins with 'student.' was meant, such as \
'student.logits'
    """

    loss: nn.Module
    weight: float
    student: Views
    teacher: Views | None = None
    target: str | None = None
    feature: Views | None = None
    row: str | None = None
    part: str | None = None
    schedule: Mapping[str, Schedule] = field(default_factory=dict)
    log_variance: float | None = None
    under: Interchange | None = None

    def __post_init__(self) -> None:
        """Refuse what no batch can mend."""
        if not isinstance(self.loss, nn.Module):
            raise InputError(f"a term's loss is {self.loss!r}; a module with forward(student=…, …) was meant")
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not (number and 0 <= self.weight < math.inf):
            raise InputError(f"a term weighs {self.weight!r}; a finite number, 0 or more, was meant")
        object.__setattr__(self, "weight", float(self.weight))  # frozen to its users, not to its own construction
        for role, given in {"student": self.student, **self.names()}.items():
            side = _SIDES[role]
            several = isinstance(given, Sequence) and not isinstance(given, str) and side != "batch" and len(given) > 0
            for view in given if several else [given]:
                if isinstance(view, str) and re.match(rf"{side}{_NUMBER if side == 'teacher' else ''}\..", view):
                    continue
                if role == "teacher" and view == EARLIER:
                    continue
                example = f"batch.{role}" if side == "batch" else f"{side}.{LOGITS}"
                raise InputError(
                    f"a term reads {view!r} as its {role}; a name that begins with '{side}.' was meant, such as "
                    f"{example!r}"
                )
        binding.check_roles(self.loss, ["student", *self.names()])
        if self.part is not None and not re.match(rf"teacher{_NUMBER}\..", str(self.part)):
            raise InputError(f"a term borrows {self.part!r}; a teacher's layer was meant, such as teacher.classifier")
        if (self.part is None) == hasattr(self.loss, "lend"):
            said = "needs a part of the teacher: set part=teacher.classifier" if self.part is None else "takes no part"
            raise InputError(f"the loss {type(self.loss).__name__} {said}")
        for path in self.schedule:
            if path != "weight":
                _owners(self.loss, path)
        if self.under is not None:
            self._check_under(self.under)

    def _check_under(self, under: Any) -> None:
        if not isinstance(under, Interchange):
            raise InputError(f"a term's under is {under!r}; an interchange was meant, e.g. kd.interchange.Interchange")
        read = {view.partition(".")[0] for views in self.names().values() for view in _each(views)} - {"batch"}
        if read != set(under.sides):
            raise InputError(
                f"a term reads {', '.join(sorted(read))} under an interchange in {', '.join(sorted(under.sides))}; "
                "name the same networks in both, one student and one teacher"
            )

    @property
    def weighs(self) -> bool:
        """Whether it ever weighs anything.

        >>> from kd.losses.logits import CrossEntropy
        >>> from kd.schedules import Linear
        >>> rises = {"weight": Linear(0, 1)}
        >>> Term(CrossEntropy(), 0, "student.logits", target="batch.target", schedule=rises).weighs
        True
        """
        return any(self.schedule["weight"].ends()) if "weight" in self.schedule else self.weight != 0

    def names(self) -> dict[str, Views]:
        """The view's name, or the list of them, for each argument that the loss is given.

        >>> from kd.losses.logits import CrossEntropy
        >>> Term(CrossEntropy(), 1, student="student.logits", target="batch.target").names()
        {'student': 'student.logits', 'target': 'batch.target'}
        """
        given = {role: getattr(self, role) for role in ("student", "teacher", "feature", "target", "row")}
        return {role: view for role, view in given.items() if view is not None}


@dataclass(frozen=True)
class Graft:
    """What is shipped behind one of the student's layers, in the place of all that follows it there.

    Args:
        term: that asks for it.
        at: the layer's name, as taps take it.
        tail: makes logits of what the layer gives; its layers are the loss's, or lent to it.
    """

    term: str
    at: str
    tail: nn.Module


class Objective(nn.Module):
    """The weighted sum of named terms.

    Terms stand in the order of their names, not of the mapping: the sum and the draw of trainable parts must give the
    same bits when a config is read back with sorted keys. The losses of active terms are submodules, so what they
    train is optimised and checkpointed with the objective.

    Args:
        terms: name to term; the name is what logs and reports show.

    Raises:
        InputError: if no term weighs anything, or a name is no identifier.

    >>> from kd.losses.logits import CrossEntropy, SoftTargetKL
    >>> objective = Objective({
    ...     "ce": Term(CrossEntropy(), 0.1, student="student.logits", target="batch.target"),
    ...     "kd": Term(SoftTargetKL(4.0), 0.9, student="student.logits", teacher="teacher.logits"),
    ... })
    >>> logits = torch.tensor([[1.0, 0.0]])
    >>> total, parts = objective(
    ...     {"student.logits": logits, "teacher.logits": logits, "batch.target": torch.tensor([0])})
    >>> total, parts["ce"], parts["kd"]
    (tensor(0.0313), tensor(0.3133), tensor(0.))
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        super().__init__()
        for name in terms:
            # The name becomes an attribute, a logged metric (train/ce) and a column.
            if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                raise InputError(f"a term cannot be called {name!r}; use letters, digits and _, such as 'kd'")
        self.terms: dict[str, Term] = dict(sorted(terms.items()))
        self.active: dict[str, Term] = {name: term for name, term in self.terms.items() if term.weighs}
        if not self.active:
            weightless = f"all weights are 0 ({', '.join(self.terms)})" if self.terms else "there is no term"
            raise InputError(f"the objective has nothing to minimise: {weightless}; give a term a weight above 0")
        self.losses = nn.ModuleDict({name: term.loss for name, term in self.active.items()})
        self.weights: dict[str, float] = {name: term.weight for name, term in self.active.items()}
        starts = {name: term.log_variance for name, term in self.active.items() if term.log_variance is not None}
        self.balance = Uncertainty(starts)
        read = {view for term in self.active.values() for views in term.names().values() for view in _each(views)}
        self.earlier = Earlier() if EARLIER in read else None
        self._scheduled: list[Any] = [term.loss for term in self.active.values() if hasattr(term.loss, "at")]
        # Without a schedule or a draw, each step asks for the same views.
        self._same = not any(hasattr(t.loss, "heard") or "weight" in t.schedule for t in self.active.values())
        self._asked: frozenset[str] | None = None
        self._changes = {name: term.under for name, term in self.active.items() if term.under is not None}

    @property
    def needs_teacher(self) -> bool:
        """Whether an active term reads a view of a teacher's that is another network."""
        return any(view != EARLIER for term in self.active.values() for view in _each(term.teacher or []))

    @property
    def teachers(self) -> list[str]:
        """The teachers that active terms ever hear: `teacher`, or `teacher1`, `teacher2` and so on.

        >>> from kd.losses.logits import SoftTargetKL
        >>> Objective({"kd": Term(SoftTargetKL(4.0), 1, "student.logits", "teacher2.logits")}).teachers
        ['teacher2']
        """
        named = [view for term in self.active.values() for views in term.names().values() for view in _each(views)]
        return sorted({side for view in named if is_teacher(side := view.partition(".")[0])})

    def names_parts(self, side: str) -> bool:
        """Whether an active term names a part of that side's network, so that `resolve` needs its outline.

        >>> from kd.losses.logits import CrossEntropy
        >>> ce = Term(CrossEntropy(), 1, student="student.last", target="batch.target")
        >>> Objective({"ce": ce}).names_parts("student")
        True
        """
        inside = [change.names() for change in self._changes.values()]
        return any(binding.parts(views, side) for views in (*(t.names() for t in self.active.values()), *inside))

    def resolve(self, outlines: Mapping[str, Finds], stored: Collection[str] = ()) -> None:
        """Put the layers of each part in its place; before `paths` and `bind`.

        A list of stages that is longer than the other side's loses its shallowest ones.

        Args:
            outlines: side to what knows its network's parts.
            stored: views of a teacher that is not asked.

        Raises:
            InputError: if a network has no such part.
        """
        for name, term in list(self.active.items()):
            try:
                found = binding.resolved(term.names(), outlines, stored, uneven=getattr(term.loss, "UNEVEN", False))
                if term.under is not None:
                    term.under.place(binding.resolved(term.under.names(), outlines))
            except InputError as error:
                raise InputError(f"the term {name!r}: {error}") from error
            self._renamed(name, found)

    def lay(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Read tokens as maps where a loss, or the other side, has maps; returns the views that are new by that.

        Args:
            shapes: view name to shape, batch first.
        """
        before = {view for term in self.active.values() for views in term.names().values() for view in _each(views)}
        for name, term in list(self.active.items()):
            self._renamed(name, binding.laid(term.names(), shapes, getattr(term.loss, "READS", None)))
        after = {view for term in self.active.values() for views in term.names().values() for view in _each(views)}
        return sorted(after - before)

    def _renamed(self, name: str, views: Mapping[str, Any]) -> None:
        term = self.active[name]
        if term.names() != dict(views):
            self.active[name] = self.terms[name] = replace(term, **views)

    @property
    def borrows(self) -> list[str]:
        """The parts of teachers that active terms are to be lent, such as `teacher.classifier`, sorted."""
        return sorted({term.part for term in self.active.values() if term.part is not None})

    def lend(self, parts: Mapping[str, nn.Module]) -> None:
        """Give each loss that borrows a part of a teacher that part; before `bind`.

        Args:
            parts: by the name that `borrows` has: frozen, and no part of anybody's state.

        Raises:
            InputError: if a part is missing.
        """
        for name, term in self.active.items():
            if term.part is not None:
                take: Any = term.loss
                take.lend(_one(term.part, parts, name))

    @property
    def graft(self) -> Graft | None:
        """What is to be shipped in the place of the student's own end, where a loss says so; when all is bound.

        Raises:
            InputError: if two losses say so, or one that reads no single layer of the student.
        """
        found = []
        for name, term in self.active.items():
            if callable(tail := getattr(term.loss, "graft", None)):
                if not isinstance(term.student, str) or term.student == f"student.{LOGITS}":
                    raise InputError(f"the term {name!r} grafts behind {term.student!r}; one layer was meant")
                found.append(Graft(name, term.student.partition(".")[2], tail()))
        if len(found) > 1:
            raise InputError(f"the terms {' and '.join(graft.term for graft in found)} would each ship another student")
        return found[0] if found else None

    def paths(self, side: str) -> list[str]:
        """The layers of a net that active terms read, sorted: what to tap. Logits are no layer.

        Args:
            side: `student`, `teacher`, or one of several teachers.

        Raises:
            InputError: if the side is another.
        """
        if side != "student" and not is_teacher(side):
            raise InputError(f"{side!r} is no side of an objective{nearest(side, ('student', 'teacher'))}")
        views = {view for term in self.active.values() for named in term.names().values() for view in _each(named)}
        read = {v.partition(".")[2] for v in views if v.startswith(f"{side}.") and v != f"{side}.{LOGITS}"}
        return sorted(read.union(*(change.layers(side) for change in self._changes.values())))

    def bind(self, shapes: Mapping[str, torch.Size]) -> None:
        """Tell each loss that asks for them the shapes of its views, so that it can make its trainable parts.

        They draw from the global generator in the order of the terms' names: the same seed gives the same parts. Shapes
        come in the order student, teacher, feature, row; a list of views comes as a list of shapes.

        Args:
            shapes: view name to shape, batch first; that of `batch.row` is how many samples the split has.

        Raises:
            InputError: if a view is not among the shapes, a loss is given a list where it takes one layer or one where
                it takes a list, or it cannot bridge them.
        """
        if self.earlier is not None:
            logits = _one(f"student.{LOGITS}", shapes, EARLIER)
            self.earlier.bind(_one("batch.row", shapes, EARLIER)[0], logits[1])
            shapes = {**shapes, EARLIER: logits}
        for name, term in self.active.items():
            bind = getattr(term.loss, "bind", None)
            wanted = [view for role, view in term.names().items() if role != "target"]
            found = [_look_up(view, shapes, name) for view in wanted] if bind is not None else []
            binding.check_counts(name, term.loss, term.names())
            if bind is None:
                continue
            try:
                bind(*found)
            except InputError as error:
                raise InputError(f"{binding.described(name, term.names(), shapes)}: {error}") from error

    def check_answers(self, views: Mapping[str, Tensor]) -> None:
        """Refuse a loss that reads the teacher's layer with its classifier and does not get the teacher's logits.

        Args:
            views: name to tensor, of two samples or more.

        Raises:
            InputError: naming the term and the layer.
        """
        for name, term in self.active.items():
            answers: Any = getattr(term.loss, "answers", None)
            if answers is None or term.teacher is None or term.part is None:
                continue
            with torch.no_grad():
                found = answers(_look_up(term.teacher, views, name))
            logits = _one(f"{term.part.partition('.')[0]}.{LOGITS}", views, name)
            if found.shape != logits.shape or not torch.allclose(found, logits, rtol=1e-3, atol=1e-3):
                raise InputError(
                    f"the term {name!r}: {term.part} does not read the mean of {term.teacher}, which would give other "
                    f"logits than the teacher's; name the layer that it reads, or take vectors: loss.{name}.student="
                    f"student.embedding loss.{name}.teacher=teacher.embedding"
                )

    def rehearse(self, views: Mapping[str, Tensor]) -> None:
        """Compute each term once, without a trace: what a loss would refuse in the first step it refuses here.

        Args:
            views: name to tensor, of two samples or more.

        Raises:
            InputError: naming the term, its views and their shapes.
        """
        training = self.training
        shapes = {name: view.shape for name, view in views.items()}
        try:
            with torch.no_grad():
                views = self._with_earlier(views)
                for name, term in self.eval().active.items():
                    seen = self._seen(name, views)
                    given = {role: _look_up(view, seen, name) for role, view in term.names().items()}
                    said = binding.described(name, term.names(), shapes)
                    binding.tried(partial(term.loss, **given), said)
        finally:
            self.train(training)

    def draws_from(self, seed: int) -> None:
        """Tell each loss that draws among teachers the seed of the training; the draws are made of it and of `at`."""
        for part in (*self.losses.modules(), *self._changes.values()):
            if callable(take := getattr(part, "draws_from", None)):
                take(seed)

    def at(self, epoch: float, epochs: int) -> None:
        """Set what is scheduled for where training stands; before a step, whatever the steps before it were.

        What a loss makes of it is a function of these two numbers alone, so that a resumed run goes on as if it had
        not stopped.

        Args:
            epoch: how many are done, 2.5 in the middle of the third.
            epochs: how many there will be.

        >>> from kd.losses.response import DKD
        >>> views = {"student": "student.logits", "teacher": "teacher.logits", "target": "batch.target"}
        >>> objective = Objective({"dkd": Term(DKD(warmup=4), 1.0, **views)})
        >>> objective.at(epoch=0.5, epochs=10)
        >>> objective.losses["dkd"].factor
        0.25
        """
        for name, term in self.active.items():
            for path, schedule in term.schedule.items():
                value = schedule.at(epoch, epochs)
                if path == "weight":
                    self.weights[name] = value
                    continue
                for owner in _owners(term.loss, path):
                    setattr(owner, path.rpartition(".")[2], value)
        for loss in (*self._scheduled, *self._changes.values()):
            loss.at(epoch, epochs)

    @property
    def again(self) -> dict[str, Interchange]:
        """The interchanges of this step's terms, each of which needs a pass of the networks that it names."""
        return {name: self._changes[name] for name in self.now if name in self._changes} if self._changes else {}

    @property
    def now(self) -> list[str]:
        """The terms of this step: those that weigh something now, or, where none does, all, at their weight of 0."""
        return [name for name in self.active if self.weights[name] != 0] or list(self.active)

    @property
    def asks(self) -> frozenset[str]:
        """The views that the terms of this step read: a net none of whose views is among them need not run.

        >>> from kd.losses.ensemble import RandomChoice
        >>> from kd.losses.logits import SoftTargetKL
        >>> teachers = ["teacher1.logits", "teacher2.logits"]
        >>> term = Term(RandomChoice(SoftTargetKL(4.0)), 1, student="student.logits", teacher=teachers)
        >>> sorted(Objective({"kd": term}).asks)
        ['student.logits', 'teacher2.logits']
        """
        if self._asked is None or not self._same:
            terms = [self.active[name] for name in self.now]
            heard = [_heard(term.loss, role, views) for term in terms for role, views in term.names().items()]
            self._asked = frozenset(view for views in heard for view in _each(views) if view is not None)
        return self._asked

    def forward(self, views: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and each active term's own loss before its weight.

        A term of weight 0 is left out rather than multiplied: 0 times NaN is NaN, and at alpha 0 there may be no
        teacher to ask.

        Args:
            views: name to tensor; more than the terms read is no harm.

        Raises:
            InputError: if a view is missing, or a loss gives no scalar.
        """
        parts: dict[str, Tensor] = {}
        given, views = views, self._with_earlier(views)
        for name in self.now:
            term, seen = self.active[name], self._seen(name, views)
            part = term.loss(
                **{role: _look_up(_heard(term.loss, role, view), seen, name) for role, view in term.names().items()}
            )
            if part.ndim:
                raise InputError(f"the loss of the term {name!r} has shape {tuple(part.shape)}; a scalar was meant")
            parts[name] = part
        if self.earlier is not None and self.training:
            self.earlier.keep(given["batch.row"], given[f"student.{LOGITS}"])
        weighted = [self._weighed(name, part) for name, part in parts.items()]
        return sum(weighted[1:], start=weighted[0]), parts

    def _weighed(self, name: str, part: Tensor) -> Tensor:
        weight = self.weights[name]
        return weight * part if weight == 0 else self.balance.weighed(name, weight * part)

    @property
    def pulls(self) -> dict[str, float]:
        """What each active term's loss is multiplied by in this step.

        >>> from kd.losses.logits import CrossEntropy
        >>> ce = Term(CrossEntropy(), 0.5, student="student.logits", target="batch.target", log_variance=0.0)
        >>> Objective({"ce": ce}).pulls
        {'ce': 0.5}
        """
        return {name: weight * self.balance.factor(name) for name, weight in self.weights.items()}

    def _seen(self, name: str, views: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a term may read: under an interchange what was said in that pass, and nothing of the plain one."""
        if name not in self._changes:
            return views
        own = own_view(name, "")
        kept = {view: value for view, value in views.items() if view.startswith("batch.")}
        return kept | {view.removeprefix(own): value for view, value in views.items() if view.startswith(own)}

    def _with_earlier(self, views: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.earlier is None:
            return views
        row, target = (_one(f"batch.{name}", views, EARLIER) for name in ("row", "target"))
        return {**views, EARLIER: self.earlier.recall(row, target)}


def own_view(term: str, view: str) -> str:
    """How a view is called that a term reads in a pass of its own.

    >>> own_view("diito", "student.logits")
    'diito/student.logits'
    """
    return f"{term}/{view}"


def _heard(loss: nn.Module, role: str, views: Views) -> Any:
    """The views as they are named, None for each that a loss which draws among teachers leaves out of this step."""
    draw: Any = getattr(loss, "heard", None)
    if role != "teacher" or isinstance(views, str) or draw is None:
        return views
    heard = draw(len(views))
    return [view if index in heard else None for index, view in enumerate(views)]


def _owners(loss: nn.Module, path: str) -> list[Any]:
    """What holds the number at a path such as `loss.temperature`: a loss, one inside it, or copies of that.

    Raises:
        InputError: if there is no such number.
    """
    owners: list[Any] = [loss]
    _, *inner, last = path.split(".")
    for name in inner:
        found: list[Any] = [getattr(owner, name, None) for owner in owners]
        owners = [one for part in found for one in (part if isinstance(part, nn.ModuleList) else [part])]
    for owner in owners:
        value = getattr(owner, last, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(
                f"{path} cannot be scheduled: {type(owner).__name__} holds no number of that name; write a number, or "
                "schedule the term's weight"
            )
    return owners


def _look_up(view: Any, found: Mapping[str, Value], term: str) -> Any:
    if not isinstance(view, str):
        return [None if name is None else _one(name, found, term) for name in view]
    return _one(view, found, term)


def _one(view: str, found: Mapping[str, Value], term: str) -> Value:
    if view not in found:
        raise InputError(
            f"the term {term!r} reads {view!r}, which is not among {', '.join(sorted(found))}{nearest(view, found)}"
        )
    return found[view]
