"""How views are called."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kd import names


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("stages", "stages"), ("stage1", "stage1"), ("stage12:pooled", "stage12"), ("last:pooled", "last"),
        ("preactivation2", "preactivation2"), ("embedding", "embedding"), ("classes", "classes"),
        ("stage0", None), ("stages.0", None), ("layer4", None), ("stage", None), ("last.conv", None),
        ("stages:output", None), ("last:output:pooled", None),
    ],
)  # fmt: skip
def test_a_part_is_told_from_a_layers_path(name, part):
    assert names.part(name) == part


def test_steps_are_read_from_left_to_right():
    assert names.steps("head.fc:input:pooled") == [("input", ""), ("pooled", "")]
    assert names.steps("a:maps:through:norm+head.fc:pooled") == [
        ("maps", ""), ("through", "norm+head.fc"), ("pooled", ""),
    ]  # fmt: skip
    assert names.layer("a.b:maps") == "a.b" and names.suffix("a.b") == ""


def test_what_is_stored_is_pooled_once():
    assert names.stored("conv3") == names.stored("conv3:pooled") == "conv3:pooled"


def test_names_need_no_torch():
    words = "import sys; import kd.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0
