"""From words to configs: what composes, what beats what, and what is refused in one line."""

from __future__ import annotations

import json
import sys

import pytest
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

from kd.config import DIALS, LISTS, ROOT_KEYS, _Composer, complement, conf_dir, jobs, labels
from kd.errors import InputError


def one(*words, config_dir=None):
    found, sweep = jobs(list(words), config_dir=config_dir)
    assert len(found) == 1 and not sweep
    return found[0].config


def many(*words, config_dir=None):
    found, sweep = jobs(list(words), True, config_dir)
    assert sweep
    return [job.config for job in found]


def experiment(folder, text, name="mine"):
    (folder / "experiments").mkdir(exist_ok=True)
    (folder / "experiments" / f"{name}.yaml").write_text(text)
    return str(folder)


GRID = """# @package _global_
# A test.
temperature: 2.0
alpha: 0.25
fit: {epochs: 7}
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      seed: 0,1
      fit.samples: 300,null
"""


def test_a_config_holds_the_groups_and_the_dials_as_plain_data():
    config = one()
    assert set(config) == ROOT_KEYS | LISTS.keys() | DIALS
    assert json.loads(json.dumps(config)) == config
    assert config["loss"]["kd"]["loss"]["temperature"] == config["temperature"] == 4.0
    assert config["loss"]["ce"]["weight"] == 0.1 and config["loss"]["kd"]["weight"] == 0.9


def test_one_model_group_is_mounted_twice():
    config = one("teacher.name=resnet34", "+student.options.widths=[8,8,8,8]")
    assert config["teacher"]["name"] == "resnet34" and config["teacher"]["options"] == {}
    assert config["student"]["name"] == "seed_cnn_small"
    assert config["student"]["options"] == {"widths": [8, 8, 8, 8]}


@pytest.mark.parametrize("alpha", [0, 1])
def test_the_weights_are_exact_at_the_ends_of_alpha(alpha):
    loss = one(f"alpha={alpha}")["loss"]
    assert (loss["ce"]["weight"], loss["kd"]["weight"]) == (1 - alpha, alpha)
    assert complement(0.7) == 0.3


def test_the_experiment_beats_the_dials_and_the_command_line_beats_the_experiment(tmp_path):
    own = experiment(tmp_path, GRID.partition("hydra:")[0])
    config = one("experiments=mine", config_dir=own)
    assert (config["temperature"], config["alpha"], config["fit"]["epochs"]) == (2.0, 0.25, 7)
    for words in (("experiments=mine", "alpha=0.5", "fit.epochs=9"), ("alpha=0.5", "fit.epochs=9", "experiments=mine")):
        config = one(*words, config_dir=own)
        assert (config["temperature"], config["alpha"], config["fit"]["epochs"]) == (2.0, 0.5, 9)


@pytest.mark.parametrize(
    "words",
    [
        ["temperature=2", "data=mnist", "alpha=0.5"],
        ["fit.lr=0.1", "loss=[ce,soft_ce]", "+student.options={widths:[1,2]}", "student.options.widths=[3]"],
        ["pipeline=baseline", "~fit.gamma", "++fit.lr=2", "fit.lr=3", "run/logger=[csv]", "loss.kd.weight=0.5"],
        ["model@student=by_name", "student={name:resnet18}", "student.name=vit", "experiments=e02_resnet_mobilenet"],
        ["+loss=hint", "loss.hint.student=student.conv1", "data.mean=[0.5]", "student=${teacher}", "~loss.ce"],
    ],
)  # fmt: skip
def test_composing_the_groups_first_gives_what_hydra_gives_in_one_go(words):
    with _Composer(None) as composer:
        whole = compose("config", overrides=[*words, composer.searchpath])
        for _ in range(2):  # the second time from what was kept
            assert composer.compose(words) == whole
        assert composer.compose([]) == compose("config", overrides=[composer.searchpath])


def test_an_experiments_grid_is_run_without_m_and_a_word_beats_its_line(tmp_path):
    own = experiment(tmp_path, GRID)
    found, sweep = jobs(["experiments=mine"], config_dir=own)
    grid = [(job.config["seed"], job.config["fit"]["samples"]) for job in found]
    assert sweep and grid == [(0, 300), (0, None), (1, 300), (1, None)]
    assert found[0].overrides == ("experiments=mine", "seed=0", "fit.samples=300")
    found, sweep = jobs(["experiments=mine", "seed=5", "temperature=1,8"], config_dir=own)
    assert sweep and [(j.config["seed"], j.config["temperature"]) for j in found] == [(5, 1)] * 2 + [(5, 8)] * 2
    found, _ = jobs(["experiments=mine", "++seed=5"], config_dir=own)
    assert {job.config["seed"] for job in found} == {5}


def test_a_sweep_over_experiments_takes_each_ones_grid(tmp_path):
    experiment(tmp_path, GRID)
    own = experiment(tmp_path, GRID.replace("seed: 0,1", "seed: 5").replace("300,null", "400"), "other")
    found = many("experiments=mine,other", "alpha=0.5", config_dir=own)
    assert [(c["seed"], c["fit"]["samples"]) for c in found] == [(0, 300), (0, None), (1, 300), (1, None), (5, 400)]
    assert {c["alpha"] for c in found} == {0.5}
    assert len(many("experiments=glob(*)", "experiments=glob(oth*)", config_dir=own)) == 1
    with pytest.raises(InputError, match=r"experiments=nope: no such option"):
        many("experiments=mine,nope", config_dir=own)


def test_a_line_of_a_grid_is_text(tmp_path):
    own = experiment(tmp_path, GRID.replace("300,null", "null"))
    with pytest.raises(InputError, match=r"composing config: field 'hydra.sweeper.params.fit.samples' is not Optional"):
        jobs(["experiments=mine"], config_dir=own)


def test_an_experiment_without_its_first_line_is_refused(tmp_path):
    own = experiment(tmp_path, "temperature: 2.0\n")
    with pytest.raises(InputError, match="begins with the line `# @package _global_`"):
        one("experiments=mine", config_dir=own)


def test_groups_of_a_folder_of_ones_own_are_found_and_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "faces.yaml").write_text((conf_dir() / "data" / "digits.yaml").read_text())
    assert one("data=faces", config_dir=str(tmp_path))["data"]["name"] == "digits"
    with pytest.raises(InputError, match=r"data=facs: no such option; did you mean 'faces'"):
        one("data=facs", config_dir=str(tmp_path))
    with pytest.raises(InputError, match="is no folder"):
        one(config_dir=str(tmp_path / "nope"))


def test_a_sweep_is_the_product_of_its_values():
    found = many("temperature=1,4,8", "alpha=0.1,0.9", "seed=range(2)")
    assert len({(c["temperature"], c["alpha"], c["seed"]) for c in found}) == len(found) == 12


def test_a_glob_chooses_among_the_options_of_a_group():
    assert [c["data"]["name"] for c in many("data=glob(cifar*)")] == ["cifar10", "cifar100"]
    assert {frozenset(c["loss"]) for c in many("loss=[ce],[ce,kd]")} == {frozenset({"ce"}), frozenset({"ce", "kd"})}


def test_what_tells_the_jobs_apart_is_their_label():
    words = [("data=mnist", "run.workers=0", "seed=0", "alpha=0"), ("data=mnist", "run.workers=1", "seed=0", "alpha=1")]
    assert labels(words) == ["alpha=0", "alpha=1"]
    assert labels([("alpha=0",)]) == [""] and labels([]) == []


REFUSED = [
    # misspelt or misplaced names
    ("data=mnst", "data=mnst: no such option; did you mean 'mnist'?"),
    ("loss=[ce,kdd]", "loss=kdd: no such option; did you mean 'kd'"),
    ("experiments=x", "experiments=x: no such option; there are e01_mnist, "),
    ("run/logger=[csvv]", "run/logger=csvv: no such option; did you mean 'csv'?"),
    ("model@student=wide", "model=wide: no such option; there is by_name"),
    ("tempratur=3", "tempratur is not in the config; did you mean 'temperature'?"),
    ("student.nme=x", "student.nme is not in the config; did you mean 'name'?"),
    ("loss.kdd.weight=1", "loss.kdd is not in the config; did you mean 'kd'?"),
    ("run.wrkers=1", "run.wrkers is not in the config; did you mean 'workers'?"),
    ("zzz=1", "zzz is not in the config; to add a new one write +zzz=…"),
    ("model=by_name", "model is not in the config; did you mean model@student, model@teacher?"),
    ("student.options={widths:[1]}", "student.options holds no such field; to add what is not there write +student"),
    ("+loss.temprature=3", "loss.temprature=3 is no term of the loss; did you mean 'temperature'?"),
    ("++fit.lerning_rate=1", "fit.lerning_rate is not a field of fit; did you mean 'lr'?"),
    ("+run.wrkers=1", "run.wrkers is not a field of run; did you mean 'workers'?"),
    ("+data.siz=1", "data.siz is not a field of kd.data.Digits; did you mean 'size'?"),
    ("+extra=1", "'extra' is no part of a config"),
    ("+sead=1", "'sead' is no part of a config; did you mean 'seed'"),
    ("+pipeline.nam=1", "pipeline.nam is not a field of a pipeline; did you mean 'name'?"),
    ("+temperature=3", "temperature exists already; write it without the +"),
    ("+data=mnist", "data has an option already; write data=… without the +"),
    ("data=3", "data=3: data takes the name of one option; there are cifar10, "),
    ("data=[mnist,digits]", "data takes the name of one option"),
    ("loss=null", "loss takes the name of one option"),
    # no override at all
    ("temperature", "'temperature' is no override; write key=value"),
    ("=3", "=3: no key"),
    ("student.name=[1,2", "is no override; write key=value"),
    ("hydra.mode=MULTIRUN", "hydra.* is not part of a run"),
    ("hydra/launcher=basic", "hydra.* is not part of a run"),
    ("+hydra.x=1", "hydra.* is not part of a run"),
    ("~hydra.job", "hydra.* is not part of a run"),
    # values
    ("temperature=-1", "temperature=-1 is out of range: it must be greater than 0"),
    ("temperature=0", "temperature=0 is out of range"),
    ("temperature=nan", "temperature=nan is out of range"),
    ("temperature=hot", "temperature='hot' is no number"),
    ("temperature=true", "temperature=True is no number"),
    ("alpha=2", "alpha=2 is out of range: it must be from 0 (labels only) to 1 (teacher only)"),
    ("alpha=x", "alpha='x' is no number"),
    ("seed=1.5", "seed=1.5 is out of range: it must be a whole number, 0 or more"),
    ("seed=-1", "seed=-1 is out of range"),
    ("teacher_seed=x", "teacher_seed='x' is out of range"),
    ("fit.epochs=0", "fit.epochs=0 is out of range: it must be 1 or more"),
    ("fit.epochs=many", "fit.epochs='many' is no whole number"),
    ("fit.batch_size=0", "fit.batch_size=0 is out of range"),
    ("fit.samples=10", "fit.samples=10 is less than one batch: lower fit.batch_size=128, or set fit.drop_last=false"),
    ("fit.schedule=cosin", "did you mean 'cosine'?"),
    ("fit.optimiser=3", "fit.optimiser=3 is no mapping"),
    ("teacher_fit.lr=-1", "lr=-1 is out of range"),
    ("student=3", "student=3 is no mapping; set its fields, e.g. student."),
    ("student.name=3", "student.name=3 is no word"),
    ("teacher.options=3", "teacher.options=3 is no mapping"),
    ("student.pretrained=maybe", "student.pretrained='maybe' is no true or false"),
    ("pipeline.stages=null", "pipeline.stages holds no stage"),
    ("pipeline.stages.student=3", "pipeline.stages.student=3 is no stage"),
    ("loss=[]", "loss holds no term; choose some, e.g. loss=[ce,kd]"),
    ("loss.kd=null", "loss.kd=None is no term of the loss: a term is a mapping with _target_"),
    ("loss.kd.student=???", "loss.kd.student is not set: give it a value, e.g. student.last (`kd list layers NAME`"),
    ("run.wandb=of", "run.wandb='of' is none of auto, online, offline, disabled"),
    ("run.store=3", "run.store=3 is no word"),
    ("run.trusted=[3]", "run.trusted=[3]: give names of packages"),
    ("+run.logger.x=3", "run.logger.x=3 is no logger; choose run/logger=[csv]"),
    ("~student", "the config has no 'student'; it cannot do without"),
    ("~temperature", "the config has no 'temperature'; it cannot do without"),
    # several values without -m
    ("temperature=1,2", "temperature=1,2 has several values; add -m to run one job for each"),
    ("data=mnist,digits", "has several values; add -m"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "said"), REFUSED, ids=[word for word, _ in REFUSED])
def test_a_wrong_word_is_refused_in_one_line(word, said):
    with pytest.raises(InputError) as refused:
        one(word)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["temperature=1,-1"], "temperature=-1 is out of range"),  # before any job is run
        (["data=glob(zz*)"], "data=glob(zz*) matches nothing; there are cifar10, "),
        (["temperature=glob(*)"], "temperature=glob(*) matches nothing"),
        (["temperature=interval(0,1)"], "a sweep needs values that can be counted"),
        (["temperature=1,2", "tempratur=3"], "did you mean 'temperature'"),
        (["hydra.sweeper.params={}"], "hydra.* is not part of a run"),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_line(words, said):
    with pytest.raises(InputError) as refused:
        many(*words)
    assert said in str(refused.value) and "\n" not in str(refused.value)


PLACES = ("student", "teacher", "data", "loss.kd", "loss.kd.loss", "fit.optimiser", "pipeline.stages.student")


@pytest.mark.parametrize(
    ("place", "target"),
    [(place, "os.system") for place in PLACES]
    + [("student", target) for target in ("builtins.open", "torch.load", "torch.hub.load", "numpy.load")],
)
def test_a_target_outside_the_allow_list_is_refused_wherever_it_stands(place, target):
    with pytest.raises(InputError, match=rf"^{place}: _target_ '{target}' is outside the allowed packages"):
        one(f"{place}._target_={target}")


def test_what_the_pipeline_does_not_use_is_checked_too():
    for word in ("teacher._target_=os.system", "+run.logger.x._target_=os.system"):
        with pytest.raises(InputError, match="outside the allowed packages"):
            one("pipeline=baseline", word)


SECRETS = [
    "+student.options.x=${oc.env:KD_TEST_SECRET}",
    "+student.options.x=${oc.env:KD_TEST_SECRET,none}",
    "+student.options.x=a-${oc.env:KD_TEST_SECRET}-b",
    "+student.options.x=[1,{y:'${oc.env:KD_TEST_SECRET}'}]",
    "+student.options.x=${oc.decode:${oc.env:KD_TEST_SECRET}}",
    "+student.options.x=${oc.create:{a:1}}",
    "+student.options.x=${hydra:job.name}",
    "+student.options.x='${${teacher.name}:KD_TEST_SECRET}'",  # a resolver's name may be an interpolation itself
    "+student.options.x='${oc.${pipeline.name}:KD_TEST_SECRET}'",
    "+student.options.x='${ oc.env : KD_TEST_SECRET}'",
    "+student.options.x=${run.store}",
    "+student.options.x='${[run].store}'",
    "+student.options.x='${.....run.store}'",
    "+student.options.x='${run[store]}'",
    "+loss.kd.x=${oc.env:KD_TEST_SECRET}",
    "data.name=${oc.env:KD_TEST_SECRET}",
    "temperature=${oc.env:KD_TEST_SECRET}",
    "+pipeline.stages.student.x=${oc.env:KD_TEST_SECRET}",
    "pipeline.name=${oc.env:KD_TEST_SECRET}",
]  # fmt: skip


@pytest.mark.parametrize("word", SECRETS)
def test_the_environment_and_run_never_reach_what_is_hashed(word, monkeypatch):
    monkeypatch.setenv("KD_TEST_SECRET", "hunter2")
    with pytest.raises(InputError) as refused:
        one("teacher.name=oc.env", word)
    assert "hunter2" not in str(refused.value)


def test_names_of_the_config_may_be_referred_to():
    assert one("student=${teacher}")["student"]["name"] == "seed_cnn"
    assert one("fit.lr=${teacher_fit.lr}", "alpha=${complement:0.75}")["alpha"] == 0.25
    assert one("student.name=${teacher.name}")["student"]["name"] == "seed_cnn"
    with pytest.raises(InputError, match="Interpolation key 'nope' not found"):
        one("student.name=${nope}")


def test_run_may_read_the_environment(monkeypatch):
    monkeypatch.setenv("KD_TEST_FOLDER", "/somewhere")
    assert one("run.store=${oc.env:KD_TEST_FOLDER}")["run"]["store"] == "/somewhere"


def test_hydra_is_left_as_it_was_found():
    before = GlobalHydra.instance().hydra
    one()
    with pytest.raises(InputError):
        one("tempratur=3")
    assert GlobalHydra.instance().hydra is before


def test_a_broken_hydra_plugin_is_one_line(tmp_path, monkeypatch):
    from hydra.core.plugins import Plugins

    (tmp_path / "hydra_plugins" / "bad").mkdir(parents=True)
    (tmp_path / "hydra_plugins" / "bad" / "__init__.py").write_text("raise TypeError('made for another Hydra')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(Singleton._instances, Plugins, raising=False)
    try:
        with pytest.raises(
            InputError, match="Hydra cannot start: made for another Hydra; `kd doctor` names the plugin"
        ):
            one()
    finally:  # else every later look at the plugins finds this one
        for name in [name for name in sys.modules if name.startswith("hydra_plugins")]:
            del sys.modules[name]
