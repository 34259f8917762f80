"""Losses that read the student's features with the teacher's own classifier, lent to them and left as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks, layers
from kd.losses.feature import hint


def srrl(student: Tensor, teacher: Tensor, predicted: Tensor, logits: Tensor) -> Tensor:
    """Squared difference of the features, and that of what the teacher's classifier makes of both: a mean each, summed.

    Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning" (2021); DefangChen/SimKD,
    helper/loops.py and models/util.py; jingyang2017/KD_SRRL, train_imagenet_distillation.py.

    Args:
        student: features (N, D), already projected to the teacher's width.
        teacher: features (N, D).
        predicted: the teacher's classifier on the student's features (N, C).
        logits: of the teacher (N, C).

    Raises:
        InputError: if shapes differ or hold nothing.

    >>> import torch
    >>> ones = torch.ones(1, 2)
    >>> srrl(ones, 3 * ones, ones, 2 * ones)  # 4 + 1
    tensor(5.)
    """
    return hint(student, teacher) + F.mse_loss(*checks.pair(predicted, logits))


class SRRL(nn.Module):
    """`srrl` behind a trained projection: a 1x1 convolution without bias, batch norm and ReLU.

    The student's features are vectors (N, D), or maps, which are averaged over their positions once they are projected,
    as in the authors' own code. The teacher's are what its classifier reads, and its logits, in a list of two. The
    projection is made by `bind`, trained and checkpointed with the objective and never shipped with the student.

    >>> import torch
    >>> loss = SRRL()
    >>> loss.lend(nn.Linear(32, 10))
    >>> loss.bind((8, 16), [(8, 32), (8, 10)])
    >>> loss(student=torch.rand(8, 16), teacher=[torch.rand(8, 32), torch.rand(8, 10)]).shape
    torch.Size([])
    """

    projection: nn.Module | None
    classifier: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("projection", None)
        self.register_module("classifier", None)

    def lend(self, part: nn.Module) -> None:
        """Take the teacher's classifier: frozen, and no part of this module's state."""
        self.classifier = part

    def bind(self, student_shape: Sequence[int], teacher_shape: Sequence[Sequence[int]]) -> None:
        """Make the projection, drawing its weights from the global generator; a second time it does nothing.

        Args:
            student_shape: of the student's features, (N, D) or (N, D, H, W).
            teacher_shape: of the teacher's features, (N, E), and of its logits.

        Raises:
            InputError: if they are none of these, or the classifier reads features of another width.
        """
        ours, theirs = tuple(student_shape), [tuple(shape) for shape in teacher_shape]
        if len(ours) not in (2, 4) or [len(shape) for shape in theirs] != [2, 2]:
            raise InputError(
                f"srrl cannot lead from features of shape {ours} to {', '.join(map(str, theirs))}; choose vectors or "
                "maps of the student, and [teacher.embedding, teacher.logits]"
            )
        _reads("srrl", self.classifier, theirs[0][1])
        if self.projection is None:
            self.projection = nn.Sequential(
                nn.Conv2d(ours[1], theirs[0][1], 1, bias=False), nn.BatchNorm2d(theirs[0][1]), nn.ReLU()
            )

    def forward(self, student: Tensor, teacher: Sequence[Tensor]) -> Tensor:
        """The scalar for features as bound, any batch size, and a list of the teacher's features and its logits.

        Raises:
            InputError: if `bind` was not called, or the features are others.
        """
        if not isinstance(self.projection, nn.Sequential) or self.classifier is None:
            raise InputError(
                "srrl is used before it knows its shapes; call lend(classifier) and bind(student, teacher)"
            )
        views = layers.listed(teacher)
        if len(views) != 2:
            raise InputError(f"srrl is given {len(views)} views of the teacher; its features and its logits were meant")
        maps = _positions(student)
        width = self.projection[0].in_channels
        if not checks.floats(maps) or maps.ndim != 4 or maps.shape[1] != width or not maps.numel():
            raise InputError(
                f"the student's features are {checks.spelt(student)}; srrl was bound to width {width}, of floats"
            )
        projected = checks.widened(layers.through(self.projection, maps)).mean(dim=(2, 3)).to(maps.dtype)
        return srrl(projected, views[0], read(self.classifier, projected), views[1])


class SimKD(nn.Module):
    """`hint` behind a trained projector, which is shipped: the student reads its maps with the teacher's classifier.

    The projector is a 1x1, a 3x3 and a 1x1 convolution, each with batch norm and ReLU, narrower than the teacher by
    `factor` in between. Maps of two grids meet on the smaller one; vectors are maps of one position. Nothing else is
    trained: `loss=[simkd]`. What is judged and stored is the student as far as the named layer, the projector, the mean
    over positions and the teacher's classifier, so the teacher's layer must be the one whose mean its classifier reads.

    Chen et al., "Knowledge Distillation with the Reused Teacher Classifier" (2022); DefangChen/SimKD, models/util.py,
    helper/loops.py.

    Args:
        factor: the teacher's width over that in the middle of the projector.

    >>> import torch
    >>> loss = SimKD(factor=2)
    >>> loss.lend(nn.Linear(32, 10))
    >>> loss.bind((8, 16, 4, 4), (8, 32, 4, 4))
    >>> student = torch.rand(8, 16, 4, 4)
    >>> loss(student=student, teacher=torch.rand(8, 32, 4, 4)).shape, loss.graft()(student).shape
    (torch.Size([]), torch.Size([8, 10]))
    """

    READS = "maps"

    projector: nn.Module | None
    classifier: nn.Module | None
    extra_repr = checks.shown("factor")

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = checks.whole("factor", factor)
        self.register_module("projector", None)
        self.register_module("classifier", None)
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def lend(self, part: nn.Module) -> None:
        """Take the teacher's classifier: frozen, and no part of this module's state."""
        self.classifier = part

    def bind(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        """Make the projector, drawing its weights from the global generator; a second time it does nothing.

        Args:
            student_shape: of the student's maps, (N, D, H, W), or vectors, (N, D).
            teacher_shape: of the teacher's maps, (N, E, H, W), or vectors, (N, E).

        Raises:
            InputError: if one gives neither, or the classifier reads features of another width.
        """
        ours, theirs = tuple(student_shape), tuple(teacher_shape)
        if not {len(ours), len(theirs)} <= {2, 4}:
            raise InputError(
                f"simkd cannot lead from features of shape {ours} to {theirs}; choose two layers that give maps "
                "(N, C, H, W) or vectors (N, C)"
            )
        _reads("simkd", self.classifier, theirs[1])
        if self.projector is None:
            middle = max(theirs[1] // self.factor, 1)
            self.projector = nn.Sequential(
                *_convolved(ours[1], middle, 1), *_convolved(middle, middle, 3), *_convolved(middle, theirs[1], 1)
            )
            self._shapes = ours, theirs

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for maps as bound, any batch size.

        Raises:
            InputError: if `bind` was not called, or the maps are others.
        """
        if not isinstance(self.projector, nn.Sequential):
            raise InputError(
                "simkd is used before it knows its shapes; call lend(classifier) and bind(student, teacher)"
            )
        student, teacher = layers.maps(_positions(student), _positions(teacher))
        if student.shape[1] != self.projector[0].in_channels:
            raise InputError(
                f"the student's maps have {student.shape[1]} channels; simkd was bound to "
                f"{self.projector[0].in_channels}"
            )
        return hint(layers.through(self.projector, student), teacher)

    def graft(self) -> nn.Sequential:
        """What is shipped behind the student's layer: the projector, the mean over positions, the teacher's classifier.

        Raises:
            InputError: if `lend` or `bind` was not called.
        """
        if self.projector is None or self.classifier is None or self._shapes is None:
            raise InputError("simkd ships a classifier that it was not lent; call lend(classifier) and bind first")
        ours, theirs = self._shapes
        parts: list[nn.Module] = []
        if len(ours) == 2:
            parts.append(nn.Unflatten(1, (ours[1], 1, 1)))
        elif (common := tuple(map(min, ours[2:], theirs[2:] or (1, 1)))) != ours[2:]:
            parts.append(nn.AdaptiveAvgPool2d(common))
        parts += [self.projector, nn.AdaptiveAvgPool2d(1)]
        # A convolution reads maps of one position, and gives such.
        convolution = isinstance(_inside(self.classifier), nn.Conv2d)
        parts += [self.classifier, nn.Flatten()] if convolution else [nn.Flatten(), self.classifier]
        return nn.Sequential(*parts)

    def answers(self, teacher: Tensor) -> Tensor:
        """What the classifier says of the teacher's own maps: its logits (N, C), or the wrong layer was named."""
        if self.classifier is None:
            raise InputError("simkd is lent no classifier; set part=teacher.classifier")
        return read(self.classifier, _positions(teacher).mean(dim=(2, 3)))


def read(classifier: nn.Module, vectors: Tensor) -> Tensor:
    """Logits (N, C) that a linear layer or a 1x1 convolution makes of vectors (N, D).

    >>> import torch
    >>> read(nn.Conv2d(3, 5, 1), torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """
    if isinstance(_inside(classifier), nn.Conv2d):
        found: Tensor = classifier(vectors[:, :, None, None]).flatten(1)
        return found
    found = classifier(vectors)
    return found


def _positions(features: Tensor) -> Tensor:
    """Vectors (N, D) as maps of one position; maps, and what is neither, as they are."""
    return features[:, :, None, None] if isinstance(features, Tensor) and features.ndim == 2 else features


def _inside(part: nn.Module) -> nn.Module:
    """The layer that is lent, without what freezes it."""
    found = getattr(part, "module", part)
    return found if isinstance(found, nn.Module) else part


def _reads(loss: str, classifier: nn.Module | None, width: int) -> None:
    """Refuse a classifier that does not read features as wide as the teacher's."""
    if classifier is None:
        raise InputError(f"{loss} is lent no classifier; set part=teacher.classifier")
    layer = _inside(classifier)
    taken = getattr(layer, "in_features", getattr(layer, "in_channels", None))
    if taken != width:
        raise InputError(
            f"{loss} reads features of width {width} with the teacher's {type(layer).__name__}, which takes "
            f"{taken or 'something else'}; name the teacher's layer that its classifier reads"
        )


def _convolved(channels: int, width: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]
