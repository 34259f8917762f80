"""What a network is worth: logits in the split's order; the peer is what the teacher chose before, if data agree."""

from __future__ import annotations

import torch

from kd.models import Normalised, load
from kd.stages import Room
from kd.stages.evaluation import evaluated, logits_of, peer_of
from kd.stages.splits import load_data
from kd.store import Store
from tests.pipeline.small import made, planned


def test_the_peer_is_what_the_teacher_chose_and_the_network_where_the_data_are_others(tmp_path):
    made(tmp_path)
    one, run = planned(tmp_path)
    teacher, data = Store(tmp_path).get(one.nodes[0].key), one.nodes[-1].config["data"]
    assert teacher is not None and peer_of({}, None, data) is None
    room = Room(run, tmp_path)
    splits = load_data(data, room)
    chosen = peer_of({"teacher": teacher}, None, data)
    net = load(teacher.path)
    logits = logits_of(net, splits.test, data, room)
    assert isinstance(chosen, torch.Tensor) and chosen.equal(logits.argmax(1)) and len(logits) == len(splits.test)
    other = peer_of({"teacher": teacher}, None, {**data, "split_seed": 5})
    assert isinstance(other, Normalised) and peer_of({"teacher": teacher}, net, {**data, "split_seed": 5}) is net
    by_choice, by_net = (evaluated(net, peer, splits, data, room) for peer in (chosen, other))
    assert by_choice[0] == by_net[0] and by_choice[0]["test/agreement"] == 1
    assert by_choice[1].equal(chosen)
