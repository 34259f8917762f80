"""The small nets of our own, registered with timm so that one name finds any net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from kd.errors import InputError

# timm looks for this name. fixed_input_size: the dense layer is as wide as the last map, so the net must know the size.
default_cfgs = generate_default_cfgs(
    {
        name: {"fixed_input_size": True, "input_size": (1, 28, 28), "num_classes": 10}
        for name in ("seed_cnn", "seed_cnn_small")
    }
)


class SeedCNN(nn.Module):
    """Three 3x3 convolutions with pooling between them, a dense layer, a head: the net of TensorFlow's CNN tutorial.

    The layers are `conv1`, `conv2`, `conv3`, `dense` (each after its ReLU; `conv1.0` is before it) and `head`.
    Convolutions take no padding, but images of less than 22 px keep their size in them, or nothing would be left.

    Args:
        num_classes: width of the head.
        in_chans: channels of the image.
        img_size: height and width of the image, 4 px or more.
        widths: channels of the three convolutions, width of the dense layer.

    Raises:
        InputError: if the image is too small, or the widths are not four positive integers.

    >>> sum(p.numel() for p in SeedCNN().parameters())
    93322
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, img_size: int = 28, widths: Sequence[int] = (32, 64, 64, 64)
    ) -> None:
        super().__init__()
        if len(widths) != 4 or not all(isinstance(width, int) and width > 0 for width in widths):
            raise InputError(f"widths are {widths}; four positive integers were meant, such as [32, 64, 64, 64]")
        if img_size < 4:
            raise InputError(f"images of {img_size} px are too small to be pooled twice; 4 px is the least")
        padding = 1 if img_size < 22 else 0
        self.num_classes = num_classes
        self.conv1 = _convolution(in_chans, widths[0], padding)
        self.conv2 = _convolution(widths[0], widths[1], padding)
        self.conv3 = _convolution(widths[1], widths[2], padding)
        lost = 2 - 2 * padding  # px in each convolution
        side = ((img_size - lost) // 2 - lost) // 2 - lost
        self.dense = nn.Sequential(nn.Linear(widths[2] * side**2, widths[3]), nn.ReLU())
        self.head = nn.Linear(widths[3], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_chans, img_size, img_size)."""
        maps = F.max_pool2d(self.conv1(images), 2)
        maps = F.max_pool2d(self.conv2(maps), 2)
        logits: Tensor = self.head(self.dense(self.conv3(maps).flatten(1)))
        return logits


def _convolution(channels: int, width: int, padding: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=padding), nn.ReLU())


def without_timms(options: dict[str, Any]) -> dict[str, Any]:
    """What timm hands to every entry point, and a net without published weights has no use for, is left out."""
    return {k: v for k, v in options.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}


@register_model
def seed_cnn(pretrained: bool = False, **options: Any) -> SeedCNN:
    """93,322 parameters at 28x28x1 and 10 classes; `options` are those of `SeedCNN`.

    >>> seed_cnn(num_classes=3).head.out_features
    3
    """
    return SeedCNN(**without_timms(options))


@register_model
def seed_cnn_small(pretrained: bool = False, **options: Any) -> SeedCNN:
    """6,058 parameters at 28x28x1 and 10 classes, 15 times fewer; `options` are those of `SeedCNN`.

    >>> sum(p.numel() for p in seed_cnn_small().parameters())
    6058
    """
    return SeedCNN(**{"widths": (8, 16, 16, 16), **without_timms(options)})
