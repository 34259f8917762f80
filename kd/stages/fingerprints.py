"""The fingerprints on a card that are not its name: the code and the environment that made it."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "torchvision", "pytorch-lightning", "torchmetrics", "timm", "hydra-core", "omegaconf", "numpy",
    "safetensors", "pillow", "scikit-learn", "pyarrow",
)  # fmt: skip
NUMERIC = (
    "torch", "numpy", "timm", "cpu", "machine", "threads", "capability", "gpu", "cuda", "cudnn", "driver", "tf32",
    "device", "devices",
)  # fmt: skip


@cache
def code_print() -> dict[str, Any]:
    """The commit and whether the tree was dirty (None outside a checkout), and the digest of kd's own files."""
    import kd

    root = Path(kd.__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root).as_posix()}\0".encode())
        total.update(path.read_bytes())

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    dirty = None if commit is None else bool(git("status", "--porcelain", "--", str(root)))
    return {"kd": kd.__version__, "commit": commit, "dirty": dirty, "digest": total.hexdigest()}


def environment_print() -> dict[str, Any]:
    """Versions, processor, threads and flags: what may move a bit though the config is the same."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": _gpu() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,  # type: ignore[no-untyped-call]
        "driver": _driver() if gpu else None,
        "tf32": torch.backends.cudnn.allow_tf32 if gpu else None,
        "lock": _lock(),
    }


def _version(name: str) -> str | None:
    try:
        return str(version(name))
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or os.uname().machine


def _gpu() -> str:
    """The first GPU's name, from the driver where it tells: asking torch would touch CUDA, and forbid to fork ranks."""
    import torch

    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return torch.cuda.get_device_name()


def _driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _lock() -> str | None:
    import kd

    path = Path(kd.__file__).parent.parent / "requirements.lock"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
