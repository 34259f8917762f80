"""`kd tune`: trials are ordinary runs, what is done is not done again, who is given up leaves no artifact."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

import kd.cli as cli
import kd.tuning as tuning
from kd.errors import InputError, KDError
from kd.launch import launch
from kd.reporting import chosen, report
from kd.store import Store, short
from kd.training.pruning import journal
from kd.tuning import MEASURED, Asked, as_data, measured, summary, table, tune, write_page
from tests.pipeline.small import WORDS, planned
from tests.shelf import text

ROOT = Path(__file__).resolve().parents[1]
SMALL = (*WORDS, "fit.batch_size=16", "alpha=0.1")
SPACES = ("temperature=interval(1,16)", "fit.lr=choice(0.02,1e-9)")
# Drawn with this seed, trial 0 learns, trial 1 does not, and is given up after its first epoch.
ASKED = {"sampler": "random", "sampler_seed": 1}


def words(store, *more):
    return [f"run.store={store}", *SMALL, *more]


def searched(store, trials, *more, **options):
    return tune(words(store, *(more or SPACES)), Asked(trials, **{**ASKED, **options}))


def touched(store):
    return sorted(p.name for p in Path(store).iterdir() if p.name != "data") if Path(store).exists() else []


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A store with a search of three trials, begun with two of them, and what `tune` gave back at last."""
    store = tmp_path_factory.mktemp("searched")
    first = searched(store, 2)
    return store, first, searched(store, 3)


@pytest.fixture
def copy(kept, tmp_path):
    """A copy of the store, to change."""
    store, _, search = kept
    shutil.copytree(store, tmp_path / "copy")
    return tmp_path / "copy", search


@pytest.fixture
def idle(monkeypatch):
    """Nothing may be run."""
    monkeypatch.setattr(tuning.children, "call", lambda *_, **__: pytest.fail("a child was started"))


@pytest.fixture
def rehearsed(monkeypatch):
    """Nothing may be trained."""

    def call(function, *_, **__):
        assert function is tuning.check_jobs
        return {"status": "done", "value": None}

    monkeypatch.setattr(tuning.children, "call", call)


@pytest.fixture
def kd(capsys):
    def type_(*typed):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in typed])
        out, err = capsys.readouterr()
        return ended.value.code, out, err.splitlines()

    return type_


def by_number(search):
    return sorted(search.trials(), key=lambda row: row["trial"])


# --- trials are runs


def test_a_trial_is_the_run_that_kd_run_makes_of_its_words(kept):
    store, _, search = kept
    for row in by_number(search):
        plan, _ = planned(store, *row["overrides"][1:])
        assert plan.key == row["key"]
        assert row["command"] == "kd run " + " ".join(row["overrides"])
        temperature = row["params"]["temperature"]
        assert len(temperature) <= 5 and f"temperature={temperature}" in row["overrides"]
    learnt = by_number(search)[0]
    found = Store(store).get(learnt["key"])
    assert learnt["state"] == "done" and found is not None
    assert learnt["values"] == {"val/accuracy": found.card["metrics"]["val/accuracy"]}
    assert found.card["run"] == {"overrides": learnt["overrides"], "sweep": search.sweep, "pipeline": "distil"}
    epochs = {epoch["epoch"] + 1: epoch["val/accuracy"] for epoch in found.card["trace"]["epochs"]}
    assert learnt["epochs"] == epochs and len(epochs) == 2


def test_a_trial_that_is_given_up_leaves_no_artifact_and_its_run_can_be_made_after_all(copy, monkeypatch):
    store, search = copy
    lost = by_number(search)[1]
    assert lost["params"]["fit.lr"] == "1e-09" and lost["state"] == "pruned"
    assert list(lost["epochs"]) == [1] and lost["values"] == {"val/accuracy": lost["epochs"][1]}
    home = Store(store)
    assert home.get(lost["key"]) is None and not home.folder(lost["key"]).exists() and home.work(lost["key"]).exists()
    plans, outcomes, _, _ = launch([f"run.store={store}", *lost["overrides"][1:]], False, None)
    assert plans[0].key == lost["key"] and outcomes[0]["ran"] == ["student"]
    found = home.get(lost["key"])
    assert found is not None and len(found.card["trace"]["epochs"]) == 2 and not home.work(lost["key"]).exists()


def test_the_trials_are_a_sweep(kept):
    store, _, search = kept
    (record,) = Store(store).sweeps()
    assert record["id"] == search.sweep and record["overrides"][-2:] == list(SPACES)
    rows = by_number(search)
    assert [job["key"] for job in record["jobs"]] == [row["key"] for row in rows]
    assert [job["status"] for job in record["jobs"]] == [row["state"] for row in rows]
    cards, _, title = chosen([search.sweep], Store(store))
    assert len(cards) == sum(row["state"] in ("done", "hit") for row in rows) and SPACES[0] in title
    (page,) = report([search.sweep], None, None, str(store), False)
    assert "1 pruned" in Path(page).read_text()


# --- going on


def test_the_same_command_runs_nothing_and_shows_the_same(kept, idle):
    store, first, search = kept
    assert first.name == search.name and len(first.trials()) == 3  # it looks at the file, where one more is now
    again = searched(store, 3)
    assert again.trials() == search.trials() and again.stages == {} and again.plans == []
    assert summary(again)[0] == "ran 0 stages"
    assert len(searched(store, 2).trials()) == 3  # fewer than there are already


def test_the_name_is_what_is_searched_however_it_is_typed(kept, idle):
    store, _, search = kept
    same = ("fit.lr=choice(0.02,1e-9)", "run.log_every=7", "teacher_seed=0", "temperature=interval(1.0,16)")
    assert searched(store, 3, *same).name == search.name  # 0 is the default, and run/ is no part of a run
    assert search.path == store / "tune" / f"{search.name}.log"


def test_a_search_in_pieces_is_the_search_in_one_go_and_finds_the_runs_there_are(copy):
    store, search = copy
    # Who is watched is validated each epoch, whatever run/ says.
    again = searched(store, 3, *SPACES, "run.validate_every=0", name="again")
    assert [row["params"] for row in by_number(again)] == [row["params"] for row in by_number(search)]
    assert [row["values"] for row in by_number(again)] == [row["values"] for row in by_number(search)]
    assert [row["epochs"] for row in by_number(again)] == [row["epochs"] for row in by_number(search)]
    states = {"done": "hit", "hit": "hit", "pruned": "pruned"}
    assert [row["state"] for row in by_number(again)] == [states[row["state"]] for row in by_number(search)]
    assert again.stages == {} and again.path.name == "again.log"


def study_of(store, search):
    return optuna.load_study(study_name=search.name, storage=journal(store / "tune" / search.path.name))


def test_a_trial_whose_process_died_is_gone_on_with(copy, rehearsed):
    store, search = copy
    study = study_of(store, search)
    study.enqueue_trial(study.trials[0].params)
    study.ask({space.key: space.distribution() for space in search.spaces.values()})
    again = searched(store, 4)
    rows = by_number(again)
    assert len(rows) == 4 and rows[3]["state"] == "hit" and rows[3]["key"] == rows[0]["key"]


def test_a_trial_that_died_before_it_had_values_does_not_count(copy, rehearsed):
    store, search = copy
    study = study_of(store, search)
    study.ask()
    study.enqueue_trial(study.trials[0].params)
    again = searched(store, 4)
    assert [row["trial"] for row in by_number(again)] == [0, 1, 2, 4]
    assert study_of(store, search).trials[3].state == TrialState.FAIL


def test_a_trial_that_another_process_runs_is_left_alone_and_counts(copy, rehearsed):
    store, search = copy
    study = study_of(store, search)
    number = study.ask({space.key: space.distribution() for space in search.spaces.values()}).number
    with searched(store, 3).locks.lock(search.lock_name(number)):
        again = searched(store, 4)
    assert [row["state"] for row in by_number(again)][3:] == ["running"]
    (record,) = again.store.sweeps()
    assert len(record["jobs"]) == 3  # of the fourth no words are known yet


# --- failures


def test_a_run_that_fails_is_told_with_its_reason_and_stops_nothing(copy, capsys):
    store, _ = copy
    sgd = ("fit.lr=choice(1e30,0.02)", "fit.optimiser._target_=torch.optim.SGD")
    search = searched(store, 2, *sgd, sampler_seed=0)
    good, bad = search.trials()
    assert good["state"] == "done" and search.best() == [good["trial"]]
    assert bad["state"] == "failed" and "step 2: term" in bad["error"] and bad["values"] == {}
    assert f"failed fit.lr=1e+30: {bad['error']}" in capsys.readouterr().err
    assert f"  failed trial {bad['trial']}: {bad['error']}" in summary(search)
    (record,) = [r for r in search.store.sweeps() if r["id"] == search.sweep]
    assert [job["error"] for job in record["jobs"] if job["status"] == "failed"] == [bad["error"]]


def test_where_no_trial_came_to_its_end_the_command_fails(copy, kd, monkeypatch):
    store, _ = copy
    killed = {"status": "failed", "error": "the job was killed by SIGKILL; the same command resumes it", "exit_code": 1}
    done = {"status": "done", "value": None}
    monkeypatch.setattr(tuning.children, "call", lambda f, *_, **__: done if f is tuning.check_jobs else killed)
    code, out, err = kd("tune", *words(store, "seed=range(3,9)"), "--trials", "2")
    assert code == 1 and err == [line for line in err if line.endswith(": the job was killed by SIGKILL")]
    assert "2 trials, 2 failed" in out and "best" not in out


def test_a_run_without_the_metric_fails_its_trial(copy):
    store, search = copy
    other = replace(search, objectives={"val/perplexity": "minimize"}, pruner="none")
    with pytest.raises(KDError, match=r"has no val/perplexity; there are "):
        other._values(study_of(store, search).ask(), by_number(search)[0]["key"])


# --- several objectives


def test_several_objectives_have_a_front_and_no_pruning(copy, capsys):
    store, _ = copy
    both = {"maximize": ("val/accuracy",), "minimize": ("cost/parameters", "val/loss"), "pruner": "hyperband"}
    search = searched(store, 2, **both)
    assert search.pruner == "none" and [row["state"] for row in search.trials()] == ["hit", "done"]
    assert "--pruner hyperband: Optuna cannot prune for several objectives" in capsys.readouterr().err
    assert list(search.trials()[0]["values"]) == ["val/accuracy", "cost/parameters", "val/loss"]
    assert 0 in search.best()
    assert f"Pareto front: {len(search.best())} of them" in summary(search)
    assert "trial 0: val/accuracy" in "\n".join(summary(search))
    page = write_page(search).read_text()
    assert 'id="front"' in page and 'id="slices-2"' in page and 'id="epochs"' not in page


# --- what is refused


def test_the_metrics_are_those_on_the_cards(kept):
    store, _, search = kept
    found = Store(store).get(search.trials()[0]["key"])
    assert found is not None
    assert {n for n in MEASURED if "latency" not in n} == set(measured(found.card))


@pytest.mark.parametrize(
    ("more", "options", "said"),
    [
        (["temperature=4"], {}, "no word is a search space"),
        (
            [],
            {"maximize": ("test/f1",)},
            "test/f1 may choose nothing: test is measured once, after training; use val/f1",
        ),
        ([], {"minimize": ("val/lss",)}, "val/lss is not measured; did you mean 'val/loss'"),
        ([], {"maximize": ("accuracy",)}, "did you mean 'val/accuracy'"),
        ([], {"minimize": ("cost/latency_ms_batch1",)}, "is not measured with run.latency=false"),
        ([], {"maximize": ("val/f1",), "minimize": ("val/f1",)}, "cannot be maximized and minimized at once"),
        ([], {"sampler": "tpee"}, "--sampler='tpee' is none of tpe, random; did you mean 'tpe'?"),
        ([], {"pruner": "hyper"}, "--pruner='hyper' is none of hyperband, median, none"),
        ([], {"name": "../x"}, "--name '../x' names files"),
        ([], {"storage": __file__}, "cannot be read as a study (JSONDecodeError); name another --storage"),
        ([], {"storage": str(ROOT)}, "cannot be read as a study (IsADirectoryError)"),
        (["temperature=interval(-1,4)"], {}, "temperature=-1 is out of range"),
        (["fit.gamma=1", "fit.clip=choice(1,-1)"], {}, "or null for no clipping (a value of fit.clip=choice(1,-1))"),
        (
            ["fit.patience=interval(1,5)"],
            {},
            "fit.patience=2.528 is no whole number or null (a value of fit.patience=interval(1,5)); int(inte",
        ),
        (["data=choice(digits,mnst)"], {}, "data=mnst: no such option"),
        (
            ["experiments=e03_few_labels", "temperature=interval(1,2)"],
            {},
            "an experiment with a grid of its own is no trial",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_one_line_and_touches_nothing(more, options, said, tmp_path, idle):
    with pytest.raises(InputError) as refused:
        searched(tmp_path / "none", 2, *more, **options)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert touched(tmp_path / "none") == []


def test_what_no_network_can_be_is_found_before_the_first_trial(tmp_path):
    with pytest.raises(InputError, match="there is no model 'resnet81'; did you mean 'resnet18'"):
        searched(tmp_path, 2, "student.name=choice(seed_cnn,resnet81)")
    assert touched(tmp_path) == []


def test_a_study_of_something_else_is_not_gone_on_with(kept, idle):
    store, _, search = kept
    with pytest.raises(InputError, match=r"was begun with other words, defaults or data \(`kd tune .*interval\(1,16\)"):
        searched(store, 3, "temperature=interval(1,8)", name=search.name, storage=search.path)


def test_a_line_that_was_cut_short_is_told(copy, idle):
    store, search = copy
    path = store / "tune" / search.path.name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"the last line of .* was cut short"):
        searched(store, 3)


def test_a_study_that_cannot_be_written_is_told(kept):
    store, _, _ = kept
    with pytest.raises(InputError, match=r"/proc/nope/x.log cannot be written"):
        searched(store, 1, storage="/proc/nope/x.log")


def test_without_optuna_the_line_says_how_to_get_it(kd, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, out, err = kd("tune", *words(tmp_path, *SPACES))
    assert (code, out) == (2, "")
    assert err == ["kd: kd tune needs optuna, which is not installed: pip install 'kd[tune]'"]


# --- the command


def test_the_command_prints_trials_best_first_and_what_makes_the_best(kept, kd):
    store, _, search = kept
    typed = ("tune", *words(store, *SPACES), "--trials", 3, "--sampler", "random", "--sampler-seed", 1)
    code, out, err = kd(*typed)
    best = search.trials()[0]
    lines = out.splitlines()
    assert code == 0 and err == []
    assert lines[0].split() == ["trial", "temperature", "fit.lr", "val/accuracy", "state", "hash"]
    assert lines[1].split()[0] == str(best["trial"]) and lines[1].split()[-1] == short(best["key"])
    assert lines[-3].startswith(f"best trial {best['trial']}: val/accuracy 0.")
    assert lines[-2] == f"  {best['command']}" and lines[-1] == f"kd report {search.sweep}"
    data = json.loads(kd(*typed, "--json")[1])
    assert data["study"] == search.name and data["best"] == [best["trial"]] and data["ran"] == {}
    assert data == json.loads(json.dumps(as_data(search, None) | {"ran": {}}))
    assert best["params"]["temperature"] in text(table(search, 200))


def test_a_finished_search_is_told_without_importing_torch(kept):
    store, _, _ = kept
    code = (
        "import sys\nfrom kd.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'plotly', 'wandb', 'timm'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "tune", *words(store, *SPACES), "--trials", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "best trial" in done.stdout, done.stderr


def test_the_page_is_written_where_it_is_said(kept, kd):
    store, _, search = kept
    code, out, _ = kd("tune", *words(store, *SPACES), "--trials", 3, "--page")
    page = store / "reports" / f"tune-{search.name}.html"
    assert code == 0 and out.splitlines()[-1] == str(page)
    assert all(f'id="{name}"' in page.read_text() for name in ("history-0", "epochs", "slices-0", "trials"))
