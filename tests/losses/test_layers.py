"""What losses on layers share: lists, grids, connectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses import layers
from tests.losses.waves import tensors, wave


@pytest.mark.parametrize("size", [2, 5, 7, 8, 14])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_averaging_is_adaptive_pooling(size: int, parts: int) -> None:
    maps = torch.from_numpy(wave(2, 3, size, size + 1))
    grid = min(parts, size), parts
    assert_close(layers.averaged(maps, grid), F.adaptive_avg_pool2d(maps, grid))


def test_one_tensor_is_a_list_of_one() -> None:
    first, second = torch.zeros(2), torch.ones(2)
    ((one, other),) = layers.pairs(first, [second])
    assert one is first and other is second
    assert layers.shapes((2, 3), [(2, 4)]) == [((2, 3), (2, 4))]
    assert layers.each_shape(torch.Size((2, 3))) == [(2, 3)]


@pytest.mark.parametrize(("student", "teacher"), [(1, 2), (2, 1), (0, 0)])
def test_unlike_numbers_of_layers_are_refused(student: int, teacher: int) -> None:
    with pytest.raises(InputError, match=f"student has {student} layers and the teacher {teacher}"):
        layers.pairs([torch.zeros(1)] * student, [torch.zeros(1)] * teacher)


def test_the_larger_of_two_maps_is_averaged_down_in_each_direction() -> None:
    student, teacher = tensors(wave(2, 3, 4, 2), wave(2, 5, 2, 6))
    ours, theirs = layers.maps(student, teacher)
    assert_close(ours, F.adaptive_avg_pool2d(student, (2, 2)))
    assert_close(theirs, F.adaptive_avg_pool2d(teacher, (2, 2)))


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, 1, 1), r"student's features are float32 of shape \(2, 3\)"),
        (torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 1, 1, dtype=torch.long), "teacher's features"),
        (torch.zeros(0, 3, 1, 1), torch.zeros(0, 3, 1, 1), "not empty"),
        (torch.zeros(2, 3, 1, 1), torch.zeros(1, 3, 1, 1), "of 2 samples and the teacher's of 1"),
        (torch.zeros(2, 3, 1, 1), torch.zeros(2, 4, 1, 1), "3 channels and the teacher's 4"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused_in_one_line(
    student: torch.Tensor, teacher: torch.Tensor, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        layers.maps(student, teacher, widths=False)
    assert "\n" not in str(caught.value)


def test_only_unlike_widths_are_bridged() -> None:
    found = layers.Connectors("fsp", layers.between)
    found.bind([(2, 3, 4, 4), (2, 5, 4, 4)], [(2, 4, 4, 4), (2, 5, 4, 4)])
    assert isinstance(found[0], nn.Sequential) and isinstance(found[1], nn.Identity)


def test_what_no_connector_bridges_is_refused() -> None:
    with pytest.raises(InputError, match=r"fsp cannot lead from features of shape \(2, 3\)"):
        layers.Connectors("fsp", layers.between).bind((2, 3), (2, 3, 4, 4))


@pytest.mark.parametrize(
    ("channels", "count", "words"), [(4, 1, "have 4 channels; ab was bound to 3"), (3, 2, "bound to 1 layers")]
)
def test_other_maps_than_those_bound_are_refused(channels: int, count: int, words: str) -> None:
    parts = layers.Connectors("ab", layers.normed)
    parts.bind((2, 3, 4, 4), (2, 5, 4, 4))
    with pytest.raises(InputError, match=words):
        parts([torch.zeros(2, channels, 4, 4)] * count, [torch.zeros(2, 5, 4, 4)] * count)


def test_nothing_bound_is_refused_with_what_to_call() -> None:
    with pytest.raises(InputError, match="call bind"):
        layers.Connectors("ab", layers.normed)(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))


def test_connectors_are_made_once_and_checked_each_time() -> None:
    parts = layers.Connectors("ab", layers.normed)
    parts.bind((2, 3, 4, 4), (2, 5, 4, 4))
    kept = parts[0]
    parts.bind((9, 3, 4, 4), (9, 5, 4, 4))
    assert parts[0] is kept and len(parts) == 1
    with pytest.raises(InputError, match="give maps"):
        parts.bind((9, 3), (9, 5))
