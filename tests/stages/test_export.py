"""The stage that writes a file: what it gives is measured, and one that gives something else is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kd.compress.integers
from kd.compress.export import answer, session
from kd.errors import InputError, KDError
from kd.models import load
from kd.pipeline.execute import check, execute
from kd.pipeline.reproduce import judge, lineage
from kd.stages.base import Room
from kd.stages.splits import load_data
from kd.store import Store
from tests.pipeline import small
from tests.pipeline.small import planned

WORDS = (
    "pipeline=compress", "compress=[prune,quantize,export]", "teacher.name=seed_cnn_small", "fit.epochs=6",
    "fit.lr=0.01", "prune.what=weights", "recover.fit.epochs=0",
    "quantize.fit.epochs=0", "quantize.samples=64", "quantize.sensitivity=false",
)  # fmt: skip


def cards(store: Path, *words: str) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, Path]]:
    """Run it; the stages that ran, each stage's card and folder."""
    return small.cards(store, *WORDS, *words)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    store = tmp_path_factory.mktemp("exported")
    return store, cards(store, "run.latency=true")


def images(store: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The test split as a network without its statistics takes it, and its classes."""
    one, run = planned(store, *WORDS)
    split = load_data(one.nodes[-1].config["data"], Room(run, store)).test
    assert split.images is not None
    return split.images.float() / 255, split.targets


def test_the_chain_ends_in_a_file_and_a_second_run_runs_nothing(exported: Any) -> None:
    store, (ran, found, folders) = exported
    assert ran == ["teacher", "labels", "student", "prune", "quantize", "export"]
    assert cards(store, "run.latency=true")[0] == []
    files = {"model.onnx", "preprocessing.json", "run.py"}
    assert set(found["export"]["files"]) == files
    assert {path.name for path in folders["export"].iterdir()} == files | {"card.json"}


def test_metrics_are_those_of_the_file_over_the_whole_test_split(exported: Any) -> None:
    store, (_, found, folders) = exported
    card = found["export"]
    given, targets = images(store)
    net = load(folders["quantize"])
    logits = answer(session(folders["export"] / "model.onnx"), (given - net.mean) / net.std)
    assert len(targets) == 360
    assert card["metrics"]["test/accuracy"] == (logits.argmax(dim=1) == targets).double().mean().item()
    with torch.no_grad():
        theirs = net(given)
    assert card["metrics"]["test/agreement"] == (logits.argmax(1) == theirs.argmax(1)).double().mean().item() > 0.97
    assert card["export"]["torch_accuracy"] == pytest.approx(found["quantize"]["metrics"]["test/accuracy"])
    assert abs(card["export"]["torch_accuracy"] - card["metrics"]["test/accuracy"]) <= 0.01
    assert card["export"]["difference_in_float"] < 1e-4 and card["export"]["nodes"]["QuantizeLinear"] > 0


def test_the_cost_is_told_of_the_file_as_shipped_and_speed_is_measured_beside_the_teachers(exported: Any) -> None:
    _, (_, found, folders) = exported
    costs, latency = found["export"]["cost"], found["export"]["latency"]
    assert costs["bytes"] == (folders["export"] / "model.onnx").stat().st_size > costs["gzip_bytes"] > 0
    assert costs["nonzero"] < 0.6 * costs["parameters"] and costs["activation_bytes"] > 0
    # The teacher as a file of the same exporter, to compare sizes with.
    told = found["export"]["export"]
    assert told["teacher_bytes"] > costs["bytes"] and told["teacher_gzip_bytes"] > costs["gzip_bytes"]
    for batch in (1, 64):
        row = latency[f"batch{batch}"]
        assert set(row) == {"runtime", "runtime_float", "torch", "teacher_runtime", "teacher_torch"}
        assert all(0 < each["low"] <= each["median"] <= each["high"] for each in row.values())
        assert costs[f"latency_ms_batch{batch}"] == row["runtime"]["median"]


def test_what_goes_with_it_is_the_datas_own(exported: Any) -> None:
    _, (_, found, folders) = exported
    given = json.loads((folders["export"] / "preprocessing.json").read_text())
    data = found["export"]["document"]["config"]["data"]
    assert (given["mean"], given["std"], given["size"], given["mode"]) == (data["mean"], data["std"], 8, "L")
    assert given["classes"] == [str(digit) for digit in range(10)] and given["session"] == []


def test_it_reproduces_to_the_bit_file_and_all(exported: Any, tmp_path: Path) -> None:
    store, (_, found, _) = exported
    artifact = Store(store).get(found["export"]["key"])
    assert artifact is not None
    again = lineage(Store(store), artifact)
    execute(again, Store(tmp_path), planned(tmp_path, *WORDS)[1])
    verdict = judge(Store(store), Store(tmp_path), again)
    assert verdict.word == "bit-identical", verdict.reasons
    second = Store(tmp_path).get(found["export"]["key"])
    assert second is not None
    assert second.card["files"]["model.onnx"]["sha256"] == found["export"]["files"]["model.onnx"]["sha256"]


@pytest.mark.parametrize(
    ("words", "agreement"),
    [
        (("compress=[export]",), 1.0),
        (("compress=[prune,lowrank,export]", "lowrank.least=4", "lowrank.energy=0.5"), 1.0),
        (("quantize.how=weights", "quantize.bits=4"), 1.0),
        (("quantize.how=dynamic",), 0.99),
        (("export.format=pt2",), 1.0),
        (("compress=[export]", "export.format=pt2"), 1.0),
    ],
)
def test_every_kind_of_network_and_of_file(words: tuple[str, ...], agreement: float, exported: Any) -> None:
    store, _ = exported
    ran, found, folders = cards(store, *words)
    assert ran[-1] == "export" and not {"teacher", "labels", "student"} & set(ran)
    card = found["export"]
    assert card["metrics"]["test/agreement"] >= agreement
    assert card["cost"]["bytes"] > 0 and "latency" not in card
    if "export.format=pt2" in words:
        assert (folders["export"] / "model.pt2").exists()
    if "quantize.how=weights" in words:
        given = json.loads((folders["export"] / "preprocessing.json").read_text())
        assert given["session"] == [["session.disable_quant_qdq", "1"]]


def test_a_file_that_does_something_else_is_refused_and_nothing_is_lost(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.compress import export

    store, _ = exported
    real = export.to_onnx

    def other(net: Any, shape: Any) -> Any:
        model, places = real(net, shape)
        for tensor in model.graph.initializer:
            if tensor.name == "head.bias":
                values = np.frombuffer(tensor.raw_data, np.float32) + np.float32(3e-3)
                tensor.raw_data = values.tobytes()
        return model, places

    monkeypatch.setattr(export, "to_onnx", other)
    one, run = planned(store, *WORDS, "export.margin=0.02")
    with pytest.raises(KDError, match=r"logits differ from torch's by 0.003 on test, where rounding makes"):
        execute(one, Store(store), run)
    assert Store(store).get(one.nodes[-2].key) is not None and Store(store).get(one.key) is None


def test_integers_that_lose_more_than_the_margin_are_refused(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = exported
    real = kd.compress.integers.to_integers

    def worse(model: Any, places: Any, net: Any, change: Any, batches: Any = ()) -> Any:
        model, said = real(model, places, net, change, batches)
        for tensor in model.graph.initializer:
            if tensor.name == "head.weight_quantized":
                tensor.raw_data = np.roll(np.frombuffer(tensor.raw_data, np.int8), 5).tobytes()
        return model, said

    monkeypatch.setattr(kd.compress.integers, "to_integers", worse)
    one, run = planned(store, *WORDS, "export.margin=0.03")
    with pytest.raises(KDError, match=r"and torch's 0\.\d+: more is lost than export.margin=0.03, so it is not stored"):
        execute(one, Store(store), run)
    assert Store(store).get(one.key) is None


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("export.format=onx", "export.format='onx' is none of onnx, pt2, pte; did you mean 'onnx'"),
        ("export.margin=-1", "export.margin=-1 is out of range"),
        ("compress=[export,prune]", "Prune cannot follow Export"),
        ("compress=[export,quantize]", "Quantize cannot follow Export"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_planning(word: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *WORDS, word)


def test_what_cannot_be_exported_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.models.nets import SeedCNN

    real = SeedCNN.forward
    one, run = planned(tmp_path, *WORDS)
    with monkeypatch.context() as patch:
        patch.setattr(SeedCNN, "forward", lambda self, x: real(self, torch.special.bessel_j0(x)))
        with pytest.raises(InputError, match=r"SeedCNN cannot be written as ONNX: the exporter has no prims.bessel_j0"):
            check([one], Store(tmp_path), run)
    kept = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda n: kept("no.such" if n == "onnxruntime" else n))
    with pytest.raises(InputError, match=r"export needs onnxruntime: pip install 'kd\[export\]'"):
        check([one], Store(tmp_path), run)
    assert not (tmp_path / "artifacts").exists()


def test_short_names_are_another_file_with_a_hash_of_its_own(exported: Any) -> None:
    store, (_, before, folders) = exported
    ran, found, there = cards(store, "export.names=short")
    assert ran == ["export"] and there["export"] != folders["export"]
    assert found["export"]["cost"]["bytes"] < before["export"]["cost"]["bytes"]
    assert found["export"]["metrics"] == before["export"]["metrics"]


def test_names_of_no_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"export\.names='tiny' is none of"):
        planned(tmp_path, *WORDS, "export.names=tiny")
