"""The errors a user meets: one clear line and an exit code each."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class KDError(Exception):
    """A run that could not finish; the message is the one line the user reads."""

    exit_code = 1


class InputError(KDError):
    """Bad input: what was wrong, what was meant, how to mend it. Nothing was touched."""

    exit_code = 2


class Inconclusive(KDError):
    """A reproduction that could not be judged: data or code is missing."""

    exit_code = 3


def nearest(word: str, options: Iterable[str]) -> str:
    """The options closest to a misspelt word, ready to end a message with.

    >>> nearest("temprature", ["temperature", "alpha"])
    "; did you mean 'temperature'?"
    >>> nearest("xyz", ["temperature"])
    ''
    """
    close = get_close_matches(word, list(options), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
