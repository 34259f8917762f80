"""The commands as they are typed: what they print, their exit codes, and one clear line for each fault."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import typer

import kd.cli as cli
from kd.store import Store, short
from tests.pipeline.small import WORDS, planned

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [c.name for c in cli.app.registered_commands] + ["bench", "bench step"]


@pytest.fixture
def kd(capsys, monkeypatch):
    """Types a command; gives its exit code, its output and its errors by line."""

    def type_(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return ended.value.code, out, err.splitlines()

    return type_


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A store with a teacher, its labels, a distilled student, the same student alone, and a sweep with a failure."""
    store = tmp_path_factory.mktemp("kept")
    for words in (
        ["run", *WORDS, "run.wandb_project=${oc.env:PATH}"],
        ["run", *WORDS, "pipeline=baseline"],
        ["run", "-m", *WORDS, "fit.lr=0.005,1e30", "fit.optimiser._target_=torch.optim.SGD"],
    ):
        with pytest.raises(SystemExit):
            cli.main([*words, f"run.store={store}"])
    return store


@pytest.fixture
def store(kept, monkeypatch):
    """The same store, to look at, as the one that KD_STORE names."""
    monkeypatch.setenv("KD_STORE", str(kept))
    return Store(kept)


@pytest.fixture
def copy(kept, tmp_path, monkeypatch):
    """A copy of it, to change."""
    shutil.copytree(kept, tmp_path / "copy")
    monkeypatch.setenv("KD_STORE", str(tmp_path / "copy"))
    return Store(tmp_path / "copy")


def key(stage="student", *words):
    """The key of a stage of the small run."""
    return next(n.key for n in planned(Path(os.environ["KD_STORE"]), *words)[0].nodes if n.name == stage)


def touched(folder):
    """What a run leaves in a store; the digests of data sets are kept by planning too."""
    return sorted(p.name for p in Path(folder).iterdir() if p.name != "data") if Path(folder).exists() else []


# --- help


def test_every_help_has_an_example_and_imports_nothing_slow():
    code = (
        "import contextlib, io, json, sys\n"
        "from kd.cli import main\n"
        "said = {}\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n"
        "        main([*words.split(), '--help'])\n"
        "    said[words] = out.getvalue()\n"
        "slow = {'torch', 'hydra', 'omegaconf', 'pandas', 'plotly', 'numpy', 'wandb', 'timm'}\n"
        "print(json.dumps([said, sorted(slow & set(sys.modules))]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(["", *COMMANDS])], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said, slow = json.loads(done.stdout)
    assert slow == []
    for command, text in said.items():
        assert "Example: kd " in text and "Usage: " in text, command
    assert all(f"  {name} " in said[""] for name in COMMANDS if " " not in name)


@pytest.mark.parametrize("words", [[], ["bench"]])
def test_a_command_alone_shows_its_help(kd, words):
    code, out, err = kd(*words)
    assert code == 2 and "Commands:" in out and err == []


# --- faults: one line, exit 2, nothing touched

OF_WORDS = [
    (["data=mnst"], "data=mnst: no such option; did you mean 'mnist'?"),
    (["experiments=x"], "experiments=x: no such option"),
    (["tempratur=3"], "did you mean 'temperature'?"),
    (["+extra=1"], "'extra' is no part of a config"),
    (["temperature=0"], "temperature=0 is out of range"),
    (["-m", "temperature=1,-1"], "temperature=-1 is out of range"),
    (["temperature=1,2"], "add -m to run one job for each"),
    (["-m", "data=glob(zz*)"], "data=glob(zz*) matches nothing"),
    (["hydra.mode=MULTIRUN"], "hydra.* is not part of a run"),
    (["student._target_=os.system"], "student: _target_ 'os.system' is outside the allowed packages"),
    (["+student.options.x=${oc.env:HOME}"], "student.options.x uses the resolver ${oc.env:…}"),
    (["--config-dir", "/nowhere"], "--config-dir /nowhere is no folder"),
    (["data=imagefolder", "data.folder=/nowhere"], "no train/<class>/ and val/<class>/ with images in /nowhere"),
    (["run.store=/proc/nope"], "the store /proc/nope cannot be written"),
    (["--fo"], "No such option: --fo"),
    (["-x"], "No such option: -x"),
]
OF_CHECKS = [
    (["+loss.kd.loss.temprature=3"], "temprature is not a field of kd.losses.logits.SoftTargetKL; did you mean 'temp"),
    (["+student.optins.x=1"], "optins is not a field of kd.models.create; did you mean 'options'?"),
    (["fit.optimiser._target_=torch.optim.AdmW"], "torch.optim has no 'AdmW'; did you mean 'AdamW'"),
    (["+fit.optimiser.momentumm=1"], "fit.optimiser.momentumm is not a field of torch.optim.AdamW; there are betas"),
    (
        ["loss=[ce,kd,hint]", "loss.hint.student=student.nope", "loss.hint.teacher=teacher.conv3"],
        "'nope' is no layer of SeedCNN; its layers begin with conv1, conv2, conv3",
    ),
    (["student.name=vgg11"], "vgg11 does not take images of 8x8 with 1 channel"),
    (["student.name=resnet81"], "there is no model 'resnet81'; did you mean 'resnet18'"),
]


@pytest.mark.parametrize(("words", "said"), [*OF_WORDS, *OF_CHECKS], ids=lambda value: str(value)[:60])
def test_a_wrong_run_is_one_line_exit_2_and_touches_nothing(words, said, kd, tmp_path):
    code, out, err = kd("run", *WORDS, *words)
    assert (code, out) == (2, "") and len(err) == 1 and err[0].startswith("kd: ")
    assert said in err[0] and "Traceback" not in err[0]
    assert touched(tmp_path / "store") == []


def test_a_data_set_that_is_not_there_and_cannot_be_had_is_one_line(kd, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    code, out, err = kd("run", "data=fashion_mnist", f"run.data_dir={tmp_path}/empty")
    assert (code, out) == (2, "") and len(err) == 1
    assert "fashion_mnist: no " in err[0] and f"{tmp_path}/empty (the folder is KD_DATA or run.data_dir)" in err[0]
    assert "no network" in err[0] and touched(tmp_path / "store") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("runn", "'runn' is no command; did you mean 'run'? (`kd --help` lists them)"),
        ("--vresion", "No such option: --vresion"),
        ("show zz", "'zz' is no hash: give four or more hexadecimal digits"),
        ("show 0000", "begins with 0000; `kd ls` shows what is there"),
        ("show", "Missing argument 'HASH'"),
        ("diff 0000 0000", "begins with 0000"),
        ("reproduce 0000", "begins with 0000"),
        ("reproduce 0000 --threads 0", "Invalid value for '--threads'"),
        ("rm 0000 --yes", "begins with 0000"),
        ("report 0000", "begins with 0000"),
        ("report --md /nowhere/x.md", "/nowhere/x.md is not there"),
        ("list losss", "'losss' is none of"),
        ("list layers resnet81", "did you mean 'resnet18'"),
        ("ls --where temperature", "is no condition; write name=value"),
        ("ls --sort acuracy", "did you mean 'accuracy'"),
        ("tune temperature=4", "no word is a search space; write one, e.g. 'temperature=interval(1,16)'"),
        (
            "tune alpha=interval(0,1) --maximize test/accuracy",
            "test/accuracy may choose nothing: test is measured once",
        ),
        ("tune --trials 0", "Invalid value for '--trials'"),
        ("plan tempratur=3", "did you mean 'temperature'?"),
        ("dashboard --what reprot", "did you mean 'report'?"),
        ("bench step --rounds 0", "Invalid value for '--rounds'"),
        ("bench stp", "No such command 'stp'"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_2(words, said, kd, store):
    code, out, err = kd(*words.split())
    assert (code, out) == (2, "") and len(err) == 1 and err[0].startswith("kd: ") and said in err[0]


def test_an_operating_system_that_refuses_is_one_line(kd, store, monkeypatch):
    monkeypatch.delenv("KD_TRACEBACK", raising=False)
    code, _, err = kd("report", "--out", "/proc/nope/page.html")
    assert code == 1 and len(err) == 1 and err[0].startswith("kd: No such file or directory: ")


def test_a_pipe_that_is_closed_is_no_fault_unless_it_is_a_jobs(kd, store, monkeypatch):
    for words in (["list", "stage"], ["list", "stage", "--json"]):
        command = [sys.executable, "-m", "kd", *words]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 0

    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("kd.launch.launch", broken)
    said = "kd: the pipe to a job broke (Broken pipe); the same command goes on"
    assert kd("run") == (1, "", [said])


# --- run


def test_a_finished_run_runs_nothing_again_and_shows_the_student_alone_beside_it(kd, store):
    code, out, err = kd("run", *WORDS)
    assert code == 0 and err == []
    assert "ran 0 stages (all of it was in the store)" in out
    assert out.rstrip().endswith(f"run {short(key())}: kd reproduce {short(key())}")
    table = out.partition("ran 0")[0]
    assert all(word in table for word in ("distilled", "alone", "teacher", short(key()), short(key("teacher"))))
    assert short(key("student", "pipeline=baseline")) in table and "gain" in table


def test_a_finished_run_is_told_without_importing_torch(store):
    code = (
        "import sys\nfrom kd.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'pandas', 'plotly', 'wandb', 'timm'} & set(sys.modules)\n"
    )
    for words in (["run", *WORDS], ["plan", *WORDS], ["ls"], ["show", short(key())]):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_a_run_as_data(kd, store):
    code, out, err = kd("run", *WORDS, "--json")
    assert code == 0 and err == []
    assert json.loads(out) == {
        "sweep": None,
        "ran": {},
        "jobs": [{"overrides": list(WORDS), "key": key(), "status": "hit", "error": None, "ran": []}],
    }


def test_a_sweep_with_a_failure_ends_with_1_and_says_which_and_why(kd, copy):
    sgd = "fit.optimiser._target_=torch.optim.SGD"
    words = ("run", "-m", *WORDS, "fit.lr=0.005,1e30", sgd)
    code, out, err = kd(*words)
    assert code == 1
    assert err[0].startswith("failed fit.lr=1e+30: step 2: term")
    lines = out.splitlines()
    assert "ran 0 stages" in lines
    at = next(i for i, line in enumerate(lines) if line.startswith("sweep "))
    sweep = lines[at].split()[1].rstrip(":")
    assert lines[at] == f"sweep {sweep}: 2 jobs, 0 run, 1 from the store, 1 failed"
    assert lines[at + 1].startswith("  failed fit.lr=1e+30: step 2") and lines[at + 2] == f"kd report {sweep}"
    record = json.loads((copy.root / "sweeps" / f"{sweep}.json").read_text())
    assert [job["status"] for job in record["jobs"]] == ["hit", "failed"] and "step 2" in record["jobs"][1]["error"]
    code, out, _ = kd(*words, "--json")
    jobs = json.loads(out)["jobs"]
    assert code == 1 and [job["status"] for job in jobs] == ["hit", "failed"] and "step 2" in jobs[1]["error"]


def test_one_run_that_fails_is_one_line_and_exit_1(kd, copy):
    code, out, err = kd("run", *WORDS, "fit.lr=1e30", "fit.optimiser._target_=torch.optim.SGD")
    assert (code, out) == (1, "") and len(err) == 1 and err[0].startswith("kd: step 2: term")


def test_no_value_of_the_environment_is_in_any_card(kept):
    cards = [(a.path / "card.json").read_text() for a in Store(kept)]
    assert len(cards) == 5 and sum("${oc.env:PATH}" in text for text in cards) >= 3
    assert not [
        name for text in cards for name in ("PATH", "HOME") if len(os.environ[name]) > 9 and os.environ[name] in text
    ]


def test_what_other_code_made_is_told_by_plan_and_once_by_run(kd, copy):
    for artifact in copy:
        artifact.card["fingerprints"]["code"]["digest"] = "c1"
        (artifact.path / "card.json").write_text(json.dumps(artifact.card))
    code, out, _ = kd("plan", *WORDS)
    assert code == 0 and out.count("hit (other code)") == 3
    code, out, err = kd("run", *WORDS)
    assert code == 0 and len(err) == 1
    assert err[0].startswith("note: 3 of the artifacts were made with other code; `kd plan` says which")
    plan = json.loads(kd("plan", *WORDS, "--json")[1])
    assert [stage["other"] for stage in plan["jobs"][0]["stages"]] == [["code"]] * 3


# --- plan, ls, show, diff


def test_a_plan_says_hit_miss_and_damaged(kd, copy):
    (copy.folder(key("labels")) / "labels.safetensors").write_bytes(b"x")
    code, out, err = kd("plan", *WORDS, "temperature=8")
    assert code == 0 and err == []
    lines = [line.split(maxsplit=3) for line in out.splitlines()]
    assert lines[1] == ["teacher", short(key("teacher")), "hit"]
    assert lines[2][2] == "damaged" and "labels.safetensors is half-written: 1 of" in lines[2][3]
    assert lines[3][2] == "miss" and f"unlike {short(key())}: objective.kd.loss.temperature 4 -> 8" in lines[3][3]
    assert out.splitlines()[-1] == "1 job; to run: 1 labels, 1 student"


def test_a_plan_of_a_sweep_counts_what_is_shared_once_and_runs_nothing(kd, tmp_path):
    code, out, _ = kd("plan", "-m", *WORDS, "temperature=1,4,8", "alpha=0.1,0.9")
    assert code == 0 and out.splitlines()[-1] == "6 jobs; to run: 1 teacher, 1 labels, 6 students"
    assert touched(tmp_path / "store") == []
    data = json.loads(kd("plan", "-m", *WORDS, "temperature=1,4,8", "alpha=0.1,0.9", "--json")[1])
    assert len(data["jobs"]) == 6 and len(data["to_run"]) == 8


def test_a_plan_says_why_labels_are_not_used(kd):
    code, out, _ = kd("plan", *WORDS, "data.augment=shift")
    assert code == 0
    assert "labels not used by student: data.augment=shift makes a new view in each epoch, so the live teacher" in out


def test_the_runs_are_listed(kd, store, tmp_path, monkeypatch):
    code, out, err = kd("ls")
    assert code == 0 and err == [] and len(out.splitlines()) == 6
    code, out, _ = kd("ls", "--stage", "student", "--where", "temperature=4", "--sort=-accuracy", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["stage"] for row in rows] == ["student"] * 2
    assert rows[0]["accuracy"] >= rows[1]["accuracy"]
    assert kd("ls", "--where", "accuracy>2")[:2] == (0, f"no run in {store.root} fits; `kd run` makes one\n")
    monkeypatch.setenv("KD_STORE", str(tmp_path / "none"))
    assert kd("ls")[:2] == (0, f"no run in {tmp_path / 'none'}; `kd run` makes one\n")


def test_one_run_is_shown(kd, store):
    code, out, err = kd("show", key()[:8])
    assert code == 0 and err == [] and out.startswith(f"student {key()}\nlineage\n├── teacher {short(key('teacher'))}")
    assert kd("show", key()[:8].upper())[1] == out
    assert json.loads(kd("show", key()[:8], "--json")[1])["key"] == key()


def test_two_runs_are_compared(kd, store):
    other = key("student", "pipeline=baseline")
    code, out, err = kd("diff", key()[:8], other[:8])
    assert code == 0 and err == [] and "objective.kd.weight" in out
    data = json.loads(kd("diff", key()[:8], other[:8], "--json")[1])
    weights = {leaf["path"]: (leaf["a"], leaf["b"]) for leaf in data["config"]}
    assert weights["objective.ce.weight"] == (0.1, 1)
    assert kd("diff", key()[:8], key()[:8])[1] == "nothing differs\n"
    assert json.loads(kd("diff", key()[:8], key()[:8], "--json")[1]) == {}


# --- reproduce, report, list, doctor, dashboard


def test_a_run_is_reproduced_and_the_verdict_is_data_too(kd, store):
    code, out, err = kd("reproduce", key()[:8], "--json")
    assert code == 0 and err == []
    data = json.loads(out)
    assert set(data) == {"run", "verdict", "reasons", "notes", "stages"}
    assert (data["run"], data["verdict"], data["reasons"]) == (key(), "bit-identical", [])
    assert [stage["stage"] for stage in data["stages"]] == ["teacher", "labels", "student"]
    assert touched(store.root) == touched(store.root) and "scratch" not in touched(store.root)


def test_a_run_whose_teacher_is_gone_is_inconclusive(kd, copy):
    copy.remove(key("teacher"))
    code, out, err = kd("reproduce", key()[:8])
    assert (code, out) == (3, "") and len(err) == 1 and "whose card is not in the store" in err[0]


def test_the_last_sweep_is_reported_with_its_failure(kd, store, tmp_path):
    code, out, err = kd("report", "--out", tmp_path / "page.html")
    assert (code, out, err) == (0, f"{tmp_path / 'page.html'}\n", [])
    assert "not finite" in (tmp_path / "page.html").read_text()
    data = json.loads(kd("report", "--json")[1])
    assert set(data) == {"title", "sweep", "rows"}
    assert [job["status"] for job in data["sweep"]["jobs"]] == ["done", "failed"]


@pytest.mark.parametrize(
    "what", ["loss", "recipe", "pair", "data", "fit", "pipeline", "run", "stage", "experiments", "model"]
)
def test_what_can_be_composed_is_listed(what, kd):
    code, out, err = kd("list", what)
    rows = json.loads(kd("list", what, "--json")[1])
    assert code == 0 and err == [] and all(row["name"] in out for row in rows)


def test_the_layers_of_a_network_are_listed(kd):
    code, out, _ = kd("list", "layers", "seed_cnn_small")
    assert code == 0 and out.split()[:3] == ["path", "layer", "shape"] and "conv3" in out


def test_the_doctor_checks_and_says_so_as_data(kd, store, tmp_path):
    code, out, err = kd("doctor", "--data-dir", tmp_path)
    assert code == 0 and err == [] and "artifacts          5 sound" in out and "GPU" in out
    rows = json.loads(kd("doctor", "--data-dir", tmp_path, "--no-gpu", "--json")[1])
    assert all(set(row) == {"state", "check", "said"} for row in rows) and "GPU" not in {row["check"] for row in rows}


def test_the_doctor_ends_with_1_where_a_check_is_bad(kd, store, tmp_path, monkeypatch):
    (tmp_path / "hydra_ax_sweeper-1.0.dist-info").mkdir()
    (tmp_path / "hydra_ax_sweeper-1.0.dist-info" / "METADATA").write_text("Name: hydra-ax-sweeper\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = kd("doctor", "--data-dir", tmp_path, "--no-gpu")
    assert code == 1 and "bad   hydra-ax-sweeper   breaks every Hydra program at start: pip uninstall" in out


def test_the_dashboard_is_a_page_or_says_what_it_needs(kd, copy, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, out, err = kd("dashboard", "--what", "report")
    assert code == 0 and err == [] and Path(out.strip()).is_relative_to(copy.root) and Path(out.strip()).exists()
    code, out, err = kd("dashboard", "--what", "workspace")
    assert (code, out, len(err)) == (2, "", 1) and "needs a login: `wandb login`" in err[0]


# --- rm


def test_nothing_is_removed_without_a_yes(kd, copy, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    code, out, err = kd("rm", key()[:8])
    assert (code, out) == (2, "")
    assert err == [f"kd: this would remove student {short(key())}; add --yes to do it without a question"]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    def no(*_, **__):
        raise typer.Abort

    monkeypatch.setattr(typer, "confirm", no)
    assert kd("rm", key()[:8]) == (1, "", ["kd: nothing was done"])
    assert copy.get(key()) is not None


def test_a_run_is_removed_and_the_same_run_makes_it_again(kd, copy):
    assert kd("rm", key()[:8], "--yes") == (0, f"removed student {short(key())}\n", [])
    assert copy.get(key()) is None
    code, out, err = kd("run", *WORDS)
    assert code == 0 and "ran 1 student\n" in out and err == [f"made student {short(key())}"]


def test_what_others_were_made_from_is_removed_only_by_force_or_with_them(kd, copy):
    code, out, err = kd("rm", key("teacher")[:8], "--yes")
    assert (code, out) == (2, "") and "were made from" in err[0] and "add --force" in err[0]
    assert copy.get(key("teacher")) is not None
    users = [u.key for u in copy if key("teacher") in u.card["document"]["inputs"].values()]
    assert len(users) == 3
    assert kd("rm", key("teacher")[:8], "--yes", "--force")[0] == 0
    assert kd("rm", *users, "--yes")[0] == 0 and len(list(copy)) == 1


def test_a_card_that_cannot_be_read_can_be_removed(kd, copy):
    (copy.folder(key()) / "card.json").write_text("{")
    code, _, err = kd("show", key()[:8])
    assert code == 2 and "cannot be read" in err[0]
    assert kd("rm", key()[:8], "--yes") == (0, f"removed unreadable artifact {short(key())}\n", [])
    assert not copy.folder(key()).exists()
