"""Planning, listing and --help answer at once: nothing they import may import torch or wandb."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIGHT = (
    "kd",
    "kd.errors",
    "kd.store",
    "kd.data",
    "kd.data.source",
    "kd.stages",
    "kd.pipeline",
    "kd.report",
    "kd.config",
    "kd.spaces",
    "kd.tuning",
    "kd.cli",
)

# The refusal raises where the import stands, so a failure's traceback shows who asked.
PROBE = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "wandb"):
            raise AssertionError(f"{name} is imported at the top of a module")

sys.meta_path.insert(0, Refuse())
importlib.import_module(sys.argv[1])
"""


def probe(module: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE, module], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_leaves_torch_alone(module: str) -> None:
    done = probe(module)
    assert done.returncode == 0, done.stderr


def test_the_probe_refuses_torch() -> None:
    assert "torch is imported at the top of a module" in probe("safetensors.torch").stderr
