"""The most that tensors hold at a time while something is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kd.compress.measure import Storages


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
    storages = Storages()
    with storages:
        work()
    return storages.peak
