"""What several teachers said, row by row."""

from __future__ import annotations

import torch

from kd.data.labels import StoredLabels
from kd.data.several import SeveralLabels


def test_each_teachers_rows_come_under_its_role() -> None:
    logits = torch.arange(12.0).reshape(4, 3)
    own = torch.tensor([3, 1, 2, 0])
    labels = SeveralLabels(
        {"teacher1": StoredLabels.of(logits), "teacher2": StoredLabels.of(10 * logits, torch.arange(4), own)}
    )
    found = labels.at(0, torch.tensor([1, 0]))
    assert list(found) == ["teacher1.logits", "teacher2.logits"]
    assert found["teacher1.logits"].equal(logits[[1, 0]]) and found["teacher2.logits"].equal(10 * logits[[1, 3]])
    assert labels.views == 1 and labels.on(torch.device("cpu")) is labels and labels.device.type == "cpu"


def test_features_come_with_the_logits() -> None:
    rows = {"logits": torch.eye(2), "feature.conv:pooled": torch.ones(2, 5)}
    one = StoredLabels([[rows]], torch.arange(2), classes=2)
    found = SeveralLabels({"teacher7": one}).at(0, torch.tensor([0]))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "teacher7.logits": (1, 2),
        "teacher7.conv:pooled": (1, 5),
    }
