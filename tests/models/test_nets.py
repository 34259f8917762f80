"""The small nets of our own."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from kd.errors import InputError
from kd.models.nets import SeedCNN, seed_cnn, seed_cnn_small


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_at_28_px_they_have_the_parameters_that_are_published() -> None:
    assert parameters(seed_cnn()) == 93_322
    assert parameters(seed_cnn_small()) == 6_058


def test_layer_by_layer_it_is_the_net_of_the_tutorial() -> None:
    net = SeedCNN()
    assert [parameters(layer) for layer in (net.conv1, net.conv2, net.conv3, net.dense, net.head)] == [
        *(320, 18_496, 36_928, 36_928, 650)
    ]
    images = torch.rand(2, 1, 28, 28)
    stages = nn.Sequential(
        *(net.conv1, nn.MaxPool2d(2), net.conv2, nn.MaxPool2d(2), net.conv3, nn.Flatten(), net.dense, net.head)
    )
    assert net(images).equal(stages(images))
    assert [type(layer) for layer in net.conv3] == [nn.Conv2d, nn.ReLU]


@pytest.mark.parametrize(
    ("size", "channels", "side"), [(8, 1, 2), (21, 1, 5), (22, 1, 2), (28, 1, 3), (32, 3, 4), (4, 1, 1)]
)
def test_every_size_leaves_a_map(size: int, channels: int, side: int) -> None:
    net = SeedCNN(num_classes=7, in_chans=channels, img_size=size)
    linear = net.dense[0]
    assert isinstance(linear, nn.Linear) and linear.in_features == 64 * side**2
    assert net(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_timm_knows_them_and_their_widths_can_be_chosen() -> None:
    assert {"seed_cnn", "seed_cnn_small"} <= set(timm.list_models("seed_cnn*"))
    net = timm.create_model("seed_cnn", num_classes=3, in_chans=2, img_size=12, widths=(2, 3, 4, 5))
    assert [p.shape[0] for n, p in net.named_parameters() if n.endswith("weight")] == [2, 3, 4, 5, 3]
    assert seed_cnn_small(widths=[2, 3, 4, 5]).dense[0].out_features == 5


@pytest.mark.parametrize("widths", [(1, 2, 3), (1, 2, 3, 0), (1, 2, 3, 4.0), ()])
def test_widths_that_make_no_net_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="four positive integers"):
        SeedCNN(widths=widths)


def test_an_image_too_small_to_pool_is_refused() -> None:
    with pytest.raises(InputError, match="4 px is the least"):
        SeedCNN(img_size=3)
