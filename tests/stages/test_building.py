"""From config to network and terms: the seed alone draws the weights; what is no term is refused."""

from __future__ import annotations

import pytest

from kd.errors import InputError
from kd.models import weights_digest
from kd.stages import Room
from kd.stages.building import build, build_objective, model_of
from tests.pipeline.small import planned


def test_the_seed_alone_draws_the_weights(tmp_path):
    one, run = planned(tmp_path)
    config, room = one.nodes[-1].config, Room(run, tmp_path)
    first, again, other = (build(config["student"], config["data"], None, seed, room) for seed in (0, 0, 1))
    assert weights_digest(first) == weights_digest(again) != weights_digest(other)
    assert first.statistics == (config["data"]["mean"], config["data"]["std"])


def test_a_name_alone_is_a_network_wherever_it_stands(tmp_path):
    several = planned(tmp_path, "pipeline=mutual", "students=[seed_cnn]")[0].nodes[-1].config["peers"]
    listed = planned(tmp_path, "pipeline=teachers", "teachers=[seed_cnn]")[0].nodes[0].config["model"]
    assert listed == {"_target_": "kd.models.create", "name": "seed_cnn", "options": {}, "pretrained": False}
    assert several == [model_of("seed_cnn")] and model_of("seed_cnn") == {**listed, "stages": None}
    assert model_of(["seed_cnn"]) is None


def test_terms_are_built_by_name_and_what_is_none_is_refused_in_one_line(tmp_path):
    one, run = planned(tmp_path)
    terms, room = one.nodes[-1].config["objective"], Room(run, tmp_path)
    assert list(build_objective(terms, room).active) == ["ce", "kd"]
    with pytest.raises(InputError, match="a term cannot be called 'loss'"):
        build_objective({"loss": terms["kd"]}, room)
    with pytest.raises(InputError, match="nothing to minimise"):
        build_objective({"kd": {**terms["kd"], "weight": 0}}, room)
