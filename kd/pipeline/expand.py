"""A pipeline's stages with its templates written out: one stage, or a few, for each item of a list.

A template stands among a pipeline's stages under its own name:

    assistant:
      for_each: ${assistants}        # a list, or a mapping of names to items
      start: teacher                 # what stands before the first item
      stage:                         # or `stages`, a mapping of names, for several an item
        _target_: kd.stages.Distil
        inputs: {teacher: "@previous"}
        student: "@model"

Each string that is a token as a whole is replaced: `@item` by the item, `@model` by the item as a model (a name alone
is one), `@index` by 1, 2, …, `@name` by the item's name, `@previous` by the stage before (that of the item before, or
`start`). A mapping with `_from_: token` gives the token's mapping with the other entries laid over it. Among inputs
a role that ends in `*` takes several: `"teacher*": "@earlier"` names all that stand before in the template, `start`
first, as `teacher1`, `teacher2`, …; `"teacher*": "assistant*"`, in any later stage, all that the template made. A later
stage that names the template itself as an input gets its last stage; of an empty list, `start`.

A template with `choices` is a chain of steps by name: see `kd.pipeline.steps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd.errors import InputError, offer
from kd.pipeline.steps import steps

MODEL = {"_target_": "kd.models.create", "name": "", "pretrained": False, "stages": None, "options": {}}
FIELDS = ("for_each", "start", "stage", "stages")
TOKENS = ("@item", "@model", "@index", "@name", "@previous", "@earlier")


def expand(stages: Mapping[str, Any], where: str = "pipeline.stages") -> dict[str, Any]:
    """The stages in order, none of them a template.

    Args:
        stages: plain data with all references followed.
        where: what messages call it.

    Raises:
        InputError: at a template that is none, a name made twice, or a token that says nothing here.

    >>> several = {"first": {"_target_": "A"}, "more": {"for_each": ["x", "y"], "start": "first", "stage": {
    ...     "_target_": "B", "inputs": {"from": "@previous"}, "word": "@item"}}, "last": {"inputs": {"from": "more"}}}
    >>> for name, stage in expand(several).items():
    ...     print(name, stage)
    first {'_target_': 'A'}
    more1 {'_target_': 'B', 'inputs': {'from': 'first'}, 'word': 'x'}
    more2 {'_target_': 'B', 'inputs': {'from': 'more1'}, 'word': 'y'}
    last {'inputs': {'from': 'more2'}}
    """
    made: dict[str, Any] = {}
    own: list[str]
    known: dict[str, tuple[str | None, list[str]]] = {}  # template: its last stage, and all of them
    for name, stage in stages.items():
        if not (isinstance(stage, Mapping) and "for_each" in stage):
            _add(made, name, _linked(stage, known, f"{where}.{name}"), where)
            continue
        if "choices" in stage:
            start = str(stage.get("start"))
            start = known[start][0] or start if start in known else start
            own = []
            for full, one in steps({**stage, "start": start}, made, f"{where}.{name}"):
                _add(made, full, one, where)
                own.append(full)
            known[name] = (own[-1] if own else start, own)
            continue
        _check(stage, f"{where}.{name}")
        first = stage.get("start")
        if isinstance(first, str) and first in known:
            first = known[first][0]
        own = []
        ends = [first] if first else []
        for index, (label, item) in enumerate(_items(stage["for_each"], name), 1):
            many = stage.get("stages") or {"": stage["stage"]}
            last = None
            for suffix, template in many.items():
                full = f"{label}_{suffix}" if suffix else label
                before = last or (ends[-1] if ends else None)
                tokens = {
                    "@item": item,
                    "@model": _model(item),
                    "@index": index,
                    "@name": label,
                    "@previous": before,
                }
                written = _written(template, tokens, f"{where}.{name}")
                _add(made, full, _linked(written, known, f"{where}.{name}", ends), where)
                own.append(full)
                last = full
            ends.append(str(last))
        known[name] = (ends[-1] if ends else None, own)
    return made


def _items(node: Any, name: str) -> list[tuple[str, Any]]:
    """Each item with the name of its stage."""
    if isinstance(node, Mapping):
        return [(str(key), value) for key, value in node.items()]
    return [(f"{name}{index}", value) for index, value in enumerate(node, 1)]


def _model(item: Any) -> Any:
    if isinstance(item, str):
        return {**MODEL, "name": item}
    return {**MODEL, **item} if isinstance(item, Mapping) else None


def _check(stage: Mapping[str, Any], where: str) -> None:
    for key in stage:
        if key not in FIELDS:
            raise InputError(f"{where}.{key} is no field of a template{offer(str(key), FIELDS)}")
    if isinstance(stage["for_each"], str) or not isinstance(stage["for_each"], Sequence | Mapping):
        raise InputError(f"{where}.for_each={stage['for_each']!r} is no list; write one, e.g. [resnet34,resnet18]")
    one, many = stage.get("stage"), stage.get("stages")
    if isinstance(one, Mapping) == isinstance(many, Mapping):
        raise InputError(f"{where} must hold `stage` (one for each item) or `stages` (several by name), and not both")


def _add(made: dict[str, Any], name: str, stage: Any, where: str) -> None:
    if name in made:
        raise InputError(f"{where}.{name} would be made twice; rename the template or the stage")
    made[name] = stage


def _written(node: Any, tokens: Mapping[str, Any], where: str) -> Any:
    """A copy with each token replaced."""
    if isinstance(node, Mapping):
        laid = {key: _written(value, tokens, where) for key, value in node.items() if key != "_from_"}
        if "_from_" not in node:
            return laid
        base = _written(node["_from_"], tokens, where)
        if not isinstance(base, Mapping):
            raise InputError(f"{where}: _from_ gives {base!r}, which is no mapping to start from")
        return {**base, **laid}
    if isinstance(node, list):
        return [_written(value, tokens, where) for value in node]
    if isinstance(node, str) and node in tokens:
        if node == "@model" and tokens[node] is None:
            raise InputError(f"{where}: {tokens['@item']!r} is no model; give a name, or a mapping such as {{name: …}}")
        if tokens[node] is None:
            raise InputError(f"{where}: {node} names nothing at the first item; give the template a start")
        return tokens[node]
    if isinstance(node, str) and node.startswith("@") and node not in TOKENS:
        raise InputError(f"{where}: {node} is no token{offer(node, TOKENS)}")
    return node


def _linked(
    stage: Any, known: Mapping[str, tuple[str | None, list[str]]], where: str, earlier: Sequence[str] | None = None
) -> Any:
    """The stage with its inputs named one by one."""
    inputs = stage.get("inputs") if isinstance(stage, Mapping) else None
    if not isinstance(inputs, Mapping):
        return stage
    found: dict[str, Any] = {}
    for role, source in inputs.items():
        if not str(role).endswith("*"):
            if source in known:
                last = known[source][0]
                if last is None:
                    raise InputError(f"{where}.inputs.{role}={source!r} made no stage: its list is empty")
                source = last
            found[role] = source
            continue
        if source == "@earlier" and earlier is not None:
            names = list(earlier)
        elif isinstance(source, str) and source.removesuffix("*") in known and source.endswith("*"):
            names = known[source.removesuffix("*")][1]
        elif isinstance(source, list):
            names = source
        else:
            raise InputError(
                f"{where}.inputs.{role}={source!r}: several inputs are a list of stages, 'TEMPLATE*', or inside a "
                "template '@earlier'"
            )
        found |= {f"{role[:-1]}{index}": name for index, name in enumerate(names, 1)}
    return {**stage, "inputs": found}
