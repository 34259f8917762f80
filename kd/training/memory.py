"""The C library's allocator, told to keep what training will ask for again a moment later.

glibc gives each large tensor pages of its own and hands them back when it is freed, so that a training step takes
twenty thousand page faults and more for the same memory again. Kept instead, a step of ResNet-20 on two cores took
0.79 of its time and 0.80 of its processor time; tcmalloc, preloaded, gained less, jemalloc lost. No bit changes. The
price is that a process keeps the most it ever held.
"""

from __future__ import annotations

import ctypes
import os
import platform

VARIABLE = "KD_MALLOC"
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, from malloc.h


def keep_memory() -> bool:
    """Make glibc keep freed memory for the rest of this process; whether it was done.

    Nothing is done under another C library or a preloaded allocator, or with KD_MALLOC=system.

    >>> import os
    >>> os.environ["KD_MALLOC"] = "system"
    >>> keep_memory(), os.environ.pop("KD_MALLOC")
    (False, 'system')
    """
    if os.environ.get(VARIABLE) == "system" or os.environ.get("LD_PRELOAD"):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No mapping of its own for any size, and nothing given back at the top: 2^31 - 1 is the most an int holds.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
