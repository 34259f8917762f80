"""Which term moves the student: the gradient that each of them has on it, measured beside a step and moving no bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from kd.training.ranks import averaged

if TYPE_CHECKING:
    from kd.training.callbacks import Recorder

NORM, SHARE, COSINE = "grad/", "grad_share/", "grad_cosine/"


def of_terms(
    parts: Mapping[str, Tensor], weights: Mapping[str, float], trained: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """How strongly each weighted term pulls at some parameters, and which of them pull the same way.

    Gives `grad/T`, the L2 norm of the gradient of weight times loss; `grad_share/T`, that norm over the sum of all
    terms' norms (0 where all are 0); `grad_cosine/A/B`, the cosine between two terms' gradients (0 where one is 0).
    The graph is kept, so the step's own backward pass gives the same bits as without. Several ranks average their
    gradients first, as the step does: all of them must call this.

    Args:
        parts: each term's own loss, a scalar; one that does not reach the parameters has the gradient 0.
        weights: by the same names.
        trained: the parameters.

    >>> w = nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> found = of_terms({"a": 3 * w[0], "b": 4 * w[1]}, {"a": 1.0, "b": 0.5}, [w])
    >>> {name: round(value.item(), 4) for name, value in found.items()}
    {'grad/a': 3.0, 'grad/b': 2.0, 'grad_share/a': 0.6, 'grad_share/b': 0.4, 'grad_cosine/a/b': 0.0}
    """
    rows = {name: abs(weights[name]) * _gradient(part, trained) for name, part in parts.items()}
    # In float64: squares of small gradients would vanish.
    norms = {name: torch.linalg.vector_norm(row, dtype=torch.float64) for name, row in rows.items()}
    if not norms:
        return {}
    total = torch.stack(list(norms.values())).sum()
    found = {f"{NORM}{name}": norm for name, norm in norms.items()}
    found |= {f"{SHARE}{name}": torch.where(total > 0, norm / total, 0.0) for name, norm in norms.items()}
    ways = {name: torch.where(norms[name] > 0, row / norms[name], 0.0) for name, row in rows.items()}
    names = list(rows)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            found[f"{COSINE}{one}/{other}"] = torch.dot(ways[one], ways[other]).clamp(-1, 1)
    return found


def _gradient(part: Tensor, trained: Sequence[nn.Parameter]) -> Tensor:
    """One vector of all parameters, in float32 or wider."""
    found: Sequence[Tensor | None] = [None] * len(trained)
    if part.requires_grad:
        # Outside of autocast, where the step's own backward pass runs too.
        with torch.autocast(part.device.type, enabled=False):
            found = torch.autograd.grad(part, list(trained), retain_graph=True, allow_unused=True)
    each = [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained, strict=True)]
    wide = [g.detach().reshape(-1).to(torch.promote_types(g.dtype, torch.float32)) for g in each]
    return averaged(torch.cat(wide))


def keep_buffers() -> None:
    """Have compiled backward passes leave their buffers alone, or a graph could not be gone through twice.

    The same kernels run whether or not gradients are recorded, so that recording them moves no bit.
    """
    import torch._functorch.config as functorch

    functorch.donated_buffer = False


class Gradients(pl.Callback):
    """Ask a step for its terms' gradients where they are due; into history and loggers, and their means by epoch.

    Args:
        recorder: writes the lines; where it writes one for the step anyway, they stand in that.
        every: steps; 0: never; None: at the recorder's lines.
    """

    def __init__(self, recorder: Recorder, every: int | None) -> None:
        self.recorder, self.every = recorder, recorder.log_every if every is None else every
        self.epochs: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}  # a schedule may leave a term out of some steps
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, so that a resumed run goes on with the same means."""
        return {"epochs": self.epochs, "sums": self.sums, "counts": self.counts, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from the checkpoint."""
        self.epochs = [dict(epoch) for epoch in state_dict["epochs"]]
        self.sums, self.counts = dict(state_dict["sums"]), dict(state_dict["counts"])
        self.count = int(state_dict["count"])

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Ask where the step that begins is due: each term costs a backward pass more."""
        pl_module.gradients_due = self.every > 0 and (trainer.global_step + 1) % self.every == 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Read them, all at once, and write them down."""
        if not pl_module.gradients_due or not pl_module.gradients:
            return
        names, step = list(pl_module.gradients), trainer.global_step
        numbers = torch.stack([value.double() for value in pl_module.gradients.values()]).tolist()
        row = dict(zip(names, numbers, strict=True))
        if all(map(math.isfinite, numbers)):  # a loss of no finite slope is told by the recorder, with its step
            for name, value in row.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1
            self.count += 1
        if not self.recorder.due(step):
            self.recorder.write(trainer, step, {**row, "epoch": (step - 1) // self.recorder.steps_per_epoch})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the epoch's means, where it had any."""
        if self.count:
            means = {name: value / self.counts[name] for name, value in self.sums.items()}
            self.epochs.append({"epoch": trainer.current_epoch, "count": self.count, **means})
        self.sums, self.counts, self.count = {}, {}, 0
