"""Optimal transport between two sets of features, and maps that stretch no distance.

The first is Wasserstein's distance as it is defined (the primal form); its dual asks for functions of the second kind.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from kd.errors import InputError
from kd.losses import checks


def transport_plan(costs: Tensor, regularisation: float = 0.05, rounds: int = 50) -> Tensor:
    """(N, M): how much of each row goes to each column, for a small sum of what it costs and much entropy.

    All rows weigh the same, and all columns. Each round scales the rows and then the columns of exp(-costs /
    regularisation), in logarithms; so the columns' sums are exact, and those of the rows as good as the rounds. The
    plan is a constant to the gradient.

    Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (2013), algorithm 1.

    Args:
        costs: (N, M), of taking a row to a column.
        regularisation: weight of the entropy, in the unit of the costs; towards 0 the plan is the cheapest.
        rounds: of scaling.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if the costs are no matrix of floats, or empty.

    >>> transport_plan(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), regularisation=1.0)  # odds of e to 1
    tensor([[0.3655, 0.1345],
            [0.1345, 0.3655]])
    """
    regularisation, rounds = checks.positive("regularisation", regularisation), checks.whole("rounds", rounds)
    if not checks.floats(costs) or costs.ndim != 2 or not costs.numel():
        raise InputError(f"costs are {checks.spelt(costs)}; floats of shape (N, M), not empty, were meant")
    with torch.no_grad():
        logs = checks.widened(costs) / -regularisation
        rows, columns = (math.log(count) for count in costs.shape)
        by_column = logs.new_zeros(logs.shape[1])
        for _ in range(rounds):
            by_row = -rows - (logs + by_column).logsumexp(dim=1)
            by_column = -columns - (logs + by_row[:, None]).logsumexp(dim=0)
        return (logs + by_row[:, None] + by_column).exp()


def transport(student: Tensor, teacher: Tensor, regularisation: float = 0.05, rounds: int = 50) -> Tensor:
    """What it costs to take the student's features of a batch to the teacher's, at 1 - cosine for each pair.

    It is the sum of the costs, each times its share in `transport_plan`: at least 0, at most 2. The plan is a constant
    to the gradient, which is exact where the plan is the best. Which of the teacher's features is whose is not asked.

    Chen et al., "Wasserstein Contrastive Representation Distillation" (2021), the local transfer (LCKT).

    Args:
        student: features (N, …).
        teacher: features (N, …), as wide.
        regularisation: weight of the plan's entropy.
        rounds: of scaling.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if one holds no floats or nothing, or they are of two batches or widths.

    >>> transport(torch.eye(2), torch.eye(2).flip(0), regularisation=1.0)  # 1 / (1 + e), whoever is whose
    tensor(0.2689)
    """
    student, teacher = checks.rows(student, teacher)
    if student.shape != teacher.shape:
        raise InputError(
            f"features of width {student.shape[1]} (student) and {teacher.shape[1]} (teacher) have no cosine; "
            "bring both to one width first"
        )
    with checks.exactly(student):
        costs = 1 - F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T
    return (transport_plan(costs, regularisation, rounds) * costs).sum()


def unstretched(width: int, made: int) -> nn.Linear:
    """A linear layer whose weight is divided by its largest singular value, as power iteration has found it so far.

    One more turn is taken at each forward pass in training; the vectors that turn are in the state.

    Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (2018).

    Args:
        width: of what it is given.
        made: of what it makes.

    >>> layer = unstretched(6, 4)
    >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 2)
    1.0
    """
    layer = nn.Linear(width, made)
    spectral_norm(layer)  # in place
    return layer


def within_ball(vectors: Tensor) -> Tensor:
    """Vectors (N, D) longer than 1 brought to length 1, the others as they are: no two are further apart than before.

    >>> within_ball(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.clamp_min(1)
