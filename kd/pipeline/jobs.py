"""Jobs in child processes: each is forked from a server that has imported torch once, so one job's end is its own.

A job that raises, calls exit or is killed for memory takes nothing along: the parent reads the end of its pipe, and
the next job starts in a fresh child. The parent never imports torch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

Event = dict[str, Any]
_PRELOAD = ["kd.pipeline.warm"]


def warm() -> Any:
    """Start the server now, so that its imports run while the parent composes configs."""
    context = multiprocessing.get_context("forkserver")
    # NVML, not the CUDA runtime: a server that has touched CUDA could not be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context.set_forkserver_preload(_PRELOAD)
    from multiprocessing import forkserver

    forkserver.ensure_running()
    return context


def call(function: Callable[..., Any], *arguments: Any, tell: Callable[[Event], None] = lambda event: None) -> Event:
    """Run ``function(*arguments, tell)`` in a child; its events go to ``tell``, its end is the result.

    Returns ``{"status": "done", "value": …}`` or ``{"status": "failed", "error": "one line", "exit_code": n}``.
    """
    context = warm()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments), daemon=False)
    process.start()
    sender.close()
    outcome: Event | None = None
    try:
        while outcome is None:
            wait([receiver, process.sentinel])
            while receiver.poll():
                try:
                    event = receiver.recv()
                except EOFError:
                    break
                if event.get("event") == "outcome":
                    outcome = event
                    break
                tell(event)
            else:
                if not process.is_alive() and not receiver.poll():
                    break
                continue
            if outcome is None:
                break
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join(timeout=30)
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()
    if outcome is not None:
        return {k: v for k, v in outcome.items() if k != "event"}
    return {"status": "failed", "exit_code": 1, "error": _ending(process.exitcode)}


def outcome_of(function: Callable[..., Any], *arguments: Any) -> Event:
    """`call` without a child: for a process that somebody else started for one job."""
    found = _outcome(function, arguments, lambda event: None)
    return {name: value for name, value in found.items() if name != "event"}


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the job was killed by {name}{hint}; the same command resumes it"
    return f"the job's process ended by itself with exit code {code} before it was done"


def _child(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Run in the child: watch the parent, report the outcome."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    sender.send(_outcome(function, arguments, sender.send))
    sender.close()


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...], tell: Callable[[Event], None]) -> Event:
    from kd.errors import KDError

    try:
        return {"event": "outcome", "status": "done", "value": function(*arguments, tell)}
    except KDError as error:
        return _failed(str(error), error.exit_code)
    except SystemExit as error:
        return _failed(f"the job called exit({error.code})", 1)
    except MemoryError:
        return _failed("out of memory; lower fit.batch_size", 1)
    except BaseException as error:  # whatever a job does, the sweep goes on and says so
        if os.environ.get("KD_TRACEBACK"):
            traceback.print_exc()
        line = (str(error).strip().splitlines() or [""])[0]
        return _failed(f"{type(error).__name__}: {line} (KD_TRACEBACK=1 shows where)", 1)


def _failed(line: str, exit_code: int) -> Event:
    return {"event": "outcome", "status": "failed", "error": " ".join(line.split()), "exit_code": exit_code}


def _die_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # the parent is gone: nobody would hear of this job, and its lock must not outlive it
