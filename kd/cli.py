"""The command line: `kd run`, `kd plan`, `kd ls`, `kd reproduce` and the rest. Slow imports come late."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kd.errors import InputError, KDError, nearest

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": False}

Words = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides, e.g. temperature=4 student.name=resnet18 data=mnist.", show_default=False),
]
Multirun = Annotated[
    bool, typer.Option("--multirun", "-m", help="One job for each combination of values, e.g. alpha=0.1,0.9.")
]
ConfigDir = Annotated[str | None, typer.Option("--config-dir", help="A folder with config groups of your own.")]
StoreDir = Annotated[str, typer.Option("--store", envvar="KD_STORE", help="The folder of artifacts.")]
Json = Annotated[bool, typer.Option("--json", help="Print data for a script.")]


class _Group(TyperGroup):
    """Commands, with the nearest name where one is misspelt."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse an unknown command in one line."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise _Refused(
                f"{args[0]!r} is no command{nearest(args[0], self.list_commands(ctx))} (`kd --help` lists them)"
            )
        return super().resolve_command(ctx, args)


# What the parser raises for a wrong option; typer exports only this subclass of it.
_USAGE: Any = typer.BadParameter.__mro__[1]


class _Refused(InputError):
    """A word on the command line that is none."""


app = typer.Typer(
    cls=_Group,
    name="kd",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Knowledge distillation and model compression; every run is found and reproduced by the hash of its config.",
)
bench = typer.Typer(help="Measure speed: ratios within one run, medians.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


def _print(thing: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, width=width, soft_wrap=not sys.stdout.isatty()).print(thing)


def _json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


@app.command("run")
def run_(words: Words = None, multirun: Multirun = False, config_dir: ConfigDir = None, as_json: Json = False) -> None:
    """Run what is missing, then print one table.

    Example: kd run -m temperature=1,4,8 alpha=0.1,0.9 data=mnist
    """
    from kd.launch import launch
    from kd.report import rows as tables
    from kd.report.tables import terminal
    from kd.reporting import log_sweep
    from kd.store import Store, short

    plans, outcomes, sweep, run = launch(words or [], multirun, config_dir)
    store = Store(run.store)
    lookup = {a.key: a.card for a in store}
    ran: dict[str, int] = {}
    for outcome in outcomes:
        for stage in outcome["ran"]:
            ran[stage] = ran.get(stage, 0) + 1
    failed = [o for o in outcomes if o["status"] == "failed"]
    finished = [lookup[p.key] for p in plans if p.key in lookup]
    found = tables.collect(tables.related(finished, lookup), lookup)
    if as_json:
        _json(
            {
                "sweep": sweep,
                "ran": ran,
                "jobs": [
                    {"overrides": list(p.overrides), "key": p.key, **{k: o.get(k) for k in ("status", "error", "ran")}}
                    for p, o in zip(plans, outcomes, strict=True)
                ],
            }
        )
    else:
        if found:
            _print(terminal(tables.over_seeds(found)))
        total = ", ".join(f"{n} {stage}" for stage, n in ran.items()) or "0 stages (all of it was in the store)"
        sys.stdout.write(f"ran {total}\n")
        if sweep is not None:
            done = sum(o["status"] == "done" for o in outcomes)
            hit = sum(o["status"] == "hit" for o in outcomes)
            sys.stdout.write(
                f"sweep {sweep}: {len(plans)} jobs, {done} run, {hit} from the store, {len(failed)} failed\n"
            )
            for p, o in zip(plans, outcomes, strict=True):
                if o["status"] == "failed":
                    sys.stdout.write(f"  failed {' '.join(p.overrides)}: {o['error']}\n")
            sys.stdout.write(f"kd report {sweep}\n")
        elif not failed:
            sys.stdout.write(f"run {short(plans[0].key)}: kd reproduce {short(plans[0].key)}\n")
    if sweep is not None and any(o["ran"] for o in outcomes) and (line := log_sweep(sweep, run)):
        sys.stderr.write(line + "\n")
    if failed:
        raise typer.Exit(2 if sweep is None and failed[0].get("exit_code") == 2 else 1)


@app.command("plan")
def plan_(words: Words = None, multirun: Multirun = False, config_dir: ConfigDir = None, as_json: Json = False) -> None:
    """Show each stage, its key, and whether the store has it; nothing is run.

    Example: kd plan -m temperature=1,4,8 data=mnist
    """
    from kd.launch import planned
    from kd.store import Store
    from kd.views import plan_data, plan_view

    plans, _, run, _ = planned(words or [], multirun, config_dir)
    store = Store(run.store)
    _json(plan_data(plans, store)) if as_json else _print(plan_view(plans, store))


@app.command("ls")
def ls(
    where: Annotated[
        list[str] | None, typer.Option("--where", "-w", help="name=value, name>value, name<value; again for more.")
    ] = None,
    sort: Annotated[str | None, typer.Option(help="A column; -column for falling order.")] = None,
    stage: Annotated[str | None, typer.Option(help="teacher, labels, student.")] = None,
    store: StoreDir = ".kd",
    as_json: Json = False,
) -> None:
    """List the runs in the store.

    Example: kd ls --stage student --where temperature=4 --sort -accuracy
    """
    from kd.store import Store
    from kd.views import ls_rows, rows_table

    rows = ls_rows(Store(store), where or [], sort, stage)
    if as_json:
        _json(rows)
    elif rows:
        _print(rows_table(rows))
    else:
        sys.stdout.write(f"no run in {store} fits; `kd run` makes one\n")


@app.command("show")
def show(hash_: Annotated[str, typer.Argument(metavar="HASH")], store: StoreDir = ".kd", as_json: Json = False) -> None:
    """Show one run: config, metrics, lineage, environment.

    Example: kd show 3f2a
    """
    from kd.store import Store
    from kd.views import show_view

    home = Store(store)
    found = home.find(hash_)
    _json(found.card) if as_json else _print(show_view(found, home))


@app.command("diff")
def diff_(
    first: Annotated[str, typer.Argument(metavar="HASH")],
    second: Annotated[str, typer.Argument(metavar="HASH")],
    store: StoreDir = ".kd",
    as_json: Json = False,
) -> None:
    """Show what differs between two runs: config, code, data, environment, result.

    Example: kd diff 3f2a 9b01
    """
    from kd.report.compare import diff
    from kd.store import Store
    from kd.views import diff_view

    home = Store(store)
    a, b = home.find(first), home.find(second)
    _json(diff(a.card, b.card)) if as_json else _print(diff_view(a, b))


@app.command("reproduce")
def reproduce_(
    hash_: Annotated[str, typer.Argument(metavar="HASH")],
    words: Words = None,
    store: StoreDir = ".kd",
    threads: Annotated[int | None, typer.Option(help="Threads to use; by default as many as the run had.")] = None,
    keep: Annotated[bool, typer.Option(help="Keep the scratch store.")] = False,
    as_json: Json = False,
) -> None:
    """Run a stored run again from its recorded config and compare every metric and the weights.

    Exit 0: bit-identical, within tolerance, within seed spread; 1: differs; 3: inconclusive.

    Example: kd reproduce 3f2a
    """
    from kd.launch import reproduce
    from kd.store import short
    from kd.views import verdict_view

    verdict, plan, notes = reproduce(hash_, words or [], store, threads, keep)
    if as_json:
        _json(
            {
                "run": plan.key,
                "verdict": verdict.word,
                "reasons": verdict.reasons,
                "notes": notes,
                "stages": verdict.stages,
            }
        )
    else:
        sys.stdout.write(f"run {short(plan.key)}\n")
        _print(verdict_view(verdict, notes))
    raise typer.Exit(verdict.exit_code)


@app.command("report")
def report(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SWEEP|HASH]…", help="A sweep, runs, or experiments=NAME; without it the last sweep."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the page.")] = None,
    markdown: Annotated[
        Path | None, typer.Option("--md", help="A markdown file whose marked table is written anew.")
    ] = None,
    store: StoreDir = ".kd",
    as_json: Json = False,
) -> None:
    """Write one self-contained page: heatmap, size against accuracy, curves, the table with hashes.

    Example: kd report 1f0c9a3e --out report.html
    """
    from kd.reporting import report as write

    for line in write(what or [], out, markdown, store, as_json):
        sys.stdout.write(line + "\n")


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="loss|model|data|fit|pipeline|run|stage|experiments|layers")],
    pattern: Annotated[
        str | None, typer.Argument(help="model: a timm pattern such as 'resnet*'; layers: a network's name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what can be composed, with one line each.

    Example: kd list model 'mobilenetv3*'
    """
    from kd.listing import listing
    from kd.views import rows_table

    rows = listing(what, pattern)
    _json(rows) if as_json else _print(rows_table(rows))


@app.command("doctor")
def doctor(
    store: StoreDir = ".kd",
    data_dir: Annotated[str, typer.Option(envvar="KD_DATA")] = "~/.cache/kd/data",
    gpu: Annotated[bool, typer.Option(help="Import torch and look for a GPU.")] = True,
    as_json: Json = False,
) -> None:
    """Check the environment.

    Example: kd doctor
    """
    from kd.store import Store
    from kd.views import health

    checks = health(Store(store), Path(data_dir).expanduser())
    if gpu:
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: training runs on the CPU"
        checks.append(("ok", "GPU", name))
    if as_json:
        _json([{"state": s, "check": c, "said": t} for s, c, t in checks])
    else:
        for state, check, said in checks:
            sys.stdout.write(f"{state:4}  {check:18} {said}\n")
    if any(state == "bad" for state, _, _ in checks):
        raise typer.Exit(1)


@app.command("rm")
def rm(
    hashes: Annotated[list[str], typer.Argument(metavar="HASH…")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option(help="Also what other runs were made from.")] = False,
    store: StoreDir = ".kd",
) -> None:
    """Remove runs from the store; one that others were made from only with --force.

    Example: kd rm 3f2a --yes
    """
    from kd.store import Store, short

    home = Store(store)
    found = [home.find(word) for word in hashes]
    doomed = {a.key for a in found}
    for a in found:
        users = [u for u in home.users(a.key) if u.key not in doomed]
        if users and not force:
            raise InputError(
                f"{len(users)} other artifact(s), e.g. {short(users[0].key)}, were made from {short(a.key)}: "
                "remove those too, or add --force"
            )
    if not yes:
        names = ", ".join(f"{a.card.get('stage')} {short(a.key)}" for a in found)
        if not sys.stdin.isatty():
            raise InputError(f"this would remove {names}; add --yes to do it without a question")
        typer.confirm(f"remove {names}?", abort=True)
    for a in found:
        with home.lock(a.key):
            home.remove(a.key)
        sys.stdout.write(f"removed {a.card.get('stage')} {short(a.key)}\n")


@app.command("dashboard")
def dashboard(
    what: Annotated[
        str,
        typer.Option(
            help="leet (W&B's terminal view of the offline runs), report (the page) or workspace (in your W&B account)."
        ),
    ] = "auto",
    entity: Annotated[str | None, typer.Option(help="W&B entity for the workspace.")] = None,
    project: Annotated[str, typer.Option(help="W&B project for the workspace.")] = "kd",
    store: StoreDir = ".kd",
) -> None:
    """Open the dashboard: the local view, and, logged in, a W&B workspace built in code.

    Example: kd dashboard --what report
    """
    from kd.reporting import dashboard as open_

    for line in open_(what, entity, project, store):
        sys.stdout.write(line + "\n")


@bench.command("step")
def bench_step(
    words: Words = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of each loop.")] = 7,
    steps: Annotated[int, typer.Option(help="Steps a round.")] = 100,
    as_json: Json = False,
) -> None:
    """Steps a second: bare loop, our Trainer, live teacher, stored soft labels; interleaved, medians and ratios.

    Example: kd bench step data=mnist
    """
    from kd.benching import bench_step as measure

    rows, table = measure(words or [], rounds, steps)
    _json(rows) if as_json else _print(table)


def main(arguments: list[str] | None = None) -> None:
    """The console script: one clear line and an exit code for what a user can mend."""
    try:
        code = app(args=arguments, standalone_mode=False)
        raise SystemExit(code if isinstance(code, int) else 0)
    except KDError as error:
        sys.stderr.write(f"kd: {' '.join(str(error).split())}\n")
        raise SystemExit(error.exit_code) from None
    except _USAGE as error:
        sys.stderr.write(f"kd: {' '.join(error.format_message().split())}\n")
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("kd: interrupted; the same command goes on from the last checkpoint\n")
        raise SystemExit(130) from None
    except BrokenPipeError:
        os._exit(0)
    except OSError as error:
        if os.environ.get("KD_TRACEBACK"):
            raise
        sys.stderr.write(f"kd: {error.strerror or error}: {error.filename or ''}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
