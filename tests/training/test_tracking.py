from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import wandb

import kd.training.tracking
from kd.errors import InputError
from kd.training.tracking import kept_environment, log_sweep, logged_in, mode, start_run, sync_hint
from tests.training.wandb_records import read, run_folders

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize(
    ("setting", "env", "meant"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("online", {}, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("disabled", {"WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_mode(setting, env, meant, tmp_path):
    assert mode(setting, {"HOME": str(tmp_path), **env}) == meant


def test_an_unknown_mode_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'offline'"):
        mode("ofline", {})


def test_a_login_is_found_in_netrc_for_the_host_only(tmp_path):
    env = {"HOME": str(tmp_path)}
    assert not logged_in(env)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert logged_in(env)
    assert not logged_in({**env, "WANDB_BASE_URL": "https://wandb.example.org"})
    elsewhere = tmp_path / "keys"
    elsewhere.write_text("machine wandb.example.org\n  login user\n  password secret\n")
    assert logged_in({**env, "WANDB_BASE_URL": "https://wandb.example.org", "NETRC": str(elsewhere)})


def test_a_login_is_found_in_the_settings_file_and_its_host_is_used(tmp_path):
    folder = tmp_path / ".config" / "wandb"
    folder.mkdir(parents=True)
    (tmp_path / ".netrc").write_text("machine wandb.example.org\n  login user\n  password secret\n")
    assert not logged_in({"HOME": str(tmp_path)})
    (folder / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert logged_in({"HOME": str(tmp_path)})
    (tmp_path / ".netrc").unlink()
    assert not logged_in({"HOME": str(tmp_path)})
    (folder / "settings").write_text("[default]\napi_key = secret\n")
    assert logged_in({"HOME": str(tmp_path)})


def test_a_broken_netrc_or_settings_file_means_no_login(tmp_path):
    (tmp_path / ".netrc").write_text("nonsense here\n")
    (tmp_path / "settings").write_text("no section\n")
    assert not logged_in({"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path)})


def test_the_mode_is_found_without_importing_wandb_torch_or_lightning():
    code = (
        "import sys; from kd.training.tracking import mode; mode('auto', {'HOME': '/nowhere'}); "
        "print([m for m in ('wandb', 'torch', 'pytorch_lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"


def test_kept_environment_puts_back_what_was_there(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with kept_environment():
        os.environ["WANDB_MODE"] = "dryrun"
    assert os.environ["WANDB_MODE"] == "online"


def test_a_killed_run_keeps_what_was_logged(tmp_path):
    code = f"""
import os, sys, time
from pathlib import Path
from kd.training.tracking import start_run
folder = Path({str(tmp_path)!r})
run = start_run(id="d" * 16, folder=folder, mode="offline", project="kd", job_type="student", config={{}})
for step in range(20):
    run.log({{"train/loss": step, "trainer/global_step": step}})
file = next(folder.glob("wandb/offline-run-*/*.wandb"))
until = time.monotonic() + 10
while file.stat().st_size < 5000 and time.monotonic() < until:
    time.sleep(0.2)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False, cwd=Path.cwd(), timeout=120)
    history = read(run_folders(tmp_path)["d" * 16])["history"]
    assert len(history) == 20


def test_a_sweep_is_one_run_with_table_and_figure(tmp_path):
    sweep = {"id": "0123456789abcdef", "overrides": ["temperature=1,4"], "jobs": [{}, {}]}
    columns, data = ["temperature", "accuracy", "hash"], [[1.0, 0.96, "a" * 16], [4.0, None, "b" * 16]]
    heatmap = go.Figure(go.Heatmap(z=[[0.96]]))
    kept = {"columns": columns, "data": data, "folder": tmp_path}
    assert log_sweep(sweep, **kept, mode="offline", figures={"heatmap": heatmap})
    folder = run_folders(tmp_path)["0123456789abcdef"]
    found = read(folder)
    assert (found["run"].job_type, found["run"].run_group) == ("sweep", "0123456789abcdef")
    assert found["config"]["overrides"] == ["temperature=1,4"] and found["exit"] == 0
    [table] = (folder / "files" / "media" / "table").glob("results*.json")
    stored = json.loads(table.read_text())
    assert (stored["columns"], stored["data"]) == (columns, data)
    assert len(list((folder / "files" / "media" / "plotly").glob("heatmap*.json"))) == 1
    assert not log_sweep(sweep, **kept, mode="disabled")


def boom(*_: Any, **__: Any) -> None:
    raise wandb.errors.CommError("no route\nto host")


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_sweep_ends_well_when_wandb_raises(place, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as broken:
        broken.setattr(*((wandb, "init", boom) if place == "init" else (wandb.Run, place, boom)))
        assert not log_sweep({"id": "e" * 16}, columns=["a"], data=[[1]], folder=tmp_path, mode="offline")
    if wandb.run is not None:
        wandb.finish()
    assert "no route to host" in caplog.text


def test_the_hint_names_commands_that_find_the_runs(tmp_path):
    with kept_environment():
        start_run(id="d" * 16, folder=tmp_path, mode="offline", project="kd", job_type="student", config={}).finish()
    hint = sync_hint(tmp_path)
    assert f"`wandb leet {tmp_path}/wandb`" in hint and f"`wandb sync {tmp_path}/wandb`" in hint
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", tmp_path / "wandb"], capture_output=True, text=True
    )
    assert "Would sync 1 run" in done.stderr + done.stdout


def test_lightning_is_imported_by_the_logger_alone():
    tree = ast.parse(Path(kd.training.tracking.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("pytorch_lightning") for name in names)
