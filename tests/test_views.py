"""What the reading commands show: states, reasons, filters, and lines that fit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kd.views as views
from kd.errors import InputError
from kd.pipeline.reproduce import Verdict
from kd.store import Store, digest, short
from kd.views import (
    SPARE,
    diff_view,
    health,
    hits_note,
    ls_rows,
    made_otherwise,
    plain,
    plan_data,
    plan_view,
    rows_table,
    show_view,
    verdict_view,
)
from tests.report.cards import TEACHER, card
from tests.shelf import of_now, plan_of, shelve, small_family, text


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return shelve(tmp_path_factory.mktemp("shelf"), small_family())


@pytest.fixture(scope="module")
def made(shelf):
    """The artifacts by what they are."""
    cards = list(shelf)
    distilled = [a for a in cards if a.card["document"]["inputs"].get("labels")]
    return {
        "teacher": next(a for a in cards if a.card["stage"] == "teacher" and a.card["cost"]["parameters"] > 10**4),
        "alone": next(a for a in cards if a.card["stage"] == "teacher" and a.card["cost"]["parameters"] < 10**4),
        "labels": next(a for a in cards if a.card["stage"] == "labels"),
        "student": next(a for a in distilled if a.card["dials"]["temperature"] == 4),
        "other": next(a for a in distilled if a.card["dials"]["temperature"] == 1),
    }


def changed(of, path, value):
    """A card of the same stage that differs in one leaf of its config, under its own key."""
    document = json.loads(json.dumps(of["document"]))
    node = document["config"]
    for part in path.split(".")[:-1]:
        node = node[part]
    node[path.split(".")[-1]] = value
    return {**of, "document": document, "key": digest(document)}


# --- plan


def test_a_plan_says_what_is_there_and_what_would_run(shelf, made):
    new = changed(made["student"].card, "objective.kd.loss.temperature", 8)
    data = plan_data([plan_of(made["teacher"], made["labels"], new, overrides=("temperature=8",))], shelf)
    (job,) = data["jobs"]
    assert set(data) == {"jobs", "to_run"} and set(job) == {"overrides", "key", "stages"}
    assert [s["status"] for s in job["stages"]] == ["hit", "hit", "miss"]
    assert all(
        set(s) == {"stage", "key", "status", "inputs", "unused", "damage", "other", "nearest", "writes"}
        for s in job["stages"]
    )
    assert data["to_run"] == [{"stage": "student", "key": new["key"]}]
    assert job["stages"][2]["nearest"]["changes"] == {"config.objective.kd.loss.temperature": [4, 8]}
    json.dumps(data, allow_nan=False)


def test_a_miss_is_told_by_what_it_is_unlike(shelf, made):
    new = changed(made["student"].card, "objective.kd.loss.temperature", 8)
    shown = text(plan_view([plan_of(made["teacher"], made["labels"], new)], shelf))
    assert f"unlike {short(made['student'].key)}: objective.kd.loss.temperature 4 -> 8" in shown
    assert shown.endswith("1 job; to run: 1 student")
    assert not any(len(line) > 100 for line in shown.splitlines())


def test_a_miss_names_three_changes_at_most_and_a_new_teacher_by_its_name(shelf, made):
    new = made["student"].card
    for path, value in (("seed", 7), ("fit.lr", 0.123456789), ("fit.epochs", 9), ("data.size", 8)):
        new = changed(new, path, value)
    shown = text(plan_view([plan_of(new)], shelf), 200)
    assert "data.size 28 -> 8, fit.epochs 2 -> 9, fit.lr 0.002 -> 0.123457 and 1 more" in shown
    labels = json.loads(json.dumps(made["labels"].card))
    labels["document"]["inputs"]["teacher"] = "e" * 64
    labels["key"] = digest(labels["document"])
    assert f"unlike {short(made['labels'].key)}: another teacher" in text(plan_view([plan_of(labels)], shelf))


def test_in_a_sweep_what_tells_a_job_apart_is_what_it_is_made_of(shelf, made):
    news = [changed(made["student"].card, "objective.kd.loss.temperature", t) for t in (8, 16)]
    plans = [
        plan_of(made["teacher"], made["labels"], new, overrides=("data=mnist", "run.workers=0", f"temperature={t}"))
        for new, t in zip(news, (8, 16), strict=True)
    ]
    lines = text(plan_view(plans, shelf), 200).splitlines()
    assert lines[3].split() == ["student", short(news[0]["key"]), "miss", "temperature=8"]
    assert lines[4].split() == ["student", short(news[1]["key"]), "miss", "temperature=16"]
    assert lines[5:] == ["", "student", "└─ teacher, through labels", "", "2 jobs; to run: 2 students"]


def test_the_first_of_its_kind_is_told(tmp_path):
    (new,) = of_now([card("Train", TEACHER, 0.9)])
    assert "the first of its kind in this store" in text(plan_view([plan_of(new)], Store(tmp_path)))


def test_a_hit_that_other_code_or_packages_made_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "_versions", lambda: {"python": "3.11.7", "torch": "2.15.0"})
    now, code, torch_ = of_now([card("Train", TEACHER, 0.9, seed=s) for s in range(3)])
    code["fingerprints"]["code"] = {"digest": "c1"}
    torch_["fingerprints"]["environment"] = {"torch": "2.14.0", "python": "3.11.7", "cpu": "another"}
    store = shelve(tmp_path, [now, code, torch_])
    assert [made_otherwise(c) for c in (now, code, torch_)] == [[], ["code"], ["torch"]]
    shown = text(plan_view([plan_of(now), plan_of(code), plan_of(torch_)], store))
    assert [line.split(maxsplit=2)[2] for line in shown.splitlines()[1:4]] == [
        "hit",
        "hit (other code)",
        "hit (other torch)",
    ]
    assert hits_note([plan_of(now)], store) is None
    note = hits_note([plan_of(now), plan_of(code), plan_of(torch_)], store)
    assert note is not None and "\n" not in note
    assert note.startswith("note: 2 of the artifacts were made with other code, torch;")


def test_a_damaged_artifact_says_what_is_wrong_and_will_be_made_again(tmp_path):
    store = shelve(tmp_path, small_family())
    teacher = next(iter(store))
    (teacher.path / "model.safetensors").write_bytes(b"x")
    data = plan_data([plan_of(teacher)], store)
    (stage,) = data["jobs"][0]["stages"]
    assert stage["status"] == "damaged" and stage["damage"] == "model.safetensors is half-written: 1 of 64 bytes"
    assert data["to_run"] == [{"stage": teacher.card["stage"], "key": teacher.key}]
    shown = text(plan_view([plan_of(teacher)], store), 200)
    assert "damaged" in shown and "is half-written: 1 of 64 bytes; it will be made again" in shown
    assert "damaged: model.safetensors is half-written: 1 of 64 bytes" in text(show_view(teacher, store))


def test_a_stage_that_another_process_makes_now_is_running(tmp_path):
    (new,) = of_now([card("Train", TEACHER, 0.9)])
    store = Store(tmp_path)
    with store.lock(new["key"]):
        assert plan_data([plan_of(new)], store)["jobs"][0]["stages"][0]["status"] == "running"


def test_why_an_input_is_not_used_is_said_once(shelf, made):
    plan = plan_of(made["teacher"], made["student"])
    node = dataclasses.replace(plan.nodes[1], unused={"labels": "new views in each epoch"})
    plan = dataclasses.replace(plan, nodes=(plan.nodes[0], node))
    shown = text(plan_view([plan, plan], shelf))
    assert shown.count("labels not used by student: new views in each epoch") == 1


# --- ls


def test_the_runs_are_listed_oldest_first_with_the_dials_they_heard(shelf, made):
    rows = ls_rows(shelf, [], None, None)
    assert len(rows) == 5
    by_hash = {row["hash"]: row for row in rows}
    assert by_hash[short(made["student"].key)]["temperature"] == 4
    assert by_hash[short(made["alone"].key)]["temperature"] is None
    assert list(rows[0]) == [
        "hash", "stage", "model", "data", "temperature", "alpha", "seed", "accuracy", "f1", "parameters", "wall_s",
        "started", "sweep",
    ]  # fmt: skip
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ([], 5),
        (["temperature=4"], 1),
        (["temperature=4.0"], 1),
        (["temperature>1"], 1),
        (["temperature<9"], 2),
        (["model=seed_cnn"], 2),
        (["parameters<10000"], 3),
        (["parameters<10000", "temperature=1"], 1),
        (["fit.epochs=2"], 3),
        (["test/accuracy>0.99"], 1),
        (["macs>1e6"], 1),
        (["data=mnist", "stage=labels"], 1),
        (["data=cifar10"], 0),
        (["model>3"], 0),
    ],
    ids=str,
)
def test_runs_are_chosen_by_columns_config_and_metrics(shelf, where, count):
    assert len(ls_rows(shelf, where, None, None)) == count


def test_runs_are_sorted_up_and_down_and_what_has_no_value_comes_last(shelf):
    up = [row["accuracy"] for row in ls_rows(shelf, [], "accuracy", None)]
    down = [row["accuracy"] for row in ls_rows(shelf, [], "-accuracy", None)]
    numbers = [value for value in up if value is not None]
    assert numbers == sorted(numbers) and up[-1] is None and down[-1] is None
    assert [value for value in down if value is not None] == numbers[::-1]
    assert [row["temperature"] for row in ls_rows(shelf, [], "-temperature", None)] == [4, 1, None, None, None]
    models = [row["model"] for row in ls_rows(shelf, [], "model", None)]
    assert models == sorted(models)


def test_one_stage_is_chosen_by_name(shelf):
    assert {row["stage"] for row in ls_rows(shelf, [], None, "student")} == {"student"}


@pytest.mark.parametrize(
    ("where", "sort", "stage", "said"),
    [
        (["temprature=4"], None, None, "no run has a column 'temprature'; did you mean 'temperature'?"),
        ([], "acuracy", None, "no run has a column 'acuracy'; did you mean 'accuracy'"),
        (["temperature"], None, None, "is no condition; write name=value"),
        ([], None, "studnt", "no run has the stage 'studnt'; did you mean 'student'?"),
    ],
)
def test_a_filter_that_names_nothing_is_refused_with_the_nearest_name(shelf, where, sort, stage, said):
    with pytest.raises(InputError) as refused:
        ls_rows(shelf, where, sort, stage)
    assert said in str(refused.value)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_list_fits_the_terminal_and_names_what_it_left_out(shelf, width):
    rows = ls_rows(shelf, [], None, None)
    shown = text(rows_table(rows, width, SPARE), width)
    lines = shown.splitlines()
    assert all(len(line) <= width for line in lines) and "…" not in shown
    assert lines[0].split()[:2] == ["hash", "stage"] and "accuracy" in lines[0]
    assert all(row["hash"] in shown for row in rows)
    left_out = " ".join(lines).partition("for want of width: ")[2]
    if width == 200:
        assert not left_out and "2026-11-23 22:00" in shown and "93322" in shown and "12.3" in shown
    else:
        assert set(left_out.split(", ")) <= set(SPARE) and "wall_s" in left_out


def test_a_column_that_the_first_row_lacks_is_shown():
    assert "b" in text(rows_table([{"a": 1}, {"a": 2, "b": 3}])).splitlines()[0].split()


# --- show, diff


def test_one_run_is_shown_with_lineage_and_six_digits(shelf, made):
    shown = text(show_view(made["student"], shelf))
    lines = shown.splitlines()
    assert lines[0] == f"student {made['student'].key}"
    at = lines.index("lineage")
    assert lines[at + 1] == f"├── teacher {short(made['teacher'].key)} seed_cnn"
    assert lines[at + 2].startswith(f"└── labels {short(made['labels'].key)}")
    assert lines[at + 3] == f"    └── teacher {short(made['teacher'].key)} seed_cnn"
    for section in ("metrics", "cost", "time", "dials", "config", "data", "code", "environment", "files"):
        assert section in lines
    assert any(line.split() == ["objective.kd.loss.temperature", "4"] for line in lines)
    assert "10 values from" in shown
    assert all(len(word) < 22 for word in shown.split() if word.replace(".", "").isdigit())
    assert lines[-1] == f"again:   kd reproduce {short(made['student'].key)}"
    assert "made with other" not in shown


def test_a_parent_that_is_gone_is_said(tmp_path):
    cards = small_family()
    store = shelve(tmp_path, [c for c in cards if c["stage"] != "labels"])
    student = next(a for a in store if a.card["document"]["inputs"].get("labels"))
    assert f"labels {short(student.card['document']['inputs']['labels'])} (not in this store)" in text(
        show_view(student, store)
    )


def test_a_diff_shows_the_leaves_that_differ_and_no_list_whole(shelf, made):
    shown = text(diff_view(made["student"], made["other"]))
    lines = [line.split() for line in shown.splitlines()]
    assert ["config", short(made["student"].key), short(made["other"].key)] in lines
    assert ["objective.kd.loss.temperature", "4", "1"] in lines
    assert any(line[:1] == ["metrics.test/f1_per_class"] and "[0]" in line for line in lines)
    assert all(len(line) <= 100 for line in shown.splitlines()) and "[0.9" not in shown
    assert text(diff_view(made["student"], made["student"])) == "nothing differs"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.1 + 0.2, "0.3"), (2.2930305463147174, "2.29303"), (1e-7, "1e-07"), (4.0, "4"), (93322, "93322"),
        (True, "true"), (None, "null"), ("word", "word"), ("a" * 64, "a" * 16), ([], "[]"), ({}, "{}"),
        ([0.5, None], "[0.5, null]"), (list(range(100)), "100 values from 0 to 99"),
        (["a"] * 7, "[a, a, a, a, a, a, a]"),
    ],
    ids=str,
)  # fmt: skip
def test_values_are_told_as_people_read_them(value, said):
    assert plain(value) == said


def test_a_verdict_says_its_word_the_reasons_and_each_stage():
    stage = {"stage": "student", "key": "a" * 64, "weights": "b" * 64, "metrics": [{"first": 1, "second": 2}]}
    shown = text(verdict_view(Verdict("differs", ["student: test/accuracy"], [stage]), ["code digest: a -> b"]))
    assert shown.splitlines() == [
        "differs",
        "  student: test/accuracy",
        "  differs now: code digest: a -> b",
        f"  student {'a' * 16}: 0 of 1 metrics equal to the last digit, weights {'b' * 16}",
    ]


# --- doctor


def states(checks):
    return {check: (state, said) for state, check, said in checks}


def test_a_sound_place_has_no_bad_check(shelf, tmp_path):
    checks = states(health(shelf, tmp_path))
    assert not [check for check, (state, _) in checks.items() if state == "bad"]
    assert checks["artifacts"] == ("ok", "5 sound") and checks["store"] == ("ok", str(shelf.root))
    assert "nothing yet" in checks["data"][1] and checks["torch"][0] == "ok"


def test_damage_a_missing_package_and_malware_are_named(tmp_path, monkeypatch):
    store = shelve(tmp_path / "store", small_family())
    victim = next(iter(store))
    (victim.path / "model.safetensors").unlink()

    def version(name):
        if name == "timm":
            raise views.PackageNotFoundError
        return "2.6.3" if name == "pytorch-lightning" else "1.0"

    monkeypatch.setattr(views, "version", version)
    checks = health(store, tmp_path)
    assert ("bad", "timm", "not installed: pip install kd") in checks
    assert ("bad", "pytorch-lightning", "2.6.2 and 2.6.3 were malware: remove it, change your passwords") in checks
    assert states(checks)["artifacts"] == ("warn", f"1 damaged ({short(victim.key)}): the next run makes them again")


def test_a_plugin_that_breaks_hydra_is_named(tmp_path, monkeypatch, shelf):
    folder = tmp_path / "hydra_plugins" / "hydra_bad_sweeper"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "sweeper.py").write_text("raise TypeError('made for another Hydra')")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert states(health(shelf, tmp_path))["Hydra plugin"] == (
            "bad",
            "hydra_plugins.hydra_bad_sweeper.sweeper (TypeError: made for another Hydra) breaks every command: "
            "uninstall the package it is from",
        )
        (folder / "sweeper.py").write_text("import nothing_of_that_name")
        state, said = states(health(shelf, tmp_path))["Hydra plugin"]
        assert state == "warn" and "hydra_bad_sweeper.sweeper" in said and "\n" not in said
    finally:
        for name in [name for name in sys.modules if name.startswith("hydra_plugins")]:
            del sys.modules[name]


def test_a_known_breaker_is_named_by_its_package(tmp_path, monkeypatch, shelf):
    info = tmp_path / "hydra_ax_sweeper-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hydra-ax-sweeper\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert states(health(shelf, tmp_path))["hydra-ax-sweeper"] == (
        "bad",
        "breaks every Hydra program at start: pip uninstall hydra-ax-sweeper",
    )


def test_nothing_here_imports_torch():
    code = "import sys, kd.views\nassert not {'torch', 'pandas', 'plotly', 'wandb'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
