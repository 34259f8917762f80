"""Ours beside what was published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd.models.build import create
from kd.report import published as module
from kd.report.published import RECIPE, judged, published
from kd.report.rows import Spread
from kd.report.tables import markdown

ENTRIES = json.loads(Path(module.__file__).with_name("published.json").read_text())
ROW = {
    "role": "student distilled", "model": "cifar_resnet8x4", "teacher": "cifar_resnet32x4", "loss": "ce+dkd", **RECIPE,
}  # fmt: skip


def row(mean: float, sd: float | None = 0.001, **other: object) -> dict[str, object]:
    return {**ROW, "test/accuracy": Spread(mean, sd, 3), **other}


@pytest.mark.parametrize(
    ("mean", "sd", "verdict"),
    [
        (0.7632, 0.001, "within noise"),
        (0.7593, 0.001, "within noise"),  # 0.39 points below
        (0.7590, 0.001, "below"),
        (0.7590, 0.0022, "within noise"),  # twice its own deviation
        (0.7700, None, "above"),
    ],
)
def test_the_verdict_is_by_our_own_spread_and_0_4_points_at_least(mean: float, sd: float | None, verdict: str) -> None:
    (found,) = judged([row(mean, sd)])
    assert (found["published"], found["verdict"]) == (0.7632, verdict)


@pytest.mark.parametrize("other", [{"epochs": 5}, {"samples": 8000}, {"config.fit.batch_size": 128}])
def test_a_run_of_another_recipe_is_not_judged(other: dict[str, object]) -> None:
    assert judged([row(0.7632, **other)])[0]["verdict"] == "other recipe"


def test_what_nobody_published_stays_as_it_is() -> None:
    unknown = row(0.5, loss="ce+mine")
    assert judged([unknown]) == [unknown] and published({**ROW, "teacher": "cifar_resnet20"}) is None


def test_teacher_and_student_alone_have_their_numbers() -> None:
    assert published({"role": "teacher", "model": "cifar_resnet32x4"}) == (0.7942, "RepDistiller README")
    assert published({"role": "student alone", "model": "cifar_resnet8x4"}) == (0.7250, "RepDistiller README")


def test_the_table_shows_both_columns() -> None:
    text = markdown(judged([row(0.7632), row(0.5, loss="ce+mine")]))
    assert "published % | verdict" in text and "76.32 | within noise" in text


def test_every_entry_names_networks_there_are_and_stands_once() -> None:
    names = {entry[side] for entry in ENTRIES for side in ("teacher", "student")}
    for name in names:
        create(name, num_classes=100, in_chans=3, size=32)
    triples = [(entry["teacher"], entry["student"], entry["loss"]) for entry in ENTRIES]
    assert len(triples) == len(set(triples)) == 246
    assert all(50 < entry["accuracy"] < 80 and entry["source"] for entry in ENTRIES)
