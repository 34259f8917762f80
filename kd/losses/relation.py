"""Losses on relations: how samples of a batch lie to each other in the student as they do in the teacher.

Features (N, …) are taken as one vector a sample, and each side may have a width of its own unless a function says
otherwise. A batch of one has no relation: the loss is 0, but for the kernel's, which relates a sample to itself.
Products of features are never computed in half precision.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the (N, N) products of features, each row over its L2 norm: sum over N².

    Tung and Mori, "Similarity-Preserving Knowledge Distillation" (2019); HobbitLong/RepDistiller,
    distiller_zoo/SP.py.

    Args:
        student: features (N, …).
        teacher: features (N, …).

    Raises:
        InputError: if one holds no floats or nothing, or they are of two batches.

    >>> sp(torch.eye(2), torch.tensor([[1.0], [1.0]]))  # rows (1, 0) against (1, 1) / √2
    tensor(0.2929)
    """
    student, teacher = checks.rows(student, teacher)
    with checks.exactly(student):
        ours, theirs = (F.normalize(rows @ rows.T, dim=1) for rows in (student, teacher))
    return (ours - theirs).square().mean()


def cc(student: Tensor, teacher: Tensor) -> Tensor:
    """Product of one sample's absolute differences with the next one's, summed over features: mean over N - 1 pairs.

    This is the authors' own form, as they gave it to the reference code; it is not the paper's kernel, which is
    `cc_rbf`.

    Peng et al., "Correlation Congruence for Knowledge Distillation" (2019); HobbitLong/RepDistiller,
    distiller_zoo/CC.py.

    Args:
        student: features (N, …).
        teacher: features (N, …), as wide as the student's.

    Raises:
        InputError: if one holds no floats or nothing, or they are of two batches or two widths.

    >>> cc(torch.zeros(3, 2), torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0]]))  # 1·3 + 2·0 and 3·1 + 0·1
    tensor(3.)
    """
    student, teacher = checks.rows(student, teacher)
    if student.shape != teacher.shape:
        raise InputError(
            f"features of width {student.shape[1]} (student) and {teacher.shape[1]} (teacher) have no difference; "
            "bring both to one width with Embedded"
        )
    apart = (student - teacher).abs()
    return (apart[:-1] * apart[1:]).sum() / max(len(student) - 1, 1)


def cc_rbf(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Distance of the (N, N) Gaussian kernels, each a Taylor series in the product of two samples, over N².

    The kernel is exp(-2 gamma) · Σ_p (2 gamma)^p / p! · (x · y)^p for p from 0 to `order`; the distance is the root of
    the summed squares, not their sum. This is torchdistill's form of the paper's equation.

    Peng et al., "Correlation Congruence for Knowledge Distillation" (2019); yoshitomo-matsubara/torchdistill,
    torchdistill/losses/mid_level.py, CCKDLoss.

    Args:
        student: features (N, …).
        teacher: features (N, …).
        gamma: of the kernel exp(-gamma |x - y|²); above 0.
        order: the highest power; 1 or more.

    Raises:
        BadValue: if gamma or the order is out of its range.
        InputError: if one holds no floats or nothing, or they are of two batches.

    >>> cc_rbf(torch.zeros(1, 2), torch.ones(1, 1), gamma=0.5, order=2)  # (1 + ½) / e
    tensor(0.5518)
    """
    gamma, order = checks.positive("gamma", gamma), _order(order)
    student, teacher = checks.rows(student, teacher)
    ours, theirs = (_kernel(rows, gamma, order) for rows in (student, teacher))
    return torch.dist(ours, theirs) / len(student) ** 2


def rkd(student: Tensor, teacher: Tensor, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Smooth L1 of distances over their mean, and of the cosines of the angles between any three samples.

    Each is a mean over all elements, the zeros of a sample with itself included; the mean distance leaves them out.
    Squared distances are at least 1e-12. A part of weight 0 is not computed.

    Park et al., "Relational Knowledge Distillation" (2019); lenscloth/RKD, metric/loss.py;
    megvii-research/mdistiller, mdistiller/distillers/RKD.py.

    Args:
        student: features (N, …).
        teacher: features (N, …).
        distance: weight of the distances.
        angle: weight of the angles; its N³ cosines come from N² · D differences.

    Raises:
        BadValue: if a weight is out of its range.
        InputError: if one holds no floats or nothing, or they are of two batches.

    >>> triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    >>> rkd(triangle, 2 * triangle + 1), rkd(triangle, triangle.flip(0)) > 0
    (tensor(0.), tensor(True))
    """
    distance, angle = checks.within("distance", distance), checks.within("angle", angle)
    student, teacher = checks.rows(student, teacher)
    ours, theirs = (rows[None] - rows[:, None] for rows in (student, teacher))
    total = student.new_zeros(())
    if distance:
        total = total + distance * F.smooth_l1_loss(_distances(ours), _distances(theirs))
    if angle:
        total = total + angle * F.smooth_l1_loss(_cosines(ours), _cosines(theirs))
    return total


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each sample's similarities to all, as probabilities: mean over all N² elements.

    Similarities are cosines brought to 0 … 1 and divided by their row's sum; 1e-7 is added to norms and in the log.

    Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (2018);
    HobbitLong/RepDistiller, distiller_zoo/PKT.py.

    Args:
        student: features (N, …).
        teacher: features (N, …).

    Raises:
        InputError: if one holds no floats or nothing, or they are of two batches.

    >>> pkt(torch.eye(2), torch.tensor([[1.0], [1.0]]))  # (⅔, ⅓) against (½, ½), over both rows and two elements
    tensor(0.0294)
    """
    student, teacher = checks.rows(student, teacher)
    ours, theirs = _similarities(student), _similarities(teacher)
    return (theirs * ((theirs + 1e-7) / (ours + 1e-7)).log()).mean()


class SP(nn.Module):
    """`sp` as a term's loss."""

    COMPARES_SAMPLES = True

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for features (N, …) of both."""
        return sp(student, teacher)


class CC(nn.Module):
    """`cc` as a term's loss."""

    COMPARES_SAMPLES = True

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for features (N, …) of both, equally wide."""
        return cc(student, teacher)


class CCRBF(nn.Module):
    """`cc_rbf` as a term's loss."""

    COMPARES_SAMPLES = True

    extra_repr = checks.shown("gamma", "order")

    def __init__(self, gamma: float = 0.4, order: int = 2) -> None:
        super().__init__()
        self.gamma, self.order = checks.positive("gamma", gamma), _order(order)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for features (N, …) of both."""
        return cc_rbf(student, teacher, self.gamma, self.order)


class RKD(nn.Module):
    """`rkd` as a term's loss."""

    COMPARES_SAMPLES = True

    extra_repr = checks.shown("distance", "angle")

    def __init__(self, distance: float = 25.0, angle: float = 50.0) -> None:
        super().__init__()
        self.distance, self.angle = checks.within("distance", distance), checks.within("angle", angle)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for features (N, …) of both."""
        return rkd(student, teacher, self.distance, self.angle)


class PKT(nn.Module):
    """`pkt` as a term's loss."""

    COMPARES_SAMPLES = True

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for features (N, …) of both."""
        return pkt(student, teacher)


class Embedded(nn.Module):
    """Any loss on features, given a trained linear embedding of the student's and one of the teacher's.

    As RepDistiller and torchdistill do for correlation congruence. `bind` makes both layers from the shapes; they are
    trained and checkpointed with the objective and never shipped with the student.

    Args:
        loss: called as `loss(student=…, teacher=…)`.
        width: of both embeddings.

    >>> loss = Embedded(CC(), width=4)
    >>> loss.bind((8, 16, 7, 7), (8, 32))
    >>> loss.student, loss.teacher
    (Linear(in_features=784, out_features=4, bias=True), Linear(in_features=32, out_features=4, bias=True))
    """

    student: nn.Module | None
    teacher: nn.Module | None
    extra_repr = checks.shown("width")

    def __init__(self, loss: nn.Module, width: int = 128) -> None:
        super().__init__()
        if not (isinstance(width, int) and not isinstance(width, bool) and width >= 1):
            raise checks.BadValue(f"width is {width!r}; it must be a whole number of 1 or more")
        self.loss, self.width = loss, width
        self.register_module("student", None)
        self.register_module("teacher", None)

    def bind(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
        """Make both embeddings, drawing their weights from the global generator; a second time it does nothing."""
        if self.student is None:
            self.student = nn.Linear(math.prod(student_shape[1:]), self.width)
            self.teacher = nn.Linear(math.prod(teacher_shape[1:]), self.width)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for features as bound, any batch size.

        Raises:
            InputError: if `bind` was not called, or the features are others.
        """
        embedded = {}
        for name, layer, rows in (("student", self.student, student), ("teacher", self.teacher, teacher)):
            if not isinstance(layer, nn.Linear):
                raise InputError("an embedding is used before it knows its shapes; call bind(student, teacher) first")
            if not checks.floats(rows) or rows.ndim < 2 or math.prod(rows.shape[1:]) != layer.in_features:
                raise InputError(
                    f"the {name}'s features are {checks.spelt(rows)}; this embedding was bound to "
                    f"{layer.in_features} of them a sample, in floats"
                )
            embedded[name] = layer(rows.flatten(1))
        found: Tensor = self.loss(**embedded)
        return found


def _order(value: int) -> int:
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise checks.BadValue(f"order is {value!r}; it must be a whole number of 1 or more")
    return value


def _kernel(rows: Tensor, gamma: float, order: int) -> Tensor:
    with checks.exactly(rows):
        product = rows @ rows.T
    series = torch.ones_like(product)
    for p in range(1, order + 1):
        series = series + (2 * gamma) ** p / math.factorial(p) * product**p
    return math.exp(-2 * gamma) * series


def _distances(differences: Tensor) -> Tensor:
    """(N, N) distances over the mean of those between two samples."""
    count = len(differences)
    itself = torch.eye(count, dtype=torch.bool, device=differences.device)
    found = differences.square().sum(dim=2).clamp(min=1e-12).sqrt().masked_fill(itself, 0.0)
    return found * (count * max(count - 1, 1)) / found.sum().clamp(min=1e-12)


def _cosines(differences: Tensor) -> Tensor:
    """(N, N, N) cosines of the angle at the first sample between the other two."""
    directions = F.normalize(differences, dim=2)
    with checks.exactly(directions):
        return directions @ directions.transpose(1, 2)


def _similarities(rows: Tensor) -> Tensor:
    """(N, N) cosines brought to 0 … 1, each row over its sum."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = rows / (norms + 1e-7)
    with checks.exactly(rows):
        similar = (rows @ rows.T + 1) / 2
    return similar / similar.sum(dim=1, keepdim=True)
