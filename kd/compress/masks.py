"""Single weights set to 0: where, and how they stay 0 while a net trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

MASKABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)


def maskable(net: nn.Module, keep: Sequence[str] = ()) -> dict[str, Tensor]:
    """The matrices and kernels that may be masked, by the name of the parameter: no biases, no norms, no layer kept.

    >>> list(maskable(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)), keep=["2"]))
    ['0.weight']
    """
    found: dict[str, Tensor] = {}
    for path, module in net.named_modules():
        if isinstance(module, MASKABLE) and not any(path == name or path.startswith(f"{name}.") for name in keep):
            for name, value in module.named_parameters(recurse=False):
                if value.ndim > 1:
                    found[f"{path}.{name}" if path else name] = value
    return found


@torch.no_grad()
def choose(scores: Mapping[str, Tensor], amount: float, scope: str = "global") -> dict[str, Tensor]:
    """Masks, True where a weight is kept, that drop the `amount` of all weights with the lowest scores.

    Args:
        scores: of each weight, 0 or more; one tensor a layer.
        amount: share of the weights to drop, from 0 up to less than 1; ties are broken by position.
        scope: `global` ranks the weights of all layers together, `layer` drops the same share of each.

    >>> choose({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([4.0, 2.0])}, 0.5)
    {'a': tensor([ True, False]), 'b': tensor([ True, False])}
    """
    if scope == "layer":
        return {name: _highest(score.flatten(), amount).view_as(score) for name, score in scores.items()}
    kept = _highest(torch.cat([score.flatten() for score in scores.values()]), amount)
    parts = torch.split(kept, [score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _highest(scores: Tensor, amount: float) -> Tensor:
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    kept[scores.argsort(stable=True)[: round(amount * len(scores))]] = False
    return kept


@torch.no_grad()
def choose_pattern(score: Tensor, few: int, many: int) -> Tensor | None:
    """The mask that keeps the `few` highest of each `many` scores along the inputs; None where these are no multiple.

    Inputs of a convolution (O, I, k, k) are its channels I, at each place of the kernel: the order in which sparse
    kernels of NVIDIA read them (Mishra et al. 2021, arXiv:2104.08378).

    >>> choose_pattern(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2, 4)
    tensor([[False,  True,  True, False]])
    """
    if score.shape[1] % many:
        return None
    rows = score.movedim(1, -1)
    grouped = rows.reshape(-1, many)
    kept = torch.zeros_like(grouped, dtype=torch.bool)
    kept.scatter_(1, grouped.argsort(dim=1, descending=True, stable=True)[:, :few], True)
    return kept.view(rows.shape).movedim(-1, 1)


@torch.no_grad()
def bake(net: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set to 0, in place, what the masks do not keep."""
    parameters = dict(net.named_parameters())
    for name, mask in masks.items():
        parameters[name].mul_(mask)


def zeros(net: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The masks that keep a net's zeros where they are, of the parameters named.

    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 2.0]]))
    >>> zeros(layer, ["weight"])
    {'weight': tensor([[False,  True]])}
    """
    parameters = dict(net.named_parameters())
    return {name: parameters[name].detach() != 0 for name in names if name in parameters}


def sparsity(net: nn.Module) -> tuple[int, int]:
    """How many parameters there are, and how many of them are not 0.

    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.zero_()
    >>> _ = layer.bias.data.fill_(1.0)
    >>> sparsity(layer)
    (3, 1)
    """
    every = [p.detach() for p in net.parameters()]
    return sum(p.numel() for p in every), sum(int((p != 0).sum()) for p in every)
