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
    >>> nearest("learning_rate", ["epochs", "lr"])
    "; did you mean 'lr'?"
    >>> nearest("xyz", ["temperature"])
    ''
    """
    names = {name.lower(): name for name in options}
    initials = "".join(part[0] for part in word.lower().split("_") if part)
    close = get_close_matches(word.lower(), names, n=3, cutoff=0.6) or [name for name in (initials,) if name in names]
    return f"; did you mean {' or '.join(repr(names[name]) for name in close)}?" if close else ""


def offer(word: str, options: Iterable[str]) -> str:
    """The closest options or, where none is close, all of them; nothing where there are none or very many.

    >>> offer("x", ["alpha", "seed"])
    '; there are alpha, seed'
    """
    names = list(options)
    listed = f"; there {'are' if len(names) > 1 else 'is'} {', '.join(names)}" if 0 < len(names) <= 30 else ""
    return nearest(word, names) or listed
