"""The blocks that nets of stages are made of, each against its formula written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kd.models import blocks
from kd.models.blocks import Concat, HalfPassed, Shuffle, Sum


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def maps(channels: int = 6, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size)


def part(net: nn.Module, path: str) -> nn.Module:
    return net.get_submodule(path)


def test_a_sum_adds_and_a_concat_keeps_the_order_of_its_branches() -> None:
    double, triple = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)
    nn.init.constant_(triple.weight, 3.0)
    ones = torch.ones(1, 1, 1, 1)
    assert Sum(double, triple)(ones).flatten().tolist() == [5.0]
    assert Concat(double, triple)(ones).flatten().tolist() == [2.0, 3.0]


def test_of_two_halves_the_first_passes_and_the_second_is_worked_on() -> None:
    given = maps(4)
    out = HalfPassed(nn.ReLU())(given)
    assert out[:, :2].equal(given[:, :2]) and out[:, 2:].equal(given[:, 2:].relu())


@pytest.mark.parametrize(
    ("groups", "order"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 3, 1, 4, 2, 5]), (3, [0, 2, 4, 1, 3, 5])]
)
def test_a_shuffle_deals_the_groups_out_in_turn(groups: int, order: list[int]) -> None:
    given = maps(6)
    assert Shuffle(groups)(given).equal(given[:, order])


@pytest.mark.parametrize(("kernel", "stride", "size"), [(1, 1, 8), (3, 1, 8), (1, 2, 4), (3, 2, 4)])
def test_a_convolution_keeps_the_size_but_for_its_stride(kernel: int, stride: int, size: int) -> None:
    layer = blocks.conv(6, 5, kernel, stride)
    assert layer.bias is None and layer(maps()).shape == (2, 5, size, size)


def test_of_a_stage_the_first_block_alone_changes_channels_and_size() -> None:
    asked = []

    def block(channels: int, width: int, stride: int) -> nn.Module:
        asked.append((channels, width, stride))
        return nn.Identity()

    assert [len(stage) for stage in blocks.stages(block, [3, 4, 5], [2, 3], [1, 2])] == [2, 3]
    assert asked == [(3, 4, 1), (4, 4, 1), (4, 5, 2), (5, 5, 1), (5, 5, 1)]


def test_a_basic_block_is_relu_of_body_plus_input_and_its_sum_can_be_tapped_before_the_relu() -> None:
    block, given = blocks.basic(6, 6, 1), maps()
    body = part(block, "join.body")
    inner = part(body, "bn1")(part(body, "conv1")(given)).relu()
    total = part(body, "bn2")(part(body, "conv2")(inner)) + given
    assert_close(part(block, "join")(given), total)
    assert_close(block(given), total.relu())


@pytest.mark.parametrize("make", [blocks.basic, blocks.bottleneck])
@pytest.mark.parametrize(("width", "stride"), [(8, 1), (6, 2), (8, 2)])
def test_where_the_shape_changes_the_shortcut_is_a_projection(
    make: Callable[[int, int, int], nn.Module], width: int, stride: int
) -> None:
    block, given = make(6, width, stride), maps()
    body, shortcut = part(block, "join.body"), part(block, "join.shortcut")
    assert [tuple(p.shape) for p in shortcut.parameters()] == [(width, 6, 1, 1), (width,), (width,)]
    assert_close(block(given), (body(given) + shortcut(given)).relu())
    assert block(given).shape == (2, width, 8 // stride, 8 // stride)


def test_a_bottleneck_is_a_quarter_as_wide_inside_and_strides_in_its_middle() -> None:
    body = part(blocks.bottleneck(6, 8, 2), "join.body")
    found = [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in body.children() if isinstance(c, nn.Conv2d)]
    assert found == [(2, 1, 1), (2, 3, 2), (8, 1, 1)]


def test_a_preactivated_block_that_keeps_the_shape_adds_what_came_in_untouched() -> None:
    block, given = blocks.preactivated(6, 6, 1), maps()
    body = part(block, "body")
    inner = part(body, "conv1")(part(body, "bn1")(given).relu())
    assert_close(block(given), part(body, "conv2")(part(body, "bn2")(inner).relu()) + given)


def test_a_preactivated_block_that_changes_the_shape_starts_both_ways_from_the_activation() -> None:
    block, given = blocks.preactivated(6, 8, 2), maps()
    active = part(block, "bn1")(given).relu()
    assert_close(block(given), part(block, "join.body")(active) + part(block, "join.shortcut")(active))
    assert [tuple(p.shape) for p in part(block, "join.shortcut").parameters()] == [(8, 6, 1, 1)]


def test_dropout_stands_between_the_convolutions_and_acts_in_training_alone() -> None:
    block, given = blocks.preactivated(6, 6, 1, drop_rate=1.0), maps()
    assert_close(block(given), given)  # all that the body would add is dropped
    assert not block.eval()(given).equal(given)


def test_an_inverted_block_is_wider_inside_and_linear_at_its_end() -> None:
    block, given = blocks.inverted(6, 6, 1, expansion=4), maps()
    body = part(block, "body")
    assert [c.out_channels for c in body.children() if isinstance(c, nn.Conv2d)] == [24, 24, 6]
    assert part(body, "conv2").groups == 24
    assert_close(block(given), body(given) + given)
    assert (blocks.inverted(6, 8, 2)(given) < 0).any()


def test_a_shuffle_unit_of_stride_two_appends_the_pooled_input_and_the_other_adds_it() -> None:
    given = maps(27)
    block = blocks.shuffled(27, 51, 2)
    pooled = F.avg_pool2d(given, 3, stride=2, padding=1).relu()
    out = block(given)
    assert out.shape == (2, 51, 4, 4) and out[:, 24:].equal(pooled)
    same, body = blocks.shuffled(48, 48, 1), "join.body"
    wide = maps(48)
    assert_close(same(wide), (part(same, body)(wide) + wide).relu())
    assert part(same, f"{body}.shuffle").groups == 3 == part(same, f"{body}.conv1").groups


def test_few_channels_are_not_cut_into_groups() -> None:
    first = part(blocks.shuffled(24, 240, 2), "join.first")
    assert (part(first, "conv1").groups, part(first, "shuffle").groups, part(first, "conv3").groups) == (1, 1, 3)


def test_a_split_unit_lets_every_other_channel_out_as_it_came() -> None:
    given = maps(6)
    out = blocks.split(6, 6, 1)(given)
    assert out[:, ::2].equal(given[:, :3])


def test_a_split_unit_of_stride_two_shrinks_all_channels_in_both_branches() -> None:
    given = maps(6)
    block = blocks.split(6, 10, 2)
    both = torch.cat([part(block, "join.first")(given), part(block, "join.second")(given)], dim=1)
    assert_close(block(given), both[:, [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]])
    assert both.shape == (2, 10, 4, 4)


def test_convolutions_of_vgg_are_pooled_first_if_at_all() -> None:
    names = [name for name, _ in blocks.convolutions(6, 8, 2, pooled=True).named_children()]
    assert names == ["pool", "conv1", "bn1", "relu1", "conv2", "bn2", "relu2"]
    assert blocks.convolutions(6, 8, 2, pooled=True)(maps()).shape == (2, 8, 4, 4)
    assert blocks.convolutions(6, 8, 1, pooled=False)(maps()).shape == (2, 8, 8, 8)
