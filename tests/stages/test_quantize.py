"""The stage that quantises: its keys, a run of each kind, what survives it, and a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd.compress.grid import integers
from kd.compress.quantize import quantised
from kd.errors import InputError
from kd.models import load, plain, recipe_of
from kd.pipeline.execute import check, execute
from kd.pipeline.jobs import call
from kd.pipeline.reproduce import judge, lineage
from kd.store import Store
from tests.pipeline import small
from tests.pipeline.small import kill_at, planned

WORDS = (
    "pipeline=compress", "compress=[prune,quantize]", "teacher.name=seed_cnn_small", "fit.epochs=6", "fit.lr=0.01",
    "prune.what=weights", "recover.fit.epochs=0", "quantize.fit.epochs=2", "quantize.fit.samples=256",
    "quantize.fit.batch_size=64", "quantize.samples=64",
)  # fmt: skip


def cards(store: Path, *words: str) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, Path]]:
    """Run it; the stages that ran, each stage's card and folder."""
    return small.cards(store, *WORDS, *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    store = tmp_path_factory.mktemp("trained")
    return store, cards(store)


def test_it_is_a_stage_under_the_network_as_it_was_and_a_second_run_runs_nothing(trained: Any) -> None:
    store, (ran, found, _) = trained
    assert ran == ["teacher", "labels", "student", "prune", "quantize"]
    assert cards(store)[0] == []
    card = found["quantize"]
    assert card["document"]["inputs"] == {"model": found["prune"]["key"]}
    assert card["metrics"]["test/agreement"] > 0.9  # with the network as it was
    assert abs(card["metrics"]["test/accuracy"] - found["prune"]["metrics"]["test/accuracy"]) < 0.1
    assert len(card["trace"]["losses"]) == 8


def test_bits_and_epochs_share_what_is_upstream(trained: Any) -> None:
    store, _ = trained
    assert cards(store, "quantize.bits=4", "quantize.fit.epochs=0")[0] == ["quantize"]
    assert cards(store, "quantize.how=weights", "quantize.fit.epochs=0")[0] == ["quantize"]
    assert cards(store, "quantize.how=dynamic", "quantize.fit.epochs=0")[0] == ["quantize"]


def test_weights_are_on_their_values_and_pruned_ones_stay_zero(trained: Any) -> None:
    _, (_, _, folders) = trained
    before, after = (load_file(folders[name] / "model.safetensors") for name in ("prune", "quantize"))
    assert set(before) == set(after)
    for name, weight in after.items():
        if weight.ndim > 1:
            whole, step = integers(weight, 8)
            assert torch.allclose((whole * step).view(weight.shape), weight, rtol=1e-5, atol=0)
            if name != "head.weight":  # the classifier is not pruned
                assert ((before[name] == 0) & (weight != 0)).sum() == 0
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())


def test_the_card_says_what_each_layer_costs_alone(trained: Any) -> None:
    _, (_, found, _) = trained
    report = found["quantize"]["sensitivity"]
    assert list(report["layers"]) == ["conv1.0", "conv2.0", "conv3.0", "dense.0", "head"]
    assert report["samples"] == 64 and 0 < report["accuracy"] <= 1
    assert all(0 < row["error"] < 0.2 and 0 <= row["accuracy"] <= 1 for row in report["layers"].values())


def test_it_reloads_in_a_fresh_process_as_it_computed_and_without_pickle(trained: Any) -> None:
    _, (_, found, folders) = trained
    folder = folders["quantize"]
    change = quantised(recipe_of(folder)["structure"])
    assert change is not None and set(change["layers"]) == {"conv1.0", "conv2.0", "conv3.0", "dense.0", "head"}
    code = (
        "import pickle, sys, torch\n"
        "from pathlib import Path\n"
        "from kd.models import load, weights_digest\n"
        "pickle.load = pickle.loads = torch.load = None\n"
        "net = load(Path(sys.argv[1]))\n"
        "print(weights_digest(net), type(net.net.head).__name__, repr(net(torch.ones(1, 1, 8, 8)).tolist()))\n"
    )
    said = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    net = load(folder)
    with torch.no_grad():
        here = net(torch.ones(1, 1, 8, 8)).tolist()
    assert said.strip() == f"{found['quantize']['weights']} QuantLinear {here!r}"
    assert all(not m._forward_hooks and not nn.utils.parametrize.is_parametrized(m) for m in plain(net).modules())


def test_it_reproduces_to_the_bit(trained: Any, tmp_path: Path) -> None:
    store, (_, found, _) = trained
    artifact = Store(store).get(found["quantize"]["key"])
    assert artifact is not None
    again = lineage(Store(store), artifact)
    execute(again, Store(tmp_path), planned(tmp_path, *WORDS)[1])
    assert judge(Store(store), Store(tmp_path), again).word == "bit-identical"


def test_a_killed_training_goes_on_to_the_same_bits(trained: Any, tmp_path: Path) -> None:
    _, (_, found, _) = trained
    one, run = planned(tmp_path, *WORDS, "run.checkpoint_seconds=0")
    assert "SIGKILL" in call(kill_at, "step", 8 + 24 + 5, one, run)["error"]
    assert execute(one, Store(tmp_path), run) == ["quantize"]
    artifact = Store(tmp_path).get(one.key)
    assert artifact is not None and artifact.card["resumed"] == [4]
    assert artifact.card["weights"] == found["quantize"]["weights"]


def test_it_can_be_a_teacher_and_its_features_can_be_matched(trained: Any) -> None:
    store, _ = trained
    words = (
        "compress=[prune,quantize,{quantize:{bits:4,fit:{epochs:1,samples:128,batch_size:64}}}]",
        "loss@quantize.objective=[ce,kd,hint]", "quantize.objective.hint.student=student.conv2",
        "quantize.objective.hint.teacher=teacher.conv2", "quantize.sensitivity=false",
    )  # fmt: skip
    _, cards_, folders = cards(store, *words)
    again = cards_["quantize2"]
    assert again["document"]["inputs"] == {"model": cards_["quantize"]["key"]}
    assert "sensitivity" not in again
    net = plain(load(folders["quantize2"]))
    assert net.get_submodule("conv2.0").quant.bits == 4
    whole = integers(net.get_submodule("dense.0").weight, 4)[0]
    assert whole.abs().max() == 7


def test_layers_stay_in_float_by_name_or_by_what_they_cost(trained: Any) -> None:
    store, _ = trained
    _, found, folders = cards(store, "quantize.keep=[conv1]", "quantize.fit.epochs=0")
    assert found["quantize"]["said"] == ["conv1.0 stays in float: quantize.keep names it"]
    change = quantised(recipe_of(folders["quantize"])["structure"])
    assert change is not None and set(change["layers"]) == {"conv2.0", "conv3.0", "dense.0", "head"}
    words = ("quantize.bits=4", "quantize.tolerance=0.03", "quantize.fit.epochs=0")
    _, found, folders = cards(store, *words)
    report = found["quantize"]["sensitivity"]
    lost = {path for path, row in report["layers"].items() if report["accuracy"] - row["accuracy"] > 0.03}
    assert {line.partition(" ")[0] for line in found["quantize"]["said"]} == lost
    change = quantised(recipe_of(folders["quantize"])["structure"])
    assert change is not None and set(change["layers"]) == set(report["layers"]) - lost


def test_norms_are_folded_and_the_structure_says_so(tmp_path: Path) -> None:
    words = (
        "student={name: cifar_resnet8, options: {}}", "compress=[quantize]", "fit.epochs=2", "fit.samples=128",
        "quantize.fit.epochs=1", "quantize.fit.samples=128", "quantize.sensitivity=false",
    )  # fmt: skip
    _, found, folders = cards(tmp_path, *words)
    net = plain(load(folders["quantize"]))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert recipe_of(folders["quantize"])["structure"][0]["kind"] == "folded"
    assert found["quantize"]["metrics"]["test/agreement"] > 0.8


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("quantize.bits=5", "quantize.bits=5 is out of range: it must be 8 or 4"),
        ("quantize.how=statik", "did you mean 'static'"),
        ("quantize.samples=3", "quantize.samples=3 is too few to find ranges on: give 16 or more"),
        ("quantize.tolerance=2", "quantize.tolerance=2 is out of range"),
        ("quantize.ranges=max", "quantize.ranges='max' is none of minmax, percentile"),
        ("quantize.keep=conv1", "quantize.keep='conv1': give a list of layers"),
        ("compress=[quantize,prune]", "Prune cannot follow Quantize; first what changes the structure"),
        ("quantize.fit.lr=-1", "lr=-1 is out of range"),
        ("quantize.teacher=nobody", "teacher='nobody' is no stage"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_planning(word: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *WORDS, word)


def test_dynamic_and_four_bits_or_odd_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dynamic knows 8 bits alone"):
        planned(tmp_path, *WORDS, "quantize.how=dynamic", "quantize.bits=4")
    with pytest.raises(InputError, match=r"quantize.block=7 is out of range: it must be 16, 32"):
        planned(tmp_path, *WORDS, "quantize.how=weights", "quantize.bits=4", "quantize.block=7")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("quantize.keep=[conv9]", "quantize.keep: 'conv9' is no layer of SeedCNN; did you mean 'conv"),
        (
            "quantize.keep=[conv1,conv2,conv3,dense,head]",
            "no layer of SeedCNN to quantise: conv1.0: quantize.keep",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(word: str, said: str, tmp_path: Path) -> None:
    one, run = planned(tmp_path, *WORDS, word)
    with pytest.raises(InputError, match=said):
        check([one], Store(tmp_path), run)
    assert not (tmp_path / "artifacts").exists()


def test_more_samples_than_there_are_is_one_line_and_nothing_is_lost(trained: Any) -> None:
    store, _ = trained
    one, run = planned(store, *WORDS, "quantize.samples=100000")
    with pytest.raises(InputError, match=r"^quantize.samples=100000 to find .* the training split has 1197"):
        execute(one, Store(store), run)
    assert cards(store)[0] == []


def test_fields_that_change_nothing_have_one_key(tmp_path: Path) -> None:
    def key(*words: str) -> str:
        return planned(tmp_path, *WORDS, *words)[0].key

    assert key("quantize.block=64") == key()
    four = ("quantize.how=weights", "quantize.bits=4")
    assert key(*four, "quantize.block=64") != key(*four)
    assert key("quantize.how=weights", "quantize.block=64") == key("quantize.how=weights")
    assert key("quantize.how=weights", "quantize.ranges=percentile") == key("quantize.how=weights")
    none = key("quantize.fit.epochs=0")
    assert none == key("quantize.fit.epochs=0", "quantize.fit.lr=1", "quantize.teacher=teacher") != key()
    assert none == key("quantize.fit.epochs=0", "loss@quantize.objective=[ce]")
    assert key("quantize.tolerance=0.1") == key("quantize.tolerance=0.1", "quantize.sensitivity=false") != key()
