"""Networks that learn together: who moves by what, what is kept, what a kill leaves."""

from __future__ import annotations

import pytest
import torch

from kd.errors import InputError
from kd.models import load, weights_digest
from kd.pipeline.execute import build, check, execute
from kd.pipeline.jobs import call
from kd.stages import Circle, Room
from kd.store import Store
from tests.pipeline.small import kill_at, made, planned

MUTUAL = ("pipeline=mutual", "student.name=seed_cnn_small")
BOTH = ("pipeline=bidirectional", "student.name=seed_cnn_small")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store with the teacher of the two-way runs."""
    store = tmp_path_factory.mktemp("circle")
    made(store, "pipeline=distil")
    return store


def nets(store, card):
    folder = Store(store).get(card["key"]).path
    return {name: load(folder, name) for name in ("model", "teacher", "peer1") if (folder / f"{name}.json").exists()}


def test_a_student_that_hears_nobody_has_the_bits_of_the_student_alone(tmp_path):
    _, together = made(tmp_path, *MUTUAL, "loss=[ce]", "alpha=0")
    _, alone = made(tmp_path, "pipeline=baseline")
    assert together["weights"] == alone["weights"]


def test_peers_start_apart_and_each_ends_as_a_network_of_its_own(tmp_path):
    _, card = made(tmp_path, *MUTUAL, "students=[seed_cnn_small,seed_cnn]")
    folder = Store(tmp_path).get(card["key"]).path
    peers = [load(folder, name) for name in ("model", "peer1", "peer2")]
    assert len({weights_digest(net) for net in peers}) == 3
    assert type(peers[2].net).__name__ == "SeedCNN"
    names = {"ce", "kd", "peer1_ce", "peer1_kd", "peer2_ce", "peer2_kd", "loss"}
    assert {f"train/{name}" for name in names} <= set(card["trace"]["epochs"][0])
    assert {"peer1/test_accuracy", "peer2/val_accuracy"} <= set(card["metrics"])


def test_who_hears_several_hears_their_mix(tmp_path):
    one, _ = planned(tmp_path, *MUTUAL, "students=[seed_cnn_small,seed_cnn]", "mix=each", "loss=[ce,kd,hint]")
    terms = one.nodes[-1].config["objective"]
    assert terms["kd"]["teacher"] == ["teacher1.logits", "teacher2.logits"]
    assert terms["kd"]["loss"]["_target_"].endswith("Each")
    assert terms["hint_teacher2"]["teacher"] == "teacher2.middle"


@pytest.mark.parametrize("mix", ["kdcl_naive", "kdcl_linear", "kdcl_minlogit", "kdcl_general"])
def test_a_circle_learns_from_what_all_of_it_says(mix, tmp_path):
    words = ("recipe=kdcl", f"mix={mix}", "student.name=seed_cnn_small")
    one, _ = planned(tmp_path, *words)
    assert one.nodes[-1].config["objective"]["kd"]["teacher"] == ["teacher1.logits", "teacher2.logits"]
    _, card = made(tmp_path, *words, "run.validate_every=0")
    assert card["trace"]["epochs"][-1]["train/peer1_kd"] > 0


@pytest.mark.parametrize("mix", ["kdcl_naive", "kdcl_general"])
def test_a_loss_inside_a_mix_is_bound_to_its_layers(mix, tmp_path):
    hint = ("loss=[ce,hint]", "loss.hint.student=student.logits", "loss.hint.teacher=teacher.logits")
    words = (*MUTUAL, f"mix={mix}", "circle.hears=all", *hint)
    one, _ = planned(tmp_path, *words)
    assert one.nodes[-1].config["objective"]["hint"]["loss"]["loss"]["_target_"].endswith("Hint")
    _, card = made(tmp_path, *words, "run.validate_every=0")
    assert card["trace"]["epochs"][-1]["train/peer1_hint"] > 0


@pytest.mark.parametrize("words", [MUTUAL, BOTH], ids=["mutual", "bidirectional"])
def test_networks_that_learn_together_are_run_again_under_an_interchange(words, tmp_path):
    _, card = made(tmp_path, *words, "loss=[ce,kd,diito]", "run.validate_every=0")
    last = card["trace"]["epochs"][-1]
    assert last["train/diito"] > 0 and (last.get("train/peer1_diito", 1.0) > 0)


def test_the_student_moves_by_what_its_peer_says(tmp_path):
    _, hearing = made(tmp_path, *MUTUAL, "alpha=0.5")
    _, deaf = made(tmp_path, *MUTUAL, "alpha=0.5", "loss=[ce]")
    assert hearing["weights"] != deaf["weights"]


def test_two_networks_by_name_have_the_key_of_copies(tmp_path):
    one, _ = planned(tmp_path, *MUTUAL)
    other, _ = planned(tmp_path, *MUTUAL, "students=[seed_cnn_small]", "circle.copies=3")
    assert one.key == other.key
    assert planned(tmp_path, *MUTUAL, "circle.copies=2")[0].key != one.key


def test_the_teacher_is_tuned_and_the_untouched_one_stays(home):
    before = Store(home).get(planned(home, *BOTH)[0].nodes[0].key)
    digest = weights_digest(load(before.path))
    ran, card = made(home, *BOTH)
    assert ran == ["student"]
    assert weights_digest(load(before.path)) == digest
    assert weights_digest(nets(home, card)["teacher"]) != digest
    metrics = card["metrics"]
    assert metrics["teacher/test_accuracy_before"] == before.card["metrics"]["test/accuracy"]
    assert 0 < metrics["teacher/drift"] < 1 and 0 < metrics["teacher/agreement_with_before"] <= 1
    assert any("hint" in line and line.startswith("teacher: ") for line in card["bindings"])


def test_a_teacher_that_learns_nothing_keeps_its_weights(home):
    _, card = made(home, *BOTH, "circle.rate=0", "fit.optimiser.weight_decay=0")
    assert card["metrics"]["teacher/drift"] == 0


def test_only_the_layers_that_are_tuned_move_and_the_rest_keeps_its_statistics(home):
    before = load(Store(home).get(planned(home, *BOTH)[0].nodes[0].key).path).net.state_dict()
    for tune, moved in (("head", {"head"}), ("[conv3,head]", {"conv3", "head"})):
        _, card = made(home, *BOTH, f"circle.tune={tune}", "loss@back=[ce,kd]")
        after = nets(home, card)["teacher"].net.state_dict()
        other = {name.partition(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
        assert other == moved


def test_in_turns_each_network_moves_in_its_own_steps(home, monkeypatch):
    from kd.training import circle

    taken = []
    inner = circle.Circle.spoken

    def spoken(self, batch, learners):
        taken.append(list(learners))
        return inner(self, batch, learners)

    monkeypatch.setattr(circle.Circle, "spoken", spoken)
    made(home, *BOTH, "circle.turns=alternate")
    assert taken[:4] == [["teacher"], ["student"], ["teacher"], ["student"]]


def test_which_peer_a_step_hears_is_drawn_from_the_seed(tmp_path):
    words = (*MUTUAL, "students=[seed_cnn_small,seed_cnn]", "mix=random")

    def drawn(seed: int) -> list[int]:
        one, run = planned(tmp_path, *words, f"seed={seed}")
        stage = build(one.nodes[-1].document, run.trusted)
        members, _ = stage._members(None, None, Room(run, tmp_path), 2)
        loss, found = members["student"].objective.losses["kd"], []
        for step in range(16):
            loss.at(step / 4, 4)
            found += loss.heard(2)
        return found

    assert drawn(0) == drawn(0) != drawn(1)
    assert set(drawn(0)) == set(drawn(1)) == {0, 1}


@pytest.mark.parametrize(
    "words",
    [
        MUTUAL,
        (*BOTH, "circle.turns=alternate"),
        (*MUTUAL, "students=[seed_cnn_small,seed_cnn]", "mix=random", "seed=3"),
    ],
    ids=["mutual", "bidirectional", "random"],
)
@pytest.mark.parametrize(("moment", "at"), [("step", 5), ("after the epoch's record", 1)])
def test_killed_and_resumed_all_networks_have_the_same_bits(words, moment, at, tmp_path):
    words = (*words, "run.checkpoint_seconds=0")
    _, straight = made(tmp_path / "a", *words)
    if "pipeline=bidirectional" in words:
        made(tmp_path / "b", "pipeline=distil")  # the teacher, so that the kill hits the circle
    one, run = planned(tmp_path / "b", *words)
    assert "SIGKILL" in call(kill_at, moment, at, one, run)["error"]
    execute(one, Store(tmp_path / "b"), run)
    card = Store(tmp_path / "b").get(one.key).card
    assert card["resumed"]
    assert card["weights"] == straight["weights"]
    digests = [{name: weights_digest(net) for name, net in nets(tmp_path / s, c).items()} for s, c in
               (("a", straight), ("b", card))]  # fmt: skip
    assert digests[0] == digests[1] and len(digests[0]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*MUTUAL, "circle.copies=0"), "nobody learns with the student: name peers"),
        ((*MUTUAL, "circle.copies=-1"), "circle.copies=-1"),
        ((*MUTUAL, "students=[3]"), "students: 3 is no network"),
        ((*MUTUAL, "circle.turns=mixed"), "circle.turns"),
        ((*BOTH, "circle.rate=-1"), "circle.rate=-1"),
        ((*BOTH, "circle.tune=some"), "circle.tune='some': give all, head, or a list"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_planning(words, said, tmp_path):
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*BOTH, "circle.tune=[conv9]"), "'conv9' is no layer of the teacher to tune; did you mean 'conv3'"),
        ((*MUTUAL, "run.devices=2"), "networks that learn together do so on one device"),
        ((*MUTUAL, "loss=[ce,kd,hint]", "loss.hint.student=student.conv9"), "conv9"),
        ((*MUTUAL, "students=[resnet81]"), "there is no model 'resnet81'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(words, said, tmp_path):
    one, run = planned(tmp_path, *words)
    with pytest.raises(InputError, match=said):
        check([one], Store(tmp_path), run)
    assert not (tmp_path / "artifacts").exists()


def test_the_stage_stands_for_its_student(tmp_path):
    one, _ = planned(tmp_path, *MUTUAL)
    assert one.nodes[-1].document["stage"] == "kd.stages.Circle" and Circle.VERSION == 1
