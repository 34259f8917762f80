"""The passes that terms ask for: what they give, whom they move, and that they are drawn from the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.interchange import Interchange
from kd.losses.causal import DIITO
from kd.losses.feature import Hint
from kd.losses.logits import SoftTargetKL, soft_target_kl
from kd.models import Normalised, Taps
from kd.objective import Objective, Term
from kd.training.again import again
from kd.training.circle import Circle, Member
from kd.training.module import Distiller
from kd.training.optimisers import configure
from kd.training.settings import Fit
from tests.training.tiny import label_term, net, teacher_term

IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
BATCH = {"image": IMAGES, "target": torch.arange(6) % 3, "row": torch.arange(6)}


def deep(seed: int = 0, width: int = 6) -> Normalised:
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(16, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 5), nn.Tanh(),
        nn.Linear(5, 3),
    )  # fmt: skip
    return Normalised(body, [0.5], [0.5])


def term(layers: list[str], fraction: float = 0.5, loss: nn.Module | None = None, teacher: str = "teacher") -> Term:
    views = {"student": "student.logits", "teacher": f"{teacher}.logits"}
    under = Interchange([f"student.{path}" for path in layers], [f"{teacher}.{path}" for path in layers], fraction)
    return Term(loss or DIITO(2.0), 1.0, under=under, **views)


def module(*layers: str, **more: Any) -> Distiller:
    terms = {"ce": label_term(), "diito": term(list(layers), **more)}
    made = Distiller(deep(1), Objective(terms), configure(Fit(), 1), deep(2, width=9))
    made.objective.draws_from(3)
    made.at(0.25, 1)
    return made


def swapped_by_hand(net: nn.Module, rows: Tensor, layer: int, sources: Tensor, channels: Tensor) -> Tensor:
    """The layers up to one on all rows, its channels exchanged, and the others behind it."""
    hidden = net[: layer + 1]((rows - 0.5) / 0.5)
    mixed = hidden.clone()
    mixed[:, channels] = hidden[sources][:, channels]
    return net[layer + 1 :](mixed)


@pytest.mark.parametrize("training", [False, True])
def test_both_networks_are_run_with_the_channels_of_another_sample(training: bool) -> None:
    made = module("3").train(training)
    views = made.views(BATCH)
    change = made.objective.active["diito"].under
    assert change is not None
    sources = change.sources(6)
    for side, whole in (("student", made.student), ("teacher", made.live["teacher"])):
        channels = change.channels({"student": 6, "teacher": 9}[side])
        meant = swapped_by_hand(whole.net, IMAGES, 3, sources, channels)
        torch.testing.assert_close(views[f"diito/{side}.logits"], meant)
        assert not torch.allclose(meant, views[f"{side}.logits"])
    _, parts = made.objective(views)
    assert parts["diito"].equal(soft_target_kl(views["diito/student.logits"], views["diito/teacher.logits"], 2.0))


def test_of_several_layers_each_takes_what_the_plain_pass_gave() -> None:
    made = module("3", "5", fraction=1.0).eval()
    views = made.views(BATCH)
    change = made.objective.active["diito"].under
    assert change is not None
    # All of the deepest is the source's: what was exchanged before it no longer shows.
    torch.testing.assert_close(views["diito/student.logits"], views["student.logits"][change.sources(6)])
    torch.testing.assert_close(views["diito/teacher.logits"], views["teacher.logits"][change.sources(6)])


def test_exchanged_with_itself_it_is_the_plain_kl() -> None:
    made = module("3", "5").eval()
    one = {name: value[:1] for name, value in BATCH.items()}  # a batch of one is its own source
    views = made.views(one)
    _, parts = made.objective(views)
    torch.testing.assert_close(
        parts["diito"], soft_target_kl(views["student.logits"], views["teacher.logits"], 2.0), rtol=0, atol=0
    )


def test_only_the_student_moves_and_through_both_samples() -> None:
    made = module("3").double()
    weight = made.student.net[1].weight
    batch = {name: value.double() if value.is_floating_point() else value for name, value in BATCH.items()}

    def value() -> Tensor:
        return made.objective(made.views(batch))[1]["diito"]

    (slope,) = torch.autograd.grad(value(), [weight])
    assert slope.abs().max() > 1e-4
    with torch.no_grad():
        for place in ((0, 0), (5, 11)):
            sides = []
            for step in (1e-6, -1e-6):
                weight[place] += step
                sides.append(value().item())
                weight[place] -= step
            assert slope[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7, rel=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in made.live["teacher"].parameters())
    assert not made.views(batch)["diito/teacher.logits"].requires_grad


def test_bfloat16_is_within_two_percent() -> None:
    made = module("3").eval()
    exact = made.objective(made.views(BATCH))[1]["diito"].item()
    with torch.autocast("cpu", torch.bfloat16):
        half = made.objective(made.views(BATCH))[1]["diito"].item()
    assert half == pytest.approx(exact, rel=0.02)


def test_a_step_leaves_no_hook_and_one_update_of_the_statistics() -> None:
    made, plain = module("3").train(), module("3").train()
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in made.modules()]
    made.training_step(BATCH, 0)
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in made.modules()]
    plain.student(IMAGES)
    assert made.student.net[2].running_var.equal(plain.student.net[2].running_var)
    assert made.student.net[2].num_batches_tracked == 1


def test_any_loss_may_read_any_layer_of_such_a_pass() -> None:
    hint = Hint()
    hint.bind((6, 5), (6, 5))
    made = Distiller(
        deep(1),
        Objective(
            {
                "plain": Term(hint, 1.0, "student.5", "teacher.5"),
                "causal": Term(hint, 1.0, "student.5", "teacher.5", under=Interchange("student.3", "teacher.3", 0.5)),
            }
        ),
        configure(Fit(), 1),
        deep(2),
    ).eval()
    _, parts = made.objective(made.views(BATCH))
    assert parts["plain"] > 0 and parts["causal"] > 0 and parts["plain"] != parts["causal"]


def test_nobody_is_run_again_at_a_weight_of_0() -> None:
    terms = {"ce": label_term(), "diito": Term(DIITO(), 0, "student.logits", "teacher.logits", under=Interchange(
        "student.3", "teacher.3"))}  # fmt: skip
    assert Objective(terms).again == {} and Objective(terms).teachers == []
    student = deep()
    assert again(Objective(terms), {"student": (student, Taps(student.net, []))}, IMAGES, {}) == {}


def test_one_of_several_teachers_is_run_again() -> None:
    objective = Objective({"kd": teacher_term(), "diito": term(["3"], teacher="teacher2")})
    made = Distiller(
        deep(1), objective, configure(Fit(), 1), {"teacher": deep(4), "teacher2": deep(2), "teacher1": deep(3)}
    )
    views = made.eval().views(BATCH)
    assert {name for name in views if name.startswith("diito/") and name.endswith("logits")} == {
        "diito/student.logits", "diito/teacher2.logits",
    }  # fmt: skip


def test_peers_are_run_again_for_each_who_hears_them() -> None:
    def peer() -> Objective:
        return Objective({"ce": label_term(), "diito": term(["3"])})

    members = {"student": Member(deep(1), peer(), ["peer1"]), "peer1": Member(deep(2, width=9), peer(), ["student"])}
    circle = Circle(members, "student", lambda groups: {}, 0.1).train()
    circle.training_step(BATCH, 0).backward()
    assert circle.parts["diito"] > 0 and circle.parts["peer1_diito"] > 0
    whole = circle.student.net[1].weight.grad.clone()
    circle.zero_grad()
    spoken = circle.spoken(BATCH, circle.members)
    views = circle.views("student", BATCH, spoken)
    nets = {
        "student": (circle.student, circle.taps["student"]),
        "teacher": (members["peer1"].net, circle.taps["peer1"]),
    }
    views |= again(circle.objective, nets, IMAGES, views)
    circle.objective(views)[0].backward()
    torch.testing.assert_close(circle.student.net[1].weight.grad, whole)
    assert all(p.grad is None for p in members["peer1"].net.parameters())


def test_stored_labels_cannot_be_asked_again() -> None:
    objective = Objective({"diito": term(["3"])})
    with pytest.raises(InputError, match="the term diito runs the teacher again, which stored labels cannot"):
        Distiller(deep(1), objective, configure(Fit(), 1), stored=["teacher"])


def test_without_the_passes_a_term_does_not_read_the_plain_ones() -> None:
    objective = Objective({"diito": term(["3"], loss=SoftTargetKL(2.0))})
    logits = torch.zeros(6, 3)
    with pytest.raises(InputError, match=r"reads 'student\.logits', which is not among"):
        objective({"student.logits": logits, "teacher.logits": logits})


def test_a_linear_net_is_exchanged_at_its_input() -> None:
    objective = Objective({"diito": term(["1:input"])})
    made = Distiller(net(1), objective, configure(Fit(), 1), net(2)).eval()
    views = made.views(BATCH)
    change = objective.active["diito"].under
    assert change is not None
    rows = ((IMAGES - 0.5) / 0.25).flatten(1)
    mixed = rows.clone()
    mixed[:, change.channels(16)] = rows[change.sources(6)][:, change.channels(16)]
    torch.testing.assert_close(views["diito/student.logits"], made.student.net[1](mixed))
