"""What the inputs of a stage are called."""

from __future__ import annotations

from kd.roles import is_teacher, labels_of, plain, teachers


def test_teachers_come_in_the_order_of_their_numbers() -> None:
    assert teachers({f"teacher{n}": "" for n in (10, 2, 1)}) == ["teacher1", "teacher2", "teacher10"]
    assert teachers({"labels": "a", "teacher": "b"}) == ["teacher"] and teachers({"model": "a", "labels1": "b"}) == []


def test_a_teacher_and_its_labels_have_one_number() -> None:
    assert labels_of("teacher") == "labels" and labels_of("teacher12") == "labels12"
    assert plain("teacher12") == "teacher" and plain("labels2") == "labels" and plain("teacher_1") == "teacher_1"


def test_what_is_a_teacher() -> None:
    assert is_teacher("teacher") and is_teacher("teacher2")
    assert not any(is_teacher(side) for side in ("student", "labels2", "teachers", "teacher0", "teacher1x"))
