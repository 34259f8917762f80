"""The server that jobs are forked from: everything slow is loaded, and it is this code, whatever is edited later."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kd
from kd.pipeline.jobs import call
from tests.pipeline import small

ROOT = Path(kd.__file__).parents[1]


LOADED = ("torch", "timm", "pytorch_lightning", "torchmetrics", "safetensors.torch")
PROBE = f"""
import sys, threading
import kd.pipeline.warm
from kd.stages import code_print

assert [name for name in {LOADED} if name not in sys.modules] == []
assert code_print.cache_info().currsize == 1
# A process that has threads, or has touched the GPU, is not one to fork; and a W&B run would be every job's.
assert threading.active_count() == 1 and not sys.modules["torch"].cuda.is_initialized()
assert "wandb" not in sys.modules or sys.modules["wandb"].run is None
"""


def test_importing_it_loads_the_slow_packages_takes_the_codes_digest_and_starts_nothing():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_job_finds_all_of_kd_loaded_so_it_mixes_no_edited_file_in(tmp_path):
    words = [f"run.store={tmp_path}", "run.wandb=offline", "run/logger=[csv]", "run.latency=true"]
    outcome = call(small.imports, words)
    assert outcome.get("value") == [], outcome


EDIT = """
import json, sys
from pathlib import Path
sys.path[:0] = [{copy!r}]
from kd.pipeline.jobs import call
import kd, kd.stages, code_job
assert Path(kd.__file__).parent.parent == Path({copy!r})
first = call(code_job.code)["value"]
path = Path(kd.__file__).with_name("objective.py")
path.write_text(path.read_text() + "# edited while jobs run\\n")
second = call(code_job.code)["value"]
print(json.dumps([first, second, kd.stages.code_print()["digest"]]))
"""


def test_jobs_of_one_server_name_the_code_that_it_loaded(tmp_path):
    shutil.copytree(ROOT / "kd", tmp_path / "kd", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "code_job.py").write_text(
        "def code(tell):\n    from kd.stages import code_print\n    return code_print()['digest']\n"
    )
    (tmp_path / "main.py").write_text(
        "if __name__ == '__main__':\n"
        + "".join(f"    {line}\n" for line in EDIT.format(copy=str(tmp_path)).splitlines())
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, second, edited = json.loads(done.stdout)
    assert first == second != edited
