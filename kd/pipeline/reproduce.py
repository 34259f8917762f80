"""Run a stored run again from its recorded config, and judge whether it came out the same.

A stored config is a stranger's data: its text must hash to its key, hold plain data only, and name only allowed
targets; no path and no weights are taken from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from kd.errors import Inconclusive, InputError
from kd.instantiate import check_target, resolve, signature_errors, targets
from kd.pipeline.plan import Node, Plan
from kd.stages.fingerprints import NUMERIC
from kd.store import SCHEMA, Artifact, Store, canonical, digest, short, with_neutral
from kd.training.settings import Fit, typed

# What two machines or thread counts may differ by before it is another result: shares of 1, then losses.
SHARE, PER_CLASS, RELATIVE = 0.005, 0.02, 0.05
COSTS = ("parameters", "macs", "bytes")  # the costs that no clock has a part in
MODELS = (".safetensors", ".onnx", ".pt2")  # files whose bytes follow from the config
MOST_THREADS = 1024
_STAGE_NAME = re.compile(r"[A-Za-z_][\w-]*")
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


def lineage(store: Store, artifact: Artifact, trusted: Sequence[str] = ()) -> Plan:
    """The plan that makes an artifact again: its recorded document and those of its inputs, each checked.

    Args:
        store: where the artifact and what it was made from stand.
        artifact: the run's.
        trusted: further packages that a target may name (`run.trusted`); a card cannot name any.

    Raises:
        InputError: if a document is not what its key names, or holds what no config may hold.
        Inconclusive: if an input's card is missing, or the code that made one of them is.
    """
    nodes: dict[str, Node] = {}

    def visit(found: Artifact) -> None:
        document = checked(found, trusted)
        _shaped(found)
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
        nodes[found.key] = Node(found.card["stage"], found.key, document, inputs, {})

    visit(artifact)
    run = artifact.card.get("run", {})
    return Plan(tuple(nodes.values()), str(run.get("pipeline", "")), dict(artifact.card.get("dials") or {}), ())


def checked(artifact: Artifact, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """An artifact's document, trusted no further than its key reaches.

    Raises:
        InputError: if it was altered, or its schema or a target is not allowed.
        Inconclusive: if another version of a stage made it.
    """
    document = artifact.card.get("document")
    name = short(artifact.path.name)
    if not isinstance(document, dict) or set(document) != {"schema", "stage", "version", "config", "inputs"}:
        raise InputError(f"{name}: the recorded config is no key document; nothing is run from it")
    try:
        found = digest(document)  # refuses ${…}, ??? and anything but plain data
    except (InputError, RecursionError) as error:
        raise InputError(f"{name}: {error}; nothing is run from it") from error
    if found != artifact.card.get("key") or not found.startswith(artifact.path.name):
        raise InputError(
            f"{name}: the recorded config now hashes to {short(found)}: it was altered after the run; "
            "put the old value back, or run it as a new config"
        )
    if document["schema"] != SCHEMA:
        raise InputError(f"{name} was written under schema {document['schema']}; this kd reads {SCHEMA}")
    try:
        _allowed(document, trusted)
    except InputError as error:
        raise InputError(f"{name}: {error}; nothing is run from it") from error
    version = resolve(document["stage"]).VERSION
    if document["version"] != version:
        raise Inconclusive(
            f"{name} was made by version {document['version']} of {document['stage']}, and this kd has {version}: "
            f"check out the commit that made it (`kd show {name}` names it)"
        )
    return document


def _allowed(document: Mapping[str, Any], trusted: Sequence[str]) -> None:
    """Refuse a stage that is none, fields it does not have, and targets outside the allow-list, by name alone."""
    stage, config = document["stage"], document["config"]
    if not str(stage).startswith("kd.stages.") or not hasattr(resolve(stage), "VERSION"):
        raise InputError(f"{stage!r} is no stage")
    if not isinstance(config, dict) or "_target_" in config:
        raise InputError("the config is no mapping of a stage's fields")
    for path, target in targets(config, "config"):
        try:
            check_target(target, trusted)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    whole = with_neutral(config, resolve(stage).SINCE)
    signature_errors({"_target_": stage, **whole}, "config")
    if whole.get("fit") is not None:
        typed(Fit, whole["fit"], "config.fit")


def _shaped(artifact: Artifact) -> None:
    """Refuse a card whose other parts have not the types that kd writes.

    Its stage becomes a folder's name, its threads are started; the rest is compared.

    Raises:
        InputError: naming the first such part.
    """

    def mapping(node: Any) -> bool:
        return isinstance(node, dict)

    card = artifact.card
    prints, trace = card.get("fingerprints"), card.get("trace", {})
    prints = prints if isinstance(prints, dict) else {}
    environment = prints.get("environment")
    threads = environment.get("threads", 1) if isinstance(environment, dict) else None
    sound = {
        "stage": isinstance(card.get("stage"), str) and _STAGE_NAME.fullmatch(card["stage"]) is not None,
        "run": mapping(card.get("run", {})),
        "dials": mapping(card.get("dials", {})),
        "metrics": mapping(card.get("metrics", {})),
        "cost": mapping(card.get("cost", {})),
        "trace": mapping(trace)
        and isinstance(trace.get("losses", []), list)
        and isinstance(trace.get("epochs", []), list)
        and all(map(mapping, trace.get("epochs", []))),
        "fingerprints": mapping(environment) and mapping(prints.get("code")),
        "fingerprints.environment.threads": type(threads) is int and 1 <= threads <= MOST_THREADS,
    }
    for part, ok in sound.items():
        if not ok:
            raise InputError(
                f"{short(artifact.key)}: the card's {part} is not what kd writes: it was altered after the run; "
                "nothing is run from it"
            )


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
    for (node, _, _), stage in zip(pairs, stages, strict=True):
        stored = old.read(old.folder(node.key))
        if stored is not None and (damage := old.damage(stored)):
            stage["word"], stage["where"] = "differs", f"what the store holds is damaged: {damage}"
    verdict = Verdict("bit-identical", [], stages)
    for (node, recorded, again), stage in zip(pairs, stages, strict=True):
        if stage["word"] == "bit-identical":
            continue
        was, now = (p["fingerprints"]["environment"] for p in (recorded, again))
        # A field that the older kd did not record yet says nothing.
        why = differences(was, now, tuple(name for name in NUMERIC if name in was and name in now))
        code = [p["fingerprints"]["code"]["digest"] for p in (recorded, again)]
        if code[0] != code[1]:
            why.append("the code of kd")
        because = f"because of {'; '.join(why)}" if why else "though code and environment are the same"
        line = f"{node.name} {short(node.key)}: {stage['where']}"
        if stage["word"] == "differs" and node is plan.nodes[-1] and (spread := _in_seed_spread(old, recorded, again)):
            stage["word"] = "within seed spread"
            line = f"{line}; {spread}"
        verdict.reasons.append(f"{line}, {because}")
        verdict.word = _worse(verdict.word, stage["word"])
    return verdict


def _worse(a: str, b: str) -> str:
    order = list(EXIT)
    return max(a, b, key=order.index)


def _stage(node: Node, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One stage's word, and where it first differs."""
    where = _first_divergence(first, second)
    metrics = list(_metrics(_numbers(first), _numbers(second)))
    unequal = [m for m in metrics if m["first"] != m["second"]]
    report = {"stage": node.name, "key": node.key, "weights": second.get("weights"), "metrics": metrics}
    same_files = _same_files(first, second)
    if same_files and not unequal and not where:
        return {**report, "word": "bit-identical", "where": ""}
    # The same weights cannot have another history or score: the card was altered, or the evaluation changed.
    outside = unequal if same_files else [m for m in unequal if not m["close"]]
    if outside or same_files:
        named = [f"{m['name']}: recorded {m['first']!r}, now {m['second']!r}" for m in outside[:1]]
        return {**report, "word": "differs", "where": "; ".join([where, *named] if where else named)}
    largest = max((abs(m["first"] - m["second"]) for m in unequal), default=0.0)
    moved = f"largest change of a metric {largest:.2g}" if unequal else "every metric the same"
    return {**report, "word": "within tolerance", "where": f"{where or 'the files differ'}; {moved}"}


def _same_files(recorded: Mapping[str, Any], again: Mapping[str, Any]) -> bool:
    """Whether weights and models came out the same; the history holds cadences that `run/` may change.

    A file that the older kd did not write yet says nothing.
    """
    now = again.get("files", {})
    files = {name: f for name, f in recorded.get("files", {}).items() if name.endswith(MODELS)}
    return all(name in now and now[name]["sha256"] == f["sha256"] for name, f in files.items())


def _numbers(card: Mapping[str, Any]) -> dict[str, Any]:
    cost = card.get("cost", {})
    return {**card.get("metrics", {}), **{f"cost/{name}": cost[name] for name in COSTS if name in cost}}


def _first_divergence(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Where the two trainings part: a step, an epoch, or only the end; empty if they do not."""
    a, b = first.get("trace") or {}, second.get("trace") or {}
    for step, (x, y) in enumerate(zip(a.get("losses", ()), b.get("losses", ()), strict=False), start=1):
        if x != y:
            return f"first differs in the loss of step {step} ({x!r}, now {y!r})"
    for x, y in zip(a.get("epochs", ()), b.get("epochs", ()), strict=False):
        if x.get("weights") != y.get("weights"):
            return f"first differs in the weights after epoch {x.get('epoch')}"
        for name in sorted(x.keys() & y.keys()):  # not all have all: `run/` says in which epochs validation runs
            if x[name] != y[name]:
                return f"first differs in {name} of epoch {x.get('epoch')} ({x[name]!r}, now {y[name]!r})"
    for what in ("losses", "epochs"):
        if len(a.get(what, ())) != len(b.get(what, ())):
            return f"{len(a.get(what, ()))} {what} are recorded, now there are {len(b.get(what, ()))}"
    if first.get("weights") != second.get("weights"):
        return (
            f"first differs in the weights at the end ({_brief(first.get('weights'))}, now {second['weights'][:16]}…)"
        )
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


def _in_seed_spread(store: Store, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """In words, if the new accuracy is within two standard deviations over three or more stored seeds of this config.

    Empty if it is not, or if the weights are the recorded ones: then no seed, but the card, is what differs.
    """

    def unseeded(card: Mapping[str, Any]) -> str:
        document = dict(card["document"])
        document["config"] = {k: v for k, v in document["config"].items() if k != "seed"}
        return canonical(document)

    name = "test/accuracy"
    if _same_files(first, second) or name not in second.get("metrics", {}):
        return ""
    same = [
        a.card["metrics"][name]
        for a in store
        if name in a.card.get("metrics", {}) and unseeded(a.card) == unseeded(first)
    ]
    if len(same) < 3 or not abs(second["metrics"][name] - fmean(same)) <= 2 * stdev(same):
        return ""
    found = second["metrics"][name]
    return f"{name} {found:.4f} is within two standard deviations of {len(same)} seeds ({fmean(same):.4f} on average)"
