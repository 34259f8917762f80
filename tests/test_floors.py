"""A file under kd/ imports only from lower floors or from its own package, inside functions too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each rung may import from the rungs before it. The lowest and the highest floor are several rungs each: the store
# raises errors; the command line stands on what its commands do, and that on composed configs. "" is kd/__init__.py.
LADDER: tuple[tuple[str, ...], ...] = (
    ("",),
    ("errors", "names", "roles"),
    ("store",),
    ("losses", "compress", "instantiate", "binding", "earlier", "balance"),
    ("schedules", "interchange"),
    ("objective", "models", "data", "tasks"),
    ("training",),
    ("stages",),
    ("pipeline", "report"),
    ("config",),
    ("launch", "listing", "reporting", "spaces", "views"),
    ("benching", "doctoring", "exporting", "picking", "tuning"),
    ("cli",),
    ("__main__",),
)
RUNG = {place: height for height, places in enumerate(LADDER) for place in places}
# Planning and listing read these, and they outlive any dependency.
STANDARD_LIBRARY_ONLY = ("", "errors", "names", "roles", "store")
ONLY_HOME = {"lightning": "training", "pytorch_lightning": "training", "wandb": "training"}


def place(module: str) -> str:
    """The part of kd that a dotted module belongs to: kd.store.keys -> store."""
    return module.partition(".")[2].partition(".")[0]


def imports(source: str, module: str, package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports; relative names are made whole."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if package else -1]
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            if base == "kd":  # `from kd import store` is the package, `from kd import __version__` is kd/__init__.py
                yield from ((node.lineno, f"kd.{a.name}" if a.name in RUNG else "kd") for a in node.names)
            else:
                yield node.lineno, base


def violations(source: str, module: str, package: bool = False) -> list[str]:
    """What a file imports against the rules, one line each."""
    here, found = place(module), []
    for line, name in imports(source, module, package):
        where = f"{module}:{line} imports {name}"
        if name.split(".")[0] == "kd":
            there = place(name)
            if there not in RUNG:
                found.append(f"{where}, which has no floor")
            elif there != here and RUNG[there] >= RUNG[here]:
                found.append(f"{where}, which is not on a lower floor")
        else:
            top = name.split(".")[0]
            if here in STANDARD_LIBRARY_ONLY and top not in sys.stdlib_module_names:
                found.append(f"{where}, but kd/{here} keeps to the standard library")
            if ONLY_HOME.get(top, here) != here:
                found.append(f"{where}, whose only home is kd/{ONLY_HOME[top]}")
    return found


def sources() -> list[Path]:
    """All Python files of the package."""
    return sorted((ROOT / "kd").rglob("*.py"))


def dotted(path: Path) -> str:
    """kd/store/__init__.py -> kd.store."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_place_has_a_floor() -> None:
    assert {place(dotted(path)) for path in sources()} <= set(RUNG), "a new package belongs into LADDER"


def test_imports_go_down() -> None:
    found = [
        line
        for path in sources()
        for line in violations(path.read_text(encoding="utf-8"), dotted(path), path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kd.losses.logits", "import wandb"),
        ("kd.losses.logits", "from kd.objective import Term"),
        ("kd.losses.logits", "def f():\n    from kd.training import loaders"),
        ("kd.data.source", "from kd.models import create"),  # the same floor, another package
        ("kd.models.build", "from kd import stages"),
        ("kd.models.build", "from ..cli import main"),
        ("kd.objective", "from . import pipeline"),
        ("kd.store.keys", "import numpy as np"),
        ("kd.stages.train", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kd.report.page"),
        ("kd.cli", "import kd.attic"),
    ],
)
def test_a_wrong_import_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kd.losses.feature", "import torch\nfrom kd.losses.logits import cross_entropy\nfrom . import logits"),
        ("kd.store.store", "import json\nfrom kd.errors import InputError\nfrom .keys import digest"),
        ("kd.training.fit", "import pytorch_lightning as pl\nimport wandb\nfrom kd.objective import Objective"),
        ("kd.cli", "from kd import __version__, store\nfrom kd.config import compose"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert violations("from . import store", "kd", package=True)
    assert not violations("from .keys import digest", "kd.store", package=True)
