"""Made-up cards with the shape the store keeps, for the tests of the reports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from kd.store import digest

TEACHER = {"name": "seed_cnn", "options": {"widths": [32, 64, 64, 64]}}
STUDENT = {"name": "seed_cnn_small", "options": {"widths": [8, 16, 16, 16]}}
COSTS = {
    "seed_cnn": {"parameters": 93322, "macs": 4100000, "bytes": 375000},
    "seed_cnn_small": {"parameters": 6058, "macs": 310000, "bytes": 25600},
}


def card(
    stage: str,
    model: dict[str, Any],
    accuracy: float,
    *,
    seed: int = 0,
    inputs: dict[str, str] | None = None,
    dials: dict[str, float] | None = None,
    data: str = "mnist",
    **fit: Any,
) -> dict[str, Any]:
    """One card; ``dials`` go into the objective as the yaml's interpolation would put them."""
    schedule = {"epochs": 5, "samples": None, "lr": 0.002, **fit}
    field = "student" if stage == "Distil" else "model"
    config: dict[str, Any] = {"seed": seed, "data": {"name": data, "size": 28}, field: model, "fit": schedule}
    terms = ["ce"]
    if dials:
        soft = {"weight": dials["alpha"], "loss": {"temperature": dials["temperature"]}}
        config["objective"] = {"ce": {"weight": 1 - dials["alpha"]}, "kd": soft}
        terms = ["ce", "kd"]
    document = {"schema": 1, "stage": f"kd.stages.{stage}", "version": 1, "config": config, "inputs": inputs or {}}
    key = digest(document)
    epochs = schedule["epochs"]
    made = {
        "schema": 1,
        "key": key,
        "stage": {"Train": "teacher", "SoftLabels": "labels"}.get(stage, "student"),
        "document": document,
        "dials": {**(dials or {}), "seed": seed},
        "metrics": {},
        "weights": hashlib.sha256(key.encode()).hexdigest(),
        "files": {},
        "fingerprints": {
            "data": {"name": data, "digest": "d1"},
            "code": {"commit": "abc", "dirty": False, "digest": "c1"},
            "environment": {"python": "3.11.7", "torch": "2.15.0", "threads": 2},
        },
        "run": {"overrides": [], "sweep": None, "pipeline": "distil"},
        "time": {"started": "2026-11-23T22:00:00Z", "wall_s": 12.3 + seed, "cpu_s": 20.1},
        "resumed": [],
    }
    if stage == "SoftLabels":
        return made
    made["metrics"] = {
        "test/accuracy": accuracy,
        "test/accuracy_top5": 1.0,
        "test/precision": accuracy - 0.001,
        "test/recall": accuracy - 0.002,
        "test/f1": accuracy - 0.0015,
        "test/f1_per_class": [accuracy] * 10,
        "test/loss": 1 - accuracy,
        "test/ece": 0.01,
        "test/agreement": 0.97,
        "val/accuracy": accuracy + 0.001,
        "val/loss": 1 - accuracy,
    }
    made["cost"] = {**COSTS[model["name"]], "latency_ms_batch1": 0.21, "latency_ms_batch64": 2.1}
    made["trace"] = {
        "losses": [2.3] * 10,
        "epochs": [_epoch(e, accuracy, terms) for e in range(epochs)],
    }
    if dials:
        made["gradients"] = [_pull(e, dials["alpha"]) for e in range(epochs)]
    return made


def step(
    stage: str, source: dict[str, Any], accuracy: float, name: str, *, seed: int = 0, amount: float = 0.5, **inputs: str
) -> dict[str, Any]:
    """A card of a compression's stage, made from another card."""
    made = card("Train", STUDENT, accuracy, inputs={"model": source["key"], **inputs})
    document = {**made["document"], "stage": f"kd.stages.{stage}"}
    document["config"] = {"seed": seed, "data": {"name": "mnist"}, "amount": amount}
    return {**made, "stage": name, "document": document, "key": digest(document), "dials": {"seed": seed}}


def compression(seeds: Sequence[int] = (0, 1, 2), amounts: Sequence[float] = (0.3, 0.7)) -> list[dict[str, Any]]:
    """A family of one student a seed, each pruned by some amounts, recovered and written as a file of integers.

    Accuracies: teacher .991; pruned .95 - .5 * amount, recovered .98 - .02 * amount, the file .001 less; each .002 less
    from seed to seed, in turns. Bytes: 25,600 of the student; a share of them, and 100 more a seed; a quarter.
    """
    teacher, labels, *others = family((4,), (0.9,), seeds)
    made = [teacher, labels, *others]
    for at, student in enumerate(others[-len(seeds) :]):
        seed = student["document"]["config"]["seed"]
        off = 0.002 * ((at + 1) % 3)
        for amount in amounts:
            size = int(25600 * (1 - amount)) + 100 * at
            pruned = step("Prune", student, 0.95 - 0.5 * amount - off, "prune", seed=seed, amount=amount)
            recovered = step(
                "FineTune", pruned, 0.98 - 0.02 * amount - off, "prune_recover", seed=seed, teacher=teacher["key"]
            )
            file = step("Export", recovered, 0.979 - 0.02 * amount - off, "export", seed=seed, teacher=teacher["key"])
            for one, part in ((pruned, 1), (recovered, 1), (file, 4)):
                one["cost"] = {**one["cost"], "bytes": size // part, "macs": int(310000 * (1 - amount))}
                one["cost"]["parameters"] = size // 4
            file["export"] = {"format": "onnx", "teacher_bytes": 400000}
            file["latency"] = {"batch1": {"runtime": {"median": 0.1}, "teacher_runtime": {"median": 0.5}}}
            file["cost"]["latency_ms_batch1"] = 0.1
            made += [pruned, recovered, file]
    return made


def _pull(epoch: int, alpha: float) -> dict[str, Any]:
    """Mean gradients of an epoch; the teacher's share grows with alpha."""
    norms = {"ce": (1 - alpha) * 0.5**epoch, "kd": alpha * 0.5**epoch}
    row: dict[str, Any] = {"epoch": epoch, "count": 4, "grad_cosine/ce/kd": 0.25 - 0.1 * epoch}
    for name, norm in norms.items():
        row |= {f"grad/{name}": norm, f"grad_share/{name}": norm / sum(norms.values())}
    return row


def _epoch(epoch: int, accuracy: float, terms: Iterable[str]) -> dict[str, Any]:
    left = 0.5 ** (epoch + 1)
    row = {
        "epoch": epoch,
        "step": 430 * (epoch + 1),
        "lr": 0.002,
        "weights": "w",
        "train/loss": 2 * left + 1 - accuracy,
    }
    row |= {f"train/{term}": (i + 1) * left + 1 - accuracy for i, term in enumerate(terms)}
    return row | {"val/accuracy": accuracy - 0.3 * left, "val/loss": left + 1 - accuracy}


def family(
    temperatures: Sequence[float] = (1, 4, 8),
    alphas: Sequence[float] = (0.1, 0.9),
    seeds: Sequence[int] = (0, 1),
    student: dict[str, Any] = STUDENT,
    **fit: Any,
) -> list[dict[str, Any]]:
    """A teacher, its soft labels, the student alone for each seed, and a sweep of distilled students."""
    teacher = card("Train", TEACHER, 0.991)
    labels = card("SoftLabels", TEACHER, 0.0, inputs={"teacher": teacher["key"]})
    inputs = {"teacher": teacher["key"], "labels": labels["key"]}
    made = [teacher, labels]
    made += [card("Train", student, 0.962 + 0.002 * seed, seed=seed, **fit) for seed in seeds]
    for temperature in temperatures:
        for alpha in alphas:
            for seed in seeds:
                accuracy = 0.96 + 0.002 * temperature + 0.004 * alpha + 0.003 * seed - 0.0002 * temperature**2
                dials = {"temperature": temperature, "alpha": alpha}
                made.append(card("Distil", student, accuracy, seed=seed, inputs=inputs, dials=dials, **fit))
    return made


def lookup(cards: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Key -> card, as the reports look lineage up."""
    return {made["key"]: made for made in cards}
