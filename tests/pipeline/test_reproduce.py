"""Reproduction: the same bits again, honest words where they are not, and no trust in a stored config."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import kd.launch
from kd.cli import main
from kd.errors import Inconclusive, InputError
from kd.launch import reproduce
from kd.pipeline import reproduce as module
from kd.pipeline.execute import build, execute
from kd.pipeline.jobs import call
from kd.pipeline.reproduce import EXIT, Verdict, checked, judge, lineage
from kd.stages import Distil, Train
from kd.store import Artifact, Store, short
from tests.pipeline.small import kill_at, made, planned


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> tuple[Store, Artifact]:
    """A store with one run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("home")
    card = made(folder)[1]
    return Store(folder), Store(folder).find(card["key"])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """One scratch store for the runs that share a teacher."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture
def copy(home, tmp_path) -> tuple[Store, Artifact]:
    """The same, to be altered."""
    shutil.copytree(home[0].root, tmp_path / "copy")
    store = Store(tmp_path / "copy")
    return store, store.find(home[1].key)


def again(store: Store, found: Artifact, folder: Path, *words: str) -> Verdict:
    """Make a run's whole lineage a second time, here, and judge it."""
    plan = lineage(store, found)
    execute(plan, Store(folder), planned(folder, *words)[1])
    return judge(store, Store(folder), plan)


def alter(artifact: Artifact, change: Any) -> Artifact:
    """The artifact with its card changed by hand."""
    path = artifact.path / "card.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))
    return Artifact(artifact.key, artifact.path, card)


def contents(root: Path) -> set[str]:
    """All that stands in a folder."""
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def test_a_fresh_run_is_made_again_from_its_card_alone_bit_by_bit(home):
    store, found = home
    before = contents(store.root)
    verdict, plan, _ = reproduce(short(found.key), [], str(store.root), None, keep=False)
    assert (verdict.word, verdict.exit_code, verdict.reasons) == ("bit-identical", 0, [])
    assert [s["stage"] for s in verdict.stages] == [n.name for n in plan.nodes] == ["teacher", "labels", "student"]
    assert all(m["first"] == m["second"] for s in verdict.stages for m in s["metrics"])
    assert verdict.stages[-1]["weights"] == found.card["weights"]
    assert {"test/accuracy", "cost/parameters", "cost/macs", "cost/bytes"} <= {
        m["name"] for m in verdict.stages[-1]["metrics"]
    }
    assert contents(store.root) == before


@pytest.mark.parametrize(
    ("moment", "at"), [("step", 6), ("before the checkpoint of an epoch's end", 1), ("validation", 1)]
)
def test_a_run_that_was_killed_and_resumed_is_bit_identical(moment, at, home, scratch):
    store, _ = home
    one, run = planned(store.root, f"alpha=0.{at}", f"temperature={len(moment)}", "run.checkpoint_seconds=0")
    assert "SIGKILL" in call(kill_at, moment, at, one, run)["error"]
    execute(one, store, run)
    found = store.get(one.key)
    assert found is not None and found.card["resumed"]
    assert again(store, found, scratch).word == "bit-identical"


@pytest.mark.parametrize(
    "words",
    [
        ("run.workers=0", "run.memory_gb=0", "run.validate_every=0"),
        ("run.workers=2", "run.validate_every=2", "run.log_every=1", "run.checkpoint_seconds=0"),
        ("run/logger=[csv]", "run.wandb=offline", "run.log_every=3"),
    ],
    ids=" ".join,
)
def test_with_other_values_under_run_it_is_bit_identical(words, home, tmp_path):
    assert again(*home, tmp_path, *words).word == "bit-identical"


def test_with_another_number_of_threads_it_is_within_tolerance_and_says_why(home):
    store, found = home
    recorded = found.card["fingerprints"]["environment"]["threads"]
    other = 1 if recorded > 1 else 2
    verdict, _, _ = reproduce(found.key, [], str(store.root), other, keep=False)
    # A net as small as this may come out the same: then nothing is to be explained.
    assert verdict.word in ("bit-identical", "within tolerance")
    assert all(f"threads: {recorded} -> {other}" in reason for reason in verdict.reasons)
    assert (verdict.word == "bit-identical") == (verdict.reasons == [])


# Judging: the second making is a copy of the first, changed by hand, so that each word is told for a known reason.


def drift(card: dict[str, Any]) -> None:
    """What another order of summing does: every bit of the weights, the sixth digit of the rest."""
    card["weights"] = "f" * 64
    card["files"]["model.safetensors"]["sha256"] = "f" * 64
    card["trace"]["losses"][2] *= 1 + 1e-6
    card["metrics"]["test/loss"] *= 1 + 1e-6
    card["metrics"]["test/accuracy"] += 0.004
    card["metrics"]["test/f1_per_class"][3] += 0.015


def test_small_differences_under_other_threads_are_within_tolerance(home, copy):
    def change(card):
        drift(card)
        card["fingerprints"]["environment"] |= {"threads": 77}

    threads = home[1].card["fingerprints"]["environment"]["threads"]
    alter(copy[1], change)
    verdict = judge(home[0], copy[0], lineage(*home))
    assert (verdict.word, verdict.exit_code) == ("within tolerance", 0)
    [reason] = verdict.reasons
    assert f"student {short(home[1].key)}: first differs in the loss of step 3" in reason
    assert reason.endswith(f"largest change of a metric 0.015, because of threads: {threads} -> 77")
    assert [stage["word"] for stage in verdict.stages] == ["bit-identical", "bit-identical", "within tolerance"]


def test_small_differences_without_a_reason_say_so(home, copy):
    alter(copy[1], drift)
    assert judge(home[0], copy[0], lineage(*home)).reasons[0].endswith("though code and environment are the same")


def test_what_the_older_kd_did_not_record_is_no_reason(home, copy):
    def change(card):
        drift(card)
        del card["fingerprints"]["environment"]["capability"]

    alter(copy[1], change)
    assert "capability" not in judge(home[0], copy[0], lineage(*home)).reasons[0]


def test_other_code_is_named_as_the_reason(home, copy):
    def change(card):
        drift(card)
        card["fingerprints"]["code"]["digest"] = "0" * 64

    alter(copy[1], change)
    assert judge(home[0], copy[0], lineage(*home)).reasons[0].endswith("because of the code of kd")


@pytest.mark.parametrize("name", ["test/accuracy", "test/f1", "test/loss", "val/ece"])
@pytest.mark.parametrize("by", [1e-9, 0.5])
def test_a_metric_that_was_altered_differs_and_is_named(name, by, home, copy):
    altered = alter(copy[1], lambda card: card["metrics"].update({name: card["metrics"][name] + by}))
    verdict = judge(copy[0], home[0], lineage(copy[0], altered))
    assert (verdict.word, verdict.exit_code) == ("differs", 1)
    recorded, now = altered.card["metrics"][name], home[1].card["metrics"][name]
    assert f"{name}: recorded {recorded!r}, now {now!r}" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda card: card.update(weights="0" * 64),
            "first differs in the weights at the end (0000000000000000…, now ",
        ),
        (
            lambda card: card["trace"]["epochs"][0].update(weights="0" * 64),
            "first differs in the weights after epoch 0",
        ),
        (
            lambda card: card["trace"]["epochs"][1].update({"train/kd": 1.5}),
            "first differs in train/kd of epoch 1 (1.5, now ",
        ),
        (lambda card: card["trace"]["losses"].__setitem__(4, 0.5), "first differs in the loss of step 5 (0.5, now "),
        (lambda card: card["trace"]["losses"].pop(), "7 losses are recorded, now there are 8"),
        (lambda card: card["trace"]["epochs"].pop(), "1 epochs are recorded, now there are 2"),
        (lambda card: card["cost"].update(parameters=1), "cost/parameters: recorded 1, now 4778"),
        (lambda card: card["metrics"].pop("test/f1"), "test/f1: recorded None, now 0."),
    ],
)
def test_weights_or_a_history_that_were_altered_differ_and_the_place_is_named(change, said, home, copy):
    altered = alter(copy[1], change)
    verdict = judge(copy[0], home[0], lineage(copy[0], altered))
    assert (verdict.word, verdict.exit_code) == ("differs", 1)
    assert said in verdict.reasons[0]


def test_a_result_outside_every_tolerance_differs_and_names_step_and_metric(home, copy):
    def change(card):
        drift(card)
        card["metrics"]["test/accuracy"] -= 0.05

    alter(copy[1], change)
    verdict = judge(home[0], copy[0], lineage(*home))
    assert verdict.word == "differs"
    assert "the loss of step 3" in verdict.reasons[0] and "; test/accuracy: recorded" in verdict.reasons[0]


def test_a_teacher_that_differs_makes_the_run_differ(home, copy):
    teacher = copy[0].find(lineage(*copy).nodes[0].key)
    alter(teacher, lambda card: card["metrics"].update({"test/accuracy": 0.5}))
    verdict = judge(home[0], copy[0], lineage(*home))
    assert verdict.word == "differs" and verdict.reasons[0].startswith("teacher ")


def test_within_the_spread_of_three_seeds_is_said_only_of_other_weights(home, copy, tmp_path):
    store, found = copy
    for seed, accuracy in ((1, 0.90), (2, 0.96)):
        card = made(store.root, f"seed={seed}")[1]
        alter(store.find(card["key"]), lambda c, a=accuracy: c["metrics"].update({"test/accuracy": a}))
    alter(found, lambda card: card["metrics"].update({"test/accuracy": 0.93}))
    shutil.copytree(home[0].root, tmp_path / "second")
    second = Store(tmp_path / "second")

    def judged(change) -> Verdict:
        shutil.copy(found.path / "card.json", second.folder(found.key))
        alter(second.find(found.key), change)
        return judge(store, second, lineage(store, found))

    def other(accuracy):
        def change(card):
            drift(card)
            card["metrics"]["test/accuracy"] = accuracy

        return change

    near, far = judged(other(0.89)), judged(other(0.86))
    assert (near.word, near.exit_code, far.word) == ("within seed spread", 0, "differs")
    assert "test/accuracy 0.8900 is within two standard deviations of 3 seeds (0.9300 on average)" in near.reasons[0]
    assert judged(lambda card: card["metrics"].update({"test/accuracy": 0.92})).word == "differs"
    for key in [a.key for a in store if a.card["document"]["config"].get("seed") == 2]:
        store.remove(key)
    assert judged(other(0.89)).word == "differs"


def test_the_worst_stage_gives_the_word_and_its_exit_code():
    assert [Verdict(word).exit_code for word in EXIT] == [0, 0, 0, 1, 3]
    assert module._worse("within tolerance", "differs") == module._worse("differs", "bit-identical") == "differs"


# Inconclusive.


def test_without_the_teachers_card_it_is_inconclusive(copy, capsys):
    store, found = copy
    store.remove(lineage(*copy).nodes[0].key)
    with pytest.raises(Inconclusive, match=r"was made from teacher \w{16}, whose card is not in the store"):
        lineage(store, found)
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", found.key, "--store", str(store.root)])
    assert ended.value.code == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_second_card_it_is_inconclusive(home, tmp_path):
    verdict = judge(home[0], Store(tmp_path), lineage(*home))
    assert (verdict.word, verdict.exit_code) == ("inconclusive", 3)


def test_without_the_data_it_is_inconclusive(tmp_path):
    from PIL import Image

    for part in ("train", "val"):
        for label in "ab":
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / "images" / part / label / f"{i}.png")
    words = ("pipeline=baseline", "data=imagefolder", f"data.folder={tmp_path / 'images'}", "data.validation=2")
    store = Store(tmp_path / "store")
    card = made(store.root, *words, "fit.samples=null", "fit.batch_size=3")[1]
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(Inconclusive, match="no train/") as ended:
        reproduce(card["key"], [], str(store.root), None, keep=False)
    assert ended.value.exit_code == 3


def test_another_version_of_a_stage_is_code_that_is_missing(home, monkeypatch):
    monkeypatch.setattr(Train, "VERSION", 2)
    with pytest.raises(Inconclusive, match=r"made by version 1 of kd.stages.Train, and this kd has 2"):
        lineage(*home)


# A stored config is a stranger's data.


def forge(store: Store, found: Artifact, change: Any) -> Artifact:
    """A run whose document was changed and whose key was made to fit, as only ill will does."""
    card = deepcopy(found.card)
    change(card["document"])
    text = json.dumps(card["document"], sort_keys=True, separators=(",", ":"))
    card["key"] = hashlib.sha256(b"kd-key-v1\0" + text.encode()).hexdigest()
    folder = store.root / "artifacts" / short(card["key"])
    shutil.copytree(found.path, folder)
    (folder / "card.json").write_text(json.dumps(card))
    return Artifact(card["key"], folder, card)


def test_a_forged_key_is_the_key_of_its_document(copy):
    forged = forge(*copy, lambda document: document["config"].update(seed=5))
    assert checked(forged)["config"]["seed"] == 5


@pytest.fixture
def nothing_runs(copy, monkeypatch, tmp_path):
    """No child is started, nothing is written but what the test itself forges, no target's module is imported."""

    def refuse(*_, **__):
        raise AssertionError("something was run")

    monkeypatch.setattr(kd.launch.children, "call", refuse)
    monkeypatch.delitem(sys.modules, "this", raising=False)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    yield
    assert "this" not in sys.modules
    assert all(path.startswith("copy/artifacts/") for path in contents(tmp_path) - before)


def at(*path: str, value: Any) -> Any:
    """A change of one place of a document."""

    def change(document):
        node = document
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value

    return change


EVIL = [
    (at("config", "seed", value="${oc.env:HOME}"), "still holds the interpolation"),
    (at("config", "student", "name", value="x${oc.env:HOME}"), "still holds the interpolation"),
    (at("config", "seed", value="???"), "is not set"),
    (at("config", "student", "_target_", value="torch.load"), "config.student: _target_ 'torch.load' is outside"),
    (at("config", "student", value={"_target_": "builtins.open", "file": "owned", "mode": "w"}), "'builtins.open'"),
    (at("config", "objective", "kd", "loss", value={"_target_": "os.system", "command": "touch owned"}), "'os.system'"),
    (at("config", "fit", "optimiser", "_target_", value="this.s"), "'this.s' is outside"),
    (at("config", "data", "_target_", value="pickle.loads"), "config.data: _target_ 'pickle.loads'"),
    (at("config", "data", "mean", value=[{"_target_": "os.system", "command": "touch owned"}]), "config.data.mean[0]"),
    (at("config", "student", "options", value={"widths": {"_target_": "eval"}}), "options.widths: _target_ 'eval'"),
    (at("stage", value="os.system"), "'os.system' is no stage"),
    (at("stage", value="kd.cli.main"), "'kd.cli.main' is no stage"),
    (at("stage", value="kd.stages.code_print"), "code_print"),
    (at("stage", value="kd.stages.fingerprints.environment_print"), "environment_print"),
    (at("stage", value="kd.stages.base.Room"), "Room"),
    (at("stage", value=["kd.stages.Train"]), "is no stage"),
    (at("schema", value=2), "written under schema 2; this kd reads 1"),
    (at("extra", value={}), "is no key document"),
    (lambda document: document.pop("version"), "is no key document"),
    (at("config", value=[]), "is no mapping of a stage's fields"),
    (at("config", "_target_", value="kd.stages.Train"), "is no mapping of a stage's fields"),
    (at("config", "sede", value=1), "config.sede is not a field of kd.stages.Distil; did you mean 'seed'"),
    (lambda document: document["config"].pop("seed"), "missing a required argument: 'seed'"),
    (at("config", "fit", "epocs", value=1), "config.fit.epocs is not a field"),
    (at("config", "fit", "epochs", value=[1]), "config.fit.epochs=[1] is no whole number"),
    (at("inputs", "teacher", value="../../../../etc"), "'../../../../etc' is no key"),
    (at("inputs", "teacher", value=7), "'7' is no key"),
    (at("inputs", "teacher", value="AB" * 32), "is no key"),
]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("change", "said"), EVIL, ids=[said for _, said in EVIL])
def test_a_config_that_no_plan_could_have_written_is_refused_before_anything_happens(change, said, copy, capsys):
    store, found = copy
    forged = forge(store, found, change)
    with pytest.raises(InputError) as refused:
        reproduce(forged.key, [], str(store.root), None, keep=False)
    assert said in str(refused.value) and refused.value.exit_code == 2
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", forged.key, "--store", str(store.root)])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (store.root / "scratch").exists()


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "path", [("config", "seed"), ("config", "fit", "lr"), ("config", "objective", "kd", "loss", "temperature")], ids=str
)
def test_a_number_of_the_config_that_was_altered_by_hand_is_refused(path, copy):
    store, found = copy
    alter(found, lambda card: at(*path, value=12)(card["document"]))
    with pytest.raises(InputError, match=r"the recorded config now hashes to \w{16}: it was altered after the run"):
        reproduce(found.key, [], str(store.root), None, keep=False)


@pytest.mark.usefixtures("nothing_runs")
def test_a_parents_config_that_was_altered_is_refused_too(copy):
    store, found = copy
    teacher = store.find(lineage(*copy).nodes[0].key)
    alter(teacher, lambda card: at("config", "fit", "epochs", value=1)(card["document"]))
    with pytest.raises(InputError, match=f"{short(teacher.key)}: the recorded config now hashes to"):
        reproduce(found.key, [], str(store.root), None, keep=False)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("stage",), "../../../x"), (("stage",), "a\nb"), (("stage",), None), (("run",), []), (("dials",), "x"),
        (("metrics",), [1]), (("trace",), "x"), (("trace", "losses"), {"a": 1}), (("trace", "epochs"), [1]),
        (("fingerprints",), {}), (("fingerprints", "code"), "x"), (("fingerprints", "environment"), []),
        (("fingerprints", "environment", "threads"), 10**9), (("fingerprints", "environment", "threads"), "2"),
        (("fingerprints", "environment", "threads"), 0), (("cost",), 3),
    ],
    ids=str,
)  # fmt: skip
def test_a_card_whose_other_parts_are_of_another_shape_is_refused(path, value, copy):
    store, found = copy
    alter(found, at(*path, value=value))
    with pytest.raises(InputError, match=r"the card's [\w.]+ is not what kd writes"):
        reproduce(found.key, [], str(store.root), None, keep=False)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd", "../card.json"])
def test_a_file_outside_the_artifact_is_not_looked_at(name, copy):
    store, found = copy
    alter(found, lambda card: card["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(InputError, match="cannot be read"):
        reproduce(found.key, [], str(store.root), None, keep=False)


def test_a_knob_that_came_later_has_its_frozen_value_whatever_the_default_is_now(home, tmp_path, monkeypatch):
    before = home[1].card["document"]["config"]["fit"]["gamma"]
    monkeypatch.setattr(Distil, "SINCE", {"fit.gamma": before})
    one, _ = planned(tmp_path)
    text = one.nodes[-1].document
    assert "gamma" not in text["config"]["fit"] and one.key != home[1].key
    monkeypatch.setattr(Distil, "SINCE", {"fit.gamma": 0.25})  # as if today's default were another one
    assert build(text).fit == {**one.nodes[-1].config["fit"], "gamma": 0.25}


def test_only_where_and_how_loudly_may_be_given(home):
    with pytest.raises(InputError, match="anything else would be another run"):
        reproduce(home[1].key, ["seed=3"], str(home[0].root), None, keep=False)


def test_a_package_of_the_users_own_must_be_trusted_by_name(copy):
    store, found = copy
    forged = forge(store, found, at("config", "student", "_target_", value="mine.nets.tiny"))
    with pytest.raises(InputError, match=r"'mine.nets.tiny' is outside .* run.trusted"):
        lineage(store, forged)
    assert lineage(store, forged, ["mine"]).key == forged.key


@pytest.mark.gpu
def test_on_a_gpu_a_run_is_bit_identical_and_one_of_the_cpu_is_judged(tmp_path, home):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    store = Store(tmp_path / "store")
    card = made(store.root, "run.accelerator=gpu")[1]
    verdict, _, _ = reproduce(card["key"], ["run.accelerator=gpu"], str(store.root), None, keep=False)
    assert verdict.word == "bit-identical"
    moved, _, _ = reproduce(home[1].key, ["run.accelerator=gpu"], str(home[0].root), None, keep=False)
    assert moved.word in EXIT and moved.word != "inconclusive"
