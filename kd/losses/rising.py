"""How what a loss weighs goes with the epochs."""

from __future__ import annotations

import math


def risen(epoch: float, over: float) -> float:
    """How far the epoch under way brings a linear rise: the n-th of `over` epochs n / over, at most 1; over 0, 1.

    Args:
        epoch: how many are done, 2.5 in the middle of the third.
        over: epochs that the rise takes.

    >>> risen(0.0, 4), risen(1.9, 4), risen(7.0, 4), risen(0.0, 0)
    (0.25, 0.5, 1.0, 1.0)
    """
    return min((math.floor(epoch) + 1) / over, 1.0) if over else 1.0
