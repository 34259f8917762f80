"""Numbers that change over training, in a config and in the terms that use them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd.config import jobs
from kd.errors import InputError
from kd.losses.ensemble import Each, MeanProbabilities
from kd.losses.logits import CrossEntropy, SoftTargetKL, Standardised
from kd.losses.response import DKD
from kd.objective import Objective, Term
from kd.pipeline.plan import plan
from kd.schedules import Cosine, Linear, Schedule, Step, complemented, is_schedule, parted, schedule_of, weighs
from kd.stages import Room
from kd.stages.building import build_objective
from kd.training.settings import Run

LINEAR = {"_target_": "kd.schedules.Linear", "start": 0.0, "end": 0.9, "last": 5}
LOGITS = {"student": "student.logits", "teacher": "teacher.logits"}


def test_a_schedule_that_does_not_say_where_it_ends_is_not_made() -> None:
    class Half(Schedule):
        def at(self, epoch: float, epochs: int) -> float:
            return 1.0

        def __str__(self) -> str:
            return "half"

    with pytest.raises(TypeError, match=r"abstract method '?ends"):
        Half()  # type: ignore[abstract]


@pytest.mark.parametrize("kind", [Linear, Cosine])
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.9), (0.9, 0.0), (8, 1), (1 / 3, 2 / 3)])
def test_a_schedule_is_exact_at_its_ends_and_between_them_elsewhere(kind: Any, start: float, end: float) -> None:
    schedule = kind(start, end, first=2, last=6)
    assert [schedule.at(epoch, 10) for epoch in (0, 1.5, 2)] == [start] * 3
    assert [schedule.at(epoch, 10) for epoch in (6, 7.25, 10)] == [end] * 3
    values = [schedule.at(2 + step / 10, 10) for step in range(41)]
    assert values == sorted(values, reverse=end < start)
    assert schedule.at(4, 10) == pytest.approx((start + end) / 2)
    assert kind(start, end).at(10, 10) == end and kind(start, end).at(0, 10) == start


def test_a_cosine_by_hand() -> None:
    assert Cosine(1, 0).at(1, 3) == pytest.approx((1 + math.cos(math.pi / 3)) / 2) == pytest.approx(0.75)


def test_a_schedule_that_begins_after_the_training_stays_at_its_start() -> None:
    assert [Linear(1, 0, first=20).at(epoch, 10) for epoch in (0, 5, 10)] == [1, 1, 1]


def test_steps_change_when_so_many_epochs_are_done() -> None:
    schedule = Step([0.9, 0.5, 0], [2, 4])
    assert [schedule.at(epoch, 9) for epoch in (0, 1.99, 2.0, 3.99, 4.0, 8.5)] == [0.9, 0.9, 0.5, 0.5, 0.0, 0.0]
    assert Step([3], []).at(7, 9) == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Linear("a", 1), "start is 'a'"),
        (lambda: Linear(0, math.inf), "end is inf"),
        (lambda: Cosine(0, 1, first=4, last=4), "`last` must come after `first`"),
        (lambda: Linear(0, 1, first=-1), "0 or more"),
        (lambda: Step([1, 0], []), "one value more than epochs"),
        (lambda: Step([2, 1, 0], [5, 5]), "rising epochs"),
        (lambda: Step(1, [2]), "give a list"),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(make: Any, said: str) -> None:
    with pytest.raises(InputError) as refused:
        make()
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_complement_of_a_schedule_adds_up_to_one_with_it() -> None:
    for node in (LINEAR, {"_target_": "kd.schedules.Step", "values": [0.9, 0.3, 0], "epochs": [2, 3]}):
        one, other = schedule_of(node), schedule_of(complemented(node))
        assert [one.at(e / 4, 6) + other.at(e / 4, 6) for e in range(25)] == pytest.approx([1.0] * 25)
    assert complemented(LINEAR) == {**LINEAR, "start": 1.0, "end": 0.1}


def test_a_config_is_parted_from_its_schedules() -> None:
    term = {"weight": LINEAR, "loss": {"loss": {"temperature": {**LINEAR, "start": 8}}, "layers": [1]}}
    plain, found = parted(term)
    assert plain == {"weight": 0.0, "loss": {"loss": {"temperature": 8.0}, "layers": [1]}}
    assert sorted(found) == ["loss.loss.temperature", "weight"]
    assert parted({"weight": 0.5}) == ({"weight": 0.5}, {})
    assert is_schedule(LINEAR) and not is_schedule({"_target_": "kd.losses.logits.CrossEntropy"})


def test_a_weight_that_is_never_more_than_nothing_weighs_nothing() -> None:
    assert not weighs({**LINEAR, "end": 0}) and weighs(LINEAR) and weighs(0.1) and not weighs(0)


class Counted(nn.Module):
    """A loss that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return student.sum()


def two(schedule: Schedule) -> tuple[Objective, Counted]:
    loss = Counted()
    terms = {
        "ce": Term(CrossEntropy(), 1, student="student.logits", target="batch.target"),
        "kd": Term(loss, 0, **LOGITS, schedule={"weight": schedule}),  # type: ignore[arg-type]
    }
    return Objective(terms), loss


VIEWS = {"student.logits": torch.ones(2, 3), "teacher.logits": torch.eye(3)[:2], "batch.target": torch.tensor([0, 1])}


def test_a_term_is_not_computed_and_its_teacher_not_asked_while_it_weighs_nothing() -> None:
    objective, loss = two(Step([0, 0.5, 0], [1, 2]))
    assert objective.needs_teacher
    for epoch, weight in ((0, 0), (0.5, 0), (1, 0.5), (1.5, 0.5), (2, 0)):
        objective.at(epoch, 3)
        views = VIEWS if weight else {name: view for name, view in VIEWS.items() if name != "teacher.logits"}
        before = loss.asked
        total, parts = objective(views)
        assert total.item() == pytest.approx(math.log(3) + weight * 6)
        assert set(parts) == ({"ce", "kd"} if weight else {"ce"})
        assert loss.asked - before == (weight > 0)
        assert ("teacher.logits" in objective.asks) == (weight > 0)


def test_where_no_term_weighs_anything_the_step_moves_nothing() -> None:
    objective = Objective({"kd": Term(SoftTargetKL(4.0), 0, **LOGITS, schedule={"weight": Linear(0, 1)})})  # type: ignore[arg-type]
    objective.at(0, 4)
    student = VIEWS["student.logits"].clone().requires_grad_()
    total, _ = objective({**VIEWS, "student.logits": student})
    total.backward()
    assert total.item() == 0 and student.grad is not None and not student.grad.any()


@pytest.mark.parametrize(
    ("loss", "path", "inner"),
    [
        (SoftTargetKL(4.0), "loss.temperature", lambda loss: loss),
        (Standardised(SoftTargetKL(4.0)), "loss.loss.temperature", lambda loss: loss.loss),
        (MeanProbabilities(SoftTargetKL(4.0)), "loss.loss.temperature", lambda loss: loss.loss),
        (DKD(), "loss.beta", lambda loss: loss),
    ],
    ids=["kd", "lskd", "mean_probabilities", "dkd"],
)
def test_any_number_of_a_loss_can_be_scheduled(loss: nn.Module, path: str, inner: Any) -> None:
    schedule = {path: Linear(8, 2)}
    target = {"target": "batch.target"} if isinstance(loss, DKD) else {}
    objective = Objective({"kd": Term(loss, 1, **LOGITS, **target, schedule=schedule)})  # type: ignore[arg-type]
    values = []
    for epoch in (0, 2, 4):
        objective.at(epoch, 4)
        values.append(objective(VIEWS)[0].item())
    assert getattr(inner(loss), path.rpartition(".")[2]) == 2.0
    assert len(set(values)) == 3


def test_the_copies_for_several_teachers_all_follow() -> None:
    loss = Each(SoftTargetKL(4.0))
    views = {"student": "student.logits", "teacher": ["teacher1.logits", "teacher2.logits"]}
    objective = Objective({"kd": Term(loss, 1, **views, schedule={"loss.loss.temperature": Linear(8, 2)})})  # type: ignore[arg-type]
    objective.bind({name: torch.Size((2, 3)) for name in ("student.logits", *views["teacher"])})
    objective.at(2, 4)
    assert [one.temperature for one in loss.loss] == [5.0, 5.0]  # type: ignore[union-attr]


def test_what_is_no_number_of_a_loss_cannot_be_scheduled() -> None:
    for path in ("loss.tau", "loss.loss.temperature", "loss.forward"):
        with pytest.raises(InputError, match="cannot be scheduled"):
            Term(SoftTargetKL(4.0), 1, **LOGITS, schedule={path: Linear(1, 2)})  # type: ignore[arg-type]


def built(*words: str) -> Objective:
    return build_objective(jobs(list(words))[0][0].config["loss"], Room(Run(), Path()))


def test_a_schedule_stands_where_the_number_would() -> None:
    objective = built(
        "loss.kd.weight={_target_:kd.schedules.Linear,start:0,end:0.9,last:5}",
        "loss.kd.loss.temperature={_target_:kd.schedules.Cosine,start:8,end:2}",
    )
    objective.at(2.5, 10)
    assert objective.weights == {"ce": 0.1, "kd": 0.45}
    assert objective.losses["kd"].temperature == pytest.approx(Cosine(8, 2).at(2.5, 10))


def test_the_dials_can_be_schedules_and_alpha_keeps_its_complement() -> None:
    objective = built(
        "alpha={_target_:kd.schedules.Step,values:[0.9,0],epochs:[3]}",
        "temperature={_target_:kd.schedules.Linear,start:4,end:1}",
    )
    objective.at(0, 4)
    assert objective.weights == {"ce": 0.1, "kd": 0.9} and objective.losses["kd"].temperature == 4
    objective.at(3, 4)
    assert objective.weights == {"ce": 1.0, "kd": 0.0} and objective.losses["kd"].temperature == 1.75
    assert objective.now == ["ce"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("alpha={_target_:kd.schedules.Linear,start:0.9,end:1.5}", "alpha=1.5 is out of range"),
        ("temperature={_target_:kd.schedules.Linear,start:4,end:0}", "temperature=0.0 is out of range"),
        ("temperature={_target_:kd.schedules.Linear,begin:4,end:1}", "temperature.begin is not a field"),
        ("temperature={_target_:kd.schedules.Linaer,start:4,end:1}", "did you mean 'Linear'"),
        ("loss.kd.loss.temperature={_target_:kd.schedules.Linear,start:4,end:0}", "temperature is 0"),
        ("loss.kd.weight={_target_:kd.schedules.Linear,start:1,end:-1}", "a term weighs -1"),
    ],
)
def test_a_schedule_beyond_the_range_of_its_number_is_refused(word: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        built(word)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_key_names_the_schedule_and_the_dial_tells_it_in_words(tmp_path: Path) -> None:
    def planned(*words: str) -> Any:
        (job,), _ = jobs([f"run.store={tmp_path}", *words])
        return plan(job.config, job.overrides)

    plain, scheduled = planned(), planned("temperature={_target_:kd.schedules.Linear,start:4,end:1}")
    assert plain.nodes[:-1] == scheduled.nodes[:-1] and plain.key != scheduled.key
    assert scheduled.dials["temperature"] == "4 to 1 (linear)" and plain.dials["temperature"] == 4
    steps = planned("alpha={_target_:kd.schedules.Step,values:[0.9,0],epochs:[3]}")
    assert steps.nodes[-1].config["objective"]["ce"]["weight"]["values"] == [0.1, 1.0]
    assert steps.dials["alpha"] == "0.9, 0 (steps)"
