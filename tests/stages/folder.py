"""The small job on a folder of images, and what of its card must be the same again."""

from __future__ import annotations

from typing import Any

FOLDER = (
    "data=imagefolder", "teacher.name=seed_cnn_small", "fit.samples=null", "teacher_fit.samples=null",
    "fit.batch_size=8", "teacher_fit.batch_size=8", "run.memory_gb=0", "run.workers=0",
)  # fmt: skip


def bits(card: dict[str, Any]) -> tuple[Any, ...]:
    """Weights, metrics and losses."""
    return card["weights"], card["metrics"], card["trace"]
