"""From words on the command line to one plain config per job: compose, check against the schema, resolve."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.errors import InputError, nearest
from kd.training.settings import Fit, Run, require, typed

ROOT_KEYS = {"teacher", "student", "data", "loss", "fit", "teacher_fit", "pipeline", "run"}
DIALS = {"temperature", "alpha", "seed", "teacher_seed"}
_REFERENCE = re.compile(r"\$\{\s*([^}:]*?)\s*(:|\})")


def conf_dir() -> Path:
    """Where the groups stand: the checkout's `conf/`, else the copy inside the installed package.

    Raises:
        InputError: if the installation has neither.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").exists():
            return folder
    raise InputError("this installation of kd has no conf/ folder: install it again with `pip install .`")


def register() -> None:
    """Make the one resolver known: `${complement:x}` is 1 - x, without the noise of binary fractions."""
    OmegaConf.register_new_resolver("complement", complement, replace=True)


def complement(value: float) -> float:
    """1 - value as a person would write it, exact at 0 and 1.

    >>> complement(0.9), complement(0), complement(1)
    (0.1, 1.0, 0.0)
    """
    return round(1.0 - float(value), 12)


@dataclass(frozen=True)
class Job:
    """One job of a command: its overrides as typed and its checked, resolved, plain config."""

    overrides: tuple[str, ...]
    config: dict[str, Any]


def jobs(overrides: list[str], multirun: bool = False, config_dir: str | None = None) -> tuple[list[Job], bool]:
    """All jobs that the overrides ask for, each checked, and whether they are a sweep.

    An experiment file may hold a grid (``hydra.sweeper.params``) and say ``hydra.mode: MULTIRUN``; a word on the
    command line beats its line of the grid.

    Raises:
        InputError: at the first job that is not right; nothing has been run.
    """
    register()
    parsed = _parse(overrides)
    experiment = any(o.key_or_group == "experiments" for o in parsed)
    with _hydra(config_dir) as searchpath:
        sweep = multirun
        grid: list[str] = []
        if experiment:
            fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
            first = _compose(fixed, searchpath, whole=True)
            sweep = sweep or str(OmegaConf.select(first, "hydra.mode", default="")).endswith("MULTIRUN")
            params = OmegaConf.select(first, "hydra.sweeper.params") or {}
            typed = {o.key_or_group for o in parsed}
            grid = [f"{key}={value}" for key, value in params.items() if key not in typed] if sweep else []
        if not sweep:
            for o in parsed:
                if o.is_sweep_override():
                    raise InputError(f"{o.input_line} has several values; add -m to run one job for each")
            return [_job(overrides, searchpath)], False
        # Hydra composes sub-groups for `group@package` keys; BasicSweeper spells out the product of all choices.
        lists = BasicSweeper.split_arguments(_parse([*overrides, *grid]), None)
        found = [_job(list(words), searchpath) for batch in lists for words in batch]
    if not found:
        raise InputError("the sweep has no job: a glob matched nothing")
    return found, True


def _parse(overrides: list[str]) -> list[Override]:
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise InputError(f"{_first_line(error)}; an override is written key=value, e.g. temperature=4") from error
    for override in parsed:
        # Hydra takes hydra.* to be its own business; ours to allow is only what selects how jobs are spread.
        if override.key_or_group.startswith("hydra.") or override.key_or_group == "hydra":
            raise InputError(f"{override.input_line}: hydra.* is not part of a run; see `kd run --help`")
    return parsed


class _hydra:
    """Hydra on our folders, left as it was found."""

    def __init__(self, config_dir: str | None) -> None:
        self.config_dir = config_dir

    def __enter__(self) -> str:
        GlobalHydra.instance().clear()
        folder = conf_dir()
        self.inner = initialize_config_dir(str(folder), version_base="1.3")
        self.inner.__enter__()
        paths = [f"file://{folder.parent}"]
        if self.config_dir is not None:
            own = Path(self.config_dir).expanduser().resolve()
            if not own.is_dir():
                raise InputError(f"--config-dir {self.config_dir} is no folder")
            paths.insert(0, f"file://{own}")
        return "hydra.searchpath=[" + ",".join(paths) + "]"

    def __exit__(self, *exception: object) -> None:
        self.inner.__exit__(*exception)
        GlobalHydra.instance().clear()


def _compose(overrides: list[str], searchpath: str, whole: bool = False) -> DictConfig:
    try:
        return compose("config", overrides=[*overrides, searchpath], return_hydra_config=whole)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_explain(error, overrides)) from error


def _job(overrides: list[str], searchpath: str) -> Job:
    config = _compose(overrides, searchpath)
    return Job(tuple(overrides), check(config))


def check(config: DictConfig) -> dict[str, Any]:
    """The composed config against the schema: unknown keys, ranges, open values, interpolations that poison a key.

    Raises:
        InputError: at the first thing that is not right.
    """
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    for key in raw:
        if key not in ROOT_KEYS | DIALS:
            raise InputError(f"{key!r} is no part of a config{nearest(str(key), ROOT_KEYS | DIALS)}")
    for key in sorted(ROOT_KEYS - set(raw)):
        raise InputError(f"the config has no {key!r}; choose an option of that group (`kd list {key}`)")
    for path, text in _strings({k: v for k, v in raw.items() if k != "run"}):
        for name, end in _REFERENCE.findall(text):
            if end == ":" and name != "complement":
                raise InputError(f"{path} uses the resolver ${{{name}:…}}, whose value no key could name; write it out")
            if name.lstrip(".").split(".")[0] in ("run", "hydra"):
                raise InputError(f"{path} reads ${{{name}}}: what is under run/ may not reach what is hashed")
    try:
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(_first_line(error)) from error
    except ValueError as error:
        raise InputError(f"{_first_line(error)}; temperature and alpha are numbers") from error
    assert isinstance(resolved, dict)
    plain = {str(k): v for k, v in resolved.items()}
    for path, text in _strings({k: v for k, v in plain.items() if k not in ("run", "pipeline")}):
        if text == "???":
            hint = ", e.g. student.conv3 (`kd list layers NAME` names a network's layers)" if ".hint." in path else ""
            raise InputError(f"{path} is not set: give it a value{hint}")
    _dials(plain)
    _terms(plain["loss"])
    typed(Run, plain["run"], "run")
    for name in ("fit", "teacher_fit"):
        typed(Fit, plain[name], name)
    return plain


def _dials(config: dict[str, Any]) -> None:
    for name in ("temperature", "alpha"):
        if isinstance(config[name], bool) or not isinstance(config[name], (int, float)):
            raise InputError(
                f"{name}={config[name]!r} is no number, e.g. {name}={4.0 if name == 'temperature' else 0.9}"
            )
    require(config["temperature"] > 0, "temperature", config["temperature"], "greater than 0")
    require(0 <= config["alpha"] <= 1, "alpha", config["alpha"], "from 0 (labels only) to 1 (teacher only)")
    for name in ("seed", "teacher_seed"):
        whole = isinstance(config[name], int) and not isinstance(config[name], bool)
        require(whole and config[name] >= 0, name, config[name], "a whole number, 0 or more")


def _terms(loss: Any) -> None:
    if not isinstance(loss, dict) or not loss:
        raise InputError("loss holds no term; choose some, e.g. loss=[ce,kd] (`kd list loss`)")
    for name, term in loss.items():
        if not isinstance(term, dict) or "_target_" not in term:
            known = [*DIALS, *(n for n in loss if n != name)]
            raise InputError(
                f"loss.{name}={term!r} is no term of the loss"
                + (nearest(name, known) or ": a term is a mapping with _target_")
            )


def _strings(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _strings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _strings(value, f"{path}[{i}]")
    elif isinstance(node, str):
        yield path, node


def options(group: str) -> list[str]:
    """The options of a group of `conf/` (or the files of `experiments/`), by name."""
    folder = conf_dir().parent / group if group == "experiments" else conf_dir() / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _explain(error: BaseException, overrides: list[str]) -> str:
    """Hydra's message as one line of ours, with the nearest names."""
    text = str(error)
    if found := re.search(r"Could not find '([\w@/.-]+)'", text) or re.search(r"Could not load '([\w@/.-]+)'", text):
        group, _, name = found.group(1).rpartition("/")
        group = group.split("@")[0]
        if group:
            names = options(group)
            known = f"; there are {', '.join(names)}" if names else ""
            return f"{group}={name}: no such option{nearest(name, names) or known}"
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found.group(1)
        last = key.split(".")[-1]
        names = _names_near(key)
        return f"{key} is not a field of the config{nearest(last, names)}" + (
            "" if nearest(last, names) else f"; to add a new one write +{key}=…"
        )
    if found := re.search(r"Could not append to config. An item is already at '([^']+)'", text):
        return f"{found.group(1)} exists already; write it without the +"
    return _first_line(error)


def _names_near(key: str) -> list[str]:
    """The names that stand where a misspelt key would have stood."""
    with _hydra(None) as searchpath:
        node: Any = compose("config", overrides=[searchpath])
    try:
        parent = OmegaConf.select(node, ".".join(key.split(".")[:-1])) if "." in key else node
    except OmegaConfBaseException:
        parent = None
    names = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
    return list(dict.fromkeys([*names, *DIALS]))
