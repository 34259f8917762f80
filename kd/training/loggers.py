"""The loggers of one stage: W&B as `run.wandb` says and those of `run/logger=[…]`; closed whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from kd.errors import InputError
from kd.instantiate import instantiate
from kd.store import short
from kd.training.settings import Run
from kd.training.tracking import mode
from kd.training.wandb_logger import SafeWandbLogger


@contextlib.contextmanager
def loggers(
    run: Run,
    *,
    key: str,
    stage: str,
    document: Mapping[str, Any],
    dials: Mapping[str, Any] | None = None,
    sweep: str | None = None,
    beside: bool = False,
) -> Iterator[list[Logger]]:
    """Open a stage's loggers, and close them with the exit code of what happened between.

    W&B's runs of all jobs lie in ``<store>/wandb``, so that one local view shows a sweep. ``beside``: other jobs of
    this process have runs open at the same time.

    Raises:
        InputError: if a logger's package is not installed.
    """
    folder = Path(run.store).expanduser().absolute()
    with contextlib.ExitStack() as stack:
        found: list[Logger] = []
        chosen = mode(run.wandb)
        if chosen != "disabled":
            wandb = SafeWandbLogger(
                key=key,
                stage=stage,
                config=document,
                folder=folder,
                mode=chosen,
                dials=dials,
                sweep=sweep,
                project=run.wandb_project,
                beside=beside,
            )
            found.append(stack.enter_context(wandb))
        for name, node in run.logger.items():
            try:
                logger = instantiate(
                    node,
                    [*run.trusted, "pytorch_lightning.loggers"],
                    save_dir=str(folder / "loggers" / name),
                    name=stage,
                    version=short(key),
                )
            except ModuleNotFoundError as error:
                raise InputError(
                    f"run/logger={name} needs a package that is not here ({' '.join(str(error).split())}); "
                    "for tensorboard: pip install 'kd[tensorboard]'"
                ) from error
            stack.callback(logger.finalize, "finished")
            found.append(logger)
        yield found


def summarise(sinks: list[Logger], values: Mapping[str, Any], step: int) -> None:
    """The last word of a stage to each of its loggers."""
    for sink in sinks:
        if isinstance(sink, SafeWandbLogger):
            sink.summarise(values)
        else:
            sink.log_metrics({k: float(v) for k, v in values.items() if isinstance(v, (int, float))}, step=step)
