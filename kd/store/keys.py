"""Canonical JSON and the key made of it: what a stage's artifact is called.

A key is the sha256 of a document ``{schema, stage, version, config, inputs}``. Two documents that mean the same have
the same text: keys are sorted, 8, 8.0 and 8e0 are one number, tuples are lists. What has no single meaning is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from kd.errors import InputError

SCHEMA = 1
SHOWN = 16
_PREFIX = b"kd-key-v1\0"
_INTERPOLATION = re.compile(r"\$\{")


def plain(data: Any, where: str = "") -> Any:
    """``data`` in its one canonical form: dicts, lists, strings, numbers, booleans and None only.

    Raises:
        InputError: for ``???``, a left-over ``${}``, a non-finite number, a key that is not a string, any other type.

    >>> plain({"b": (1, 2.0), "a": -0.0})
    {'b': [1, 2], 'a': 0}
    """
    if data is None or isinstance(data, bool):
        return data
    if isinstance(data, int):
        return int(data)
    if isinstance(data, float):
        if not math.isfinite(data):
            raise InputError(f"{where or 'a value'} is {data}: only finite numbers have a key; give a finite number")
        return int(data) if data.is_integer() and abs(data) < 2**53 else float(data)
    if isinstance(data, str):
        if data == "???":
            raise InputError(f"{where or 'a value'} is not set (???): give it a value, e.g. {where or 'name'}=…")
        if _INTERPOLATION.search(data):
            raise InputError(f"{where or 'a value'} still holds the interpolation {data!r}; write the value out")
        return str(data)
    if isinstance(data, Mapping):
        for key in data:
            if not isinstance(key, str):
                raise InputError(f"{where or 'the config'} has the key {key!r}, which is no string; quote it")
        return {key: plain(value, f"{where}.{key}" if where else key) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value, f"{where}[{i}]") for i, value in enumerate(data)]
    raise InputError(f"{where or 'a value'} is a {type(data).__name__}; a config holds plain data only")


def canonical(data: Any) -> str:
    """The one text of plain data.

    >>> canonical({"b": 8e0, "a": [True, None]})
    '{"a":[true,null],"b":8}'
    """
    return json.dumps(plain(data), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(document: Mapping[str, Any]) -> str:
    """The key of a document: 64 hexadecimal digits, of which 16 are shown.

    >>> digest({"a": 8}) == digest({"a": 8.0})
    True
    """
    return hashlib.sha256(_PREFIX + canonical(document).encode()).hexdigest()


def without_neutral(config: Mapping[str, Any], since: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` less the fields that hold their frozen neutral value, so that a new knob moves no old key.

    ``since`` maps a dotted path to the value that means "as before the knob existed"; it never follows a default.

    >>> without_neutral({"fit": {"epochs": 3, "ema": None}}, {"fit.ema": None})
    {'fit': {'epochs': 3}}
    """
    result = dict(config)
    for path, neutral in since.items():
        *parents, last = path.split(".")
        result = _drop(result, parents, last, canonical(neutral))
    return result


def with_neutral(config: Mapping[str, Any], since: Mapping[str, Any]) -> dict[str, Any]:
    """`without_neutral` undone: a field that a document leaves out has its frozen neutral value, not today's default.

    >>> with_neutral({"fit": {"epochs": 3}}, {"fit.ema": None})
    {'fit': {'epochs': 3, 'ema': None}}
    """
    result = dict(config)
    for path, neutral in since.items():
        *parents, last = path.split(".")
        result = _fill(result, parents, last, neutral)
    return result


def _fill(node: dict[str, Any], parents: list[str], last: str, neutral: Any) -> dict[str, Any]:
    if parents:
        child = node.get(parents[0])
        if not isinstance(child, Mapping):
            return node
        return {**node, parents[0]: _fill(dict(child), parents[1:], last, neutral)}
    return node if last in node else {**node, last: neutral}


def _drop(node: dict[str, Any], parents: list[str], last: str, neutral: str) -> dict[str, Any]:
    if parents:
        child = node.get(parents[0])
        if not isinstance(child, Mapping):
            return node
        return {**node, parents[0]: _drop(dict(child), parents[1:], last, neutral)}
    if last in node and canonical(node[last]) == neutral:
        return {key: value for key, value in node.items() if key != last}
    return node


def document(
    stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str], since: Mapping[str, Any]
) -> dict[str, Any]:
    """What a stage's key is made of: the stage, its version, its whole config and the keys of its inputs."""
    body = without_neutral(plain(config), since)
    return {"schema": SCHEMA, "stage": stage, "version": version, "config": body, "inputs": dict(inputs)}


def short(key: str) -> str:
    """The part of a key that people read.

    >>> short("0123456789abcdef0123")
    '0123456789abcdef'
    """
    return key[:SHOWN]
