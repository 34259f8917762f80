"""Who moves by which term, who only speaks, and what is judged after a validation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd.errors import InputError
from kd.losses.collaborative import General
from kd.losses.logits import CrossEntropy, SoftTargetKL
from kd.models import Normalised
from kd.objective import Objective, Term
from kd.training.circle import Circle, Member

BATCH = {"image": torch.rand(8, 1, 2, 2), "target": torch.arange(8) % 3}


def net(seed: int) -> Normalised:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    return Normalised(body, [0.5], [0.5])


def terms(teacher: str | list[str] = "teacher.logits", loss: nn.Module | None = None) -> Objective:
    hearing = Term(loss or SoftTargetKL(2.0), 1.0, student="student.logits", teacher=teacher)
    labels = Term(CrossEntropy(), 1.0, student="student.logits", target="batch.target")
    return Objective({"ce": labels, "kd": hearing})


def circle(alternate: bool = False, **more: object) -> Circle:
    members = {
        "teacher": Member(net(1), terms(), ["student"], **more),  # type: ignore[arg-type]
        "student": Member(net(2), terms(), ["teacher"]),
    }
    return Circle(members, "student", lambda groups: {"groups": groups}, 0.1, alternate)


def gradients(module: Circle, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """The gradient of some of the terms on both networks, flattened."""
    spoken = module.spoken(BATCH, module.members)
    total = torch.zeros(())
    for name, member in module.members.items():
        _, parts = member.objective(module.views(name, BATCH, spoken))
        total = total + sum(weights.get(f"{name}.{term}", 0.0) * part for term, part in parts.items())
    module.zero_grad()
    total.backward()
    return {
        name: torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in m.learning()])
        for name, m in module.members.items()
    }


def test_a_term_moves_its_own_network_and_no_other() -> None:
    module = circle()
    for own, other in (("student", "teacher"), ("teacher", "student")):
        found = gradients(module, {f"{own}.kd": 1.0})
        assert found[own].abs().sum() > 0 and found[other].abs().sum() == 0


def test_the_sum_gives_each_network_the_gradient_of_its_own_terms() -> None:
    module = circle()
    whole = gradients(module, {f"{n}.{t}": 1.0 for n in ("student", "teacher") for t in ("ce", "kd")})
    own = gradients(module, {"student.ce": 1.0, "student.kd": 1.0})
    torch.testing.assert_close(whole["student"], own["student"])


def test_what_is_tuned_in_part_keeps_the_statistics_of_the_rest() -> None:
    module = circle(tuned=["4"])
    module.train()
    teacher = module.members["teacher"]
    assert not teacher.net.net[2].training and teacher.net.net[4].training and module.student.net[2].training
    assert [p.shape for p in teacher.learning()] == [(3, 6), (3,)]
    before = teacher.net.net[2].running_mean.clone()
    module.spoken(BATCH, module.members)
    assert torch.equal(teacher.net.net[2].running_mean, before)


def test_who_only_speaks_leaves_no_trace() -> None:
    spoken = circle().spoken(BATCH, ["student"])
    assert spoken["student"]["logits"].requires_grad and not spoken["teacher"]["logits"].requires_grad


def test_each_network_has_a_group_with_its_own_rate() -> None:
    groups = circle(rate=0.5).configure_optimizers()["groups"]
    assert [group["lr"] for group in groups] == [0.05, 0.1]


def test_after_a_validation_the_members_are_judged() -> None:
    def general(names: list[str]) -> Objective:
        made = terms([f"teacher{i}.logits" for i, _ in enumerate(names, 1)], General(SoftTargetKL(1.0)))
        made.bind({f"teacher{i}.logits": torch.Size((2, 3)) for i, _ in enumerate(names, 1)} | {
            "student.logits": torch.Size((2, 3))})  # fmt: skip
        return made

    names = ["student", "peer1"]
    members = {name: Member(net(seed), general(names), names) for seed, name in enumerate(names)}
    module = Circle(members, "student", lambda groups: {}, 0.1)
    (_, loss), _ = module.judges
    before = loss.weights.clone()
    module.eval()
    with torch.no_grad():
        module.validation_step(BATCH, 0)
        module.on_validation_epoch_end()
    assert not torch.equal(loss.weights, before) and loss.weights.sum() == pytest.approx(1)
    assert 0 <= module.validation["accuracy"] <= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hears": ["studnet"]}, "teacher hears 'studnet', who is not in the circle; did you mean 'student'"),
        ({"tuned": ["9"]}, "'9' is no layer of the teacher to tune"),
        ({"tuned": ["0"]}, "hold nothing that learns"),
    ],
)
def test_a_circle_that_cannot_be_is_refused(change: dict[str, object], said: str) -> None:
    given = {"net": net(1), "objective": terms(), "hears": ["student"], **change}
    members = {"teacher": Member(**given), "student": Member(net(2), terms(), ["teacher"])}  # type: ignore[arg-type]
    with pytest.raises(InputError) as refused:
        Circle(members, "student", lambda groups: {}, 0.1)
    assert said in str(refused.value)
