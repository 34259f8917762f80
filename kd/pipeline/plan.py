"""From a composed config to the stages' keys: what each stage is made of, and whether the store has it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kd.errors import InputError, nearest
from kd.instantiate import check_target, instantiate, resolve, signature_errors, targets
from kd.roles import teachers
from kd.schedules import is_schedule, schedule_of
from kd.stages.labels import too_small
from kd.store import Store, digest, document, plain, short, with_neutral
from kd.training.settings import Fit, Run, typed


@dataclass(frozen=True)
class Node:
    """One stage of a plan: its key, what the key is made of, and the keys of its inputs by name."""

    name: str
    key: str
    document: dict[str, Any]
    inputs: dict[str, str]
    unused: dict[str, str]
    dials: dict[str, Any] = field(default_factory=dict)  # of a stage before the last that hears a teacher

    @property
    def config(self) -> dict[str, Any]:
        """The stage's own config."""
        return dict(self.document["config"])


@dataclass(frozen=True)
class Plan:
    """The stages of one job in order; the run's hash is the key of the last."""

    nodes: tuple[Node, ...]
    pipeline: str
    dials: dict[str, Any]
    overrides: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The run's hash."""
        return self.nodes[-1].key


def status(node: Node, store: Store) -> str:
    """`hit`, `miss`, `damaged` (will be made again) or `running` (another process makes it now)."""
    if store.get(node.key) is not None:
        return "hit"
    if store.broken(node.key):
        return "damaged"
    return "running" if store.locked(node.key) else "miss"


def outlook(plans: Sequence[Plan], store: Store, run: Run) -> dict[str, str]:
    """What each missing stage will write where that is worth saying, by key; looked at before anything runs.

    Raises:
        InputError: if it does not fit on the store's disk, or what is stored is not what its card says.
    """
    texts: dict[str, str] = {}
    total = 0
    by_key = {node.key: node for one in plans for node in one.nodes}
    for node in by_key.values():
        kind = resolve(node.document["stage"])
        if not hasattr(kind, "forecast"):
            continue
        config = with_neutral(node.config, kind.SINCE)
        found = store.get(node.key)
        if found is not None:
            if wrong := kind.flaw(found):
                raise InputError(f"{node.name} {short(node.key)}: {wrong}; remove it with `kd rm {short(node.key)}`")
        elif config["views"] is not None:
            made = by_key.get(node.inputs.get("images", ""))
            samples = (
                int(made.config["samples"])
                if made is not None
                else _source(config["data"], run).training_samples(Path(run.data_dir).expanduser())
            )
            count, texts[node.key] = kind.forecast(config, samples, store.work(node.key))
            total += count
    place = next(path for path in (store.root, *store.root.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if total > free:
        raise InputError(too_small(total, free, place))
    return texts


def plan(config: Mapping[str, Any], overrides: tuple[str, ...] = ()) -> Plan:
    """The stages of a composed config with their keys; nothing is run and no torch is imported.

    ``config`` is plain data: ``pipeline.stages`` in order, each with ``_target_``, ``inputs`` (name: stage) and its
    own fields; ``run``; the dials.

    Raises:
        InputError: if a stage, an input or a data set is not what it should be.
    """
    run = Run(**config["run"])
    stages = config["pipeline"]["stages"]
    made: dict[str, Node] = {}
    for name, subtree in stages.items():
        where = f"pipeline.stages.{name}"
        for _, target in targets(subtree, where):
            check_target(target, run.trusted)
        kind = resolve(subtree["_target_"])
        body = with_neutral({k: v for k, v in subtree.items() if k not in ("_target_", "inputs")}, kind.SINCE)
        signature_errors({"_target_": subtree["_target_"], **body}, where)
        inputs = subtree.get("inputs") or {}
        if not isinstance(inputs, dict):
            raise InputError(
                f"{where}.inputs={inputs!r} is no mapping; name a stage for each, e.g. {{teacher: teacher}}"
            )
        for role, source in inputs.items():
            if source not in made:
                if ring := cycle(stages, name):
                    raise InputError(f"{where} reads itself: {' <- '.join(ring)}; a pipeline has no cycles")
                later = " (it stands later)" if source in stages else nearest(str(source), stages)
                raise InputError(f"{where}.inputs.{role}={source!r} is no stage before it{later}")
        if "model" in inputs:
            in_order(where, kind, resolve(made[inputs["model"]].document["stage"]))
        if "data" in body:
            body["data"] = _with_digest(plain(body["data"], f"{where}.data"), run)
        if body.get("fit") is not None:
            place = f"{_step(name)}.fit" if "model" in inputs else "fit"
            place = {"teacher": "teacher_fit", "assistant": "assistant_fit"}.get(name.rstrip("0123456789"), place)
            body["fit"] = _fit(body["fit"], place)
        body = plain(body, where)
        _agree(where, body, {role: made[inputs[role]] for role in teachers(inputs)})
        unused = kind.unused(body, {role: made[source].config for role, source in inputs.items()})
        body = kind.settled(body)
        kept = {role: source for role, source in inputs.items() if role not in unused}
        keys = {role: made[source].key for role, source in kept.items()}
        text = document(check_target(subtree["_target_"]), kind.VERSION, body, keys, kind.SINCE)
        dials = _dials(config, body) if "objective" in body and teachers(inputs) else {}
        made[name] = Node(name, digest(text), text, keys, unused, {**dials, "seed": body.get("seed")} if dials else {})
    return Plan(
        nodes=_needed(made),
        pipeline=str(config["pipeline"].get("name", "")),
        dials=_dials(config, list(made.values())[-1].config),
        overrides=overrides,
    )


def cycle(stages: Mapping[str, Any], name: str) -> list[str]:
    """The way from a stage back to itself over what it reads; empty if there is none.

    >>> cycle({"a": {"inputs": {"teacher": "b"}}, "b": {"inputs": {"teacher": "a"}}}, "a")
    ['a', 'b', 'a']
    """
    ways = [[name]]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        inputs = stages[way[-1]].get("inputs") if way[-1] in stages else None
        for source in inputs.values() if isinstance(inputs, dict) else ():
            if source == name:
                return [*way, name]
            if source not in seen:
                seen.add(source)
                ways.append([*way, source])
    return []


def _agree(where: str, body: Mapping[str, Any], heard: Mapping[str, Node]) -> None:
    """Refuse teachers of other classes than the student's, or one that is there twice.

    Raises:
        InputError: naming both.
    """
    mine = body.get("data", {}).get("num_classes")
    keys: dict[str, str] = {}
    for role, node in heard.items():
        theirs = node.config.get("data", {}).get("num_classes")
        if None not in (mine, theirs) and mine != theirs:
            raise InputError(
                f"{where}.inputs.{role}={node.name!r} knows {theirs} classes and the student learns {mine}; a teacher "
                "must know the same ones"
            )
        if node.key in keys:
            raise InputError(
                f"{where}: {keys[node.key]} and {node.name} are one and the same network; give one of them another "
                "seed, e.g. {name: …, with: {seed: 1}}"
            )
        keys[node.key] = node.name


PHASES = ("structure", "numbers", "file")


def in_order(where: str, kind: Any, before: Any) -> None:
    """Refuse a stage that cannot work on what another leaves: each has the `PHASE` of what it changes.

    Raises:
        InputError: naming the rule.
    """
    own, given = (PHASES.index(getattr(one, "PHASE", "structure")) for one in (kind, before))
    if own < given or given == len(PHASES) - 1:
        raise InputError(
            f"{where}: {kind.__name__} cannot follow {before.__name__}; first what changes the structure or trains "
            "(prune, lowrank, recover), then what changes the numbers (quantize), then what writes a file (export)"
        )


def _dials(config: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """The dials as the run uses them: a temperature set inside a term beats the dial, two of them make it unsaid."""
    dials = {name: config[name] for name in ("temperature", "alpha", "seed") if name in config}
    used = {_said(value) for term in last.get("objective", {}).values() for value in _temperatures(term)}
    dials = {name: _said(value) for name, value in dials.items()}
    if used:
        dials["temperature"] = used.pop() if len(used) == 1 else None
    return {name: value for name, value in dials.items() if value is not None}


def _temperatures(node: Any) -> list[Any]:
    """Those of a term's loss, and of the losses inside it."""
    loss = node.get("loss") if isinstance(node, dict) else None
    if not isinstance(loss, dict):
        return []
    own = [loss["temperature"]] if loss.get("temperature") is not None else []
    return [*own, *_temperatures(loss)]


def _said(value: Any) -> Any:
    """A dial as it is told: a schedule in words."""
    return str(schedule_of(value)) if is_schedule(value) else value


def _step(name: str) -> str:
    """The group that sets a step of a chain: its recovery's, or its own.

    >>> _step("prune2_recover"), _step("quantize2")
    ('recover', 'quantize')
    """
    return name.rpartition("_")[2].rstrip("0123456789")


def _fit(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A fit with every field present and in range."""
    fit = typed(Fit, node, where)
    return {f.name: getattr(fit, f.name) for f in fields(Fit)}


_RESOLVED: dict[tuple[str, str], dict[str, Any]] = {}


def _with_digest(data: dict[str, Any], run: Run) -> dict[str, Any]:
    """The data's config with nothing left open and the digest of its content, computed once and kept."""
    from kd.store import canonical

    known = canonical(data), canonical([run.data_dir, run.store])
    if known not in _RESOLVED:
        root, cache = Path(run.data_dir).expanduser(), Path(run.store).expanduser() / "data"
        source = _source(data, run).resolved(root)
        found = source.content_digest(root, cache / "digests.json")
        whole = {f.name: getattr(source, f.name) for f in fields(source) if f.name != "digest"}
        _RESOLVED[known] = plain({"_target_": data["_target_"], **whole, "digest": found})
    return _RESOLVED[known]


def _source(data: Mapping[str, Any], run: Run) -> Any:
    return instantiate({k: v for k, v in data.items() if k != "digest"}, run.trusted, "data")


def _needed(made: Mapping[str, Node]) -> tuple[Node, ...]:
    """The last stage and what it reads, directly or through others, in order."""
    by_key = {node.key: node for node in made.values()}
    wanted, open_ = set(), [list(made.values())[-1]]
    while open_:
        node = open_.pop()
        wanted.add(node.name)
        open_.extend(by_key[key] for key in node.inputs.values())
    return tuple(node for node in made.values() if node.name in wanted)
