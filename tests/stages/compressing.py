"""The smallest whole compression, and what it left in the store."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.pipeline import small
from tests.pipeline.small import planned

WORDS = (
    "pipeline=compress", "teacher.name=seed_cnn_small", "recover.fit.epochs=2", "recover.fit.samples=256",
    "recover.fit.batch_size=64", "fit.epochs=6", "fit.lr=0.01",
)  # fmt: skip
BOTH = ("compress=[prune,lowrank]", "lowrank.least=4", "lowrank.by=energy", "lowrank.energy=0.5")


def cards(store: Path, *words: str) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, Path]]:
    """Run it; the stages that ran, each stage's card and folder."""
    return small.cards(store, *WORDS, *words)


def key(*words: str) -> str:
    """The run's hash."""
    with tempfile.TemporaryDirectory() as store:
        return planned(Path(store), *WORDS, *words)[0].key
