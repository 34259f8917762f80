"""Every yaml is composed and every `_target_` signature-checked, and the files are counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from kd.config import conf_dir, jobs
from kd.instantiate import check_target, resolve, signature_errors, targets

CONF = conf_dir()
EXPERIMENTS = CONF.parent / "experiments"
OPTIONS = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
FILES = sorted(EXPERIMENTS.glob("*.yaml"))

# What a target gets besides its config: from the data, or from where it is built.
LATE = {
    "kd.models.create": ("num_classes", "in_chans", "size"),
    "torch.optim.AdamW": ("params", "lr"),
    "torch.optim.SGD": ("params", "lr"),
    "pytorch_lightning.loggers.CSVLogger": ("save_dir", "name", "version"),
    "pytorch_lightning.loggers.TensorBoardLogger": ("save_dir", "name", "version"),
}
MIXES = ("MeanLogits", "MeanProbabilities", "ByConfidence", "ByCrossEntropy", "Gate", "RandomChoice", "Each")
LATE |= {f"kd.losses.ensemble.{mix}": ("loss",) for mix in MIXES}  # that of each term that it is laid over
LATE |= {f"kd.losses.collaborative.{mix}": ("loss",) for mix in ("Naive", "Linear", "MinLogit", "General")}
LOGGERS = ["pytorch_lightning.loggers"]  # allowed under run.logger alone
# A layer for each view that a file of conf/loss leaves open.
LAYERS = {"student": "student.conv3", "teacher": "teacher.conv3", "feature": "student.conv3"}

# The lists that a pipeline cannot do without.
LISTS = {"pipeline/teachers": ["teachers=[seed_cnn]"], "pipeline/students": ["students=[seed_cnn]"]}


def words(option):
    """What a loss needs to be told: each view that its file leaves open."""
    if not option.startswith("loss/"):
        return LISTS.get(option, [])
    ((name, term),) = yaml.safe_load((CONF / f"{option}.yaml").read_text()).items()
    return [f"loss.{name}.{role}={layer}" for role, layer in LAYERS.items() if term.get(role) == "???"]


def choose(option):
    """The word that chooses an option of `conf/`."""
    group, _, name = option.rpartition("/")
    several = group in ("loss", "run/logger")
    place = {"model": "model@student", "stage": f"stage@{'recover' if name == 'finetune' else name}"}.get(group, group)
    return f"{place}={f'[{name}]' if several else name}"


def bind(config, seen):
    """Check each target's fields against its signature; ``seen`` gathers the targets."""
    for where, target in targets(config):
        if target.startswith("kd.stages."):
            continue  # planning binds these
        node = config
        for part in re.findall(r"\w+", where):
            node = node[int(part)] if isinstance(node, list) else node[part]
        late = tuple(name for name in LATE.get(target, ()) if name not in node)
        signature_errors(node, where, LOGGERS if where.startswith("run.logger.") else (), late)
        seen.add(target)


@pytest.mark.parametrize("option", [option for option in OPTIONS if "/" in option])
def test_every_option_composes_and_every_target_binds(option):
    found, sweep = jobs([choose(option), *words(option)])
    assert not sweep
    seen = set()
    bind(found[0].config, seen)
    own = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    # A target that the file names is among those that were checked: the option did reach the config.
    named = {target for _, target in targets(own) if not target.startswith("kd.stages.")}
    assert named <= seen, option


def test_all_files_of_conf_were_seen():
    composed = [option for option in OPTIONS if "/" in option]
    assert [option for option in OPTIONS if option not in composed] == ["config"]  # composed by each of the others
    assert len(composed) + 1 == len(list(CONF.rglob("*.yaml"))) >= 17


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_composes_with_its_grid_and_every_target_binds(path):
    found, sweep = jobs([f"experiments={path.stem}"])
    raw = yaml.safe_load(path.read_text())
    assert sweep == (raw.get("hydra", {}).get("mode") == "MULTIRUN")
    keys = {repr(sorted((k, repr(v)) for k, v in job.config.items())) for job in found}
    assert len(keys) == len(found), "two jobs of the grid are the same"
    for job in (found[0], found[-1]):
        bind(job.config, set())


def test_all_experiments_were_seen():
    assert len(FILES) == len(list(EXPERIMENTS.rglob("*.yaml"))) >= 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_says_what_it_is(path: Path):
    first, second, *_ = path.read_text().splitlines()
    assert first == "# @package _global_", "without this line an experiment would fill a node that nothing reads"
    assert re.fullmatch(r"# \S.*", second), "the second line says what the experiment asks, for `kd list experiments`"
    assert re.fullmatch(r"e\d\d_[a-z0-9_]+", path.stem)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_says_what_it_is(option):
    first = (CONF / f"{option}.yaml").read_text().splitlines()[0]
    assert re.fullmatch(r"# \S.{10,}", first)


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith("loss/")])
def test_a_loss_is_one_term_under_the_name_of_its_file(option):
    own = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    assert list(own) == [option.removeprefix("loss/")]


def test_no_target_is_named_but_allowed_ones_that_are_there():
    for path in (*CONF.rglob("*.yaml"), *FILES):
        for where, target in targets(yaml.safe_load(path.read_text())):
            extra = LOGGERS if path.parent.name == "logger" else ()
            assert resolve(check_target(target, extra), extra), f"{path}: {where}"


def test_the_late_arguments_are_parameters_of_their_targets():
    from inspect import signature

    for target, names in LATE.items():
        assert set(names) <= set(signature(resolve(target, LOGGERS)).parameters), target


def test_what_a_file_misspells_is_found(tmp_path):
    from kd.errors import InputError

    with pytest.raises(InputError, match=r"student.optins is not a field of kd.models.create; did you mean 'options'"):
        bind(jobs(["+student.optins=1"])[0][0].config, set())
