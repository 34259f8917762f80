"""Config to object: what is allowed is built, what is not is refused before it is imported."""

from __future__ import annotations

import sys

import pytest
import torch

from kd.errors import InputError
from kd.instantiate import check_target, instantiate, resolve, signature_errors, targets

LINEAR = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "builtins.open", "builtins.eval", "torch.load", "torch.hub.load", "numpy.load", "pickle.loads",
        "subprocess.Popen", "kd.cli.main", "kd.store.Store", "kdx.Thing", "kd", "torch.nn", "torch.nnx.Linear",
        "torch.nn.Linear.__init__.__globals__", "kd.models.create()", "kd.models.create\n", " kd.models.create",
        "", None, 3, ["kd.models.create"],
    ],
)  # fmt: skip
def test_a_target_outside_the_allowed_packages_is_refused(name):
    with pytest.raises(InputError, match=r"is outside the allowed packages|is no class|no '__globals__'|: "):
        resolve(name)
    with pytest.raises(InputError):
        instantiate({"_target_": name})


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.functional.relu",  # a function that is not ours
        "torch.nn.init.torch",  # a module that an allowed one has imported
        "torch.nn.modules.module.functools.partial",
        "kd.data.readers.Path",  # a class from elsewhere, by way of ours
        "torch.nn.modules.linear",  # the module, not the class
        "kd.losses.logits.F",
    ],
)
def test_what_is_reached_through_an_allowed_module_must_be_of_an_allowed_package_itself(name):
    with pytest.raises(InputError, match=r"is no class of an allowed package|No module named"):
        resolve(name)


def test_a_refused_target_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_kd_test.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="outside the allowed packages"):
        instantiate({"_target_": "evil_kd_test.Thing"})
    assert "evil_kd_test" not in sys.modules


def test_a_package_the_user_trusts_is_allowed_and_no_other(tmp_path, monkeypatch):
    (tmp_path / "mine_kd_test.py").write_text(
        "class Net:\n    def __init__(self, a=1):\n        self.a = a\ndef make(a):\n    return Net(a)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert instantiate({"_target_": "mine_kd_test.make", "a": 5}, ["mine_kd_test"]).a == 5
    assert instantiate({"inner": {"_target_": "mine_kd_test.Net"}}, ["mine_kd_test"])["inner"].a == 1
    with pytest.raises(InputError, match="outside the allowed"):
        check_target("mine_kd_test_more.Net", ["mine_kd_test"])  # a name is no prefix
    with pytest.raises(InputError, match=r"name its package in run\.trusted"):
        instantiate({"_target_": "mine_kd_test.Net"})


def test_a_trusted_package_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_kd_test.py").write_text("raise RuntimeError('boom')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"'broken_kd_test.Net': RuntimeError: boom"):
        resolve("broken_kd_test.Net", ["broken_kd_test"])
    with pytest.raises(InputError, match="ModuleNotFoundError"):
        resolve("kd.models.nope.Net")


def test_the_nearest_class_is_offered():
    with pytest.raises(InputError, match=r"torch.optim has no 'AdmW'; did you mean 'AdamW'"):
        resolve("torch.optim.AdmW")
    with pytest.raises(InputError, match=r"name the class itself; did you mean 'Linear'"):
        resolve("torch.nn.modules.linear")


def test_objects_are_built_innermost_first_and_late_arguments_go_to_the_outermost():
    node = {
        "_target_": "kd.objective.Term",
        "weight": 0.5,
        "student": "student.logits",
        "teacher": "teacher.logits",
        "loss": {"_target_": "kd.losses.logits.SoftTargetKL", "temperature": 2.0},
    }
    term = instantiate(node)
    assert type(term).__name__ == "Term" and term.loss.temperature == 2.0
    assert instantiate({"_target_": "torch.nn.Linear", "in_features": 2}, out_features=3).weight.shape == (3, 2)
    assert instantiate([1, {"a": (2, None)}]) == [1, {"a": [2, None]}]


def test_a_wrong_field_is_named_with_its_path_and_the_nearest_right_one():
    with pytest.raises(InputError, match=r"^loss.kd.loss.temprature is not a field of .*did you mean 'temperature'"):
        instantiate({"kd": {"loss": {"_target_": "kd.losses.logits.SoftTargetKL", "temprature": 3}}}, where="loss")
    with pytest.raises(InputError, match=r"^in_feature is not a field of torch.nn.Linear; did you mean 'in_features'"):
        instantiate({**LINEAR, "in_feature": 3})
    with pytest.raises(InputError, match=r"^list\[1\].x is not a field"):
        instantiate([1, {**LINEAR, "x": 1}], where="list")


def test_where_no_field_is_near_all_are_named_but_those_given_late():
    with pytest.raises(InputError) as refused:
        signature_errors({"_target_": "torch.optim.AdamW", "momentumm": 1}, "fit.optimiser", late=("params", "lr"))
    said = str(refused.value)
    assert said.startswith("fit.optimiser.momentumm is not a field of torch.optim.AdamW; there are betas, eps, ")
    assert "params" not in said and " lr" not in said


def test_a_missing_field_is_named():
    with pytest.raises(InputError, match=r"^student: missing a required .*'in_features'"):
        signature_errors({"_target_": "torch.nn.Linear", "out_features": 3}, "student")
    signature_errors({"_target_": "torch.nn.Linear", "out_features": 3}, late=("in_features",))


def test_every_target_below_a_node_is_found_with_its_path():
    node = {"a": [{"_target_": "x.Y", "b": {"_target_": None}}], "_target_": "z.W"}
    assert list(targets(node)) == [("", "z.W"), ("a[0]", "x.Y"), ("a[0].b", None)]


def test_a_class_of_torch_is_built_whole():
    assert isinstance(instantiate({"_target_": "torch.nn.Sequential"}), torch.nn.Sequential)
