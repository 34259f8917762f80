"""The stage that sets several trained networks side by side, so that one run holds them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kd.errors import InputError
from kd.stages.base import Room, Stage
from kd.store import Artifact, write_json

TABLE = "comparison.json"
CHOICE, ACCURACY = "val/accuracy", "test/accuracy"


@dataclass(frozen=True)
class Compare:
    """A row for each network among its inputs, whatever their roles, and which of them validation chooses."""

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """It has no fields."""
        return dict(config)

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It reads all of its inputs."""
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Look whether each input is a network that is evaluated.

        Raises:
            InputError: if there is none, or one holds no network.
        """
        if not inputs:
            raise InputError("there is nothing to compare; name the stages among its inputs, e.g. {student1: student1}")
        for role, source in inputs.items():
            found = source.card["metrics"] if isinstance(source, Artifact) else None
            if not hasattr(source, "stand_in") if found is None else CHOICE not in found:
                raise InputError(f"{role} is no trained network, so it cannot be compared")

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Write the rows, in the order of the roles; the metrics are those of the one that validation chooses."""
        rows = [_row(role, artifact) for role, artifact in sorted(inputs.items(), key=lambda pair: _place(pair[0]))]
        best = max(rows, key=lambda row: row[CHOICE])
        write_json(out / TABLE, {"rows": rows, "best": best["role"]})
        return {"metrics": {f"best/{name}": best[name] for name in (CHOICE, ACCURACY)}}


def _row(role: str, artifact: Artifact) -> dict[str, Any]:
    card = artifact.card
    config = card["document"]["config"]
    model = config.get("student") or config.get("model") or {}
    measured = {name: value for name, value in card["metrics"].items() if isinstance(value, (int, float))}
    return {"role": role, "stage": card["stage"], "model": model.get("name"), "key": card["key"], **measured} | {
        "parameters": card.get("cost", {}).get("parameters")
    }


def _place(role: str) -> tuple[str, int]:
    word = role.rstrip("0123456789")
    return word, int(role[len(word) :] or 0)
