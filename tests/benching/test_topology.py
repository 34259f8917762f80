"""`kd bench topology`: each row runs the networks that it names, and is compared within one round."""

from __future__ import annotations

import pytest
import torch

from kd.benching import topology
from kd.benching.topology import Going, bench_topology, compared, topologies
from kd.errors import InputError
from tests.shelf import text

SMALL = ["fit.batch_size=8", "run.workers=0"]


def test_each_row_runs_as_many_networks_as_it_says_and_holds_what_it_holds():
    data, table = bench_topology(SMALL, rounds=1, steps=1)
    rows = {row["topology"]: row for row in data["rows"]}
    assert list(rows) == [one.name for one in topologies()]
    assert {name: row["networks"] for name, row in rows.items()} == {
        "student alone": 1,
        "1 live teacher": 2, "2 live teachers": 3, "4 live teachers": 5,
        "1 teacher, stored labels": 1, "2 teachers, stored labels": 1, "4 teachers, stored labels": 1,
        "mutual, 2 networks": 2, "mutual, 4 networks": 4, "bidirectional": 2,
    }  # fmt: skip
    assert rows["student alone"]["of_alone"] == 1 and all(row["seconds"] > 0 for row in rows.values())
    own, one, two = (rows[name]["weights"] for name in ("student alone", "1 live teacher", "2 live teachers"))
    assert two - one == one - own > own and rows["mutual, 4 networks"]["weights"] == 4 * own
    assert rows["4 teachers, stored labels"]["weights"] == own
    # What learns keeps its activations for the backward pass; teachers run one after the other and keep none.
    alone, both = rows["student alone"]["held"], rows["mutual, 4 networks"]["held"]
    assert both > 2 * alone
    assert rows["4 live teachers"]["held"] < 1.5 * rows["1 live teacher"]["held"]
    shown = text(table)
    assert all(name in shown for name in rows) and "rounds: 1 of 1 steps, cpu, one thread's own time" in shown


def test_a_live_teacher_runs_in_each_step_and_a_stored_one_in_none(monkeypatch):
    from kd.models import Frozen

    asked = []
    inner = Frozen.forward
    monkeypatch.setattr(Frozen, "forward", lambda self, *given: asked.append(self) or inner(self, *given))
    steps = {}
    data = topology._Data()
    for one in topologies():
        going = topology._going(one, SMALL, data)
        asked.clear()
        topology._timed(going, 3)
        steps[one.name] = len(asked), len({id(net) for net in asked})
    assert steps["student alone"] == (0, 0)
    assert {number: steps[f"{number} live teachers"] for number in (2, 4)} == {2: (6, 2), 4: (12, 4)}
    assert steps["1 live teacher"] == (3, 1)
    assert not any(found != (0, 0) for name, found in steps.items() if "live" not in name)


def test_shares_are_of_the_same_round_so_that_a_slow_one_moves_none():
    found = compared([3.0, 30.0, 4.0], [1.0, 10.0, 1.0])
    assert found == {"seconds": 4.0, "of_alone": 3.0, "least": 3.0, "most": 4.0}


def test_rounds_are_interleaved(monkeypatch):
    order = []
    monkeypatch.setattr(
        topology, "_going", lambda one, words, data: Going(lambda: order.append(one.name), 1, 1, torch.device("cpu"))
    )
    bench_topology([], rounds=2, steps=1)
    names = [one.name for one in topologies()]
    warm, timed, held = len(names) * topology.WARM, 2 * len(names), len(names)
    assert order[warm : warm + timed] == names * 2 and len(order) == warm + timed + held


def test_what_stored_labels_do_not_hold_is_said():
    data, table = bench_topology([*SMALL, "loss=[ce,at]"], rounds=1, steps=1)
    skipped = {row["topology"]: row["skipped"] for row in data["rows"] if "skipped" in row}
    assert set(skipped) == {one.name for one in topologies() if one.stored}
    assert "reads layers of the teacher's" in next(iter(skipped.values())) and "skipped: a term" in text(table)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pipeline=mutual"], "pipeline=mutual: kd bench topology sets pipeline itself"),
        (["circle.copies=3"], "sets circle.copies itself"),
        (["tempratur=3"], "did you mean 'temperature'"),
        (["fit.precision=16-mixed", "run.accelerator=cpu"], "16-mixed needs a GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, said):
    with pytest.raises(InputError, match=said):
        bench_topology(words, rounds=1, steps=1)
