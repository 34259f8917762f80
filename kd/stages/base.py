"""What every stage is: a frozen dataclass whose fields are its config, and one method that makes the artifact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kd.errors import InputError
from kd.store import Artifact
from kd.training.pruning import Trial
from kd.training.settings import Run

if TYPE_CHECKING:
    from kd.models import Normalised
    from kd.training.turns import Turns

Event = dict[str, Any]
Config = dict[str, Any]


@dataclass(frozen=True)
class Company:
    """What jobs of one process share: whose turn it is, and what is read or built once for all of them."""

    turns: Turns
    kept: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Room:
    """Where a stage works and whom it tells: nothing in it changes a number."""

    run: Run
    work: Path
    key: str = ""
    stage: str = ""
    sweep: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict)
    dials: Mapping[str, Any] = field(default_factory=dict)
    tell: Callable[[Event], None] = lambda event: None
    company: Company | None = None  # the other jobs of this process, if there are some
    trial: Trial | None = None  # what hears of each epoch and may give the training up
    # In a rehearsal: each stage that is still to run, with its inputs and its key, by its id.
    planned: Mapping[int, tuple[Stage, Mapping[str, Stage | Artifact], str]] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once for all the jobs of this process that name it by the same ``key``."""
        if self.company is None:
            return make()
        if key not in self.company.kept:
            self.company.kept[key] = make()
        return self.company.kept[key]

    def stand_in(self, source: Stage | Artifact) -> Normalised:
        """The network of an artifact; of a stage that has not run, one of its shape with weights that mean nothing.

        Raises:
            InputError: if the stage makes no network.
        """
        from kd.models import load

        if isinstance(source, Artifact):
            return load(source.path)
        if not hasattr(source, "stand_in"):
            raise InputError(f"{type(source).__name__} makes no network; name a stage that trains or compresses one")
        _, inputs, key = self.planned.get(id(source), (source, {}, ""))
        # A chain of steps asks for its beginning again and again; who gets it may change it.
        made: Normalised
        if not key:
            made = source.stand_in(inputs, self)
            return made
        made = self.once(("stand-in", key), lambda: source.stand_in(inputs, self))
        return copy.deepcopy(made)

    @property
    def data_dir(self) -> Path:
        """Where data sets are looked for."""
        return Path(self.run.data_dir).expanduser()

    @property
    def data_cache(self) -> Path:
        """Where content digests and decoded sets are kept."""
        return Path(self.run.store).expanduser() / "data"


class Stage(Protocol):
    """One step with an artifact. `VERSION` moves when the same config would give another artifact."""

    VERSION: ClassVar[int]
    SINCE: ClassVar[dict[str, Any]]

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with every field that changes nothing beside the others at its neutral value.

        Raises:
            InputError: at a value out of range.
        """
        ...

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Inputs this config does not read, each with the reason; they are left out of plan and key.

        ``inputs`` has the settled config of each.
        """
        ...

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Refuse what cannot run, before anything is trained.

        Raises:
            InputError: in one line.
        """
        ...

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Write the artifact's files into ``out`` and return the stage's part of the card."""
        ...
