"""From the views that terms name to the layers that losses are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd import binding
from kd.errors import InputError
from kd.losses.feature import Hint
from kd.losses.flow import FSP
from kd.losses.maps import AT
from kd.models import Outline

SMALL = Outline("Small", ("a", "b", "c"), ("a:input", "b:input", "c"), "fc", "fc:input")
LARGE = Outline("Large", ("p", "q", "r", "s", "t"), ("p", "q", "r", "s", "t"), "head", "head:input:pooled")
BOTH = {"student": SMALL, "teacher": LARGE}


def pair(student: Any, teacher: Any) -> dict[str, Any]:
    return {"student": student, "teacher": teacher}


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        (pair("student.last", "teacher.last:pooled"), pair("student.c", "teacher.t:pooled")),
        (pair("student.middle", "teacher.middle"), pair("student.b", "teacher.r")),
        (pair("student.embedding", "teacher.embedding"), pair("student.fc:input", "teacher.head:input:pooled")),
        (pair(["student.stage1"], ["teacher.stage2"]), pair(["student.a"], ["teacher.q"])),
        (pair("student.layer3", "teacher.logits"), pair("student.layer3", "teacher.logits")),
        (
            pair("student.stages", "teacher.stages"),
            pair(["student.a", "student.b", "student.c"], ["teacher.r", "teacher.s", "teacher.t"]),
        ),
        (
            pair("student.preactivations", "teacher.preactivations:pooled"),
            pair(
                ["student.a:input", "student.b:input", "student.c"],
                ["teacher.r:pooled", "teacher.s:pooled", "teacher.t:pooled"],
            ),
        ),
        (
            pair(["student.stages", "student.embedding"], ["teacher.stages", "teacher.embedding"]),
            pair(
                ["student.a", "student.b", "student.c", "student.fc:input"],
                ["teacher.r", "teacher.s", "teacher.t", "teacher.head:input:pooled"],
            ),
        ),
        # A list of paths is as long as it is; the stages of the other side go by it.
        (
            pair(["student.x", "student.y"], "teacher.stages"),
            pair(["student.x", "student.y"], ["teacher.s", "teacher.t"]),
        ),
        (pair("student.stages", ["teacher.x"]), pair(["student.c"], ["teacher.x"])),
    ],
)
def test_parts_become_layers_and_the_deepest_go_together(views: dict[str, Any], expected: dict[str, Any]) -> None:
    assert binding.resolved(views, BOTH) == expected


def test_a_loss_that_takes_any_numbers_keeps_them() -> None:
    found = binding.resolved(pair("student.stages", "teacher.stages"), BOTH, uneven=True)
    assert [len(found[role]) for role in ("student", "teacher")] == [3, 5]


def test_a_list_of_paths_is_never_shortened() -> None:
    views = pair(["student.x", "student.y"], ["teacher.x"])
    assert binding.resolved(views, BOTH) == views


def test_a_part_of_a_network_that_is_not_there_stays_for_who_knows_it() -> None:
    views = pair("student.last", "teacher.last")
    assert binding.resolved(views, {"student": SMALL}) == pair("student.c", "teacher.last")
    kept = binding.resolved(views, {"student": SMALL}, stored={"teacher.last:pooled", "teacher.logits"})
    assert kept == pair("student.c", "teacher.last:pooled")


def test_a_part_that_a_network_lacks_is_named() -> None:
    with pytest.raises(InputError, match="Small has no stage4; it has 3 stages: a, b, c"):
        binding.resolved(pair("student.stage4", "teacher.stage4"), BOTH)


def test_whether_a_side_names_parts() -> None:
    views = pair(["student.x", "student.last"], "teacher.layer3")
    assert binding.parts(views, "student") and not binding.parts(views, "teacher")


SHAPES = {
    "student.maps": (2, 8, 4, 4), "student.tokens": (2, 17, 8), "student.more": (2, 65, 8), "student.vector": (2, 8),
    "teacher.maps": (2, 8, 4, 4), "teacher.tokens": (2, 17, 8), "teacher.vector": (2, 8),
}  # fmt: skip


@pytest.mark.parametrize(
    ("reads", "student", "teacher", "expected"),
    [
        ("alike", "maps", "tokens", ("maps", "tokens:maps")),
        ("alike", "tokens", "maps", ("tokens:maps", "maps")),
        ("alike", "tokens", "tokens", ("tokens", "tokens")),
        ("alike", "more", "tokens", ("more:maps", "tokens:maps")),
        ("alike", "tokens", "vector", ("tokens", "vector")),
        ("alike", "maps", "maps", ("maps", "maps")),
        ("maps", "tokens", "tokens", ("tokens:maps", "tokens:maps")),
        ("maps", "maps", "tokens", ("maps", "tokens:maps")),
        ("maps", "vector", "vector", ("vector", "vector")),
        (None, "maps", "tokens", ("maps", "tokens")),
    ],
)
def test_tokens_are_laid_out_where_the_loss_or_the_other_side_has_maps(reads, student, teacher, expected):
    found = binding.laid(pair(f"student.{student}", f"teacher.{teacher}"), SHAPES, reads)
    assert found == pair(f"student.{expected[0]}", f"teacher.{expected[1]}")


def test_each_of_a_list_is_laid_out_for_itself() -> None:
    found = binding.laid(pair(["student.maps", "student.tokens"], ["teacher.tokens"]), SHAPES, "maps")
    assert found == pair(["student.maps", "student.tokens:maps"], ["teacher.tokens:maps"])


class Listed(nn.Module):
    """Takes a list of teacher's layers."""

    def forward(self, student: Tensor, teacher: Sequence[Tensor]) -> Tensor:
        return student.sum()


class Free(nn.Module):
    """Says nothing of what it takes."""

    def forward(self, student, teacher):  # type: ignore[no-untyped-def]
        return student


ONE, TWO = "student.a", ["student.a", "student.b"]


@pytest.mark.parametrize(
    ("loss", "views", "words"),
    [
        (
            Hint(),
            pair(TWO, "teacher.a"),
            r"'t' names 2 layers as its student \(student.a, student.b\).*takes one; name",
        ),
        (Hint(), pair(ONE, ["teacher.a"]), r"names 1 layers as its teacher \(teacher.a\).*such as teacher.last"),
        (FSP(), pair(ONE, ["teacher.a"]), r"names one layer as its student \(student.a\), and its loss takes a list"),
        (Listed(), pair(ONE, "teacher.a"), r"write \[teacher.a, …\], or teacher.stages"),
    ],
)
def test_a_list_for_one_layer_and_one_layer_for_a_list_are_refused(loss, views, words):
    with pytest.raises(InputError, match=words):
        binding.check_counts("t", loss, views)


@pytest.mark.parametrize("loss", [AT(), Free()])
def test_a_loss_that_takes_either_takes_either(loss):
    for student in (ONE, TWO):
        binding.check_counts("t", loss, pair(student, student))


def test_whatever_a_loss_raises_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^the term 'x': its loss cannot be computed \(RuntimeError: .*\)$") as caught:
        binding.tried(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3), "the term 'x'")
    assert "\n" not in str(caught.value)
    assert binding.tried(lambda: 3, "") == 3
