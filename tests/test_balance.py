"""Weights that are learned: what they add, which way they go, and that they are kept with the training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kd.balance import Uncertainty
from kd.errors import InputError
from kd.losses.logits import CrossEntropy, SoftTargetKL
from kd.objective import Objective, Term
from kd.pipeline.execute import execute
from kd.pipeline.jobs import call
from kd.schedules import Step
from kd.store import Store
from tests.pipeline.small import kill_at, made, planned
from tests.stages.folder import bits

LEARNED = ("student.name=seed_cnn_small", "objective.weights=uncertainty")
LABEL, KL = math.log(2), 3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4) + math.log(2)


def views() -> dict[str, Tensor]:
    """A student at (0, 0), a teacher at 3 to 1, the label 0: the cross-entropy is ln 2, the KL ln 2 - H(1/4)."""
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    return {
        "student.logits": torch.zeros(1, 2, requires_grad=True),
        "teacher.logits": teacher,
        "batch.target": torch.tensor([0]),
    }


def objective(ce: float | None = None, kd: float | None = None, **more: object) -> Objective:
    label = Term(CrossEntropy(), 0.5, student="student.logits", target="batch.target", log_variance=ce)
    heard = Term(SoftTargetKL(1.0), 2.0, "student.logits", "teacher.logits", log_variance=kd, **more)  # type: ignore[arg-type]
    return Objective({"ce": label, "kd": heard})


def test_by_hand() -> None:
    # 0.5 ln 2 / 4 + ln 4, and 2 KL * 2 - ln 2.
    total, parts = objective(ce=math.log(4), kd=-math.log(2))(views())
    assert_close(total, torch.tensor(0.125 * LABEL + math.log(4) + 4 * KL - math.log(2)))
    assert total.item() == pytest.approx(1.3030, abs=1e-4)
    assert_close(parts["ce"], torch.tensor(LABEL))  # as it is, for records


def test_it_begins_with_the_sum_of_the_terms_as_they_weigh() -> None:
    assert objective(0.0, 0.0)(views())[0].equal(objective()(views())[0])
    assert list(objective().balance.state_dict()) == []


def test_the_gradients() -> None:
    given, made_ = views(), objective(ce=math.log(4), kd=-math.log(2))
    made_(given)[0].backward()
    slopes = {name: value.grad.item() for name, value in made_.balance.log_variances.items()}
    # 1 - exp(-s) w L
    assert slopes == pytest.approx({"ce": 1 - 0.125 * LABEL, "kd": 1 - 4 * KL}, abs=1e-6)
    # exp(-s) w (p - goal) for each term
    assert_close(given["student.logits"].grad, torch.tensor([[0.125 * -0.5 + 4 * -0.25, 0.125 * 0.5 + 4 * 0.25]]))
    assert made_.pulls == pytest.approx({"ce": 0.125, "kd": 4.0})


def test_it_comes_to_rest_where_each_term_weighs_as_much() -> None:
    made_ = objective(0.0, 0.0)
    optimiser = torch.optim.SGD(made_.balance.parameters(), lr=0.2)
    for _ in range(300):
        optimiser.zero_grad()
        made_(views())[0].backward()
        optimiser.step()
    losses = {"ce": LABEL, "kd": KL}
    for name, pull in made_.pulls.items():
        assert pull * losses[name] == pytest.approx(1, abs=1e-4)


def test_while_a_term_weighs_nothing_its_log_variance_rests() -> None:
    made_ = objective(0.0, 0.0, schedule={"weight": Step([0.0, 2.0], [1])})
    made_.at(0, 2)
    made_(views())[0].backward()
    assert made_.balance.log_variances["kd"].grad is None and made_.pulls["kd"] == 0
    made_.at(1, 2)
    made_(views())[0].backward()
    assert made_.balance.log_variances["kd"].grad is not None


@pytest.mark.parametrize("value", [float("nan"), math.inf, "0", True])
def test_a_start_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"the term 'kd' starts at log_variance=.*; a finite number was meant"):
        Uncertainty({"kd": value})  # type: ignore[dict-item]


def test_no_key_moves_without_it_and_the_teacher_stays_with_it(tmp_path) -> None:
    plain, learned = planned(tmp_path, LEARNED[0])[0], planned(tmp_path, *LEARNED)[0]
    assert plain.nodes[-1].config["objective"]["kd"].keys() == {
        "_target_", "weight", "student", "teacher", "loss"}  # fmt: skip
    assert plain.nodes[0].key == learned.nodes[0].key and plain.key != learned.key
    assert {term["log_variance"] for term in learned.nodes[-1].config["objective"].values()} == {0.0}
    deaf = planned(tmp_path, *LEARNED, "alpha=0")[0].nodes[-1].config["objective"]
    assert "log_variance" not in deaf["kd"] and deaf["ce"]["log_variance"] == 0.0


@pytest.mark.parametrize(
    "words",
    [("loss=[ce,kd,hint]",), ("pipeline=mutual",), ("pipeline=meta", "circle.quiz=0.25"), ("pipeline=one",)],
    ids=["distil", "mutual", "meta", "one"],
)
def test_each_pipeline_learns_them_and_says_so(words, tmp_path_factory) -> None:
    store = tmp_path_factory.getbasetemp() / "balance"
    card = made(store, *LEARNED, *words)[1]
    terms = card["document"]["config"]["objective"]
    epochs = card["trace"]["epochs"]
    for name in terms:
        learnt = [epoch[f"log_variance/{name}"] for epoch in epochs]
        assert learnt[0] != 0 and learnt[0] != learnt[1]


def test_killed_and_resumed_the_bits_are_the_same(tmp_path) -> None:
    words = (*LEARNED, "run.checkpoint_seconds=0")
    straight = made(tmp_path / "a", *words)[1]
    made(tmp_path / "b", "pipeline=distil", "fit.epochs=1")  # the teacher, so that the kill hits the student
    one, run = planned(tmp_path / "b", *words)
    assert "SIGKILL" in call(kill_at, "step", 5, one, run)["error"]
    execute(one, Store(tmp_path / "b"), run)
    card = Store(tmp_path / "b").get(one.key).card
    assert card["resumed"] and bits(card) == bits(straight)
    assert card["trace"]["epochs"] == straight["trace"]["epochs"]  # log-variances among them
