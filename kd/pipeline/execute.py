"""Run what a plan misses: one holder a stage, a work folder that survives a kill, an artifact whole or not at all."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kd.errors import KDError
from kd.instantiate import resolve
from kd.pipeline.plan import Node, Plan
from kd.store import Artifact, Store, short, write_json
from kd.training.settings import Run

Tell = Callable[[dict[str, Any]], None]


def build(document: Mapping[str, Any], trusted: list[str] | None = None) -> Any:
    """The stage a document describes; its config stays plain data, which the stage itself instantiates."""
    return resolve(document["stage"], trusted or [])(**document["config"])


def check(plans: list[Plan], store: Store, run: Run) -> None:
    """Build everything the missing stages will build, once, before any of them starts.

    Raises:
        InputError: at the first that cannot run.
    """
    from kd.stages import Room

    seen: set[str] = set()
    for plan in plans:
        stages: dict[str, Any] = {}
        for node in plan.nodes:
            artifact = store.get(node.key)
            stages[node.key] = artifact or build(node.document, run.trusted)
            # What a stage builds depends on neither its seed nor the length of its training.
            shape = repr([node.document["stage"], *(v for k, v in node.config.items() if k != "seed")])
            if artifact is None and shape not in seen:
                seen.add(shape)
                inputs = {role: stages[key] for role, key in node.inputs.items()}
                stages[node.key].check(inputs, Room(run, store.work(node.key)))


def execute(plan: Plan, store: Store, run: Run, tell: Tell = lambda event: None, sweep: str | None = None) -> list[str]:
    """Run the missing stages of one plan in order; returns the names of those that this call ran.

    Raises:
        KDError: if a stage fails; what was finished stays, what was begun can be resumed.
    """
    ran = []
    for node in plan.nodes:
        if store.get(node.key) is not None:
            tell({"event": "hit", "stage": node.name, "key": node.key})
            continue
        wait = lambda holder, node=node: tell(  # noqa: E731
            {"event": "say", "line": f"{node.name} {short(node.key)} is being made by {holder}: waiting for it"}
        )
        with store.lock(node.key, wait):
            if store.get(node.key) is not None:
                tell({"event": "hit", "stage": node.name, "key": node.key})
                continue
            if damage := store.broken(node.key):
                moved = store.quarantine(node.key)
                tell(
                    {
                        "event": "say",
                        "line": f"{node.name} {short(node.key)}: {damage}; moved to {moved.name}, making it again",
                    }
                )
            tell({"event": "start", "stage": node.name, "key": node.key})
            make(node, plan, store, run, tell, sweep)
            ran.append(node.name)
            tell({"event": "done", "stage": node.name, "key": node.key})
    return ran


def make(node: Node, plan: Plan, store: Store, run: Run, tell: Tell, sweep: str | None) -> Artifact:
    """Run one stage and put its artifact; the caller holds the lock.

    Raises:
        KDError: if it fails, disk full included.
    """
    from kd.stages import Room, code_print, environment_print

    inputs: dict[str, Artifact] = {}
    for role, key in node.inputs.items():
        found = store.get(key)
        if found is None:
            raise KDError(f"{node.name} needs {role} {short(key)}, which is not in the store")
        inputs[role] = found
    work = store.work(node.key)
    out = work / "out"
    started, wall, cpu = datetime.now(UTC), time.monotonic(), time.process_time()
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        _same_code(work, code_print()["digest"], tell)
        dials = plan.dials if node is plan.nodes[-1] else {}
        room = Room(run, work, node.key, node.name, sweep, node.document, dials, tell)
        environment = environment_print()
        result = build(node.document, run.trusted).run(inputs, out, room)
        prints = result.pop("fingerprints", {})
        card = {
            "schema": 1,
            "key": node.key,
            "stage": node.name,
            "document": node.document,
            "dials": dials,
            **result,
            "fingerprints": {**prints, "code": code_print(), "environment": environment},
            "run": {"overrides": list(plan.overrides), "sweep": sweep, "pipeline": plan.pipeline},
            "time": {
                "started": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "wall_s": round(time.monotonic() - wall, 3),
                "cpu_s": round(time.process_time() - cpu, 3),
            },
        }
        artifact = store.put(node.key, out, card)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise KDError(
                f"{node.name}: no space left for {store.root}; free some (`kd rm`), then run the same command again: "
                "it goes on from its last checkpoint"
            ) from error
        raise
    shutil.rmtree(work, ignore_errors=True)
    return artifact


def _same_code(work: Path, digest: str, tell: Tell) -> None:
    """Start over where the code has changed since the checkpoint was written: half of each would be neither."""
    note = work / "code"
    if note.exists() and note.read_text().strip() != digest:
        tell({"event": "say", "line": "the code has changed since the checkpoint was written: starting over"})
        for path in work.glob("*"):
            if path.is_file():
                path.unlink()
    if not note.exists():
        note.write_text(digest)


def record_sweep(
    store: Store, sweep: str, overrides: list[str], plans: list[Plan], outcomes: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the sweep's record: what was asked, each job's key and how it ended."""
    record = {
        "schema": 1,
        "id": sweep,
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "overrides": overrides,
        "jobs": [
            {"overrides": list(p.overrides), "key": p.key, "status": o["status"], "error": o.get("error")}
            for p, o in zip(plans, outcomes, strict=True)
        ],
    }
    write_json(store.root / "sweeps" / f"{sweep}.json", record)
    return record
