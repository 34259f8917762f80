"""From config to network and terms: the seed alone draws the weights; what is no term is refused."""

from __future__ import annotations

import pytest

from kd.errors import InputError
from kd.models import weights_digest
from kd.stages import Room
from kd.stages.building import build, build_objective
from tests.pipeline.small import planned


def test_the_seed_alone_draws_the_weights(tmp_path):
    one, run = planned(tmp_path)
    config, room = one.nodes[-1].config, Room(run, tmp_path)
    first, again, other = (build(config["student"], config["data"], None, seed, room) for seed in (0, 0, 1))
    assert weights_digest(first) == weights_digest(again) != weights_digest(other)
    assert first.statistics == (config["data"]["mean"], config["data"]["std"])


def test_terms_are_built_by_name_and_what_is_none_is_refused_in_one_line(tmp_path):
    one, run = planned(tmp_path)
    terms, room = one.nodes[-1].config["objective"], Room(run, tmp_path)
    assert list(build_objective(terms, room).active) == ["ce", "kd"]
    with pytest.raises(InputError, match="a term cannot be called 'loss'"):
        build_objective({"loss": terms["kd"]}, room)
    with pytest.raises(InputError, match="nothing to minimise"):
        build_objective({"kd": {**terms["kd"], "weight": 0}}, room)
