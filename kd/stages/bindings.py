"""What a training's terms are bound to: the parts they name, and a line for each pair of layers and what bridges it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kd import names
from kd.binding import ROLES, each, with_shape
from kd.errors import InputError
from kd.schedules import weighs
from kd.stages.base import Config

if TYPE_CHECKING:
    import torch

    from kd.models import Normalised
    from kd.objective import Objective

Shapes = Mapping[str, Sequence[int]]


def views_of(objective: Mapping[str, Any], side: str) -> list[str]:
    """The names after `side.` that terms of a weight above 0 read, as a config has them.

    >>> views_of({"at": {"weight": 1, "student": "student.stages", "teacher": ["teacher.a", "teacher.b"]}}, "teacher")
    ['a', 'b']
    """
    found = []
    for term in objective.values():
        if not isinstance(term, Mapping) or not weighs(term.get("weight", 1)):
            continue
        under = term.get("under") or {}
        for views in (*(term.get(role) or [] for role in ROLES), *(under.get(role) or [] for role in ROLES)):
            for view in [views] if isinstance(views, str) else views:
                place, _, name = str(view).partition(".")
                if place == side:
                    found.append(name)
    return found


def reads_stages(wanted: Sequence[str]) -> bool:
    """Whether one of the names is found by means of a network's stages, so that it matters which these are.

    >>> reads_stages(["logits", "layer3", "embedding"]), reads_stages(["last:pooled"])
    (False, True)
    """
    return any(names.part(name) not in (None, "embedding") for name in wanted)


def bind(
    objective: Objective,
    student: Normalised,
    teacher: Normalised | None,
    data: Config,
    stored: Mapping[str, torch.Tensor] | None = None,
    samples: int = 2,
    teacher_stages: Sequence[str] | None = None,
    rehearse: bool = False,
) -> list[str]:
    """Bind the terms of a student under one teacher, or under none: see `bind_sides`.

    Args:
        objective: its parts get their layers, its losses what they train.
        student: as it is built.
        teacher: as it is built or loaded; None where there is none, or what it says is stored.
        data: for the shape of an image.
        stored: what is kept of the teacher's outputs on two samples, where no teacher is asked.
        samples: how many the split has, for a loss that remembers each.
        teacher_stages: layers of the teacher that are its stages; those of the student are known to itself.
        rehearse: whether to compute each term once too.

    Raises:
        InputError: if a layer is not there, or shapes cannot be bridged.
    """
    nets = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    return bind_sides(objective, nets, data, stored, samples, {"teacher": teacher_stages}, rehearse)


def bind_sides(
    objective: Objective,
    nets: Mapping[str, Normalised],
    data: Config,
    stored: Mapping[str, torch.Tensor] | None = None,
    samples: int = 2,
    chosen: Mapping[str, Sequence[str] | None] | None = None,
    rehearse: bool = False,
    lenders: Mapping[str, Normalised] | None = None,
) -> list[str]:
    """Give the terms the layers that their parts stand for, and the shapes of what they compare.

    One blank batch goes through each network, in eval mode. What is bound to what is returned, a line each.

    Args:
        objective: its parts get their layers, its losses what they train.
        nets: by side: `student`, and `teacher`, or of several `teacher1`, `teacher2`, ….
        data: for the shape of an image.
        stored: what is kept of the outputs of teachers on two samples, where these are not asked.
        samples: how many the split has, for a loss that remembers each.
        chosen: by side, layers that are its stages where it does not know them itself.
        rehearse: whether to compute each term once too.
        lenders: teachers that are not asked and whose parts are borrowed, by side.

    Raises:
        InputError: if a layer is not there, or shapes cannot be bridged.
    """
    import torch

    from kd.models import Taps, outline, part_of
    from kd.models.taps import Layout, laid
    from kd.training.trainer import blank

    images, chosen = blank(data, 2), chosen or {}
    views = {"batch.target": torch.zeros(2, dtype=torch.long), **(stored or {})}
    shape = tuple(images.shape[1:])
    try:
        outlines = {r: outline(n.net, shape, chosen.get(r)) for r, n in nets.items() if objective.names_parts(r)}
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"a network does not take images of {shape} ({str(error).splitlines()[0]})") from error
    objective.resolve(outlines, stored or ())
    for role, net in nets.items():
        training = net.training
        taps = Taps(net.net, objective.paths(role))
        device = next(net.parameters()).device
        try:
            with torch.no_grad():
                views[f"{role}.logits"] = net.eval()(images.to(device))
        except (RuntimeError, ValueError, AssertionError) as error:
            line = str(error).splitlines()[0]
            raise InputError(
                f"the {role} {type(net.net).__name__} does not take images of {data['size']}x{data['size']} with "
                f"{data['channels']} channels ({line}); choose another {role}.name, or pass {role}.options"
            ) from error
        views |= {f"{role}.{path}": value for path, value in taps.pop().items()}
        taps.remove()
        net.train(training)
    own = views.get("student.logits")
    for name, theirs in views.items():
        side, _, what = name.partition(".")
        if own is not None and side.startswith("teacher") and what == "logits" and own.shape != theirs.shape:
            raise InputError(f"the student has {own.shape[1]} classes and the {side} {theirs.shape[1]}")
    for name in objective.lay({name: view.shape for name, view in views.items()}):
        bare = name.removesuffix(names.MAPS)
        try:
            views[name] = laid(views[bare], Layout.of(nets[name.partition(".")[0]].net))
        except InputError as error:
            raise InputError(f"{bare}: {error}") from error
    lent = {}
    for name in objective.borrows:
        side, _, path = name.partition(".")
        if (source := (lenders or {}).get(side) or nets.get(side)) is None:
            raise InputError(f"a term borrows {name}, and there is no {side}")
        lent[name] = part_of(source.net, path, shape)
    objective.lend(lent)
    shapes = {name: view.shape for name, view in views.items()}
    objective.bind(shapes | {"batch.row": torch.Size((samples,))})
    objective.check_answers(views)
    if rehearse:
        views |= _again(objective, nets, images, views)
        objective.rehearse(views | {"batch.row": torch.zeros(2, dtype=torch.long)})
    return lines(objective, shapes)


def lends_nothing(objective: Objective) -> None:
    """Refuse terms that borrow a part of a teacher, where that learns too and a copy would stay behind.

    Raises:
        InputError: naming the part.
    """
    if objective.borrows:
        raise InputError(
            f"a term borrows {objective.borrows[0]} as it is at the start, and here the networks learn together; use "
            "pipeline=distil"
        )


def _again(
    objective: Objective, nets: Mapping[str, Normalised], images: torch.Tensor, views: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The passes that terms ask for beside the plain one, of networks in eval mode."""
    import torch

    from kd.compress.measure import looking
    from kd.models import Taps
    from kd.training.again import again

    if not objective.again:
        return {}
    tapped = {role: (net, Taps(net.net, objective.paths(role))) for role, net in nets.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for net, taps in tapped.values():
            stack.enter_context(looking(net))
            stack.callback(taps.remove)
        device = next(next(iter(nets.values())).parameters()).device
        return again(objective, tapped, images.to(device), views)


def lines(objective: Objective, shapes: Shapes) -> list[str]:
    """A line for each pair of layers that a bound objective compares, in the order of its terms; logits need none.

    Args:
        objective: resolved and bound.
        shapes: view name to shape, batch first.
    """
    found = []
    for name, term in objective.active.items():
        views = {role: each(given) for role, given in term.names().items() if role in ROLES}
        if term.under is not None:
            pairs = zip(each(term.under.student), each(term.under.teacher), strict=True)
            share = f"{100 * term.under.fraction:g} % of the channels exchanged"
            found += [f"{name}: {with_shape(s, shapes)} <- {with_shape(t, shapes)}, {share}" for s, t in pairs]
        if all(view.endswith(".logits") for several in views.values() for view in several):
            continue
        ours, theirs = views["student"], views.get("teacher", ())
        if len(ours) == len(theirs) and not getattr(term.loss, "UNEVEN", False):
            for place, (s, t) in enumerate(zip(ours, theirs, strict=True)):
                said = ", ".join([with_shape(t, shapes), *_bridges(term.loss, place, shapes[s], shapes[t])])
                found.append(f"{name}: {with_shape(s, shapes)} <- {said}")
        elif theirs:
            left, right = (", ".join(with_shape(view, shapes) for view in side) for side in (ours, theirs))
            found.append(f"{name}: {left} <- {right}, each with each")
        else:
            read = [with_shape(view, shapes) for several in views.values() for view in several]
            found.append(f"{name}: {', '.join(read)}")
    return found


def _bridges(loss: Any, place: int, student: Sequence[int], teacher: Sequence[int]) -> list[str]:
    """What leads from the one shape to the other: a trained connector, a common grid."""
    from torch import nn

    said = []
    ours, theirs = (shape[1] if len(shape) in (2, 4) else shape[-1] for shape in (student, teacher))
    connectors = getattr(loss, "connectors", None)
    if isinstance(getattr(loss, "student", None), nn.Linear) and isinstance(loss.teacher, nn.Linear):
        said.append(f"both embedded in {loss.student.out_features}")
    elif connectors is not None:
        if not isinstance(connectors[place], nn.Identity):
            said.append(f"connector {ours}->{theirs}")
    elif getattr(loss, "READS", None) and any(True for _ in loss.parameters()):
        said.append(f"connector {ours}->{theirs}")
    if getattr(loss, "READS", None) and len(student) == len(teacher) == 4:
        mine, other = tuple(student[2:]), tuple(teacher[2:])
        common = other if getattr(loss, "GRID", "smaller") == "teacher" else tuple(map(min, mine, other))
        if mine != common:
            said.append(f"{_grid(mine)}->{_grid(common)}")
        if other != common:
            said.append(f"the teacher's {_grid(other)}->{_grid(common)}")
        if common == (1, 1) and getattr(loss, "POSITIONS", False):
            said.append("one position, which says nothing")
    return said


def _grid(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
