"""Search over the fields of a config: Optuna asks for values, a trial is the run that `kd run` would make of them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.progress import Progress

from kd.config import Job, each, jobs
from kd.errors import InputError, KDError, offer
from kd.launch import progress, repeat, say, writable
from kd.pipeline import jobs as children
from kd.pipeline.execute import record_sweep
from kd.pipeline.plan import Node, Plan, outlook, plan, status
from kd.pipeline.work import check_jobs, run_trial
from kd.report.rows import COST
from kd.report.study import write_study
from kd.spaces import Space, spaces
from kd.store import Store, canonical, digest, short
from kd.training.pruning import PRUNERS, Trial, journal, quiet, report
from kd.training.seeds import mix
from kd.training.settings import Run, one_of
from kd.views import counted, plain, rows_table

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Row = dict[str, Any]

SAMPLERS = ("tpe", "random")
# What the stages of image classification measure without the test split; other stages may know other names.
MEASURED = tuple(f"val/{name}" for name in ("accuracy", "accuracy_top5", "precision", "recall", "f1", "loss", "ece"))
MEASURED += tuple(f"cost/{name}" for name in COST if name != "gzip_bytes")  # which only networks with zeros have
_OURS = ("kd.stages.Train", "kd.stages.Distil")
_FINISHED = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
_TOLD = {"hit": "from the store", "done": "run"}
_ORDER = ("done", "hit", "pruned", "failed", "running", "waiting")


@dataclass(frozen=True)
class Asked:
    """What a search is asked for beside its words.

    Args:
        trials: how many there shall be in all; those that are done count.
        maximize: metrics that shall become large.
        minimize: metrics that shall become small.
        sampler: `tpe` or `random`.
        sampler_seed: what the suggestions are drawn from.
        pruner: `hyperband`, `median` or `none`; None for hyperband where it can be.
        name: the study's; by default a hash of what is searched.
        storage: its file; by default in the store.
    """

    trials: int = 20
    maximize: Sequence[str] = ()
    minimize: Sequence[str] = ()
    sampler: str = "tpe"
    sampler_seed: int = 0
    pruner: str | None = None
    name: str | None = None
    storage: str | None = None

    def __post_init__(self) -> None:
        """Check the words of the options.

        Raises:
            InputError: at the first that is none.
        """
        one_of("--sampler", self.sampler, SAMPLERS)
        if self.pruner is not None:
            one_of("--pruner", self.pruner, PRUNERS)
        if self.name is not None and not re.fullmatch(r"\w[\w.-]{0,99}", self.name):
            raise InputError(f"--name {self.name!r} names files: letters, digits, dot, dash and underscore only")

    @property
    def objectives(self) -> dict[str, str]:
        """Each metric with its direction; the first one sorts.

        Raises:
            InputError: if test is asked to choose, or a metric goes both ways.
        """
        found = {name: "maximize" for name in self.maximize} | {name: "minimize" for name in self.minimize}
        for name in found:
            if name.startswith("test/"):
                same = f"val/{name.removeprefix('test/')}"
                instead = same if same in MEASURED else MEASURED[0]
                raise InputError(f"{name} may choose nothing: test is measured once, after training; use {instead}")
            if name in self.maximize and name in self.minimize:
                raise InputError(f"{name} cannot be maximized and minimized at once")
        return found or {"val/accuracy": "maximize"}


@dataclass
class Search:
    """One study: what is searched, where it is kept, and what its trials became."""

    words: list[str]
    spaces: dict[int, Space]
    objectives: dict[str, str]
    config_dir: str | None
    run: Run
    store: Store
    name: str
    path: Path
    pruner: str
    epochs: int
    study: optuna.Study
    stages: dict[str, int] = field(default_factory=dict)  # how many of each this call ran
    plans: list[Plan] = field(default_factory=list)  # of this call's trials

    @property
    def first(self) -> str:
        """The objective that sorts, and that pruning hears."""
        return next(iter(self.objectives))

    @property
    def sweep(self) -> str:
        """The study's id as a sweep."""
        return hashlib.sha256(f"tune {self.name}".encode()).hexdigest()[:16]

    def filled(self, params: Mapping[str, Any]) -> list[str]:
        """The words of one trial, as they would be typed."""
        return [
            f"{space.key}={space.written(params[space.key])}" if (space := self.spaces.get(at)) else word
            for at, word in enumerate(self.words)
        ]

    def label(self, words: Sequence[str]) -> str:
        """Those words of a trial that were suggested."""
        return " ".join(words[at] for at in self.spaces)

    def command(self, words: Sequence[str]) -> str:
        """What is typed to make a trial's run."""
        own = ["--config-dir", self.config_dir] if self.config_dir else []
        return shlex.join(["kd", "run", *own, *words])

    # --- what there is

    def trials(self) -> list[Row]:
        """The trials, best first."""
        rows = [self._row(trial) for trial in _counting(self.study)]
        best = self.best()
        sign = -1 if self.objectives[self.first] == "maximize" else 1
        rows.sort(
            key=lambda row: (
                row["trial"] not in best,
                max(_ORDER.index(row["state"]), 1),  # a hit is as good as a run of its own
                sign * row["values"].get(self.first, 0.0),
                row["trial"],
            )
        )
        return rows

    def _row(self, trial: FrozenTrial) -> Row:
        words = list(trial.user_attrs.get("words", ()))
        return {
            "trial": trial.number,
            "state": _state(trial),
            "values": dict(zip(self.objectives, trial.values or (), strict=False)),
            "params": {s.key: words[at].partition("=")[2] if words else None for at, s in self.spaces.items()},
            "overrides": words,
            "command": self.command(words) if words else None,
            "key": trial.user_attrs.get("key"),
            "error": trial.user_attrs.get("error"),
            "epochs": dict(sorted(trial.intermediate_values.items())),
        }

    def best(self) -> list[int]:
        """The numbers of the trials that no other beats: one, or the Pareto front of several objectives."""
        if not any(trial.state.name == "COMPLETE" for trial in self.study.get_trials(deepcopy=False)):
            return []
        if len(self.objectives) > 1:
            return [trial.number for trial in self.study.best_trials]
        return [self.study.best_trial.number]

    # --- what is to be done

    def go(self, trials: int, sampler: str, seed: int) -> None:
        """Ask, run and tell until there are that many trials."""
        with progress(self.run.progress) as bars:
            overall = bars.add_task("trials", total=trials, completed=_ended(self.study))
            while True:
                with contextlib.ExitStack() as held:
                    trial = self._next(trials, sampler, seed, held)
                    if trial is None:
                        break
                    self._tell(trial, self._attempt(trial, bars))
                self._record()
                bars.update(overall, completed=_ended(self.study))
        self._record()

    def _next(self, trials: int, sampler: str, seed: int, held: contextlib.ExitStack) -> optuna.Trial | None:
        """The next trial, its lock put into ``held``: one that a dead process left, else a new one; None for enough.

        One process at a time is here.
        """
        import optuna

        with self.locks.lock(self.lock_name()):
            for left in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
                if self.locks.locked(self.lock_name(left.number)):
                    continue
                if len(left.params) < len(self.spaces):  # its process died while it asked
                    self.study.tell(left.number, state=optuna.trial.TrialState.FAIL)
                    continue
                held.enter_context(self.locks.lock(self.lock_name(left.number)))
                return optuna.Trial(self.study, left._trial_id)  # its run goes on from its checkpoint
            place = sum(trial.state.name != "WAITING" for trial in _counting(self.study))
            if place >= trials:
                return None
            # From the seed and the trial's place alone, so that a search that was ended goes on as it would have.
            drawn = mix(seed, "trial", place) % 2**32
            self.study.sampler = (
                optuna.samplers.RandomSampler(drawn) if sampler == "random" else optuna.samplers.TPESampler(seed=drawn)
            )
            trial = self.study.ask({space.key: space.distribution() for space in self.spaces.values()})
            held.enter_context(self.locks.lock(self.lock_name(trial.number)))
        return trial

    @property
    def locks(self) -> Store:
        """What keeps the locks: beside the study's file, which processes with other stores may share."""
        return Store(self.path.with_name(f".{self.path.name}"))

    def lock_name(self, trial: int | None = None) -> str:
        """The lock of one trial while it runs, or of the study while one is asked for; a dead process holds none."""
        return hashlib.sha256(f"{self.name} {trial}".encode()).hexdigest()

    def _attempt(self, trial: optuna.Trial, bars: Progress) -> dict[str, Any]:
        """Run a trial, or find its run in the store; how it ended."""
        words = self.filled(trial.params)
        trial.set_user_attr("words", words)
        try:
            job = _single(words, self.config_dir)
            one = plan(job.config, job.overrides)
            trial.set_user_attr("key", one.key)
            self.plans.append(one)
            if self.store.get(one.key) is not None:
                return {"status": "hit", "values": self._values(trial, one.key)}
            outlook([one], self.store, self.run)
            outcome = self._run(one, trial, bars)
            if outcome["status"] == "failed":
                return outcome
            if outcome["value"] is not None:
                say(f"[yellow]pruned[/] {short(one.key)}  {escape(self.label(words))}: {outcome['value']}")
                return {"status": "pruned"}
            return {"status": "done", "values": self._values(trial, one.key)}
        except KDError as error:
            return {"status": "failed", "error": str(error)}

    def _run(self, one: Plan, trial: optuna.Trial, bars: Progress) -> dict[str, Any]:
        """In a child: the missing stages, the last of them under the trial's eye."""
        watched = self._watched(trial)
        run = replace(self.run, validate_every=1) if watched else self.run
        name = f"trial {trial.number}"
        task = bars.add_task(name, total=None)

        def hear(event: dict[str, Any]) -> None:
            nonlocal task
            kind = event.get("event")
            if kind == "start":
                bars.remove_task(task)  # a total cannot be taken back
                task = bars.add_task(f"{name}: {event['stage']}", total=None)
            elif kind in ("step", "pass"):
                bars.update(task, total=event["total"], completed=event["step"])
            elif kind == "done":
                self.stages[event["stage"]] = self.stages.get(event["stage"], 0) + 1
                own = self.label(one.overrides) if event["key"] == one.key else ""
                say(f"[green]made[/] {event['stage']} {short(event['key'])}  {escape(own)}".rstrip())
            elif kind == "say":
                say(escape(event["line"]))

        outcome = children.call(run_trial, one, run, self.sweep, watched, tell=hear)
        bars.remove_task(task)
        return outcome

    def _watched(self, trial: optuna.Trial) -> Trial | None:
        """What a training needs to report to its trial; None where nothing is pruned."""
        if self.pruner == "none":
            return None
        return Trial(str(self.path), self.name, trial.number, self.first, self.pruner, self.epochs)

    def _values(self, trial: optuna.Trial, key: str) -> list[float]:
        """The objectives of a finished run, from its card; its epochs are reported where no callback did it.

        Raises:
            KDError: if the run has no such metric, or it is no finite number.
        """
        found = self.store.get(key)
        numbers = measured(found.card) if found else {}
        for name in self.objectives:
            if name not in numbers:
                raise KDError(f"the run {short(key)} has no {name}{offer(name, numbers)}")
            if not math.isfinite(numbers[name]):
                raise KDError(f"the run {short(key)} has {name}={numbers[name]}")
        if found and (watched := self._watched(trial)):
            epochs = found.card.get("trace", {}).get("epochs", ())
            report(watched.open(), {int(e["epoch"]) + 1: float(e[self.first]) for e in epochs if self.first in e})
        return [numbers[name] for name in self.objectives]

    def _tell(self, trial: optuna.Trial, outcome: dict[str, Any]) -> None:
        """How a trial ended: its values, its last epoch's where it was given up, or why it failed."""
        from optuna.trial import TrialState

        trial.set_user_attr("status", outcome["status"])
        if outcome["status"] == "failed":
            # What `kd run` says of a job that was killed; here no command resumes it but that one.
            error = outcome["error"].removesuffix("; the same command resumes it")
            trial.set_user_attr("error", error)
            say(f"[red]failed[/] {escape(self.label(self.filled(trial.params)))}: {escape(error)}")
            self.study.tell(trial, state=TrialState.FAIL)
        elif outcome["status"] == "pruned":
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, outcome["values"])

    def _record(self) -> None:
        """Write the trials down as a sweep, for `kd report`."""
        rows = sorted((row for row in self.trials() if row["overrides"]), key=lambda row: int(row["trial"]))
        plans = [Plan((Node("", row["key"] or "", {}, {}, {}),), "", {}, tuple(row["overrides"])) for row in rows]
        states = ["pending" if row["state"] in ("running", "waiting") else row["state"] for row in rows]
        outcomes = [{"status": state, "error": row["error"]} for state, row in zip(states, rows, strict=True)]
        record_sweep(self.store, self.sweep, self.words, plans, outcomes)


def tune(words: list[str], asked: Asked, config_dir: str | None = None) -> Search:
    """Search until there are as many trials as asked for.

    Raises:
        InputError: before anything runs, if the words, a space, a metric or the study is not right.
    """
    _need_optuna()
    objectives = asked.objectives
    found = spaces(words, config_dir)
    plans, run = _probes(words, found, config_dir)
    store = Store(run.store)
    _check_metrics(objectives, plans[0].nodes[-1], run, store)
    question = {
        "spaces": sorted(map(canonical, (space.question() for space in found.values()))),
        "objectives": [list(item) for item in objectives.items()],
        "runs": sorted({one.key for one in plans}),
    }
    identity = short(digest(question))
    name = asked.name or identity
    path = Path(asked.storage).expanduser().absolute() if asked.storage else store.root / "tune" / f"{name}.log"
    pruner = _pruner(asked.pruner, objectives)
    study = _existing(path, name, identity)
    missing = study is None or _ended(study) < asked.trials
    if missing:
        _rehearse(plans, run, store)
    study = study or _begun(path, name, identity, words, objectives)
    epochs = max(int((one.nodes[-1].config.get("fit") or {}).get("epochs", 1)) for one in plans)
    search = Search(words, found, objectives, config_dir, run, store, name, path, pruner, epochs, study)
    if missing:
        search.go(asked.trials, asked.sampler, asked.sampler_seed)
    return search


def measured(card: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a card that may choose: all metrics but the test split's, and what the model costs.

    >>> measured({"metrics": {"val/f1": 0.5, "test/f1": 0.6, "val/f1_per_class": [0.5]}, "cost": {"macs": 8}})
    {'val/f1': 0.5, 'cost/macs': 8}
    """
    numbers = {**card.get("metrics", {}), **{f"cost/{name}": value for name, value in card.get("cost", {}).items()}}
    return {n: v for n, v in numbers.items() if not n.startswith("test/") and type(v) in (int, float)}


def _need_optuna() -> None:
    try:
        quiet()
    except ModuleNotFoundError as error:
        raise InputError("kd tune needs optuna, which is not installed: pip install 'kd[tune]'") from error


def _single(words: list[str], config_dir: str | None) -> Job:
    """The one job of these words.

    Raises:
        InputError: if an experiment among them brings a grid of its own.
    """
    found, _ = jobs(words, False, config_dir)
    if len(found) != 1:
        raise InputError(f"these words stand for {len(found)} jobs: an experiment with a grid of its own is no trial")
    return found[0]


def _probes(words: list[str], found: Mapping[int, Space], config_dir: str | None) -> tuple[list[Plan], Run]:
    """Plans at the ends of each space, and the settings of all of them: what cannot be is found before any training.

    Raises:
        InputError: at the first that is not right.
    """
    values = {at: space.probes() for at, space in found.items()}
    base = [f"{found[at].key}={values[at][0]}" if at in found else word for at, word in enumerate(words)]
    if any(word.startswith("experiments=") for word in base):
        _single(base, config_dir)
    others = [(at, value) for at in found for value in values[at][1:]]
    lists = [[*base[:at], f"{found[at].key}={value}", *base[at + 1 :]] for at, value in others]
    with contextlib.closing(each([base, *lists], config_dir)) as composed:
        first = next(composed)
        plans = [plan(first.config, first.overrides)]
        for at, _ in others:
            try:
                job = next(composed)
                plans.append(plan(job.config, job.overrides))
            except InputError as error:
                whole = "; int(interval(…)) holds whole numbers only" if "whole number" in str(error) else ""
                raise InputError(f"{error} (a value of {found[at].word}){whole}") from error
    return plans, Run(**first.config["run"])


def _check_metrics(objectives: Mapping[str, str], last: Node, run: Run, store: Store) -> None:
    """Refuse a metric that no run will have, as far as that can be known before one has run.

    Raises:
        InputError: naming the nearest ones.
    """
    stage = last.document["stage"]
    same = [artifact.card for artifact in store if artifact.card["document"]["stage"] == stage]
    known = dict.fromkeys([*MEASURED, *(name for card in same for name in measured(card))])
    for name in objectives:
        if stage in _OURS and name not in known:
            raise InputError(f"{name} is not measured{offer(name, known)}")
        if name.startswith("cost/latency") and not run.latency:
            raise InputError(f"{name} is not measured with run.latency=false")


def _pruner(asked: str | None, objectives: Mapping[str, str]) -> str:
    """The pruner there can be: it needs one objective that each epoch has."""
    several = len(objectives) > 1
    if not several and next(iter(objectives)).startswith("val/"):
        return asked or PRUNERS[0]
    if asked not in (None, "none"):
        why = "Optuna cannot prune for several objectives" if several else "a cost has no value by epoch"
        say(f"--pruner {asked}: {why}, so each trial runs to its end")
    return "none"


def _existing(path: Path, name: str, identity: str) -> optuna.Study | None:
    """The study of that name in a file, or None where it is not begun.

    Raises:
        InputError: if the file is no journal of Optuna's, or the study is about something else.
    """
    import optuna

    if not path.exists():
        return None
    try:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            raise InputError(f"the last line of {path} was cut short, as by a full disk: remove it, then go on")
        storage = journal(path)
        if name not in optuna.study.get_all_study_names(storage):
            return None
        # No pruner here: this process never prunes, and with Hyperband TPE would learn from one bracket only.
        study = optuna.load_study(study_name=name, storage=storage, pruner=optuna.pruners.NopPruner())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(
            f"{path} cannot be read as a study ({type(error).__name__}); name another --storage"
        ) from error
    if not study.user_attrs and not study.trials:  # a kill came right after its beginning
        return None
    if study.user_attrs.get("identity") != identity:
        begun = shlex.join(["kd", "tune", *study.user_attrs.get("words", ())])
        raise InputError(
            f"the study {name} was begun with other words, defaults or data (`{begun}`); give this one another --name"
        )
    return study


def _begun(path: Path, name: str, identity: str, words: list[str], objectives: Mapping[str, str]) -> optuna.Study:
    """A new study in its file.

    Raises:
        InputError: if the file cannot be written.
    """
    import optuna

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            study_name=name,
            storage=journal(path),
            pruner=optuna.pruners.NopPruner(),  # as in `_existing`
            directions=[optuna.study.StudyDirection[way.upper()] for way in objectives.values()],
            load_if_exists=True,
        )
        study.set_user_attr("words", words)
        study.set_user_attr("identity", identity)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another --storage") from error
    return study


def _rehearse(plans: list[Plan], run: Run, store: Store) -> None:
    """Build what the probes would build, once, as `kd run` does before its first job.

    Raises:
        KDError: at the first that cannot run.
    """
    writable(store.root)
    outlook(plans, store, run)
    missing = [one for one in plans if any(status(node, store) != "hit" for node in one.nodes)]
    if missing:
        outcome = children.call(check_jobs, missing, run, tell=repeat)
        if outcome["status"] != "done":
            raise (InputError if outcome.get("exit_code") == 2 else KDError)(outcome["error"])


def _counting(study: optuna.Study) -> list[FrozenTrial]:
    """The trials, without those whose process died before they had their values."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.name != "FAIL" or t.user_attrs]


def _ended(study: optuna.Study) -> int:
    """How many trials are over, whatever their end."""
    return sum(trial.state.is_finished() for trial in _counting(study))


def _state(trial: FrozenTrial) -> str:
    """How a trial ended in our words, or where it is."""
    if not trial.state.is_finished():
        return trial.state.name.lower()
    return str(trial.user_attrs.get("status", _FINISHED[trial.state.name]))


def table(search: Search, width: int) -> Group:
    """The trials, best first."""
    rows = [
        {
            "trial": row["trial"],
            **row["params"],
            **{name: row["values"].get(name) for name in search.objectives},
            "state": row["state"],
            "hash": short(row["key"]) if row["key"] else None,
        }
        for row in search.trials()
    ]
    return rows_table(rows, width)


def summary(search: Search) -> list[str]:
    """What was run, what failed and why, the best trials and the commands that make them; one line each."""
    rows, best = search.trials(), search.best()
    states = [row["state"] for row in rows]
    told = [f"{len(rows)} trial{'s' if len(rows) != 1 else ''}"]
    told += [f"{states.count(state)} {_TOLD.get(state, state)}" for state in _ORDER if state in states]
    lines = [f"ran {counted(search.stages) or '0 stages'}", f"study {search.name}: {', '.join(told)}"]
    lines += [f"  failed trial {row['trial']}: {row['error']}" for row in rows if row["error"]]
    several = len(search.objectives) > 1
    lines += [f"Pareto front: {len(best)} of them"] if several and best else []
    for row in rows:
        if row["trial"] in best:
            values = ", ".join(f"{name} {plain(value)}" for name, value in row["values"].items())
            lines += [f"{'' if several else 'best '}trial {row['trial']}: {values}", f"  {row['command']}"]
    return [*lines, f"kd report {search.sweep}"]


def as_data(search: Search, page: Path | None) -> dict[str, Any]:
    """All of it for a script."""
    return {
        "study": search.name,
        "storage": str(search.path),
        "sweep": search.sweep,
        "objectives": search.objectives,
        "pruner": search.pruner,
        "ran": search.stages,
        "best": search.best(),
        "page": str(page) if page else None,
        "trials": search.trials(),
    }


def write_page(search: Search) -> Path:
    """Write the page of a search; returns its path."""
    return write_study(
        search.store.root / "reports" / f"tune-{search.name}.html",
        search.name,
        shlex.join(["kd", "tune", *search.words]),
        search.trials(),
        search.objectives,
        search.best(),
        [space.key for space in search.spaces.values() if space.log],
    )
