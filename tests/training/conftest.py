"""What the tests of tracking share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No account, no settings of the machine; no run left behind."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    assert wandb.run is None
