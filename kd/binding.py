"""From the views that terms name to the layers that losses are given: parts found, lists made as long, tokens laid out.

A term may name parts that any network has (`student.stages`, `teacher.last`, see `kd.names`). Where one side's list of
stages is longer than the other's, its shallowest are left out: the deepest go together, and the one before with the one
before. A loss that takes any numbers of layers says so (`UNEVEN`). One that compares maps says that it `READS` them, or
features of one kind, `alike`; then tokens are laid on their grid where the other side, or the loss, has maps.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from kd import names
from kd.errors import InputError

Views = str | Sequence[str]
ROLES = ("student", "teacher", "feature")  # that read layers


class Finds(Protocol):
    """What knows where a network's parts are, as `kd.models.outline.Outline` does."""

    def find(self, name: str) -> tuple[str, ...]:
        """The layers that a part stands for."""
        ...


def parts(views: Mapping[str, Views], side: str) -> bool:
    """Whether one of the views is a part of that side's network.

    >>> parts({"student": "student.last", "teacher": "teacher.layer3"}, "teacher")
    False
    """
    named = [view.partition(".") for several in views.values() for view in each(several)]
    return any(place == side and names.part(name) is not None for place, _, name in named)


def resolved(
    views: Mapping[str, Views], outlines: Mapping[str, Finds], stored: Collection[str] = (), uneven: bool = False
) -> dict[str, Views]:
    """The views of one term, with the layers of each part in its place.

    Args:
        views: role to view or list of views.
        outlines: side (`student`, `teacher`) to what knows its network's parts; others stay as they are.
        stored: views of a teacher that is not asked, such as `teacher.embedding:pooled`; a part is looked up there.
        uneven: leave lists of two lengths as they are.

    Raises:
        InputError: if a network has no such part, or it is not stored.

    >>> from kd.models import Outline
    >>> small, large = Outline("A", ("a", "b"), ("a", "b")), Outline("B", ("x", "y", "z"), ("x", "y", "z"))
    >>> resolved({"student": "student.stages", "teacher": "teacher.stages"}, {"student": small, "teacher": large})
    {'student': ['student.a', 'student.b'], 'teacher': ['teacher.y', 'teacher.z']}
    """
    found: dict[str, list[tuple[str, bool]]] = {}  # the views, and whether each is one of a part's several
    single: set[str] = set()
    for role, given in views.items():
        found[role] = [pair for view in each(given) for pair in _layers(view, outlines, stored)]
        if isinstance(given, str) and not any(many for _, many in found[role]):
            single.add(role)
    if not uneven and {"student", "teacher"} <= found.keys() and not single & {"student", "teacher"}:
        for role, other in (("student", "teacher"), ("teacher", "student")):
            _shorten(found[role], len(found[other]))
    return {role: pairs[0][0] if role in single else [view for view, _ in pairs] for role, pairs in found.items()}


def _layers(view: str, outlines: Mapping[str, Finds], stored: Collection[str]) -> list[tuple[str, bool]]:
    side, _, name = view.partition(".")
    part = names.part(name)
    if part is None:
        return [(view, False)]
    if side not in outlines:
        kept = f"{side}.{names.stored(name)}"
        return [(kept if kept in stored else view, False)]
    return [(f"{side}.{path}", part in names.SEVERAL) for path in outlines[side].find(name)]


def _shorten(pairs: list[tuple[str, bool]], count: int) -> None:
    """Leave out the shallowest of a part's several until there are as many."""
    while len(pairs) > count:
        several = [place for place, (_, many) in enumerate(pairs) if many]
        if len(several) < 2:
            return
        del pairs[several[0]]


def laid(views: Mapping[str, Views], shapes: Mapping[str, Sequence[int]], reads: str | None) -> dict[str, Views]:
    """The views of one term with tokens as maps, where its loss or the layer on the other side needs them so.

    Args:
        views: role to view or list of views.
        shapes: of the views, batch first.
        reads: what the loss `READS`: `maps`, features `alike`, or anything (None).

    >>> shapes = {"student.a": (2, 8, 4, 4), "teacher.b": (2, 17, 32)}
    >>> laid({"student": "student.a", "teacher": "teacher.b"}, shapes, "alike")
    {'student': 'student.a', 'teacher': 'teacher.b:maps'}
    """
    if reads is None or not {"student", "teacher"} <= views.keys():
        return dict(views)
    ours, theirs = ([(view, len(shapes.get(view, ())) == 3) for view in each(views[r])] for r in ("student", "teacher"))
    for place, ((first, tokens), (second, others)) in enumerate(zip(ours, theirs, strict=False)):
        alike = tokens == others and (not tokens or tuple(shapes[first][1:2]) == tuple(shapes[second][1:2]))
        vectors = 2 in (len(shapes.get(first, ())), len(shapes.get(second, ())))
        if reads == "alike" and (alike or vectors):
            ours[place], theirs[place] = (first, False), (second, False)
    found: dict[str, Views] = dict(views)
    for role, pairs in (("student", ours), ("teacher", theirs)):
        named = [view + names.MAPS if tokens else view for view, tokens in pairs]
        found[role] = named[0] if isinstance(views[role], str) else named
    return found


def check_counts(term: str, loss: Any, views: Mapping[str, Views]) -> None:
    """Refuse a list where a loss takes one layer, and one layer where it takes a list.

    What it takes is what its `forward` says: `Tensor` is one, `Sequence[Tensor]` a list, anything else either.

    Args:
        term: its name.
        loss: the term's module.
        views: role to view or list of views.

    Raises:
        InputError: in one line.
    """
    try:
        hints = typing.get_type_hints(type(loss).forward)
    except (NameError, TypeError):  # a loss of the user's, whose hints are for the type checker alone
        return
    for role in ROLES:
        if role not in views or role not in hints:
            continue
        given, hint = views[role], hints[role]
        one, several = getattr(hint, "__name__", "") == "Tensor", typing.get_origin(hint) is Sequence
        example = f"{'teacher' if role == 'teacher' else 'student'}"
        if one and not isinstance(given, str):
            raise InputError(
                f"the term {term!r} names {len(given)} layers as its {role} ({', '.join(given)}), and its loss takes "
                f"one; name one, such as {example}.last"
            )
        if several and isinstance(given, str):
            raise InputError(
                f"the term {term!r} names one layer as its {role} ({given}), and its loss takes a list of them; write "
                f"[{given}, …], or {example}.stages"
            )


def described(term: str, views: Mapping[str, Views], shapes: Mapping[str, Sequence[int]]) -> str:
    """The beginning of a message about a term: what it reads, each with its shape for one sample.

    >>> described("at", {"student": "student.a", "teacher": "teacher.b"}, {"student.a": (2, 3), "teacher.b": (2, 4, 4)})
    "the term 'at' reads student.a (3) and teacher.b (4, 4)"
    """
    named = [view for role, several in views.items() if role != "target" for view in each(several)]
    return f"the term {term!r} reads {' and '.join(with_shape(view, shapes) for view in named)}"


def with_shape(view: str, shapes: Mapping[str, Sequence[int]]) -> str:
    """A view's name with the shape of one sample.

    >>> with_shape("student.a", {"student.a": (2, 3, 4, 4)})
    'student.a (3, 4, 4)'
    """
    if view not in shapes or view.startswith("batch."):
        return view
    return f"{view} ({', '.join(str(size) for size in shapes[view][1:])})"


def each(views: Views) -> Sequence[str]:
    """One view, or a list of them, as a list."""
    return [views] if isinstance(views, str) else views


def check_roles(loss: Any, given: Collection[str]) -> None:
    """Refuse a term that does not name what its loss needs, or names what it does not take.

    Args:
        loss: the term's module; one that passes views on (`**others`) to the `loss` it holds needs what that needs.
        given: the roles that the term names: `student`, `teacher`, `target`, `feature`, `row`.

    Raises:
        InputError: in one line.

    >>> from kd.losses.logits import CrossEntropy
    >>> check_roles(CrossEntropy(), ["student"])
    Traceback (most recent call last):
        ...
    kd.errors.InputError: CrossEntropy needs a target, and its term names none; add target: batch.target
    """
    try:
        parameters = inspect.signature(loss.forward).parameters.values()
    except (TypeError, ValueError):  # a loss of the user's, in another language
        return
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in parameters if p.name in named and p.default is p.empty]
    open_ = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for role in needed:
        if role not in given:
            example = f"batch.{role}" if role in ("target", "row") else f"{role.replace('feature', 'student')}.logits"
            raise InputError(f"{type(loss).__name__} needs a {role}, and its term names none; add {role}: {example}")
    foreign = [role for role in given if role not in named]
    if foreign and not open_ and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise InputError(
            f"{type(loss).__name__} takes {', '.join(named)}, and its term names a {foreign[0]} too; leave it out"
        )
    inner: Any = getattr(loss, "loss", None)
    if open_ and hasattr(inner, "forward"):
        wanted = inspect.signature(inner.forward).parameters
        passing = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
        check_roles(inner, [role for role in given if passing or role in wanted])


def tried(what: Callable[[], Any], said: str) -> Any:
    """What a function gives; whatever it raises is an `InputError` of one line that begins with `said`.

    Raises:
        InputError: if it raises.
    """
    try:
        return what()
    except InputError as error:
        raise InputError(f"{said}: {error}") from error
    except Exception as error:  # a loss of anybody's raises as it likes; the user needs one line
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{said}: its loss cannot be computed ({type(error).__name__}: {line})") from error
