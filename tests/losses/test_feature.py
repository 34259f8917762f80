"""Losses on features: reference numbers, what `bind` makes, and variances that are trained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.feature import MGD, VID, Hint, hint, mgd, vid


def wave(*shape: int, phase: float = 0.0) -> torch.Tensor:
    """Features between -1 and 1 from literal arithmetic."""
    return torch.sin(1.3 * torch.arange(int(np.prod(shape)), dtype=torch.float64) + phase).reshape(shape).float()


def bound(student: tuple[int, ...], teacher: tuple[int, ...], seed: int = 0) -> Hint:
    torch.manual_seed(seed)
    loss = Hint()
    loss.bind(student, teacher)
    return loss


def test_hint_matches_hand_computation() -> None:
    # Differences 1, 2, 0, -3: squares 1, 4, 0, 9, mean 3.5 over all four elements, not per sample.
    student, teacher = tensor([[2.0, 2.0], [0.0, 1.0]]), tensor([[1.0, 0.0], [0.0, 4.0]])
    assert_close(hint(student, teacher), tensor(3.5))


def test_hint_is_that_of_the_float64_formula() -> None:
    student, teacher = wave(4, 3, 5, 5), wave(4, 3, 5, 5, phase=1.0)
    expected = np.square(student.double().numpy() - teacher.double().numpy()).mean()
    assert hint(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_hint_is_zero_at_identity() -> None:
    assert hint(wave(4, 3, 5, 5), wave(4, 3, 5, 5)).item() == 0


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((0, 3), (0, 3)), ((2, 3), (2, 3, 1))])
def test_features_of_two_shapes_or_none_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="cannot be compared"):
        hint(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_maps_go_through_convolution_norm_and_relu() -> None:
    loss = bound((4, 3, 6, 6), (4, 5, 6, 6))
    assert isinstance(loss.projection, nn.Sequential)
    convolution, norm, relu = loss.projection
    assert isinstance(convolution, nn.Conv2d) and convolution.kernel_size == (1, 1) and convolution.bias is None
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(relu, nn.ReLU)
    student, teacher = wave(4, 3, 6, 6), wave(4, 5, 6, 6)
    mixed = torch.einsum("nchw,dc->ndhw", student, convolution.weight[:, :, 0, 0])
    mean, variance = mixed.mean((0, 2, 3), keepdim=True), mixed.var((0, 2, 3), keepdim=True, correction=0)
    expected = ((((mixed - mean) / (variance + 1e-5).sqrt()).clamp(min=0) - teacher) ** 2).mean()
    assert_close(loss(student=student, teacher=teacher), expected)


@pytest.mark.parametrize("shape", [(4,), (7, 4)])
def test_vectors_and_tokens_go_through_a_linear_layer(shape: tuple[int, ...]) -> None:
    student, teacher = wave(2, *shape), wave(2, *shape[:-1], 6)
    loss = bound(tuple(student.shape), tuple(teacher.shape))
    assert isinstance(loss.projection, nn.Linear)
    expected = ((student @ loss.projection.weight.T + loss.projection.bias - teacher) ** 2).mean()
    assert_close(loss(student=student, teacher=teacher), expected)


def test_equal_widths_are_projected_all_the_same() -> None:
    assert bound((2, 4), (2, 4)).projection is not None


@pytest.mark.parametrize(
    ("student", "teacher"), [((7, 7), (3, 3)), ((3, 3), (7, 7)), ((8, 4), (2, 6)), ((5, 5), (5, 5))]
)
def test_the_larger_map_is_averaged_down_to_the_smaller(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    maps = wave(2, 3, *student), wave(2, 4, *teacher)
    loss = bound(tuple(maps[0].shape), tuple(maps[1].shape))
    assert loss.projection is not None
    grid = min(student[0], teacher[0]), min(student[1], teacher[1])
    expected = hint(loss.projection(F.adaptive_avg_pool2d(maps[0], grid)), F.adaptive_avg_pool2d(maps[1], grid))
    assert_close(loss(student=maps[0], teacher=maps[1]), expected)


def test_the_same_seed_makes_the_same_projection() -> None:
    shapes = (4, 3, 6, 6), (4, 5, 6, 6)
    first, again, other = bound(*shapes, seed=1), bound(*shapes, seed=1), bound(*shapes, seed=2)
    name = "projection.0.weight"
    assert first.state_dict()[name].equal(again.state_dict()[name])
    assert not first.state_dict()[name].equal(other.state_dict()[name])


def test_binding_again_keeps_what_was_learnt_and_refuses_other_shapes() -> None:
    loss = bound((4, 3), (4, 5))
    projection = loss.projection
    loss.bind((9, 3), (9, 5))  # another batch size is no other shape
    assert loss.projection is projection
    with pytest.raises(InputError, match="already bound"):
        loss.bind((4, 3), (4, 6))


def test_the_projection_is_a_part_of_the_state_once_bound() -> None:
    assert not Hint().state_dict()
    assert set(bound((4, 3), (4, 5)).state_dict()) == {"projection.weight", "projection.bias"}


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ((4, 3, 6, 6), (4, 5), "choose two layers that both give"),
        ((4,), (4,), "choose two layers that both give"),
        ((4, 1, 2, 3, 4), (4, 1, 2, 3, 4), "choose two layers that both give"),
        ((4, 10, 3), (4, 11, 3), "from 10 tokens to 11"),
    ],
)
def test_layers_that_no_projection_joins_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Hint().bind(student, teacher)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: Hint()(student=wave(2, 3), teacher=wave(2, 3)), "call bind"),
        (lambda: bound((2, 3), (2, 3))(student=wave(2, 4), teacher=wave(2, 3)), "bound to 2 axes and width 3"),
        (lambda: bound((2, 3), (2, 3))(student=wave(2, 3, 3), teacher=wave(2, 3)), "bound to 2 axes"),
        (lambda: bound((2, 3), (2, 3))(student=wave(0, 3), teacher=wave(0, 3)), "the student's features are float"),
        (lambda: bound((2, 3), (2, 3))(student=wave(2, 3), teacher=wave(2, 4)), "cannot be compared"),
    ],
)
def test_other_features_than_those_bound_are_refused(use: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        use()


def test_vid_is_half_of_the_squared_error_over_the_variance_and_its_logarithm() -> None:
    mean, teacher, variance = wave(4, 3, 5, 5).double(), wave(4, 3, 5, 5, phase=1.0).double(), tensor([0.5, 1.0, 5.0])
    spread = variance.double().reshape(1, 3, 1, 1)
    expected = (((mean - teacher) ** 2 / spread + spread.log()) / 2).mean()
    assert vid(mean, teacher, variance).item() == pytest.approx(expected.item(), rel=1e-6)


def regression(variance: float = 5.0) -> VID:
    torch.manual_seed(0)
    loss = VID(variance)
    loss.bind([(4, 3, 6, 6), (4, 4, 3, 3)], [(4, 5, 6, 6), (4, 2, 3, 3)])
    return loss


def test_vid_trains_its_variances_and_they_are_in_the_state() -> None:
    # mdistiller keeps them in a plain list: never optimised, never stored, so its loss is a scaled squared error.
    loss = regression()
    assert {"scales.0", "scales.1"} <= set(loss.state_dict()) & {name for name, _ in loss.named_parameters()}
    views = {"student": [wave(4, 3, 6, 6), wave(4, 4, 3, 3)], "teacher": [wave(4, 5, 6, 6), wave(4, 2, 3, 3)]}
    before = loss(**views)
    torch.optim.SGD(loss.parameters(), lr=1.0).zero_grad()
    before.backward()
    assert all(scale.grad is not None and scale.grad.abs().min() > 0 for scale in loss.scales)
    with torch.no_grad():
        for scale in loss.scales:
            scale -= 10 * scale.grad
    assert loss.variances()[0].max() < 5 and loss(**views) < before


@pytest.mark.parametrize("variance", [5.0, 1.0, 0.1])
def test_vid_begins_at_its_variance(variance: float) -> None:
    assert_close(regression(variance).variances()[0], torch.full((5,), variance))


def test_vid_is_the_formula_of_what_its_regressors_expect() -> None:
    loss = regression()
    views = {"student": [wave(4, 3, 6, 6), wave(4, 4, 3, 3)], "teacher": [wave(4, 5, 6, 6), wave(4, 2, 3, 3)]}
    assert loss.connectors is not None
    pairs = zip(loss.connectors, views["student"], views["teacher"], loss.variances(), strict=True)
    assert_close(loss(**views), torch.stack([vid(part(s), t, v) for part, s, t, v in pairs]).sum())


def test_mgd_is_the_sum_over_a_sample() -> None:
    rebuilt, teacher = wave(4, 3, 5, 5), wave(4, 3, 5, 5, phase=1.0)
    expected = np.square(rebuilt.double().numpy() - teacher.double().numpy()).sum() / 4
    assert mgd(rebuilt, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_mgd_leaves_out_its_share_of_positions_in_all_channels_and_draws_by_the_seed() -> None:
    class Seen(nn.Module):
        maps: torch.Tensor

        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            self.maps = maps
            return maps

    loss, ones, seen = MGD(masked=0.65), torch.ones(8, 3, 40, 40), Seen()
    loss.bind(ones.shape, ones.shape)
    assert loss.generators is not None
    loss.generators[0] = seen
    torch.manual_seed(0)
    loss(student=ones, teacher=ones)
    first = seen.maps
    assert first.mean().item() == pytest.approx(0.35, abs=0.01) and first[:, 0].equal(first[:, 2])
    assert not first[0].equal(first[1])
    torch.manual_seed(0)
    loss(student=ones, teacher=ones)
    assert first.equal(seen.maps)


def test_mgd_bridges_unlike_widths_alone() -> None:
    same, other = MGD(), MGD()
    same.bind((4, 3, 6, 6), (4, 3, 6, 6))
    other.bind((4, 3, 6, 6), (4, 5, 6, 6))
    assert same.connectors is not None and other.connectors is not None
    assert isinstance(same.connectors[0], nn.Identity) and isinstance(other.connectors[0], nn.Conv2d)


def test_vid_and_mgd_refuse_what_does_not_fit() -> None:
    for loss in (VID(), MGD()):
        with pytest.raises(InputError, match="call bind"):
            loss(student=wave(4, 3, 6, 6), teacher=wave(4, 3, 6, 6))
        with pytest.raises(InputError, match="both give maps"):
            loss.bind((4, 3), (4, 3))
    with pytest.raises(InputError, match="one variance a channel"):
        vid(wave(4, 3, 6, 6), wave(4, 3, 6, 6), torch.ones(2))
    with pytest.raises(BadValue, match="variance"):
        VID(variance=1e-6)
    with pytest.raises(BadValue, match="masked"):
        MGD(masked=1.5)
