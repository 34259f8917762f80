"""FitNets' hint: reference numbers, and the projection that `bind` makes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.feature import Hint, _averaged, hint


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


@pytest.mark.parametrize("size", [2, 5, 7, 8, 14])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_averaging_is_adaptive_pooling(size: int, parts: int) -> None:
    maps = wave(2, 3, size, size + 1).double()
    grid = min(parts, size), parts
    assert_close(_averaged(maps, grid), F.adaptive_avg_pool2d(maps, grid))


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
        (lambda: bound((2, 3), (2, 3))(student=wave(0, 3), teacher=wave(0, 3)), "the student's features are of shape"),
        (lambda: bound((2, 3), (2, 3))(student=wave(2, 3), teacher=wave(2, 4)), "cannot be compared"),
    ],
)
def test_other_features_than_those_bound_are_refused(use: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        use()
