"""Contrastive losses: a sample's features in the student belong with its own in the teacher, and not with another's.

Products of features are never computed in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks
from kd.losses.transport import transport, unstretched, within_ball

_SMALL = 1e-7
_DRAWS = 4  # of a negative, until one is of another class


def infonce(student: Tensor, teacher: Tensor, scale: float = 0.07) -> Tensor:
    """Cross-entropy of telling each sample's teacher features from those of the rest of the batch: mean over samples.

    Scores are cosines over `scale`; the batch is all there is to tell from, without a memory. A batch of one
    gives 0.

    Van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018), equation 4.

    Args:
        student: features (N, …).
        teacher: features (N, …), as wide.
        scale: divides the cosines; above 0. Not called a temperature: it softens no distribution of a network's.

    Raises:
        BadValue: if the scale is not a finite number above 0.
        InputError: if one holds no floats or nothing, or they are of two batches or widths.

    >>> infonce(torch.eye(2), torch.eye(2), scale=1.0)  # ln(1 + 1/e)
    tensor(0.3133)
    """
    scale = checks.positive("scale", scale)
    student, teacher = checks.rows(student, teacher)
    _one_width(student, teacher)
    with checks.exactly(student):
        scores = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T / scale
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def nce(scores: Tensor, samples: int) -> Tensor:
    """Noise-contrastive estimation: -log p/(p + K/M) of the first column, -log (K/M)/(p + K/M) of the K others.

    It is summed over columns, and the mean over rows; 1e-7 is added to both divisors.

    Tian et al., "Contrastive Representation Distillation" (2020), equation 18; HobbitLong/RepDistiller,
    crd/criterion.py, ContrastLoss.

    Args:
        scores: (N, 1 + K), above 0: each row's own sample first, then negatives.
        samples: M, of which the noise draws each as often.

    Raises:
        InputError: if there is no negative, or no row.

    >>> nce(torch.ones(1, 2), samples=1)  # 2 ln 2
    tensor(1.3863)
    """
    if scores.ndim != 2 or scores.shape[1] < 2 or not len(scores):
        raise InputError(f"scores of shape {tuple(scores.shape)} hold no sample beside a negative")
    noise = (scores.shape[1] - 1) / samples
    own, others = scores[:, 0], scores[:, 1:]
    right = (own / (own + noise + _SMALL)).log().sum()
    wrong = (noise / (others + noise + _SMALL)).log().sum()
    return -(right + wrong) / len(scores)


class InfoNCE(nn.Module):
    """`infonce` as a term's loss.

    >>> InfoNCE()
    InfoNCE(scale=0.07)
    """

    COMPARES_SAMPLES = True

    extra_repr = checks.shown("scale")

    def __init__(self, scale: float = 0.07) -> None:
        super().__init__()
        self.scale = checks.positive("scale", scale)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar for features (N, …) of both, equally wide."""
        return infonce(student, teacher, self.scale)


class CRD(nn.Module):
    """Contrastive representation distillation: `nce` of the student against a memory of the teacher, and the reverse.

    Features go through a trained linear layer each and are brought to length 1. A score is exp(cosine / scale)
    over a constant, which the first batch sets so that scores are 1 over the number of samples on average. The
    memories hold an embedding of every sample of the split, a moving average with `momentum`, and are updated after
    each batch in training. They and the constants are buffers: checkpointed, never shipped with the student.

    A negative is drawn from all samples by the global generator of the device, which is reseeded before each step; one
    whose class is known to be the anchor's is drawn again, four times at most. The authors read the classes of the
    whole split before training; here they are known once they were seen.

    Tian et al., "Contrastive Representation Distillation" (2020); HobbitLong/RepDistiller, crd/criterion.py,
    crd/memory.py.

    Args:
        width: of both embeddings.
        negatives: drawn for each sample.
        scale: divides the cosines; above 0.
        momentum: share of the memory that stays when a sample is seen again.

    >>> loss = CRD(width=4, negatives=8)
    >>> loss.bind((2, 16), (2, 32), (100,))
    >>> loss.memory_student.shape
    torch.Size([100, 4])
    >>> batch = {"target": torch.tensor([0, 1]), "row": torch.tensor([7, 3])}
    >>> loss(student=torch.rand(2, 16), teacher=torch.rand(2, 32), **batch).shape
    torch.Size([])
    """

    COMPARES_SAMPLES = True
    NAME = "crd"

    student: nn.Module | None
    teacher: nn.Module | None
    memory_student: Tensor | None
    memory_teacher: Tensor | None
    classes: Tensor | None
    constants: Tensor
    extra_repr = checks.shown("width", "negatives", "scale", "momentum")

    def __init__(self, width: int = 128, negatives: int = 16384, scale: float = 0.07, momentum: float = 0.5) -> None:
        super().__init__()
        self.width, self.negatives = checks.whole("width", width), checks.whole("negatives", negatives)
        self.scale = checks.positive("scale", scale)
        self.momentum = checks.within("momentum", momentum, high=1.0)
        self.register_module("student", None)
        self.register_module("teacher", None)
        for name in ("memory_student", "memory_teacher", "classes"):
            self.register_buffer(name, None)
        self.register_buffer("constants", torch.full((2,), -1.0))  # below 0: not set yet

    def bind(self, student_shape: Sequence[int], teacher_shape: Sequence[int], row_shape: Sequence[int]) -> None:
        """Make embeddings and memories, drawing from the global generator; a second time it does nothing.

        Args:
            student_shape: of the student's features, batch first.
            teacher_shape: of the teacher's features, batch first.
            row_shape: (M,), the samples of the split.
        """
        if self.student is not None:
            return
        self.student = self._layer(math.prod(student_shape[1:])).train(self.training)
        self.teacher = self._layer(math.prod(teacher_shape[1:])).train(self.training)
        reach = 1 / math.sqrt(self.width / 3)
        self.memory_student, self.memory_teacher = (
            torch.empty(row_shape[0], self.width).uniform_(-reach, reach) for _ in range(2)
        )
        self.classes = torch.full((row_shape[0],), -1)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, row: Tensor) -> Tensor:
        """The scalar for features as bound, class indices (N,) and each sample's row in the split (N,).

        Raises:
            InputError: if `bind` was not called, the features are others, or a row is none of the split's.
        """
        return self._told_apart(self._embedded(student, teacher), target, row)

    def _layer(self, width: int) -> nn.Linear:
        """What makes embeddings of features so wide."""
        return nn.Linear(width, self.width)

    def _placed(self, vectors: Tensor) -> Tensor:
        """Where embeddings and what the memories keep of them may lie: on the sphere."""
        return F.normalize(vectors, dim=1)

    def _told_apart(self, found: tuple[Tensor, Tensor], target: Tensor, row: Tensor) -> Tensor:
        """`nce` of both embeddings (N, D) against the memories, which then take them in."""
        memories = self.memory_student, self.memory_teacher
        if memories[0] is None or memories[1] is None or self.classes is None:
            raise InputError(f"{self.NAME} is used before it knows its shapes; call bind(student, teacher, row) first")
        if not all(checks.whole_numbers(each) and each.shape == found[0].shape[:1] for each in (target, row)):
            raise InputError(
                f"{self.NAME} is given {len(found[0])} samples with targets that are {checks.spelt(target)} and rows "
                f"that are {checks.spelt(row)}; whole numbers, one of each a sample, were meant"
            )
        samples = len(self.classes)
        # A GPU would have to be waited for at every step; there the index is checked by the kernel that uses it.
        if row.device.type == "cpu" and not 0 <= int(row.min()) <= int(row.max()) < samples:
            raise InputError(f"a row is none of the split's: they go from 0 to {samples - 1}")
        if _several():
            raise InputError(f"{self.NAME} keeps its memory on one device; set run.devices=1")
        drawn = torch.cat([row[:, None], self._drawn(target)], dim=1)
        total = []
        # The student is told from the teacher's memory, and the teacher from the student's.
        for place, (ours, memory) in enumerate(zip(found, reversed(memories), strict=True)):
            assert memory is not None
            # A copy: the memory is written before the gradient, which reads it, is computed.
            with checks.exactly(ours):
                scores = ((ours @ memory.to(ours.dtype, copy=True).T).gather(1, drawn) / self.scale).exp()
            with torch.no_grad():
                constant = self.constants[place].to(scores.dtype)
                constant = torch.where(constant < 0, scores.mean() * samples, constant)
                if self.training:
                    self.constants[place] = constant
            total.append(nce(scores / constant, samples))
        if self.training:
            self._remember(found, target, row)
        return torch.stack(total).sum()

    def _embedded(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(self.student, nn.Linear) or not isinstance(self.teacher, nn.Linear):
            raise InputError(f"{self.NAME} is used before it knows its shapes; call bind(student, teacher, row) first")
        checks.rows(student, teacher)
        found = []
        for name, layer, values in (("student", self.student, student), ("teacher", self.teacher, teacher)):
            if math.prod(values.shape[1:]) != layer.in_features:
                raise InputError(
                    f"the {name}'s features are of shape {tuple(values.shape)}; {self.NAME} was bound to "
                    f"{layer.in_features} of them a sample"
                )
            found.append(self._placed(checks.widened(layer(values.flatten(1)))))
        return found[0], found[1]

    def _drawn(self, target: Tensor) -> Tensor:
        """(N, K): rows to tell from, drawn again where their class is the anchor's."""
        assert self.classes is not None
        shape = len(target), self.negatives
        drawn = torch.randint(len(self.classes), shape, device=target.device)
        for _ in range(_DRAWS):
            other = torch.randint(len(self.classes), shape, device=target.device)
            drawn = torch.where(self.classes[drawn] == target[:, None], other, drawn)
        return drawn

    @torch.no_grad()
    def _remember(self, found: tuple[Tensor, Tensor], target: Tensor, row: Tensor) -> None:
        assert self.classes is not None
        for memory, seen in zip((self.memory_student, self.memory_teacher), found, strict=True):
            assert memory is not None
            mixed = self.momentum * memory[row] + (1 - self.momentum) * seen.to(memory.dtype)
            memory[row] = self._placed(mixed)
        self.classes[row] = target.to(self.classes.dtype)


class WCoRD(CRD):
    """CRD with a critic that stretches no distance, plus what it costs to take the batch's features to the teacher's.

    The global part is `nce` against the memories, as in `CRD`. Its critic is the product of two embeddings: linear
    layers of spectral norm 1, then the ball of radius 1 in place of CRD's sphere, so that it is 1-Lipschitz in the
    features of either network, as Wasserstein's distance in its dual form asks. The local part is `transport` between
    both embeddings of the batch: the primal form.

    Chen et al., "Wasserstein Contrastive Representation Distillation" (2021). The authors published no code. The ball,
    the numbers of `transport`, and the constants of CRD's authors are this project's reading.

    Args:
        width: of both embeddings.
        negatives: drawn for each sample.
        scale: divides the critic; above 0.
        momentum: share of the memory that stays when a sample is seen again.
        local: weight of the transport beside the global part; 0 leaves it out.
        regularisation: weight of the entropy of the transport's plan.
        rounds: of scaling that plan.

    >>> loss = WCoRD(width=4, negatives=8)
    >>> loss.bind((2, 16), (2, 32), (100,))
    >>> batch = {"target": torch.tensor([0, 1]), "row": torch.tensor([7, 3])}
    >>> loss(student=torch.rand(2, 16), teacher=torch.rand(2, 32), **batch).shape
    torch.Size([])
    """

    NAME = "wcord"
    extra_repr = checks.shown("width", "negatives", "scale", "momentum", "local", "regularisation", "rounds")

    def __init__(
        self,
        width: int = 128,
        negatives: int = 16384,
        scale: float = 0.07,
        momentum: float = 0.5,
        local: float = 0.05,
        regularisation: float = 0.05,
        rounds: int = 50,
    ) -> None:
        super().__init__(width, negatives, scale, momentum)
        self.local = checks.within("local", local)
        self.regularisation = checks.positive("regularisation", regularisation)
        self.rounds = checks.whole("rounds", rounds)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, row: Tensor) -> Tensor:
        """The scalar for features as bound, class indices (N,) and each sample's row in the split (N,).

        Raises:
            InputError: if `bind` was not called, the features are others, or a row is none of the split's.
        """
        found = self._embedded(student, teacher)
        total = self._told_apart(found, target, row)
        if self.local:
            total = total + self.local * transport(*found, self.regularisation, self.rounds)
        return total

    def _layer(self, width: int) -> nn.Linear:
        return unstretched(width, self.width)

    def _placed(self, vectors: Tensor) -> Tensor:
        return within_ball(vectors)


def _several() -> bool:
    """Whether this is one of several processes that train together."""
    found = torch.distributed
    return found.is_available() and found.is_initialized() and found.get_world_size() > 1


def _one_width(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"features of width {student.shape[1]} (student) and {teacher.shape[1]} (teacher) have no cosine; "
            "bring both to one width with Embedded"
        )
