"""The way back from the quiz through the student's step to the teacher, against differences."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from kd.data import Split
from kd.losses.logits import CrossEntropy, SoftTargetKL
from kd.models import Normalised
from kd.objective import Objective, Term
from kd.training.circle import Circle, Member
from kd.training.loaders import EpochLoader
from kd.training.meta import Tutor

GENERATOR = torch.Generator().manual_seed(0)
BATCH = {"image": torch.rand(6, 1, 2, 2, generator=GENERATOR).double(), "target": torch.arange(6) % 3}
QUIZ = {"image": torch.rand(6, 1, 2, 2, generator=GENERATOR).double(), "target": torch.arange(6) % 3}


def net(seed: int) -> Normalised:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return Normalised(body, [0.5], [0.5]).double()


def circle(rate: float = 0.5) -> Circle:
    terms = Objective(
        {
            "ce": Term(CrossEntropy(), 0.3, student="student.logits", target="batch.target"),
            "kd": Term(SoftTargetKL(2.0), 0.7, student="student.logits", teacher="teacher.logits"),
        }
    )
    members = {"teacher": Member(net(1), None), "student": Member(net(2), terms, ("teacher",))}
    module = Circle(members, "student", lambda groups: {}, 0.1)
    module.rate = lambda: rate  # type: ignore[method-assign]
    return module.train()


def tutor() -> Tutor:
    images = torch.zeros(8, 1, 2, 2, dtype=torch.uint8)
    loader = EpochLoader(Split(torch.arange(8), torch.arange(8) % 3, images), 2, shuffle=True, seed=3)
    return Tutor(loader, lambda parameters: torch.optim.SGD(parameters, lr=0.1), lambda step: 1.0)


def test_the_teachers_gradient_is_that_of_the_students_next_loss() -> None:
    module, teach = circle(), tutor()
    weight = module.members["teacher"].net.net[4].weight
    (slope,) = torch.autograd.grad(teach.loss(module, BATCH, QUIZ), [weight])
    with torch.no_grad():
        for place in ((0, 0), (2, 3)):
            sides = []
            for step in (1e-5, -1e-5):
                weight[place] += step
                with torch.enable_grad():
                    sides.append(teach.loss(module, BATCH, QUIZ).item())
                weight[place] -= step
            torch.testing.assert_close(slope[place].item(), (sides[0] - sides[1]) / 2e-5, atol=1e-7, rtol=1e-4)
    assert slope.abs().max() > 1e-5


def test_the_quiz_loss_is_that_of_a_student_moved_by_a_plain_step() -> None:
    module, teach = circle(rate=0.25), tutor()
    found = teach.loss(module, BATCH, QUIZ)
    student = module.student
    views = module.views("student", BATCH, module.spoken(BATCH, ["student"]))
    total, _ = module.objective(views)
    slopes = torch.autograd.grad(total, list(student.parameters()))
    with torch.no_grad():
        for parameter, slope in zip(student.parameters(), slopes, strict=True):
            parameter -= 0.25 * slope
        expected = nn.functional.cross_entropy(student(QUIZ["image"]), QUIZ["target"])
    torch.testing.assert_close(found.detach(), expected)


def test_a_trial_leaves_no_statistics_and_no_gradients() -> None:
    module, teach = circle(), tutor()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    teach.loss(module, BATCH, QUIZ)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.student.parameters())


def test_the_batch_of_a_step_is_known_by_the_step_alone() -> None:
    straight, resumed = tutor(), tutor()
    rows = [straight._quiz(step)["row"].tolist() for step in range(7)]
    assert [resumed._quiz(step)["row"].tolist() for step in range(5, 7)] == rows[5:]
    assert sorted(row for batch in rows[:4] for row in batch) == list(range(8)) and rows[4] != rows[0]


def test_its_optimiser_is_in_the_checkpoint() -> None:
    module = circle()
    teach = tutor()
    teach.make = lambda parameters: torch.optim.Adam(parameters, lr=0.1)
    module.before = teach
    teach._stepper(module)
    checkpoint: dict[str, object] = {}
    module.on_save_checkpoint(checkpoint)
    other = circle()
    other.before = SimpleNamespace(load_state_dict=checkpoint.setdefault)  # type: ignore[assignment]
    assert set(checkpoint) == {"before"} and "optimiser" in checkpoint["before"]  # type: ignore[operator]
