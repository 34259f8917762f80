"""What each layer costs when it alone is quantised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kd.compress.measure import looking
from kd.compress.quantize import only

Row = dict[str, float]


def sensitivity(
    net: nn.Module, paths: Iterable[str], images: Sequence[Tensor], targets: Tensor
) -> tuple[float, dict[str, Row]]:
    """The accuracy in float, and of each layer quantised alone the accuracy and the error of the logits.

    The error is the distance of the logits from those in float, as a share of the latter's length.

    Args:
        net: with layers that `kd.compress.quantize.begin` made, and what stands in front of it.
        paths: of these layers inside `net`.
        images: batches of (N, C, H, W).
        targets: (N,) of all batches.

    >>> from kd.compress.quantize import begin
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.eye(2))
    >>> begin(net, "weights", 8, None, {"0": None})
    >>> sensitivity(net, ["0"], [torch.eye(2)], torch.tensor([0, 1]))
    (1.0, {'0': {'accuracy': 1.0, 'error': 0.0}})
    """

    def logits(active: list[str]) -> Tensor:
        with looking(net), only(net, active):
            return torch.cat([net(batch) for batch in images]).double().cpu()

    def right(found: Tensor) -> float:
        return (found.argmax(dim=1) == targets.cpu()).double().mean().item()

    exact = logits([])
    length = max(exact.norm().item(), torch.finfo(torch.float64).tiny)
    report: dict[str, Row] = {}
    for path in paths:
        found = logits([path])
        report[path] = {"accuracy": right(found), "error": (found - exact).norm().item() / length}
    return right(exact), report
