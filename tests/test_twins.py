"""Tests mirror sources by name: kd/store/keys.py has tests/store/test_keys.py."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Modules without a test file of their own. This list may only shrink: a new module comes with its test.
WITHOUT_TWIN: frozenset[str] = frozenset()


def without_twin() -> set[str]:
    """Modules, as paths inside kd/, that no test file mirrors; __init__ and __main__ need none."""
    modules = (path.relative_to(ROOT / "kd") for path in (ROOT / "kd").rglob("*.py") if not path.stem.startswith("__"))
    return {m.as_posix() for m in modules if not (ROOT / "tests" / m.parent / f"test_{m.name}").is_file()}


def test_every_module_has_its_test_file() -> None:
    new = without_twin() - WITHOUT_TWIN
    assert not new, f"no test file mirrors {sorted(new)}; write one, do not add to the list"


def test_the_list_of_exceptions_is_up_to_date() -> None:
    tested = WITHOUT_TWIN - without_twin()
    assert not tested, f"{sorted(tested)} has its test file or is gone: take it off the list"
