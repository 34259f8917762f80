"""Several networks asked as one: what it takes, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.errors import InputError
from kd.stages import Ensemble, Room, SoftLabels, Train
from kd.store import Artifact
from kd.training.settings import Run

DATA = {"name": "digits", "num_classes": 10, "augment": "shift"}


def test_what_nothing_here_sees_is_not_in_its_key() -> None:
    found = Ensemble.settled({"data": DATA, "how": "mean_logits"})
    assert found == {"data": {**DATA, "augment": "none"}, "how": "mean_logits"}
    with pytest.raises(InputError, match="is none of mean_probabilities, mean_logits"):
        Ensemble.settled({"data": DATA, "how": "median"})


def test_networks_of_other_classes_are_refused_when_planning() -> None:
    config: dict[str, Any] = {"data": DATA, "how": "mean_logits"}
    assert Ensemble.unused(config, {"member1": {"data": {"num_classes": 10}}}) == {}
    with pytest.raises(InputError, match="member1 of an ensemble knows 3 classes, and the data have 10"):
        Ensemble.unused(config, {"member1": {"data": {"num_classes": 3}}})


def test_only_networks_are_asked(tmp_path: Path) -> None:
    room, ensemble = Room(Run(), tmp_path), Ensemble(DATA, "mean_logits")
    labels = SoftLabels(**{field.name: None for field in dataclasses.fields(SoftLabels)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there is no network to ask"):
        ensemble.check({}, room)
    net = Artifact("k", tmp_path, {"files": {"model.json": {}}})
    ensemble.check({"member1": Train({}, {}, {}, {}, 0), "member2": net}, room)
    for other in (labels, Artifact("k", tmp_path, {"files": {"labels.safetensors": {}}})):
        with pytest.raises(InputError, match="member2 is no trained network"):
            ensemble.check({"member1": net, "member2": other}, room)


def test_the_two_means_are_those_of_the_distributions() -> None:
    said = [torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log() - 7]
    for how in ("mean_logits", "mean_probabilities"):
        torch.testing.assert_close(Ensemble(DATA, how).mean(said).softmax(1), torch.tensor([[0.5, 0.5]]))
    sure = [torch.tensor([[99.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()]
    # arithmetic: (0.99 + 0.5) / 2; geometric: sqrt(99) : 1
    assert Ensemble(DATA, "mean_probabilities").mean(sure).softmax(1)[0, 0].item() == pytest.approx(0.745)
    assert Ensemble(DATA, "mean_logits").mean(sure).softmax(1)[0, 0].item() == pytest.approx(99**0.5 / (99**0.5 + 1))
