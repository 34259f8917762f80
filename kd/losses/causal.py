"""Losses that intervene: a student is to answer as its teacher does when a part of what both computed is exchanged.

What is exchanged, a term says in its `under` (`kd.interchange`); these compare what the networks then say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks
from kd.losses.layers import each_shape, listed
from kd.losses.logits import soft_target_kl


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the cosine of two hidden states: mean over samples, or over all tokens.

    Sanh et al., "DistilBERT" (2019), and Wu et al. (2022), as torch's CosineEmbeddingLoss with target 1.

    Args:
        student: (N, D) or (N, L, D).
        teacher: of the same shape.

    Raises:
        InputError: if one is of another shape or holds nothing.

    >>> import torch
    >>> hidden_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    tensor(0.5000)
    """
    for name, values in (("student", student), ("teacher", teacher)):
        if not checks.floats(values) or values.ndim not in (2, 3) or not values.numel():
            raise InputError(
                f"the {name}'s hidden states are {checks.spelt(values)}; vectors (N, D) or tokens (N, L, D) were "
                "meant: :pooled makes a vector of maps"
            )
    if student.shape != teacher.shape:
        raise InputError(f"hidden states of shapes {tuple(student.shape)} and {tuple(teacher.shape)} have no cosine")
    student, teacher = checks.widened(student), checks.widened(teacher)
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


class DIITO(nn.Module):
    """KL on what both networks say under an interchange, and, where it weighs, `hidden_cosine` of a hidden state.

    A term of this loss names an `Interchange` as its `under`. Hidden states of two widths are bridged by a linear
    layer, which is trained and checkpointed with the objective and never shipped.

    Wu et al., "Causal Distillation for Language Models" (2022); frankaging/Causal-Distill, distillation/
    causal_distiller.py.

    Args:
        temperature: of the KL; its square is a factor.
        cosine: weight of the hidden state's part.

    Raises:
        BadValue: if one is out of its range.

    >>> import torch
    >>> logits, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> DIITO(temperature=1.0)(logits, other)
    tensor(0.3278)
    >>> DIITO(temperature=1.0, cosine=0.5)([logits, torch.ones(1, 2)], [other, -torch.ones(1, 2)])
    tensor(1.3278)
    """

    connector: nn.Module | None
    extra_repr = checks.shown("temperature", "cosine")

    def __init__(self, temperature: float = 2.0, cosine: float = 0.0) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)
        self.cosine = checks.within("cosine", cosine)
        self.register_module("connector", None)

    def bind(self, student_shape: Any, teacher_shape: Any) -> None:
        """Make the layer between hidden states of two widths, drawn from the global generator."""
        ours, theirs = each_shape(student_shape), each_shape(teacher_shape)
        self._counted(len(ours), len(theirs))
        if self.cosine and ours[1][-1] != theirs[1][-1] and self.connector is None:
            self.connector = nn.Linear(ours[1][-1], theirs[1][-1])

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar for logits (N, C) of both; with `cosine`, for a list of logits and a hidden state.

        Raises:
            InputError: if a hidden state is missing, or asked for by nothing.
        """
        ours, theirs = listed(student), listed(teacher)
        self._counted(len(ours), len(theirs))
        total = soft_target_kl(ours[0], theirs[0], self.temperature)
        if not self.cosine:
            return total
        hidden = ours[1] if self.connector is None else self.connector(ours[1])
        return total + self.cosine * hidden_cosine(hidden, theirs[1])

    def _counted(self, ours: int, theirs: int) -> None:
        meant = 2 if self.cosine else 1
        if (ours, theirs) != (meant, meant):
            views = "[student.logits,student.embedding]" if self.cosine else "student.logits"
            raise InputError(
                f"DIITO at cosine={self.cosine:g} compares {meant} view{'s' if meant > 1 else ''} of each network, and "
                f"is given {ours} and {theirs}; name {views}, and the teacher's likewise"
            )
