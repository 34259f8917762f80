"""Config to object, behind an allow-list: a stored config is a stranger's data, and ``_target_`` runs code.

A target is refused by its name before anything is imported, and again by its kind once it is.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kd.errors import InputError, nearest, offer

# Where a target may stand, and the base class that it must then have. Private names are no targets, and functions are
# none but one: a package of ours or torch's also holds what reads and writes files.
_MODULE = "torch.nn.modules.module.Module"
KINDS = {
    "kd.data.": "kd.data.source.Source",
    "kd.interchange.": "kd.interchange.Interchange",
    "kd.losses.": _MODULE,
    "kd.models.": _MODULE,
    "kd.objective.": "kd.objective.Term",
    "kd.schedules.": "kd.schedules.Schedule",
    "kd.stages.": "",  # whatever has a VERSION
    "torch.nn.": _MODULE,
    "torch.optim.": "torch.optim.optimizer.Optimizer",
}
ALLOWED = tuple(KINDS)
FUNCTIONS = ("kd.models.create", "kd.models.build.create")
_DOTTED = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")
_MOVED: dict[str, str] = {}  # old dotted path -> new one, for configs that were stored before a class moved


def allowed(extra: Iterable[str] = ()) -> tuple[str, ...]:
    """The prefixes a ``_target_`` may have: ours and the packages the user named in ``run.trusted``."""
    return (*ALLOWED, *(f"{name.rstrip('.')}." for name in extra))


def check_target(name: Any, extra: Iterable[str] = ()) -> str:
    """``name`` if it may be a ``_target_``, by its spelling alone: nothing is imported.

    Raises:
        InputError: if it stands outside the allow-list.

    >>> check_target("kd.losses.logits.SoftTargetKL")
    'kd.losses.logits.SoftTargetKL'
    >>> check_target("builtins.open")
    Traceback (most recent call last):
        ...
    kd.errors.InputError: _target_ 'builtins.open' is outside the allowed packages ...
    """
    prefixes = allowed(extra)
    if not isinstance(name, str) or not _DOTTED.fullmatch(name) or not name.startswith(prefixes):
        packages = ", ".join(prefix.rstrip(".") for prefix in prefixes)
        raise InputError(
            f"_target_ {name!r} is outside the allowed packages ({packages}); if you trust it, name its package in "
            "run.trusted=[…]"
        )
    return _MOVED.get(name, name)


def targets(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Each ``_target_`` below ``node`` with the path of its mapping.

    >>> list(targets({"loss": {"kd": {"_target_": "kd.objective.Term"}}}))
    [('loss.kd', 'kd.objective.Term')]
    """
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield where, node["_target_"]
        for key, value in node.items():
            yield from targets(value, _join(where, str(key)))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from targets(value, f"{where}[{i}]")


def resolve(name: Any, extra: Iterable[str] = ()) -> Any:
    """The class or function a ``_target_`` names.

    Raises:
        InputError: if it is not allowed, not there, or no class or function of its own package.
    """
    path = check_target(name, extra)
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a package of the user's own may raise anything when it is imported
        raise InputError(f"_target_ {path!r}: {type(error).__name__}: {error}") from error
    found = getattr(module, attribute, None)
    classes = [name for name, kind in vars(module).items() if inspect.isclass(kind) and not name.startswith("_")]
    if found is None:
        raise InputError(f"_target_ {path!r}: {module_name} has no {attribute!r}{nearest(attribute, classes)}")
    if not _is_kind(found, path, tuple(extra)):
        raise InputError(
            f"_target_ {path!r} is no class of an allowed package; name the class itself{nearest(attribute, classes)}"
        )
    return found


def _is_kind(found: Any, path: str, extra: tuple[str, ...]) -> bool:
    """Whether what a name stands for is of the kind its package is allowed for, and is at home there."""
    home = f"{getattr(found, '__module__', '')}."
    if path.startswith(tuple(f"{name.rstrip('.')}." for name in extra)):
        return inspect.isclass(found) or inspect.isfunction(found)
    if path in FUNCTIONS:
        return inspect.isfunction(found) and home.startswith("kd.models.")
    if not inspect.isclass(found) or not home.startswith(ALLOWED):
        return False
    base = next(base for prefix, base in KINDS.items() if path.startswith(prefix))
    bases = {f"{kind.__module__}.{kind.__qualname__}" for kind in found.__mro__}
    return base in bases if base else hasattr(found, "VERSION")


def signature_errors(
    node: Mapping[str, Any], where: str = "", extra: Iterable[str] = (), late: Iterable[str] = ()
) -> None:
    """Check that a mapping's keys are parameters of its ``_target_``; ``late`` names those given at build time.

    Raises:
        InputError: at an unknown key, with the nearest right one, or at a missing one.
    """
    found = resolve(node["_target_"], extra)
    signature = inspect.signature(found)
    keywords = {k: v for k, v in node.items() if k != "_target_"}
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for key in keywords:
            if key not in signature.parameters:
                fields = [name for name in signature.parameters if name not in late]
                raise InputError(f"{_join(where, key)} is not a field of {node['_target_']}{offer(key, fields)}")
    try:
        signature.bind(**keywords, **{name: None for name in late if name in signature.parameters})
    except TypeError as error:
        raise InputError(f"{where or node['_target_']}: {error}") from error


def instantiate(node: Any, extra: Iterable[str] = (), where: str = "", **late: Any) -> Any:
    """Build what a config describes, innermost first; ``late`` are arguments for the outermost object.

    ``where`` is the path of ``node`` in the config, for the messages.

    Raises:
        InputError: if a target is not allowed or its fields are not these.

    >>> instantiate({"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}).weight.shape
    torch.Size([3, 2])
    """
    if isinstance(node, Mapping):
        inner = {
            key: instantiate(value, extra, _join(where, str(key))) for key, value in node.items() if key != "_target_"
        }
        if "_target_" not in node:
            return inner
        signature_errors(node, where, extra, late)
        return resolve(node["_target_"], extra)(**inner, **late)
    if isinstance(node, (list, tuple)):
        return [instantiate(value, extra, f"{where}[{i}]") for i, value in enumerate(node)]
    return node


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
