"""What a student said of each sample the last time it saw it: a teacher that needs no other network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.names import EARLIER

_CERTAIN = 1e4  # a logit beside zeros whose softmax is 1, at any temperature that distils


class Earlier(nn.Module):
    """Logits by a sample's row in the split; of a sample that was not seen yet, its label stands for them.

    They are a buffer: checkpointed with the objective, so that a resumed run recalls the same, and never shipped.

    >>> earlier = Earlier()
    >>> earlier.bind(samples=10, classes=2)
    >>> row, target = torch.tensor([7, 3]), torch.tensor([1, 0])
    >>> earlier.keep(row[:1], torch.tensor([[0.5, 0.25]]))
    >>> earlier.recall(row, target).softmax(dim=1)
    tensor([[0.5622, 0.4378],
            [1.0000, 0.0000]])
    """

    said: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("said", None)

    def bind(self, samples: int, classes: int) -> None:
        """Make room for as many; a second time it does nothing."""
        if self.said is None:
            self.said = torch.full((samples, classes), torch.nan)

    def recall(self, row: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C) of the samples at rows (N,), whose classes (N,) stand for those that were never seen.

        Raises:
            InputError: if `bind` was not called, or a row is none of the split's.
        """
        if self.said is None:
            raise InputError(f"{EARLIER} is read before it knows the split; call bind(samples, classes) first")
        # A GPU would have to be waited for at every step; there the index is checked by the kernel that uses it.
        if row.device.type == "cpu" and not 0 <= int(row.min()) <= int(row.max()) < len(self.said):
            raise InputError(f"a row is none of the split's: they go from 0 to {len(self.said) - 1}")
        found = self.said[row]
        label = torch.zeros_like(found).scatter_(1, target[:, None], _CERTAIN)
        return torch.where(found.isnan(), label, found)

    @torch.no_grad()
    def keep(self, row: Tensor, logits: Tensor) -> None:
        """Remember logits (N, C) of the samples at rows (N,)."""
        assert self.said is not None
        self.said[row] = logits.to(self.said.dtype)
