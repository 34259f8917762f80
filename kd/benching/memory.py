"""The most that tensors hold at a time while something is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that were held at a time of what `work` made, the gradients of its backward pass included.

    What was there before does not count. On a GPU it is what the allocator says; elsewhere the storages of all tensors
    that operations give back are counted, but not what a kernel needs within itself.

    Args:
        work: computes; it may leave something behind, which counts from when it is made.
        device: where its tensors are.

    >>> given = torch.zeros(1000)
    >>> peak_bytes(lambda: (given + 1) * 2)  # both of 4000 bytes, as the first is still there for the second
    8000
    >>> peak_bytes(lambda: given.view(10, 100).add_(1))
    0
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak - before
    storages = _Storages()
    with storages:
        work()
    return storages.peak


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations made and that something still refers to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._note(value, made=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._note(value, made=True)
        return result

    def _note(self, value: Any, made: bool) -> None:
        """Count a storage that is seen for the first time, if an operation made it."""
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        place, size = storage._cdata, storage.nbytes() if made else 0
        if place in self.seen:
            return

        def gone(_: object) -> None:
            self.now -= size
            self.seen.pop(place, None)

        self.seen[place] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
