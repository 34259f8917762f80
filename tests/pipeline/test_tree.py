"""The graph of a plan as text."""

from __future__ import annotations

from pathlib import Path

from kd.pipeline.tree import shape, tree
from tests.pipeline.small import planned

CHAIN = ("pipeline=chain", "assistants=[seed_cnn,seed_cnn_small]")


def test_a_chain_is_a_line_of_hops(tmp_path: Path) -> None:
    assert tree(planned(tmp_path, *CHAIN)[0].nodes) == [
        "student",
        "└─ teacher: assistant2, through assistant2_labels",
        "   └─ teacher: assistant1, through assistant1_labels",
        "      └─ teacher, through teacher_labels",
    ]


def test_what_is_read_twice_is_written_out_once(tmp_path: Path) -> None:
    words = ("pipeline=dense", "assistants=[seed_cnn,seed_cnn_small]")
    assert tree(planned(tmp_path, *words)[0].nodes) == [
        "student",
        "├─ teacher1: teacher, through teacher_labels",
        "├─ teacher2: assistant1, through assistant1_labels",
        "│  └─ teacher, through teacher_labels",
        "└─ teacher3: assistant2, through assistant2_labels",
        "   ├─ teacher1: teacher, through teacher_labels",
        "   └─ teacher2: assistant1, through assistant1_labels (as above)",
    ]


def test_a_live_teacher_and_other_roles_are_edges_too(tmp_path: Path) -> None:
    words = ("pipeline=students", "students=[seed_cnn_small,seed_cnn]", "labels.live=true")
    assert tree(planned(tmp_path, *words)[0].nodes) == [
        "compare", "├─ student1", "│  └─ teacher", "└─ student2", "   └─ teacher"
    ]  # fmt: skip


def test_a_stage_alone_is_one_line(tmp_path: Path) -> None:
    assert tree(planned(tmp_path, "pipeline=baseline")[0].nodes) == ["student"]


def test_plans_of_one_graph_have_one_shape(tmp_path: Path) -> None:
    def of(*words: str) -> str:
        return shape(planned(tmp_path, *words)[0].nodes)

    assert of(*CHAIN) == of(*CHAIN, "temperature=2", "student.name=seed_cnn") != of("pipeline=chain")
