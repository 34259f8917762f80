"""A progress bar for what turns out to be slow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

PATIENCE = 2.0  # seconds without a bar

T = TypeVar("T")


def track(items: Iterable[T], total: int, text: str) -> Iterator[T]:
    """``items``, one by one; a bar stands on stderr once `PATIENCE` seconds have passed and goes when all is done.

    >>> list(track("ab", 2, "reading"))
    ['a', 'b']
    """
    started = time.monotonic()
    source = iter(items)
    done = 0
    for item in source:
        yield item
        done += 1
        if time.monotonic() - started > PATIENCE:
            break
    else:
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total, completed=done)
        for item in source:
            yield item
            bar.advance(task)
