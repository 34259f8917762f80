"""What several teachers said of the same views of the same samples, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kd.data.labels import StoredLabels

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class SeveralLabels:
    """The stored outputs of several teachers, read as those of one are.

    Args:
        by_role: each teacher's, by its role; all of as many views.

    >>> import torch
    >>> both = SeveralLabels({f"teacher{n}": StoredLabels.of(n * torch.eye(2)) for n in (1, 2)})
    >>> {name: rows.tolist() for name, rows in both.at(0, torch.tensor([1])).items()}
    {'teacher1.logits': [[0.0, 1.0]], 'teacher2.logits': [[0.0, 2.0]]}
    """

    def __init__(self, by_role: Mapping[str, StoredLabels]) -> None:
        self.by_role = dict(by_role)

    @property
    def device(self) -> torch.device:
        """Where rows are needed."""
        return next(iter(self.by_role.values())).device

    @property
    def views(self) -> int:
        """How many views are stored of each."""
        return next(iter(self.by_role.values())).views

    def on(self, device: torch.device) -> SeveralLabels:
        """The same labels, read on another device."""
        for labels in self.by_role.values():
            labels.on(device)
        return self

    def at(self, view: int, rows: Tensor) -> dict[str, Tensor]:
        """`teacher1.logits` (B, C) and so on, of one view, for rows of the split."""
        return {
            f"{role}.{name.partition('.')[2]}": value
            for role, labels in self.by_role.items()
            for name, value in labels.at(view, rows).items()
        }


Labels = StoredLabels | SeveralLabels
