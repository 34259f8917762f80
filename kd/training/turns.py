"""Several trainings in one process: they take turns at their batches, and jobs that see the same ones share them.

Each job is a greenlet with its own Trainer. It runs until it asks for its next batch; then the job that is least far
goes on. What a step draws depends on (seed, step) alone, so nothing of a job's result depends on its neighbours.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

from greenlet import getcurrent, greenlet

from kd.training.loaders import Batch, EpochLoader

T = TypeVar("T")
Position = tuple[int, int]
LAST = (2**62, 0)  # behind every batch
KEPT = 4  # batches of a stream that are held for those who are behind


class Turns:
    """Who goes on next, and the streams of batches that jobs share.

    >>> turns = Turns()
    >>> def job(name: str) -> str:
    ...     for step in range(2):
    ...         turns.wait((0, step))
    ...         print(name, step)
    ...     return name
    >>> turns.run([lambda: job("a"), lambda: job("b")], lambda number, value: None)
    a 0
    b 0
    a 1
    b 1
    ['a', 'b']
    """

    def __init__(self) -> None:
        self._hub: greenlet | None = None
        self._streams: dict[Hashable, _Stream] = {}

    def run(self, jobs: Sequence[Callable[[], T]], ended: Callable[[int, T], None]) -> list[T]:
        """Run all jobs in turns; ``ended`` hears of each as it ends. A job must not raise.

        Args:
            jobs: functions that call `wait` or read a `shared` loader now and then.
            ended: called with a job's number and what it returned.
        """
        self._hub = getcurrent()
        found: dict[int, T] = {}
        places: dict[greenlet, Position] = {greenlet(job): (-1, number) for number, job in enumerate(jobs)}
        numbers = {job: number for number, job in enumerate(places)}
        try:
            while places:
                least = min(places, key=lambda job: (places[job], numbers[job]))
                told = least.switch()
                if least.dead:
                    del places[least]
                    found[numbers[least]] = told
                    ended(numbers[least], told)
                else:
                    places[least] = told
        finally:
            self._streams.clear()
            self._hub = None
        return [found[number] for number in range(len(jobs))]

    def wait(self, position: Position) -> None:
        """Let the others come as far as ``position``, that is (epoch, batch); outside of `run` there is nobody."""
        if self._hub is not None and getcurrent() is not self._hub:
            self._hub.switch(position)

    def pause(self, seconds: float = 0.05) -> None:
        """Let the others go on first, and then some time pass: for who waits for another process."""
        self.wait(LAST)
        time.sleep(seconds)

    def shared(self, identity: Hashable, make: Callable[[], EpochLoader], position: Callable[[], Position]) -> Shared:
        """A loader for one job; those of the same ``identity`` give the same batches and make them once.

        Args:
            identity: all that the batches depend on.
            make: builds the loader that they come from.
            position: as in `EpochLoader`.
        """
        if identity not in self._streams:
            self._streams[identity] = _Stream(make())
        return Shared(self, self._streams[identity], position)


class _Stream:
    """One loader's batches, a few of them held."""

    def __init__(self, loader: EpochLoader) -> None:
        self.loader = loader
        self._held: OrderedDict[Position, Batch] = OrderedDict()
        self._going: Iterator[Batch] = iter(())
        self._next: Position | None = None

    def at(self, epoch: int, index: int) -> Batch:
        """The batch at a place: made once where jobs come by one after the other."""
        place = (epoch, index)
        if place not in self._held:
            if place != self._next:
                self._going = self.loader.batches(epoch, index)
            self._held[place] = next(self._going)
            self._next = (epoch, index + 1)
            while len(self._held) > KEPT:
                self._held.popitem(last=False)
        return dict(self._held[place])


class Shared:
    """One job's view of a stream: the batches of an `EpochLoader`, each after the others' turns."""

    def __init__(self, turns: Turns, stream: _Stream, position: Callable[[], Position]) -> None:
        self.turns, self.stream, self.position = turns, stream, position

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.stream.loader)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from `position` to the end of its epoch."""
        epoch, first = self.position()
        for index in range(first, len(self)):
            self.turns.wait((epoch, index))
            yield self.stream.at(epoch, index)
