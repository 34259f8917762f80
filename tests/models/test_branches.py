"""Nets cut in two and given more ends: each end alone is what the whole net makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kd.errors import InputError
from kd.models import create, outline
from kd.models.branches import Branched, Every, Gate, Tail, trunk_of

NETS = [
    ("seed_cnn_small", 1, 8, "conv2"),
    ("cifar_resnet8x4", 3, 32, "layer2"),
    ("cifar_shufflenetv2", 3, 32, "layer2"),
    ("mobilenetv3_small_050", 3, 32, "blocks.3"),
    ("regnetx_002", 3, 32, "s3"),
]


def branched(name: str, channels: int, size: int, count: int = 2) -> Branched:
    nets = []
    for seed in range(count):
        torch.manual_seed(seed)
        nets.append(create(name, num_classes=5, in_chans=channels, size=size))
    return Branched(nets, trunk_of(nets[0], (channels, size, size)), (channels, size, size))


@pytest.mark.parametrize(("name", "channels", "size", "at"), NETS, ids=[name for name, *_ in NETS])
def test_each_branch_is_the_net_with_that_end(name: str, channels: int, size: int, at: str) -> None:
    net, images = branched(name, channels, size), torch.rand(3, channels, size, size)
    assert net.at == at
    first = copy.deepcopy(net.net).eval()
    net.train()
    net.every(images).square().sum().backward()
    # All that learns is reached, and the trunk by both branches.
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    net.eval()
    first.load_state_dict(net.net.state_dict())
    said = net.every(images)
    assert_close(net(images), said[:, 0])
    assert_close(first(images), said[:, 0])
    assert not torch.allclose(said[:, 0], said[:, 1])
    assert_close(net.plain(2)(images), said[:, 1])


def test_the_ensemble_is_the_sum_by_the_gates_shares() -> None:
    net, images = branched("seed_cnn_small", 1, 8, count=3).eval(), torch.rand(4, 1, 8, 8)
    shares = net.gate(net.net.conv2(nn.functional.max_pool2d(net.net.conv1(images), 2)))
    assert shares.shape == (4, 3)
    said = Every(net)(images)
    assert_close(said[:, 3], (said[:, :3] * shares[:, :, None]).sum(1))


def test_the_gate_is_a_linear_layer_of_the_mean_normalised_cut_at_0_and_spread() -> None:
    gate = Gate(2, 2)
    linear, norm, _ = gate.body
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
        linear.bias.zero_()
    maps = torch.tensor([[3.0, -1.0], [1.0, 1.0]])[:, :, None, None].expand(2, 2, 2, 2)
    # Over the batch the first width is 2 ± 1, so ±1 normalised, and the second 0 ± 1; ReLU leaves (1, 0) and (0, 1).
    high = torch.tensor(1.0).exp() / (torch.tensor(1.0).exp() + 1)
    assert_close(gate(maps), torch.tensor([[high, 1 - high], [1 - high, high]]), atol=1e-4, rtol=0)
    assert norm.num_batches_tracked == 1


def test_the_trunk_runs_once_and_a_branch_keeps_its_own_statistics() -> None:
    net = branched("cifar_resnet8x4", 3, 32).train()
    net.every(torch.rand(4, 3, 32, 32))
    counts = {n: int(v) for n, v in net.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts and set(counts.values()) == {1}
    assert not any(name.startswith("others.0.net.layer1") for name in net.state_dict())


def test_its_parts_are_those_of_the_net_and_the_branches() -> None:
    net = branched("seed_cnn_small", 1, 8, count=3)
    found = outline(net, (1, 8, 8))
    assert found.find("stages") == ("net.conv1", "net.conv2", "net.conv3")
    assert found.find("preactivation1") == ("net.conv1.1:input",) and found.find("embedding") == ("net.head:input",)
    assert found.find("branches") == ("branches.0", "branches.1", "branches.2")
    assert found.find("branch2") == ("branches.1",) and found.find("ensemble") == ("ensemble",)
    with pytest.raises(InputError, match="has no branch4; it has 3 branches"):
        found.find("branch4")
    with pytest.raises(InputError, match="has no branches; only pipeline=one gives a network branches"):
        outline(net.net, (1, 8, 8)).find("branches")


class Skips(nn.Module):
    """A net whose end looks past its middle at its beginning."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads = reads
        self.begin, self.middle = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        early = self.begin(images)
        maps = self.middle(early)
        if self.reads == "maps":
            maps = maps + early
        if self.reads == "weights":
            maps = maps + self.begin.weight.mean()
        if self.reads == "image":
            maps = maps + images
        if self.reads == "again":
            maps = self.middle(maps)
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        ("maps", "what comes after reads more of the image than that layer's output"),
        ("image", "what comes after reads more of the image than that layer's output"),
        ("weights", "what comes after needs what comes before"),
        ("again", "it does not run just once"),
    ],
)
def test_a_net_that_looks_past_its_trunk_is_refused(reads: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        Tail(Skips(reads), "middle", (1, 8, 8))
    assert str(refused.value).startswith("Skips cannot be branched behind 'middle': ") and said in str(refused.value)


def test_a_plain_chain_of_the_same_layers_is_not_refused() -> None:
    net, images = Skips(""), torch.rand(2, 1, 8, 8)
    tail = Tail(net, "middle", (1, 8, 8))
    assert_close(tail(net.middle(net.begin(images))), net(images))
    assert tail.own == {"head.weight", "head.bias"}


def test_a_layer_that_is_none_is_refused() -> None:
    net = create("seed_cnn_small", num_classes=5, in_chans=1, size=8)
    for at, said in (("conv9", "one.at='conv9' is no layer of SeedCNN"), ("stages", "is no single layer")):
        with pytest.raises(InputError, match=said):
            trunk_of(net, (1, 8, 8), at)
    assert trunk_of(net, (1, 8, 8), "stage1") == "conv1"
    flat = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(InputError, match="it has 1 stages, and all but the last are shared"):
        trunk_of(flat, (1, 8, 8))
