"""What a classifier says of each position of the maps that it reads pooled or flattened."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError

ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations")


def is_activation(module: nn.Module) -> bool:
    """Whether a layer is an activation: no weights, and one of torch's or timm's.

    >>> is_activation(nn.ReLU()), is_activation(nn.Flatten()), is_activation(nn.PReLU())
    (True, False, False)
    """
    return type(module).__module__.startswith(ACTIVATIONS) and not list(module.parameters())


def lays_over(module: nn.Module) -> bool:
    """Whether `over` knows what a layer does at a position.

    >>> lays_over(nn.Linear(2, 2)), lays_over(nn.MultiheadAttention(2, 1))
    (True, False)
    """
    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
    return isinstance(module, kinds) or is_activation(module)


def over(maps: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """What some layers, which were made for one vector a sample, give at each position: maps (N, D, H, W).

    A linear layer is a 1x1 convolution; one on flattened maps is a convolution as large as they (Long et al., "Fully
    Convolutional Networks for Semantic Segmentation", 2015), padded so that the grid stays. Batch norm takes its
    running statistics. Weights are the layers' own and get gradients; the layers are not called, so no hook runs.

    Args:
        maps: (N, C, H, W).
        modules: layers such as a norm, an activation and the classifier, in their order.

    Raises:
        InputError: if a layer fits no position.

    >>> import torch
    >>> head = nn.Linear(3, 10)
    >>> maps = torch.rand(2, 3, 4, 4)
    >>> found = over(maps, [head])
    >>> found.shape, torch.allclose(found.mean(dim=(2, 3)), head(maps.mean(dim=(2, 3))), atol=1e-6)
    (torch.Size([2, 10, 4, 4]), True)
    """
    for module in modules:
        maps = _one(maps, module)
    return maps


def _one(maps: Tensor, module: nn.Module) -> Tensor:
    if maps.ndim != 4:
        raise InputError(f"features of shape {tuple(maps.shape)} have no positions; put :maps before :through")
    channels, grid = maps.shape[1], tuple(maps.shape[2:])
    if is_activation(module):
        found: Tensor = module.forward(maps.clone())  # it may work in place
        return found
    if isinstance(module, nn.Linear):
        if module.in_features == channels:
            return F.conv2d(maps, module.weight[:, :, None, None], module.bias)
        if module.in_features == channels * grid[0] * grid[1]:
            return _same_grid(maps, module.weight.view(-1, channels, *grid), module.bias)
    elif isinstance(module, nn.Conv2d) and module.in_channels == channels:
        return _same_grid(maps, module.weight, module.bias, module.groups)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.num_features == channels:
        return F.batch_norm(maps, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps)
    elif isinstance(module, nn.LayerNorm) and tuple(module.normalized_shape) == (channels,):
        rows = F.layer_norm(maps.permute(0, 2, 3, 1), (channels,), module.weight, module.bias, module.eps)
        return rows.permute(0, 3, 1, 2)
    raise InputError(f"{type(module).__name__} reads no positions of maps of shape {tuple(maps.shape)}")


def _same_grid(maps: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    height, width = weight.shape[2:]
    around = ((width - 1) // 2, width // 2, (height - 1) // 2, height // 2)
    return F.conv2d(F.pad(maps, around), weight, bias, groups=groups)
