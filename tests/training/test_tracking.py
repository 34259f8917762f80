from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import pytorch_lightning as pl
import torch
import wandb

import kd.training.tracking
from kd.errors import InputError
from kd.training.tracking import kept_environment, log_sweep, logged_in, mode, sync_hint
from kd.training.wandb_logger import SafeWandbLogger
from tests.training.wandb_records import read, run_folders

SWEEP = "5weeb0123456789a"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No account, no settings of the machine; no run left behind."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    assert wandb.run is None


def logger(folder: Path, key: str = "a" * 64, mode: str = "offline", **more: Any) -> SafeWandbLogger:
    settings = {"stage": "student", "config": {"stage": "kd.stages.Distil", "config": {"fit": {"epochs": 2}}}} | more
    return SafeWandbLogger(key=key, folder=folder, mode=mode, **settings)


class Line(pl.LightningModule):
    """A line through points; logs as the training does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        loss = (self.layer(batch[0]) ** 2).mean()
        for each in self.trainer.loggers:
            each.log_metrics({"train/loss": loss.item()}, step=self.trainer.global_step + 1)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Batches:
    """Two batches; a DataLoader would be warned about its workers."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([[torch.ones(4, 1)]] * 2)


def fit(tmp_path: Path, each: SafeWandbLogger | None) -> torch.Tensor:
    torch.manual_seed(0)
    module = Line()
    trainer = pl.Trainer(
        max_epochs=2, logger=each or False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, Batches())
    return module.layer.weight.detach().clone()


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


def test_three_runs_in_one_process_stay_three_runs(tmp_path):
    keys = ["a" * 64, "b" * 64, "c" * 64]
    for index, key in enumerate(keys):
        stage = "teacher" if index == 0 else "student"
        config = {"stage": "kd.stages.Train", "config": {"fit": {"epochs": index}}}
        dials = {"temperature": 4.0, "alpha": index / 2}
        with logger(tmp_path, key, stage=stage, config=config, dials=dials, sweep=SWEEP, tags=["cnn"]) as each:
            for step in range(1, 4):
                each.log_metrics({"train/loss": index + 1 / step}, step=step)
            each.summarise({"test/accuracy": 0.9 + index / 100, "cost/parameters": 6058})
    folders = run_folders(tmp_path)
    assert list(folders) == [key[:16] for key in keys]
    for index, (name, folder) in enumerate(folders.items()):
        found = read(folder)
        run = found["run"]
        assert (run.run_id, run.run_group, run.project) == (name, SWEEP, "kd")
        assert run.job_type == ("teacher" if index == 0 else "student")
        assert list(run.tags) == ["cnn"]
        assert found["config"]["config"] == {"fit": {"epochs": index}}
        assert found["config"]["dials"] == {"temperature": 4.0, "alpha": index / 2}
        steps = [(row["trainer/global_step"], row["train/loss"]) for row in found["history"]]
        assert steps == [(step, index + 1 / step) for step in range(1, 4)]
        assert found["summary"]["test/accuracy"] == 0.9 + index / 100
        assert found["exit"] == 0
    seen = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", folders["b" * 16]],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    summary = json.loads(seen.stdout)
    assert (summary["run_id"], summary["state"], summary["exit_code"]) == ("b" * 16, "finished", 0)
    assert summary["config"]["dials"] == {"temperature": 4, "alpha": 0.5}
    assert summary["summary"]["test/accuracy"] == 0.91
    lines = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", folders["c" * 16]],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    rows = [json.loads(line) for line in lines]
    assert [row["history"]["item"]["train/loss"] for row in rows if row["type"] == "history"] == [3, 2.5, 2 + 1 / 3]
    [started] = [row["run"] for row in rows if row["type"] == "run"]
    assert (started["run_id"], started["run_group"], started["job_type"]) == ("c" * 16, SWEEP, "student")


def test_a_trainer_logs_through_it_and_the_weights_do_not_notice(tmp_path):
    with logger(tmp_path) as each:
        logged = fit(tmp_path, each)
    assert torch.equal(logged, fit(tmp_path, None))
    found = read(run_folders(tmp_path)["a" * 16])
    assert [row["trainer/global_step"] for row in found["history"]] == [1, 2, 3, 4]


def test_environment_and_mode_are_left_alone(tmp_path):
    with logger(tmp_path) as each:
        each.log_metrics({"train/loss": 1.0}, step=1)
        assert wandb.run.settings.x_transaction_log_flush_interval == 2
    assert {name: value for name, value in os.environ.items() if name.startswith("WANDB_")} == {}


def test_kept_environment_puts_back_what_was_there(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with kept_environment():
        os.environ["WANDB_MODE"] = "dryrun"
    assert os.environ["WANDB_MODE"] == "online"


def test_a_run_that_fails_ends_with_exit_code_1(tmp_path):
    with pytest.raises(RuntimeError), logger(tmp_path) as each:
        each.log_metrics({"train/loss": 1.0}, step=1)
        raise RuntimeError("diverged")
    assert read(run_folders(tmp_path)["a" * 16])["exit"] == 1


def test_a_run_left_open_is_ended_before_the_next(tmp_path, caplog):
    leaked = logger(tmp_path)
    leaked.log_metrics({"train/loss": 1.0}, step=1)
    with logger(tmp_path, "b" * 64) as each:
        each.log_metrics({"train/loss": 2.0}, step=1)
    leaked.close()
    folders = run_folders(tmp_path)
    assert [row["train/loss"] for row in read(folders["a" * 16])["history"]] == [1.0]
    assert [row["train/loss"] for row in read(folders["b" * 16])["history"]] == [2.0]
    assert "left open" in caplog.text


def test_nothing_is_started_before_a_value_or_when_disabled(tmp_path):
    with logger(tmp_path, mode="disabled") as each:
        each.log_metrics({"train/loss": 1.0}, step=1)
        each.summarise({"test/accuracy": 1.0})
    logger(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def boom(*_: Any, **__: Any) -> None:
    raise wandb.errors.CommError("no route\nto host")


@pytest.mark.parametrize("place", ["init", "log", "finish", "define_metric", "summary"])
def test_training_does_not_notice_when_wandb_raises(place, tmp_path, monkeypatch, caplog):
    plain = fit(tmp_path, None)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "kd.tracking"):
        if place == "init":
            broken.setattr(wandb, "init", boom)
        elif place == "summary":
            broken.setattr(wandb.sdk.wandb_summary.Summary, "update", boom)
        else:
            broken.setattr(wandb.Run, place, boom)
        with logger(tmp_path) as each:
            logged = fit(tmp_path, each)
            each.summarise({"test/accuracy": 1.0})
        each.log_metrics({"train/loss": 1.0}, step=9)  # after the end: nothing
    if wandb.run is not None:  # finish was broken: nobody could end it
        wandb.finish()
    assert torch.equal(plain, logged)
    assert not each.active
    [warning] = [record for record in caplog.records if record.name == "kd.tracking"]
    assert warning.getMessage() == f"W&B is off for student {'a' * 16} (CommError: no route to host); the store has all"


def test_a_config_that_is_no_plain_data_disables_the_logger(tmp_path, caplog):
    with logger(tmp_path, config={"path": Path("x")}) as each:
        each.log_metrics({"train/loss": 1.0}, step=1)
    assert "not JSON serializable" in caplog.text and run_folders(tmp_path) == {}


def test_it_is_a_lightning_logger_named_after_the_stage(tmp_path):
    each = logger(tmp_path)
    each.log_hyperparams({"anything": object()})
    assert (each.name, each.version, each.save_dir) == ("student", "a" * 16, str(tmp_path))
    assert isinstance(each, pl.loggers.Logger)


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


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_sweep_ends_well_when_wandb_raises(place, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as broken:
        broken.setattr(*((wandb, "init", boom) if place == "init" else (wandb.Run, place, boom)))
        assert not log_sweep({"id": "e" * 16}, columns=["a"], data=[[1]], folder=tmp_path, mode="offline")
    if wandb.run is not None:
        wandb.finish()
    assert "no route to host" in caplog.text


def test_the_hint_names_commands_that_find_the_runs(tmp_path):
    with logger(tmp_path) as each:
        each.log_metrics({"train/loss": 1.0}, step=1)
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
