"""Losses on features: a layer of the student, through a part that is trained, learns to look like one of the teacher.

Hints, after Romero et al., "FitNets: Hints for Thin Deep Nets" (2015), have the projection and the reduction of the
common reference code (mdistiller's FitNet): 1x1 convolution, batch norm and ReLU, then the mean over all elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks, layers
from kd.losses.layers import Layers, Shapes, averaged

_FLOOR = 1e-5  # of a trained variance


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all elements of the squared difference of two features.

    Args:
        student: features of any shape, already projected to the teacher's.
        teacher: features of the same shape.

    Raises:
        InputError: if the shapes differ or hold nothing.

    >>> hint(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(2.)
    """
    _same(student, teacher)
    return F.mse_loss(checks.widened(student), checks.widened(teacher))


def vid(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Half of (mean - teacher)² / variance + log variance: mean over all elements.

    It is the negative log-likelihood of the teacher's maps under a Gaussian of each channel, less a constant.

    Ahn et al., "Variational Information Distillation for Knowledge Transfer" (2019); HobbitLong/RepDistiller,
    distiller_zoo/VID.py.

    Args:
        mean: maps (N, D, H, W), what a regressor expects of the teacher.
        teacher: maps of the same shape.
        variance: (D,), above 0.

    Raises:
        InputError: if shapes differ or hold nothing.

    >>> vid(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0), torch.ones(1))
    tensor(2.)
    """
    mean, teacher = checks.widened(mean), checks.widened(teacher)
    _same(mean, teacher)
    if mean.ndim != 4 or variance.shape != mean.shape[1:2]:
        raise InputError(
            f"maps of shape {tuple(mean.shape)} and variances of shape {tuple(variance.shape)} do not fit; one "
            "variance a channel was meant"
        )
    spread = variance.to(mean.dtype)[:, None, None]
    return ((mean - teacher).square() / spread + spread.log()).mean() / 2


def mgd(rebuilt: Tensor, teacher: Tensor) -> Tensor:
    """Sum of the squared differences of what was rebuilt and the teacher's maps: mean over samples.

    Yang et al., "Masked Generative Distillation" (2022); open-mmlab/mmrazor, mmrazor/models/losses/mgd_loss.py, there
    with its weight 2e-5 inside.

    Args:
        rebuilt: maps (N, D, H, W).
        teacher: maps of the same shape.

    Raises:
        InputError: if shapes differ or hold nothing.

    >>> mgd(torch.zeros(2, 1, 1, 2), torch.ones(2, 1, 1, 2))
    tensor(2.)
    """
    _same(rebuilt, teacher)
    return F.mse_loss(checks.widened(rebuilt), checks.widened(teacher), reduction="sum") / len(rebuilt)


class Hint(nn.Module):
    """`hint` behind a trained projection of the student's features to the teacher's width.

    Maps (N, C, H, W) go through 1x1 convolution, batch norm and ReLU, so the teacher's layer should be one after its
    own ReLU; vectors (N, D) and tokens (N, L, D) through a linear layer. Where two maps differ in height or width, the
    larger is averaged down to the smaller. `bind` makes the projection from the shapes of both; it is trained and
    checkpointed with the objective and never shipped with the student. Even equal widths are projected: the same
    features in another basis are not an error of the student's.

    >>> loss = Hint()
    >>> loss.bind((8, 16, 14, 14), (8, 64, 7, 7))
    >>> loss.projection[0]
    Conv2d(16, 64, kernel_size=(1, 1), stride=(1, 1), bias=False)
    >>> loss(student=torch.rand(8, 16, 14, 14), teacher=torch.rand(8, 64, 7, 7)).shape
    torch.Size([])
    """

    READS = "alike"

    projection: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("projection", None)
        self._widths: tuple[int, int, int] | None = None

    def bind(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        """Make the projection, drawing its weights from the global generator; a second time it only checks.

        Args:
            student_shape: of the student's features, batch first.
            teacher_shape: of the teacher's features, batch first.

        Raises:
            InputError: if no projection leads from the one to the other.
        """
        student, teacher = tuple(student_shape), tuple(teacher_shape)
        if len(student) != len(teacher) or len(student) not in (2, 3, 4):
            raise InputError(
                f"a hint cannot lead from features of shape {student} to {teacher}; choose two layers that both give "
                "maps (N, C, H, W), tokens (N, L, D) or vectors (N, D)"
            )
        if len(student) == 3 and student[1] != teacher[1]:
            raise InputError(
                f"a hint cannot lead from {student[1]} tokens to {teacher[1]}; choose layers with as many of them"
            )
        axis = 1 if len(student) == 4 else -1
        widths = (len(student), student[axis], teacher[axis])
        if self._widths not in (None, widths):
            raise InputError(f"this hint is already bound to other shapes than {student} and {teacher}; make a new one")
        if self.projection is None:
            self.projection = _projection(*widths)
            self._widths = widths

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for features of the shapes that `bind` was given, any batch size.

        Raises:
            InputError: if `bind` was not called, or the features are others.
        """
        if self._widths is None or self.projection is None:
            raise InputError("a hint is used before it knows its shapes; call bind(student_shape, teacher_shape) first")
        rank, width, _ = self._widths
        fits = checks.floats(student) and student.ndim == rank and student.numel()
        if not fits or student.shape[1 if rank == 4 else -1] != width:
            raise InputError(
                f"the student's features are {checks.spelt(student)}; this hint was bound to {rank} axes "
                f"and width {width}, of floats"
            )
        if rank == 4 and checks.floats(teacher) and teacher.ndim == 4:
            grid = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
            student, teacher = averaged(student, grid), averaged(teacher, grid)
        return hint(layers.through(self.projection, student), teacher)


class VID(nn.Module):
    """`vid` behind a trained regressor of three 1x1 convolutions, with a trained variance for each channel.

    The variance is softplus(scale) + 1e-5; `scale` is a parameter like the regressor's: optimised, checkpointed and
    never shipped. Several layers are added up.

    Args:
        variance: where it begins; above 1e-5.

    >>> loss = VID()
    >>> loss.bind((8, 3, 4, 4), (8, 5, 4, 4))
    >>> loss.variances()[0].detach()
    tensor([5.0000, 5.0000, 5.0000, 5.0000, 5.0000])
    """

    READS = "maps"

    extra_repr = checks.shown("variance")

    def __init__(self, variance: float = 5.0) -> None:
        super().__init__()
        self.variance = checks.positive("variance", variance)
        if self.variance <= _FLOOR:
            raise checks.BadValue(f"variance is {variance!r}; it must be above its floor, {_FLOOR:g}")
        self.connectors = layers.Connectors("vid", _regressor)
        self.scales = nn.ParameterList()

    def bind(self, student_shape: Shapes, teacher_shape: Shapes) -> None:
        """Make regressors and variances, as `layers.Connectors` does."""
        if not len(self.connectors):
            self.connectors.bind(student_shape, teacher_shape)
            begin = math.log(math.expm1(self.variance - _FLOOR))
            for _, shape in layers.shapes(student_shape, teacher_shape):
                self.scales.append(nn.Parameter(torch.full((shape[1],), begin)))

    def variances(self) -> list[Tensor]:
        """What each layer's variances are now: (D,)."""
        return [F.softplus(checks.widened(scale)) + _FLOOR for scale in self.scales]

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for maps as bound, any batch size."""
        found = self.connectors(student, teacher)
        return layers.summed([vid(s, t, v) for (s, t), v in zip(found, self.variances(), strict=True)])


class MGD(nn.Module):
    """`mgd` of what a trained generator rebuilds from the student's maps with a share of the positions left out.

    A 1x1 convolution leads to the teacher's width where it differs; the generator is two 3x3 convolutions with a ReLU
    between. Which positions are left out is drawn for each sample from the global generator of the device. Several
    layers are added up.

    Yang et al., "Masked Generative Distillation" (2022); open-mmlab/mmrazor,
    mmrazor/models/architectures/connectors/mgd_connector.py.

    Args:
        masked: share of the positions that are left out, from 0 to 1.

    >>> loss = MGD()
    >>> loss.bind((8, 3, 4, 4), (8, 5, 4, 4))
    >>> loss(student=torch.rand(8, 3, 4, 4), teacher=torch.rand(8, 5, 4, 4)).shape
    torch.Size([])
    """

    READS = "maps"

    generators: nn.ModuleList | None
    extra_repr = checks.shown("masked")

    def __init__(self, masked: float = 0.65) -> None:
        super().__init__()
        self.masked = checks.within("masked", masked, high=1.0)
        self.connectors = layers.Connectors("mgd", _aligned)
        self.register_module("generators", None)

    def bind(self, student_shape: Shapes, teacher_shape: Shapes) -> None:
        """Make connectors and generators, as `layers.Connectors` does."""
        if self.generators is None:
            self.connectors.bind(student_shape, teacher_shape)
            self.generators = nn.ModuleList(
                nn.Sequential(nn.Conv2d(t[1], t[1], 3, padding=1), nn.ReLU(), nn.Conv2d(t[1], t[1], 3, padding=1))
                for _, t in layers.shapes(student_shape, teacher_shape)
            )

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for maps as bound, any batch size."""
        found = self.connectors(student, teacher)
        assert self.generators is not None
        parts = []
        for generator, (maps, theirs) in zip(self.generators, found, strict=True):
            left = torch.rand(len(maps), 1, *maps.shape[2:], device=maps.device) <= 1 - self.masked
            parts.append(mgd(generator(maps * left), theirs))
        return layers.summed(parts)


def _regressor(student: int, teacher: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(student, teacher, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher, teacher, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher, teacher, 1, bias=False),
    )


def _aligned(student: int, teacher: int) -> nn.Module | None:
    return None if student == teacher else nn.Conv2d(student, teacher, 1)


def _projection(rank: int, student: int, teacher: int) -> nn.Module:
    if rank < 4:
        return nn.Linear(student, teacher)
    return nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher), nn.ReLU())


def _same(student: Tensor, teacher: Tensor) -> None:
    both = checks.floats(student) and checks.floats(teacher)
    if not both or student.shape != teacher.shape or not student.numel():
        raise InputError(
            f"features that are {checks.spelt(student)} (student) and {checks.spelt(teacher)} (teacher) cannot be "
            "compared; they must be floats of the same shape and not empty"
        )
