"""The loggers of a stage: those that were chosen, beside each other, closed whatever happens."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.errors import InputError
from kd.pipeline.execute import execute
from kd.pipeline.jobs import call
from kd.store import Store
from kd.training.loggers import loggers, summarise
from kd.training.wandb_logger import SafeWandbLogger
from tests.pipeline.small import kill_at, made, planned
from tests.training.tiny import run_of
from tests.training.wandb_records import read, run_folders

pytestmark = pytest.mark.usefixtures("offline")
CSV = {"csv": {"_target_": "pytorch_lightning.loggers.CSVLogger"}}


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_csv_and_tensorboard_write_the_record_under_the_store(tmp_path):
    words = ("run/logger=[csv,tensorboard]", "run.log_every=1")
    _, card = made(tmp_path, *words)
    key = card["key"][:16]
    rows = csv_rows(tmp_path / "loggers" / "csv" / "student" / key)
    steps = {int(row["step"]): row for row in rows if row["train/loss"]}
    assert [float(steps[step]["train/loss"]) for step in range(1, 9)] == card["trace"]["losses"]
    assert all(steps[1][name] for name in ("train/ce", "train/kd", "grad/ce", "grad/kd", "lr"))
    assert [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]][:2] == [
        epoch["val/accuracy"] for epoch in card["trace"]["epochs"]
    ]
    assert float(rows[-1]["test/accuracy"]) == card["metrics"]["test/accuracy"]
    assert float(rows[-1]["cost/parameters"]) == card["cost"]["parameters"]

    events = EventAccumulator(str(tmp_path / "loggers" / "tensorboard" / "student" / key))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(step, pytest.approx(loss)) for step, loss in enumerate(card["trace"]["losses"], start=1)]
    assert {"train/kd", "grad/kd", "val/accuracy", "test/accuracy", "cost/parameters"} <= set(events.Tags()["scalars"])
    assert sorted(path.name for path in (tmp_path / "loggers").iterdir()) == ["csv", "tensorboard"]
    assert {path.name for path in (tmp_path / "loggers" / "csv").iterdir()} >= {"teacher", "student"}


def test_a_resumed_training_goes_on_logging(tmp_path):
    words = ("pipeline=baseline", "run/logger=[csv]", "run.log_every=1", "run.checkpoint_seconds=0")
    one, run = planned(tmp_path, *words)
    call(kill_at, "step", 6, one, run)
    execute(one, Store(tmp_path), run)
    rows = csv_rows(tmp_path / "loggers" / "csv" / "student" / one.key[:16])
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [6, 7, 8]
    assert Store(tmp_path).find(one.key).card["resumed"] == [5]


def test_loggers_stand_beside_each_other_and_are_closed(tmp_path):
    run = run_of(tmp_path, wandb="offline", logger=CSV)
    with loggers(run, key="a" * 64, stage="student", document={"x": 1}, dials={"alpha": 1}, sweep="b" * 16) as found:
        assert [type(each) for each in found] == [SafeWandbLogger, CSVLogger]
        for each in found:
            each.log_metrics({"train/loss": 1.0}, step=1)
        summarise(found, {"test/accuracy": 0.5, "test/f1_per_class": [0.1, 0.2]}, 9)
    [last] = [row for row in csv_rows(tmp_path / "loggers" / "csv" / "student" / ("a" * 16)) if row["test/accuracy"]]
    assert (last["step"], float(last["test/accuracy"])) == ("9", 0.5) and "test/f1_per_class" not in last
    told = read(run_folders(tmp_path)["a" * 16])
    assert told["exit"] == 0 and told["summary"]["test/accuracy"] == 0.5
    assert told["summary"]["test/f1_per_class"] == [0.1, 0.2]


def test_a_stage_that_fails_closes_them_with_that_word(tmp_path):
    run = run_of(tmp_path, wandb="offline", logger=CSV)
    with (
        pytest.raises(RuntimeError, match="diverged"),
        loggers(run, key="a" * 64, stage="student", document={}) as found,
    ):
        for each in found:
            each.log_metrics({"train/loss": 1.0}, step=1)
        raise RuntimeError("diverged")
    assert read(run_folders(tmp_path)["a" * 16])["exit"] == 1
    assert csv_rows(tmp_path / "loggers" / "csv" / "student" / ("a" * 16))


def test_none_is_the_default_of_a_disabled_run(tmp_path):
    with loggers(run_of(tmp_path), key="a" * 64, stage="student", document={}) as found:
        assert found == []
    assert list(tmp_path.iterdir()) == []


def test_a_logger_whose_package_is_missing_is_refused_with_the_install_line(tmp_path, monkeypatch):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning_fabric.loggers.tensorboard.{name}", False)
    run = run_of(tmp_path, logger={"tensorboard": {"_target_": "pytorch_lightning.loggers.TensorBoardLogger"}})
    with (
        pytest.raises(InputError, match=r"run/logger=tensorboard needs .* pip install 'kd\[tensorboard\]'"),
        loggers(run, key="a" * 64, stage="student", document={}),
    ):
        pass


@pytest.mark.parametrize("target", ["os.system", "builtins.open", "pytorch_lightning.Trainer", "wandb.init"])
def test_what_is_no_logger_of_lightnings_is_refused(target, tmp_path):
    run = run_of(tmp_path, logger={"own": {"_target_": target}})
    with pytest.raises(InputError, match="_target_"), loggers(run, key="a" * 64, stage="student", document={}):
        pass
