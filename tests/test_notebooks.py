"""The notebooks run from end to end on a small store, draw what they say, and are committed without outputs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.execute import execute, record_sweep
from kd.store import Store, short
from tests.pipeline.small import planned

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
# How many figures each draws; a new notebook is entered here.
FIGURES = {"read_the_store": 3}

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a sweep of two temperatures and two alphas."""
    folder = tmp_path_factory.mktemp("swept")
    words = [(f"temperature={t}", f"alpha={a}") for t in (1, 4) for a in (0.5, 0.9)]
    pairs = [planned(folder, *pair) for pair in words]
    store, plans = Store(folder), [plan for plan, _ in pairs]
    outcomes = [{"status": "done", "ran": execute(plan, store, run)} for plan, run in pairs]
    record_sweep(store, "0" * 16, ["temperature=1,4", "alpha=0.5,0.9"], plans, outcomes)
    return folder


# In a process of its own: Jupyter's packages warn about each other (paths, event loops, sockets left to the collector),
# and here warnings are errors. Without folders to look in, `python3` is ipykernel's own description of the interpreter
# that runs this test, and not whatever kernel the user has installed under that name.
EXECUTE = """
import sys
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

source, folder, target = sys.argv[1:]
notebook = nbformat.read(source, as_version=4)
manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
NotebookClient(notebook, km=manager, timeout=120, resources={"metadata": {"path": folder}}).execute()
nbformat.write(notebook, target)
"""


def executed(path: Path, store: Path, scratch: Path) -> list[dict[str, Any]]:
    """All outputs of the notebook after a run in this interpreter, which leaves nothing in the user's folders."""
    jupyter = ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")
    own = {name: str(scratch / "jupyter") for name in jupyter}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path), str(path.parent), str(scratch / "executed.ipynb")],
        env={**os.environ, **own, "KD_STORE": str(store), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads((scratch / "executed.ipynb").read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def test_it_runs_draws_and_leaves_the_store_alone(path: Path, swept: Path, tmp_path: Path) -> None:
    before = sorted(folder.name for folder in (swept / "artifacts").iterdir())
    outputs = executed(path, swept, tmp_path)
    printed = [output for output in outputs if output["output_type"] in ("error", "stream")]
    assert not printed, "a cell failed, or something warned"
    shown = [output["data"] for output in outputs]
    figures = [data[PLOTLY] for data in shown if PLOTLY in data]
    assert len(figures) == FIGURES[path.stem]
    assert all(figure["data"] for figure in figures), "a figure without a trace"
    text = "\n".join("".join(data.get("text/markdown", "")) for data in shown)
    (sweep,) = Store(swept).sweeps()
    assert all(short(job["key"]) in text for job in sweep["jobs"])
    assert sorted(folder.name for folder in (swept / "artifacts").iterdir()) == before


def test_it_is_committed_clean_and_trains_nothing(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "clear all outputs"
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds == ["markdown", "code"] * len(code), "a sentence before each cell"
    for cell in code:
        source = "".join(cell["source"])
        assert len(source.splitlines()) <= 20
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                assert str(node.module).startswith(("IPython", "kd.report", "kd.store", "pathlib"))
