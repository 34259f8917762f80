"""Several networks side by side."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kd.errors import InputError
from kd.stages import Compare, Room, SoftLabels, Train
from kd.store import Artifact
from kd.training.settings import Run


def artifact(key: str, validation: float, test: float, name: str) -> Artifact:
    metrics: dict[str, Any] = {"val/accuracy": validation, "test/accuracy": test, "test/f1_per_class": [1.0]}
    document = {"config": {"student": {"name": name}}}
    card = {"key": key, "stage": "student", "document": document, "metrics": metrics, "cost": {"parameters": 7}}
    return Artifact(key, Path(key), card)


def test_the_rows_stand_in_order_and_validation_chooses(tmp_path: Path) -> None:
    scores = {"student10": (0.7, 0.9), "student2": (0.9, 0.6), "student1": (0.8, 0.95)}
    inputs = {role: artifact(role, *pair, name=f"net-{role}") for role, pair in scores.items()}
    out = tmp_path / "out"
    out.mkdir()
    found = Compare().run(inputs, out, Room(Run(), tmp_path))
    assert found == {"metrics": {"best/val/accuracy": 0.9, "best/test/accuracy": 0.6}}
    table = json.loads((out / "comparison.json").read_text())
    assert [row["role"] for row in table["rows"]] == ["student1", "student2", "student10"]
    assert table["best"] == "student2"
    assert table["rows"][0]["model"] == "net-student1" and table["rows"][0]["parameters"] == 7
    assert "test/f1_per_class" not in table["rows"][0]


def test_only_networks_are_compared(tmp_path: Path) -> None:
    room, compare = Room(Run(), tmp_path), Compare()
    with pytest.raises(InputError, match="nothing to compare"):
        compare.check({}, room)
    labels = SoftLabels(**{field.name: None for field in dataclasses.fields(SoftLabels)})  # type: ignore[arg-type]
    net = Train({}, {}, {}, {}, 0)
    compare.check({"a": net}, room)
    with pytest.raises(InputError, match="b is no trained network"):
        compare.check({"a": net, "b": labels}, room)
    assert Compare.settled({}) == {} == Compare.unused({}, {})
