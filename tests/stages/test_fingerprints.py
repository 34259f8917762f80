"""Fingerprints: the code and the environment that made an artifact, and nothing that is secret."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import kd
from kd.stages import code_print, environment_print
from kd.stages.fingerprints import NUMERIC, PACKAGES
from tests.pipeline.small import made

ROOT = Path(kd.__file__).parents[1]
PRINT = "import json; from kd.stages import code_print; print(json.dumps(code_print()))"
DOCUMENTED = {
    "python", *PACKAGES, "platform", "machine", "cpu", "capability", "threads", "gpu", "cuda", "cudnn", "driver",
    "tf32",
    "lock",
}  # fmt: skip


def printed(folder: Path) -> dict:
    """The fingerprint of the copy of kd in a folder, made in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, cwd=folder, env=environment
    )
    return json.loads(done.stdout)


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_codes_digest_follows_each_file_and_the_commit_says_whether_it_is_dirty(tmp_path):
    shutil.copytree(ROOT / "kd", tmp_path / "kd", ignore=shutil.ignore_patterns("__pycache__"))
    copy = printed(tmp_path)
    assert copy == {"kd": kd.__version__, "commit": None, "dirty": None, "digest": copy["digest"]}
    assert printed(tmp_path) == copy and len(copy["digest"]) == 64
    file = tmp_path / "kd" / "losses" / "logits.py"
    before = file.read_text()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "a copy")
    assert printed(tmp_path) == {**copy, "commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    file.write_text(before + "\n")
    edited = printed(tmp_path)
    assert edited["digest"] != copy["digest"] and edited["dirty"] is True
    file.write_text(before)
    (tmp_path / "kd" / "losses" / "new.py").touch()
    assert printed(tmp_path)["digest"] not in (copy["digest"], edited["digest"])


def test_it_is_taken_once_a_process():
    assert code_print() is code_print()


def test_the_environment_has_what_may_move_a_bit():
    found = environment_print()
    assert set(found) == DOCUMENTED
    assert set(NUMERIC) <= DOCUMENTED | {"device", "devices"}  # the run says these
    assert found["torch"] == torch.__version__.partition("+")[0] and found["threads"] == torch.get_num_threads()
    assert found["capability"] and found["cpu"] and len(found["lock"]) == 64
    json.dumps(found, allow_nan=False)


def test_no_environment_variable_reaches_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cretkey" * 5)
    monkeypatch.setenv("KD_PASSWORD", "hunter2hunter2")
    text = json.dumps(made(tmp_path, "pipeline=baseline")[1])
    for name in ("WANDB_API_KEY", "KD_PASSWORD", "PATH", "HOSTNAME"):
        assert name not in text
    for value in ("s3cretkey", "hunter2", os.environ["PATH"]):
        assert value not in text
