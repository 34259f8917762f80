"""Weights of terms that are learned with the network: the logarithm of a variance for each.

Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics"
(2018); yaringal/multi-task-learning-example, whose form it has: exp(-s) L + s for each loss L, without the paper's
halves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd.errors import InputError


class Uncertainty(nn.Module):
    """One log-variance s for each of some terms: exp(-s) times the weighted loss, plus s.

    It is optimised and checkpointed with the objective and never shipped. A loss L is best weighed where s = log L, so
    that all terms come to weigh as much; a loss that falls below 0 has no such place, and s falls with it. Weight decay
    of the optimiser draws s towards 0.

    Args:
        starts: name to s at the start; 0 leaves the weight as it is.

    Raises:
        InputError: if one is no finite number.

    >>> balance = Uncertainty({"kd": 0.0})
    >>> balance.weighed("kd", torch.tensor(2.0)).item(), balance.weighed("ce", torch.tensor(2.0)).item()
    (2.0, 2.0)
    """

    def __init__(self, starts: Mapping[str, float]) -> None:
        super().__init__()
        for name, value in starts.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(
                    f"the term {name!r} starts at log_variance={value!r}; a finite number was meant, e.g. 0"
                )
        self.log_variances = nn.ParameterDict({n: nn.Parameter(torch.tensor(float(v))) for n, v in starts.items()})

    def weighed(self, name: str, part: Tensor) -> Tensor:
        """What a term adds to the sum, of its loss times its own weight; a term without a log-variance as it is."""
        if name not in self.log_variances:
            return part
        s = self.log_variances[name]
        found: Tensor = torch.exp(-s) * part + s
        return found

    def factor(self, name: str) -> float:
        """What the term's weight is multiplied by now."""
        return math.exp(-self.log_variances[name].item()) if name in self.log_variances else 1.0

    def told(self) -> dict[str, float]:
        """Each log-variance now, as `log_variance/NAME`."""
        return {f"log_variance/{name}": value.item() for name, value in self.log_variances.items()}
