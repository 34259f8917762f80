"""How the terms of a stage hear several teachers: each term that names `teacher` is written out for those there are.

A stage of a pipeline with inputs `teacher1`, `teacher2`, … may hold a `mix` beside its fields: the config of a term
whose `loss` takes another loss into it (`kd.losses.ensemble`). Then a term that reads `teacher.logits` reads
`[teacher1.logits, teacher2.logits]` through that, and takes over what else the mix names (its target, a feature). A
term that reads anything else of `teacher`, or reads it under an interchange, becomes a term for each of them, with its
share of the weight. Terms that name `teacher1` or `teacher2` themselves stay as they are. In a stage with `peers` the
teachers of each network are those that it hears. Where there is one teacher, it is `teacher`, whatever the mix: a chain
of one hop has the keys of a plain distillation.

`weighting` beside a stage's fields is `fixed`, or `uncertainty`: then each term that weighs anything has a learned
log-variance (`kd.balance`), and where there is a term for each teacher, each of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.errors import InputError
from kd.roles import plain, teachers
from kd.schedules import scaled, weighs
from kd.training.settings import one_of

LOGITS = "teacher.logits"
WEIGHTINGS = ("fixed", "uncertainty")


def heard(stage: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A stage without its `mix` and `weighting`, its terms written out for the teachers among its inputs.

    Args:
        stage: plain data; one without a `mix` is left as it is.
        where: what messages call it.

    Raises:
        InputError: if the mix is none, or a term names `teacher` and one of several.

    >>> kd = {"weight": 1, "student": "student.logits", "teacher": "teacher.logits", "loss": {"_target_": "KL"}}
    >>> mix = {"loss": {"_target_": "Mean"}}
    >>> inputs = {"teacher1": "a", "teacher2": "b"}
    >>> heard({"inputs": inputs, "mix": mix, "objective": {"kd": kd}}, "student")["objective"]["kd"]["teacher"]
    ['teacher1.logits', 'teacher2.logits']
    >>> heard({"inputs": {"teacher1": "a"}, "mix": mix, "objective": {"kd": kd}}, "student")["inputs"]
    {'teacher': 'a'}
    """
    bare = {name: value for name, value in stage.items() if name != "weighting"}
    found = _mixed(bare, where)
    if "weighting" in stage:
        one_of("objective.weights", stage["weighting"], WEIGHTINGS)
        if stage["weighting"] == "uncertainty":
            found |= {name: _balanced(found[name]) for name in ("objective", "back", "terms") if found.get(name)}
    return found


def _balanced(terms: Any) -> Any:
    """Terms with a learned log-variance each, but for those that never weigh anything."""

    def one(term: Any) -> Any:
        known = isinstance(term, Mapping) and weighs(term.get("weight", 1))
        return {"log_variance": 0.0, **term} if known else term

    return {name: one(term) for name, term in terms.items()} if isinstance(terms, Mapping) else terms


def _mixed(stage: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A stage without its `mix`."""
    if "mix" not in stage:
        return dict(stage)
    mix, found = stage["mix"], {name: value for name, value in stage.items() if name != "mix"}
    inputs = dict(stage.get("inputs") or {})
    if "peers" in stage:
        several = [f"teacher{number}" for number in range(1, _company(stage, inputs) + 1)]
        if len(several) < 2:
            return found
        own = {name: _spread(stage.get(name), mix, several, where) for name in ("objective", "back")}
        return {**found, **own}
    roles = teachers(inputs)
    if len(roles) < 2:
        found["inputs"] = {plain(role): source for role, source in inputs.items()}
        return found
    return {**found, "objective": _spread(stage.get("objective"), mix, roles, where)}


def _company(stage: Mapping[str, Any], inputs: Mapping[str, Any]) -> int:
    """How many networks each member of a circle hears."""
    peers = stage["peers"]
    count = len(peers) if isinstance(peers, list) and peers else stage.get("copies")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        return 0  # the stage itself refuses it
    return count + ("teacher" in inputs) + (stage.get("hears") == "all")


def _spread(objective: Any, mix: Any, roles: list[str], where: str) -> dict[str, Any]:
    """The terms of an objective written out for several teachers."""
    if not isinstance(mix, Mapping) or not isinstance(mix.get("loss"), Mapping) or "_target_" not in mix["loss"]:
        raise InputError(f"{where}.mix={mix!r} is no mix of teachers; choose one, e.g. mix=mean_probabilities")
    terms: dict[str, Any] = {}
    for name, term in dict(objective or {}).items():
        for written, one in _written(name, term, mix, roles, where).items():
            if written in terms:
                raise InputError(f"{where}: two terms are called {written!r}; give one of them another name")
            terms[written] = one
    return terms


def _written(name: str, term: Any, mix: Mapping[str, Any], roles: list[str], where: str) -> dict[str, Any]:
    """A term as one that hears all teachers, or as one for each."""
    if not isinstance(term, Mapping) or not term.get("teacher"):
        return {name: term}
    views = term["teacher"] if isinstance(term["teacher"], list) else [term["teacher"]]
    alone = [str(view).startswith("teacher.") for view in views]
    if not any(alone):
        return {name: term}
    if not all(alone):
        read = ", ".join(map(str, views))
        raise InputError(f"{where}: the term {name} reads {read}; name `teacher` alone, or each by its number")
    if term["teacher"] == LOGITS and not term.get("under"):
        more = {role: view for role, view in mix.items() if role != "loss" and view is not None and not term.get(role)}
        listed = [f"{role}.logits" for role in roles]
        return {name: {**term, **more, "teacher": listed, "loss": {**mix["loss"], "loss": term["loss"]}}}
    found = {}
    for role in roles:
        own = [str(view).replace("teacher.", f"{role}.", 1) for view in views]
        theirs = own if isinstance(term["teacher"], list) else own[0]
        found[f"{name}_{role}"] = {**term, "teacher": theirs, "weight": scaled(term["weight"], 1 / len(roles))}
        if term.get("under"):
            found[f"{name}_{role}"]["under"] = _renamed(term["under"], role)
    return found


def _renamed(under: Mapping[str, Any], role: str) -> dict[str, Any]:
    """An interchange with one of several teachers."""
    views = under["teacher"] if isinstance(under["teacher"], list) else [under["teacher"]]
    own = [str(view).replace("teacher.", f"{role}.", 1) for view in views]
    return {**under, "teacher": own if isinstance(under["teacher"], list) else own[0]}
