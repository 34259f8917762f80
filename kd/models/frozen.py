"""A teacher that no trainer can move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn


class Frozen(nn.Module):
    """A net in eval mode for ever, without gradients, and no part of its owner's state.

    The net follows `.to(device)`, but is not among the owner's children: no optimiser sees its parameters, no
    checkpoint holds its weights, and a trainer that flips modes does not reach its batch norms.

    Args:
        module: frozen in place: its parameters stop asking for gradients.
        through: let a gradient through to what it is given, for a part of a teacher that a student's features are put
            into.

    >>> teacher = Frozen(nn.BatchNorm1d(2)).train()
    >>> teacher.training, teacher.module.training, len(teacher.state_dict()), len(list(teacher.parameters()))
    (False, False, 0, 0)
    """

    module: nn.Module

    def __init__(self, module: nn.Module, through: bool = False) -> None:
        super().__init__()
        self.through = through
        # Past nn.Module's own __setattr__, which would make it a child.
        object.__setattr__(self, "module", module.eval().requires_grad_(False))
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the trainer asks for."""
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Where `to`, `cuda`, `half` and the like arrive."""
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, *args: Any) -> Any:
        """The net's output; cut off from the graph, unless gradients go through."""
        if self.through:
            return self.module(*args)
        # no_grad, not inference_mode: feature losses save the teacher's tensor for backward.
        with torch.no_grad():
            return self.module(*args)
