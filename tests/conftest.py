"""What every test may count on: quiet tracking, a store of its own, and the real data where the machine has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # For the whole session, so that fixtures shared by several tests write to a temporary folder as well.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("KD_STORE", str(tmp_path_factory.mktemp("kd") / "store"))
        yield


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KD_STORE", str(tmp_path / "store"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets: KD_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("KD_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data sets in {folder}; name their folder in KD_DATA")
    return folder
