"""OFA-KD: the teacher's logits, its label made to count more, for the student's own and for exits from its layers.

Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation" (2023);
Hao840/OFAKD, distillers/ofa.py, distillers/utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks, layers
from kd.losses.layers import Layers, Shapes

_GRID = 7  # patches a side that tokens are merged down to
_HEADS = 4


def ofa(student: Tensor, teacher: Tensor, target: Tensor, power: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Cross-entropy against (p + y)^power - y, with p the teacher's distribution and y the label's: batch mean.

    At power 1 it is the cross-entropy against the teacher; above, the label counts more. No temperature².

    Args:
        student: logits (N, C).
        teacher: logits (N, C).
        target: class indices (N,).
        power: 1 or more (epsilon in the paper, gamma in its equation).
        temperature: divides both logits; above 0.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes differ, the batch is empty, or a label is no class.

    >>> ofa(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """
    power = checks.within("power", power, 1.0)
    temperature = checks.positive("temperature", temperature)
    student, teacher, target = checks.labelled(student, teacher, target)
    label = checks.is_label(student, target).to(student.dtype)
    goal = ((teacher / temperature).softmax(dim=1) + label) ** power - label
    return -(goal * (student / temperature).log_softmax(dim=1)).sum(dim=1).mean()


class OFA(nn.Module):
    """`ofa` as a term's loss."""

    extra_repr = checks.shown("power", "temperature")

    def __init__(self, power: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.power = checks.within("power", power, 1.0)
        self.temperature = checks.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The scalar for logits (N, C) of both and class indices (N,)."""
        return ofa(student, teacher, target, self.power, self.temperature)


class OFAExits(nn.Module):
    """`ofa` of the teacher's logits for the exits of the student, summed: a trained head on each of its layers.

    Of the teacher only its logits are heard, so the two may be of any architectures. Maps (N, D, H, W) leave through as
    many halving blocks as layers follow theirs (a depthwise and a pointwise convolution twice over, each pair with
    batch norm and ReLU; the width is doubled by each), those of the deepest through a 1x1 convolution, and are averaged
    over positions. Tokens (N, L, D) are merged four by four while they are a grid of 14x14 or more, go through as many
    transformer blocks as layers follow theirs, one at least, and leave by the class token, or by the mean where there
    is none. A linear layer gives the logits. The heads are trained and checkpointed with the objective and never
    shipped with the student.

    Args:
        power: 1 or more; of all exits, or one for each.
        temperature: divides both logits; above 0.
        width: that maps are brought to before the linear layer; None: the deepest layer's. The authors take that of
            the last features of student or teacher, whichever is wider.

    >>> loss = OFAExits()
    >>> loss.bind([(8, 16, 8, 8), (8, 32, 4, 4)], (8, 10))
    >>> student = [torch.rand(8, 16, 8, 8), torch.rand(8, 32, 4, 4)]
    >>> loss(student=student, teacher=torch.rand(8, 10), target=torch.arange(8)).shape
    torch.Size([])
    """

    heads: nn.ModuleList | None
    extra_repr = checks.shown("power", "temperature", "width")

    def __init__(
        self, power: float | Sequence[float] = 1.0, temperature: float = 1.0, width: int | None = None
    ) -> None:
        super().__init__()
        several = list(power) if isinstance(power, Sequence) else [power]
        self.power = [checks.within("power", value, 1.0) for value in several]
        self.temperature = checks.positive("temperature", temperature)
        self.width = None if width is None else checks.whole("width", width)
        self.register_module("heads", None)

    def bind(self, student_shape: Shapes, teacher_shape: Sequence[int]) -> None:
        """Make the heads, drawing their weights from the global generator; a second time it does nothing.

        Args:
            student_shape: of the layers from the shallowest to the deepest, one or a list.
            teacher_shape: of its logits, (N, C).

        Raises:
            InputError: if a layer gives neither maps nor tokens, the second is no shape of logits, or there are not as
                many powers as exits.
        """
        ours = layers.each_shape(student_shape)
        if len(teacher_shape) != 2 or any(len(shape) not in (3, 4) for shape in ours):
            raise InputError(
                f"ofa_exits cannot lead from features of shape {', '.join(map(str, ours))} to {tuple(teacher_shape)}; "
                "choose layers of the student that give maps (N, D, H, W) or tokens (N, L, D), and teacher.logits"
            )
        if len(self.power) not in (1, len(ours)):
            raise InputError(f"ofa_exits has {len(self.power)} powers for {len(ours)} exits; give one, or one for each")
        if self.heads is None:
            width = self.width or ours[-1][1 if len(ours[-1]) == 4 else 2]
            made = [
                _MapHead(shape[1], width, teacher_shape[1], following)
                if len(shape) == 4
                else _TokenHead(shape[1:], teacher_shape[1], following)
                for following, shape in zip(range(len(ours) - 1, -1, -1), ours, strict=True)
            ]
            self.heads = nn.ModuleList(made).apply(_initialised)

    def forward(self, student: Layers, teacher: Tensor, target: Tensor) -> Tensor:
        """The scalar for layers as bound, any batch size, logits (N, C) and class indices (N,).

        Raises:
            InputError: if `bind` was not called, or the layers are others.
        """
        found = layers.listed(student)
        if self.heads is None:
            raise InputError("ofa_exits is used before it knows its shapes; call bind(student, teacher) first")
        if len(found) != len(self.heads):
            raise InputError(f"ofa_exits was bound to {len(self.heads)} layers and is given {len(found)}")
        powers = self.power * len(found) if len(self.power) == 1 else self.power
        each = zip(self.heads, found, powers, strict=True)
        return layers.summed([ofa(head(f), teacher, target, power, self.temperature) for head, f, power in each])


class _MapHead(nn.Module):
    """From maps (N, D, H, W) to logits (N, C)."""

    def __init__(self, channels: int, width: int, classes: int, following: int) -> None:
        super().__init__()
        self.channels = channels
        self.body = nn.Sequential()
        for left in range(following, 0, -1):
            wider = width if left == 1 else 2 * channels
            self.body.extend(_halving(channels, wider))
            channels = wider
        if not following:
            self.body.append(nn.Conv2d(channels, width, 1))
        self.classifier = nn.Linear(width, classes)

    def pooled(self, maps: Tensor) -> Tensor:
        """The vector (N, D) that the classifier reads."""
        if not checks.floats(maps) or maps.ndim != 4 or maps.shape[1] != self.channels:
            raise InputError(
                f"the student's features are {checks.spelt(maps)}; this exit was bound to maps of {self.channels} "
                "channels"
            )
        return layers.through(self.body, maps).mean(dim=(2, 3))

    def forward(self, maps: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pooled(maps))
        return logits


class _TokenHead(nn.Module):
    """From tokens (N, L, D), of one or two class tokens before a grid of patches or of any kind, to logits (N, C)."""

    def __init__(self, shape: Sequence[int], classes: int, following: int) -> None:
        super().__init__()
        self.shape = count, width = tuple(shape)
        self.first = next((some for some in (0, 1, 2) if math.isqrt(count - some) ** 2 == count - some), None)
        side = 0 if self.first is None else math.isqrt(count - self.first)
        self.merges = nn.ModuleList()
        while side >= 2 * _GRID and side % 2 == 0:
            self.merges.append(
                nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, width, bias=False), nn.GELU())
            )
            side //= 2
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(max(following, 1))))
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        if not checks.floats(tokens) or tuple(tokens.shape[1:]) != self.shape:
            raise InputError(
                f"the student's features are {checks.spelt(tokens)}; ofa_exits was bound to {self.shape[0]} tokens of "
                f"width {self.shape[1]}"
            )
        first = self.first or 0
        before, patches = tokens[:, :first], tokens[:, first:]
        for merge in self.merges:
            side = math.isqrt(patches.shape[1])
            grid = patches.reshape(len(patches), side // 2, 2, side // 2, 2, -1)
            patches = merge(grid.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2))
        found = self.blocks(torch.cat([before, patches], dim=1))
        logits: Tensor = self.classifier(found[:, 0] if first else found.mean(dim=1))
        return logits


class _Block(nn.Module):
    """Attention and a perceptron of four times the width, each behind a layer norm and added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, _HEADS if width % _HEADS == 0 else 1, batch_first=True)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.before(tokens)
        # With weights asked for, the products are plain ones, whose gradient is the same each time on a GPU.
        tokens = tokens + self.attention(seen, seen, seen, need_weights=True)[0]
        found: Tensor = tokens + self.perceptron(tokens)
        return found


def _halving(channels: int, width: int) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for stride, after in ((2, channels), (1, width)):
        parts.append(nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False))
        parts += [nn.Conv2d(channels, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return parts


def _initialised(module: nn.Module) -> None:
    """As the authors draw them."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
