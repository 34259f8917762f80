"""Run a stored run again from its recorded config, and judge whether it came out the same.

A stored config is a stranger's data: its text must hash to its key, hold plain data only, and name only allowed
targets; no path and no weights are taken from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from kd.errors import Inconclusive, InputError
from kd.instantiate import check_target, targets
from kd.pipeline.plan import Node, Plan
from kd.stages.fingerprints import NUMERIC
from kd.store import SCHEMA, Artifact, Store, canonical, digest, short

# What two machines or thread counts may differ by before it is another result: shares of 1, then losses.
SHARE, PER_CLASS, RELATIVE = 0.005, 0.02, 0.05
EXIT = {"bit-identical": 0, "within tolerance": 0, "within seed spread": 0, "differs": 1, "inconclusive": 3}


@dataclass
class Verdict:
    """How a reproduction came out, and why."""

    word: str
    reasons: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 for the three good words, 1 for differs, 3 for inconclusive."""
        return EXIT[self.word]


def lineage(store: Store, artifact: Artifact) -> Plan:
    """The plan that makes an artifact again: its recorded document and those of its inputs, each checked.

    Raises:
        InputError: if a document is not what its key names, or holds what no config may hold.
        Inconclusive: if an input's card is missing.
    """
    nodes: dict[str, Node] = {}

    def visit(found: Artifact) -> None:
        document = checked(found)
        inputs = dict(document["inputs"])
        for role, key in inputs.items():
            if key in nodes:
                continue
            parent = store.read(store.folder(key))
            if parent is None or parent.key != key:
                raise Inconclusive(
                    f"{short(found.key)} was made from {role} {short(key)}, whose card is not in the store"
                )
            visit(parent)
        nodes[found.key] = Node(str(found.card.get("stage", "stage")), found.key, document, inputs, {})

    visit(artifact)
    run = artifact.card.get("run", {})
    return Plan(tuple(nodes.values()), str(run.get("pipeline", "")), dict(artifact.card.get("dials") or {}), ())


def checked(artifact: Artifact) -> dict[str, Any]:
    """An artifact's document, trusted no further than its key reaches.

    Raises:
        InputError: if it was altered, or its schema or a target is not allowed.
    """
    document = artifact.card.get("document")
    name = short(artifact.path.name)
    if not isinstance(document, dict) or set(document) != {"schema", "stage", "version", "config", "inputs"}:
        raise InputError(f"{name}: the recorded config is no key document; nothing is run from it")
    for path, target in targets(document["config"], "config"):
        try:
            check_target(target)
        except InputError as error:
            raise InputError(f"{name}: {path}: {error}") from error
    check_target(document["stage"])
    if not str(document["stage"]).startswith("kd.stages."):
        raise InputError(f"{name}: {document['stage']!r} is no stage; nothing is run from it")
    found = digest(document)  # refuses ${…}, ??? and anything but plain data
    if found != artifact.card.get("key") or not found.startswith(artifact.path.name):
        raise InputError(
            f"{name}: the recorded config now hashes to {short(found)}: it was altered after the run; "
            "put the old value back, or run it as a new config"
        )
    if document["schema"] != SCHEMA:
        raise InputError(f"{name} was written under schema {document['schema']}; this kd reads {SCHEMA}")
    return document


def differences(card: Mapping[str, Any], now: Mapping[str, Any], keys: tuple[str, ...] | None = None) -> list[str]:
    """What differs between a recorded fingerprint and today's, one line each."""
    lines = []
    for key in keys if keys is not None else sorted({*card, *now}):
        if canonical(card.get(key)) != canonical(now.get(key)):
            lines.append(f"{key}: {_brief(card.get(key))} -> {_brief(now.get(key))}")
    return lines


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "…"


def judge(old: Store, new: Store, plan: Plan) -> Verdict:
    """Compare each stage of the recorded run with its second making."""
    pairs = []
    for node in plan.nodes:
        first, second = old.read(old.folder(node.key)), new.read(new.folder(node.key))
        if first is None or second is None:
            return Verdict("inconclusive", [f"{node.name} {short(node.key)} has no card to compare"])
        pairs.append((node, first.card, second.card))
    stages = [_stage(node, first, second) for node, first, second in pairs]
    verdict = Verdict("bit-identical", [], stages)
    for (node, recorded, again), stage in zip(pairs, stages, strict=True):
        if stage["word"] == "bit-identical":
            continue
        environment = [p["fingerprints"]["environment"] for p in (recorded, again)]
        why = differences(environment[0], environment[1], NUMERIC)
        code = [p["fingerprints"]["code"]["digest"] for p in (recorded, again)]
        if code[0] != code[1]:
            why.append("the code of kd")
        because = f"because of {'; '.join(why)}" if why else "though code and environment are the same"
        line = f"{node.name} {short(node.key)}: {stage['where']}"
        if stage["word"] == "differs" and node is plan.nodes[-1] and _in_seed_spread(old, recorded, again):
            stage["word"] = "within seed spread"
        verdict.reasons.append(f"{line}, {because}")
        verdict.word = _worse(verdict.word, stage["word"])
    return verdict


def _worse(a: str, b: str) -> str:
    order = list(EXIT)
    return max(a, b, key=order.index)


def _stage(node: Node, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One stage's word, and where it first differs."""
    where = _first_divergence(first, second)
    metrics = list(_metrics(first.get("metrics", {}), second.get("metrics", {})))
    unequal = [m for m in metrics if m["first"] != m["second"]]
    same_weights = first.get("weights") == second.get("weights") and _files(first) == _files(second)
    report = {"stage": node.name, "key": node.key, "weights": second.get("weights"), "metrics": metrics}
    if same_weights and not unequal:
        return {**report, "word": "bit-identical", "where": ""}
    if same_weights:
        # The same weights cannot score differently: the card was altered, or the evaluation changed.
        m = unequal[0]
        return {**report, "word": "differs", "where": f"{m['name']}: recorded {m['first']!r}, now {m['second']!r}"}
    outside = [m for m in unequal if not m["close"]]
    if outside:
        m = outside[0]
        named = f"{m['name']}: recorded {m['first']!r}, now {m['second']!r}"
        return {**report, "word": "differs", "where": f"{where}; {named}" if where else named}
    largest = max((abs(m["first"] - m["second"]) for m in unequal), default=0.0)
    moved = f"largest change of a metric {largest:.2g}" if unequal else "every metric the same"
    return {**report, "word": "within tolerance", "where": f"{where or 'the files differ'}; {moved}"}


def _files(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Checksums of tensor files; the history holds cadences that `run/` may change."""
    return [(n, f["sha256"]) for n, f in sorted(card.get("files", {}).items()) if n.endswith(".safetensors")]


def _first_divergence(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    a, b = first.get("trace") or {}, second.get("trace") or {}
    for step, (x, y) in enumerate(zip(a.get("losses", ()), b.get("losses", ()), strict=False), start=1):
        if x != y:
            return f"first differs in the loss of step {step} ({x!r}, now {y!r})"
    for x, y in zip(a.get("epochs", ()), b.get("epochs", ()), strict=False):
        if x.get("weights") != y.get("weights"):
            return f"first differs in the weights after epoch {x.get('epoch')}"
    return ""


def _metrics(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in sorted({*first, *second}):
        a, b = first.get(name), second.get(name)
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                yield {"name": f"{name}[{i}]", "first": x, "second": y, "close": _close(name, x, y, PER_CLASS)}
        else:
            yield {"name": name, "first": a, "second": b, "close": _close(name, a, b, SHARE)}


def _close(name: str, a: Any, b: Any, share: float) -> bool:
    if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
        return False
    if name.endswith("loss"):
        return bool(abs(a - b) <= RELATIVE * max(abs(a), abs(b)) + SHARE)
    return bool(abs(a - b) <= share + 1e-12)


def _in_seed_spread(store: Store, first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the new accuracy lies within two standard deviations over three or more stored seeds of this config."""

    def unseeded(card: Mapping[str, Any]) -> str:
        document = dict(card["document"])
        document["config"] = {k: v for k, v in document["config"].items() if k != "seed"}
        return canonical(document)

    name = "test/accuracy"
    if first.get("weights") == second.get("weights") or name not in second.get("metrics", {}):
        return False
    same = [
        a.card["metrics"][name]
        for a in store
        if name in a.card.get("metrics", {}) and unseeded(a.card) == unseeded(first)
    ]
    if len(same) < 3:
        return False
    return bool(abs(second["metrics"][name] - fmean(same)) <= 2 * stdev(same))
