"""Limits as they are typed, and the most accurate model within them."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from kd.errors import InputError
from kd.report.budget import Limit, Weighed, closest, limit, told, weigh
from kd.report.rows import CHOICE, collect, number
from tests.report.cards import STUDENT, card, compression, family, lookup, step


def weighed(made: list[dict[str, Any]], **asked: str) -> tuple[Weighed, list[Limit]]:
    limits = [limit(f"--max-{name}", text) for name, text in asked.items()]
    known = lookup(made)
    return weigh(collect(made, known), known, limits), limits


@pytest.mark.parametrize(
    ("option", "text", "amount", "share"),
    [
        ("--max-bytes", "200000", 200000, False),
        ("--max-bytes", "200k", 200000, False),
        ("--max-bytes", "1.5MB", 1500000, False),
        ("--max-bytes", "64Ki", 65536, False),
        ("--max-bytes", "0.1x", 0.1, True),
        ("--max-macs", "2G", 2e9, False),
        ("--max-ms", "0.25", 0.25, False),
        ("--max-ms", ".5x", 0.5, True),
        ("--max-drop", "0.5", 0.005, False),
        ("--max-drop", "-1", -0.01, False),
    ],
)
def test_limits(option: str, text: str, amount: float, share: bool) -> None:
    found = limit(option, text)
    assert (found.amount, found.share, found.text) == (pytest.approx(amount), share, text)


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("--max-bytes", "200z", "--max-bytes '200z': give 200k, 1.5M, 200000, or 0.1x of the teacher's"),
        ("--max-bytes", "", "--max-bytes '': give"),
        ("--max-macs", "-5M", "--max-macs '-5M': give"),
        ("--max-ms", "5M", "--max-ms '5M': give 0.5, or 0.1x of the teacher's"),
        ("--max-drop", "half", "--max-drop 'half' is no number of points"),
    ],
)
def test_what_is_no_limit_is_one_line(option: str, text: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        limit(option, text)
    assert str(refused.value).startswith(said)


def test_the_most_accurate_within_the_limits_is_first_with_the_hash_of_its_median_seed() -> None:
    made = compression()
    found, _ = weighed(made, bytes="20k", drop="3")
    first = found.fitting[0]
    assert (first["role"], first["config.prune.amount"], first["n"]) == ("recovered", 0.3, 3)
    assert [row["role"] for row in found.fitting] == ["recovered", "exported", "recovered", "exported"]
    seeds = [c for c in made if c["stage"] == "prune_recover" and c["cost"]["bytes"] >= 17000]
    values = {c["key"]: c["metrics"][CHOICE] for c in seeds}
    assert values[first["key"]] == sorted(values.values())[1]
    assert number(first[CHOICE]) == pytest.approx(fmean(values.values()))
    assert number(first["drop"]) == pytest.approx(0.992 - fmean(values.values()))
    reasons = {(row["role"], row.get("config.prune.amount")): row["why"] for row in found.others}
    assert reasons["teacher", None] == "375,000 bytes: 355,000 over"
    assert reasons["pruned", 0.3] == "19.30 points lost: 16.30 over"
    shown = told(found)
    assert shown[0]["why"] == "chosen" and shown[1]["why"] == "fits; 0.10 points less"
    assert [row["why"] for row in shown[4:]] == [row["why"] for row in found.others]


def test_the_choice_is_by_validation_not_by_test() -> None:
    made = compression(seeds=(0,))
    student = next(c for c in made if c["document"]["stage"].endswith("Distil"))
    student["metrics"]["test/accuracy"] = 0.999
    found, _ = weighed(made, bytes="30k")
    assert found.by == CHOICE and found.fitting[0]["role"] == "recovered"
    for one in made:
        one["metrics"].pop(CHOICE, None)
    found, _ = weighed(made, bytes="30k")
    assert found.by == "test/accuracy" and found.fitting[0]["key"] == student["key"]


def test_a_share_is_of_the_teacher_and_of_a_file_of_the_teachers_file() -> None:
    found, _ = weighed(compression(seeds=(0,)), bytes="0.018x")
    # 0.018 of 375,000 is 6,750 for networks; of the 400,000 that the same exporter made of the teacher, 7,200.
    assert {(row["role"], row.get("config.prune.amount")) for row in found.fitting} == {
        ("exported", 0.3),
        ("exported", 0.7),
    }
    over = {row.get("config.prune.amount"): row["why"] for row in found.others if row["role"] == "recovered"}
    assert over[0.7] == "7,680 bytes: 930 over"
    times, _ = weighed(compression(seeds=(0,)), ms="0.3x")
    assert {row["role"] for row in times.fitting} == {
        "exported"
    }  # 0.1 of 0.5 ms; of the teacher's own 0.21, 0.3 is less


def test_the_seed_that_is_shipped_is_within_the_limits_too() -> None:
    made = compression(amounts=(0.3,))
    files = [c for c in made if c["stage"] == "prune_recover"]
    middle = sorted(files, key=lambda c: c["metrics"][CHOICE])[1]
    for one in files:
        one["cost"]["bytes"] = 16000
    middle["cost"]["bytes"] = 19000  # the mean is 17,000
    found, _ = weighed(made, bytes="18k")
    [row] = [row for row in found.others if row["role"] == "recovered"]
    assert row["why"] == "19,000 bytes of its median seed: 1,000 over" and row["hash"] == middle["key"][:16]


def test_nothing_within_the_limits_names_the_closest_and_what_it_misses() -> None:
    found, limits = weighed(compression(), bytes="1k", drop="1")
    assert not found.fitting
    said = closest(found, limits)
    assert said.startswith("no model is within --max-bytes 1k --max-drop 1; the closest is exported (export) ")
    assert said.endswith(": 1,945 bytes: 945 over; 2.80 points lost: 1.80 over") and "\n" not in said


def test_what_was_not_measured_falls_out() -> None:
    made = compression(seeds=(0,))
    for one in made:
        if "cost" in one:
            one["cost"].pop("latency_ms_batch1", None)
    found, limits = weighed(made, ms="10")
    assert not found.fitting and closest(found, limits) == "no model is within --max-ms 10: its ms are not known"


def test_integers_that_torch_plays_have_no_time_to_be_chosen_by() -> None:
    made = compression(seeds=(0,), amounts=(0.3,))
    recovered = next(c for c in made if c["stage"] == "prune_recover")
    made.append(step("Quantize", recovered, 0.985, "quantize"))
    found, _ = weighed(made, ms="10")
    [row] = [row for row in found.others if row["role"] == "quantized"]
    assert row["why"] == "torch only plays its integers: kd export times its file"
    assert found.fitting[0]["role"] == "teacher"
    assert any(row["role"] == "quantized" for row in weighed(made, bytes="1M")[0].fitting)


def test_a_student_alone_is_beside_the_teacher_and_without_one_nothing_is() -> None:
    found, _ = weighed(family((4,), (0.9,), (0,)), drop="3.5")
    rows = {row["role"]: row for row in [*found.fitting, *found.others]}
    assert number(rows["teacher"]["drop"]) == 0
    assert number(rows["student alone"]["drop"]) == pytest.approx(0.029)
    alone, _ = weighed([card("Train", STUDENT, 0.96)], drop="1")
    assert alone.others[0]["why"] == "no teacher to compare with"


def test_two_data_sets_do_not_compare() -> None:
    made = [card("Train", STUDENT, 0.96), card("Train", STUDENT, 0.96, data="digits")]
    with pytest.raises(InputError, match=r"of 2 data sets \(mnist, digits\): name runs of one"):
        weighed(made, bytes="1M")
