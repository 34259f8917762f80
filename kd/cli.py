"""The command line: `kd run`, `kd plan`, `kd ls`, `kd reproduce` and the rest. Slow imports come late."""

from __future__ import annotations

import json
import os
import select
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

    def invoke(self, ctx: Any) -> Any:
        """Run a command; the parser would end silently, and with 1, at any pipe that breaks."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            if _nobody_reads():
                os._exit(0)  # `kd ls | head -1` is no fault
            raise KDError(f"the pipe to a job broke ({error.strerror}); the same command goes on") from error
        return result


def _nobody_reads() -> bool:
    """Whether the reader of the output is gone."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


# What the parser raises for a wrong option; typer exports only this subclass of it.
_USAGE: Any = typer.BadParameter.__mro__[1]
WIDE = 200  # columns where the output is no terminal


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
    help="""Knowledge distillation and model compression; every run is found and reproduced by the hash of its config.

    Example: kd run -m temperature=1,4,8 alpha=0.1,0.9 data=mnist""",
)
bench = typer.Typer(
    help="""Measure speed: ratios within one run, medians.

    Example: kd bench step data=mnist""",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")


def _console() -> Any:
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # not the end of the process, which rich would make of it

    width = None if sys.stdout.isatty() else WIDE
    return Plain(highlight=False, width=width, soft_wrap=not sys.stdout.isatty())


def _print(thing: Any) -> None:
    _console().print(thing)


def _json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


@app.command("run")
def run_(words: Words = None, multirun: Multirun = False, config_dir: ConfigDir = None, as_json: Json = False) -> None:
    """Run what is missing, then print one table.

    Exit 0: all of it is there; 1: a run failed; 2: the input is not right, and nothing was run; 130: interrupted.

    Example: kd run -m temperature=1,4,8 alpha=0.1,0.9 data=mnist
    """
    from kd.launch import launch
    from kd.reporting import log_sweep, offline_hint
    from kd.store import Store
    from kd.views import hits_note

    plans, outcomes, sweep, run = launch(words or [], multirun, config_dir)
    store = Store(run.store)
    ran: dict[str, int] = {}
    for outcome in outcomes:
        for stage in outcome["ran"]:
            ran[stage] = ran.get(stage, 0) + 1
    failed = sum(o["status"] == "failed" for o in outcomes)
    if as_json:
        jobs = [
            {"overrides": list(p.overrides), "key": p.key, **{k: o.get(k) for k in ("status", "error", "ran")}}
            for p, o in zip(plans, outcomes, strict=True)
        ]
        _json({"sweep": sweep, "ran": ran, "jobs": jobs})
    else:
        _summary(plans, outcomes, sweep, ran, store)
    if note := hits_note(plans, store):
        sys.stderr.write(note + "\n")
    if ran:
        line = offline_hint(run) if sweep is None else log_sweep(sweep, run)
        sys.stderr.write(f"{line}\n" if line else "")
    if failed:
        raise typer.Exit(1)


def _summary(
    plans: list[Any], outcomes: list[dict[str, Any]], sweep: str | None, ran: dict[str, int], store: Any
) -> None:
    """The table of what is there now, what was run for it, what failed, and how to go on."""
    from kd.config import labels
    from kd.report import rows as tables
    from kd.report.tables import terminal
    from kd.store import short
    from kd.views import counted

    lookup = {a.key: a.card for a in store}
    finished = [lookup[p.key] for p in plans if p.key in lookup]
    if found := tables.collect(tables.related(finished, lookup), lookup):
        console = _console()
        console.print(terminal(tables.over_seeds(found), width=console.width))
    failed = [o["status"] == "failed" for o in outcomes]
    nothing = "0 stages" + ("" if any(failed) else " (all of it was in the store)")
    sys.stdout.write(f"ran {counted(ran) or nothing}\n")
    if sweep is None:
        sys.stdout.write(f"run {short(plans[0].key)}: kd reproduce {short(plans[0].key)}\n")
        return
    states = [o["status"] for o in outcomes]
    sys.stdout.write(
        f"sweep {sweep}: {len(plans)} job{'s' if len(plans) != 1 else ''}, {states.count('done')} run, "
        f"{states.count('hit')} from the store, {sum(failed)} failed\n"
    )
    for name, p, o in zip(labels(p.overrides for p in plans), plans, outcomes, strict=True):
        if o["status"] == "failed":
            sys.stdout.write(f"  failed {name or short(p.key)}: {o['error']}\n")
    sys.stdout.write(f"kd report {sweep}\n")


@app.command("tune")
def tune_(
    words: Words = None,
    trials: Annotated[int, typer.Option(min=1, help="How many in all; those that are done count.")] = 20,
    maximize: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="By default val/accuracy; again for more.")
    ] = None,
    minimize: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="E.g. val/loss or cost/parameters; again for more.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe or random.")] = "tpe",
    sampler_seed: Annotated[int, typer.Option(min=0, help="What the values are drawn from.")] = 0,
    pruner: Annotated[
        str | None, typer.Option(help="hyperband (with one objective), median or none.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="The study's; by default the hash of what is searched.")] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="FILE", help="The study's file; by default STORE/tune/NAME.log.")
    ] = None,
    page: Annotated[bool, typer.Option("--page", help="Write STORE/reports/tune-NAME.html too.")] = False,
    config_dir: ConfigDir = None,
    as_json: Json = False,
) -> None:
    """Search fields by validation; a trial is an ordinary run, and the same command goes on where it was.

    Words that are spaces: interval(1,16), int(interval(4,12)), tag(log,interval(1e-4,1e-1)), range(1,5), choice(a,b).

    Exit 0: the trials are there; 1: none of them came to its end; 2: the input is not right, and nothing was run.

    Example: kd tune 'temperature=interval(1,16)' 'alpha=interval(0,1)' data=mnist --trials 30
    """
    from kd.reporting import offline_hint
    from kd.tuning import Asked, as_data, summary, table, tune, write_page
    from kd.views import hits_note

    asked = Asked(trials, tuple(maximize or ()), tuple(minimize or ()), sampler, sampler_seed, pruner, name, storage)
    search = tune(words or [], asked, config_dir)
    written = write_page(search) if page else None
    if as_json:
        _json(as_data(search, written))
    else:
        console = _console()
        console.print(table(search, console.width))
        for line in [*summary(search), *([str(written)] if written else [])]:
            sys.stdout.write(f"{line}\n")
    for note in (hits_note(search.plans, search.store), offline_hint(search.run) if search.stages else None):
        sys.stderr.write(f"{note}\n" if note else "")
    if not search.best():
        raise typer.Exit(1)


@app.command("plan")
def plan_(words: Words = None, multirun: Multirun = False, config_dir: ConfigDir = None, as_json: Json = False) -> None:
    """Show each stage, its key, and whether the store has it; nothing is run.

    Example: kd plan -m temperature=1,4,8 data=mnist
    """
    from kd.launch import planned
    from kd.pipeline.plan import outlook
    from kd.store import Store
    from kd.views import plan_data, plan_view

    plans, _, run, _ = planned(words or [], multirun, config_dir)
    store = Store(run.store)
    said = outlook(plans, store, run)
    _json(plan_data(plans, store, said)) if as_json else _print(plan_view(plans, store, said))


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
    from kd.views import SPARE, ls_rows, rows_table

    rows = ls_rows(Store(store), where or [], sort, stage)
    if as_json:
        _json(rows)
    elif rows:
        console = _console()
        console.print(rows_table(rows, console.width, SPARE))
    else:
        sys.stdout.write(f"no run in {store}{' fits' if where or stage else ''}; `kd run` makes one\n")


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
    if as_json:
        _json({section: [leaf._asdict() for leaf in leaves] for section, leaves in diff(a.card, b.card).items()})
    else:
        _print(diff_view(a, b))


@app.command("reproduce")
def reproduce_(
    hash_: Annotated[str, typer.Argument(metavar="HASH")],
    words: Words = None,
    store: StoreDir = ".kd",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to use; by default as many as the run had.")
    ] = None,
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


@app.command("export")
def export_(
    hash_: Annotated[str, typer.Argument(metavar="HASH", help="A run whose last stage made a network or a file.")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made; it must not hold anything.")],
    format_: Annotated[str | None, typer.Option("--format", help="onnx, pt2 or pte; by default onnx.")] = None,
    store: StoreDir = ".kd",
    as_json: Json = False,
) -> None:
    """Write what a model needs where it is used: its file, how images are made into its input, its card, a script.

    A network that is no file yet becomes one first, and is measured as one; of pt2 the script needs torch, of pte
    ExecuTorch.

    Example: kd export 3f2a out/
    """
    from kd.exporting import export

    found = export(hash_, out, store, format_)
    if as_json:
        _json(found)
    else:
        for name, size in found["files"].items():
            sys.stdout.write(f"{size:>12,} bytes  {Path(found['folder']) / name}\n")
        sys.stdout.write(f"python {Path(found['folder']) / 'run.py'} IMAGE\n")


Chosen = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SWEEP|HASH]…", help="A sweep, runs, or experiments=NAME; without it the last sweep."),
]


@app.command("pick")
def pick_(
    what: Chosen = None,
    max_bytes: Annotated[str | None, typer.Option(help="200k, 1.5M, or 0.1x of the teacher's.")] = None,
    max_macs: Annotated[str | None, typer.Option(help="Multiply-accumulates of a sample: 40M, or 0.1x.")] = None,
    max_ms: Annotated[str | None, typer.Option(help="Milliseconds at batch 1: 0.5, or 0.1x.")] = None,
    max_drop: Annotated[str | None, typer.Option(help="Points of accuracy beside the teacher.")] = None,
    store: StoreDir = ".kd",
    as_json: Json = False,
) -> None:
    """Name the most accurate stored model within a budget: of teacher, student, each step of a compression, files.

    Exit 0: one fits; 2: none does, and the line says which is closest.

    Example: kd pick --max-bytes 200k --max-drop 0.5
    """
    from kd.picking import as_data, lines, pick, table

    asked = {"--max-bytes": max_bytes, "--max-macs": max_macs, "--max-ms": max_ms, "--max-drop": max_drop}
    weighed, limits = pick(what or [], asked, store)
    if as_json:
        _json(as_data(weighed, limits))
    else:
        console = _console()
        console.print(table(weighed, console.width))
        for line in lines(weighed):
            sys.stdout.write(f"{line}\n")


@app.command("report")
def report(
    what: Chosen = None,
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
    what: Annotated[
        str, typer.Argument(metavar="loss|recipe|model|data|pair|fit|pipeline|run|stage|experiments|layers")
    ],
    pattern: Annotated[
        str | None, typer.Argument(help="model: a timm pattern such as 'resnet*'; layers: a network's name.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a markdown table.")] = False,
    as_json: Json = False,
) -> None:
    """List what can be composed, with one line each.

    Example: kd list model 'mobilenetv3*'
    """
    from kd.listing import as_markdown, listing
    from kd.views import rows_table

    rows = listing(what, pattern)
    if as_json:
        _json(rows)
    elif markdown:
        sys.stdout.write(as_markdown(rows) + "\n")
    else:
        console = _console()
        console.print(rows_table(rows, console.width))


doctor_app = typer.Typer(cls=_Group, rich_markup_mode=None, invoke_without_command=True)
app.add_typer(doctor_app, name="doctor")


@doctor_app.callback()
def doctor(
    context: typer.Context,
    store: StoreDir = ".kd",
    data_dir: Annotated[str, typer.Option(envvar="KD_DATA")] = "~/.cache/kd/data",
    gpu: Annotated[bool, typer.Option(help="Import torch and look for a GPU.")] = True,
    as_json: Json = False,
) -> None:
    """Check the environment; `kd doctor run` checks a job before its long run.

    Example: kd doctor
    """
    if context.invoked_subcommand is not None:
        return
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


@doctor_app.command("run")
def doctor_run(
    words: Words = None, multirun: Multirun = False, config_dir: ConfigDir = None, as_json: Json = False
) -> None:
    """Before a long run: teacher, data, terms, time and space are looked at; nothing is trained that lasts.

    Exit 0: no check says FAIL; 1: one does; 2: the input is not right.

    Example: kd doctor run temperature=4 alpha=0.9 data=mnist
    """
    from kd.doctoring.run import as_data, as_lines, doctor_run, failed

    found = doctor_run(words or [], multirun, config_dir)
    if as_json:
        _json(as_data(found))
    else:
        for line in as_lines(found):
            sys.stdout.write(f"{line}\n")
    if failed(found):
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
    found = {key: name for word in hashes for key, name in [_doomed(home, word)]}
    for key in found:
        users = [u for u in home if u.key not in found and any(k.startswith(key) for k in _inputs(u.card))]
        if users and not force:
            raise InputError(
                f"{len(users)} other artifact(s), e.g. {short(users[0].key)}, were made from {short(key)}: "
                "remove those too, or add --force"
            )
    names = ", ".join(f"{name} {short(key)}" for key, name in found.items())
    if not yes:
        if not sys.stdin.isatty():
            raise InputError(f"this would remove {names}; add --yes to do it without a question")
        typer.confirm(f"remove {names}?", abort=True)
    for key, name in found.items():
        with home.lock(key):
            home.remove(key)
        sys.stdout.write(f"removed {name} {short(key)}\n")


def _inputs(card: dict[str, Any]) -> list[str]:
    return list(card.get("document", {}).get("inputs", {}).values())


def _doomed(home: Any, word: str) -> tuple[str, str]:
    """The key (as far as it is known) and the stage of what a word names, a card that cannot be read included."""
    from kd.store import short

    try:
        found = home.find(word)
    except InputError:
        folders = [f for f in (home.root / "artifacts").glob("*") if f.name.startswith(word.lower())]
        if len(word) < 4 or len(folders) != 1 or folders[0].name != short(folders[0].name) or home.read(folders[0]):
            raise
        return folders[0].name, "unreadable artifact"
    return found.key, str(found.card.get("stage"))


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
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of each loop.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Steps a round.")] = 100,
    as_json: Json = False,
) -> None:
    """Steps a second: bare loop, our Trainer, live teacher, stored soft labels; interleaved, medians and ratios.

    Example: kd bench step data=mnist
    """
    from kd.benching.step import bench_step as measure

    rows, table = measure(words or [], rounds, steps)
    _json(rows) if as_json else _print(table)


@bench.command("labels")
def bench_labels(
    words: Words = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of each pass.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Samples a round; two views of each.")] = 1024,
    compiled: Annotated[bool, typer.Option("--compiled", help="Time a compiled teacher too.")] = False,
    as_json: Json = False,
) -> None:
    """Samples a second of the teacher's pass over views, beside a bare loop; interleaved, medians and ratios.

    Example: kd bench labels data=synthetic teacher.name=cifar_resnet32x4
    """
    from kd.benching.labels import bench_labels as measure

    rows, table = measure(words or [], rounds, samples, compiled)
    _json(rows) if as_json else _print(table)


@bench.command("loss")
def bench_loss(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME|WORD]…", help="Losses, all by default, and overrides, e.g. dkd temperature=2."),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", help="256x1000, 8x1024x50257 (tokens) or 64xmaps; again for more.", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of each loss.")] = 7,
    memory: Annotated[float, typer.Option(min=0.01, help="GiB; a loss that needs more is skipped.")] = 8.0,
    seconds: Annotated[float, typer.Option(min=0.01, help="A loss that takes longer once is skipped.")] = 20.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Time and memory of each loss's value and gradient, beside plain KL of as many numbers.

    Example: kd bench loss dkd nkd dist --shape 256x1000
    """
    from kd.benching.losses import SHAPES
    from kd.benching.losses import bench_losses as measure

    rows, table = measure(words or [], shapes or SHAPES, rounds, memory, seconds, dtype)
    _json(rows) if as_json else _print(table)


@bench.command("compress")
def bench_compress(
    words: Words = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds of each batch size.")] = 30,
    seconds: Annotated[float, typer.Option(min=0.01, help="No further round of a batch size after so many.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Time and bytes of a network as it is, with integers, pruned, sparse and at low rank; interleaved, medians.

    Weights are random: it says nothing about accuracy. Words reach the steps too: prune.amount=0.3, lowrank.of=macs.

    Example: kd bench compress student.name=resnet18 data=cifar10
    """
    from kd.benching.compress import bench_compress as measure

    rows, table = measure(words or [], rounds, seconds)
    _json(rows) if as_json else _print(table)


@bench.command("topology")
def bench_topology(
    words: Words = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of each topology.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Steps a round.")] = 20,
    as_json: Json = False,
) -> None:
    """Time and memory of a step with 1, 2, 4 teachers, live or stored, and of networks that learn together.

    Each is compared with the student alone in the same round. Weights are random: it says nothing about accuracy.

    Example: kd bench topology data=mnist
    """
    from kd.benching.topology import bench_topology as measure

    rows, table = measure(words or [], rounds, steps)
    _json(rows) if as_json else _print(table)


@bench.command("sweep")
def bench_sweep(
    words: Words = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of an epoch.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of a student.")] = 2,
    lone: Annotated[int, typer.Option(min=1, help="How many of the lone runs to run.")] = 16,
    counts: Annotated[str, typer.Option("--jobs", help="Jobs of a sweep, e.g. 1,4,16.")] = "1,4,16",
    launcher: Annotated[str, typer.Option(help="packed, basic or joblib.")] = "packed",
    plain: Annotated[int, typer.Option(min=0, help="How many of the lone runs to run without our allocator too.")] = 1,
    as_json: Json = False,
) -> None:
    """Wall and CPU seconds of a 4x4 sweep: lone runs with a live teacher, ours, and a bare script's floor.

    Example: kd bench sweep teacher.name=cifar_resnet32x4 student.name=cifar_resnet8x4
    """
    from kd.benching.sweep import bench_sweep as measure

    try:
        numbers = [int(word) for word in counts.split(",")]
    except ValueError as error:
        raise InputError(f"--jobs {counts}: give numbers of jobs, e.g. 1,4,16") from error
    rows, table = measure(words or [], steps, epochs, lone, numbers, launcher, plain)
    _json(rows) if as_json else _print(table)


def main(arguments: list[str] | None = None) -> None:
    """The console script: one clear line and an exit code for what a user can mend."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=words, standalone_mode=False)
        if code == 130:  # what the parser makes of Ctrl-C
            raise KeyboardInterrupt
        raise SystemExit(code if isinstance(code, int) else 0)
    except KDError as error:
        _refuse(str(error))
        raise SystemExit(error.exit_code) from None
    except _USAGE as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a command alone: its help, as it stands
            sys.stdout.write(error.format_message().rstrip() + "\n")
        else:
            _refuse(error.format_message())
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort) as error:
        # Some versions of the parser make an Abort of Ctrl-C, which is also an answer of no to a question.
        if not isinstance(error.__cause__ or error, KeyboardInterrupt):
            _refuse("nothing was done")
            raise SystemExit(1) from None
        resumes = "; the same command goes on from the last checkpoint" if words[:1] in (["run"], ["tune"]) else ""
        _refuse(f"interrupted{resumes}")
        raise SystemExit(130) from None
    except OSError as error:
        if os.environ.get("KD_TRACEBACK"):
            raise
        _refuse(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
        raise SystemExit(1) from None


def _refuse(text: str) -> None:
    sys.stderr.write(f"kd: {' '.join(text.split())}\n")


if __name__ == "__main__":
    main()
