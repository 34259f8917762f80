"""Launching: every job checked first, shared stages once, one job's end its own, nothing lost to a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kd.launch as launching
from kd.errors import InputError, KDError
from kd.launch import _fresh, launch, planned, progress, reproduce, sweep_id, writable
from kd.reporting import report
from kd.store import Store, short
from tests.pipeline import small

ROOT = Path(__file__).resolve().parents[1]
GRID = ("temperature=1,4,8", "alpha=0.1,0.9")


def words(store, *more):
    return [f"run.store={store}", *small.WORDS, *more]


def ran(outcomes):
    stages = [stage for outcome in outcomes for stage in outcome["ran"]]
    return {stage: stages.count(stage) for stage in stages}


def touched(store):
    """What a run leaves in a store; digests of data sets are kept by planning too."""
    return sorted(p.name for p in Path(store).iterdir() if p.name != "data") if Path(store).exists() else []


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A store in which a sweep of six jobs ran, and what `launch` gave back."""
    store = tmp_path_factory.mktemp("swept")
    return store, launch(words(store, *GRID), True, None)


# --- sweeps


def test_a_sweep_runs_the_shared_stages_once(swept):
    store, (plans, outcomes, sweep, run) = swept
    assert ran(outcomes) == {"teacher": 1, "labels": 1, "student": 6}
    assert [o["status"] for o in outcomes] == ["done"] * 6 and run.store == str(store)
    assert len({p.key for p in plans}) == 6 and len(list(Store(store))) == 8
    assert sweep == sweep_id(plans[::-1])


def test_a_sweep_leaves_its_record(swept):
    store, (plans, _, sweep, _) = swept
    (record,) = [r for r in Store(store).sweeps() if r["id"] == sweep]
    assert record["overrides"][-2:] == list(GRID)
    assert [job["key"] for job in record["jobs"]] == [p.key for p in plans]
    assert all(job["status"] == "done" and job["error"] is None for job in record["jobs"])
    assert record["jobs"][1]["overrides"][-2:] == ["temperature=1", "alpha=0.9"]


def test_the_second_time_nothing_is_run_and_no_child_is_started(swept, monkeypatch):
    store, (_, _, sweep, _) = swept
    monkeypatch.setattr(launching.children, "call", lambda *_, **__: pytest.fail("a child was started"))
    monkeypatch.setattr(launching.children, "warm", lambda: pytest.fail("the server was started"))
    _, outcomes, again, _ = launch(words(store, *GRID), True, None)
    assert [o["status"] for o in outcomes] == ["hit"] * 6 and ran(outcomes) == {} and again == sweep


def test_a_job_that_fails_leaves_the_others_finished_and_is_told_with_its_reason(swept, capsys):
    store, _ = swept
    more = words(store, "fit.lr=1e30,0.005", "fit.optimiser._target_=torch.optim.SGD")
    plans, outcomes, sweep, _ = launch(more, True, None)
    assert [o["status"] for o in outcomes] == ["failed", "done"]
    assert "step 2: term" in outcomes[0]["error"] and "not finite" in outcomes[0]["error"]
    record = json.loads((store / "sweeps" / f"{sweep}.json").read_text())
    assert [job["status"] for job in record["jobs"]] == ["failed", "done"]
    assert record["jobs"][0]["error"] == outcomes[0]["error"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"failed fit.lr=1e+30: {outcomes[0]['error']}"
    assert lines[1] == f"made student {short(plans[1].key)}  fit.lr=0.005"
    (page,) = report([str(sweep)], None, None, str(store), False)
    assert "not finite" in Path(page).read_text()


def test_a_job_that_is_killed_leaves_the_others_finished(swept, monkeypatch):
    store, _ = swept
    monkeypatch.setattr("kd.pipeline.launchers.run_job", small.killed_for_seed_7)
    _, outcomes, sweep, _ = launch(words(store, "seed=7,8"), True, None)
    assert [o["status"] for o in outcomes] == ["failed", "done"]
    assert outcomes[0]["error"] == "the job was killed by SIGKILL (out of memory?); the same command resumes it"
    record = json.loads((store / "sweeps" / f"{sweep}.json").read_text())
    assert [job["status"] for job in record["jobs"]] == ["failed", "done"]
    monkeypatch.undo()
    _, outcomes, again, _ = launch(words(store, "seed=7,8"), True, None)
    assert [o["status"] for o in outcomes] == ["done", "hit"] and again == sweep
    record = json.loads((store / "sweeps" / f"{sweep}.json").read_text())
    assert [job["status"] for job in record["jobs"]] == ["done", "hit"]


def test_all_jobs_are_checked_before_the_first_starts(tmp_path):
    bind = ("loss=[ce,kd,hint]", "loss.hint.teacher=teacher.conv2")
    with pytest.raises(InputError, match=r"'nope' is no layer of SeedCNN; its layers begin with conv1, conv2, "):
        launch(words(tmp_path, *bind, "loss.hint.student=student.conv1,student.nope"), True, None)
    with pytest.raises(InputError, match="temperature=-1 is out of range"):
        launch(words(tmp_path, "temperature=1,-1"), True, None)
    assert touched(tmp_path) == []


def test_a_sweep_has_one_store(tmp_path):
    with pytest.raises(InputError, match=r"run\.store may not vary within a sweep"):
        planned([*small.WORDS, f"run.store={tmp_path}/a,{tmp_path}/b"], True, None)


# --- one job


def test_one_job_that_fails_is_an_error_and_what_was_finished_stays(swept):
    store, _ = swept
    before = touched(store / "artifacts")
    with pytest.raises(KDError, match="not finite") as failed:
        launch(words(store, "fit.lr=1e31", "fit.optimiser._target_=torch.optim.SGD"), False, None)
    assert failed.value.exit_code == 1
    assert touched(store / "artifacts") == before


@pytest.mark.parametrize("place", ["/proc/nope", "{}/file", "{}/file/deeper"])
def test_a_store_that_cannot_be_written_is_refused_before_anything(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(launching.children, "call", lambda *_, **__: pytest.fail("a child was started"))
    with pytest.raises(InputError, match=r"the store .* cannot be written \(.*\); name another folder"):
        launch(words(place.format(tmp_path)), False, None)


def test_asking_whether_a_store_can_be_written_leaves_nothing(tmp_path):
    writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_bar_names_its_stage_in_few_letters():
    with progress(False) as bars:
        task = _fresh(bars, bars.add_task("x"), "student " + "temperature=4 " * 9 + "[red]")
        assert len(bars.tasks) == 1 and bars.tasks[0].id == task
        assert bars.tasks[0].description == "student temperature=4 temperature=4 tem…"


# --- reproduce


def test_a_run_is_reproduced_in_a_scratch_store_that_is_taken_away(swept):
    store, (plans, *_) = swept
    verdict, plan, notes = reproduce(short(plans[0].key), [], str(store), None, False)
    assert verdict.word == "bit-identical" and plan.key == plans[0].key and notes == []
    assert not (store / "scratch").exists()


def test_only_run_may_be_given_to_reproduce(swept):
    store, (plans, *_) = swept
    with pytest.raises(InputError, match=r"temperature=3: only run\.\* may be given to reproduce"):
        reproduce(short(plans[0].key), ["temperature=3"], str(store), None, False)
    with pytest.raises(InputError, match="begins with"):
        reproduce("0000", [], str(store), None, False)


# --- signals


def below(pid):
    """The processes that a process has started, and those that they have, zombies left out."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if fields[0] != "Z":
            parents[int(path.parent.name)] = int(fields[1])
    found, queue = set(), [pid]
    while queue:
        children = {child for child, parent in parents.items() if parent == queue[0]}
        found |= children
        queue = [*queue[1:], *children]
    return found


def alive(pids):
    """Those of the processes that still run."""
    states = {}
    for pid in pids:
        try:
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
    return {pid for pid, state in states.items() if state != "Z"}


def until(condition, seconds, what):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_a_signal_leaves_no_process_behind_and_the_same_command_goes_on(how, swept, tmp_path):
    store, _ = swept
    long = words(store, "fit.epochs=150", f"seed={20 + how}", "run.checkpoint_seconds=0")
    key = planned(long, False, None)[0][0].key
    with (tmp_path / "err").open("w+") as err:
        command = [sys.executable, "-m", "kd", "run", *long]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
            # A shell starts what it puts in the background with SIGINT ignored, and these tests may run there.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            until((Store(store).work(key) / "last.ckpt").exists, 120, "the training did not begin")
            children = below(process.pid)
            assert len(children) >= 2  # the server, and the job that it forked
            # A terminal sends Ctrl-C to all of them.
            os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
            process.wait(timeout=40)
            until(lambda: not alive(children), 20, "a child outlived its parent")
        finally:
            process.kill()
            process.wait()
        err.seek(0)
        lines = [line for line in err.read().splitlines() if line]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert lines == ["kd: interrupted; the same command goes on from the last checkpoint"]
    assert Store(store).get(key) is None and not Store(store).locked(key)
    _, outcomes, _, _ = launch([w for w in long if "checkpoint" not in w], False, None)
    assert ran(outcomes) == {"student": 1}
    found = Store(store).get(key)
    assert found is not None and len(found.card["resumed"]) == 1 and len(found.card["trace"]["epochs"]) == 150
    assert not (store / "corrupt").exists()
