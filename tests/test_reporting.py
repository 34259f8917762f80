"""`kd report` and `kd dashboard`: which runs they choose, what they write, what they say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import kd.reporting as reporting
from kd.errors import InputError
from kd.reporting import chosen, dashboard, log_sweep, offline_hint, report
from kd.store import Store, short, write_json
from kd.training.settings import Run
from tests.pipeline.small import planned
from tests.report.cards import compression
from tests.shelf import shelve, small_family

SWEEPS = ("aaaa000000000000", "aaaa111111111111")


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """No account and no settings of the machine."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def store(tmp_path):
    """A family of runs and two sweeps: all students, one of them failed; and one student alone."""
    made = shelve(tmp_path / "store", small_family())
    students = [a.key for a in made if a.card["document"]["inputs"].get("labels")]
    for number, (name, keys) in enumerate(zip(SWEEPS, (students, students[:1]), strict=True)):
        jobs = [{"overrides": [f"seed={i}"], "key": key, "status": "done", "error": None} for i, key in enumerate(keys)]
        jobs += [{"overrides": ["fit.lr=1e30"], "key": "f" * 64, "status": "failed", "error": "the loss is not finite"}]
        started = f"2026-11-23T22:00:0{1 - number}Z"
        write_json(
            made.root / "sweeps" / f"{name}.json",
            {"schema": 1, "id": name, "started": started, "overrides": ["temperature=1,4"], "jobs": jobs},
        )
    return made


def test_without_a_word_it_is_the_last_sweep(store):
    cards, sweep, title = chosen([], store)
    assert sweep is not None and sweep["id"] == SWEEPS[0]
    assert {c["stage"] for c in cards} == {"student"} and len(cards) == 2
    assert title == f"sweep {SWEEPS[0]}: temperature=1,4"


def test_without_a_sweep_it_is_all_runs_and_without_a_run_it_says_so(tmp_path):
    store = shelve(tmp_path, small_family())
    assert len(chosen([], store)[0]) == 5
    with pytest.raises(InputError, match=r"there is no run in .*; `kd run` makes one"):
        chosen([], Store(tmp_path / "none"))


def test_a_sweep_and_a_run_are_chosen_by_the_beginning_of_their_names(store):
    assert len(chosen([SWEEPS[1][:5]], store)[0]) == 1
    first, second, *_ = store
    cards, sweep, title = chosen([first.key[:8], second.key[:8]], store)
    assert [c["key"] for c in cards] == [first.key, second.key] and sweep is None
    assert title == f"{short(first.key)}, {short(second.key)}"
    with pytest.raises(InputError, match="aaaa fits 2 sweeps"):
        chosen(["aaaa"], store)
    with pytest.raises(InputError, match=r"no artifact in .* begins with"):
        chosen(["0000"], store)
    with pytest.raises(InputError, match="is no hash"):
        chosen(["aaa"], store)


def test_the_runs_of_an_experiment_are_those_its_plan_names(tmp_path, monkeypatch, data_dir):
    monkeypatch.setenv("KD_DATA", str(data_dir))
    with pytest.raises(InputError, match=r"no run of experiments=e02_resnet_mobilenet is in .*; `kd run exp"):
        chosen(["experiments=e02_resnet_mobilenet"], Store(tmp_path))
    with pytest.raises(InputError, match="experiments=nope: no such option"):
        chosen(["experiments=nope"], Store(tmp_path))


def test_a_page_is_written_beside_the_store_or_where_it_is_wanted(store, tmp_path):
    (line,) = report([], None, None, str(store.root), False)
    assert line == str(store.root / "reports" / f"{SWEEPS[0]}.html")
    page = (store.root / "reports" / f"{SWEEPS[0]}.html").read_text()
    assert "the loss is not finite" in page and "fit.lr=1e30" in page
    key = next(iter(store)).key[:8]
    (line,) = report([key], tmp_path / "deep" / "page.html", None, str(store.root), False)
    assert line == str(tmp_path / "deep" / "page.html") and (tmp_path / "deep" / "page.html").exists()


def test_a_sweep_of_which_every_job_failed_has_a_page_too(tmp_path):
    jobs = [{"overrides": ["fit.lr=1e30"], "key": "f" * 64, "status": "failed", "error": "not finite"}]
    record = {"schema": 1, "id": SWEEPS[0], "started": "2026", "overrides": ["fit.lr=1e30"], "jobs": jobs}
    write_json(tmp_path / "sweeps" / f"{SWEEPS[0]}.json", record)
    (line,) = report([], None, None, str(tmp_path), False)
    assert "not finite" in Path(line).read_text()


def test_the_table_of_a_markdown_file_is_written_anew(store, tmp_path):
    page = tmp_path / "e01.md"
    page.write_text("before\n<!-- kd:table e01 -->\n<!-- /kd:table -->\nafter\n")
    assert report([], None, page, str(store.root), False) == [f"{page} written"]
    text = page.read_text()
    assert "| accuracy % |" in text and text.startswith("before\n") and text.endswith("after\n")
    assert report([], None, page, str(store.root), False) == [f"{page} already says so"]
    assert not (store.root / "reports").exists()
    assert len(report([], tmp_path / "page.html", page, str(store.root), False)) == 2


def test_as_data_it_is_title_sweep_and_rows(store):
    (text,) = report([], None, None, str(store.root), True)
    data = json.loads(text)
    assert set(data) == {"title", "sweep", "rows"} and data["sweep"]["id"] == SWEEPS[0]
    assert {row["role"] for row in data["rows"]} == {"teacher", "student alone", "student distilled"}
    assert not (store.root / "reports").exists()


def test_the_dashboard_without_an_account_is_the_page(store, capsys):
    assert dashboard("report", None, "kd", str(store.root)) == [str(store.root / "reports" / f"{SWEEPS[0]}.html")]
    assert dashboard("auto", None, "kd", str(store.root)) == [str(store.root / "reports" / f"{SWEEPS[0]}.html")]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("workspace", "a W&B workspace needs a login: `wandb login`; `kd dashboard --what leet` needs none"),
        ("leet", "no W&B run in "),
        ("reprot", "--what 'reprot' is none of auto, leet, report, workspace; did you mean 'report'?"),
    ],
)
def test_a_dashboard_that_cannot_be_is_one_line(what, said, store):
    with pytest.raises(InputError) as refused:
        dashboard(what, None, "kd", str(store.root))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_workspace_is_saved_for_whom_is_logged_in(store, monkeypatch):
    asked = []
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setattr("kd.training.workspace.save", lambda *who: asked.append(who) or "https://wandb.ai/me/kd")
    assert dashboard("workspace", "me", "kd", str(store.root)) == ["https://wandb.ai/me/kd"]
    assert dashboard("auto", None, "mine", str(store.root))[0] == "https://wandb.ai/me/kd"
    assert asked == [("me", "kd"), (None, "mine")]


def test_a_local_view_that_fails_is_told(store, monkeypatch):
    (store.root / "wandb").mkdir()
    monkeypatch.setattr(reporting.shutil, "which", lambda name: "/bin/false")
    with pytest.raises(reporting.KDError, match=r"`leet .*wandb` ended with exit code 1"):
        dashboard("leet", None, "kd", str(store.root))


def test_a_sweep_goes_to_wandb_with_its_table_and_heatmap(store, monkeypatch):
    logged = {}

    def call(function, *arguments, **_):
        return {"status": "done", "value": function(*arguments, None)}

    monkeypatch.setattr(
        "kd.training.tracking.log_sweep", lambda record, **more: logged.update(more, id=record["id"]) or 1
    )
    monkeypatch.setattr(reporting.children, "call", call)
    line = log_sweep(SWEEPS[0], Run(store=str(store.root), wandb="offline", wandb_project="mine"))
    assert line is not None and "wandb sync" in line and "\n" not in line
    assert logged["id"] == SWEEPS[0] and logged["project"] == "mine" and logged["folder"] == store.root
    assert len(logged["data"]) == 4 and set(logged["figures"]) == {"temperature x alpha"}
    logged.clear()
    assert log_sweep(SWEEPS[0], Run(store=str(store.root), wandb="disabled")) is None and not logged
    assert log_sweep(SWEEPS[0], Run(store=str(store.root), wandb="online")) is None and logged["mode"] == "online"


def test_a_sweep_of_compressions_takes_accuracy_by_cost_to_wandb(tmp_path, monkeypatch):
    made = shelve(tmp_path, compression(seeds=(0,)))
    keys = [a.key for a in made if a.card["stage"] == "export"]
    jobs = [{"overrides": [], "key": key, "status": "done", "error": None} for key in keys]
    write_json(
        tmp_path / "sweeps" / f"{SWEEPS[0]}.json",
        {"schema": 1, "id": SWEEPS[0], "started": "2026", "overrides": [], "jobs": jobs},
    )
    logged = {}
    monkeypatch.setattr("kd.training.tracking.log_sweep", lambda record, **more: logged.update(more) or 1)
    monkeypatch.setattr(
        reporting.children, "call", lambda f, *arguments, **_: {"status": "done", "value": f(*arguments, None)}
    )
    log_sweep(SWEEPS[0], Run(store=str(tmp_path), wandb="offline"))
    assert set(logged["figures"]) == {"temperature x alpha", "accuracy by cost"}


def test_offline_runs_are_pointed_at_and_others_are_not(tmp_path):
    assert "wandb leet" in str(offline_hint(Run(store=str(tmp_path), wandb="offline")))
    assert offline_hint(Run(wandb="disabled")) is None is offline_hint(Run(wandb="online"))


def test_a_small_real_run_is_reported_by_its_hash(tmp_path):
    one, _ = planned(tmp_path)  # planned only: it is not in the store
    with pytest.raises(InputError, match="begins with"):
        chosen([short(one.key)], Store(tmp_path))
