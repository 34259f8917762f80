from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kd.report.rows import (
    ALONE,
    DISTILLED,
    TEACHER,
    Spread,
    best,
    collect,
    over_seeds,
    related,
    varying_settings,
)
from kd.report.tables import layout
from kd.store import digest
from tests.report.cards import STUDENT, card, compression, family, lookup, step
from tests.report.cards import TEACHER as TEACHER_MODEL


def test_a_row_says_all_that_a_table_needs():
    made = family((4,), (0.9,), (0,), epochs=7, samples=1000)
    row = collect(made)[-1]
    assert row["role"] == DISTILLED and row["model"] == "seed_cnn_small" and row["data"] == "mnist"
    assert (row["temperature"], row["alpha"], row["seed"]) == (4, 0.9, 0)
    assert (row["epochs"], row["samples"]) == (7, 1000)
    assert (row["parameters"], row["macs"], row["bytes"]) == (6058, 310000, 25600)
    assert (row["latency_ms_batch1"], row["latency_ms_batch64"]) == (0.21, 2.1)
    assert row["test/accuracy"] == made[-1]["metrics"]["test/accuracy"] and row["val/loss"] is not None
    assert "test/f1_per_class" not in row
    assert row["teacher/accuracy"] == 0.991
    assert row["compression"] == 93322 / 6058
    assert row["hash"] == made[-1]["key"][:16] and row["command"] == f"kd reproduce {row['hash']}"
    assert row["config.model.options.widths"] == [8, 16, 16, 16] and row["config.fit.lr"] == 0.002


def test_roles_follow_from_who_names_whom():
    made = family((1,), (0.5,), (0,))
    assert [row["role"] for row in collect(made)] == [TEACHER, ALONE, DISTILLED]
    # On its own the teacher's card is a model trained alone, until the store shows who learnt from it.
    assert collect(made[:1])[0]["role"] == ALONE
    assert collect(made[:1], lookup(made))[0]["role"] == TEACHER


def test_soft_labels_alone_make_a_teacher_and_are_no_row():
    made = family((), (), ())
    assert [row["role"] for row in collect(made)] == [TEACHER]


def test_the_teacher_is_found_through_the_labels():
    teacher, labels, *_ = made = family((), (), ())
    student = card("Distil", STUDENT, 0.97, inputs={"labels": labels["key"]}, dials={"temperature": 4, "alpha": 0.9})
    row = collect([student], lookup(made))[0]
    assert row["teacher/accuracy"] == teacher["metrics"]["test/accuracy"]


def test_a_missing_parent_leaves_gaps_not_errors():
    student = family((1,), (0.5,), (0,))[-1]
    row = collect([student])[0]
    assert row["teacher/accuracy"] is None and row["compression"] is None and row["gain"] is None


def test_a_model_without_a_teacher_has_no_teacher_dials():
    alone = card("Train", STUDENT, 0.9)
    alone["dials"] = {"temperature": 4.0, "alpha": 0.9, "seed": 0}
    [row] = collect([alone])
    assert "temperature" not in row and "alpha" not in row and row["seed"] == 0


def test_steps_of_a_compression_have_rows_with_the_accuracy_before_and_after():
    *others, student = family((1,), (0.5,), (0,))
    pruned = step("Prune", student, 0.4, "prune")
    pruned["marks"] = ["collapsed"]
    recovered = step("FineTune", pruned, 0.96, "prune_recover", teacher=others[0]["key"])
    rows = {row["key"]: row for row in collect([pruned, recovered], lookup([*others, student, pruned]))}
    first, second = rows[pruned["key"]], rows[recovered["key"]]
    assert (first["role"], first["step"], second["role"], second["step"]) == (
        "pruned", "prune", "recovered", "prune_recover",
    )  # fmt: skip
    assert first["before/accuracy"] == student["metrics"]["test/accuracy"] and second["before/accuracy"] == 0.4
    assert first["model"] == second["model"] == STUDENT["name"]
    assert first["marks"] == "collapsed" and second["marks"] is None
    assert first["teacher/accuracy"] == second["teacher/accuracy"] == others[0]["metrics"]["test/accuracy"]
    assert collect([pruned])[0]["before/accuracy"] is None


def test_steps_in_another_order_have_a_column_that_tells_them_apart():
    *others, student = family((1,), (0.5,), (0,))
    pruned = step("Prune", student, 0.9, "prune")
    late = step("Quantize", pruned, 0.8, "quantize")
    early = step("Quantize", student, 0.95, "quantize")
    known = lookup([*others, student, pruned])
    rows = collect([pruned, early, late], known)
    assert {row["hash"]: row["after"] for row in rows} == {
        pruned["key"][:16]: "student", early["key"][:16]: "student", late["key"][:16]: "student > prune"
    }  # fmt: skip
    assert "after" in layout(rows)[0] and "after" in varying_settings(rows)
    in_one_order = collect([pruned, late], known)
    assert "after" not in layout(in_one_order)[0] and "after" not in varying_settings(in_one_order)


@pytest.mark.parametrize(
    ("stage", "taught", "way"),
    [
        ("Distil", True, "one way"),
        ("Circle", True, "both ways"),
        ("Circle", False, "each other"),
        ("MetaDistil", True, "meta"),
    ],
)
def test_a_row_says_who_learns_from_whom(stage: str, taught: bool, way: str):
    teacher = card("Train", TEACHER_MODEL, 0.99)
    student = card(stage, STUDENT, 0.97, inputs={"teacher": teacher["key"]} if taught else {})
    assert collect([student], lookup([teacher]))[0]["way"] == way


def test_a_recovery_says_of_which_step_it_is_and_what_it_came_from():
    *_, student = family((1,), (0.5,), (0,))
    pruned = step("Prune", student, 0.4, "prune")
    recovered = step("FineTune", pruned, 0.96, "prune_recover")
    again = step("FineTune", recovered, 0.97, "prune_recover_again")
    thin = step("LowRank", again, 0.9, "lowrank")
    tuned = step("FineTune", student, 0.9, "tune")
    rows = collect([pruned, recovered, again, thin, tuned], lookup([student]))
    assert {row["step"]: row["recovers"] for row in rows} == {
        "prune": None, "prune_recover": "pruned", "prune_recover_again": "pruned", "lowrank": None, "tune": None,
    }  # fmt: skip
    groups = {row["step"]: row for row in rows}
    assert groups["prune_recover"]["from"] == groups["prune"]["group"]


def test_a_file_says_what_the_teachers_file_is():
    rows = [row for row in collect(compression(seeds=(0,), amounts=(0.3,))) if row["role"] == "exported"]
    assert (rows[0]["teacher/bytes"], rows[0]["teacher/latency_ms_batch1"]) == (400000, 0.5)


def test_a_compression_reads_from_its_start_to_its_end():
    teacher, labels, *_, student = family((1,), (0.5,), (0,))
    pruned = step("Prune", student, 0.4, "prune")
    recovered = step("FineTune", pruned, 0.96, "prune_recover", teacher=teacher["key"])
    rows = collect([recovered, pruned, student, labels, teacher])
    assert [row["role"] for row in rows] == [TEACHER, DISTILLED, "pruned", "recovered"]


def test_what_a_step_is_set_to_is_a_column_where_it_varies_of_all_that_come_after_it():
    *_, student = family((1,), (0.5,), (0,))
    made = [step("Prune", student, 0.4, "prune") for _ in range(2)]
    made[1]["document"]["config"] = {**made[1]["document"]["config"], "amount": 0.7}
    made[1]["key"] = digest(made[1]["document"])
    columns, _ = layout(collect(made, lookup([student])))
    assert "config.prune.amount" in columns and "config.amount" not in columns
    later = [step("FineTune", one, 0.9, "prune_recover") for one in made]
    rows = collect(later, lookup([student, *made]))
    assert "config.prune.amount" in varying_settings(rows)
    assert [row["config.prune.amount"] for row in rows] == [0.5, 0.7]


def test_sizes_that_the_seed_decides_have_a_mean_and_others_a_value():
    *_, student = family((1,), (0.5,), (0,))
    made = [step("Prune", student, 0.9, "prune") for _ in range(2)]
    made[1]["document"]["config"] = {**made[1]["document"]["config"], "seed": 1}
    made[1] |= {"key": digest(made[1]["document"]), "cost": {**made[0]["cost"], "bytes": 25000}}
    [group] = over_seeds(collect(made, lookup([student])))
    assert (group["bytes"].mean, group["bytes"].n) == (25300, 2) and group["parameters"] == 6058


def test_the_gain_pairs_seeds_and_falls_back_on_the_mean():
    made = family((4,), (0.9,), (0, 1))
    alone = [row for row in collect(made) if row["role"] == ALONE]
    distilled = [row for row in collect(made) if row["role"] == DISTILLED]
    for one, other in zip(alone, distilled, strict=True):
        assert other["alone/accuracy"] == one["test/accuracy"]
        assert other["gain"] == pytest.approx(other["test/accuracy"] - one["test/accuracy"])
    third = card("Distil", STUDENT, 0.98, seed=2, dials={"temperature": 4, "alpha": 0.9})
    [row] = collect([third], lookup(made))
    assert row["alone/accuracy"] == pytest.approx((0.962 + 0.964) / 2)


def test_a_student_alone_on_another_schedule_is_no_comparison():
    made = family((4,), (0.9,), (0,), epochs=5)
    longer = card("Distil", STUDENT, 0.98, dials={"temperature": 4, "alpha": 0.9}, epochs=50)
    assert collect([longer], lookup(made))[0]["gain"] is None


def test_seeds_join_into_mean_deviation_and_number():
    made = family((4,), (0.9,), (0, 1, 2))
    groups = over_seeds(collect(made))
    assert [group["n"] for group in groups] == [1, 3, 3]
    group = groups[-1]
    accuracy = group["test/accuracy"]
    assert accuracy.n == 3
    assert accuracy.mean == pytest.approx(0.96 + 0.008 + 0.0036 - 0.0032 + 0.003)
    assert accuracy.sd == pytest.approx(0.003)  # the sample's, n - 1, of 0, 3 and 6 thousandths
    assert group["gain"].sd == pytest.approx(0.001)
    assert group["seed"] == (0, 1, 2) and len(group["hash"]) == 3
    assert group["temperature"] == 4 and group["parameters"] == 6058
    assert group["teacher/accuracy"] == 0.991  # one teacher has no spread
    assert groups[0]["test/accuracy"] == Spread(0.991, None, 1)


def test_a_teacher_per_seed_does_not_split_a_group():
    made = []
    for seed in (0, 1):
        teacher = card("Train", TEACHER_MODEL, 0.99, seed=seed)
        dials = {"temperature": 4, "alpha": 0.9}
        made += [teacher, card("Distil", STUDENT, 0.97, seed=seed, inputs={"teacher": teacher["key"]}, dials=dials)]
    assert [(group["role"], group["n"]) for group in over_seeds(collect(made))] == [(TEACHER, 2), (DISTILLED, 2)]


def test_another_setting_anywhere_splits_a_group():
    one = card("Distil", STUDENT, 0.97, seed=0, lr=0.002)
    other = card("Distil", STUDENT, 0.97, seed=1, lr=0.001)
    assert [group["n"] for group in over_seeds(collect([one, other]))] == [1, 1]


def test_a_teacher_and_its_equal_trained_alone_stay_apart():
    one, other = card("Train", STUDENT, 0.9, seed=0), card("Train", STUDENT, 0.91, seed=1)
    student = card("Distil", STUDENT, 0.92, inputs={"teacher": one["key"]})
    assert [group["role"] for group in over_seeds(collect([one, other, student]))] == [TEACHER, ALONE, DISTILLED]


def test_best_is_chosen_by_validation_not_by_test():
    rows = [
        {"role": DISTILLED, "hash": "a", "test/accuracy": 0.99, "val/accuracy": 0.97},
        {"role": DISTILLED, "hash": "b", "test/accuracy": 0.98, "val/accuracy": 0.98},
        {"role": TEACHER, "hash": "c", "test/accuracy": 1.0, "val/accuracy": 1.0},
    ]
    assert best(rows)["hash"] == "b"
    assert best([{**row, "val/accuracy": None} for row in rows])["hash"] == "a"
    assert best([], DISTILLED) is None


def test_what_varies_leaves_out_what_follows():
    rows = collect(family((1, 4), (0.1, 0.9), (0, 1)))
    # not objective.kd.weight (alpha), ce.weight (1 - alpha), kd.loss.temperature, nor the seed
    assert varying_settings(rows) == ["temperature", "alpha"]
    rows = collect(family((1, 4), (0.9,), (0,), lr=0.001) + family((1, 4), (0.9,), (0,), lr=0.01))
    assert varying_settings(rows) == ["temperature", "config.fit.lr"]
    wide = {"name": "wide", "options": {"widths": [16, 32, 32, 32]}}
    rows = collect([card("Train", STUDENT, 0.9), card("Train", STUDENT | {"options": {"widths": [4]}}, 0.8)])
    assert varying_settings(rows) == ["config.model.options.widths"]
    other = card("Train", STUDENT, 0.9)
    other["document"]["config"]["model"] = wide
    rows = collect([card("Train", STUDENT, 0.9), {**other, "key": "f" * 64}])
    assert varying_settings(rows) == ["model"]


def test_relatives_are_the_lineage_and_the_student_alone():
    made = family((1, 4), (0.9,), (0,))
    stranger = card("Train", STUDENT, 0.5, epochs=99)
    found = related(made[-1:], lookup([*made, stranger]))
    assert {one["key"] for one in found} == {one["key"] for one in (*made[:3], made[-1])}


def test_a_metric_cannot_pose_as_another_column():
    made = card("Train", STUDENT, 0.9)
    made["metrics"] |= {"role": 1.0, "hash": 2.0}
    [row] = collect([made])
    assert row["role"] == ALONE and row["hash"] == made["key"][:16]


def test_reports_import_neither_torch_nor_plotly():
    code = (
        "import sys, kd.report.rows, kd.report.tables, kd.report.figures, kd.report.page, kd.report.compare; "
        "import kd.report.markdown, kd.training.workspace; "
        "print([m for m in ('torch', 'plotly', 'wandb', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"
