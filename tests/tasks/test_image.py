"""Metrics of a split, worked by hand on three classes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor, tensor
from torch.testing import assert_close

from kd.errors import InputError, KDError
from kd.tasks.image import agreement, evaluate

TARGETS = tensor([0, 0, 0, 1, 1, 2])
PREDICTED = [0, 0, 1, 1, 0, 1]  # class 2 is never predicted


def logits_of(predicted: list[int], classes: int, margin: float = 2.0) -> Tensor:
    return margin * torch.nn.functional.one_hot(tensor(predicted), classes).float()


def with_confidence(confidence: list[float], predicted: list[int]) -> Tensor:
    """Logits of two classes whose top class has just this probability."""
    top = tensor(confidence, dtype=torch.float64)
    return torch.where(
        tensor(predicted)[:, None] == torch.arange(2), top[:, None].log(), (1 - top)[:, None].clamp(min=1e-300).log()
    )


def test_precision_recall_and_f1_are_those_worked_by_hand() -> None:
    # Class 0: 3 predicted, 2 right, of 3. Class 1: 3 predicted, 1 right, of 2. Class 2: none predicted, of 1.
    found = evaluate(logits_of(PREDICTED, 3), TARGETS)
    assert found["precision_per_class"] == pytest.approx([2 / 3, 1 / 3, 0])
    assert found["recall_per_class"] == pytest.approx([2 / 3, 1 / 2, 0])
    assert found["f1_per_class"] == pytest.approx([2 / 3, 2 / 5, 0])
    assert found["accuracy"] == 3 / 6
    assert found["precision"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert found["recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)


def test_a_class_that_occurs_nowhere_is_not_in_the_mean() -> None:
    with_spare, without = evaluate(logits_of(PREDICTED, 4), TARGETS), evaluate(logits_of(PREDICTED, 3), TARGETS)
    assert [with_spare[k] for k in ("precision", "recall", "f1")] == [without[k] for k in ("precision", "recall", "f1")]
    assert with_spare["f1_per_class"] == [*without["f1_per_class"], 0.0]


def test_they_are_scikit_learns() -> None:
    logits = torch.sin(1.7 * torch.arange(400.0)).reshape(50, 8)
    targets = (torch.arange(50) * 7) % 8
    found, predicted = evaluate(logits, targets), logits.argmax(1)
    for name, score in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        assert found[name] == pytest.approx(score(targets, predicted, average="macro", zero_division=0))
        per_class = score(targets, predicted, average=None, labels=range(8), zero_division=0)
        assert found[f"{name}_per_class"] == pytest.approx(per_class.tolist())
    assert found["accuracy"] == sk.accuracy_score(targets, predicted)
    assert found["accuracy_top5"] == pytest.approx(sk.top_k_accuracy_score(targets, logits, k=5))


def test_fractions_are_exact_to_the_last_digit() -> None:
    targets = torch.arange(10_000) % 10
    predicted = torch.where(torch.arange(10_000) < 200, (targets + 1) % 10, targets)
    assert evaluate(logits_of(predicted.tolist(), 10), targets)["accuracy"] == 0.98  # float32 has 0.98000001907


def test_the_top_five_are_all_there_are_of_fewer_classes() -> None:
    assert evaluate(logits_of(PREDICTED, 3), TARGETS)["accuracy_top5"] == 1.0
    ranked = torch.arange(7.0).flip(0).repeat(7, 1)  # class 0 first, class 6 last
    assert evaluate(ranked, torch.arange(7))["accuracy_top5"] == 5 / 7


def test_the_loss_is_the_mean_cross_entropy() -> None:
    # Probabilities (¾, ¼): -ln ¾ and -ln ¼.
    logits = tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    assert evaluate(logits, tensor([0, 1]))["loss"] == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_the_calibration_error_is_that_worked_by_hand() -> None:
    # Fifteenths: 0.62 and 0.65 share a bin (9/15 to 10/15), 0.9 has one (13/15 to 14/15).
    # First: two rows, one right, mean confidence 0.635: gap 0.135. Second: two rows, both right: gap 0.1.
    logits = with_confidence([0.62, 0.65, 0.9, 0.9], predicted=[0, 0, 1, 1])
    found = evaluate(logits, tensor([0, 1, 1, 1]))
    assert found["ece"] == pytest.approx(0.5 * 0.135 + 0.5 * 0.1, abs=1e-6)


def test_certainty_shares_the_last_bin() -> None:
    # 1.0 and wrong, 0.95 and right: accuracy 0.5 at mean confidence 0.975, and not two bins with gaps 1 and 0.05.
    found = evaluate(with_confidence([1.0, 0.95], predicted=[0, 0]), tensor([1, 0]))
    assert found["ece"] == pytest.approx(0.475, abs=1e-6)


def test_a_perfect_net_is_perfect() -> None:
    found = evaluate(logits_of(TARGETS.tolist(), 3, margin=100.0), TARGETS)
    assert [found[k] for k in ("accuracy", "accuracy_top5", "precision", "recall", "f1")] == [1.0] * 5
    assert found["loss"] == pytest.approx(0, abs=1e-12) and found["ece"] == pytest.approx(0, abs=1e-6)


def test_agreement_is_there_only_with_a_teacher() -> None:
    logits = logits_of(PREDICTED, 3)
    assert "agreement" not in evaluate(logits, TARGETS)
    assert evaluate(logits, TARGETS, logits_of([0, 0, 1, 2, 2, 2], 3))["agreement"] == 0.5
    assert evaluate(logits, TARGETS, logits)["agreement"] == 1.0
    assert agreement(logits, 5 * logits + 3) == 1.0


def test_all_is_plain_data_and_the_inputs_stay() -> None:
    logits = logits_of(PREDICTED, 3).requires_grad_()
    found = evaluate(logits, TARGETS, logits)
    assert json.loads(json.dumps(found)) == found
    assert_close(logits.detach(), logits_of(PREDICTED, 3))
    assert set(found) == {
        *("accuracy", "accuracy_top5", "agreement", "ece", "loss"),
        *("precision", "recall", "f1", "precision_per_class", "recall_per_class", "f1_per_class"),
    }


def test_half_precision_logits_are_judged_too() -> None:
    assert evaluate(logits_of(PREDICTED, 3).bfloat16(), TARGETS)["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("logits", "targets", "words"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "cannot be judged"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), "cannot be judged"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long), "cannot be judged"),
        (torch.zeros(2, 3), tensor([0, 3]), "from 0 to 3, but the net knows 3 classes"),
        (torch.zeros(2, 3), tensor([-1, 0]), "from -1 to 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(logits: Tensor, targets: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        evaluate(logits, targets)
    assert "\n" not in str(caught.value)


def test_a_teacher_of_another_split_is_refused() -> None:
    with pytest.raises(InputError, match="the same split"):
        evaluate(torch.zeros(2, 3), tensor([0, 1]), torch.zeros(3, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_net_that_diverged_is_said_to_have(value: float) -> None:
    with pytest.raises(KDError, match="diverged"):
        evaluate(tensor([[0.0, value]]), tensor([0]))
