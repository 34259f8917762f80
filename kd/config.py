"""From words on the command line to one plain config per job: compose, check against the schema, resolve."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.errors import InputError, nearest, offer
from kd.instantiate import check_target, signature_errors, targets
from kd.pipeline.expand import expand
from kd.pipeline.hearing import heard
from kd.schedules import complemented, is_schedule, schedule_of
from kd.training.settings import Fit, Run, require, typed

STEPS = {
    "prune",
    "lowrank",
    "quantize",
    "export",
    "recover",
}  # what a list of compress may name, each a group of its own
ROOT_KEYS = {"teacher", "student", "data", "loss", "fit", "teacher_fit", "labels", "pipeline", "run", *STEPS}
ROOT_KEYS |= {"mix", "assistant_fit"} | {"circle", "back"}  # of several teachers; of networks that learn together
ROOT_KEYS |= {"born_again", "one", "objective", "dream"}
# Of models, for the pipelines that have several; and of steps.
LISTS = {"teachers": "resnet34,resnet18", "assistants": "resnet34,resnet18", "students": "resnet34,resnet18"}
LISTS |= {"compress": "prune,lowrank"}
DIALS = {"temperature", "alpha", "seed", "teacher_seed"}
SEVERAL = {"loss", "run/logger"}  # the groups that take a list of options; any other takes one
# The only forms an interpolation may take outside run/: a path of names, or one minus it.
_PATH = r"\.*[A-Za-z_]\w*(?:\.\w+|\[\w+\])*"
_REFERENCE = re.compile(rf"\$\{{\s*({_PATH})\s*\}}|\$\{{complement:\s*(?:\$\{{\s*({_PATH})\s*\}}|[\d.eE+-]+)\s*\}}")
_WHOLE = re.compile(r"\$\{\s*([A-Za-z_]\w*(?:\.\w+)*)\s*\}")
_COMPLEMENT = re.compile(r"\$\{complement:\s*\$\{\s*([A-Za-z_]\w*(?:\.\w+)*)\s*\}\s*\}")
_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")


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


def complement(value: Any) -> Any:
    """1 - value as a person would write it, exact at 0 and 1; of a schedule, the one that goes the other way.

    >>> complement(0.9), complement(0), complement(1)
    (0.1, 1.0, 0.0)
    """
    if is_schedule(value):  # as plain data: OmegaConf would leave its own lists inside what a resolver gives
        plain: Any = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        return complemented(plain)
    return round(1.0 - float(value), 12)


@dataclass(frozen=True)
class Job:
    """One job of a command: its overrides as typed and its checked, resolved, plain config."""

    overrides: tuple[str, ...]
    config: dict[str, Any]


def labels(overrides: Iterable[Iterable[str]]) -> list[str]:
    """What tells the jobs of a sweep apart: the words of each that not all of them share, less what is under run/.

    >>> labels([("data=mnist", "alpha=0"), ("data=mnist", "alpha=1")])
    ['alpha=0', 'alpha=1']
    """
    lists = [[word for word in words if not re.match(r"\+*run[./]", word)] for words in overrides]
    shared = set.intersection(*map(set, lists)) if lists else set()
    return [" ".join(word for word in words if word not in shared) for words in lists]


def jobs(overrides: list[str], multirun: bool = False, config_dir: str | None = None) -> tuple[list[Job], bool]:
    """All jobs that the overrides ask for, each checked, and whether they are a sweep.

    An experiment file may hold a grid (``hydra.sweeper.params``) and say ``hydra.mode: MULTIRUN``; a word on the
    command line beats its line of the grid.

    Raises:
        InputError: at the first job that is not right; nothing has been run.
    """
    register()
    with _Composer(config_dir) as composer:
        parsed = composer.parse(overrides)
        experiments = [o for o in parsed if o.key_or_group == "experiments"]
        if multirun and any(o.is_sweep_override() for o in experiments):
            # Each experiment brings a grid of its own.
            others = [word for word, o in zip(overrides, parsed, strict=True) if o not in experiments]
            names = composer.values(experiments[-1])
            return [j for name in names for j in jobs([f"experiments={name}", *others], True, config_dir)[0]], True
        for o in parsed:
            if o.is_sweep_override() and (not multirun and not experiments):
                raise InputError(f"{o.input_line} has several values; add -m to run one job for each")
        sweep = multirun
        grid: list[str] = []
        if experiments:
            fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
            first = composer.compose(fixed, whole=True)
            sweep = sweep or str(OmegaConf.select(first, "hydra.mode", default="")).endswith("MULTIRUN")
            params = OmegaConf.select(first, "hydra.sweeper.params") or {}
            lines = [f"{key}={value}" for key, value in params.items()]
            typed_ = {_place(o) for o in parsed}
            grid = [line for line in lines if _place(composer.parse([line])[0]) not in typed_] if sweep else []
        if not sweep:
            for o in parsed:
                if o.is_sweep_override():
                    raise InputError(f"{o.input_line} has several values; add -m to run one job for each")
            return [composer.job(overrides)], False
        return [composer.job(words) for words in composer.product([*overrides, *grid])], True


def parse(words: list[str], config_dir: str | None = None) -> list[tuple[Override, list[str]]]:
    """The words as Hydra reads them, nothing composed yet; a choice with its values.

    Raises:
        InputError: at a word that is no override, or a choice without a value.
    """
    with _Composer(config_dir) as composer:
        return [(one, composer.values(one) if one.is_choice_sweep() else []) for one in composer.parse(words)]


def each(lists: Iterable[list[str]], config_dir: str | None = None) -> Generator[Job]:
    """One checked job for each list of words, one after the other: what they share is read once.

    Raises:
        InputError: at one that is not right.
    """
    register()
    with _Composer(config_dir) as composer:
        for words in lists:
            yield composer.job(words)


def _place(override: Override) -> str:
    """What an override sets, whatever its prefix: `+model@student` -> `model@student`."""
    return override.key_or_group + (f"@{override.package}" if override.package else "")


class _Composer:
    """Hydra on our folders, left as it was found."""

    def __init__(self, config_dir: str | None) -> None:
        folder = conf_dir()
        paths = [f"file://{folder.parent}"]
        if config_dir is not None:
            own = Path(config_dir).expanduser().resolve()
            if not own.is_dir():
                raise InputError(f"--config-dir {config_dir} is no folder")
            paths.insert(0, f"file://{own}")
        self.folder = folder
        self.bases: dict[tuple[str, ...], DictConfig] = {}
        self.plains: dict[tuple[str, ...], dict[str, Any]] = {}
        self.words: dict[str, Override] = {}
        self.groups: dict[tuple[str, ObjectType | None], list[str]] = {}
        self.searchpath = "hydra.searchpath=[" + ",".join(paths) + "]"

    def __enter__(self) -> _Composer:
        self.before = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            self.inner = initialize_config_dir(str(self.folder), version_base="1.3")
        except Exception as error:  # Hydra imports every plugin that is installed, and those raise what they like
            raise InputError(f"Hydra cannot start: {_first_line(error)}; `kd doctor` names the plugin") from error
        self.inner.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.inner.__exit__(*exception)
        GlobalHydra.instance().hydra = self.before

    def get_group_options(self, group: str, results_filter: ObjectType | None = ObjectType.CONFIG) -> list[str]:
        """The options of a group wherever they stand; what Hydra asks of its own loader, which knows fewer folders."""
        if (group, results_filter) not in self.groups:
            loader = GlobalHydra.instance().config_loader()
            found = list(loader.get_group_options(group, results_filter, "config", [self.searchpath]))
            self.groups[group, results_filter] = found
        return self.groups[group, results_filter]

    def parse(self, overrides: list[str]) -> list[Override]:
        """The words as overrides.

        Raises:
            InputError: at a word that is none, or that is Hydra's own business.
        """
        parsed: list[Override] = []
        for word in overrides:
            try:
                parsed += OverridesParser.create().parse_overrides([word])
            except HydraException as error:
                raise InputError(f"{word!r} is no override; write key=value, e.g. temperature=4") from error
            one = parsed[-1]
            # Hydra takes hydra.* to be its own business; how jobs are spread is ours.
            if re.match(r"hydra($|[./@])", one.key_or_group) or not one.key_or_group:
                raise InputError(f"{word}: " + ("hydra.* is not part of a run" if one.key_or_group else "no key"))
            group = one.key_or_group
            if not one.is_delete() and not one.is_sweep_override() and (names := self.get_group_options(group)):
                value = one.value()
                if not isinstance(value, (str, list)) or (isinstance(value, list) and group not in SEVERAL):
                    raise InputError(f"{word}: {group} takes the name of one option{offer(str(value), names)}")
            one.config_loader = self  # type: ignore[assignment]
        return parsed

    def values(self, override: Override) -> list[str]:
        """The values of a sweep override, one or more.

        Raises:
            InputError: if there is none, or they cannot be counted.
        """
        try:
            found = list(override.sweep_string_iterator())
        except HydraException as error:
            said = "a sweep needs values that can be counted; `kd tune` searches an interval"
            raise InputError(f"{override.input_line}: {said}") from error
        if not found:
            names = ", ".join(self.get_group_options(override.key_or_group))
            raise InputError(f"{override.input_line} matches nothing" + (f"; there are {names}" if names else ""))
        return found

    def product(self, words: list[str]) -> list[list[str]]:
        """The words of each job of a sweep."""
        parsed = self.parse(words)
        for one in parsed:
            if one.is_sweep_override():
                self.values(one)
        return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]

    def compose(self, overrides: list[str], whole: bool = False) -> DictConfig:
        """The config of these words; ``whole`` with what Hydra keeps for itself.

        Raises:
            InputError: if they do not compose.
        """
        try:
            if whole:
                return compose("config", overrides=[*overrides, self.searchpath], return_hydra_config=True)
            # Reading files and merging groups is what takes long, and is the same for most jobs of a sweep.
            early, late = self.parted(overrides)
            config = copy.deepcopy(self.base(early))
            # As Hydra itself does once the groups are merged.
            ConfigLoaderImpl._apply_overrides_to_config(late, config)
            return config
        except Exception as error:  # Hydra, OmegaConf and what they are built on raise as they like
            raise InputError(self.explain(error, overrides)) from error

    def parted(self, overrides: list[str]) -> tuple[tuple[str, ...], list[Override]]:
        """The words that choose options, and the overrides that set values in what these give."""
        early, late = [], []
        for word in overrides:
            if word not in self.words:
                (self.words[word],) = OverridesParser.create().parse_overrides([word])
            one = self.words[word]
            if isinstance(one.value(), dict) or not self.get_group_options(one.key_or_group, None):
                late.append(one)
            else:
                early.append(str(one.input_line))
        return tuple(early), late

    def base(self, early: tuple[str, ...]) -> DictConfig:
        """What the options give before any value is set."""
        if early not in self.bases:
            self.bases[early] = compose("config", overrides=[*early, self.searchpath])
        return self.bases[early]

    def job(self, overrides: list[str]) -> Job:
        """One job: composed and checked."""
        raw = self.quickly(overrides)
        if raw is not None:
            return Job(tuple(overrides), checked(raw, lambda: _resolved(raw)))
        return Job(tuple(overrides), check(self.compose(overrides)))

    def quickly(self, overrides: list[str]) -> dict[str, Any] | None:
        """The unresolved config where each word only sets a plain value that is there; None: Hydra must look.

        A sweep of a thousand jobs differs in nothing else, and Hydra would copy the whole config for each.
        """
        try:
            early, late = self.parted(overrides)
            if early not in self.plains:
                base = self.base(early)
                whole = OmegaConf.to_container(base, resolve=False)
                assert isinstance(whole, dict)
                if any("${" in text and not text.startswith("${oc.env:") for _, text in _strings(whole["run"])):
                    return None  # something under run/ may follow a value
                self.plains[early] = {str(k): v for k, v in whole.items()}
                self.plains[early]["run"] = OmegaConf.to_container(base["run"], resolve=True)
        except Exception:  # said in full by the long way
            return None
        raw = self.plains[early]
        for one in late:
            value = one.value()
            if not (one.type is OverrideType.CHANGE and one.package is None and _simple(value)):
                return None
            changed = _with(raw, one.key_or_group.split("."), value)
            if changed is None:
                return None
            raw = changed
        return raw

    def explain(self, error: BaseException, overrides: list[str]) -> str:
        """Hydra's message as one line of ours, with the nearest names."""
        text = str(error)
        if found := re.search(r"Could not (?:find|load) '([^']+)'", text):
            group, _, name = found.group(1).rpartition("/")
            if group := group.split("@")[0].rstrip("/"):
                return f"{group}={name}: no such option{offer(name, self.get_group_options(group))}"
        if found := re.search(r"Could not override '([^']+)'", text):
            key = found.group(1)
            if meant := re.search(r"Did you mean to override (?:one of )?(.+)\?", text):
                return f"{key} is not in the config; did you mean {meant.group(1)}?"
            return self.missing(key, overrides)
        if found := re.search(r"Could not append to config. An item is already at '([^']+)'", text):
            return f"{found.group(1)} exists already; write it without the +"
        if found := re.search(r"Multiple values for ([\w/@]+)\.", text):
            return f"{found.group(1)} has an option already; write {found.group(1)}=… without the +"
        return _first_line(error)

    def missing(self, key: str, overrides: list[str]) -> str:
        """Where a dotted key leaves the config, and what stands there."""
        # What the other words chose decides which names there are; fields cannot be set before the key is right.
        groups = [word for word in overrides if "." not in word.partition("=")[0] and not word.startswith(f"{key}=")]
        node: Any = None
        for words in (groups, []):
            try:
                node = compose("config", overrides=[*words, self.searchpath])
                break
            except (HydraException, OmegaConfBaseException):
                continue
        path: list[str] = []
        for part in key.split("."):
            names = [str(name) for name in node] if isinstance(node, DictConfig) else []
            if part not in names:
                where = ".".join([*path, part])
                hint = nearest(part, [*names, *(() if path else DIALS)]) or (offer(part, names) if path else "")
                return f"{where} is not in the config{hint}" + ("" if hint else f"; to add a new one write +{key}=…")
            path.append(part)
            node = node._get_node(part)
        return f"{key} holds no such field; to add what is not there write +{key}=…"


def _simple(value: Any) -> bool:
    return value is None or type(value) in (int, float, bool) or (type(value) is str and "${" not in value)


def _with(node: Any, path: list[str], value: Any) -> dict[str, Any] | None:
    """A copy of plain data with one value set that was there and is no mapping or list; None if it is not so."""
    head, *rest = path
    if not isinstance(node, dict) or head not in node:
        return None
    if rest:
        inner = _with(node[head], rest, value)
        return None if inner is None else {**node, head: inner}
    old = node[head]
    if isinstance(old, (dict, list)):
        return None
    return {**node, head: value}


def _resolved(raw: dict[str, Any]) -> dict[str, Any]:
    """Plain data with its references followed: those that `_reference` lets through, as OmegaConf would."""

    def follow(name: str, seen: tuple[str, ...]) -> Any:
        if name in seen:
            raise InputError(f"{seen[0]} refers to itself; write its value out")
        node: Any = raw
        for part in name.split("."):
            if not isinstance(node, dict) or part not in node:
                raise _Unusual
            node = node[part]
            if isinstance(node, str) and "${" in node:
                node = value(node, (*seen, name))
        return value(node, (*seen, name))

    def value(node: Any, seen: tuple[str, ...]) -> Any:
        if isinstance(node, dict):
            return {key: value(inner, seen) for key, inner in node.items()}
        if isinstance(node, list):
            return [value(inner, seen) for inner in node]
        if not isinstance(node, str) or "${" not in node:
            return node
        if found := _WHOLE.fullmatch(node):
            return follow(found[1], seen)
        if found := _COMPLEMENT.fullmatch(node):
            return complement(follow(found[1], seen))
        raise _Unusual

    try:
        return {key: value(node, ()) for key, node in raw.items()}
    except (_Unusual, TypeError, ValueError):
        whole = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
        assert isinstance(whole, dict)
        return {str(key): node for key, node in whole.items()}


class _Unusual(Exception):
    """A reference that OmegaConf itself must follow."""


def check(config: DictConfig) -> dict[str, Any]:
    """The composed config against the schema: unknown keys, ranges, open values, interpolations that poison a key.

    Raises:
        InputError: at the first thing that is not right.
    """
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    return checked(raw, lambda: OmegaConf.to_container(config, resolve=True))


def checked(raw: Mapping[Any, Any], resolve: Callable[[], Any]) -> dict[str, Any]:
    """`check` of a config as plain data; ``resolve`` gives it with its references followed.

    Raises:
        InputError: at the first thing that is not right.
    """
    for key in raw:
        if key == "experiments":
            raise InputError("an experiment's file begins with the line `# @package _global_`; this one does not")
        if key not in ROOT_KEYS | LISTS.keys() | DIALS:
            raise InputError(f"{key!r} is no part of a config{nearest(str(key), ROOT_KEYS | LISTS.keys() | DIALS)}")
    if not raw.get("loss"):
        raise InputError("loss holds no term; choose some, e.g. loss=[ce,kd] (`kd list loss`)")
    for key in sorted((ROOT_KEYS | LISTS.keys() | DIALS) - set(raw)):
        raise InputError(f"the config has no {key!r}; it cannot do without")
    for path, text in _strings({k: v for k, v in raw.items() if k != "run"}):
        _reference(path, text)
    for name in ("temperature", "alpha"):  # what is made of them needs numbers
        if "${" not in str(raw[name]) and not is_schedule(raw[name]):
            _number(name, raw[name])
    try:
        resolved = resolve()
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise InputError(_first_line(error)) from error
    assert isinstance(resolved, dict)
    plain = {str(k): v for k, v in resolved.items()}
    for path, text in _strings({k: v for k, v in plain.items() if k not in ("run", "pipeline")}):
        if text == "???":
            role = path.rpartition(".")[2]
            side = (
                {"student": "student", "feature": "student", "teacher": "teacher"}.get(role)
                if "loss." in path
                else None
            )
            hint = f", e.g. {side}.last (`kd list layers NAME` names a network's layers)" if side else ""
            raise InputError(f"{path} is not set: give it a value{hint}")
    for key in sorted(ROOT_KEYS):
        if not isinstance(plain[key], dict):
            raise InputError(f"{key}={plain[key]!r} is no mapping; set its fields, e.g. {key}.{_first_field(raw[key])}")
    for key in sorted(LISTS):
        if not isinstance(plain[key], list):
            raise InputError(f"{key}={plain[key]!r} is no list; write one, e.g. {key}=[{LISTS[key]}]")
    _pipeline(plain["pipeline"])
    _generations(plain["born_again"].get("generations"))
    stages = {n: heard(s, f"pipeline.stages.{n}") for n, s in expand(plain["pipeline"]["stages"]).items()}
    plain["pipeline"] = {**plain["pipeline"], "stages": stages}
    _dials(plain)
    run = typed(Run, plain["run"], "run")
    if not all(isinstance(name, str) for name in run.trusted):
        raise InputError(f"run.trusted={run.trusted!r}: give names of packages, e.g. run.trusted=[mine]")
    for path, target in targets(plain):
        own = [*run.trusted, "pytorch_lightning.loggers"] if path.startswith("run.logger.") else run.trusted
        try:
            check_target(target, own)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    for name in ("teacher", "student"):
        _model(plain[name], name)
    _terms(plain["loss"])
    for name in ("fit", "teacher_fit"):
        fit = typed(Fit, plain[name], name)
        if fit.drop_last and fit.samples is not None and fit.samples < fit.batch_size:
            raise InputError(
                f"{name}.samples={fit.samples} is less than one batch: lower {name}.batch_size={fit.batch_size}, or "
                f"set {name}.drop_last=false"
            )
    if "_target_" not in plain["data"]:
        raise InputError("data has no _target_; choose an option of that group (`kd list data`)")
    signature_errors(plain["data"], "data", run.trusted)
    for name, logger in run.logger.items():
        if not isinstance(logger, dict) or "_target_" not in logger:
            raise InputError(f"run.logger.{name}={logger!r} is no logger; choose run/logger=[csv] or [tensorboard]")
    return plain


def _reference(path: str, text: str) -> None:
    """Refuse an interpolation whose value no key could name: the environment, the time, what is under run/."""
    for name in _RESOLVER.findall(text):
        if name != "complement":
            raise InputError(f"{path} uses the resolver ${{{name}:…}}, whose value no key could name; write it out")
    for name in map("".join, _REFERENCE.findall(text)):  # run.x and run[x] alike
        if re.split(r"[.\[]", name.lstrip("."))[0] in ("run", "hydra"):
            raise InputError(f"{path} reads ${{{name}}}: what is under run/ may not reach what is hashed")
    if "${" in _REFERENCE.sub("", text):
        raise InputError(f"{path}={text}: only ${{name}} and ${{complement:${{name}}}} can be used here; write it out")


def _first_field(node: Any) -> str:
    return f"{next(iter(node))}=…" if isinstance(node, dict) and node else "name=…"


def _model(node: dict[str, Any], where: str) -> None:
    kinds = {"name": (str, "word, e.g. resnet18"), "pretrained": (bool, "true or false"), "options": (dict, "mapping")}
    for field, (kind, meant) in kinds.items():
        if field in node and not isinstance(node[field], kind):
            raise InputError(f"{where}.{field}={node[field]!r} is no {meant}")
    if "_target_" not in node:
        raise InputError(f"{where} has no _target_; it is kd.models.create unless you have your own")


def _pipeline(node: dict[str, Any]) -> None:
    for key in node:
        if key not in ("name", "stages"):
            raise InputError(f"pipeline.{key} is not a field of a pipeline{offer(str(key), ('name', 'stages'))}")
    stages = node.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise InputError("pipeline.stages holds no stage; choose a pipeline (`kd list pipeline`)")
    for name, stage in stages.items():
        if not isinstance(stage, dict) or not {"_target_", "for_each"} & stage.keys():
            raise InputError(f"pipeline.stages.{name}={stage!r} is no stage: a stage is a mapping with _target_")


def _generations(value: Any) -> None:
    sound = (type(value) is int and value >= 1) or (isinstance(value, list) and len(value) > 0)
    require(sound, "born_again.generations", value, "a number of them, 1 or more, or a list of networks")


def _dials(config: dict[str, Any]) -> None:
    for name in ("temperature", "alpha"):
        values = [config[name]]
        if is_schedule(config[name]):
            signature_errors(config[name], name)
            values = schedule_of(config[name]).ends()
        for value in values:
            _number(name, value)
            if name == "temperature":
                require(value > 0, name, value, "greater than 0")
            else:
                require(0 <= value <= 1, name, value, "from 0 (labels only) to 1 (teacher only)")
    for name in ("seed", "teacher_seed"):
        whole = isinstance(config[name], int) and not isinstance(config[name], bool)
        require(whole and config[name] >= 0, name, config[name], "a whole number, 0 or more")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name}={value!r} is no number, e.g. {name}={4.0 if name == 'temperature' else 0.9}")


def _terms(loss: dict[str, Any]) -> None:
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
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
