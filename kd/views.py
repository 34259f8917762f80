"""What the reading commands show, made of cards and of `conf/` alone."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from kd.errors import InputError, nearest
from kd.pipeline.plan import Plan, status
from kd.pipeline.reproduce import Verdict
from kd.report.compare import diff
from kd.store import Artifact, Store, short

MARKS = {"hit": "[green]hit[/]", "miss": "[yellow]miss[/]", "damaged": "[red]damaged[/]", "running": "[cyan]running[/]"}


def plan_data(plans: list[Plan], store: Store) -> dict[str, Any]:
    """A plan as data: each job's stages, and the distinct stages that would run."""
    states = {n.key: status(n, store) for p in plans for n in p.nodes}
    return {
        "jobs": [
            {
                "overrides": list(p.overrides),
                "key": p.key,
                "stages": [
                    {"stage": n.name, "key": n.key, "status": states[n.key], "inputs": n.inputs, "unused": n.unused}
                    for n in p.nodes
                ],
            }
            for p in plans
        ],
        "to_run": [
            {"stage": n.name, "key": n.key}
            for n in {n.key: n for p in plans for n in p.nodes}.values()
            if states[n.key] != "hit"
        ],
    }


def plan_view(plans: list[Plan], store: Store) -> Group:
    """The stages of each job with key and state, what a miss differs in from the nearest artifact, and the sum."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("stage", "key", "store", "made of"):
        table.add_column(name, overflow="fold")
    seen: set[str] = set()
    cards = [a.card for a in store]
    reasons: dict[str, None] = {}
    for p in plans:
        for n in p.nodes:
            if n.key in seen:
                continue
            seen.add(n.key)
            state = status(n, store)
            label = " ".join(w for w in p.overrides if not w.startswith("run.")) if n is p.nodes[-1] else ""
            made = _miss(n.document, cards) if state == "miss" else ""
            table.add_row(n.name, short(n.key), MARKS[state], Text("; ".join(filter(None, (label, made)))))
            reasons |= {f"{role} not used by {n.name}: {why}": None for role, why in n.unused.items()}
    data = plan_data(plans, store)
    counts: dict[str, int] = {}
    for row in data["to_run"]:
        counts[row["stage"]] = counts.get(row["stage"], 0) + 1
    total = ", ".join(f"{n} {name}" for name, n in counts.items()) or "nothing: all of it is in the store"
    jobs = f"{len(plans)} job{'s' if len(plans) != 1 else ''}"
    return Group(table, *(Text(line) for line in reasons), Text(f"{jobs}; to run: {total}"))


def _miss(document: dict[str, Any], cards: list[dict[str, Any]]) -> str:
    """How a missing stage differs from the stored one most like it."""
    mine = _leaves({k: document[k] for k in ("config", "inputs", "version")})
    best: tuple[int, str, list[str]] | None = None
    for card in cards:
        other = card.get("document", {})
        if other.get("stage") != document["stage"]:
            continue
        theirs = _leaves({k: other.get(k) for k in ("config", "inputs", "version")})
        changed = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
        if best is None or len(changed) < best[0]:
            lines = [f"{k.removeprefix('config.')} {theirs.get(k)} -> {mine.get(k)}" for k in changed]
            best = (len(changed), short(card["key"]), lines)
    if best is None:
        return "first of its kind in this store"
    shown = ", ".join(re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1", line) for line in best[2][:3])
    return f"differs from {best[1]} in {shown}" + (f" and {best[0] - 3} more" if best[0] > 3 else "")


def _leaves(node: Any, path: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        found: dict[str, Any] = {}
        for key, value in node.items():
            found |= _leaves(value, f"{path}.{key}" if path else str(key))
        return found
    return {path: node}


def ls_rows(store: Store, where: Iterable[str], sort: str | None, stage: str | None) -> list[dict[str, Any]]:
    """Artifacts as flat rows, filtered by ``name=value``, ``name>value`` or ``name<value``.

    Raises:
        InputError: if a filter or the sort key names no column.
    """
    rows = []
    for a in store:
        card = a.card
        config = card["document"]["config"]
        model = config.get("student") or config.get("model") or {}
        row = {
            "hash": short(a.key),
            "stage": card.get("stage"),
            "model": model.get("name"),
            "data": config.get("data", {}).get("name"),
            **{k: v for k, v in card.get("dials", {}).items() if k != "seed"},
            "seed": config.get("seed"),
            "accuracy": card.get("metrics", {}).get("test/accuracy"),
            "f1": card.get("metrics", {}).get("test/f1"),
            "parameters": card.get("cost", {}).get("parameters"),
            "wall_s": card.get("time", {}).get("wall_s"),
            "started": card.get("time", {}).get("started"),
            "sweep": card.get("run", {}).get("sweep"),
        }
        row["_all"] = {**_leaves(config), **card.get("metrics", {}), **card.get("dials", {}), **row}
        rows.append(row)
    if stage:
        rows = [r for r in rows if r["stage"] == stage]
    for condition in where:
        rows = _filter(rows, condition)
    if sort:
        name = sort.lstrip("-")
        _known(rows, name)
        rows.sort(
            key=lambda r: (r["_all"].get(name) is None, _order(r["_all"].get(name))), reverse=sort.startswith("-")
        )
        rows.sort(key=lambda r: r["_all"].get(name) is None)
    return [{k: v for k, v in r.items() if k != "_all"} for r in rows]


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, (int, float)) else (1, str(value))


def _known(rows: list[dict[str, Any]], name: str) -> None:
    names = {k for r in rows for k in r["_all"]}
    if rows and name not in names:
        raise InputError(f"no run has a column {name!r}{nearest(name, names)}")


def _filter(rows: list[dict[str, Any]], condition: str) -> list[dict[str, Any]]:
    found = re.fullmatch(r"([^=<>]+)(=|<|>)(.*)", condition)
    if not found:
        raise InputError(f"--where {condition!r} is no condition; write name=value, name>value or name<value")
    name, sign, text = found.groups()
    _known(rows, name)
    kept = []
    for r in rows:
        value = r["_all"].get(name)
        if sign == "=":
            same = str(value) == text or (isinstance(value, (int, float)) and _number(text) == value)
            kept += [r] if same else []
        elif isinstance(value, (int, float)) and (limit := _number(text)) is not None:
            kept += [r] if (value > limit if sign == ">" else value < limit) else []
    return kept


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def rows_table(rows: list[dict[str, Any]]) -> Table:
    """Flat rows as a table, without the columns that are empty everywhere."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    names = [n for n in (rows[0] if rows else ()) if any(r.get(n) is not None for r in rows)]
    for name in names:
        table.add_column(name, no_wrap=name == "hash")
    for r in rows:
        table.add_row(*(_cell(r.get(name)) for name in names))
    return table


def _cell(value: Any) -> Text:
    if value is None:
        return Text("-", style="dim")
    return Text(f"{value:.4f}" if isinstance(value, float) and not value.is_integer() else str(value))


def show_view(artifact: Artifact, store: Store) -> Group:
    """One artifact: metrics, cost, lineage, config, fingerprints, files, how to make it again."""
    card = artifact.card
    head = Text(f"{card.get('stage')} {card['key']}", style="bold")
    tree = Tree("lineage")
    _lineage(tree, artifact, store)
    parts: list[Any] = [head, tree]
    sections = {
        "metrics": card.get("metrics", {}),
        "cost": card.get("cost", {}),
        "time": card.get("time", {}),
        "config": _leaves(card["document"]["config"]),
        "environment": card.get("fingerprints", {}).get("environment", {}),
        "code": card.get("fingerprints", {}).get("code", {}),
        "files": {n: f"{f['bytes']} bytes, sha256 {f['sha256'][:16]}" for n, f in card.get("files", {}).items()},
    }
    for name, values in sections.items():
        if values:
            table = Table(
                box=None, show_header=False, pad_edge=False, title=name, title_justify="left", title_style="bold"
            )
            for key, value in values.items():
                table.add_row(Text(key), Text(json.dumps(value) if not isinstance(value, str) else value))
            parts.append(table)
    if damage := store.damage(artifact):
        parts.append(Text(f"damaged: {damage}", style="red"))
    if card.get("resumed"):
        parts.append(Text(f"resumed at step {', '.join(map(str, card['resumed']))}"))
    parts.append(Text(f"made by: kd run {' '.join(card.get('run', {}).get('overrides', []))}"))
    parts.append(Text(f"again:   kd reproduce {short(card['key'])}"))
    return Group(*parts)


def _lineage(tree: Tree, artifact: Artifact, store: Store) -> None:
    for role, key in artifact.card["document"]["inputs"].items():
        parent = store.read(store.folder(key))
        branch = tree.add(f"{role} {short(key)}" + ("" if parent else " (not in this store)"))
        if parent:
            _lineage(branch, parent, store)


def diff_view(a: Artifact, b: Artifact) -> Group:
    """What differs between two artifacts, section by section."""
    parts: list[Any] = []
    for name, changes in diff(a.card, b.card).items():
        table = Table(
            box=None, header_style="bold", pad_edge=False, title=name, title_justify="left", title_style="bold"
        )
        for column in ("", short(a.key), short(b.key)):
            table.add_column(column, overflow="fold")
        rows = changes.items() if isinstance(changes, dict) else ((c[0], c[1:]) for c in changes)
        for path, pair in rows:
            left, right = (pair["a"], pair["b"]) if isinstance(pair, dict) else tuple(pair)[:2]
            table.add_row(Text(path), Text(_plain(left)), Text(_plain(right)))
        if table.row_count:
            parts.append(table)
    return Group(*(parts or [Text("nothing differs")]))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def verdict_view(verdict: Verdict, notes: list[str]) -> Group:
    """The verdict first, then why, then each stage."""
    colour = {0: "bold green", 1: "bold red", 3: "bold yellow"}[verdict.exit_code]
    parts: list[Any] = [Text(verdict.word, style=colour)]
    parts += [Text(f"  {line}") for line in verdict.reasons]
    parts += [Text(f"  differs now: {line}", style="dim") for line in notes]
    for stage in verdict.stages:
        same = sum(m["first"] == m["second"] for m in stage["metrics"])
        total = len(stage["metrics"])
        line = f"  {stage['stage']} {short(stage['key'])}: {same} of {total} metrics equal to the last digit"
        if stage["weights"]:
            line += f", weights {stage['weights'][:16]}"
        parts.append(Text(line))
    return Group(*parts)


BREAKERS = ("hydra-ax-sweeper", "hydra-nevergrad-sweeper")


def health(store: Store, data_dir: Path) -> list[tuple[str, str, str]]:
    """The checks of `kd doctor`: (state, what, said), state one of ok, warn, bad; no torch is imported."""
    checks: list[tuple[str, str, str]] = []
    for name in (
        "torch",
        "torchvision",
        "pytorch-lightning",
        "timm",
        "torchmetrics",
        "hydra-core",
        "omegaconf",
        "wandb",
    ):
        try:
            checks.append(("ok", name, version(name)))
        except PackageNotFoundError:
            checks.append(("bad", name, "not installed: pip install kd"))
    lightning = tuple(
        int(x) for x in re.findall(r"\d+", next((c[2] for c in checks if c[1] == "pytorch-lightning"), "0"))[:3]
    )
    if lightning in {(2, 6, 2), (2, 6, 3)}:
        checks.append(("bad", "pytorch-lightning", "2.6.2 and 2.6.3 were malware: remove it, change your passwords"))
    installed = {d.metadata["Name"].lower() for d in distributions() if d.metadata["Name"]}
    for name in BREAKERS:
        if name in installed:
            checks.append(("bad", name, f"breaks every Hydra program at start: pip uninstall {name}"))
    root = store.root
    parent = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    writable = os.access(parent, os.W_OK)
    checks.append(("ok" if writable else "bad", "store", f"{root}" + ("" if writable else " cannot be written")))
    checks.append(("ok" if free > 2**30 else "warn", "disk", f"{free / 2**30:.1f} GiB free"))
    broken = [a for a in store if store.damage(a)]
    checks.append(("warn" if broken else "ok", "artifacts", _broken(broken) if broken else f"{len(list(store))} sound"))
    found = sorted(p.name for p in data_dir.iterdir() if p.is_dir()) if data_dir.is_dir() else []
    said = f"{data_dir}: {', '.join(found) or 'nothing yet (sets are downloaded at first use)'}"
    checks.append(("ok", "data", said))
    from kd.training.tracking import mode

    checks.append(("ok", "W&B", mode("auto", dict(os.environ))))
    checks.append(("ok", "processors", f"{os.cpu_count()}, threads {os.environ.get('OMP_NUM_THREADS', 'as many')}"))
    return checks


def _broken(found: list[Artifact]) -> str:
    return f"{len(found)} damaged ({', '.join(short(a.key) for a in found[:3])}): the next run makes them again"
