"""Stages: what each must have, and the room that it works in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import kd.stages
from kd.stages import (
    Branches,
    Circle,
    Compare,
    Distil,
    Dream,
    Ensemble,
    Export,
    FineTune,
    LowRank,
    MetaDistil,
    Prune,
    Quantize,
    Room,
    SoftLabels,
    Train,
)
from kd.training.settings import Run

STAGES = [Train, MetaDistil, SoftLabels, Distil, Circle, Compare, Prune, LowRank, FineTune, Quantize, Export]
STAGES += [Branches, Dream, Ensemble]


def test_every_stage_is_tried_here():
    named = {getattr(kd.stages, name) for name in kd.stages.__all__}
    assert {kind for kind in named if hasattr(kind, "VERSION") and dataclasses.is_dataclass(kind)} == set(STAGES)


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_is_frozen_its_fields_are_config_and_it_has_a_version(kind):
    fields = {f.name: f for f in dataclasses.fields(kind)}
    stage = kind(**dict.fromkeys(fields))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(stage, next(iter(fields), "data"), {})
    assert isinstance(kind.VERSION, int) and isinstance(kind.SINCE, dict)
    # A default would be a value that no key holds.
    assert all(f.default is f.default_factory is dataclasses.MISSING for f in fields.values())
    assert all(callable(getattr(stage, name)) for name in ("settled", "unused", "check", "run"))


def test_a_room_tells_where_data_and_cache_are(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    room = Room(Run(store="~/kd", data_dir="~/data"), Path("w"))
    assert room.data_dir == tmp_path / "data" and room.data_cache == tmp_path / "kd" / "data"
    assert room.tell({"event": "say"}) is None and room.document == {} and room.sweep is None
