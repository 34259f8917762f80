"""Images out of a network: what is minimised, by hand; the same again; nearer to what the network knows than noise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kd.errors import InputError
from kd.models import Normalised, weights_digest
from kd.training.dreaming import Recipe, Statistics, check, dream, judged, norms_of, total_variation

RECIPE = Recipe(steps=40, lr=0.1, statistics=1.0, first=1.0, variation=1e-3, l2=0.0, jitter=0)
TARGETS = torch.arange(12) % 3


def teacher() -> Normalised:
    """A net whose batch norms have seen bright centres on black."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 3),
    )  # fmt: skip
    net = Normalised(body, [0.25], [0.5])
    images = torch.zeros(64, 1, 8, 8)
    images[:, :, 2:6, 2:6] = torch.rand(64, 1, 4, 4)
    for _ in range(60):
        net.train()(images)
    return net.eval()


def made(recipe: Recipe = RECIPE, seed: int = 0, batch: int = 0, net: Normalised | None = None) -> torch.Tensor:
    return dream(net or teacher(), TARGETS, (1, 8, 8), recipe, seed, batch)


def test_total_variation_by_hand() -> None:
    # Beside: 1 - 3 = -2 and 4 - 0 = 4; below: -3, 3; the diagonals: 1 - 0 and 3 - 4.
    image = torch.tensor([[[[1.0, 3.0], [4.0, 0.0]]]])
    assert_close(total_variation(image), torch.tensor(20.0**0.5 + 18.0**0.5 + 1 + 1))
    assert total_variation(torch.ones(2, 3, 4, 4)) == 0


def test_the_distance_of_statistics_by_hand() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False), nn.BatchNorm2d(2)).eval()
    first, _, last = net
    first.running_mean.copy_(torch.tensor([1.0, 0.0]))
    first.running_var.copy_(torch.tensor([4.0, 1.0]))
    given = torch.tensor([[2.0, 0.0], [4.0, 0.0]])[:, :, None, None]  # means 3 and 0, variances 1 and 0
    statistics = Statistics(net)
    net(given)
    found, total = torch.stack(statistics.found).detach(), statistics.pop(first=10.0).detach()
    statistics.remove()
    own = 2.0 + (9.0 + 1.0) ** 0.5
    with torch.no_grad():  # what the last is given, the second having normalised it over the batch
        behind = net[1](first(given))
    assert len(norms_of(net)) == 2 and statistics.found == []
    far = torch.linalg.vector_norm(behind.mean((0, 2, 3)))
    far = far + torch.linalg.vector_norm(behind.var((0, 2, 3), unbiased=False) - last.running_var)
    assert_close(found, torch.stack([torch.tensor(own), far]))
    assert_close(total, 10 * own + far)


def test_images_are_nearer_to_what_the_network_has_seen_and_show_their_class() -> None:
    net = teacher()
    images = made(net=net)
    noise = made(Recipe(1, 1e-9, 1.0, 1.0, 0.0, 0.0, 0), net=net)
    assert images.shape == (12, 1, 8, 8) and images.dtype == torch.uint8
    right, distance = judged(net, images, TARGETS, 12)
    guessed, far = judged(net, noise, TARGETS, 12)
    assert distance < far / 2 and right == 1.0 > guessed
    # The network has only seen black borders.
    border = torch.ones(8, 8, dtype=torch.bool)
    border[2:6, 2:6] = False
    assert images[..., border].float().mean() < 0.7 * images[..., ~border].float().mean()


def test_the_same_again_whatever_ran_before_and_another_for_each_batch_and_seed() -> None:
    first = made()
    torch.manual_seed(99)
    assert made().equal(first)
    assert not made(batch=1).equal(first) and not made(seed=1).equal(first)
    assert not made(Recipe(40, 0.1, 1.0, 1.0, 1e-3, 0.0, jitter=1)).equal(first)


def test_the_teacher_is_left_as_it_was() -> None:
    net = teacher()
    before = weights_digest(copy.deepcopy(net))
    made(net=net)
    assert weights_digest(net) == before and not any(p.grad is not None for p in net.parameters())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_each_weight_moves_the_images() -> None:
    settings = {"statistics": 0.0, "first": 10.0, "variation": 0.1, "l2": 0.1}
    found = [made(), *(made(Recipe(**{**vars(RECIPE), name: value})) for name, value in settings.items())]
    assert all(not one.equal(other) for i, one in enumerate(found) for other in found[:i])
    smooth = total_variation(found[3].float())
    assert smooth < total_variation(found[0].float())


def test_a_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(InputError, match="the teacher Sequential has no batch normalisation, and images are made from"):
        check(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)))
