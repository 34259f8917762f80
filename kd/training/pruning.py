"""The trial of a search that a training belongs to: it hears each epoch's validation, and may give the training up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd.errors import KDError

if TYPE_CHECKING:
    import optuna
    from optuna.storages import JournalStorage

PRUNERS = ("hyperband", "median", "none")
_GRACE = 10  # seconds after which the lock of a writer that was killed is taken over; a write takes milliseconds


class Pruned(KDError):
    """A training that its trial gave up: nothing of it is stored, and its last checkpoint stays."""


@dataclass(frozen=True)
class Trial:
    """One trial of one study, as plain data that a child process can be given; like `Run`, it moves no bit.

    Args:
        storage: the study's journal.
        study: its name.
        number: the trial's.
        metric: what is reported of each epoch, e.g. val/accuracy.
        pruner: `hyperband` or `median`.
        epochs: how long the longest trial trains.
    """

    storage: str
    study: str
    number: int
    metric: str
    pruner: str
    epochs: int

    def open(self) -> optuna.Trial:
        """The trial itself, in this process, with its pruner."""
        import optuna

        quiet()
        # Hyperband's brackets are spread over 1 to `epochs`; a name and a number say which one a trial is in.
        pruner: optuna.pruners.BasePruner = (
            optuna.pruners.MedianPruner()
            if self.pruner == "median"
            else optuna.pruners.HyperbandPruner(min_resource=1, max_resource=self.epochs)
        )
        # The values were suggested where the trial was asked for; this sampler is never asked.
        study = optuna.load_study(
            study_name=self.study,
            storage=journal(Path(self.storage)),
            sampler=optuna.samplers.RandomSampler(),
            pruner=pruner,
        )
        return optuna.Trial(study, study.get_trials(deepcopy=False)[self.number]._trial_id)


def report(trial: optuna.Trial, values: Mapping[int, float]) -> bool:
    """Report the epochs that a trial has not heard of; returns whether it is given up after the last of them.

    The pruner is asked after each: only then does it note how far the trial came, and measure others by that.
    """
    known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    given_up = False
    for epoch in sorted(values.keys() - known.keys()):
        trial.report(values[epoch], epoch)
        given_up = trial.should_prune()
    return given_up


def journal(path: Path) -> JournalStorage:
    """A study's file; each write holds a lock beside it."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    return JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path), _GRACE)))


def quiet() -> None:
    """Without Optuna's lines on standard error: what there is to say, we say."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
