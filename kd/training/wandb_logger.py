"""The Lightning logger of a stage: a view of its record in W&B that can fail without being felt."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from kd.store import short
from kd.training.tracking import kept_environment, log, one_line, start_run

if TYPE_CHECKING:
    from pytorch_lightning.loggers import WandbLogger


class SafeWandbLogger(Logger):
    """Lightning's `WandbLogger`, inside a guard: its first exception disables it with one warning line.

    The run's id is the stage's key, its group the sweep, its job type the stage. It starts with the first value logged,
    and ends with `close` (or at the end of a ``with``), never with the Trainer: the test metrics come after that.

    >>> with SafeWandbLogger(key="ab" * 32, stage="student", config={}, folder=Path("w"), mode="disabled") as logger:
    ...     logger.log_metrics({"train/loss": 0.5}, step=1)
    >>> logger.version, logger.active
    ('abababababababab', False)
    """

    def __init__(
        self,
        *,
        key: str,
        stage: str,
        config: Mapping[str, Any],
        folder: Path,
        mode: str,
        dials: Mapping[str, Any] | None = None,
        sweep: str | None = None,
        name: str | None = None,
        project: str = "kd",
        tags: Sequence[str] = (),
        beside: bool = False,
    ) -> None:
        """Remember what the run is; nothing is imported or written before a value is logged.

        Args:
            key: the stage's key; 16 digits of it are the run's id.
            stage: the stage's name in its pipeline, W&B's job type.
            config: the stage's hashed document, as plain data.
            folder: one for all jobs; the runs come to lie in ``folder/wandb``.
            mode: "online", "offline" or "disabled" (see `kd.training.tracking.mode`).
            dials: shown as ``dials.…`` beside the document, so that panels need no path into an objective.
            sweep: the sweep's id, W&B's group.
            name: shown in place of the id.
            project: the W&B project.
            tags: free words.
            beside: other jobs of this process have runs of their own open.
        """
        super().__init__()
        self._key, self._folder, self._mode, self._stage = short(key), folder, mode, stage
        self._start: dict[str, Any] = {
            "id": self._key, "folder": folder, "mode": mode, "project": project, "job_type": stage, "group": sweep,
            "name": name or f"{stage} {self._key}", "tags": tags, "config": {**config, "dials": dict(dials or {})},
            "beside": beside,
        }  # fmt: skip
        self._inner: WandbLogger | None = None
        self._warned = False
        self.active = mode != "disabled"

    @property
    def name(self) -> str:
        """The stage's name."""
        return self._stage

    @property
    def version(self) -> str:
        """The stage's key, 16 digits."""
        return self._key

    @property
    def save_dir(self) -> str:
        """The one folder of all W&B runs."""
        return str(self._folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Values at an optimiser step."""
        self._guard(lambda inner: inner.log_metrics(dict(metrics), step))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config is the hashed document, given at the start."""

    @rank_zero_only
    def summarise(self, values: Mapping[str, Any]) -> None:
        """The run's last word: its test metrics and costs, by the names that the card has (``test/accuracy``)."""
        self._guard(lambda inner: inner.experiment.summary.update(dict(values)))

    @rank_zero_only
    def close(self, exit_code: int = 0) -> None:
        """End the run; a second call does nothing. Call it in a ``finally``, or the next job logs into this run."""
        inner, self._inner, self.active = self._inner, None, False
        if inner is not None:  # also after a value that W&B did not take: an open run would swallow the next job
            try:
                with kept_environment():
                    inner.experiment.finish(exit_code=exit_code)
            except Exception as error:  # as in _guard
                self._warn(error)

    def __enter__(self) -> SafeWandbLogger:
        """The logger itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, with exit code 1 after an exception."""
        self.close(exit_code=0 if kind is None else 1)

    def _guard(self, action: Callable[[WandbLogger], object]) -> None:
        if not self.active:
            return
        try:
            with kept_environment():
                if self._inner is None:
                    from pytorch_lightning.loggers import WandbLogger

                    # Given a run, WandbLogger starts none: its own start would set WANDB_MODE for the whole process.
                    self._inner = WandbLogger(experiment=start_run(**self._start))
                action(self._inner)
        except Exception as error:  # W&B may raise anything, and a dashboard is no reason to lose a training
            self.active = False
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            log.warning("W&B is off for %s %s (%s); the store has all", self._stage, self._key, one_line(error))
        self._warned = True
