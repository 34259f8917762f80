"""Stateless randomness: each generator is a function of the seed and a position, never of what ran before."""

from __future__ import annotations

import hashlib
import random


def mix(seed: int, *position: int | str) -> int:
    """A 63-bit number that depends on the seed and the position alone.

    >>> mix(0, "step", 1) == mix(0, "step", 1), mix(0, "step", 1) == mix(0, "step", 2)
    (True, False)
    """
    text = "/".join(map(str, (seed, *position)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_all(seed: int, *position: int | str) -> None:
    """Set the global generators of Python, numpy and torch to a position."""
    import numpy as np
    import torch

    number = mix(seed, *position)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Set torch's generators before a step, so that dropout does not know what ran before; each rank has its own.

    ``torch.manual_seed`` would format a stack trace for each device that is not in use, at every step.
    """
    import torch

    number = mix(seed, "step", step) if rank == 0 else mix(seed, "step", step, "rank", rank)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(number)
