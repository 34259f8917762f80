"""What the inputs of a stage are called: a `teacher` and its `labels`, or several, `teacher1` and `labels1` and so on.

Planning reads these without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_NUMBERED = re.compile(r"(teacher|labels)([1-9]\d*)")


def teachers(inputs: Iterable[str]) -> list[str]:
    """The roles of the teachers among a stage's inputs, in order.

    >>> teachers(["teacher2", "labels1", "teacher1"]), teachers(["teacher", "labels"]), teachers([])
    (['teacher1', 'teacher2'], ['teacher'], [])
    """
    found = {int(m[2]): role for role in inputs if (m := _NUMBERED.fullmatch(role)) and m[1] == "teacher"}
    several = [found[number] for number in sorted(found)]
    return several or [role for role in ("teacher",) if role in inputs]


def labels_of(teacher: str) -> str:
    """The role of a teacher's stored soft labels.

    >>> labels_of("teacher"), labels_of("teacher2")
    ('labels', 'labels2')
    """
    return "labels" + teacher.removeprefix("teacher")


def plain(role: str) -> str:
    """A role without its number.

    >>> plain("teacher2"), plain("labels1"), plain("student1")
    ('teacher', 'labels', 'student1')
    """
    return _NUMBERED.sub(r"\1", role)


def is_teacher(side: str) -> bool:
    """Whether the first part of a view's name, or a role, is a teacher's.

    >>> is_teacher("teacher"), is_teacher("teacher12"), is_teacher("student"), is_teacher("labels1")
    (True, True, False, False)
    """
    return plain(side) == "teacher"


def by_role(given: Any) -> dict[str, Any]:
    """One teacher, several by role, or none, as a mapping by role.

    >>> by_role(None), by_role("net"), by_role({"teacher1": "net"})
    ({}, {'teacher': 'net'}, {'teacher1': 'net'})
    """
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else {"teacher": given}
