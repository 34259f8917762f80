"""The W&B logger of a stage: one run each, all of the record in it, and no way to disturb a training."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import wandb

from kd.pipeline.execute import execute
from kd.store import Store
from kd.training.wandb_logger import SafeWandbLogger
from tests.pipeline.small import made, planned
from tests.training.wandb_records import read, run_folders

pytestmark = pytest.mark.usefixtures("offline")
SWEEP = "5weeb0123456789a"


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


# A whole job.


def inspected(folder: Path, *options: str) -> str:
    """What W&B's own reader finds in a run's folder."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def bits(card):
    return card["weights"], card["metrics"], card["trace"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The card of the job that logs nowhere."""
    return made(tmp_path_factory.mktemp("straight"), "run.log_every=1")[1]


def test_a_job_in_one_process_is_one_run_a_stage_with_all_of_its_record(tmp_path, straight):
    one, run = planned(tmp_path, "run.wandb=offline", "run.log_every=1")
    execute(one, Store(tmp_path), run, sweep=SWEEP)
    folders = run_folders(tmp_path)
    assert set(folders) == {node.key[:16] for node in one.nodes}
    for node in one.nodes:
        found = read(folders[node.key[:16]])
        assert (found["run"].run_id, found["run"].run_group) == (node.key[:16], SWEEP)
        assert (found["run"].job_type, found["run"].project, found["exit"]) == (node.name, "kd", 0)
        config = {k: v for k, v in found["config"].items() if k not in ("_wandb", "dials")}
        assert config == node.document
    card, found = Store(tmp_path).find(one.key).card, read(folders[one.key[:16]])
    assert bits(card) == bits(straight)
    assert found["config"]["dials"] == {"temperature": 4, "alpha": 0.9, "seed": 0}

    steps = [row for row in found["history"] if "train/loss" in row]
    record = [json.loads(line) for line in Store(tmp_path).find(one.key).file("history.jsonl").read_text().splitlines()]
    names = ("train/loss", "train/ce", "train/kd", "grad/ce", "grad/kd", "lr", "epoch")
    assert [[row["trainer/global_step"], *(row[n] for n in names)] for row in steps] == [
        [row["step"], *(row[n] for n in names)] for row in record if "train/loss" in row
    ]
    epochs = [row for row in found["history"] if "val/accuracy" in row]
    for row, epoch in zip(epochs, card["trace"]["epochs"], strict=True):
        assert row["trainer/global_step"] == epoch["step"]
        assert all(row[name] == value for name, value in epoch.items() if name.startswith("val/"))
    wanted = {**card["metrics"], **{f"cost/{name}": value for name, value in card["cost"].items()}}
    assert {name: found["summary"][name] for name in wanted} == wanted

    summary = json.loads(inspected(folders[one.key[:16]], "--summary"))
    assert (summary["run_id"], summary["state"], summary["exit_code"]) == (one.key[:16], "finished", 0)
    assert summary["config"]["config"]["objective"] == node.document["config"]["objective"]
    assert summary["config"]["config"]["fit"] == node.document["config"]["fit"]
    assert summary["summary"]["test/accuracy"] == card["metrics"]["test/accuracy"]
    records = [json.loads(line) for line in inspected(folders[one.key[:16]]).splitlines()]
    [started] = [row["run"] for row in records if row["type"] == "run"]
    assert (started["run_id"], started["run_group"], started["job_type"]) == (one.key[:16], SWEEP, "student")
    items = [row["history"]["item"] for row in records if row["type"] == "history"]
    for name in (*names, "val/accuracy", "val/loss"):
        assert any(name in item for item in items), name


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_job_does_not_notice_when_wandb_raises(place, tmp_path, monkeypatch, straight):
    one, run = planned(tmp_path, "run.wandb=offline", "run.log_every=1")
    finish = wandb.Run.finish
    with monkeypatch.context() as broken:
        broken.setattr(*((wandb, "init", boom) if place == "init" else (wandb.Run, place, boom)))
        execute(one, Store(tmp_path), run)
    if wandb.run is not None:  # nobody could end it
        finish(wandb.run)
    assert bits(Store(tmp_path).find(one.key).card) == bits(straight)
