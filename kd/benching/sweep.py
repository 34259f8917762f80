"""`kd bench sweep`: what a sweep costs beside lone runs with a live teacher and beside the floor, in whole commands."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from kd.errors import InputError, KDError
from kd.pipeline import launchers
from kd.store import Store
from kd.training.memory import VARIABLE

TEMPERATURES, ALPHAS = (1, 2, 4, 8), (0.1, 0.4, 0.7, 0.9)
BASE = (
    "data=synthetic", "data.validation=64", "data.test=64", "fit.batch_size=64", "teacher_fit.batch_size=64",
    "teacher_fit.epochs=1", "teacher_fit.samples=64", "run.wandb=disabled", "run.latency=false", "run.progress=false",
    "run.validate_every=0", "labels.batch_size=64",
)  # fmt: skip
PAIR = ("teacher.name=cifar_resnet32x4", "student.name=cifar_resnet8x4")
_SUBREAPER = 36  # of prctl: who outlives its parent becomes ours, so that its processor time is counted


def bench_sweep(
    words: list[str], steps: int, epochs: int, lone: int, counts: list[int], launcher: str = "packed", plain: int = 1
) -> tuple[dict[str, Any], Table]:
    """Wall and processor seconds of a grid over temperature and alpha, three ways, as data and as a table.

    (a) lone runs, each a command of its own with a live teacher; (b) one command of ours, with stored views, for each
    of ``counts`` jobs; (c) a bare script that makes the labels once and trains each student in a plain loop. The
    teacher's own training is not part of any. Some lone runs are run a second time with the allocator of the C library
    as it comes, which is what a framework that does not tune it pays.

    Args:
        words: overrides, e.g. another pair.
        steps: of an epoch.
        epochs: of each student; as many views are stored.
        lone: how many of the lone runs are run; the others are taken to cost as much on average.
        counts: jobs of a sweep; the largest is compared with the lone runs.
        launcher: of (b).
        plain: how many of the lone runs are run with the allocator as it comes.

    Raises:
        InputError: if there are more jobs than the grid has.
        KDError: if a command fails.
    """
    grid = list(itertools.product(TEMPERATURES, ALPHAS))
    if not counts or max(counts) > len(grid) or min(counts) < 1:
        raise InputError(
            f"--jobs {counts}: the grid has {len(grid)} jobs; give numbers from 1 to that, and --lone 1 up"
        )
    counts, most = sorted(set(counts)), max(counts)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    chosen = [] if any(word.startswith("teacher.name=") for word in words) else list(PAIR)
    size = [f"data.samples={64 + 64 * steps}", f"fit.epochs={epochs}", f"labels.views={epochs}"]
    base = [*BASE, *chosen, *size, *words]
    result: dict[str, Any] = {"words": base, "steps": steps, "epochs": epochs, "launcher": launcher}
    with TemporaryDirectory(prefix="kd-bench-") as scratch:
        root = Path(scratch)
        teacher = root / "teacher"
        # Only to have the teacher: one that runs anew in each arm would hide what is compared.
        _command(["run", *base, "labels.live=true", f"run.store={teacher}", "fit.samples=64", "fit.epochs=1"])
        runs = [
            (kind, number) for kind, wanted in (("lone", lone), ("plain", plain)) for number in range(min(wanted, most))
        ]
        for kind, number in runs:
            temperature, alpha = grid[number]
            store = _copy(teacher, root / f"{kind}{number}")
            dials = [f"temperature={temperature}", f"alpha={alpha}"]
            run = ["run", *base, *dials, "labels.live=true", f"run.store={store}"]
            result.setdefault(kind, []).append(_command(run, {VARIABLE: "system"} if kind == "plain" else {}))
        for count in counts:
            store = _copy(teacher, root / f"ours{count}")
            spread = [f"hydra/launcher={launcher}", f"run.store={store}"]
            result.setdefault("ours", {})[count] = _command(["run", "-m", *base, *_grid(count), *spread])
            if count == most:
                result["ready_s"] = [
                    a.card["time"]["ready_s"] for a in Store(store) if len(a.card["document"]["inputs"]) == 2
                ]
        asked = json.dumps({"words": [*base, f"run.store={teacher}"], "students": grid[:most]})
        floor = _timed([sys.executable, "-m", "kd.benching.floor", asked])
        result["floor"] = {**floor, **json.loads(floor.pop("out"))}
    return _summary(result, counts)


def _grid(count: int) -> list[str]:
    """The words of the first jobs of the grid; as many as are asked for, in whole rows."""
    rows, rest = divmod(count, len(ALPHAS))
    if count <= len(ALPHAS):
        return [f"temperature={TEMPERATURES[0]}", f"alpha={','.join(map(str, ALPHAS[:count]))}"]
    if rest:
        raise InputError(f"--jobs {count}: more than {len(ALPHAS)} jobs come in rows of {len(ALPHAS)}, e.g. 4, 8 or 16")
    return [f"temperature={','.join(map(str, TEMPERATURES[:rows]))}", f"alpha={','.join(map(str, ALPHAS))}"]


def _copy(teacher: Path, store: Path) -> Path:
    """A store that holds the teacher and no student."""
    shutil.copytree(teacher, store)
    home = Store(store)
    for artifact in list(home):
        if artifact.card["document"]["inputs"]:
            home.remove(artifact.key)
    return store


def _command(words: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    found = _timed([sys.executable, "-m", "kd", *words], environment or {})
    return {name: found[name] for name in ("wall_s", "cpu_s")}


def _timed(command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Wall seconds until a command has ended, and the processor seconds of it and of all that it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    around = {**os.environ, "KD_DATA": ".", **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=around)
    wall = time.perf_counter() - started
    with suppress(ChildProcessError):
        while True:  # the server that jobs are forked from ends a moment after its command
            os.waitpid(-1, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise KDError(f"a command of the benchmark failed ({last}); the words after `kd bench sweep` are its overrides")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "out": done.stdout}


def _summary(result: dict[str, Any], counts: list[int]) -> tuple[dict[str, Any], Table]:
    most, floor = max(counts), result["floor"]
    each = fmean(floor["students_s"])
    lone, plain = (
        {name: most * fmean(run[name] for run in runs) for name in ("wall_s", "cpu_s")} if runs else {}
        for runs in (result["lone"], result.get("plain", []))
    )
    ours = result["ours"][most]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("way", "jobs", "wall s", "CPU s", ""):
        table.add_column(column, justify="right" if column in ("jobs", "wall s", "CPU s") else "left")
    ran = len(result["lone"])
    said = "" if ran == most else f"{ran} of them run"
    table.add_row("(a) lone runs, live teacher", str(most), f"{lone['wall_s']:.0f}", f"{lone['cpu_s']:.0f}", said)
    if plain:
        said = f"{len(result['plain'])} of them run, with {VARIABLE}=system"
        table.add_row("… the allocator as it comes", str(most), f"{plain['wall_s']:.0f}", f"{plain['cpu_s']:.0f}", said)
    for count in counts:
        found = result["ours"][count]
        bound = floor["start_s"] + floor["labels_s"] + count * each
        ratio = f"{found['wall_s'] / bound:.2f} of the floor for {count}"
        table.add_row("(b) ours", str(count), f"{found['wall_s']:.0f}", f"{found['cpu_s']:.0f}", ratio)
    parts = f"start {floor['start_s']:.1f}, labels {floor['labels_s']:.1f}, a student {each:.2f}"
    table.add_row("(c) the floor", str(most), f"{floor['wall_s']:.0f}", f"{floor['cpu_s']:.0f}", parts)
    ratios = {
        "b/c": ours["wall_s"] / floor["wall_s"],
        "a/b": lone["wall_s"] / ours["wall_s"],
        "b/c cpu": ours["cpu_s"] / floor["cpu_s"],
        "a/b cpu": lone["cpu_s"] / ours["cpu_s"],
    }
    if plain:
        ratios |= {"plain/b": plain["wall_s"] / ours["wall_s"], "plain/b cpu": plain["cpu_s"] / ours["cpu_s"]}
    table.add_row("(b)/(c)", "", f"{ratios['b/c']:.2f}", f"{ratios['b/c cpu']:.2f}", "target 1.15 or less")
    table.add_row("(a)/(b)", "", f"{ratios['a/b']:.2f}", f"{ratios['a/b cpu']:.2f}", "")
    if plain:
        table.add_row("… the allocator as it comes", "", f"{ratios['plain/b']:.2f}", f"{ratios['plain/b cpu']:.2f}", "")
    later = result["ready_s"][1:] or result["ready_s"]
    table.add_row("a later job is ready", "", f"{median(later):.2f}", "", "from its start to its first batch; target 1")
    return {**result, "ratios": ratios, "ready_median_s": median(later), "processors": launchers.processors()}, table
