"""The floor: the same students on the same views and labels, in plain loops."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import ROOT
from tests.pipeline.small import WORDS

SMALL = [*WORDS, "data.augment=shift", "labels.views=2", "fit.samples=null", "run.wandb=disabled"]


def test_the_script_times_its_start_the_labels_and_each_student(tmp_path):
    asked = json.dumps({"words": [*SMALL, f"run.store={tmp_path}"], "students": [[1, 0.1], [4, 0.9]]})
    done = subprocess.run(
        [sys.executable, "-m", "kd.benching.floor", asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert set(found) == {"start_s", "labels_s", "students_s"}
    assert len(found["students_s"]) == 2 and all(seconds > 0 for seconds in found["students_s"])
    assert not list(tmp_path.glob("artifacts/*"))  # it stores nothing
