"""Batch norms folded into the convolution or linear layer before them: the same outputs from fewer layers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd.compress.measure import looking
from kd.errors import KDError

BEFORE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CLOSE = 1e-3  # of the largest output: folding rounds, and what is wrong is wrong by far more


def pairs(net: nn.Module, images: Tensor) -> dict[str, str]:
    """The batch norms that can be folded, each with the layer before it, by paths.

    Found in one pass: a norm is given the very tensor that the layer made, each runs once, and a copy of the net with
    the pair folded gives the same outputs (it does not where something else reads what the layer made).

    Args:
        net: the plain net.
        images: (N, C, H, W), what it takes.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2))
    >>> pairs(net, torch.rand(2, 1, 4, 4))
    {'1': '0'}
    """
    found: dict[str, str] = {}
    made: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, or its id could be another's
    runs: dict[str, int] = {}
    handles = []

    def after(module: nn.Module, args: Any, output: Any, path: str) -> None:
        runs[path] = runs.get(path, 0) + 1
        made[id(output)] = path, output

    def before(module: nn.Module, args: Any, path: str) -> None:
        runs[path] = runs.get(path, 0) + 1
        if args and id(args[0]) in made:
            found[path] = made[id(args[0])][0]

    for path, module in net.named_modules():
        if type(module) in BEFORE:
            handles.append(module.register_forward_hook(lambda m, a, o, path=path: after(m, a, o, path)))
        elif _foldable(module):
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: before(m, a, path)))
    try:
        with looking(net):
            expected = net(images)
    finally:
        for handle in handles:
            handle.remove()
    once = {norm: layer for norm, layer in found.items() if runs[norm] == runs[layer] == 1}
    if _same(net, once, images, expected):
        return once
    return {norm: layer for norm, layer in once.items() if _same(net, {norm: layer}, images, expected)}


def _foldable(module: nn.Module) -> bool:
    plain = type(module) in NORMS or _activated(module)
    return plain and getattr(module, "running_var", None) is not None


def _activated(module: nn.Module) -> bool:
    """Whether it is timm's norm with dropout and activation in itself, told by its parts: timm is not this floor's."""
    return type(module).__name__ == "BatchNormAct2d" and {"drop", "act"} <= dict(module.named_children()).keys()


def _same(net: nn.Module, found: Mapping[str, str], images: Tensor, expected: Tensor) -> bool:
    if not found:
        return True
    trial = fold(copy.deepcopy(net), found)
    with looking(trial):
        output = trial(images)
    worst = float((output - expected).abs().max())
    return worst <= CLOSE * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def fold(net: nn.Module, found: Mapping[str, str]) -> nn.Module:
    """The net with each norm's statistics, scale and shift in the layer before it, in place.

    What stays at the norm's path does nothing, or, after timm's norms with an activation, only that.

    Args:
        net: the plain net.
        found: norm to layer, as `pairs` gives it.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    >>> inputs, expected = torch.ones(1, 2), net(torch.ones(1, 2))
    >>> torch.allclose(fold(net, {"1": "0"})(inputs), expected, atol=1e-6), net[1]
    (True, Identity())
    """
    for norm_path, path in found.items():
        norm, layer = net.get_submodule(norm_path), net.get_submodule(path)
        weight, mean, variance = (torch.as_tensor(t) for t in (layer.weight, norm.running_mean, norm.running_var))
        scale = torch.rsqrt(variance.double() + norm.eps)  # type: ignore[operator]
        shift = -mean.double() * scale
        if norm.weight is not None:
            gamma, beta = (torch.as_tensor(t).double() for t in (norm.weight, norm.bias))
            scale, shift = scale * gamma, shift * gamma + beta
        if layer.bias is not None:
            shift = shift + torch.as_tensor(layer.bias).double() * scale
        weight.mul_(scale.view(-1, *(1,) * (weight.ndim - 1)).to(weight.dtype))
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
        _empty(net, norm_path, norm)
    return net


def refold(net: nn.Module, found: Mapping[str, Any]) -> nn.Module:
    """A fresh net brought to the shape that `fold` gives it; its weights have no meaning.

    Raises:
        KDError: if a pair is not of this net.

    >>> net = refold(nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)), {"1": "0"})
    >>> [name for name, _ in net.named_parameters()]
    ['0.weight', '0.bias']
    """
    modules = dict(net.named_modules())
    for norm_path, path in found.items():
        norm, layer = modules.get(norm_path), modules.get(path) if isinstance(path, str) else None
        if norm is None or layer is None or not _foldable(norm) or type(layer) not in BEFORE:
            raise KDError(f"the structure folds {norm_path!r} into {path!r}, and {type(net).__name__} has no such pair")
        weight = torch.as_tensor(layer.weight)
        layer.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
        _empty(net, norm_path, norm)
    return net


def _empty(net: nn.Module, path: str, norm: nn.Module) -> None:
    parts = OrderedDict((name, child) for name, child in norm.named_children() if name in ("drop", "act"))
    left = nn.Sequential(parts) if parts else nn.Identity()
    left.train(norm.training)
    owner, _, last = path.rpartition(".")
    net.get_submodule(owner)._modules[last] = left
