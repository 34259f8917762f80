from __future__ import annotations

import copy

from kd.report.compare import ABSENT, diff
from tests.report.cards import STUDENT, TEACHER, card


def test_equal_cards_differ_in_nothing():
    made = card("Train", STUDENT, 0.9)
    assert diff(made, copy.deepcopy(made)) == {}


def test_each_section_lists_its_leaves():
    a, b = card("Train", STUDENT, 0.9), card("Train", STUDENT, 0.9)
    b["document"]["config"]["fit"]["lr"] = 0.1
    b["document"]["version"] = 2
    b["document"]["inputs"] = {"teacher": "f" * 64}
    b["fingerprints"]["code"]["commit"] = "def"
    b["fingerprints"]["data"]["digest"] = "d2"
    b["fingerprints"]["environment"]["threads"] = 8
    del b["fingerprints"]["environment"]["torch"]
    b["metrics"]["test/accuracy"] = 0.91
    b["time"]["wall_s"] = 99  # how long it took is no difference
    found = {section: [tuple(leaf) for leaf in leaves] for section, leaves in diff(a, b).items()}
    assert found == {
        "config": [("version", 1, 2), ("fit.lr", 0.002, 0.1), ("inputs.teacher", ABSENT, "f" * 64)],
        "code": [("commit", "abc", "def")],
        "data": [("digest", "d1", "d2")],
        "environment": [("torch", "2.15.0", ABSENT), ("threads", 2, 8)],
        "result": [("metrics.test/accuracy", 0.9, 0.91)],
    }


def test_a_subtree_that_one_lacks_is_listed_by_leaf():
    a = card("Train", TEACHER, 0.9)
    b = card("Distil", STUDENT, 0.9, dials={"temperature": 4.0, "alpha": 0.9})
    leaves = {leaf.path: (leaf.a, leaf.b) for leaf in diff(a, b)["config"]}
    assert leaves["model.name"] == ("seed_cnn", ABSENT) and leaves["student.name"] == (ABSENT, "seed_cnn_small")
    assert leaves["objective.kd.loss.temperature"] == (ABSENT, 4.0)


def test_true_is_not_one_and_null_is_not_absent():
    a, b = card("Train", STUDENT, 0.9), card("Train", STUDENT, 0.9)
    a["document"]["config"]["fit"] |= {"nesterov": True, "clip": None}
    b["document"]["config"]["fit"] |= {"nesterov": 1}
    assert [tuple(leaf) for leaf in diff(a, b)["config"]] == [("fit.nesterov", True, 1), ("fit.clip", None, ABSENT)]
