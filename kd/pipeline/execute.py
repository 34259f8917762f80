"""Run what a plan misses: one holder a stage, a work folder that survives a kill, an artifact whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.data.dreams import SHARD
from kd.data.labels import shard
from kd.errors import KDError
from kd.instantiate import resolve
from kd.pipeline.plan import Node, Plan
from kd.stages.fingerprints import NUMERIC
from kd.store import Artifact, Store, canonical, short, with_neutral, write_json, write_text
from kd.training.pruning import Trial
from kd.training.settings import CHECKPOINT, HISTORY, Run

if TYPE_CHECKING:
    from kd.stages.base import Company

Tell = Callable[[dict[str, Any]], None]


def build(document: Mapping[str, Any], trusted: list[str] | None = None) -> Any:
    """The stage a document describes; its config stays plain data, which the stage itself instantiates."""
    kind = resolve(document["stage"], trusted or [])
    return kind(**with_neutral(document["config"], kind.SINCE))


def check(plans: list[Plan], store: Store, run: Run, tell: Tell = lambda event: None) -> None:
    """Build everything the missing stages will build, once, before any of them starts.

    ``tell`` hears what terms are bound to, each line once.

    Raises:
        InputError: at the first that cannot run.
    """
    from kd.stages import Room
    from kd.stages.base import Company
    from kd.training.turns import Turns

    company = Company(Turns())
    seen: set[str] = set()
    planned: dict[int, Any] = {}
    said: set[str] = set()

    def told(event: dict[str, Any]) -> None:
        if event.get("line") not in said:
            said.add(event.get("line", ""))
            tell(event)

    for plan in plans:
        stages: dict[str, Any] = {}
        for node in plan.nodes:
            artifact = store.get(node.key)
            stages[node.key] = artifact or build(node.document, run.trusted)
            # What a stage builds depends on neither its seed nor the length of its training.
            shape = repr([node.document["stage"], *(v for k, v in node.config.items() if k != "seed")])
            inputs = {role: stages[key] for role, key in node.inputs.items()}
            if artifact is None:
                planned[id(stages[node.key])] = stages[node.key], inputs, node.key
            if "model" in inputs:  # what it shapes is shaped by the stages before, too
                shape = node.key
            if artifact is None and shape not in seen:
                seen.add(shape)
                stages[node.key].check(
                    inputs,
                    Room(run, store.work(node.key), stage=node.name, tell=told, company=company, planned=planned),
                )


def execute(
    plan: Plan,
    store: Store,
    run: Run,
    tell: Tell = lambda event: None,
    sweep: str | None = None,
    company: Company | None = None,
    trial: Trial | None = None,
) -> list[str]:
    """Run the missing stages of one plan in order; returns the names of those that this call ran.

    ``company`` is what it shares with other jobs of this process; the last stage reports its epochs to ``trial``.

    Raises:
        Pruned: if the trial gives the last stage up.
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
        # In company a wait lets the others go on: one of them may hold what another process waits for.
        poll = None if company is None else company.turns.pause
        with store.lock(node.key, wait, poll):
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
            make(node, plan, store, run, tell, sweep, company, trial if node is plan.nodes[-1] else None)
            ran.append(node.name)
            tell({"event": "done", "stage": node.name, "key": node.key})
    return ran


def make(
    node: Node,
    plan: Plan,
    store: Store,
    run: Run,
    tell: Tell,
    sweep: str | None = None,
    company: Company | None = None,
    trial: Trial | None = None,
) -> Artifact:
    """Run one stage and put its artifact; the caller holds the lock.

    Raises:
        KDError: if it fails, disk full included.
    """
    from kd.stages import Room, code_print, environment_print
    from kd.training.trainer import device_of

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
        environment = {**environment_print(), "device": device_of(run).type, "devices": run.devices}
        made_of = {role: artifact.card["files"] for role, artifact in inputs.items()}
        maker = {"code": code_print()["digest"], "inputs": made_of, **{n: environment[n] for n in NUMERIC}}
        _same_maker(work, maker, tell)
        dials = plan.dials if node is plan.nodes[-1] else node.dials
        ready: list[float] = []

        def told(event: dict[str, Any]) -> None:
            if event["event"] != "ready":
                tell(event)
            elif not ready:  # at the first epoch's first batch
                ready.append(time.monotonic() - wall)

        room = Room(run, work, node.key, node.name, sweep, node.document, dials, told, company, trial)
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
                **({"packed": True} if company is not None else {}),  # the seconds are also its neighbours'
                **({"ready_s": round(ready[0], 3)} if ready else {}),
            },
        }
        artifact = store.put(node.key, out, card)
    except Exception as error:
        if _disk_full(error):
            raise KDError(
                f"{node.name}: no space left for {store.root}; free some (`kd rm`), then run the same command again: "
                "it goes on from its last checkpoint"
            ) from error
        raise
    shutil.rmtree(work, ignore_errors=True)
    return artifact


def _disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full, whoever wrote: Python, safetensors and torch say it differently."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    return any(words in text for words in ("No space left on device", "File too large", "Disk quota exceeded"))


def _same_maker(work: Path, maker: dict[str, Any], tell: Tell) -> None:
    """Start over where code, threads or device are not those of the checkpoint: half of each would be neither."""
    note = work / "maker"
    known = note.read_text() if note.exists() else None
    if known != canonical(maker):
        if any(any(work.glob(name)) for name in (CHECKPOINT, shard(0, 0), SHARD)):
            tell({"event": "say", "line": f"what is there was made by {_changed(known, maker)}: starting over"})
        # The note last: a kill in between must not leave an old checkpoint under a new note.
        for path in (work / CHECKPOINT, work / HISTORY, *work.glob("labels-v*"), *work.glob(SHARD)):
            path.unlink(missing_ok=True)
        write_text(note, canonical(maker))


def _changed(known: str | None, maker: dict[str, Any]) -> str:
    try:
        before = json.loads(known or "{}")
    except ValueError:
        before = {}
    names = [n for n in maker if canonical(before.get(n)) != canonical(maker[n])]
    return f"another {' and '.join(names)}"


def record_sweep(
    store: Store, sweep: str, overrides: list[str], plans: list[Plan], outcomes: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the sweep's record: what was asked, each job's key and how it ended."""
    started = next((s.get("started") for s in store.sweeps() if s.get("id") == sweep), None)
    record = {
        "schema": 1,
        "id": sweep,
        "started": started or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "overrides": overrides,
        "jobs": [
            {"overrides": list(p.overrides), "key": p.key, "status": o["status"], "error": o.get("error")}
            for p, o in zip(plans, outcomes, strict=True)
        ],
    }
    write_json(store.root / "sweeps" / f"{sweep}.json", record)
    return record
