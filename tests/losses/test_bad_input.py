"""What no loss may answer with NaN or an error of Python's or torch's: one clear line, or 0 where all is masked."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kd.losses
from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.logits import SoftTargetKL
from tests.losses.test_contract import LOSSES, Case

Given = dict[str, Any]
each = pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
TOKENS = [case for case in LOSSES if case.target and len(case.student) == 3 and not case.classes]


def given(case: Case) -> tuple[nn.Module, Given]:
    """The loss itself, bound, and what it is given, lists as lists."""
    step, views = case.loss(), dict[str, Any](case.views())
    for side, shapes in zip(("student", "teacher"), case.layers or (), strict=False):
        parts = views[side].split([math.prod(shape[1:]) for shape in shapes], dim=1)
        found = [part.unflatten(1, shape[1:]) for part, shape in zip(parts, shapes, strict=True)]
        views[side] = found if len(found) > 1 else found[0]
    if case.teachers:
        views["teacher"] = list(views["teacher"].tensor_split(case.teachers, dim=1))
    assert isinstance(step.loss, nn.Module)
    return step.loss, views


def changed(value: Any, how: Callable[[Tensor], Any], all_of_them: bool = False) -> Any:
    """A view, or the first of a list of them, made into something else."""
    if not isinstance(value, list):
        return how(value)
    return [how(one) if all_of_them or place == 0 else one for place, one in enumerate(value)]


# Of features and logits: no batch of them, no floats, none at all, other samples, something else.
SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "one axis": lambda t: t.flatten(),
    "a number": lambda t: t.sum(),
    "twice the samples": lambda t: torch.cat([t, t]),
    "one sample less": lambda t: t[1:],
    "no samples": lambda t: t[:0],
    "no width": lambda t: t[:, :0],
    "integers": lambda t: t.long(),
    "booleans": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "a list in a list": lambda t: [t, t],
    "nothing": lambda t: None,
}
TARGETS: dict[str, Callable[[Tensor], Any]] = {
    "floats": lambda t: t.float(),
    "one-hot": lambda t: torch.zeros(*t.shape, 5),
    "an axis more": lambda t: t[..., None],
    "a number": lambda t: t.sum(),
    "twice the samples": lambda t: torch.cat([t, t]),
    "no samples": lambda t: t[:0],
    "a list": lambda t: t.tolist(),
}
# Of class indices alone: tokens are told by their labels only whether they count, and crd which samples are alike.
LABELS: dict[str, Callable[[Tensor], Any]] = {
    "no class, too high": lambda t: torch.full_like(t, 10**6),
    "no class, negative": lambda t: torch.full_like(t, -1),
    "all masked": lambda t: torch.full_like(t, -100),
    "a mask": lambda t: t > 0,
}


def mistakes(case: Case) -> Iterator[tuple[str, Given]]:
    """Each view of a case in each wrong form, the others as they were."""
    _, views = given(case)
    for role, value in views.items():
        wrong = SHAPES if role in ("student", "teacher", "feature") else TARGETS
        if role == "target" and case not in TOKENS and not case.row:
            wrong = wrong | LABELS
        for name, how in wrong.items():
            if role == "student" and name == "a list in a list" and case.layers:
                continue  # a list of layers may be told from a layer by its length alone, below
            if role == "teacher" and name == "nothing" and case.teachers:
                continue  # of several, those that are not drawn are not asked
            yield f"{role}: {name}", views | {role: changed(value, how)}
        if isinstance(value, list):
            yield f"{role}: an empty list", views | {role: []}
        if isinstance(value, list) and not case.teachers:
            yield f"{role}: a layer less", views | {role: value[:-1]}
    if "teacher" in views and not case.widths:
        yield "teacher: a class or channel less", views | {"teacher": changed(views["teacher"], lambda t: t[:, 1:])}
    yield "an empty batch", {role: changed(value, lambda t: t[:0], True) for role, value in views.items()}
    if "row" in views:
        yield "row: beyond the split", views | {"row": views["row"] + 100}


@each
def test_bad_input_is_refused_in_one_clear_line(case: Case) -> None:
    answered = []
    for name, views in mistakes(case):
        loss, _ = given(case)
        try:
            answered.append(f"{name}: {loss(**views)}")
        except InputError as error:
            if "\n" in str(error) or len(str(error)) < 20:
                answered.append(f"{name}: {error}")
        except Exception as error:
            answered.append(f"{name}: {type(error).__name__}: {error}")
    assert not answered, "\n".join(answered)


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "huge": lambda t: 1e4 * t,
    "tiny": lambda t: 1e-30 * t,
    "the same sample throughout": lambda t: t[:1].expand_as(t).clone(),
    "one sample": lambda t: t[:1],
}


@each
def test_value_and_gradient_of_extremes_are_finite_or_refused(case: Case) -> None:
    spoilt = []
    for name, how in EXTREMES.items():
        for sides in (("student",), ("teacher",), ("student", "teacher", "feature")):
            loss, views = given(case)
            roles = list(views) if name == "one sample" else [role for role in sides if role in views]
            views |= {role: changed(views[role], how, True) for role in roles}
            views["student"] = changed(views["student"], lambda t: t.detach().clone().requires_grad_(), True)
            try:
                value = loss(**views)
            except InputError:
                continue
            value.backward()
            leaves = views["student"] if isinstance(views["student"], list) else [views["student"]]
            slopes = [leaf.grad for leaf in leaves if leaf.grad is not None]
            if not (value.isfinite() and all(slope.isfinite().all() for slope in slopes)):
                spoilt.append(f"{name} of {', '.join(roles)}: {value}")
    assert not spoilt, "\n".join(spoilt)


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: case.name)
def test_where_all_tokens_are_masked_a_loss_is_zero_and_pulls_nothing_even_by_nan(case: Case) -> None:
    loss, views = given(case)
    for target in (torch.full_like(views["target"], -100), torch.zeros_like(views["target"], dtype=torch.bool)):
        student = torch.full_like(views["student"], torch.nan, requires_grad=True)
        value = loss(student=student, teacher=views["teacher"], target=target)
        value.backward()
        assert value.item() == 0 and student.grad is not None and student.grad.eq(0).all()


# Temperatures.


MODULES = [importlib.import_module(f"kd.losses.{found.name}") for found in pkgutil.iter_modules(kd.losses.__path__)]
MADE_OF: Given = {"loss": SoftTargetKL(1.0)}
BAD = (0, 0.0, -1, math.nan, math.inf, "4", True)


def is_loss(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, nn.Module)


def heated(kind: Callable[[Any], bool]) -> list[Any]:
    """All public things of a kind that are given a temperature."""
    found = {
        thing
        for module in MODULES
        for name, thing in vars(module).items()
        if kind(thing) and not name.startswith("_") and thing.__module__ == module.__name__
    }
    return sorted((t for t in found if "temperature" in inspect.signature(t).parameters), key=lambda t: t.__name__)


@pytest.mark.parametrize("kind", heated(is_loss), ids=lambda kind: kind.__name__)
def test_a_loss_of_a_temperature_that_divides_nothing_is_not_made(kind: type[nn.Module]) -> None:
    needed = {
        name: MADE_OF[name]
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is parameter.empty and name != "temperature"
    }
    kind(**needed, temperature=2)
    for value in BAD:
        with pytest.raises(BadValue, match=r"temperature is .*; it must be a finite number above 0"):
            kind(**needed, temperature=value)


S, T, Y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
ARGUMENTS: Given = {
    "student": S, "teacher": T, "target": Y, "teachers": [S, T], "k": 2, "exits": [S], "deepest": T,
    "each": torch.randn(2, 4, 5), "logs": torch.zeros(2),
    "branches": [S], "ensemble": T, "values": torch.zeros(4, 2), "indices": torch.zeros(4, 2, dtype=torch.long),
}  # fmt: skip
MAPS = {"cwd": {"student": torch.randn(4, 3, 2, 2), "teacher": torch.randn(4, 3, 2, 2)}}


@pytest.mark.parametrize("loss", heated(inspect.isfunction), ids=lambda loss: loss.__name__)
def test_a_function_refuses_a_temperature_that_divides_nothing(loss: Callable[..., Any]) -> None:
    arguments = ARGUMENTS | MAPS.get(loss.__name__, {})
    needed = {
        name: arguments[name]
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.default is parameter.empty and name != "temperature"
    }
    loss(**needed, temperature=2.0)
    for value in BAD:
        with pytest.raises(BadValue, match=r"temperature is .*; it must be a finite number above 0"):
            loss(**needed, temperature=value)


def test_the_heated_were_found() -> None:
    assert len(heated(is_loss)) > 15 and len(heated(inspect.isfunction)) > 15
