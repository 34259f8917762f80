"""Losses on maps without trained parts: where a layer looks, which of its channels fire together, and how strongly.

Maps (N, C, H, W) of student and teacher may differ in width unless a function says otherwise; where they differ in
height or width, the larger is averaged down to the smaller. The modules take one layer of each or a list of layers in
their order, and add the layers up. Those that compare `POSITIONS` find nothing in maps of one.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks, layers
from kd.losses.layers import Layers, Shapes


def at(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the attention maps, each over its L2 norm: mean over samples and positions.

    A sample's attention is the mean over channels of the squared activations. This is the authors' code; the norm of
    their paper, without the square, is `at_norm`.

    Zagoruyko and Komodakis, "Paying More Attention to Attention" (2017); szagoruyko/attention-transfer, utils.py.

    Args:
        student: maps (N, C, H, W).
        teacher: maps (N, D, H, W).

    Raises:
        InputError: if one is no map or empty, or they are of two batches.

    >>> at(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]]))  # (1, 0) against (0, 1)
    tensor(1.)
    """
    ours, theirs = _attention(student, teacher)
    return (ours - theirs).square().mean()


def at_norm(student: Tensor, teacher: Tensor) -> Tensor:
    """L2 norm of the difference of the attention maps, each over its own L2 norm: mean over samples.

    Zagoruyko and Komodakis, "Paying More Attention to Attention" (2017), equation 2; torchdistill,
    losses/mid_level.py, ATLoss in its mode `paper`.

    Args:
        student: maps (N, C, H, W).
        teacher: maps (N, D, H, W).

    Raises:
        InputError: if one is no map or empty, or they are of two batches.

    >>> at_norm(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]]))
    tensor(1.4142)
    """
    ours, theirs = _attention(student, teacher)
    norms: Tensor = torch.linalg.vector_norm(ours - theirs, dim=1)
    return norms.mean()


def ft(student: Tensor, teacher: Tensor) -> Tensor:
    """Absolute difference of the attention maps, each over its L2 norm: mean over samples and positions.

    The factor of factor transfer where nothing is trained for it; `ParaphrasedFT` trains both factors.

    Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer" (2018);
    HobbitLong/RepDistiller, distiller_zoo/FT.py.

    Args:
        student: maps (N, C, H, W).
        teacher: maps (N, D, H, W).

    Raises:
        InputError: if one is no map or empty, or they are of two batches.

    >>> ft(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]]))
    tensor(1.)
    """
    ours, theirs = _attention(student, teacher)
    return (ours - theirs).abs().mean()


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Maximum mean discrepancy of the channels' maps over their L2 norms, with the kernel (x · y)²: mean over samples.

    Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer" (2017);
    HobbitLong/RepDistiller, distiller_zoo/NST.py.

    Args:
        student: maps (N, C, H, W).
        teacher: maps (N, D, H, W).

    Raises:
        InputError: if one is no map or empty, or they are of two batches.

    >>> nst(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]]))  # 1 + 1 - 2·0
    tensor(2.)
    """
    ours, theirs = (F.normalize(checks.widened(m).flatten(2), dim=2) for m in layers.maps(student, teacher))
    with checks.exactly(ours):
        kernels = [(a @ b.mT).square().mean() for a, b in ((theirs, theirs), (ours, ours), (ours, theirs))]
    return kernels[0] + kernels[1] - 2 * kernels[2]


def cwd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of each channel's distribution over positions, times temperature²: mean over N · C.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction" (2021); open-mmlab/mmrazor,
    mmrazor/models/losses/cwd.py.

    Args:
        student: maps (N, C, H, W).
        teacher: maps of the same width.
        temperature: divides both maps; above 0.

    Raises:
        BadValue: if the temperature is not a finite number above 0.
        InputError: if one is no map or empty, or batch or width differ.

    >>> cwd(torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[2.0, 0.0]]]]))
    tensor(0.3278)
    """
    temperature = checks.positive("temperature", temperature)
    student, teacher = (
        F.log_softmax(checks.widened(m).flatten(2) / temperature, dim=2)
        for m in layers.maps(student, teacher, widths=False)
    )
    count = student.shape[0] * student.shape[1]
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2 / count


def catkd(student: Tensor, teacher: Tensor, grid: int = 2) -> Tensor:
    """Squared difference of class activation maps, averaged to a small grid, over their L2 norms: mean of all elements.

    The maps are what a 1x1 convolution as the classifier gives, one a class, before they are pooled to logits.

    Guo et al., "Class Attention Transfer Based Knowledge Distillation" (2023); GzyAftermath/CAT-KD,
    mdistiller/distillers/CAT_KD.py.

    Args:
        student: maps (N, C, H, W), one a class.
        teacher: maps of the same classes.
        grid: height and width that both are averaged to; 1 or more.

    Raises:
        BadValue: if the grid is no whole number of 1 or more.
        InputError: if one is no map or empty, or batch or classes differ.

    >>> catkd(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]]))
    tensor(1.)
    """
    checks.whole("grid", grid)
    common = layers.maps(student, teacher, widths=False)[0].shape
    size = min(grid, common[2]), min(grid, common[3])
    pooled = []
    for m in (student, teacher):
        pooled.append(F.normalize(layers.averaged(checks.widened(m), size).flatten(2), dim=2))
    return F.mse_loss(pooled[0], pooled[1])


class AT(nn.Module):
    """`at` as a term's loss, summed over layers."""

    READS = "maps"
    POSITIONS = True

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for maps (N, C, H, W) of both, or lists of them."""
        return layers.summed([at(s, t) for s, t in layers.pairs(student, teacher)])


class ATNorm(nn.Module):
    """`at_norm` as a term's loss, summed over layers."""

    READS = "maps"
    POSITIONS = True

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for maps (N, C, H, W) of both, or lists of them."""
        return layers.summed([at_norm(s, t) for s, t in layers.pairs(student, teacher)])


class FT(nn.Module):
    """`ft` as a term's loss, summed over layers."""

    READS = "maps"
    POSITIONS = True

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for maps (N, C, H, W) of both, or lists of them."""
        return layers.summed([ft(s, t) for s, t in layers.pairs(student, teacher)])


class NST(nn.Module):
    """`nst` as a term's loss, summed over layers."""

    READS = "maps"
    POSITIONS = True

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for maps (N, C, H, W) of both, or lists of them."""
        return layers.summed([nst(s, t) for s, t in layers.pairs(student, teacher)])


class CWD(nn.Module):
    """`cwd` as a term's loss, summed over layers, behind a trained 1x1 convolution where widths differ.

    >>> loss = CWD(temperature=4)
    >>> loss.bind((8, 3, 4, 4), (8, 5, 4, 4))
    >>> loss(student=torch.rand(8, 3, 4, 4), teacher=torch.rand(8, 5, 4, 4)).shape
    torch.Size([])
    """

    READS = "maps"
    POSITIONS = True

    extra_repr = checks.shown("temperature")

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = checks.positive("temperature", temperature)
        self.connectors = layers.Connectors("cwd", layers.between)

    def bind(self, student_shape: Shapes, teacher_shape: Shapes) -> None:
        """Make the connectors, as `layers.Connectors` does."""
        self.connectors.bind(student_shape, teacher_shape)

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for maps as bound, any batch size."""
        found = self.connectors(student, teacher)
        return layers.summed([cwd(s, t, self.temperature) for s, t in found])


class CATKD(nn.Module):
    """`catkd` as a term's loss."""

    READS = "maps"
    POSITIONS = True

    extra_repr = checks.shown("grid")

    def __init__(self, grid: int = 2) -> None:
        super().__init__()
        self.grid = checks.whole("grid", grid)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for maps (N, C, H, W) of both, one a class."""
        return catkd(student, teacher, self.grid)


class ParaphrasedFT(nn.Module):
    """Factor transfer: what a translator makes of the student's maps against a paraphraser's view of the teacher's.

    Factors are flattened and over their L2 norm; their difference is absolute, its mean over all elements. The
    paraphraser learns only to rebuild the teacher's maps through its factor, by the mean squared error, which is part
    of the loss; the paper trains it before the student, here both learn together. `bind` makes all three;
    they are checkpointed with the objective and never shipped with the student.

    Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer" (2018);
    HobbitLong/RepDistiller, models/util.py, Paraphraser and Translator.

    Args:
        rate: channels of the factor over channels of the teacher's maps.
        rebuild: weight of the paraphraser's own error.

    >>> loss = ParaphrasedFT(rate=0.5)
    >>> loss.bind((8, 3, 4, 4), (8, 6, 4, 4))
    >>> loss(student=torch.rand(8, 3, 4, 4), teacher=torch.rand(8, 6, 4, 4)).shape
    torch.Size([])
    """

    READS = "maps"

    translator: nn.Module | None
    paraphraser: nn.Module | None
    rebuilder: nn.Module | None
    extra_repr = checks.shown("rate", "rebuild")

    def __init__(self, rate: float = 0.5, rebuild: float = 1.0) -> None:
        super().__init__()
        self.rate, self.rebuild = checks.positive("rate", rate), checks.within("rebuild", rebuild)
        for name in ("translator", "paraphraser", "rebuilder"):
            self.register_module(name, None)
        self._widths = 0, 0

    def bind(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
        """Make the three nets, drawing their weights from the global generator; a second time it does nothing.

        Raises:
            InputError: if a layer gives no maps.
        """
        if self.translator is not None:
            return
        if len(student_shape) != 4 or len(teacher_shape) != 4:
            raise InputError(
                f"factor transfer cannot lead from features of shape {tuple(student_shape)} to {tuple(teacher_shape)}; "
                "choose two layers that both give maps (N, C, H, W)"
            )
        ours, theirs = student_shape[1], teacher_shape[1]
        factor = max(round(self.rate * theirs), 1)
        self._widths = ours, theirs
        self.translator = _stack(nn.Conv2d, [ours, ours, factor, factor], norm=True)
        self.paraphraser = _stack(nn.Conv2d, [theirs, theirs, factor, factor], norm=False)
        self.rebuilder = _stack(nn.ConvTranspose2d, [factor, factor, theirs, theirs], norm=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for maps as bound, any batch size.

        Raises:
            InputError: if `bind` was not called, or the maps are others.
        """
        if self.translator is None or self.paraphraser is None or self.rebuilder is None:
            raise InputError("factor transfer is used before it knows its shapes; call bind(student, teacher) first")
        student, teacher = layers.maps(student, teacher)
        for side, features, width in zip(("student", "teacher"), (student, teacher), self._widths, strict=True):
            if features.shape[1] != width:
                raise InputError(f"the {side}'s maps have {features.shape[1]} channels; they were bound to {width}")
        factor = self.paraphraser(teacher)
        rebuilt = F.mse_loss(checks.widened(self.rebuilder(factor)), checks.widened(teacher))
        translated = layers.through(self.translator, student)
        ours, theirs = (F.normalize(checks.widened(m).flatten(1), dim=1) for m in (translated, factor.detach()))
        return F.l1_loss(ours, theirs) + self.rebuild * rebuilt


def _attention(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H · W) of both, each row over its L2 norm."""
    ours, theirs = (
        F.normalize(checks.widened(m).square().mean(dim=1).flatten(1), dim=1) for m in layers.maps(student, teacher)
    )
    return ours, theirs


def _stack(kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], widths: list[int], norm: bool) -> nn.Sequential:
    """3x3 convolutions from width to width, each with a leaky ReLU, and batch norm where asked."""
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [kind(before, after, 3, 1, 1), *([nn.BatchNorm2d(after)] if norm else []), nn.LeakyReLU(0.1)]
    return nn.Sequential(*parts)
