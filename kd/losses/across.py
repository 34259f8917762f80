"""Losses across layers: a layer of the teacher's teaches more than the student's layer that lies beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks, layers
from kd.losses.layers import Layers, Shapes
from kd.losses.rising import risen


def hcl(student: Layers, teacher: Layers) -> Tensor:
    """Mean squared difference of the maps, and of them on grids of 4, 2 and 1: weighed mean, summed over layers.

    The maps weigh 1, each smaller grid half of the one before; a grid as high as the maps or higher is left out.

    Chen et al., "Distilling Knowledge via Knowledge Review" (2021); megvii-research/mdistiller,
    mdistiller/distillers/ReviewKD.py.

    Args:
        student: maps (N, C, H, W), or a list of them.
        teacher: maps of the same shapes.

    Raises:
        InputError: if one is no map or empty, shapes differ, or one side has more layers.

    >>> hcl(torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 1, 2))
    tensor(0.5000)
    """
    total = []
    for s, t in layers.pairs(student, teacher):
        ours, theirs = (checks.widened(m) for m in layers.maps(s, t, widths=False))
        height, width = ours.shape[2:]
        value, weight = F.mse_loss(ours, theirs), 1.0
        weights = weight
        for grid in (4, 2, 1):
            if grid >= height:
                continue
            weight /= 2
            size = grid, min(grid, width)
            value = value + weight * F.mse_loss(layers.averaged(ours, size), layers.averaged(theirs, size))
            weights += weight
        total.append(value / weights)
    return layers.summed(total)


class ReviewKD(nn.Module):
    """`hcl` of the teacher's layers and what attention fuses, from the deepest up, of the student's.

    From the deepest layer on, a layer's maps go through a 1x1 convolution; those fused so far are brought to their
    grid, two attention maps weigh both, and a 3x3 convolution leads to the teacher's width. Layers are named from the
    shallowest to the deepest; the authors' last is the pooled vector before the classifier, taken as maps of one
    position. Its weight grows linearly over the first `warmup` epochs.

    Chen et al., "Distilling Knowledge via Knowledge Review" (2021); megvii-research/mdistiller,
    mdistiller/distillers/ReviewKD.py.

    Args:
        warmup: epochs; 0 for none.
        width: of the fused maps, at most; the deepest layer's if that is less.

    >>> loss = ReviewKD()
    >>> loss.bind([(8, 3, 4, 4), (8, 6, 2, 2)], [(8, 5, 4, 4), (8, 7, 2, 2)])
    >>> student = [torch.rand(8, 3, 4, 4), torch.rand(8, 6, 2, 2)]
    >>> loss(student=student, teacher=[torch.rand(8, 5, 4, 4), torch.rand(8, 7, 2, 2)]).shape
    torch.Size([])
    """

    READS = "maps"
    GRID = "teacher"  # the student's maps are brought to the teacher's grid

    fusions: nn.ModuleList | None
    extra_repr = checks.shown("warmup", "width")

    def __init__(self, warmup: float = 20, width: int = 512) -> None:
        super().__init__()
        self.warmup, self.width = checks.within("warmup", warmup), checks.whole("width", width)
        self.factor = 1.0
        self.register_module("fusions", None)

    def at(self, epoch: float, epochs: int) -> None:
        """Set the weight for where training stands: `epoch` epochs are done."""
        self.factor = risen(epoch, self.warmup)

    def bind(self, student_shape: Shapes, teacher_shape: Shapes) -> None:
        """Make the fusions, drawing their weights from the global generator; a second time it does nothing.

        Raises:
            InputError: if a layer gives neither maps nor vectors, or one side has more layers.
        """
        found = layers.shapes(student_shape, teacher_shape)
        for ours, theirs in found:
            if not {len(ours), len(theirs)} <= {2, 4}:
                raise InputError(
                    f"reviewkd cannot lead from features of shape {ours} to {theirs}; choose layers that give maps "
                    "(N, C, H, W), and vectors (N, D) at the end"
                )
        if self.fusions is not None:
            return
        middle = min(self.width, found[-1][0][1])
        made = []
        for place, (ours, theirs) in enumerate(found):
            squeeze = nn.Conv2d(ours[1], middle, 1, bias=False)
            spread = nn.Conv2d(middle, theirs[1], 3, padding=1, bias=False)
            for convolution in (squeeze, spread):
                nn.init.kaiming_uniform_(convolution.weight, a=1)
            parts: dict[str, nn.Module] = {
                "squeeze": nn.Sequential(squeeze, nn.BatchNorm2d(middle)),
                "spread": nn.Sequential(spread, nn.BatchNorm2d(theirs[1])),
            }
            if place < len(found) - 1:
                parts["attend"] = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
            made.append(nn.ModuleDict(parts))
        self.fusions = nn.ModuleList(made)

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for lists of features as bound, any batch size.

        Raises:
            InputError: if `bind` was not called, or the features are others.
        """
        found = [(_positions(s), _positions(t)) for s, t in layers.pairs(student, teacher)]
        if self.fusions is None or len(self.fusions) != len(found):
            raise InputError("reviewkd is given other layers than it was bound to; call bind(student, teacher) first")
        for s, t in found:
            layers.maps(s, t)
        fused: list[Tensor] = []
        carried: Tensor | None = None
        for parts, (s, t) in reversed(list(zip(self.fusions, found, strict=True))):
            assert isinstance(parts, nn.ModuleDict)
            if s.shape[1] != parts["squeeze"][0].in_channels:  # type: ignore[index]
                raise InputError(f"the student's maps have {s.shape[1]} channels, and reviewkd was bound to others")
            maps = layers.through(parts["squeeze"], s)
            if carried is not None:
                carried = _nearest(carried, maps)
                shares = parts["attend"](torch.cat([maps, carried], dim=1))
                maps = maps * shares[:, :1] + carried * shares[:, 1:]
            carried = _nearest(maps, t)
            fused.insert(0, layers.through(parts["spread"], carried))
        return self.factor * hcl(fused, [t for _, t in found])


class SemCKD(nn.Module):
    """Each layer of the student's against all of the teacher's, weighed for each sample by a trained attention.

    A layer's similarities to the other samples of the batch, (N, N), are what queries (student) and keys (teacher) are
    made of; attention is the softmax of their products over the teacher's layers. A pair's difference is the mean
    square over its elements, on the smaller of the two grids, of the teacher's maps and the student's through 1x1, 3x3
    and 1x1 convolutions: sum over pairs, mean over samples and the student's layers. The two sides may name different
    numbers of layers. A smaller last batch counts as one whose other samples are like none.

    Chen et al., "Cross-Layer Distillation with Semantic Calibration" (2021); DefangChen/SimKD,
    distiller_zoo/SemCKD.py, models/util.py.

    Args:
        batch: samples in a batch, at most: the width of the attention's first layer.

    >>> loss = SemCKD(batch=8)
    >>> loss.bind([(8, 3, 4, 4), (8, 6, 2, 2)], [(8, 5, 4, 4)])
    >>> student = [torch.rand(8, 3, 4, 4), torch.rand(8, 6, 2, 2)]
    >>> loss(student=student, teacher=[torch.rand(8, 5, 4, 4)]).shape
    torch.Size([])
    """

    READS = "maps"
    UNEVEN = True  # any numbers of layers

    COMPARES_SAMPLES = True

    queries: nn.ModuleList | None
    keys: nn.ModuleList | None
    regressors: nn.ModuleList | None
    extra_repr = checks.shown("batch")

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = checks.whole("batch", batch)
        for name in ("queries", "keys", "regressors"):
            self.register_module(name, None)

    def bind(self, student_shape: Shapes, teacher_shape: Shapes) -> None:
        """Make attention and regressors, drawing from the global generator; a second time it does nothing.

        Raises:
            InputError: if a layer gives no maps.
        """
        ours, theirs = layers.each_shape(student_shape), layers.each_shape(teacher_shape)
        for shape in (*ours, *theirs):
            if len(shape) != 4:
                raise InputError(
                    f"semckd cannot read features of shape {shape}; choose layers that give maps (N, C, H, W)"
                )
        if self.regressors is None:
            self.queries = nn.ModuleList(_embedding(self.batch) for _ in ours)
            self.keys = nn.ModuleList(_embedding(self.batch) for _ in theirs)
            self.regressors = nn.ModuleList(nn.ModuleList(_bottleneck(s[1], t[1]) for t in theirs) for s in ours)

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """The scalar for lists of maps as bound.

        Raises:
            InputError: if `bind` was not called, the maps are others, or the batch is larger than was said.
        """
        ours, theirs = layers.listed(student), layers.listed(teacher)
        if self.queries is None or self.keys is None or self.regressors is None:
            raise InputError("semckd is used before it knows its shapes; call bind(student_shape, teacher_shape) first")
        if (len(ours), len(theirs)) != (len(self.queries), len(self.keys)):
            raise InputError(
                f"semckd was bound to {len(self.queries)} and {len(self.keys)} layers and is given {len(ours)} and "
                f"{len(theirs)}"
            )
        gaps = []
        for s, row in zip(ours, self.regressors, strict=True):
            assert isinstance(row, nn.ModuleList)
            for t, regressor in zip(theirs, row, strict=True):
                source, goal = layers.maps(s, t)
                first, last = regressor[0], regressor[-1]  # type: ignore[index]
                if (first.in_channels, last.out_channels) != (source.shape[1], goal.shape[1]):
                    raise InputError("semckd is given maps of other widths than it was bound to")
                found = checks.widened(regressor(source)) - checks.widened(goal)
                gaps.append(found.square().flatten(1).mean(dim=1))
        count = len(ours[0])
        if count > self.batch:
            raise InputError(
                f"semckd was made for batches of {self.batch} and is given {count} samples; raise its batch"
            )
        queries = torch.stack([self._embed(part, f) for part, f in zip(self.queries, ours, strict=True)], dim=1)
        keys = torch.stack([self._embed(part, f) for part, f in zip(self.keys, theirs, strict=True)], dim=1)
        with checks.exactly(queries):
            attention = (queries @ keys.mT).softmax(dim=2)
        each = torch.stack(gaps, dim=1).reshape(attention.shape)
        return (attention * each).sum() / (count * len(ours))

    def _embed(self, part: nn.Module, features: Tensor) -> Tensor:
        """(N, D): a unit vector for each sample."""
        rows = checks.widened(features.flatten(1))
        with checks.exactly(rows):
            similar = F.pad(rows @ rows.T, (0, self.batch - len(rows)))
            weights = next(part.parameters())
            return F.normalize(checks.widened(part(similar.to(weights.dtype))), dim=1)


def _embedding(batch: int) -> nn.Module:
    width = max(batch // 4, 1)
    return nn.Sequential(nn.Linear(batch, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def _bottleneck(student: int, teacher: int) -> nn.Sequential:
    """1x1, 3x3, 1x1 convolutions, twice as wide as the teacher in between."""
    middle = 2 * teacher
    return nn.Sequential(
        nn.Conv2d(student, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, middle, 3, padding=1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, teacher, 1, bias=False),
    )


def _positions(features: Tensor) -> Tensor:
    """Vectors (N, D) as maps of one position; maps as they are."""
    return features[:, :, None, None] if checks.floats(features) and features.ndim == 2 else features


def _nearest(maps: Tensor, like: Tensor) -> Tensor:
    size = like.shape[2], like.shape[3]
    return maps if tuple(maps.shape[2:]) == size else F.interpolate(maps, size, mode="nearest")
