"""The one module: what it optimises, hears, keeps and leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kd.errors import InputError
from kd.losses.ensemble import MeanLogits, RandomChoice
from kd.losses.feature import Hint
from kd.losses.logits import CrossEntropy, SoftTargetKL
from kd.models import Frozen, Normalised, create
from kd.objective import Objective, Term
from kd.schedules import Step
from kd.training.module import Distiller
from kd.training.optimisers import configure
from kd.training.settings import Fit
from tests.training.tiny import label_term, net, teacher_term


def distiller(terms, student=None, **more) -> Distiller:
    return Distiller(student or net(), Objective(terms), configure(Fit(), 1), **more)


def batch(count=4, **said):
    images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return {
        "image": images,
        "target": torch.arange(count) % 3,
        "row": torch.arange(count),
        "id": torch.arange(count),
        **said,
    }


def small_cnn(seed=0, widths=(2, 3, 4, 5)):
    torch.manual_seed(seed)
    made = create("seed_cnn_small", num_classes=3, in_chans=1, size=4, options={"widths": list(widths)})
    return Normalised(made, [0.5], [0.25])


def test_a_step_gives_the_weighted_sum_and_keeps_the_parts():
    module = distiller({"ce": label_term(0.25), "kd": teacher_term(0.75)}, stored=["teacher"])
    total = module.training_step(batch(**{"teacher.logits": torch.rand(4, 3)}), 0)
    assert set(module.parts) == {"ce", "kd"}
    torch.testing.assert_close(total, 0.25 * module.parts["ce"] + 0.75 * module.parts["kd"])
    assert module.gradients == {}


def test_gradient_norms_are_those_of_a_linear_net_by_hand():
    """Logits z = Wx + b at W = b = 0, so dL/dW = (dL/dz) x^T and the norm is |dL/dz| sqrt(|x|^2 + 1).

    Cross-entropy at label 0: dL/dz = p - y = (-1/2, 1/2). Teacher (2, 0) at temperature 2: q = (0.731059, 0.268941) and
    dL/dz = T (p - q) = 2 (-0.231059, 0.231059).
    """
    student = Normalised(nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), [0.0], [1.0])
    for parameter in student.parameters():
        nn.init.zeros_(parameter)
    terms = {"ce": label_term(0.1), "kd": teacher_term(0.9, temperature=2.0)}
    module = distiller(terms, student, stored=["teacher"])
    module.gradients_due = True
    one = {"image": torch.tensor([[[[1.0, 2.0]]]]), "target": torch.tensor([0]), "row": torch.tensor([0])}
    one["teacher.logits"] = torch.tensor([[2.0, 0.0]])
    total = module.training_step(one, 0)
    length = math.sqrt(1 + 4 + 1)
    assert module.gradients["grad/ce"].item() == pytest.approx(0.1 * math.sqrt(0.5) * length, rel=1e-6)
    assert module.gradients["grad/kd"].item() == pytest.approx(0.9 * 2 * 0.2310586 * math.sqrt(2) * length, rel=1e-6)
    # Both pull the same way here, so the gradient of the sum has the sum of the norms.
    total.backward()
    whole = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
    assert whole.item() == pytest.approx(sum(module.gradients[f"grad/{name}"].item() for name in terms), rel=1e-6)


def test_asking_for_norms_leaves_the_gradient_as_it_is():
    grads = []
    for due in (False, True):
        module = distiller({"ce": label_term(0.5), "kd": teacher_term(0.5)}, stored=["teacher"])
        module.gradients_due = due
        module.training_step(batch(**{"teacher.logits": torch.ones(4, 3).cumsum(1)}), 0).backward()
        grads.append([p.grad.clone() for p in module.student.parameters() if p.grad is not None])
    assert all(a.equal(b) for a, b in zip(*grads, strict=True)) and len(grads[0]) == 2


def test_a_term_that_does_not_reach_the_student_has_a_norm_of_nothing():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, student, target):
            return self.weight**2

    module = distiller({"ce": label_term(0.5), "own": label_term(0.5, Own())})
    module.gradients_due = True
    module.training_step(batch(), 0)
    assert module.gradients["grad/own"].item() == 0 < module.gradients["grad/ce"].item()


def test_a_teacher_that_is_needed_and_missing_is_an_error():
    with pytest.raises(ValueError, match="hears teacher, and there is neither that net nor its labels"):
        distiller({"kd": teacher_term()})
    assert distiller({"ce": label_term(), "kd": teacher_term(0.0)}).teachers.keys() == set()


def test_the_teacher_stays_frozen_and_out_of_state_and_optimiser():
    teacher = small_cnn(1)
    module = distiller({"ce": label_term(0.5), "kd": teacher_term(0.5)}, small_cnn(0), teachers=teacher)
    module.train()
    assert isinstance(module.teachers["teacher"], Frozen) and not teacher.training and module.student.training
    assert not any(p.requires_grad for p in teacher.parameters())
    own = {id(p) for p in module.student.parameters()}
    assert {id(p) for p in module.parameters()} == own
    trained = [p for g in module.configure_optimizers()["optimizer"].param_groups for p in g["params"]]
    assert {id(p) for p in trained} == own
    assert module.state_dict() and all(name.startswith("student.") for name in module.state_dict())
    assert set(module.views(batch())) == {"batch.target", "batch.row", "student.logits", "teacher.logits"}


def mixed(mix: nn.Module) -> dict[str, Term]:
    views = {"student": "student.logits", "teacher": ["teacher1.logits", "teacher2.logits"]}
    return {"ce": label_term(0.5), "kd": Term(mix, 0.5, **views)}


def test_several_teachers_run_frozen_one_after_the_other():
    first, second = small_cnn(1), small_cnn(2)
    terms = mixed(MeanLogits(SoftTargetKL(4.0)))
    module = distiller(terms, small_cnn(0), teachers={"teacher1": first, "teacher2": second})
    module.train()
    assert not first.training and not second.training and not any(p.requires_grad for p in second.parameters())
    assert all(name.startswith("student.") for name in module.state_dict())
    one = batch()
    views = module.views(one)
    with torch.no_grad():
        for role, teacher in (("teacher1", first), ("teacher2", second)):
            assert views[f"{role}.logits"].equal(teacher(one["image"]))
    module.training_step(one, 0).backward()
    with pytest.raises(ValueError, match="hears teacher2, and there is neither"):
        distiller(mixed(MeanLogits(SoftTargetKL(4.0))), teachers={"teacher1": first})


def test_one_of_several_teachers_may_be_heard_through_its_labels():
    module = distiller(
        mixed(MeanLogits(SoftTargetKL(4.0))), small_cnn(0), teachers={"teacher1": small_cnn(1)}, stored=["teacher2"]
    )
    said = torch.rand(4, 3)
    assert list(module.teachers) == ["teacher1"] and module.stored == {"teacher2"}
    assert module.views(batch(**{"teacher2.logits": said}))["teacher2.logits"] is said


def test_a_teacher_that_a_step_does_not_hear_is_not_run():
    mix = RandomChoice(SoftTargetKL(4.0))
    terms = mixed(mix) | {"late": teacher_term(0.0)}
    late = Term(SoftTargetKL(4.0), 0.0, "student.logits", "teacher3.logits", schedule={"weight": Step([0, 1], [2])})
    nets = {f"teacher{n}": small_cnn(n) for n in (1, 2, 3)}
    module = distiller({**terms, "late": late}, small_cnn(0), teachers=nets)
    runs = dict.fromkeys(nets, 0)
    for role, net_ in nets.items():
        net_.register_forward_hook(lambda *_, role=role: runs.update({role: runs[role] + 1}))
    for step in range(16):
        module.objective.at(step / 4, 4)
        before = dict(runs)
        module.training_step(batch(), 0)
        asked = {role for role in runs if runs[role] > before[role]}
        assert asked == {f"teacher{mix.heard(2)[0] + 1}"} | ({"teacher3"} if step >= 8 else set())
    assert runs["teacher1"] + runs["teacher2"] == 16 and runs["teacher3"] == 8 and min(runs.values()) > 0


def test_what_the_batch_brings_of_the_teacher_is_heard_in_its_place():
    said = {"teacher.logits": torch.rand(2, 3), "teacher.conv1:pooled": torch.rand(2, 5)}
    module = distiller({"kd": teacher_term()}, stored=["teacher"], teachers=small_cnn())
    assert module.teachers.keys() == set()
    assert all(module.views(batch(2, **said))[name] is value for name, value in said.items())
    assert not distiller({"ce": label_term()}, stored=["teacher"]).stored  # no term reads them


def test_projections_are_optimised_and_checkpointed_but_are_none_of_the_student():
    term = Term(Hint(), 1.0, student="student.conv1", teacher="teacher.conv1")
    objective = Objective({"ce": label_term(), "hint": term})
    objective.bind({"student.conv1": torch.Size([2, 2, 4, 4]), "teacher.conv1": torch.Size([2, 6, 4, 4])})
    module = Distiller(small_cnn(0), objective, configure(Fit(), 1), teachers=small_cnn(1, widths=(6, 3, 4, 5)))
    optimised = {id(p) for g in module.configure_optimizers()["optimizer"].param_groups for p in g["params"]}
    projection = list(objective.parameters())
    assert projection and {id(p) for p in projection} <= optimised
    assert any(name.startswith("objective.") for name in module.state_dict())
    assert not {id(p) for p in projection} & {id(p) for p in module.student.parameters()}
    assert set(module.views(batch())) >= {"student.conv1", "teacher.conv1"}


def test_validation_takes_the_whole_split_and_keeps_no_features():
    term = Term(Hint(), 1.0, student="student.conv1", teacher="teacher.conv1")
    objective = Objective({"ce": Term(CrossEntropy(), 1, "student.logits", target="batch.target"), "hint": term})
    objective.bind({"student.conv1": torch.Size([2, 2, 4, 4]), "teacher.conv1": torch.Size([2, 2, 4, 4])})
    module = Distiller(small_cnn(0), objective, configure(Fit(), 1), teachers=small_cnn(1))
    module.eval()
    with torch.no_grad():
        for index, count in enumerate((4, 2)):
            module.validation_step(batch(count), index)
            with pytest.raises(InputError, match="was not run"):  # nothing is left to be popped
                module.student_taps.pop()
        logits = module.student(torch.cat([batch(4)["image"], batch(2)["image"]]))
    module.student_taps.pop()
    module.on_validation_epoch_end()
    targets = torch.cat([batch(4)["target"], batch(2)["target"]])
    assert module.validation["accuracy"] == (logits.argmax(1) == targets).double().mean().item()
    assert module.seen == []
