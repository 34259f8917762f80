"""Layers made for one vector a sample, at each position of maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kd.errors import InputError
from kd.models.positions import is_activation, lays_over, over

MAPS = torch.linspace(-1, 1, 2 * 6 * 3 * 3).reshape(2, 6, 3, 3)


def test_what_follows_an_average_gives_the_logits_when_averaged() -> None:
    head = nn.Linear(6, 4)
    assert_close(over(MAPS, [head]).mean(dim=(2, 3)), head(MAPS.mean(dim=(2, 3))))


def test_each_position_is_a_vector_of_its_own() -> None:
    norm, hidden, head = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 4)
    found = over(MAPS, [norm, hidden, nn.ReLU(inplace=True), head])
    assert_close(found[:, :, 1, 2], head(hidden(norm(MAPS[:, :, 1, 2])).relu()))


def test_a_batch_norm_takes_its_running_statistics_and_leaves_them() -> None:
    norm = nn.BatchNorm2d(6).train()
    norm.running_mean.fill_(1.0)
    before = norm.running_mean.clone()
    assert_close(over(MAPS, [norm]), nn.BatchNorm2d.forward(norm.eval(), MAPS))
    assert norm.running_mean.equal(before)
    assert_close(over(MAPS, [nn.BatchNorm1d(6)]), over(MAPS, [nn.BatchNorm2d(6)]))


def test_a_layer_on_flattened_maps_is_a_convolution_as_large_as_they() -> None:
    dense = nn.Linear(6 * 9, 5)
    found = over(MAPS, [dense])
    assert found.shape == (2, 5, 3, 3)
    # In the middle the kernel sees all of the maps, as the layer does.
    assert_close(found[:, :, 1, 1], dense(MAPS.flatten(1)))


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
def test_a_convolution_keeps_the_grid(kernel: int) -> None:
    assert over(MAPS, [nn.Conv2d(6, 4, kernel)]).shape == (2, 4, 3, 3)


def test_weights_get_a_gradient_and_hooks_do_not_run() -> None:
    head, heard = nn.Linear(6, 4), []
    head.register_forward_hook(lambda *_: heard.append(1))
    over(MAPS, [head]).sum().backward()
    assert head.weight.grad is not None and head.weight.grad.abs().sum() > 0 and not heard


@pytest.mark.parametrize(
    ("module", "words"),
    [(nn.Linear(5, 4), r"Linear reads no positions of maps of shape \(2, 6, 3, 3\)"), (nn.LSTM(6, 6), "LSTM")],
)
def test_a_layer_that_fits_no_position_is_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(InputError, match=words):
        over(MAPS, [module])
    with pytest.raises(InputError, match="put :maps before :through"):
        over(MAPS.flatten(2), [nn.Linear(6, 4)])


def test_which_layers_are_activations() -> None:
    from timm.layers import activations

    assert is_activation(nn.GELU()) and is_activation(activations.HardSwish()) and lays_over(nn.ReLU6())
    assert not is_activation(nn.Identity()) and not is_activation(nn.MultiheadAttention(2, 1))
    assert not lays_over(nn.MaxPool2d(2))
