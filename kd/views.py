"""What the reading commands show, made of cards and of `conf/` alone."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from kd.config import labels
from kd.errors import InputError, nearest
from kd.pipeline.plan import Node, Plan, status
from kd.pipeline.reproduce import Verdict
from kd.pipeline.tree import shape, tree
from kd.report.compare import diff
from kd.stages.fingerprints import PACKAGES, code_print
from kd.store import Artifact, Store, short

STYLES = {"hit": "green", "miss": "yellow", "damaged": "red", "running": "cyan"}
GRAPHS = 3  # drawn under a plan, of a sweep over pipelines
LONG = 6  # a list of more values than this is told by its range
# What `kd ls` does without on a narrow terminal, first to go first.
SPARE = ("sweep", "started", "wall_s", "parameters", "f1", "seed", "data", "alpha", "temperature")


@cache
def _versions() -> dict[str, str | None]:
    """What a card's environment says of packages, as they are installed now; torch is not imported for it."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def made_otherwise(card: Mapping[str, Any]) -> list[str]:
    """What an artifact was made with that is not what would make it now: "code", names of packages."""
    prints = card.get("fingerprints", {})
    code, environment = prints.get("code", {}), prints.get("environment", {})
    other = ["code"] if code.get("digest") != code_print()["digest"] else []
    return other + [n for n, now in _versions().items() if n in environment and environment[n] != now]


def hits_note(plans: Sequence[Plan], store: Store) -> str | None:
    """One line where artifacts of these plans were made by other code or packages than would make them now."""
    keys = dict.fromkeys(n.key for p in plans for n in p.nodes)
    others = [made_otherwise(a.card) for key in keys if (a := store.get(key))]
    names = list(dict.fromkeys(name for other in others for name in other))
    if not names:
        return None
    count = sum(map(bool, others))
    made = f"{count} of the artifacts was" if count == 1 else f"{count} of the artifacts were"
    return f"note: {made} made with other {_some(names)}; `kd plan` says which, `kd reproduce HASH` what it changes"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def plan_data(plans: Sequence[Plan], store: Store, said: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A plan as data: each job's stages, and the distinct stages that would run; ``said``: what a key will write."""
    nodes = {n.key: n for p in plans for n in p.nodes}
    known = [(card, _parts(card["document"])) for card in (a.card for a in store)]
    stages = {key: {**_stage(n, store, known), "writes": (said or {}).get(key)} for key, n in nodes.items()}
    return {
        "jobs": [
            {"overrides": list(p.overrides), "key": p.key, "stages": [stages[n.key] for n in p.nodes]} for p in plans
        ],
        "to_run": [{"stage": s["stage"], "key": s["key"]} for s in stages.values() if s["status"] != "hit"],
    }


Known = Sequence[tuple[Mapping[str, Any], dict[str, Any]]]


def _stage(node: Node, store: Store, known: Known) -> dict[str, Any]:
    found, state = store.get(node.key), status(node, store)
    return {
        "stage": node.name,
        "key": node.key,
        "status": state,
        "inputs": node.inputs,
        "unused": node.unused,
        "damage": store.broken(node.key) if state == "damaged" else None,
        "other": made_otherwise(found.card) if found else [],
        "nearest": _nearest(node.document, known) if state == "miss" else None,
    }


def plan_view(plans: Sequence[Plan], store: Store, said: Mapping[str, str] | None = None) -> Group:
    """The stages of each job with key and state, what makes each one that is not there, and what would run."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("key", no_wrap=True)
    table.add_column("store", no_wrap=True)
    table.add_column("", overflow="fold")
    seen: set[str] = set()
    reasons: dict[str, None] = {}
    data = plan_data(plans, store, said)
    for p, job, label in zip(plans, data["jobs"], labels(p.overrides for p in plans), strict=True):
        for n, stage in zip(p.nodes, job["stages"], strict=True):
            reasons |= {f"{role} not used by {n.name}: {why}": None for role, why in n.unused.items()}
            views, epochs = n.config.get("views"), (n.config.get("fit") or {}).get("epochs")
            if views is not None and epochs is not None and views < epochs:
                reasons[f"{n.name} sees {views} views of a sample in {epochs} epochs: they come again"] = None
            if n.key in seen:
                continue
            seen.add(n.key)
            state = stage["status"]
            other = f" (other {_some(stage['other'])})" if stage["other"] else ""
            # In a sweep, what the job is called says what it is made of.
            why = label if label and n is p.nodes[-1] else _made_of(stage)
            words = "; ".join(filter(None, (stage["writes"], why)))
            table.add_row(n.name, short(n.key), Text(state + other, style=STYLES[state]), Text(words))
    counts: dict[str, int] = {}
    for row in data["to_run"]:
        counts[row["stage"]] = counts.get(row["stage"], 0) + 1
    graphs = {shape(p.nodes): tree(p.nodes) for p in plans if len(p.nodes) > 1}
    drawn = [Text(line) for lines in list(graphs.values())[:GRAPHS] for line in ("", *lines)]
    total = counted(counts) or "nothing: all of it is in the store"
    jobs = f"{len(plans)} job{'s' if len(plans) != 1 else ''}"
    # The graph first: what would run is the last line.
    return Group(
        table, *(Text(line) for line in reasons), *drawn, *([Text()] if drawn else []), Text(f"{jobs}; to run: {total}")
    )


def counted(counts: Mapping[str, int]) -> str:
    """How many of each stage; those of one template are counted together.

    >>> counted({"teacher": 1, "labels": 1, "student": 6}), counted({"assistant1": 1, "assistant2": 1})
    ('1 teacher, 1 labels, 6 students', '2 assistants')
    """
    kinds: dict[str, int] = {}
    for name, n in counts.items():
        kind = "labels" if name.endswith("_labels") else re.sub(r"^(teacher|assistant|student)\d+$", r"\1", name)
        kinds[kind] = kinds.get(kind, 0) + n
    return ", ".join(f"{n} {name}{'s' if n > 1 and not name.endswith('s') else ''}" for name, n in kinds.items())


def _made_of(stage: Mapping[str, Any]) -> str:
    if stage["damage"]:
        return f"{stage['damage']}; it will be made again"
    near = stage["nearest"]
    if stage["status"] != "miss":
        return ""
    if near is None:
        return "the first of its kind in this store"
    changes = [_change(name, *pair) for name, pair in near["changes"].items()]
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return f"unlike {short(near['key'])}: {', '.join(changes[:3])}{more}"


def _change(name: str, theirs: Any, mine: Any) -> str:
    if name.startswith("inputs."):
        return f"another {name.removeprefix('inputs.')}"
    name = name.removeprefix("config.")
    if name.rpartition(".")[2] == "digest":
        return f"other {name.rpartition('.')[0]}"
    return f"{name} {plain(theirs)} -> {plain(mine)}"


def _nearest(document: Mapping[str, Any], known: Known) -> dict[str, Any] | None:
    """The stored artifact of the same stage that a missing one is most like, and how they differ."""
    mine = _parts(document)
    best: dict[str, Any] | None = None
    for card, theirs in known:
        if card["document"]["stage"] != document["stage"]:
            continue
        changed = {k: [theirs.get(k), mine.get(k)] for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)}
        if best is None or len(changed) < len(best["changes"]):
            best = {"key": card["key"], "changes": changed}
    return best


def _parts(document: Mapping[str, Any]) -> dict[str, Any]:
    return _leaves({k: document[k] for k in ("config", "inputs", "version")})


def plain(value: Any) -> str:
    """A value as people read it: six significant digits, a long list by its range, a digest by its first digits.

    >>> plain(0.98123456789), plain(None), plain(4.0), plain("f" * 64), plain([0.5, 0.25])
    ('0.981235', 'null', '4', 'ffffffffffffffff', '[0.5, 0.25]')
    >>> plain([0.1] * 9 + [1 / 3])
    '10 values from 0.1 to 0.333333'
    """
    if isinstance(value, str):
        return short(value) if re.fullmatch("[0-9a-f]{64}", value) else value
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        if len(value) > LONG and all(isinstance(v, (int, float)) for v in value):
            return f"{len(value)} values from {plain(min(value))} to {plain(max(value))}"
        return f"[{', '.join(map(plain, value))}]"
    return json.dumps(value)


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
        # The dials stand in every command; what was trained without a teacher did not hear them.
        heard = card.get("dials", {}) if card["document"].get("inputs") else {}
        row = {
            "hash": short(a.key),
            "stage": card.get("stage"),
            "model": model.get("name"),
            "data": config.get("data", {}).get("name"),
            "temperature": heard.get("temperature"),
            "alpha": heard.get("alpha"),
            "seed": config.get("seed"),
            "accuracy": card.get("metrics", {}).get("test/accuracy"),
            "f1": card.get("metrics", {}).get("test/f1"),
            "parameters": card.get("cost", {}).get("parameters"),
            "wall_s": card.get("time", {}).get("wall_s"),
            "started": card.get("time", {}).get("started"),
            "sweep": card.get("run", {}).get("sweep"),
        }
        row["_all"] = {**_leaves(config), **card.get("metrics", {}), **card.get("cost", {}), **row}
        rows.append(row)
    if stage:
        stages = {str(r["stage"]) for r in rows}
        if rows and stage not in stages:
            raise InputError(f"no run has the stage {stage!r}{nearest(stage, stages)}; there are {', '.join(stages)}")
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


def rows_table(rows: Sequence[Mapping[str, Any]], width: int = 200, spare: Sequence[str] = ()) -> Group:
    """Flat rows as a table, without the columns that are empty everywhere.

    Where it is wider than ``width``, the columns in ``spare`` are left out one after the other, and named below.
    """
    names = [n for n in dict.fromkeys(n for r in rows for n in r) if any(r.get(n) not in (None, "") for r in rows)]
    cells = {n: [_cell(n, r.get(n)) for r in rows] for n in names}

    def needed() -> int:
        return sum(max(len(n), *map(len, cells[n])) + 2 for n in names) - 2

    left_out = []
    for n in spare:
        if names and needed() > width and n in names:
            names.remove(n)
            left_out.append(n)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for n in names:
        numeric = all(isinstance(r.get(n), (int, float, type(None))) for r in rows)
        table.add_column(n, justify="right" if numeric else "left", no_wrap=n in ("hash", "name", "path"))
    for i in range(len(rows)):
        table.add_row(*(Text(cells[n][i], style="dim" if cells[n][i] == "-" else "") for n in names))
    dropped = [Text(f"not shown for want of width: {', '.join(reversed(left_out))}", style="dim")] if left_out else []
    return Group(table, *dropped)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "started":
        return str(value)[:16].replace("T", " ")
    if name == "wall_s":
        return f"{value:.1f}"
    if name in ("accuracy", "f1"):
        return f"{value:.4f}"
    return plain(value) if isinstance(value, float) else str(value)


def show_view(artifact: Artifact, store: Store) -> Group:
    """One artifact: metrics, cost, lineage, config, fingerprints, files, how to make it again."""
    card = artifact.card
    tree = Tree("lineage")
    _lineage(tree, artifact, store)
    parts: list[Any] = [Text(f"{card.get('stage')} {card['key']}", style="bold")]
    if damage := store.damage(artifact):
        parts.append(Text(f"damaged: {damage}", style="red"))
    if other := made_otherwise(card):
        parts.append(Text(f"made with other {_some(other)} than stands here now", style="dim"))
    parts.append(tree)
    sections = {
        "metrics": card.get("metrics", {}),
        "cost": card.get("cost", {}),
        "latency": _leaves(card["latency"]) if card.get("latency") else {},
        "export": _leaves(card["export"]) if card.get("export") else {},
        "sensitivity": _leaves(card["sensitivity"]) if card.get("sensitivity") else {},
        "time": card.get("time", {}),
        "dials": card.get("dials", {}),
        "bindings": dict(line.split(" <- ", 1) if " <- " in line else (line, "") for line in card.get("bindings", [])),
        "config": _leaves(card["document"]["config"]),
        "data": card.get("fingerprints", {}).get("data", {}),
        "code": card.get("fingerprints", {}).get("code", {}),
        "environment": card.get("fingerprints", {}).get("environment", {}),
        "files": {n: f"{f['bytes']:,} bytes, sha256 {short(f['sha256'])}" for n, f in card.get("files", {}).items()},
    }
    for name, values in sections.items():
        if values:
            table = Table(box=None, show_header=False, pad_edge=False)
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for key, value in values.items():
                table.add_row(Text(key), Text(plain(value)))
            parts += [Text(), Text(name, style="bold"), table]
    parts.append(Text())
    run = card.get("run", {})
    if card.get("resumed"):
        parts.append(Text(f"resumed at step {', '.join(map(str, card['resumed']))}"))
    if run.get("sweep"):
        parts.append(Text(f"sweep:   {run['sweep']}"))
    parts.append(Text(f"made by: kd run {' '.join(run.get('overrides', []))}".rstrip()))
    parts.append(Text(f"again:   kd reproduce {short(card['key'])}"))
    return Group(*parts)


def _lineage(tree: Tree, artifact: Artifact, store: Store) -> None:
    for role, key in artifact.card["document"]["inputs"].items():
        parent = store.read(store.folder(key))
        config = parent.card["document"]["config"] if parent else {}
        model = (config.get("model") or config.get("student") or {}).get("name")
        said = f" {model}" if model else "" if parent else " (not in this store)"
        branch = tree.add(Text(f"{role} {short(key)}{said}"))
        if parent:
            _lineage(branch, parent, store)


def diff_view(a: Artifact, b: Artifact) -> Group:
    """What differs between two artifacts, section by section."""
    parts: list[Any] = []
    for name, changes in diff(a.card, b.card).items():
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in (name, short(a.key), short(b.key)):
            table.add_column(column, overflow="fold")
        for path, left, right in changes:
            table.add_row(Text(path), *map(Text, _pair(left, right)))
        parts += [*([Text()] if parts else []), table]
    return Group(*(parts or [Text("nothing differs")]))


def _pair(left: Any, right: Any) -> tuple[str, str]:
    """Two values that differ; of long lists that are as long, where they differ most."""
    if not (isinstance(left, list) and isinstance(right, list) and LONG < len(left) == len(right)):
        return plain(left), plain(right)
    if not all(isinstance(value, (int, float)) for value in (*left, *right)):
        return plain(left), plain(right)
    at = max(range(len(left)), key=lambda i: abs(left[i] - right[i]))
    return f"[{at}] {plain(left[at])}", f"[{at}] {plain(right[at])}, of {len(left)} the largest change"


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
    checks += _plugins()
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
    threads = os.environ.get("OMP_NUM_THREADS")
    checks.append(("ok", "processors", f"{os.cpu_count()}" + (f", OMP_NUM_THREADS={threads}" if threads else "")))
    return checks


def _plugins() -> list[tuple[str, str, str]]:
    """Whether Hydra can read every plugin that is installed: one that raises breaks each command that composes."""
    from hydra.core.plugins import Plugins

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Plugins._scan_all_plugins(modules=_plugin_packages())
    except Exception as error:  # a plugin's import may raise anything
        return [("bad", "Hydra plugin", f"{_culprit(error)} breaks every command: uninstall the package it is from")]
    return [("warn", "Hydra plugin", " ".join(str(w.message).split())) for w in caught]


def _plugin_packages() -> list[Any]:
    try:
        return [importlib.import_module("hydra_plugins")]
    except ImportError:  # none is installed
        return []


def _culprit(error: BaseException) -> str:
    """The module under hydra_plugins whose import raised."""
    frame, found = error.__traceback__, "a Hydra plugin"
    while frame is not None:
        parts = Path(frame.tb_frame.f_code.co_filename).parts
        if "hydra_plugins" in parts:
            found = ".".join(parts[parts.index("hydra_plugins") :]).removesuffix(".py").removesuffix(".__init__")
            break
        frame = frame.tb_next
    return f"{found} ({type(error).__name__}: {error})"


def _broken(found: list[Artifact]) -> str:
    return f"{len(found)} damaged ({', '.join(short(a.key) for a in found[:3])}): the next run makes them again"
