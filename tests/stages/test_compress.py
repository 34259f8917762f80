"""Compression as stages: shared, run once, reproduced, reloaded in a fresh process, marked where it went wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd.errors import InputError
from kd.models import load
from kd.pipeline.execute import check, execute
from kd.pipeline.plan import in_order
from kd.pipeline.reproduce import judge, lineage
from kd.stages import FineTune, LowRank, Prune
from kd.stages.base import Room
from kd.stages.compress import STARTED, _mark
from kd.store import Artifact, Store
from kd.training.settings import Run
from tests.pipeline.small import planned
from tests.stages.compressing import BOTH, WORDS, cards


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    store = tmp_path_factory.mktemp("both")
    return store, cards(store, *BOTH)


def test_each_step_and_its_recovery_are_stages_and_a_second_run_runs_nothing(both: Any) -> None:
    store, (ran, found, _) = both
    assert ran == ["teacher", "labels", "student", "prune", "prune_recover", "lowrank", "lowrank_recover"]
    assert cards(store, *BOTH)[0] == []
    assert all({"test/accuracy", "test/agreement", "val/loss"} <= set(found[name]["metrics"]) for name in ran[3:])
    sizes = [found[name]["cost"]["parameters"] for name in ("student", "prune", "lowrank")]
    assert sizes[0] > sizes[1] > sizes[2]
    assert found["prune"]["cost"]["macs"] <= 0.5 * found["student"]["cost"]["macs"]


def test_an_upstream_stage_is_shared(both: Any) -> None:
    store, _ = both
    assert cards(store, "compress=[prune]")[0] == []
    assert cards(store, "compress=[prune]", "prune.amount=0.7")[0] == ["prune", "prune_recover"]
    assert cards(store, "compress=[prune]", "prune.amount=0.7", "temperature=2")[0] == [
        "student", "prune", "prune_recover",
    ]  # fmt: skip


def test_a_compressed_model_reloads_in_a_fresh_process_with_its_structure_and_without_pickle(both: Any) -> None:
    _, (_, found, folders) = both
    folder = folders["lowrank_recover"]
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jsonl"}
    structure = json.loads((folder / "model.json").read_text())["structure"]
    assert [change["kind"] for change in structure] == ["pruned", "lowrank"] and structure[0]["left"]["macs"] <= 0.5
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
    one, run = planned(store, *WORDS, *BOTH)
    artifact = Store(store).get(one.key)
    assert artifact is not None
    again = lineage(Store(store), artifact)
    execute(again, Store(tmp_path), run)
    assert judge(Store(store), Store(tmp_path), again).word == "bit-identical"


def test_a_compressed_model_is_a_teacher_and_a_student_again(both: Any) -> None:
    store, _ = both
    hint = ("loss=[ce,kd,hint]", "loss.hint.student=student.conv2", "loss.hint.teacher=teacher.conv2", "seed=1")
    pupil = (
        "+pipeline.stages.pupil={_target_: kd.stages.Distil, inputs: {teacher: compress}, student: '${student}', "
        "data: '${data}', objective: '${loss}', fit: '${fit}', seed: 2, views: null, view_seed: null, live: false}"
    )
    ran, found, folders = cards(store, "compress=[prune]", *hint, pupil)
    assert ran == ["student", "prune", "prune_recover", "pupil"]
    narrow, wide = (load(folders[name]).net.conv2[0].out_channels for name in ("prune_recover", "pupil"))
    assert narrow < wide  # the hint bridges the two widths, with the narrow network on either side
    assert found["pupil"]["metrics"]["test/agreement"] > 0


def test_a_network_that_collapses_is_kept_marked_and_said(tmp_path: Path) -> None:
    lines: list[str] = []
    words = ("compress=[prune]", "prune.amount=0.9", "prune.by=random", "recover.fit.epochs=0", "fit.epochs=12")
    one, run = planned(tmp_path, *WORDS, *words)
    execute(one, Store(tmp_path), run, lambda e: lines.append(e["line"]) if e["event"] == "say" else None)
    found = Store(tmp_path).get(one.key)
    assert found is not None and found.card["marks"] == ["collapsed"]
    assert any("prune: the accuracy on validation collapsed from 0." in line and "is kept" in line for line in lines)


@pytest.mark.parametrize(
    ("start", "before", "now", "marks"),
    [
        (None, 0.9, 0.4, True),
        (None, 0.9, 0.6, False),
        (None, 0.1, 0.1, False),
        (None, 0.08, 0.07, False),
        (0.9, 0.2, 0.4, True),  # a recovery is measured by what the network began with, not by the wreck it was given
        (0.9, 0.2, 0.6, False),
    ],
)
def test_a_network_collapses_that_loses_most_of_what_it_had_above_chance(
    start: float | None, before: float, now: float, marks: bool
) -> None:
    lines: list[Any] = []
    splits: Any = SimpleNamespace(classes=list(range(10)))
    room = Room(Run(), Path(), tell=lines.append)
    source = Artifact("k", Path(), {"metrics": {"val/accuracy": before}, **({STARTED: start} if start else {})})
    found = _mark({"metrics": {"val/accuracy": now}}, source, splits, room)
    assert ("marks" in found) is bool(lines) is marks
    assert found[STARTED] == (start or before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune.keep=[conv9]"], "'conv9' is no layer of SeedCNN; did you mean 'conv3'"),
        (["prune.amount=0.99"], r"prune: amount=0.99 of the macs cannot go: .* lower amount"),
        (["prune.what=weights", "prune.keep=[conv1,conv2,conv3,dense]"], "prune.keep leaves no layer"),
        (["compress=[lowrank]", "lowrank.keep=[convv1]"], "lowrank.keep: 'convv1' is no layer"),
        (["loss=[ce,kd,hint]", "loss.hint.student=student.conv2", "loss.hint.teacher=teacher.nope"], "nope"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(words: list[str], said: str, tmp_path: Path) -> None:
    one, run = planned(tmp_path, *WORDS, *words)
    with pytest.raises(InputError, match=said):
        check([one], Store(tmp_path), run)
    assert not (tmp_path / "artifacts").exists()


def test_more_samples_than_there_are_is_one_line(tmp_path: Path) -> None:
    one, run = planned(tmp_path, *WORDS, "prune.samples=100000", "fit.epochs=1")
    with pytest.raises(InputError, match=r"^samples=100000 .* the training split has 1197"):
        execute(one, Store(tmp_path), run)


def test_structure_comes_before_numbers_and_these_before_a_file() -> None:
    class Quantize:
        PHASE = "numbers"

    class Export:
        PHASE = "file"

    for kind, before in ((Prune, LowRank), (FineTune, Prune), (Quantize, FineTune), (Export, Quantize)):
        in_order("x", kind, before)
    for kind, before in ((Prune, Quantize), (FineTune, Quantize), (Quantize, Export), (Export, Export)):
        with pytest.raises(InputError, match=f"{kind.__name__} cannot follow {before.__name__}; first what changes"):
            in_order("x", kind, before)
