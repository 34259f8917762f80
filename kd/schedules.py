"""Numbers that change over training: what a term weighs, or a number inside its loss, such as the temperature.

In a config a schedule stands where the number would:

    loss.kd.weight: {_target_: kd.schedules.Linear, start: 0, end: 0.9, last: 5}     # a warm-up of five epochs
    temperature: {_target_: kd.schedules.Cosine, start: 8, end: 1}                   # a dial, over the whole training

Each is a function of how many epochs are done alone, so that a resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.errors import InputError

PREFIX = "kd.schedules."


class Schedule(ABC):
    """What every schedule is."""

    @abstractmethod
    def at(self, epoch: float, epochs: int) -> float:
        """The number where `epoch` of `epochs` are done, 2.5 in the middle of the third."""

    @abstractmethod
    def ends(self) -> list[float]:
        """The numbers between which all others lie, the first one first."""

    @abstractmethod
    def __str__(self) -> str:
        """A few words for a table."""


@dataclass(frozen=True)
class Linear(Schedule):
    """From `start` to `end` in a straight line, exact at both.

    Args:
        start: until the epoch `first`.
        end: from the epoch `last` on.
        first: how many epochs are done when it begins.
        last: how many are done when it has arrived; None: all of the training.

    Raises:
        InputError: if a field is no number, or `last` is not after `first`.

    >>> [Linear(start=0, end=0.9, last=4).at(epoch, epochs=10) for epoch in (0, 1, 2.5, 4, 9)]
    [0.0, 0.225, 0.5625, 0.9, 0.9]
    """

    start: float
    end: float
    first: float = 0.0
    last: float | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        _check_span(self)

    def at(self, epoch: float, epochs: int) -> float:
        """The number where `epoch` of `epochs` are done."""
        done = _share(self, epoch, epochs)
        return float(self.end if done >= 1 else self.start + (self.end - self.start) * done)

    def ends(self) -> list[float]:
        """Both."""
        return [float(self.start), float(self.end)]

    def __str__(self) -> str:
        """Such as 8 to 1 (linear)."""
        return f"{self.start:g} to {self.end:g} (linear)"


@dataclass(frozen=True)
class Cosine(Schedule):
    """From `start` to `end` along half a cosine: slow, fast, slow; exact at both.

    Args:
        start: until the epoch `first`.
        end: from the epoch `last` on.
        first: how many epochs are done when it begins.
        last: how many are done when it has arrived; None: all of the training.

    Raises:
        InputError: if a field is no number, or `last` is not after `first`.

    >>> [round(Cosine(start=8, end=2).at(epoch, epochs=4), 3) for epoch in (0, 1, 2, 4)]
    [8.0, 7.121, 5.0, 2.0]
    """

    start: float
    end: float
    first: float = 0.0
    last: float | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        _check_span(self)

    def at(self, epoch: float, epochs: int) -> float:
        """The number where `epoch` of `epochs` are done."""
        done = _share(self, epoch, epochs)
        if done in (0, 1):
            return float(self.end if done else self.start)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2

    def ends(self) -> list[float]:
        """Both."""
        return [float(self.start), float(self.end)]

    def __str__(self) -> str:
        """Such as 8 to 1 (cosine)."""
        return f"{self.start:g} to {self.end:g} (cosine)"


@dataclass(frozen=True)
class Step(Schedule):
    """One number after the other, changing when so many epochs are done.

    A last value of 0 ends a term early: from there on it is not computed, and a teacher that only it hears not asked.

    Args:
        values: in order; one more than `epochs`.
        epochs: at which the next value begins, rising.

    Raises:
        InputError: if they are not so.

    >>> [Step(values=[0.9, 0.5, 0], epochs=[2, 4]).at(epoch, epochs=10) for epoch in (0, 1.9, 2, 3.9, 4, 9)]
    [0.9, 0.9, 0.5, 0.5, 0.0, 0.0]
    """

    values: Sequence[float]
    epochs: Sequence[float]

    def __post_init__(self) -> None:
        """Check each field."""
        for name, given in (("values", self.values), ("epochs", self.epochs)):
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise InputError(f"a step schedule's {name} are {given!r}; give a list of numbers")
            for value in given:
                _number(name, value)
        if len(self.values) != len(self.epochs) + 1 or list(self.epochs) != sorted(set(self.epochs)):
            raise InputError(
                f"a step schedule of values {list(self.values)} and epochs {list(self.epochs)} is none; give one value "
                "more than epochs, and rising epochs, e.g. values=[0.9,0.5,0] epochs=[10,20]"
            )

    def at(self, epoch: float, epochs: int) -> float:
        """The number where `epoch` of `epochs` are done."""
        return float(self.values[sum(epoch >= change for change in self.epochs)])

    def ends(self) -> list[float]:
        """All of them."""
        return [float(value) for value in self.values]

    def __str__(self) -> str:
        """Such as 0.9, 0.5, 0 (steps)."""
        return f"{', '.join(f'{value:g}' for value in self.values)} (steps)"


def is_schedule(node: Any) -> bool:
    """Whether a piece of config describes a schedule.

    >>> is_schedule({"_target_": "kd.schedules.Linear", "start": 0, "end": 1}), is_schedule(0.9)
    (True, False)
    """
    return isinstance(node, Mapping) and str(node.get("_target_", "")).startswith(PREFIX)


def schedule_of(node: Mapping[str, Any]) -> Schedule:
    """The schedule that a piece of config describes.

    Raises:
        InputError: if it is none.

    >>> schedule_of({"_target_": "kd.schedules.Linear", "start": 0, "end": 1})
    Linear(start=0, end=1, first=0.0, last=None)
    """
    from kd.instantiate import instantiate

    made = instantiate(dict(node))
    assert isinstance(made, Schedule)
    return made


def weighs(weight: Any) -> bool:
    """Whether a weight in a config, a number or a schedule, is ever other than 0.

    >>> weighs(0.0), weighs(0.5), weighs({"_target_": "kd.schedules.Linear", "start": 0, "end": 1})
    (False, True, True)
    """
    return any(schedule_of(weight).ends()) if is_schedule(weight) else float(weight) != 0


def parted(term: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A term's config with a schedule's first number in its place, and the schedules by the path of that place.

    >>> parted({"weight": {"_target_": "kd.schedules.Linear", "start": 0, "end": 1}, "loss": {"temperature": 4}})
    ({'weight': 0.0, 'loss': {'temperature': 4}}, {'weight': {'_target_': 'kd.schedules.Linear', 'start': 0, 'end': 1}})
    """
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> Any:
        if is_schedule(node):
            found[path] = node
            return schedule_of(node).ends()[0]
        if isinstance(node, Mapping):
            return {key: walk(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()}
        return node

    return walk(term, ""), found


def replaced(node: Any, path: str, value: float) -> Any:
    """A copy of a config with another number at a path.

    >>> replaced({"loss": {"temperature": 4}}, "loss.temperature", 1.0)
    {'loss': {'temperature': 1.0}}
    """
    head, _, rest = path.partition(".")
    return {**node, head: replaced(node[head], rest, value) if rest else value}


def scaled(weight: Any, factor: float) -> Any:
    """A weight in a config, a number or a schedule, times a factor.

    >>> scaled(0.9, 0.5), scaled({"_target_": "kd.schedules.Linear", "start": 0, "end": 1, "last": 5}, 0.5)["end"]
    (0.45, 0.5)
    """
    if not is_schedule(weight):
        return float(weight) * factor
    return _turned(weight, lambda value: float(value) * factor)


def complemented(node: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule of 1 minus what another one gives, in config.

    >>> complemented({"_target_": "kd.schedules.Linear", "start": 0.9, "end": 0})
    {'_target_': 'kd.schedules.Linear', 'start': 0.1, 'end': 1.0}
    """
    return _turned(node, lambda value: round(1.0 - float(value), 12))


def _turned(node: Mapping[str, Any], turn: Callable[[float], float]) -> dict[str, Any]:
    found = dict(node)
    for name in ("start", "end"):
        if name in found:
            found[name] = turn(found[name])
    if "values" in found:
        found["values"] = [turn(value) for value in found["values"]]
    return found


def _share(schedule: Linear | Cosine, epoch: float, epochs: int) -> float:
    """How much of its way is behind it: 0 before, 1 after."""
    last = epochs if schedule.last is None else schedule.last
    if epoch <= schedule.first:
        return 0.0
    return 1.0 if epoch >= last else (epoch - schedule.first) / (last - schedule.first)


def _check_span(schedule: Linear | Cosine) -> None:
    for name in ("start", "end", "first"):
        _number(name, getattr(schedule, name))
    if schedule.last is not None:
        _number("last", schedule.last)
    if schedule.first < 0 or (schedule.last is not None and schedule.last <= schedule.first):
        raise InputError(
            f"a schedule from epoch {schedule.first!r} to {schedule.last!r} is none; `last` must come after `first`, "
            "which is 0 or more"
        )


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"a schedule's {name} is {value!r}; a finite number was meant")
