"""Weights & Biases without Lightning: the mode, how to sync, one guarded run, the sweep's summary.

W&B is a view of our own records. Whatever it raises ends in one warning line, and never in the training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import netrc
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from configparser import ConfigParser, Error
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kd.errors import InputError, nearest
from kd.store import short

if TYPE_CHECKING:
    from wandb import Run

MODES = ("auto", "online", "offline", "disabled")
# A killed run loses what was not flushed; the default of 15 s loses a small run whole.
FLUSH = "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"
_HOST = "https://api.wandb.ai"
_ALIASES = {"dryrun": "offline", "run": "online"}

log = logging.getLogger("kd.tracking")


def mode(setting: str = "auto", env: Mapping[str, str] | None = None) -> str:
    """What a `run.wandb` setting means here: "online", "offline" or "disabled"; wandb is not imported.

    "auto" follows WANDB_MODE where it is set; else it is online with a key (WANDB_API_KEY, netrc or W&B's own settings
    file for the host), and offline without one.

    Raises:
        InputError: for a setting that is none of `MODES`.

    >>> mode("auto", {"WANDB_API_KEY": "k"}), mode("offline", {}), mode("auto", {"WANDB_MODE": "dryrun"})
    ('online', 'offline', 'offline')
    """
    env = os.environ if env is None else env
    if setting not in MODES:
        raise InputError(f"run.wandb={setting!r} is none of {', '.join(MODES)}{nearest(setting, MODES)}")
    if setting != "auto":
        return setting
    asked = env.get("WANDB_MODE", "")
    asked = _ALIASES.get(asked, asked)
    if asked in MODES[1:]:
        return asked
    return "online" if logged_in(env) else "offline"


def logged_in(env: Mapping[str, str] | None = None) -> bool:
    """Whether a W&B key is there for the host: in WANDB_API_KEY, a netrc file, or W&B's settings file.

    >>> logged_in({"WANDB_API_KEY": "k"}), logged_in({"HOME": "/nowhere"})
    (True, False)
    """
    env = os.environ if env is None else env
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(env.get("HOME") or env.get("USERPROFILE") or "~").expanduser()
    folder = Path(env["WANDB_CONFIG_DIR"]).expanduser() if env.get("WANDB_CONFIG_DIR") else home / ".config" / "wandb"
    settings = ConfigParser(interpolation=None)
    with contextlib.suppress(Error, OSError, UnicodeDecodeError):
        settings.read(folder / "settings")
    if settings.get("default", "api_key", fallback=""):
        return True
    base = env.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback="") or _HOST
    files = [Path(env["NETRC"]).expanduser()] if env.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for path in files:
        with contextlib.suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError):
            entry = netrc.netrc(path).authenticators(urlsplit(base).netloc)
            if entry and entry[2]:
                return True
    return False


def sync_hint(folder: Path) -> str:
    """One line on what to do with offline runs: where they are looked at, and how they reach W&B.

    >>> sync_hint(Path(".kd"))
    'W&B is offline: look at the runs with `wandb leet .kd/wandb`; after `wandb login`, upload: `wandb sync .kd/wandb`'
    """
    runs = folder / "wandb"
    return (
        f"W&B is offline: look at the runs with `wandb leet {runs}`; after `wandb login`, upload: `wandb sync {runs}`"
    )


def start_run(
    *,
    id: str,
    folder: Path,
    mode: str,
    project: str,
    job_type: str,
    config: Mapping[str, Any],
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    beside: bool = False,
) -> Run:
    """A W&B run of its own; one that an earlier job left open is ended first, or this one would log into it.

    With ``beside`` it is one of several that are open at the same time.

    Args:
        id: the run's identity: 16 hexadecimal digits of a key or a sweep.
        folder: one for all jobs; W&B puts its runs into ``folder/wandb``.
        mode: "online" or "offline".
        project: the W&B project.
        job_type: the stage, or "sweep".
        config: plain data; anything JSON does not know raises TypeError.
        name: shown in place of the id.
        group: the sweep that the run belongs to.
        tags: free words.
        beside: leave other runs of this process open.
    """
    os.environ.setdefault(FLUSH, "2")
    import wandb

    if wandb.run is not None:
        log.warning("W&B run %s was left open by an earlier job; it is ended now", wandb.run.id)
        wandb.finish(exit_code=1)
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        id=id,
        dir=str(folder.resolve()),
        mode="online" if mode == "online" else "offline",
        project=project,
        job_type=job_type,
        config=json.loads(json.dumps(dict(config))),
        name=name,
        group=group,
        tags=list(tags) or None,
        resume="allow",
        reinit="create_new" if beside else None,
        settings=wandb.Settings(silent=True, console="off", disable_code=True, init_timeout=30),
    )
    try:
        # The optimiser's step is the x-axis; W&B's own step only counts rows.
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    except BaseException:
        run.finish(exit_code=1)
        raise
    return run


@contextlib.contextmanager
def kept_environment(names: Sequence[str] = ("WANDB_MODE", FLUSH)) -> Iterator[None]:
    """Leave the environment variables as they were: a job must not set the mode of the next."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            _put(os.environ, name, value)


def _put(env: MutableMapping[str, str], name: str, value: str | None) -> None:
    if value is None:
        env.pop(name, None)
    else:
        env[name] = value


def one_line(error: BaseException) -> str:
    r"""An exception as one line: its type and its message.

    >>> one_line(ValueError("a\n  b"))
    'ValueError: a b'
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return text if len(text) <= 200 else f"{text[:199]}…"


def log_sweep(
    sweep: Mapping[str, Any],
    *,
    columns: Sequence[str],
    data: Sequence[Sequence[Any]],
    folder: Path,
    mode: str,
    figures: Mapping[str, Any] | None = None,
    project: str = "kd",
) -> bool:
    """One W&B run for a whole sweep: its result table and figures; whether it was written.

    Args:
        sweep: the sweep's record; its id is the run's id and group.
        columns: the table's headings.
        data: the table's rows; a cell is a number, a text or None.
        folder: the one folder of all W&B runs.
        mode: "online", "offline" or "disabled".
        figures: plotly figures by name.
        project: the W&B project.
    """
    if mode == "disabled":
        return False
    name = short(str(sweep["id"]))
    config = {"overrides": list(sweep.get("overrides", ())), "jobs": len(sweep.get("jobs", ()))}
    run = None
    failed = True
    try:
        with kept_environment():
            run = start_run(
                id=name, folder=folder, mode=mode, project=project, job_type="sweep", config=config, group=name,
                name=f"sweep {name}",
            )  # fmt: skip
            import wandb

            run.log({"results": wandb.Table(columns=list(columns), data=[list(row) for row in data])})
            run.log({figure: wandb.Plotly(drawn) for figure, drawn in (figures or {}).items()})
        failed = False
    except Exception as error:  # W&B may raise anything; the sweep is done and must end well
        log.warning("W&B did not take the sweep (%s); its results are in the store", one_line(error))
    finally:
        failed = not _finish(run, 1 if failed else 0) or failed
    return not failed


def _finish(run: Run | None, exit_code: int) -> bool:
    try:
        if run is not None:
            run.finish(exit_code=exit_code)
    except Exception as error:  # as above
        log.warning("W&B did not end its run (%s)", one_line(error))
        return False
    return True
