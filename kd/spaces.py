"""Search spaces: words of the command line, in Hydra's own syntax, that stand for more values than one."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from kd.config import parse
from kd.errors import InputError, nearest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DIGITS = 4  # significant digits of a suggested number, so that a person can type it
_INNER = 0.382  # where between two bounds a probe lies: a value that is seldom whole
EXAMPLE = "'temperature=interval(1,16)' or 'fit.lr=tag(log,interval(1e-4,1e-1))'"


@dataclass(frozen=True)
class Space:
    """What one word may become: some values, or numbers from ``low`` to ``high``.

    Args:
        word: the word as typed.
        key: what stands before its equals sign, prefix and all.
        choices: the values, as they would be typed; empty for numbers.
        low: the smallest number.
        high: the largest; both ends are part of the space.
        step: how far apart the numbers of a range are; None for an interval.
        log: whether the numbers are spread evenly over their logarithm.
        whole: whether they are whole.
    """

    word: str
    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False

    def written(self, value: Any) -> str:
        """A suggested value as a person would type it.

        Four significant digits, and more where an interval is so narrow that they would not tell its values apart.

        >>> Space("", "", low=1, high=16).written(3.14159265), Space("", "", low=0, high=1).written(0.0123456)
        ('3.142', '0.01235')
        >>> Space("", "", low=1000, high=1001).written(1000.34567), Space("", "", low=0.12344, high=1).written(0.12344)
        ('1000.346', '0.12344')
        """
        if self.choices or self.whole:
            return str(value)
        if self.step is None and value:
            places = max(DIGITS - 1 - math.floor(math.log10(abs(size))) for size in (value, self.high - self.low))
            value = min(max(round(value, places), self.low), self.high)
        return f"{value:.12g}"

    def probes(self) -> list[str]:
        """Values that show whether a config with this field can be: each choice, or the ends and one between."""
        if self.choices:
            return list(self.choices)
        found = [self.low, self.high]
        if self.step is None:
            low, high = (math.log(end) if self.log else end for end in found)
            inner = low + _INNER * (high - low)
            inner = math.exp(inner) if self.log else inner
            found.append(round(inner) if self.whole else inner)
        return list(dict.fromkeys(self.written(int(value) if self.whole else value) for value in found))

    def distribution(self) -> BaseDistribution:
        """The space as Optuna knows it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), self.log, int(self.step or 1))
        return FloatDistribution(self.low, self.high, self.log, self.step)

    def question(self) -> list[Any]:
        """What the space is, however it was spelt."""
        return [self.key, list(self.choices), self.low, self.high, self.step, self.log, self.whole]


def spaces(words: list[str], config_dir: str | None = None) -> dict[int, Space]:
    """The search spaces among the words, by their position.

    Raises:
        InputError: if there is none, or one of them is not right.

    >>> spaces(["data=mnist", "alpha=interval(0,1)"])[1].high
    1.0
    """
    parsed = parse(words, config_dir)
    times = Counter(one.get_key_element().lstrip("+") for one, _ in parsed)
    found: dict[int, Space] = {}
    for at, (one, values) in enumerate(parsed):
        if not one.is_sweep_override():
            continue
        key = one.get_key_element()
        if re.match(r"run($|[./@])", one.key_or_group):
            raise InputError(f"{words[at]}: nothing under run/ changes a result, so there is nothing to search")
        if times[key.lstrip("+")] > 1:
            raise InputError(f"{words[at]}: {key} is given more than once")
        found[at] = _space(one, words[at], key, values)
    if not found:
        raise InputError(f"no word is a search space; write one, e.g. {EXAMPLE}")
    return found


def _space(one: Override, word: str, key: str, values: list[str]) -> Space:
    sweep: Any = one.value()
    tags = set(getattr(sweep, "tags", ()))
    for tag in sorted(tags - {"log"}):
        raise InputError(f"{word}: there is no tag {tag!r}, only log{nearest(tag, ['log'])}")
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        assert low is not None and high is not None
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InputError(f"{word}: an interval goes from a lower to a higher number, both finite")
        if tags and low <= 0:
            raise InputError(f"{word}: a logarithm needs a lower bound above 0")
        return Space(word, key, low=low, high=high, log=bool(tags), whole=isinstance(low, int))
    if tags:
        raise InputError(f"{word}: tag(log,…) is for an interval, e.g. {key}=tag(log,interval(1e-4,1e-1))")
    if isinstance(sweep, RangeSweep):
        return _range(sweep, word, key)
    return Space(word, key, tuple(dict.fromkeys(values)))


def _range(sweep: RangeSweep, word: str, key: str) -> Space:
    """A range without its end, as everywhere in Python; counted in decimals, so that 0.1 is 0.1."""
    assert sweep.start is not None and sweep.stop is not None
    numbers = (sweep.start, sweep.stop, sweep.step)
    if not all(map(math.isfinite, numbers)) or not sweep.step:
        raise InputError(f"{word}: a range has a finite start, stop and step, and its step is not 0")
    start, stop, step = (Decimal(str(number)) for number in numbers)
    count = math.ceil((stop - start) / step)
    if count < 1:
        raise InputError(f"{word} holds no number")
    low, high = sorted((start, start + (count - 1) * step))
    whole = all(isinstance(number, int) for number in numbers)
    return Space(word, key, low=float(low), high=float(high), step=float(abs(step)), whole=whole)
