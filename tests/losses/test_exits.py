"""OFA-KD: the published formula, and exits from maps and tokens as the published code builds them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.exits import OFA, OFAExits, ofa
from tests.losses.waves import softmax, tensors, wave

STUDENT, TEACHER = wave(6, 5), wave(6, 5, phase=1.0)
TARGET = np.array([0, 3, 2, 4, 1, 0])
S, T = tensors(STUDENT, TEACHER)
Y = torch.from_numpy(TARGET)
DEEP, SHALLOW = tensors(wave(6, 4, 2, 2), wave(6, 3, 4, 4, phase=2.0))


def exits(*shapes: tuple[int, ...], classes: int = 5, **settings: object) -> OFAExits:
    torch.manual_seed(0)
    loss = OFAExits(**settings)  # type: ignore[arg-type]
    loss.bind(list(shapes), (6, classes))
    return loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("power", [1.0, 1.2, 1.5])
def test_ofa_is_that_of_the_numpy_formula(power: float, temperature: float) -> None:
    label = np.eye(5)[TARGET]
    goal = (softmax(TEACHER, temperature) + label) ** power - label
    expected = -(goal * np.log(softmax(STUDENT, temperature))).sum(axis=1).mean()
    assert ofa(S, T, Y, power, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_ofa_is_pinned_and_at_power_one_the_cross_entropy_with_the_teacher() -> None:
    assert ofa(S, T, Y, power=1.5).item() == pytest.approx(2.2003211, rel=1e-5)
    assert_close(ofa(S, T, Y), nn.functional.cross_entropy(S, T.softmax(1)))


def test_the_deepest_exit_matches_hand_computation() -> None:
    """The 1x1 convolution passes two channels on, their means are the logits: p = softmax(mean over positions)."""
    loss = exits((1, 2, 1, 2), classes=2)
    assert loss.heads is not None
    with torch.no_grad():
        convolution, linear = loss.heads[0].body[0], loss.heads[0].classifier
        for weight in (convolution.weight, linear.weight):
            weight.copy_(torch.eye(2).view_as(weight))
        convolution.bias.zero_()
        linear.bias.zero_()
    maps = torch.tensor([[[[2.0, 4.0]], [[1.0, 1.0]]]])  # logits (3, 1)
    teacher, target = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    # Goal at power 1.5: (½ + 1)^1.5 - 1 for the label, ½^1.5 for the other; -log p is softplus(-2) and softplus(2).
    expected = (1.5**1.5 - 1) * math.log1p(math.exp(-2)) + 0.5**1.5 * math.log1p(math.exp(2))
    loss.power = [1.5]
    assert loss(student=maps, teacher=teacher, target=target).item() == pytest.approx(expected, rel=1e-5)


def test_exits_are_summed_and_each_may_have_a_power_of_its_own() -> None:
    loss = exits(SHALLOW.shape, DEEP.shape, power=[1.0, 1.5]).eval()
    assert loss.heads is not None
    each = [head(f) for head, f in zip(loss.heads, (SHALLOW, DEEP), strict=True)]
    expected = ofa(each[0], T, Y, 1.0) + ofa(each[1], T, Y, 1.5)
    assert_close(loss(student=[SHALLOW, DEEP], teacher=T, target=Y), expected)


def test_the_heads_of_maps_are_those_of_the_published_code() -> None:
    """Its ResNet-18 on 100 classes, all four stages: widths and parameters of SepConv chains, by its own arithmetic."""

    def separable(channels: int, width: int) -> int:
        return 9 * channels + channels**2 + 2 * channels + 9 * channels + channels * width + 2 * width

    loss = OFAExits()
    loss.bind([(2, 64, 8, 8), (2, 128, 4, 4), (2, 256, 2, 2), (2, 512, 1, 1)], (2, 100))
    assert loss.heads is not None
    linear = 512 * 100 + 100
    chains = [separable(64, 128) + separable(128, 256) + separable(256, 512), separable(128, 256) + separable(256, 512)]
    chains += [separable(256, 512), 512 * 512 + 512]
    assert [sum(p.numel() for p in head.parameters()) for head in loss.heads] == [c + linear for c in chains]
    sizes = [head.body(torch.zeros(2, *shape)).shape[1:] for head, shape in zip(
        loss.heads, [(64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)], strict=True
    )]  # fmt: skip
    assert sizes == [(512, 1, 1)] * 4, "each chain ends on the deepest layer's grid"


def test_the_teachers_width_may_be_asked_for() -> None:
    loss = exits(SHALLOW.shape, DEEP.shape, width=9)
    assert loss.heads is not None
    assert [head.classifier.in_features for head in loss.heads] == [9, 9]


def test_tokens_are_merged_four_by_four_down_to_seven_a_side_and_leave_by_the_class_token() -> None:
    loss = OFAExits()
    loss.bind([(2, 197, 8), (2, 197, 8), (2, 197, 8)], (2, 5))
    assert loss.heads is not None
    assert [len(head.merges) for head in loss.heads] == [1, 1, 1]
    assert [len(head.blocks) for head in loss.heads] == [2, 1, 1], "as many blocks as layers follow, one at least"
    head = loss.heads[0].eval()
    head.blocks = nn.Identity()
    tokens = torch.rand(2, 197, 8)
    assert_close(head(tokens), head.classifier(tokens[:, 0]))


def test_a_merge_takes_the_four_patches_of_a_square() -> None:
    loss = OFAExits()
    loss.bind((1, 196, 1), (1, 3))
    assert loss.heads is not None
    seen: list[Tensor] = []
    loss.heads[0].merges[0][0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    loss.heads[0](torch.arange(196.0).view(1, 196, 1))
    assert seen[0].shape == (1, 49, 4)
    assert seen[0][0, 0].tolist() == [0, 14, 1, 15] and seen[0][0, 8].tolist() == [30, 44, 31, 45]


@pytest.mark.parametrize("count", [5, 7, 50])
def test_tokens_of_any_number_have_an_exit(count: int) -> None:
    loss = OFAExits()
    loss.bind((2, count, 6), (2, 5))
    value = loss(student=torch.rand(2, count, 6), teacher=torch.rand(2, 5), target=torch.tensor([0, 1]))
    assert value.isfinite() and value > 0


def test_heads_are_registered_and_made_once() -> None:
    loss = OFAExits()
    assert not loss.state_dict()
    loss.bind([SHALLOW.shape, DEEP.shape], (6, 5))
    kept = loss.heads
    loss.bind([SHALLOW.shape, DEEP.shape], (9, 5))
    assert loss.heads is kept and all(name.startswith("heads.") for name in loss.state_dict())
    loss(student=[SHALLOW, DEEP], teacher=T, target=Y).backward()
    assert all(p.grad is not None for p in loss.parameters())


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: OFAExits()(student=DEEP, teacher=T, target=Y), "call bind"),
        (lambda: OFAExits().bind((6, 5), (6, 5)), "choose layers of the student that give maps"),
        (lambda: OFAExits().bind((6, 4, 2, 2), (6, 5, 1, 1)), r"and teacher\.logits"),
        (lambda: OFAExits([1.0, 1.5]).bind((6, 4, 2, 2), (6, 5)), "2 powers for 1 exits"),
        (lambda: exits(DEEP.shape)(student=[DEEP, DEEP], teacher=T, target=Y), "bound to 1 layers and is given 2"),
        (lambda: exits(DEEP.shape)(student=SHALLOW, teacher=T, target=Y), "bound to maps of 4 channels"),
        (lambda: exits((6, 5, 4))(student=torch.zeros(6, 4, 4), teacher=T, target=Y), "bound to 5 tokens of width 4"),
    ],
)
def test_what_has_no_exit_is_refused_in_one_line(use: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        use()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda: OFA(power=0.5), lambda: OFAExits(power=[1.0, 0.5])])
def test_a_power_below_one_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(BadValue, match=r"power is 0\.5; it must be a finite number of 1 or more"):
        make()


@pytest.mark.parametrize("target", [torch.full((6,), 5), torch.full((6,), -1), torch.zeros(5, dtype=torch.long)])
def test_labels_that_do_not_fit_are_refused(target: Tensor) -> None:
    with pytest.raises(InputError, match=r"no class of the student's 5|need 6 class indices"):
        ofa(S, T, target)
