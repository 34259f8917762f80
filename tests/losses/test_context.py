"""CID by hand: its three parts, the contexts of the epoch before, and what a checkpoint keeps of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses.context import CID, relative_error, within_classes

SHAPES: tuple[Any, ...] = ((4, 2), [(4, 3), (4, 2)], (4, 2))


def bound(**fields: float) -> CID:
    torch.manual_seed(0)
    loss = CID(**fields)
    loss.bind(*SHAPES)
    return loss


def views(features: Sequence[Sequence[float]], labels: Sequence[int], own: Tensor, teacher: Tensor) -> dict[str, Any]:
    rows = torch.tensor(features)
    return {
        "student": rows,
        "teacher": [torch.ones(len(rows), 3), teacher],
        "target": torch.tensor(labels),
        "feature": own,
    }


def test_errors_are_relative_to_the_teachers_length() -> None:
    student, teacher = torch.tensor([[1.0, 1.0], [0.0, 3.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert relative_error(student, teacher).item() == pytest.approx((13 / 25 + 4 / 1) / 2)
    assert relative_error(10 * student, 10 * teacher).item() == pytest.approx((13 / 25 + 4 / 1) / 2)


def test_cosines_are_compared_within_classes_alone() -> None:
    angle = torch.tensor([0.0, math.pi / 3, math.pi / 2, 0.1, 0.7])
    student = torch.stack([angle.cos(), angle.sin()], dim=1) * torch.arange(1, 6)[:, None]
    teacher = torch.tensor([[1.0], [1.0], [-1.0], [1.0], [1.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    # Class 0: cos 60 degrees = 1/2 against 1 in two of four pairs; class 1: cos(pi/2 - 0.1) against -1.
    first = 2 * 0.25 / 4
    second = 2 * (math.cos(math.pi / 2 - 0.1) + 1) ** 2 / 4
    assert within_classes(student, teacher, labels).item() == pytest.approx((first + second) / 2)
    assert within_classes(student, teacher, torch.arange(5)).item() == 0


def test_the_second_classifier_is_told_the_contexts_of_the_epoch_before() -> None:
    loss = bound(sample=0.0, classes=0.0, context=2.0, temperature=2.0, warmup=0.0)
    own = torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [2 * math.log(3.0), 0.0], [0.0, 0.0]])
    batch = views([[1.0, 0.0], [5.0, 2.0], [0.0, 3.0]], [0, 0, 1], own, teacher)
    loss.at(0.5, 4)
    assert loss(**batch).item() == 0  # nothing was counted before
    loss.at(1.0, 4)
    found = loss(**batch)
    # Class 0: the teacher gives its label 1/2 and 3/4; class 1 has one sample.
    contexts = torch.tensor([[(0.5 * 1 + 0.75 * 5) / 1.25, 0.75 * 2 / 1.25], [0.0, 3.0]])
    torch.testing.assert_close(loss.contexts, contexts)
    inputs = torch.cat([batch["student"], (own / 2).softmax(dim=1) @ contexts], dim=1)
    assert isinstance(loss.classifier, nn.Linear)
    meant = 2 * nn.functional.cross_entropy(loss.classifier(inputs), batch["target"])
    torch.testing.assert_close(found, meant)


def test_a_class_that_an_epoch_did_not_show_keeps_its_context() -> None:
    loss = bound(warmup=0.0)
    logits = torch.zeros(2, 2)
    loss.at(0.0, 3)
    loss(**views([[1.0, 0.0], [0.0, 1.0]], [0, 1], logits, logits))
    loss.at(1.0, 3)
    loss(**views([[3.0, 3.0], [5.0, 5.0]], [0, 0], logits, logits))
    loss.at(2.0, 3)
    loss(**views([[3.0, 3.0], [5.0, 5.0]], [0, 0], logits, logits))
    torch.testing.assert_close(loss.contexts, torch.tensor([[4.0, 4.0], [0.0, 1.0]]))


def test_contexts_wait_for_the_warm_up() -> None:
    loss = bound(warmup=0.5)
    used = []
    for epoch in range(6):
        loss.at(float(epoch), 6)
        used.append(loss._contexts(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0])) is not None)
    assert used == [False] * 3 + [True] * 3


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    batches = [views([[1.0 + i, 0.0], [0.0, 2.0 * i]], [0, 1], logits, logits) for i in range(8)]
    straight, values, kept = bound(warmup=0.0), [], {}
    for step, batch in enumerate(batches):
        straight.at(step / 3, 4)
        values.append(straight(**batch).item())
        if step == 4:
            kept = copy.deepcopy(straight.state_dict())
    resumed = bound(warmup=0.0)
    resumed.load_state_dict(kept)
    for step in range(5, 8):
        resumed.at(step / 3, 4)
        assert resumed(**batches[step]).item() == values[step]


def test_judging_counts_nothing() -> None:
    loss = bound().eval()
    loss(**views([[1.0, 0.0], [0.0, 1.0]], [0, 1], torch.zeros(2, 2), torch.zeros(2, 2)))
    assert loss.sure is not None and not loss.sure.any()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: CID(warmup=2), "warmup is 2"),
        (lambda: CID(sample=-1), "sample is -1"),
        (lambda: CID().bind((4, 2), (4, 3), (4, 2)), "cid is given 1 view of the teacher"),
        (lambda: CID()(**views([[1.0, 0.0]], [0], torch.zeros(1, 2), torch.zeros(1, 2))), "before it knows its shapes"),
        (lambda: bound()(**views([[1.0]], [0], torch.zeros(1, 2), torch.zeros(1, 2))), "bound to 2 features"),
        (lambda: relative_error(torch.zeros(1, 2), torch.zeros(1, 3)), "have no distance"),
        (lambda: within_classes(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(1)), "2 class indices were meant"),
    ],
)
def test_what_cannot_be_is_refused(call: object, said: str) -> None:
    assert callable(call)
    with pytest.raises(InputError) as refused:
        call()
    assert said in str(refused.value) and "\n" not in str(refused.value)
