"""One training over several devices: a process for each, all of them in the same code, each with its part of a batch.

The processes are forked here and not by Lightning, so that the first of them is the job itself: what it records stays
where it is. A batch is cut into equal parts: for losses that are means over samples, and batch norms that are
synchronised, the mean of the parts' gradients is the batch's but for rounding. Anything else is refused.
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
from torch import nn

from kd.errors import InputError, KDError
from kd.names import EARLIER
from kd.objective import Objective
from kd.training.settings import Fit

NAMES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK")
_DIE_WITH_PARENT = 1  # of prctl
_GRACE = 10.0  # seconds
_SAID = 3  # exit code of a rank that ended as the first one did


def check(fit: Fit, devices: int, gpu: bool, student: nn.Module, objective: Objective) -> None:
    """Refuse what would be another training on several devices, or devices that are not there.

    Raises:
        InputError: in one line.
    """
    if devices == 1:
        return
    if fit.batch_size % devices:
        raise InputError(
            f"run.devices={devices} cannot share fit.batch_size={fit.batch_size} equally; make it a multiple of "
            f"{devices}"
        )
    if not fit.drop_last:
        raise InputError(f"run.devices={devices} needs fit.drop_last=true: a last batch may not come out even")
    for name, term in objective.active.items():
        if hasattr(term.loss, "graft"):
            raise InputError(f"the term {name} ships another net, which is judged on one device; use run.devices=1")
        compares = any(getattr(part, "COMPARES_SAMPLES", False) for part in term.loss.modules())
        if compares or term.under is not None:
            raise InputError(
                f"the term {name} compares the samples of a batch, of which each of {devices} devices would see only "
                "its part; use run.devices=1"
            )
    if objective.earlier is not None:
        raise InputError(
            f"a term reads {EARLIER}, and each of {devices} devices would remember other samples; use run.devices=1"
        )
    if not gpu and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in student.modules()):
        raise InputError(
            f"run.devices={devices}: on the CPU batch normalisation would see only a part of each batch; use "
            "run.devices=1"
        )
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
            except KDError:
                code = _SAID  # the first rank found the same, and says it
            except BaseException:  # whatever it is, this process is nobody else's
                traceback.print_exc()
            finally:
                os._exit(code)
        others.append(pid)
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    torch.set_num_threads(max(1, threads // devices))
    ending = threading.Event()
    watch = threading.Thread(target=_watch, args=(others, tell, ending), daemon=True)
    watch.start()
    try:
        yield 0
        watch.join()
    except KDError:
        raise
    except Exception:
        watch.join(timeout=2)  # the cause may be another rank's end, which is then told
        raise
    finally:
        ending.set()
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


def _watch(others: list[int], tell: Callable[[dict[str, Any]], None], ending: threading.Event) -> None:
    """Wait for the other ranks; one that fails ends the process, or the rest would wait for it for ever."""
    going = dict(enumerate(others, start=1))
    while going:
        for rank, pid in list(going.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            del going[rank]
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, _SAID) and not ending.is_set():
                tell({"event": "say", "line": f"rank {rank} failed ({code}): the training is given up"})
                if not ending.wait(_GRACE):  # the first rank may end by itself, with an error that says more
                    os._exit(1)
        ending.wait(0.05)


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
