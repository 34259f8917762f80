"""Losses against several teachers: each mix, its numbers, its draws and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.ensemble import ByConfidence, ByCrossEntropy, Each, Gate, MeanLogits, MeanProbabilities, RandomChoice
from kd.losses.feature import Hint
from kd.losses.logits import LogitMSE, SoftTargetKL, Standardised
from kd.losses.response import DKD

SURE, UNSURE = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)  # (0.75, 0.25) and (0.5, 0.5)
TARGET = torch.tensor([0])


def kl(first: float, student: float = 0.5) -> float:
    """KL of (first, 1 - first) from (student, 1 - student)."""
    return first * math.log(first / student) + (1 - first) * math.log((1 - first) / (1 - student))


@pytest.mark.parametrize(
    ("loss", "first"),
    [
        (MeanLogits(SoftTargetKL(1.0)), math.sqrt(3) / (1 + math.sqrt(3))),
        (MeanProbabilities(SoftTargetKL(1.0)), 0.625),
        (MeanProbabilities(SoftTargetKL(1.0), [3, 1]), 0.6875),
        (ByConfidence(SoftTargetKL(1.0)), 0.552096 * 0.75 + 0.447904 * 0.5),
        (ByCrossEntropy(SoftTargetKL(1.0)), 0.6 * 0.75 + 0.4 * 0.5),
    ],
    ids=["mean_logits", "mean_probabilities", "weights", "confidence", "cross_entropy"],
)
def test_each_mix_by_hand(loss: nn.Module, first: float) -> None:
    others = {"target": TARGET} if isinstance(loss, ByCrossEntropy) else {}
    found = loss(student=UNSURE, teacher=[SURE, UNSURE], **others)
    assert found.item() == pytest.approx(kl(first), abs=1e-5)


def test_a_mix_is_at_the_temperature_of_its_loss() -> None:
    teachers = [4 * SURE, 4 * UNSURE]  # at temperature 4 these are SURE and UNSURE
    assert MeanProbabilities(SoftTargetKL(4.0))(student=UNSURE, teacher=teachers).item() == pytest.approx(
        16 * kl(0.625), abs=1e-5
    )
    cold = MeanProbabilities(SoftTargetKL(4.0), temperature=1.0)(student=UNSURE, teacher=teachers)
    assert abs(cold.item() - 16 * kl(0.625)) > 0.01


def test_a_mix_follows_a_temperature_that_changes() -> None:
    loss = MeanProbabilities(SoftTargetKL(4.0))
    loss.loss.temperature = 1.0
    assert loss(student=UNSURE, teacher=[SURE, UNSURE]).item() == pytest.approx(kl(0.625), abs=1e-5)


def test_the_target_goes_to_a_loss_that_takes_it() -> None:
    student = torch.tensor([[0.5, 0.0]])
    found = ByCrossEntropy(DKD(temperature=1.0), temperature=1.0)(
        student=student, teacher=[SURE, UNSURE], target=TARGET
    )
    meant = DKD(temperature=1.0)(student=student, teacher=torch.tensor([[0.65, 0.35]]).log(), target=TARGET)
    assert_close(found, meant)
    nested = ByConfidence(Standardised(DKD()))(student=student, teacher=[SURE, UNSURE], target=TARGET)
    assert nested.isfinite()


def test_identical_teachers_are_one() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(8, 5, generator=generator), torch.randn(8, 5, generator=generator)
    target = torch.arange(8) % 5
    alone = SoftTargetKL(4.0)(student=student, teacher=teacher)
    each, gate = Each(SoftTargetKL(4.0)), Gate(SoftTargetKL(4.0))
    for bound in (each, gate):
        bound.bind((8, 5), [(8, 5), (8, 5)])
    for loss in (MeanLogits(SoftTargetKL(4.0)), MeanProbabilities(SoftTargetKL(4.0)), each, gate):
        assert_close(loss(student=student, teacher=[teacher, teacher]), alone)
    for weighed in (ByConfidence(SoftTargetKL(4.0)), RandomChoice(SoftTargetKL(4.0))):
        assert_close(weighed(student=student, teacher=[teacher, teacher]), alone)
    by_label = ByCrossEntropy(SoftTargetKL(4.0))(student=student, teacher=[teacher, teacher], target=target)
    assert_close(by_label, alone)


def test_a_gate_learns_which_teacher_to_trust() -> None:
    gate = Gate(SoftTargetKL(1.0))
    gate.bind((4, 2), [(4, 2), (4, 2)], (4, 2))
    # The student is one teacher on samples of one kind and the other on the rest; the feature tells them apart.
    feature = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    sure, unsure = SURE.expand(4, 2), UNSURE.expand(4, 2)
    student = torch.where(feature[:, :1] > 0, sure, unsure)
    views = {"student": student, "teacher": [sure, unsure], "feature": feature}
    before = gate(**views).item()
    optimiser = torch.optim.SGD(gate.parameters(), lr=50.0)
    for _ in range(50):
        optimiser.zero_grad()
        gate(**views).backward()
        optimiser.step()
    assert isinstance(gate.scores, nn.Linear)
    weights = gate.scores(feature).softmax(dim=1)
    assert gate(**views).item() < before / 5
    assert weights[0, 0] > 0.8 and weights[2, 1] > 0.8


def test_a_gate_pools_maps_by_their_maximum_and_leaves_the_student_alone() -> None:
    gate = Gate(SoftTargetKL(1.0))
    gate.bind((1, 2), [(1, 2), (1, 2)], (1, 1, 2, 2))
    assert isinstance(gate.scores, nn.Linear)
    with torch.no_grad():
        gate.scores.weight.copy_(torch.tensor([[math.log(3.0)], [0.0]]))
    maps = torch.tensor([[[[0.0, 1.0], [-5.0, 0.5]]]], requires_grad=True)
    found = gate(student=UNSURE, teacher=[SURE, UNSURE], feature=maps)
    assert found.item() == pytest.approx(kl(0.75 * 0.75 + 0.25 * 0.5), abs=1e-5)
    found.backward()
    assert maps.grad is None and gate.scores.weight.grad is not None


def test_a_random_choice_asks_one_teacher_and_draws_again_at_each_step() -> None:
    loss = RandomChoice(LogitMSE())
    loss.draws_from(1)
    values = []
    for step in range(40):
        loss.at(step / 10, 4)
        (index,) = loss.heard(2)
        teachers: list[Tensor | None] = [None, None]
        teachers[index] = UNSURE + index + 1
        values.append(loss(student=UNSURE, teacher=teachers).item())
        assert values[-1] == (index + 1) ** 2
    assert set(values) == {1.0, 4.0}
    again = RandomChoice(LogitMSE())  # as a resumed run would: from the middle on
    again.draws_from(1)
    for step in range(20, 40):
        again.at(step / 10, 4)
        assert again(student=UNSURE, teacher=[UNSURE + 1, UNSURE + 2]).item() == values[step]


def test_each_teacher_has_its_own_copy_of_what_is_trained() -> None:
    loss = Each(Hint())
    loss.bind((2, 3), [(2, 5), (2, 7)])
    assert len(loss.loss) == 2
    first, second = loss.loss
    assert {p.shape for p in first.parameters()} != {p.shape for p in second.parameters()}
    student, teachers = torch.randn(2, 3), [torch.randn(2, 5), torch.randn(2, 7)]
    meant = (first(student=student, teacher=teachers[0]) + second(student=student, teacher=teachers[1])) / 2
    assert_close(loss(student=student, teacher=teachers), meant)


def test_each_drops_as_many_and_keeps_one() -> None:
    loss = Each(LogitMSE(), reduce="sum", drop=1)
    loss.bind((1, 2), [(1, 2)] * 3)
    values = set()
    for step in range(30):
        loss.at(step / 10, 3)
        kept = loss.heard(3)
        assert len(kept) == 2
        teachers = [UNSURE + 10**i if i in kept else None for i in range(3)]
        found = loss(student=UNSURE, teacher=teachers).item()
        assert found == pytest.approx(sum(100.0**i for i in kept))
        values.add(found)
    assert len(values) == 3
    alone = Each(LogitMSE(), drop=5)
    alone.bind((1, 2), [(1, 2)] * 3)
    assert len(alone.heard(3)) == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: MeanProbabilities(LogitMSE(), [1, -1]), "a teacher's weight is -1"),
        (lambda: MeanProbabilities(LogitMSE(), [0, 0]), "one of them must be above 0"),
        (lambda: MeanProbabilities(LogitMSE(), 2), "give a number for each teacher"),  # type: ignore[arg-type]
        (lambda: MeanProbabilities(LogitMSE(), [1])(UNSURE, [SURE, UNSURE]), "there are 1 weights and 2 teachers"),
        (lambda: ByConfidence(LogitMSE(), temperature=0), "temperature is 0"),
        (lambda: Gate(LogitMSE())(UNSURE, [SURE]), "before it knows its shapes"),
        (lambda: Gate(LogitMSE()).bind((1, 2), [(1, 2)], (1, 2, 3)), "a gate cannot read a layer of shape (1, 2, 3)"),
        (lambda: Each(LogitMSE(), reduce="max"), "it must be 'mean' or 'sum'"),
        (lambda: Each(LogitMSE(), drop=-1), "drop is -1"),
        (lambda: Each(LogitMSE())(UNSURE, [SURE, UNSURE]), "1 losses meet 2 teachers"),
        (lambda: MeanLogits(LogitMSE())(UNSURE, [SURE, torch.zeros(1, 3)]), "3; distil between nets"),
    ],
)
def test_what_cannot_be_is_refused(call: object, said: str) -> None:
    assert callable(call)
    with pytest.raises(InputError) as refused:
        call()
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_gate_bound_to_other_teachers_is_refused() -> None:
    gate = Gate(LogitMSE())
    gate.bind((1, 2), [(1, 2), (1, 2)])
    with pytest.raises(InputError, match="2 features and 2 teachers is given 2 and 3"):
        gate(UNSURE, [SURE, UNSURE, UNSURE])
