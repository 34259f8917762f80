"""What convolutional nets of stages are made of: chains of named steps, ways to join them, the blocks of a stage."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

Block = Callable[[int, int, int], nn.Module]  # of channels in, channels out, stride


class Sum(nn.Module):
    """The body's output plus the shortcut's: in a ResNet, what its last ReLU has not yet cut.

    >>> Sum(nn.ReLU(), nn.Identity())(torch.tensor([-1.0, 2.0]))
    tensor([-1.,  4.])
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, maps: Tensor) -> Tensor:
        """Both of maps (N, C, H, W), added."""
        total: Tensor = self.body(maps) + self.shortcut(maps)
        return total


class Concat(nn.Module):
    """The channels of two branches, one after the other.

    >>> Concat(nn.Identity(), nn.ReLU())(torch.tensor([[-1.0, 2.0]]))
    tensor([[-1., 2., 0., 2.]])
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, maps: Tensor) -> Tensor:
        """Both of maps (N, C, H, W), side by side."""
        return torch.cat([self.first(maps), self.second(maps)], dim=1)


class HalfPassed(nn.Module):
    """The first half of the channels as it came, the second through the body (Ma et al. 2018, figure 3c).

    >>> HalfPassed(nn.ReLU())(torch.tensor([[-1.0, -1.0]]))
    tensor([[-1., 0.]])
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) of as many channels, which must be even."""
        passed, taken = maps.chunk(2, dim=1)
        return torch.cat([passed, self.body(taken)], dim=1)


class Shuffle(nn.Module):
    """Channels dealt out anew: the first of each group, the second of each group, … (Zhang et al. 2018, figure 1c).

    >>> Shuffle(2)(torch.arange(6.0).view(1, 6, 1, 1)).flatten()
    tensor([0., 3., 1., 4., 2., 5.])
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) of the same channels in another order."""
        batch, channels, height, width = maps.shape
        grouped = maps.reshape(batch, self.groups, channels // self.groups, height, width)
        return grouped.transpose(1, 2).flatten(1, 2)


def chain(**steps: nn.Module) -> nn.Sequential:
    """The steps one after the other, each under its name.

    >>> list(dict(chain(flat=nn.Flatten(), relu=nn.ReLU()).named_children()))
    ['flat', 'relu']
    """
    return nn.Sequential(OrderedDict(steps))


def conv(channels: int, width: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution padded to keep the size, without a bias, for a batch norm follows.

    >>> conv(1, 2, stride=2)(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 2, 4, 4])
    """
    return nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def conv_relu(channels: int, width: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution, batch norm and ReLU: a stem, or what stands before the pooling."""
    return chain(conv=conv(channels, width, kernel, stride), bn=nn.BatchNorm2d(width), relu=nn.ReLU())


def stage(block: Block, channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    """As many blocks as `depth`, of which the first changes the channels and takes the stride."""
    return nn.Sequential(block(channels, width, stride), *(block(width, width, 1) for _ in range(depth - 1)))


def stages(block: Block, widths: Sequence[int], depths: Sequence[int], strides: Sequence[int]) -> list[nn.Module]:
    """One stage for each step from a width to the next; the first width is the stem's."""
    steps = zip(pairwise(widths), depths, strides, strict=True)
    return [stage(block, channels, width, depth, stride) for (channels, width), depth, stride in steps]


def basic(channels: int, width: int, stride: int) -> nn.Module:
    """Two 3x3 convolutions and a shortcut, then a ReLU (He et al. 2016, figure 5 left)."""
    body = chain(
        conv1=conv(channels, width, 3, stride),
        bn1=nn.BatchNorm2d(width),
        relu1=nn.ReLU(),
        conv2=conv(width, width),
        bn2=nn.BatchNorm2d(width),
    )
    return chain(join=Sum(body, _projection(channels, width, stride)), relu=nn.ReLU())


def bottleneck(channels: int, width: int, stride: int) -> nn.Module:
    """1x1, 3x3 with the stride, 1x1, a quarter as wide inside, and a shortcut (He et al. 2016, figure 5 right)."""
    inner = width // 4
    body = chain(
        conv1=conv(channels, inner, 1),
        bn1=nn.BatchNorm2d(inner),
        relu1=nn.ReLU(),
        conv2=conv(inner, inner, 3, stride),
        bn2=nn.BatchNorm2d(inner),
        relu2=nn.ReLU(),
        conv3=conv(inner, width, 1),
        bn3=nn.BatchNorm2d(width),
    )
    return chain(join=Sum(body, _projection(channels, width, stride)), relu=nn.ReLU())


def preactivated(channels: int, width: int, stride: int, drop_rate: float = 0.0) -> nn.Module:
    """Batch norm and ReLU before each of two 3x3 convolutions (Zagoruyko & Komodakis 2016, figure 1c and d)."""
    before = {"bn1": nn.BatchNorm2d(channels), "relu1": nn.ReLU()}
    body = {
        "conv1": conv(channels, width, 3, stride),
        "bn2": nn.BatchNorm2d(width),
        "relu2": nn.ReLU(),
        "drop": nn.Dropout(drop_rate) if drop_rate else nn.Identity(),
        "conv2": conv(width, width),
    }
    if stride == 1 and channels == width:
        return Sum(chain(**before, **body), nn.Identity())
    # Where the shape changes, the shortcut too starts from what was activated.
    return chain(**before, join=Sum(chain(**body), conv(channels, width, 1, stride)))


def convolutions(channels: int, width: int, depth: int, pooled: bool) -> nn.Sequential:
    """VGG's stage: 3x3 convolutions with biases, each with batch norm and ReLU, behind a pooling if `pooled`."""
    steps: dict[str, nn.Module] = {"pool": nn.MaxPool2d(2)} if pooled else {}
    for number in range(1, depth + 1):
        steps[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1)
        steps[f"bn{number}"] = nn.BatchNorm2d(width)
        steps[f"relu{number}"] = nn.ReLU()
        channels = width
    return chain(**steps)


def inverted(channels: int, width: int, stride: int, expansion: int = 6) -> nn.Module:
    """Wider inside, where each channel is convolved alone, and linear at its end (Sandler et al. 2018, table 1)."""
    inner = channels * expansion
    body = chain(
        conv1=conv(channels, inner, 1),
        bn1=nn.BatchNorm2d(inner),
        relu1=nn.ReLU(),
        conv2=conv(inner, inner, 3, stride, groups=inner),
        bn2=nn.BatchNorm2d(inner),
        relu2=nn.ReLU(),
        conv3=conv(inner, width, 1),
        bn3=nn.BatchNorm2d(width),
    )
    return Sum(body, nn.Identity()) if stride == 1 and channels == width else body


def shuffled(channels: int, width: int, stride: int, groups: int = 3) -> nn.Module:
    """The ShuffleNet unit (Zhang et al. 2018, figure 2b and c), with one ReLU more, as RepDistiller has it.

    With a stride of 2, the pooled input makes up the last `channels` of the output.
    """
    made = width - channels if stride == 2 else width
    inner = made // 4
    first = groups if channels > 24 else 1  # few channels are not cut into groups (section 3.3)
    body = chain(
        conv1=conv(channels, inner, 1, groups=first),
        bn1=nn.BatchNorm2d(inner),
        relu1=nn.ReLU(),
        shuffle=Shuffle(first),
        conv2=conv(inner, inner, 3, stride, groups=inner),
        bn2=nn.BatchNorm2d(inner),
        relu2=nn.ReLU(),  # the one that the paper leaves out
        conv3=conv(inner, made, 1, groups=groups),
        bn3=nn.BatchNorm2d(made),
    )
    if stride == 2:
        return chain(join=Concat(body, nn.AvgPool2d(3, 2, padding=1)), relu=nn.ReLU())
    return chain(join=Sum(body, nn.Identity()), relu=nn.ReLU())


def split(channels: int, width: int, stride: int) -> nn.Module:
    """The ShuffleNet V2 unit (Ma et al. 2018, figure 3c and d): half of the channels pass, or both halves shrink."""
    half = width // 2
    entering = half if stride == 1 else channels
    body = chain(
        conv1=conv(entering, half, 1),
        bn1=nn.BatchNorm2d(half),
        relu1=nn.ReLU(),
        conv2=conv(half, half, 3, stride, groups=half),
        bn2=nn.BatchNorm2d(half),
        conv3=conv(half, half, 1),
        bn3=nn.BatchNorm2d(half),
        relu3=nn.ReLU(),
    )
    if stride == 1:
        return chain(join=HalfPassed(body), shuffle=Shuffle(2))
    beside = chain(
        conv1=conv(channels, channels, 3, stride, groups=channels),
        bn1=nn.BatchNorm2d(channels),
        conv2=conv(channels, half, 1),
        bn2=nn.BatchNorm2d(half),
        relu2=nn.ReLU(),
    )
    return chain(join=Concat(beside, body), shuffle=Shuffle(2))


def _projection(channels: int, width: int, stride: int) -> nn.Module:
    """Nothing where the shape stays, else a 1x1 convolution (He et al. 2016, option B)."""
    if stride == 1 and channels == width:
        return nn.Identity()
    return chain(conv=conv(channels, width, 1, stride), bn=nn.BatchNorm2d(width))
