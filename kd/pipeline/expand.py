"""A pipeline's stages with its templates written out: one stage, or a few, for each item of a list.

A template stands among a pipeline's stages under its own name:

    assistant:
      for_each: ${assistants}        # a list, or a mapping of names to items, less those that are null; or a number
      item: ${teacher}               # of each, where for_each is a number
      start: teacher                 # what stands before the first item
      end: net                       # of several stages: the one that stands for the item, and has its name alone
      stages:                        # or `stage`, for one an item
        net: {_target_: kd.stages.Distil, inputs: {teacher: "@before", labels: "@before_labels"}, student: "@model"}
        labels: {_target_: kd.stages.SoftLabels, inputs: {teacher: "@previous"}}

Each string that is a token as a whole is replaced: `@item` by the item, `@model` by the item as a model (a name alone
is one), `@index` by 1, 2, …, `@name` by the item's name, `@before` by what stands for the item before (or `start`),
`@previous` by the stage before, `@before_labels` by the stage of that name beside `@before`. A mapping with
`_from_: token` gives the token's mapping with the other entries laid over it; of several, each over those before.
`{_sum_: [${seed}, "@index"]}` is the sum of whole numbers, so that each item may have a seed of its own. An item
`{name: …, with: {seed: 1}}` lays fields over the stage that stands for it.

Among inputs a role that ends in `*` takes several, as `teacher1`, `teacher2`, …: `"teacher*": "@earlier"` names what
stands for the items before, `start` first, and `"labels*": "@earlier_labels"` the stages beside these; in any later
stage `"teacher*": [teacher, "assistant*"]` and `"labels*": [teacher_labels, "assistant*_labels"]`. A later stage that
names the template itself as an input gets what stands for its last item, or `start` where its list is empty;
`assistant_labels` is the stage beside that.

A template with `choices` is a chain of steps by name: see `kd.pipeline.steps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.errors import InputError, offer
from kd.pipeline.steps import steps
from kd.stages.building import model_of

FIELDS = ("for_each", "item", "start", "end", "stage", "stages")
TOKENS = ("@item", "@model", "@index", "@name", "@before", "@previous", "@earlier")


@dataclass(frozen=True)
class _Made:
    """What a template has made: what stood before it, and what stands for each item."""

    start: str | None
    ends: list[str]

    @property
    def last(self) -> str | None:
        return self.ends[-1] if self.ends else self.start


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
    known: dict[str, _Made] = {}
    for name, stage in stages.items():
        here = f"{where}.{name}"
        if not (isinstance(stage, Mapping) and "for_each" in stage):
            _add(made, name, _linked(stage, known, made, here), where)
            continue
        start = stage.get("start")
        start = known[start].last if isinstance(start, str) and start in known else start
        known[name] = _Made(start, [])
        if "choices" in stage:
            for full, one in steps({**stage, "start": start}, made, here):
                _add(made, full, one, where)
                known[name].ends.append(full)
            continue
        _check(stage, here)
        many = stage.get("stages") or {"": stage["stage"]}
        for index, (label, item) in enumerate(_items(stage["for_each"], name, stage.get("item")), 1):
            own, over = _parted(item)
            last = None
            for suffix, template in many.items():
                full = f"{label}_{suffix}" if suffix and suffix != stage.get("end") else label
                tokens = {
                    "@item": own,
                    "@model": model_of(own),
                    "@index": index,
                    "@name": label,
                    "@before": known[name].last,
                    "@previous": last or known[name].last,
                }
                written = _written(template, tokens, here)
                if over and suffix == stage.get("end", list(many)[-1]):
                    written = _laid(written, over)
                _add(made, full, _linked(written, known, made, here, known[name]), where)
                last = full
            known[name].ends.append(label if "end" in stage else str(last))
    return made


def _items(node: Any, name: str, each: Any) -> list[tuple[str, Any]]:
    """Each item with the name of its stage; a null is none."""
    if isinstance(node, int):
        return [(f"{name}{index}", each) for index in range(1, node + 1)]
    if isinstance(node, Mapping):
        return [(str(key), value) for key, value in node.items() if value is not None]
    return [(f"{name}{index}", value) for index, value in enumerate((v for v in node if v is not None), 1)]


def _parted(item: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """An item, and what it lays over its stage."""
    if not (isinstance(item, Mapping) and isinstance(item.get("with"), Mapping)):
        return item, None
    return {key: value for key, value in item.items() if key != "with"}, item["with"]


def _laid(base: Any, over: Any) -> Any:
    """A mapping with another's entries in it, mappings among them again."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)) or "_target_" in over:
        return over
    return {**base, **{key: _laid(base.get(key), value) for key, value in over.items()}}


def _check(stage: Mapping[str, Any], where: str) -> None:
    for key in stage:
        if key not in FIELDS:
            raise InputError(f"{where}.{key} is no field of a template{offer(str(key), FIELDS)}")
    each = stage["for_each"]
    if type(each) is int and each >= 0 and "item" in stage:
        pass
    elif isinstance(each, str) or not isinstance(each, Sequence | Mapping):
        raise InputError(f"{where}.for_each={each!r} is no list; write one, e.g. [resnet34,resnet18]")
    one, many = stage.get("stage"), stage.get("stages")
    if "end" in stage and not (isinstance(many, Mapping) and stage["end"] in many):
        raise InputError(f"{where}.end={stage['end']!r} is none of its stages{offer(str(stage['end']), many or ())}")
    if isinstance(one, Mapping) == isinstance(many, Mapping):
        raise InputError(f"{where} must hold `stage` (one for each item) or `stages` (several by name), and not both")


def _add(made: dict[str, Any], name: str, stage: Any, where: str) -> None:
    if name in made:
        raise InputError(f"{where}.{name} would be made twice; rename the template or the stage")
    made[name] = stage


def _written(node: Any, tokens: Mapping[str, Any], where: str) -> Any:
    """A copy with each token replaced."""
    if isinstance(node, Mapping) and list(node) == ["_sum_"]:
        numbers = _written(node["_sum_"], tokens, where)
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise InputError(f"{where}: _sum_ adds up whole numbers, and is given {numbers!r}")
        return sum(numbers)
    if isinstance(node, Mapping):
        laid = {key: _written(value, tokens, where) for key, value in node.items() if key != "_from_"}
        if "_from_" not in node:
            return laid
        bases = _written(node["_from_"], tokens, where)
        whole: dict[str, Any] = {}
        for base in bases if isinstance(bases, list) else [bases]:
            if not isinstance(base, Mapping):
                raise InputError(f"{where}: _from_ gives {base!r}, which is no mapping to start from")
            whole |= base
        return {**whole, **laid}
    if isinstance(node, list):
        return [_written(value, tokens, where) for value in node]
    if isinstance(node, str) and node in tokens:
        if node == "@model" and tokens[node] is None:
            raise InputError(f"{where}: {tokens['@item']!r} is no model; give a name, or a mapping such as {{name: …}}")
        if tokens[node] is None:
            raise InputError(f"{where}: {node} names nothing at the first item; give the template a start")
        return tokens[node]
    if isinstance(node, str) and node.startswith("@"):
        token, _, suffix = node.partition("_")
        if token == "@before" and suffix:
            return f"{_written(token, tokens, where)}_{suffix}"
        if token != "@earlier":
            raise InputError(f"{where}: {node} is no token{offer(node, TOKENS)}")
    return node


def _linked(
    stage: Any, known: Mapping[str, _Made], made: Mapping[str, Any], where: str, own: _Made | None = None
) -> Any:
    """The stage with its inputs named one by one."""
    inputs = stage.get("inputs") if isinstance(stage, Mapping) else None
    if not isinstance(inputs, Mapping):
        return stage
    found: dict[str, Any] = {}
    for role, source in inputs.items():
        if not str(role).endswith("*"):
            found[role] = _one(source, known, made, f"{where}.inputs.{role}")
            continue
        names: list[Any] = []
        for entry in source if isinstance(source, list) else [source]:
            names += _several(entry, known, own, f"{where}.inputs.{role}", isinstance(source, list))
        if not names:
            raise InputError(
                f"{where}.inputs.{role}={source!r} names no stage: its list is empty; name a model or more"
            )
        found |= {f"{role[:-1]}{index}": name for index, name in enumerate(names, 1)}
    return {**stage, "inputs": found}


def _one(source: Any, known: Mapping[str, _Made], made: Mapping[str, Any], where: str) -> Any:
    """A stage's name as it is, or what a template's stands for: its last item, or the stage beside that."""
    name, _, suffix = (source, "", "") if source in known else str(source).rpartition("_")
    if source in made or name not in known:
        return source
    last = known[name].last
    if last is None:
        raise InputError(f"{where}={source!r} made no stage: its list is empty")
    return f"{last}_{suffix}" if suffix else last


def _several(entry: Any, known: Mapping[str, _Made], own: _Made | None, where: str, listed: bool) -> list[Any]:
    """The names that one entry of several inputs stands for."""
    text = str(entry)
    token, _, suffix = text.partition("_")
    ends: list[str] | None = None
    if token == "@earlier" and own is not None:
        ends = [*([own.start] if own.start else []), *own.ends]
    else:
        template, star, rest = text.partition("*")
        if star and template in known and (not rest or rest.startswith("_")):
            ends, suffix = known[template].ends, rest[1:]
    if ends is not None:
        return [f"{name}_{suffix}" if suffix else name for name in ends]
    if not listed or not isinstance(entry, str) or "*" in entry or entry.startswith("@"):
        raise InputError(
            f"{where}={entry!r}: several inputs are a list of stages, 'TEMPLATE*', or inside a template '@earlier'"
        )
    return [entry]
