"""The stages that compress: their keys, a run of each, what survives training, a kill and a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd.compress.masks import sparsity
from kd.errors import InputError
from kd.models import load, plain
from kd.pipeline.execute import check, execute
from kd.pipeline.jobs import call
from kd.pipeline.plan import in_order
from kd.pipeline.reproduce import judge, lineage
from kd.stages import FineTune, LowRank, Prune
from kd.store import Store
from tests.pipeline.small import kill_at, planned

WORDS = (
    "pipeline=compress", "teacher.name=seed_cnn_small", "recover.fit.epochs=2", "recover.fit.samples=256",
    "recover.fit.batch_size=64", "fit.epochs=6", "fit.lr=0.01",
)  # fmt: skip


def cards(store: Path, *words: str) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, Path]]:
    """Run it; the stages that ran, each stage's card and folder."""
    one, run = planned(store, *WORDS, *words)
    ran = execute(one, Store(store), run)
    found = {node.name: Store(store).get(node.key) for node in one.nodes}
    return ran, {n: a.card for n, a in found.items() if a}, {n: a.path for n, a in found.items() if a}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    store = tmp_path_factory.mktemp("both")
    return store, cards(store, "compress=[prune,lowrank]", "lowrank.least=4", "lowrank.energy=0.5")


def test_each_step_and_its_recovery_are_stages_and_a_second_run_runs_nothing(both: Any) -> None:
    store, (ran, found, _) = both
    assert ran == ["teacher", "labels", "student", "prune", "prune_recover", "lowrank", "lowrank_recover"]
    assert cards(store, "compress=[prune,lowrank]", "lowrank.least=4", "lowrank.energy=0.5")[0] == []
    assert all({"test/accuracy", "test/agreement", "val/loss"} <= set(found[name]["metrics"]) for name in ran[3:])
    assert found["lowrank"]["cost"]["parameters"] < found["prune_recover"]["cost"]["parameters"]


def test_an_upstream_stage_is_shared(both: Any) -> None:
    store, _ = both
    assert cards(store, "compress=[prune]")[0] == []
    assert cards(store, "compress=[prune]", "prune.amount=0.7")[0] == ["prune", "prune_recover"]
    assert cards(store, "compress=[prune]", "prune.amount=0.7", "temperature=2")[0] == [
        "student", "prune", "prune_recover",
    ]  # fmt: skip


def test_masks_survive_training_and_are_baked_in(both: Any) -> None:
    _, (_, found, folders) = both
    before, after = (load_file(folders[name] / "model.safetensors") for name in ("prune", "prune_recover"))
    masked = [name for name, value in before.items() if (value == 0).any() and name.endswith("weight")]
    assert masked and all((after[name] == 0).equal(before[name] == 0) for name in masked)
    assert not all(after[name].equal(before[name]) for name in masked)
    assert set(after) == set(load_file(folders["student"] / "model.safetensors"))
    total, left = sparsity(plain(load(folders["prune"])))
    assert total == found["student"]["cost"]["parameters"] and left == pytest.approx(0.5 * total, rel=0.1)


def test_a_compressed_model_reloads_in_a_fresh_process_with_its_structure_and_without_pickle(both: Any) -> None:
    _, (_, found, folders) = both
    folder = folders["lowrank_recover"]
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jsonl"}
    code = (
        "import pickle, sys, torch\n"
        "from pathlib import Path\n"
        "from kd.models import load, weights_digest\n"
        "pickle.load = pickle.loads = torch.load = None\n"
        "net = load(Path(sys.argv[1]))\n"
        "print(weights_digest(net), repr(net(torch.ones(1, 1, 8, 8)).tolist()))\n"
    )
    said = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        here = load(folder)(torch.ones(1, 1, 8, 8)).tolist()
    assert said.strip() == f"{found['lowrank_recover']['weights']} {here!r}"


def test_it_reproduces_to_the_bit(both: Any, tmp_path: Path) -> None:
    store, _ = both
    one, run = planned(store, *WORDS, "compress=[prune,lowrank]", "lowrank.least=4", "lowrank.energy=0.5")
    artifact = Store(store).get(one.key)
    assert artifact is not None
    again = lineage(Store(store), artifact)
    execute(again, Store(tmp_path), run)
    assert judge(Store(store), Store(tmp_path), again).word == "bit-identical"


def test_a_killed_recovery_goes_on_to_the_same_bits_with_its_masks(both: Any, tmp_path: Path) -> None:
    _, (_, found, _) = both
    words = ("compress=[prune]", "run.checkpoint_seconds=0")
    one, run = planned(tmp_path, *WORDS, *words)
    steps = 8 + 24  # teacher and student
    assert "SIGKILL" in call(kill_at, "step", steps + 7, one, run)["error"]
    assert execute(one, Store(tmp_path), run) == ["prune_recover"]
    artifact = Store(tmp_path).get(one.key)
    assert artifact is not None and artifact.card["resumed"] == [6]
    assert artifact.card["weights"] == found["prune_recover"]["weights"]
    assert artifact.card["trace"] == found["prune_recover"]["trace"]


def test_a_pattern_holds_through_training(tmp_path: Path) -> None:
    _, found, folders = cards(tmp_path, "compress=[prune]", "prune.pattern=2:4", "fit.epochs=2")
    weight = load_file(folders["prune_recover"] / "model.safetensors")["conv2.0.weight"]
    assert ((weight.movedim(1, -1).reshape(-1, 4) != 0).sum(dim=1) <= 2).all()
    assert found["prune"]["said"] == ["conv1.0.weight stays whole: its inputs are no multiple of 2:4"]


def test_a_network_that_collapses_is_kept_marked_and_said(tmp_path: Path) -> None:
    lines: list[str] = []
    words = ("compress=[prune]", "prune.amount=0.97", "prune.by=random", "recover.fit.epochs=0", "fit.epochs=12")
    one, run = planned(tmp_path, *WORDS, *words)
    execute(one, Store(tmp_path), run, lambda e: lines.append(e["line"]) if e["event"] == "say" else None)
    found = Store(tmp_path).get(one.key)
    assert found is not None and found.card["marks"] == ["collapsed"]
    assert any("prune: the accuracy on validation collapsed from 0." in line and "is kept" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune.keep=[conv9]"], "'conv9' is no layer of SeedCNN; did you mean 'conv3'"),
        (["prune.keep=[conv1,conv2,conv3,dense]"], "prune.keep leaves no layer"),
        (["compress=[lowrank]", "lowrank.keep=[convv1]"], "lowrank.keep: 'convv1' is no layer"),
        (["loss=[ce,kd,hint]", "loss.hint.student=student.conv2", "loss.hint.teacher=teacher.nope"], "nope"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(words: list[str], said: str, tmp_path: Path) -> None:
    one, run = planned(tmp_path, *WORDS, *words)
    with pytest.raises(InputError, match=said):
        check([one], Store(tmp_path), run)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("prune.amount=1.5", "prune.amount=1.5 is no share between 0 and 1"),
        ("prune.by=talyor", "did you mean 'taylor'"),
        ("prune.what=filters", "prune.what='filters' is none of"),
        ("prune.pattern='4:2'", "no pattern N:M"),
        ("prune.samples=0", "prune.samples=0 is no number of samples"),
        ("prune.keep=conv1", "give a list of layers"),
        ("recover.fit.lr=-1", "lr=-1 is out of range"),
        ("recover.fit.lrr=1", "recover.fit.lrr is not in the config"),
        ("recover.teacher=nobody", "teacher='nobody' is no stage"),
        ("compress=[prune,quantise]", "'quantise' is no step"),
        ("compress=prune", "compress='prune' is no list; write one, e.g. "),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_planning(word: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *WORDS, word)


def test_more_samples_than_there_are_is_one_line(tmp_path: Path) -> None:
    one, run = planned(tmp_path, *WORDS, "prune.samples=100000", "fit.epochs=1")
    with pytest.raises(InputError, match=r"^samples=100000 .* the training split has 1197"):
        execute(one, Store(tmp_path), run)


def test_fields_that_change_nothing_have_one_key(tmp_path: Path) -> None:
    def key(*words: str) -> str:
        return planned(tmp_path, *WORDS, *words)[0].key

    assert key("prune.by=magnitude", "prune.samples=3") == key("prune.by=magnitude")
    assert key("prune.samples=3") != key()
    assert key("prune.pattern=2:4", "prune.amount=0.3") == key("prune.pattern=2:4")
    assert key("prune.keep=[conv2,conv1]") == key("prune.keep=[conv1,conv2,conv1]") != key()
    assert key("compress=[lowrank]", "lowrank.budget=0.1") == key("compress=[lowrank]")
    assert key("prune.steps=1") == key() != key("prune.steps=2")


def test_structure_comes_before_numbers_and_these_before_a_file() -> None:
    class Quantize:
        PHASE = "numbers"

    class Export:
        PHASE = "file"

    for kind, before in (
        (Prune, LowRank),
        (FineTune, Prune),
        (Quantize, FineTune),
        (Export, Quantize),
        (Export, Prune),
    ):
        in_order("x", kind, before)
    for kind, before in ((Prune, Quantize), (FineTune, Quantize), (Quantize, Export), (Export, Export)):
        with pytest.raises(InputError, match=f"{kind.__name__} cannot follow {before.__name__}; first what changes"):
            in_order("x", kind, before)
