"""A chain of steps by name: what a list such as `[prune, lowrank]` means among a pipeline's stages.

A chain stands among the stages under its own name:

    compress:
      for_each: ${compress}                 # names of choices, in order; one may come again
      start: student                        # the stage that the first step works on
      choices: {prune: ${prune}, lowrank: ${lowrank}, recover: ${recover}}
      after: recover                        # the choice that follows each step with `recover: true`

A choice holds a stage's fields and, beside them, what is the chain's own: `recover`, whether a recovery follows it;
`teacher`, the stage that it hears (with the soft labels of that stage, if there are some); `terms`, which stand in for
its `objective` if there are some. An item may be `{prune: {amount: 0.3}}`, which lays fields over the choice's. A stage
with a `schedule` may make several of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kd.errors import InputError, offer
from kd.instantiate import resolve

FIELDS = ("for_each", "start", "choices", "after")
OWN = ("recover", "teacher", "terms")


def steps(chain: Mapping[str, Any], made: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The chain's stages in order, each with its name; a step that comes again is called `prune2`.

    Args:
        chain: plain data with all references followed.
        made: the stages before it.
        where: what messages call it.

    Raises:
        InputError: at a step that is none, or a chain without a start.

    >>> choices = {"prune": {"_target_": "A", "recover": True}, "recover": {"_target_": "B", "teacher": "t"}}
    >>> chain = {"for_each": ["prune"], "start": "t", "choices": choices, "after": "recover"}
    >>> for name, stage in steps(chain, {"t": {}}, "compress"):
    ...     print(name, stage)
    prune {'_target_': 'A', 'inputs': {'model': 't'}}
    prune_recover {'_target_': 'B', 'inputs': {'model': 'prune', 'teacher': 't'}}
    """
    for key in chain:
        if key not in FIELDS:
            raise InputError(f"{where}.{key} is no field of a chain of steps{offer(str(key), FIELDS)}")
    choices, after = chain["choices"], chain.get("after")
    before = chain.get("start")
    if before not in made:
        raise InputError(f"{where}.start={before!r} is no stage before it{offer(str(before), made)}")
    if not isinstance(chain["for_each"], list):
        raise InputError(f"{where}.for_each={chain['for_each']!r} is no list of steps, e.g. [prune,lowrank]")
    count: dict[str, int] = {}
    for item in chain["for_each"]:
        name, settings = _step(item, choices, where)
        for one in _schedule(settings):
            count[name] = count.get(name, 0) + 1
            full = name if count[name] == 1 else f"{name}{count[name]}"
            yield full, _stage(one, before, made, f"{where}.choices.{name}")
            before = full
            if one.get("recover") and after is not None and _trains(choices[after]):
                yield f"{full}_{after}", _stage(choices[after], before, made, f"{where}.choices.{after}")
                before = f"{full}_{after}"


def _step(item: Any, choices: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """A step's name and its settings."""
    over: Any = {}
    if isinstance(item, Mapping) and len(item) == 1:
        ((item, over),) = item.items()
    if item not in choices or not isinstance(over, Mapping):
        raise InputError(f"{where}: {item!r} is no step{offer(str(item), choices)}")
    for key in over:
        if key not in choices[item]:
            raise InputError(f"{where}: {item} has no field {key!r}{offer(str(key), choices[item])}")
    return str(item), {**choices[item], **over}


def _schedule(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    target = settings.get("_target_")
    kind: Any = resolve(target) if str(target).startswith("kd.stages.") else None
    return list(kind.schedule(settings)) if hasattr(kind, "schedule") else [dict(settings)]


def _trains(settings: Mapping[str, Any]) -> bool:
    """Whether there is anything to train: at 0 epochs a recovery is left out."""
    fit = settings.get("fit")
    return not (isinstance(fit, Mapping) and fit.get("epochs") == 0)


def _stage(settings: Mapping[str, Any], before: Any, made: Mapping[str, Any], where: str) -> dict[str, Any]:
    inputs = {"model": before}
    if (teacher := settings.get("teacher")) is not None:
        if teacher not in made:
            raise InputError(f"{where}.teacher={teacher!r} is no stage before it{offer(str(teacher), made)}")
        inputs["teacher"] = teacher
        labels = [n for n, s in made.items() if s.get("_target_") == "kd.stages.SoftLabels"]
        heard = [name for name in labels if made[name].get("inputs") == {"teacher": teacher}]
        inputs |= {"labels": heard[0]} if heard else {}
    stage = {name: value for name, value in settings.items() if name not in OWN}
    if settings.get("terms"):
        stage["objective"] = settings["terms"]
    return {**stage, "inputs": inputs}
