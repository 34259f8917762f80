"""The allocator's settings: what a step asks for again is not given back, and nothing else changes."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from kd.training.memory import keep_memory
kept = keep_memory() if sys.argv[1] == "keep" else None
import torch
net = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)))
images = torch.rand(64, 16, 32, 32)  # 4 MB a layer
def step():
    net.zero_grad()
    net(images).sum().backward()
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word, **env):
    done = subprocess.run(
        [sys.executable, "-c", CODE, word], capture_output=True, text=True, check=True, env={**_environment(), **env}
    )
    kept, count = done.stdout.split()
    return kept, int(count)


def _environment():
    import os

    return {k: v for k, v in os.environ.items() if k not in ("KD_MALLOC", "LD_PRELOAD")}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_kept_is_not_faulted_in_again():
    kept, with_ = faults("keep")
    _, without = faults("leave")
    assert kept == "True" and with_ < without / 10


def test_it_can_be_left_alone():
    assert faults("keep", KD_MALLOC="system")[0] == "False"
