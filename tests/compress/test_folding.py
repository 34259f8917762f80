"""Folding: the same outputs, only where it is right, and a file's structure makes the same net again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kd.compress.folding import fold, pairs, refold
from kd.compress.measure import looking
from kd.errors import KDError
from kd.models import create


def shaken(net: nn.Module) -> nn.Module:
    """The net with norms that do something."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            torch.as_tensor(module.running_mean).normal_()
            torch.as_tensor(module.running_var).uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "left"),
    [("cifar_resnet8", 0), ("mobilenetv3_small_050", 0), ("cifar_wrn_16_1", 7), ("seed_cnn_small", 0)],
)
def test_the_outputs_stay_and_a_structure_makes_it_again(name: str, left: int) -> None:
    make = lambda: create(name, num_classes=10, in_chans=3, size=32)  # noqa: E731
    net, images = shaken(make()), torch.rand(2, 3, 32, 32)
    with looking(net):
        expected = net(images)
    paths = [path for path, _ in net.named_modules()]
    found = pairs(net, images)
    fold(net, found)
    with looking(net):
        assert torch.allclose(net(images), expected, atol=1e-4 * float(expected.abs().max()))
    # Of a wide ResNet's norms those before a convolution stay.
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == left
    assert [path for path, _ in net.named_modules()] == paths
    again = refold(make(), found)
    again.load_state_dict(net.state_dict(), strict=True)
    with looking(again):
        assert torch.equal(again(images), net(images))


class Reader(nn.Module):
    """What the convolution makes is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.conv(images)
        total: Tensor = self.norm(maps) + maps
        return total


def test_a_norm_is_left_where_something_else_reads_what_it_reads() -> None:
    net = nn.Sequential(shaken(Reader()), shaken(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))))
    assert pairs(net, torch.rand(2, 1, 8, 8)) == {"1.1": "1.0"}


def test_looking_for_pairs_leaves_no_trace() -> None:
    net = shaken(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))).train()
    before = copy.deepcopy(net.state_dict())
    pairs(net, torch.rand(2, 1, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training and not net[0]._forward_hooks


def test_a_structure_of_another_net_is_refused() -> None:
    with pytest.raises(KDError, match="folds '1' into '7', and Sequential has no such pair"):
        refold(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), {"1": "7"})
