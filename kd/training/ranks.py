"""One training over several devices: a process for each, all of them in the same code, each with its part of a batch.

The processes are forked here and not by Lightning, so that the first of them is the job itself: what it records stays
where it is. A batch is cut into equal parts, so the mean of the parts' gradients is the batch's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy

from kd.errors import InputError

NAMES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK")
_DIE_WITH_PARENT = 1  # of prctl


def check(devices: int, batch_size: int, drop_last: bool, gpu: bool) -> None:
    """Refuse what cannot be cut into equal parts, or devices that are not there.

    Raises:
        InputError: in one line.

    >>> check(2, 64, True, gpu=False)
    >>> check(3, 64, True, gpu=False)
    Traceback (most recent call last):
        ...
    kd.errors.InputError: run.devices=3 cannot share fit.batch_size=64 equally; make it a multiple of 3
    """
    if devices == 1:
        return
    if batch_size % devices:
        raise InputError(
            f"run.devices={devices} cannot share fit.batch_size={batch_size} equally; make it a multiple of {devices}"
        )
    if not drop_last:
        raise InputError(f"run.devices={devices} needs fit.drop_last=true: a last batch may not come out even")
    if gpu and torch.cuda.device_count() < devices:
        raise InputError(f"run.devices={devices}, but torch sees {torch.cuda.device_count()} GPU(s)")


@contextlib.contextmanager
def spread(devices: int, tell: Callable[[dict[str, Any]], None]) -> Iterator[int]:
    """Run the body in as many processes; gives each its rank, and only the first one comes out again.

    Args:
        devices: how many; with 1 nothing happens.
        tell: hears of a rank that fails, which ends the others.
    """
    if devices == 1:
        yield 0
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before, threads = {name: os.environ.get(name) for name in NAMES}, torch.get_num_threads()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(devices), "NODE_RANK": "0"}
    others = []
    for rank in range(1, devices):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _other(rank)
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            code = 1
            try:
                yield rank
                code = 0
            except BaseException:  # whatever it is, this process is nobody else's
                traceback.print_exc()
            finally:
                os._exit(code)
        others.append(pid)
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    torch.set_num_threads(max(1, threads // devices))
    watch = threading.Thread(target=_watch, args=(others, tell), daemon=True)
    watch.start()
    try:
        yield 0
        watch.join()
    finally:
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(threads)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _other(rank: int) -> None:
    # OpenMP's threads do not survive a fork; with one thread it asks for none.
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)


def _watch(others: list[int], tell: Callable[[dict[str, Any]], None]) -> None:
    for pid in others:
        _, status = os.waitpid(pid, 0)
        if status and os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            tell({"event": "say", "line": f"rank {others.index(pid) + 1} failed: the training is given up"})
            os.kill(os.getpid(), signal.SIGTERM)  # the others would wait for it for ever


def strategy(gpu: bool) -> DDPStrategy:
    """Lightning's, for processes that are there already."""
    return DDPStrategy(
        cluster_environment=LightningEnvironment(),
        process_group_backend="nccl" if gpu else "gloo",
        find_unused_parameters=True,  # a term on features may leave the head alone
    )


def averaged(values: torch.Tensor) -> torch.Tensor:
    """The mean over all ranks; as it is where there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def alone() -> bool:
    """Whether this is the only rank."""
    return not (dist.is_available() and dist.is_initialized())
