"""What a network is worth: logits in the split's order; the peer is what the teacher chose before, if data agree."""

from __future__ import annotations

import torch

from kd.models import Normalised, load
from kd.stages import Room
from kd.stages.evaluation import evaluated, logits_of, peers_of
from kd.stages.splits import load_data
from kd.store import Store
from tests.pipeline.small import made, planned


def test_the_peer_is_what_the_teacher_chose_and_the_network_where_the_data_are_others(tmp_path):
    made(tmp_path)
    one, run = planned(tmp_path)
    teacher, data = Store(tmp_path).get(one.nodes[0].key), one.nodes[-1].config["data"]
    assert teacher is not None and peers_of({}, {}, data) == {}
    room = Room(run, tmp_path)
    splits = load_data(data, room)
    chosen = peers_of({"teacher": teacher}, {}, data)["teacher"]
    net = load(teacher.path)
    logits = logits_of(net, splits.test, data, room)
    assert isinstance(chosen, torch.Tensor) and chosen.equal(logits.argmax(1)) and len(logits) == len(splits.test)
    other = peers_of({"teacher": teacher}, {}, {**data, "split_seed": 5})["teacher"]
    assert isinstance(other, Normalised)
    assert peers_of({"teacher": teacher}, {"teacher": net}, {**data, "split_seed": 5}) == {"teacher": net}
    by_choice, by_net = (evaluated(net, {"teacher": peer}, splits, data, room) for peer in (chosen, other))
    assert by_choice[0] == by_net[0] and by_choice[0]["test/agreement"] == 1
    assert by_choice[1].equal(chosen)


def test_with_several_teachers_agreement_is_the_mean_of_that_with_each(tmp_path):
    made(tmp_path)
    one, run = planned(tmp_path)
    artifacts = [Store(tmp_path).get(node.key) for node in (one.nodes[0], one.nodes[-1])]
    data, room = one.nodes[-1].config["data"], Room(run, tmp_path)
    peers = peers_of({f"teacher{n}": a for n, a in enumerate(artifacts, 1) if a is not None}, {}, data)
    assert list(peers) == ["teacher1", "teacher2"] and all(isinstance(peer, torch.Tensor) for peer in peers.values())
    assert artifacts[0] is not None
    metrics = evaluated(load(artifacts[0].path), peers, load_data(data, room), data, room)[0]
    alone = metrics["test/agreement_teacher2"]
    assert metrics["test/agreement_teacher1"] == 1 and 0 < alone < 1 and metrics["test/agreement"] == (1 + alone) / 2
