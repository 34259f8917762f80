"""`kd bench labels`: the teacher's pass over views of samples, beside a bare loop that stores nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from kd.config import jobs
from kd.errors import InputError
from kd.pipeline.plan import plan
from kd.training.settings import Run

WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "channels_last": {"channels_last": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "both": {"channels_last": True, "precision": "bf16-mixed"},
}
TEXT = {
    "bare": "bare loop, nothing stored",
    "ours": "labels, as labels.* says",
    "channels_last": "… labels.channels_last=true",
    "bf16-mixed": "… labels.precision=bf16-mixed",
    "both": "… both of them",
    "compile": "… labels.compile=true",
}
TARGET = 0.9


def bench_labels(words: list[str], rounds: int, samples: int, compiled: bool = False) -> tuple[dict[str, Any], Table]:
    """Samples a second of the teacher's pass in interleaved rounds, as data and as a table.

    Args:
        words: overrides, e.g. `teacher.name=resnet18`.
        rounds: of each loop; the first passes warm up and do not count.
        samples: of a round; two views of each.
        compiled: time a compiled teacher too (it takes a minute to compile).

    Raises:
        InputError: if the data has fewer samples.
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from kd.data.augment import augment
    from kd.data.labels import Layout, StoredLabels, shard
    from kd.models import Frozen
    from kd.stages.base import Room
    from kd.stages.building import build
    from kd.stages.splits import load_data
    from kd.training.labelling import Pass, Speaker, label_views
    from kd.training.memory import keep_memory
    from kd.training.trainer import device_of

    keep_memory()
    config = jobs(["run.wandb=disabled", *words])[0][0].config
    stage = next(node.config for node in plan(config).nodes if "data" in node.config)
    data, run = stage["data"], Run(**config["run"])
    room = Room(run, Path())
    splits = load_data(data, room)
    if samples > len(splits.train):
        raise InputError(f"--samples {samples}: {data['name']} has {len(splits.train)}; lower it, or take other data")
    split = splits.train.subset(torch.arange(samples))
    device, size = device_of(run), int(config["labels"]["batch_size"])
    said = {name: config["labels"][name] for name in ("batch_size", "precision", "channels_last", "compile")}
    layout = Layout(samples, len(splits.classes), views=2)
    loops: dict[str, Callable[[], float]] = {}
    found: dict[str, torch.Tensor] = {}
    frozen = Frozen(build(config["teacher"], data, splits, 0, room).to(device))

    def bare() -> float:
        if split.images is None:
            raise InputError("kd bench labels needs data that fit into memory; raise run.memory_gb")
        images, ids = split.images.to(device), split.ids.to(device)
        started = time.perf_counter()
        kept = []
        for view in range(2):
            for rows in torch.split(torch.arange(samples, device=device), size):
                batch = augment(images[rows], data["augment"], 0, ids[rows], view, int(data["size"]))
                kept.append(frozen(batch).float().cpu())
        return time.perf_counter() - started

    def ours(name: str, how: Pass) -> Callable[[], float]:
        speaker = Speaker(build(config["teacher"], data, splits, 0, room), how, [], device)

        def measure() -> float:
            with TemporaryDirectory(prefix="kd-bench-") as folder:
                started = time.perf_counter()
                label_views(
                    speaker, split, layout, run, made_by="bench", augment=data["augment"], seed=0,
                    size=int(data["size"]), work=Path(folder), tell=lambda event: None,
                )  # fmt: skip
                seconds = time.perf_counter() - started
                files = [[Path(folder) / shard(view, n) for n, _, _ in layout.blocks()] for view in range(2)]
                stored = StoredLabels(files, split.ids.cpu(), classes=layout.classes)
                found[name] = stored.at(0, torch.arange(samples))["teacher.logits"].argmax(1)
            return seconds

        return measure

    loops["bare"] = bare
    ways = {**WAYS, **({"compile": {"compile": True}} if compiled else {})}
    for name, how in ways.items():
        loops[name] = ours(name, Pass(**{**said, **how}))
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    order = [name for _ in range(rounds + 1) for name in loops]
    console = Console(stderr=True)
    for name in track(order, "measuring", console=console, transient=True, disable=not console.is_terminal):
        seconds[name].append(loops[name]())
    seconds = {name: values[1:] for name, values in seconds.items()}
    same = {name: (found[name] == found["ours"]).double().mean().item() for name in ways}
    return _summary(seconds, 2 * samples, same)


def _summary(seconds: dict[str, list[float]], samples: int, same: dict[str, float]) -> tuple[dict[str, Any], Table]:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("pass", "samples/s", "slowest", "fastest", "of bare", "same top-1"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    ratios, rates = {}, {}
    for name, values in seconds.items():
        speed = [samples / s for s in values]
        rates[name] = median(speed)
        # Round by round: what slows the machine for a moment slows both.
        ratios[name] = median(b / s for b, s in zip(seconds["bare"], values, strict=True))
        table.add_row(
            TEXT[name],
            f"{rates[name]:.0f}",
            f"{min(speed):.0f}",
            f"{max(speed):.0f}",
            f"{ratios[name]:.2f}" + (f" (target {TARGET})" if name == "ours" else ""),
            f"{same[name]:.3f}" if name in same else "",
        )
    return {"samples_per_second": rates, "ratios": ratios, "seconds": seconds, "agreement": same}, table
