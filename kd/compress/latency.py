"""How long passes take, side by side: in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

WARM_UP = 3  # passes before the first that counts

Timing = dict[str, float]


def interleaved(
    passes: Mapping[str, Callable[[], object]], rounds: int = 30, seconds: float = 3.0
) -> dict[str, Timing]:
    """Milliseconds of each pass: the median, and the quartiles as `low` and `high`.

    Args:
        passes: by name; each is called once a round, in an order that turns by one from round to round.
        rounds: that count, at most.
        seconds: no further round is begun after this long, but for three.

    >>> found = interleaved({"a": lambda: None, "b": lambda: sum(range(10000))}, rounds=5)
    >>> found["a"]["median"] < found["b"]["low"]
    True
    """
    names = list(passes)
    for name in names:
        for _ in range(WARM_UP):
            passes[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() > end:
            break
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            start = time.perf_counter()
            passes[name]()
            times[name].append(1000 * (time.perf_counter() - start))
    found = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        found[name] = {"median": median, "low": low, "high": high}
    return found
