"""Terms, their views and their weighted sum."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.instantiate import instantiate
from kd.losses.feature import Hint
from kd.losses.logits import CrossEntropy, SoftTargetKL, Standardised, cross_entropy, soft_target_kl
from kd.losses.response import DKD
from kd.losses.self_taught import PSKD, USKD, pskd
from kd.losses.sequence import ForwardKL
from kd.objective import Objective, Term

CONF = Path(__file__).resolve().parents[1] / "conf" / "loss"
STUDENT, TEACHER, TARGET = tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]]), tensor([[3.0, 1.0, 0.0]] * 2), tensor([0, 2])
VIEWS = {"student.logits": STUDENT, "teacher.logits": TEACHER, "batch.target": TARGET}


class Poison(nn.Module):
    """A loss that gives NaN, and says whether it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, **views: Tensor) -> Tensor:
        self.asked = True
        return self.weight * math.nan


def label(weight: float = 0.1) -> Term:
    return Term(CrossEntropy(), weight, student="student.logits", target="batch.target")


def soft(weight: float = 0.9, temperature: float = 4.0) -> Term:
    return Term(SoftTargetKL(temperature), weight, student="student.logits", teacher="teacher.logits")


def layer(path: str = "conv3", weight: float = 1.0) -> Term:
    return Term(Hint(), weight, student=f"student.{path}", teacher=f"teacher.{path}")


def test_the_total_is_the_weighted_sum_of_the_parts() -> None:
    total, parts = Objective({"ce": label(0.1), "kd": soft(0.9)})(VIEWS)
    assert_close(parts["ce"], cross_entropy(STUDENT, TARGET))
    assert_close(parts["kd"], soft_target_kl(STUDENT, TEACHER, 4.0))
    assert total.equal(0.1 * parts["ce"] + 0.9 * parts["kd"])


def test_the_total_pulls_the_student() -> None:
    student = STUDENT.clone().requires_grad_()
    total, _ = Objective({"ce": label(), "kd": soft()})(VIEWS | {"student.logits": student})
    total.backward()
    assert student.grad is not None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("alpha", [0, 0.0, 1, 1.0])
def test_at_either_end_of_alpha_one_term_alone_is_computed(alpha: float) -> None:
    total, parts = Objective({"ce": label(1 - alpha), "kd": soft(alpha)})(VIEWS)
    expected = soft_target_kl(STUDENT, TEACHER, 4.0) if alpha else cross_entropy(STUDENT, TARGET)
    assert total.equal(expected) and list(parts) == (["kd"] if alpha else ["ce"])


def test_alpha_is_continuous_at_its_ends() -> None:
    def total(alpha: float) -> float:
        return float(Objective({"ce": label(1 - alpha), "kd": soft(alpha)})(VIEWS)[0])

    assert total(1e-6) == pytest.approx(total(0.0), rel=1e-4)
    assert total(1 - 1e-6) == pytest.approx(total(1.0), rel=1e-4)


def test_a_term_of_weight_zero_is_not_computed_even_if_it_were_nan() -> None:
    poison = Poison()
    objective = Objective({"bad": Term(poison, 0.0, student="student.logits"), "ce": label(1.0)})
    total, parts = objective(VIEWS)
    assert total.isfinite() and list(parts) == ["ce"] and not poison.asked
    assert not list(objective.parameters()) and objective.terms["bad"].weight == 0


def test_without_a_teachers_weight_no_teacher_is_needed() -> None:
    objective = Objective({"ce": label(1.0), "kd": soft(0.0), "hint": layer(weight=0)})
    assert not objective.needs_teacher and objective.paths("teacher") == [] and objective.paths("student") == []
    objective.bind({})
    objective({"student.logits": STUDENT, "batch.target": TARGET})


def test_without_the_labels_weight_targets_are_ignored() -> None:
    objective = Objective({"ce": label(0.0), "kd": soft(1.0)})
    assert objective.needs_teacher
    objective({"student.logits": STUDENT, "teacher.logits": TEACHER})


def test_a_loss_is_given_a_second_view_of_the_student_where_its_term_names_one() -> None:
    class Two(nn.Module):
        shapes: tuple[torch.Size, ...] = ()

        def bind(self, *shapes: torch.Size) -> None:
            self.shapes = shapes

        def forward(self, student: Tensor, feature: Tensor, target: Tensor) -> Tensor:
            return student.sum() + 10 * feature.sum() + 100 * target.sum()

    views = {"student": "student.logits", "feature": "student.conv3", "target": "batch.target"}
    objective = Objective({"two": Term(Two(), 1.0, **views)})
    assert not objective.needs_teacher and objective.paths("student") == ["conv3"] and not objective.paths("teacher")
    objective.bind(SHAPES | {"student.logits": STUDENT.shape})
    assert objective.losses["two"].shapes == (STUDENT.shape, SHAPES["student.conv3"])
    total, _ = objective(VIEWS | {"student.conv3": torch.ones(2, 3)})
    assert total.item() == pytest.approx(STUDENT.sum().item() + 60 + 200)


def test_losses_with_a_schedule_are_told_where_training_stands() -> None:
    class Scheduled(nn.Module):
        told: tuple[float, int] | None = None

        def at(self, epoch: float, epochs: int) -> None:
            self.told = epoch, epochs

    first, idle = Scheduled(), Scheduled()
    objective = Objective(
        {
            "ce": label(),
            "first": Term(first, 1, student="student.logits"),
            "idle": Term(idle, 0, student="student.logits"),
        }
    )
    objective.at(2.5, 10)
    assert first.told == (2.5, 10) and idle.told is None
    assert set(objective.state_dict()) == set(), "where training stands is no state: it comes from the step"


def test_paths_are_the_layers_to_tap_each_once() -> None:
    objective = Objective({"kd": soft(), "b": layer("layer2"), "a": layer("layer1.0"), "again": layer("layer2")})
    assert objective.paths("student") == objective.paths("teacher") == ["layer1.0", "layer2"]


def test_another_side_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'teacher'"):
        Objective({"kd": soft()}).paths("teachers")


def test_weights_are_plain_floats() -> None:
    term = label(1)
    assert type(term.weight) is float
    assert type(Objective({"ce": term}).terms["ce"].weight) is float


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"student": "logits"}, "'student.' was meant, such as 'student.logits'"),
        ({"student": "student."}, "'student.' was meant"),
        ({"student": "???"}, "'student.' was meant"),
        ({"student": None}, "reads None as its student"),
        ({"student": "teacher.logits"}, "'student.' was meant"),
        ({"teacher": "student.logits"}, "'teacher.' was meant, such as 'teacher.logits'"),
        ({"teacher": "layer3"}, "'teacher.' was meant"),
        ({"feature": "teacher.layer3"}, "'student.' was meant"),
        ({"student": ["student.a", "b"]}, "reads 'b' as its student"),
        ({"student": []}, "reads [] as its student"),
        ({"target": ["batch.target"]}, "reads ['batch.target'] as its target"),
        ({"row": "row"}, "such as 'batch.row'"),
        ({"target": "target"}, "'batch.' was meant, such as 'batch.target'"),
        ({"weight": -0.1}, "weighs -0.1"),
        ({"weight": math.nan}, "weighs nan"),
        ({"weight": math.inf}, "weighs inf"),
        ({"weight": "0.5"}, "weighs '0.5'"),
        ({"weight": True}, "weighs True"),
        ({"loss": torch.nn.functional.mse_loss}, "a module with forward"),
    ],
)
def test_a_term_that_no_batch_can_mend_is_refused_in_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        Term(**{"loss": CrossEntropy(), "weight": 1.0, "student": "student.logits"} | fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({}, "there is no term"),
        ({"ce": label(0), "kd": soft(0)}, r"all weights are 0 \(ce, kd\)"),
        ({"a.b": label()}, "cannot be called 'a.b'"),
        ({"keys": label()}, "cannot be called 'keys'"),
        ({"training": label()}, "cannot be called 'training'"),
    ],
)
def test_an_objective_of_nothing_or_of_odd_names_is_refused(terms: dict[str, Term], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Objective(terms)


def test_a_missing_view_is_named_with_the_nearest_there_is() -> None:
    objective = Objective({"kd": soft()})
    with pytest.raises(InputError, match=r"term 'kd' reads 'teacher\.logits'.*did you mean 'teacher\.logit'"):
        objective({"student.logits": STUDENT, "teacher.logit": TEACHER})


class Named(nn.Module):
    """A loss that takes anything and hands it on."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Tensor, **others: Tensor) -> Tensor:
        return self.loss(student=student, **others)


@pytest.mark.parametrize(
    ("loss", "roles", "said"),
    [
        (DKD(), {"teacher": "teacher.logits"}, "DKD needs a target, and its term names none; add target: batch.target"),
        (DKD(), {"target": "batch.target"}, "DKD needs a teacher, .* add teacher: teacher.logits"),
        (USKD(), {"target": "batch.target"}, "USKD needs a feature, .* add feature: student.logits"),
        (Standardised(DKD()), {"teacher": "teacher.logits"}, "DKD needs a target"),
        (Named(Named(DKD())), {"teacher": "teacher.logits"}, "DKD needs a target"),
        (
            SoftTargetKL(4.0),
            {"teacher": "teacher.logits", "target": "batch.target"},
            "SoftTargetKL takes student, teacher, and its term names a target too; leave it out",
        ),
    ],
)
def test_a_missing_target_or_one_too_many_is_refused_in_one_line(loss, roles, said) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Term(loss, 1.0, student="student.logits", **roles)
    assert "\n" not in str(caught.value)


def test_a_loss_that_needs_no_target_may_be_given_one() -> None:
    loss = ForwardKL()
    assert Term(loss, 1.0, "student.logits", "teacher.logits").target is None
    assert Term(loss, 1.0, "student.logits", "teacher.logits", "batch.target").target == "batch.target"


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    class Rows(nn.Module):
        def forward(self, student: Tensor) -> Tensor:
            return student.sum(1)

    objective = Objective({"rows": Term(Rows(), 1, student="student.logits")})
    with pytest.raises(InputError, match=r"term 'rows' has shape \(2,\)"):
        objective(VIEWS)


SHAPES = {
    "student.conv3": torch.Size((2, 3, 4, 4)),
    "teacher.conv3": torch.Size((2, 5, 4, 4)),
    "student.head": torch.Size((2, 3)),
    "teacher.head": torch.Size((2, 3)),
}


def bound(*names: str, seed: int = 0) -> Objective:
    torch.manual_seed(seed)
    objective = Objective({name: layer("conv3" if name == "a" else "head") for name in names})
    objective.bind(SHAPES)
    return objective


def test_bound_projections_are_registered_trained_and_in_the_state() -> None:
    objective = bound("a")
    assert [name for name, _ in objective.named_parameters()] == [
        "losses.a.projection.0.weight",
        "losses.a.projection.1.weight",
        "losses.a.projection.1.bias",
    ]
    views = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    objective(views)[0].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    fresh = bound("a", seed=1)
    fresh.load_state_dict(objective.state_dict(), strict=True)
    assert_close(fresh(views)[0], objective(views)[0])


def test_the_seed_decides_the_projections_and_the_order_of_the_terms_does_not() -> None:
    # A config that was stored and read back has its terms in the order of their names.
    first, again, turned, other = bound("a", "b"), bound("a", "b"), bound("b", "a"), bound("a", "b", seed=1)
    states = [[value for _, value in sorted(o.state_dict().items())] for o in (first, again, turned, other)]
    assert all(x.equal(y) for x, y in zip(states[0], states[1], strict=True))
    assert all(x.equal(y) for x, y in zip(states[0], states[2], strict=True))
    assert not all(x.equal(y) for x, y in zip(states[0], states[3], strict=True))
    assert list(turned.active) == ["a", "b"]


def test_binding_draws_nothing_where_no_loss_asks() -> None:
    state = torch.get_rng_state()
    Objective({"ce": label(), "kd": soft(), "hint": layer(weight=0)}).bind({})
    assert torch.get_rng_state().equal(state)


def test_binding_says_which_term_and_what_it_lacks() -> None:
    with pytest.raises(InputError, match=r"term 'a' reads 'student\.conv3', which is not among student\.head"):
        Objective({"a": layer()}).bind({"student.head": SHAPES["student.head"]})
    shapes = SHAPES | {"teacher.conv3": torch.Size((2, 5))}
    words = r"term 'a' reads student\.conv3 \(3, 4, 4\) and teacher\.conv3 \(5\): a hint cannot lead"
    with pytest.raises(InputError, match=words):
        Objective({"a": layer()}).bind(shapes)


def test_a_role_may_be_a_list_of_views_and_its_loss_is_given_lists() -> None:
    class Several(nn.Module):
        shapes: tuple[Any, ...] = ()

        def bind(self, *shapes: Any) -> None:
            self.shapes = shapes

        def forward(self, student: list[Tensor], teacher: list[Tensor], row: Tensor) -> Tensor:
            assert isinstance(student, list) and isinstance(teacher, list)
            return student[0].sum() + 10 * student[1].sum() + 100 * teacher[0].sum() + 1000 * row.sum()

    views = {"student": ["student.head", "student.conv3"], "teacher": ["teacher.head"], "row": "batch.row"}
    objective = Objective({"several": Term(Several(), 1.0, **views)})
    assert objective.needs_teacher
    assert objective.paths("student") == ["conv3", "head"] and objective.paths("teacher") == ["head"]
    objective.bind(SHAPES | {"batch.row": torch.Size((50,))})
    expected = [SHAPES["student.head"], SHAPES["student.conv3"]], [SHAPES["teacher.head"]], (50,)
    assert objective.losses["several"].shapes == expected, "lists keep the order in which they were named"
    given = {"student.head": torch.ones(2), "student.conv3": torch.ones(3), "teacher.head": torch.ones(4)}
    total, _ = objective(given | {"batch.row": tensor([1, 2])})
    assert total.item() == 2 + 30 + 400 + 3000


def test_what_a_list_lacks_is_named() -> None:
    objective = Objective({"a": Term(Hint(), 1.0, ["student.conv3", "student.conv4"], "teacher.conv3")})
    with pytest.raises(InputError, match=r"term 'a' reads 'student\.conv4'.*did you mean 'student\.conv3'"):
        objective.bind(SHAPES)


class Parts:
    """A network of two stages."""

    def find(self, name: str) -> tuple[str, ...]:
        return {"stages": ("conv2", "conv3"), "last": ("conv3",), "embedding": ("head",)}[name]


def test_parts_become_the_layers_of_each_network_once_it_is_known() -> None:
    terms = {
        "a": Term(Hint(), 1.0, student="student.last", teacher="teacher.conv3"),
        "b": Term(Hint(), 1.0, student="student.embedding", teacher="teacher.embedding"),
    }
    objective = Objective(terms)
    assert objective.names_parts("student") and objective.names_parts("teacher")
    objective.resolve({"student": Parts(), "teacher": Parts()})
    assert not objective.names_parts("student") and not objective.names_parts("teacher")
    assert objective.paths("student") == ["conv3", "head"] == objective.paths("teacher")
    assert objective.terms["a"].student == "student.conv3" and terms["a"].student == "student.last"
    objective.bind(SHAPES)
    views = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    assert objective(views)[0].isfinite()


def test_tokens_are_read_as_maps_where_the_other_side_has_maps() -> None:
    objective = Objective({"a": layer()})
    shapes = {**SHAPES, "teacher.conv3": torch.Size((2, 16, 5))}
    assert objective.lay(shapes) == ["teacher.conv3:maps"]
    assert objective.paths("teacher") == ["conv3:maps"] and objective.lay(shapes) == []


def test_a_rehearsal_names_the_term_and_what_it_was_given_and_changes_nothing() -> None:
    objective = bound("a")
    views = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.rehearse(views)
    assert objective.training and all(value.equal(state[n]) for n, value in objective.state_dict().items())
    wrong = views | {"student.conv3": torch.randn(2, 4, 4, 4)}
    with pytest.raises(
        InputError, match=r"the term 'a' reads student\.conv3 \(4, 4, 4\) and teacher\.conv3 \(5, 4, 4\)"
    ):
        objective.rehearse(wrong)
    assert objective.training


def from_yaml(name: str, alpha: float, **fields: str) -> dict[str, Any]:
    """A file of conf/loss, resolved by hand as the command line would."""
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8").replace('"${complement:${alpha}}"', str(1 - alpha))
    root = OmegaConf.create(
        {"alpha": alpha, "temperature": 4.0, "fit": {"batch_size": 8}, "loss": OmegaConf.create(text)}
    )
    found = OmegaConf.to_container(root, resolve=True)["loss"]
    assert list(found) == [name], "the file's one key is its term's name"
    found[name] |= fields
    return dict(found)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_each_file_under_conf_loss_makes_a_term(name: str) -> None:
    written = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))[name]
    layers = {"student": "student.conv3", "teacher": "teacher.conv3", "feature": "student.conv3"}
    terms = instantiate(
        from_yaml(name, 0.75, **{role: at for role, at in layers.items() if written.get(role) == "???"})
    )
    assert isinstance(terms[name], Term)
    weight = {"${alpha}": 0.75, "${complement:${alpha}}": 0.25}.get(written["weight"], written["weight"])
    assert Objective(terms).active[name].weight == weight


def test_the_default_files_make_the_objective_of_hinton() -> None:
    total, parts = Objective(instantiate(from_yaml("ce", 0.75) | from_yaml("kd", 0.75)))(VIEWS)
    expected = 0.25 * cross_entropy(STUDENT, TARGET) + 0.75 * soft_target_kl(STUDENT, TEACHER, 4.0)
    assert_close(total, expected)
    assert set(parts) == {"ce", "kd"}


def earlier_term(loss: nn.Module | None = None) -> Term:
    views = {"student": "student.logits", "teacher": "earlier.logits", "target": "batch.target"}
    return Term(loss or PSKD(alpha=0.5), 1.0, **views)


def bound_to_earlier() -> Objective:
    objective = Objective({"pskd": earlier_term()})
    objective.bind({"student.logits": torch.Size((2, 3)), "batch.row": torch.Size((9,))})
    return objective


def seen(logits: Tensor, row: list[int]) -> dict[str, Tensor]:
    return {"student.logits": logits, "batch.target": tensor([0, 1]), "batch.row": tensor(row)}


def test_a_term_may_read_what_the_student_said_of_a_sample_before_and_the_label_at_first() -> None:
    objective, target = bound_to_earlier(), tensor([0, 1])
    assert not objective.needs_teacher and not objective.paths("teacher")
    first, second = tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]]), tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    assert_close(objective(seen(first, [4, 7]))[0], cross_entropy(first, target))
    # Sample 7 comes again, in the other place, and 0 for the first time.
    known = torch.stack([first[1], tensor([0.0, 1e4, 0.0])])
    assert_close(objective(seen(second, [7, 0]))[0], pskd(second, known, target, 0.5))


def test_in_evaluation_nothing_is_remembered_and_a_resumed_objective_recalls_the_same() -> None:
    objective, logits = bound_to_earlier(), tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    before = objective.state_dict()["earlier.said"].clone()
    objective.eval()(seen(logits, [4, 7]))
    objective.rehearse(seen(logits, [0, 0]))
    assert objective.state_dict()["earlier.said"].isnan().equal(before.isnan()) and before.isnan().all()
    objective.train()(seen(logits, [4, 7]))
    resumed = bound_to_earlier()
    resumed.load_state_dict(objective.state_dict(), strict=True)
    assert_close(resumed(seen(logits, [7, 4]))[0], objective(seen(logits, [7, 4]))[0])


def test_only_a_teacher_may_be_an_earlier_self_and_only_its_logits() -> None:
    for role, view in (("student", "earlier.logits"), ("teacher", "earlier.conv3")):
        views = {"student": "student.logits", "teacher": "earlier.logits", "target": "batch.target"} | {role: view}
        with pytest.raises(InputError, match=f"as its {role}; a name that begins"):
            Term(PSKD(), 1.0, **views)


def test_any_loss_on_logits_may_have_its_own_student_for_a_teacher() -> None:
    views = {"student": "student.logits", "teacher": "earlier.logits"}
    objective = Objective({"kd": Term(SoftTargetKL(4.0), 1.0, **views)})
    objective.bind({"student.logits": torch.Size((2, 3)), "batch.row": torch.Size((9,))})
    logits = tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    objective(seen(logits, [1, 2]))
    assert objective(seen(logits, [1, 2]))[0].item() == pytest.approx(0, abs=1e-6)


class Lent(nn.Module):
    """A loss that is lent a part."""

    def lend(self, part: nn.Module) -> None:
        self.part = part

    def graft(self) -> nn.Module:
        return nn.Sequential(nn.Flatten())

    def forward(self, student: Tensor) -> Tensor:
        return student.sum()


class Plain(nn.Module):
    """A loss that takes the student's logits alone."""

    def forward(self, student: Tensor) -> Tensor:
        return student.sum()


def test_a_loss_is_lent_the_part_that_its_term_names() -> None:
    objective = Objective({"a": Term(Lent(), 1.0, "student.conv3", part="teacher.classifier"), "b": label()})
    assert objective.borrows == ["teacher.classifier"] and not objective.needs_teacher
    head = nn.Linear(2, 2)
    objective.lend({"teacher.classifier": head})
    assert objective.losses["a"].part is head
    with pytest.raises(InputError, match=r"term 'a' reads 'teacher\.classifier', which is not among"):
        objective.lend({})


def test_a_graft_stands_behind_the_one_layer_that_its_term_reads() -> None:
    found = Objective({"a": Term(Lent(), 1.0, "student.conv3", part="teacher.head")}).graft
    assert found is not None and (found.term, found.at) == ("a", "conv3") and len(list(found.tail.children())) == 1
    assert Objective({"b": label()}).graft is None
    for views in ("student.logits", ["student.conv3"]):
        with pytest.raises(InputError, match="one layer was meant"):
            _ = Objective({"a": Term(Lent(), 1.0, views, part="teacher.head")}).graft


@pytest.mark.parametrize(
    ("loss", "part", "words"),
    [
        (Lent(), None, r"Lent needs a part of the teacher: set part=teacher\.classifier"),
        (Plain(), "teacher.head", "Plain takes no part"),
        (Lent(), "head", "borrows 'head'; a teacher's layer was meant"),
        (Lent(), "student.head", "borrows 'student.head'"),
    ],
)
def test_a_part_that_cannot_be_lent_is_refused(loss: nn.Module, part: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Term(loss, 1.0, "student.logits", part=part)
