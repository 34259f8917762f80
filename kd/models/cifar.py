"""The nets in which distillation is compared on CIFAR-100, built as in RepDistiller (Tian et al. 2020).

Each is a `CifarNet`, so what one taps has the same name in all of them: `stem` and `layer1`, `layer2`, … are the
features that RepDistiller numbers from 0 on, `pool` the pooled ones. They take images of any size they can halve.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from kd.errors import InputError
from kd.models import blocks
from kd.models.blocks import chain, conv, conv_relu, stage, stages
from kd.models.nets import without_timms

# timm looks for this name.
default_cfgs = generate_default_cfgs(
    {
        f"cifar_{name}": {"input_size": (3, 32, 32), "num_classes": 100, "classifier": "head"}
        for name in (
            *("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
            *("resnet8x4", "resnet32x4", "resnet50", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"),
            *("vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "mobilenetv2", "shufflenetv1", "shufflenetv2"),
        )
    }
)


class CifarNet(nn.Sequential):
    """`stem`, `layer1` and on, for some nets a `tail`, then `pool` (N, width) and `head`, one after the other.

    Args:
        stem: the first convolution and what belongs to it.
        layers: the stages.
        width: channels that are pooled.
        num_classes: width of the head.
        tail: what stands between the last stage and the pooling.
    """

    head: nn.Linear

    def __init__(
        self,
        stem: nn.Module,
        layers: Sequence[nn.Module],
        width: int,
        num_classes: int,
        tail: nn.Module | None = None,
    ) -> None:
        parts = OrderedDict({"stem": stem} | {f"layer{number}": layer for number, layer in enumerate(layers, 1)})
        if tail is not None:
            parts["tail"] = tail
        parts["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        parts["head"] = nn.Linear(width, num_classes)
        super().__init__(parts)
        self.num_classes = num_classes


def resnet(depth: int, num_classes: int = 100, in_chans: int = 3, widths: Sequence[int] = (16, 16, 32, 64)) -> CifarNet:
    """The ResNet for small images (He et al. 2016, section 4.2), with projections where the width changes.

    Args:
        depth: 6n + 2, for n blocks a stage.
        num_classes: width of the head.
        in_chans: channels of the image.
        widths: channels of the stem and of the three stages.

    Raises:
        InputError: if the widths are not four positive integers.
    """
    if len(widths) != 4 or not all(isinstance(width, int) and width > 0 for width in widths):
        raise InputError(f"widths are {widths}; four positive integers were meant, such as [16, 16, 32, 64]")
    layers = stages(blocks.basic, widths, [(depth - 2) // 6] * 3, [1, 2, 2])
    return _fan_out(CifarNet(conv_relu(in_chans, widths[0]), layers, widths[-1], num_classes))


def bottleneck_resnet(depths: Sequence[int], num_classes: int = 100, in_chans: int = 3) -> CifarNet:
    """The ResNet of bottlenecks (He et al. 2016, table 1) behind a 3x3 stem that keeps the image's size.

    Args:
        depths: blocks of each of the four stages.
        num_classes: width of the head.
        in_chans: channels of the image.
    """
    layers = stages(blocks.bottleneck, [64, 256, 512, 1024, 2048], depths, [1, 2, 2, 2])
    return _fan_out(CifarNet(conv_relu(in_chans, 64), layers, 2048, num_classes))


def wide_resnet(depth: int, factor: int, num_classes: int = 100, in_chans: int = 3, drop_rate: float = 0.0) -> CifarNet:
    """The Wide ResNet (Zagoruyko & Komodakis 2016), pre-activated: its stages end before a ReLU, `tail` after one.

    Args:
        depth: 6n + 4, for n blocks a stage.
        factor: times the widths 16, 32, 64.
        num_classes: width of the head.
        in_chans: channels of the image.
        drop_rate: of the dropout between a block's two convolutions.
    """
    widths = [16, 16 * factor, 32 * factor, 64 * factor]
    layers = stages(partial(blocks.preactivated, drop_rate=drop_rate), widths, [(depth - 4) // 6] * 3, [1, 2, 2])
    tail = chain(bn=nn.BatchNorm2d(widths[-1]), relu=nn.ReLU())
    net = _fan_out(CifarNet(chain(conv=conv(in_chans, 16)), layers, widths[-1], num_classes, tail))
    nn.init.zeros_(net.head.bias)
    return net


def vgg(depths: Sequence[int], num_classes: int = 100, in_chans: int = 3) -> CifarNet:
    """VGG (Simonyan & Zisserman 2015) with batch norm, one linear layer, and no pooling before the last stage.

    Args:
        depths: convolutions of the stem and of the four stages.
        num_classes: width of the head.
        in_chans: channels of the image.
    """
    steps, pools = pairwise([in_chans, 64, 128, 256, 512, 512]), [False, True, True, True, False]
    stem, *layers = (
        blocks.convolutions(channels, width, depth, pooled)
        for (channels, width), depth, pooled in zip(steps, depths, pools, strict=True)
    )
    return _small_head(_fan_out(CifarNet(stem, layers, 512, num_classes)))


def mobilenetv2(num_classes: int = 100, in_chans: int = 3, width: float = 0.5, expansion: int = 6) -> CifarNet:
    """MobileNetV2 (Sandler et al. 2018, table 2), halving thrice after the stem; its stages end without a ReLU.

    Args:
        num_classes: width of the head.
        in_chans: channels of the image.
        width: times the channels of the paper; the reference's `mobile_half` has 0.5.
        expansion: channels inside a block, as a multiple of those that come in.

    Raises:
        InputError: if the width leaves no channels, or the expansion is no positive integer.
    """
    if not 16 * width >= 1:
        raise InputError(f"width is {width}; 1/16 or more was meant, such as 0.5, or a layer has no channels")
    if not isinstance(expansion, int) or expansion < 1:
        raise InputError(f"expansion is {expansion}; a positive integer was meant, such as 6")
    channels = int(32 * width)
    stem, layers = conv_relu(in_chans, channels, stride=2), []
    # Rows of the paper's table (expansion, channels, blocks, stride), but that its 24 channels come with a stride of 2.
    # Those whose maps are of one size make a stage, as in the reference's features.
    for rows in (
        [(1, 16, 1, 1), (expansion, 24, 2, 1)],
        [(expansion, 32, 3, 2)],
        [(expansion, 64, 4, 2), (expansion, 96, 3, 1)],
        [(expansion, 160, 3, 2), (expansion, 320, 1, 1)],
    ):
        made: list[nn.Module] = []
        for times, full, depth, stride in rows:
            made += stage(partial(blocks.inverted, expansion=times), channels, int(full * width), depth, stride)
            channels = int(full * width)
        layers.append(nn.Sequential(*made))
    last = int(1280 * max(width, 1.0))
    tail = conv_relu(channels, last, 1)
    return _small_head(_fan_out(CifarNet(stem, layers, last, num_classes, tail)))


def shufflenetv1(num_classes: int = 100, in_chans: int = 3) -> CifarNet:
    """ShuffleNet (Zhang et al. 2018, table 1) of 3 groups behind a 1x1 stem; initialised as torch does.

    Args:
        num_classes: width of the head.
        in_chans: channels of the image.
    """
    layers = stages(blocks.shuffled, [24, 240, 480, 960], [4, 8, 4], [2, 2, 2])
    return CifarNet(conv_relu(in_chans, 24, 1), layers, 960, num_classes)


def shufflenetv2(num_classes: int = 100, in_chans: int = 3) -> CifarNet:
    """ShuffleNet V2 1x (Ma et al. 2018, table 5) behind a 1x1 stem; initialised as torch does.

    Args:
        num_classes: width of the head.
        in_chans: channels of the image.
    """
    layers = stages(blocks.split, [24, 116, 232, 464], [4, 8, 4], [2, 2, 2])
    return CifarNet(conv_relu(in_chans, 24, 1), layers, 1024, num_classes, conv_relu(464, 1024, 1))


def _fan_out(net: CifarNet) -> CifarNet:
    """Convolutions drawn so that the gradient keeps its size (He et al. 2015, formula 14), their biases at 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


def _small_head(net: CifarNet) -> CifarNet:
    nn.init.normal_(net.head.weight, std=0.01)
    nn.init.zeros_(net.head.bias)
    return net


@register_model
def cifar_resnet8(pretrained: bool = False, **options: Any) -> CifarNet:
    """ResNet-8: 83,892 parameters at 100 classes; `options` are those of `resnet`."""
    return resnet(8, **without_timms(options))


@register_model
def cifar_resnet14(pretrained: bool = False, **options: Any) -> CifarNet:
    """ResNet-14: 181,108 parameters at 100 classes; `options` are those of `resnet`."""
    return resnet(14, **without_timms(options))


@register_model
def cifar_resnet20(pretrained: bool = False, **options: Any) -> CifarNet:
    """ResNet-20: 278,324 parameters at 100 classes; `options` are those of `resnet`."""
    return resnet(20, **without_timms(options))


@register_model
def cifar_resnet32(pretrained: bool = False, **options: Any) -> CifarNet:
    """ResNet-32: 472,756 parameters at 100 classes; `options` are those of `resnet`."""
    return resnet(32, **without_timms(options))


@register_model
def cifar_resnet44(pretrained: bool = False, **options: Any) -> CifarNet:
    """ResNet-44: 667,188 parameters at 100 classes; `options` are those of `resnet`."""
    return resnet(44, **without_timms(options))


@register_model
def cifar_resnet56(pretrained: bool = False, **options: Any) -> CifarNet:
    """ResNet-56: 861,620 parameters at 100 classes; `options` are those of `resnet`."""
    return resnet(56, **without_timms(options))


@register_model
def cifar_resnet110(pretrained: bool = False, **options: Any) -> CifarNet:
    """ResNet-110: 1,736,564 parameters at 100 classes; `options` are those of `resnet`."""
    return resnet(110, **without_timms(options))


@register_model
def cifar_resnet8x4(pretrained: bool = False, **options: Any) -> CifarNet:
    """ResNet-8, four times as wide: 1,233,540 parameters at 100 classes; `options` are those of `resnet`."""
    return resnet(8, **{"widths": (32, 64, 128, 256), **without_timms(options)})


@register_model
def cifar_resnet32x4(pretrained: bool = False, **options: Any) -> CifarNet:
    """ResNet-32, four times as wide: 7,433,860 parameters at 100 classes; `options` are those of `resnet`."""
    return resnet(32, **{"widths": (32, 64, 128, 256), **without_timms(options)})


@register_model
def cifar_resnet50(pretrained: bool = False, **options: Any) -> CifarNet:
    """ResNet-50: 23,705,252 parameters at 100 classes; `options` are those of `bottleneck_resnet`."""
    return bottleneck_resnet([3, 4, 6, 3], **without_timms(options))


@register_model
def cifar_wrn_16_1(pretrained: bool = False, **options: Any) -> CifarNet:
    """WRN-16-1: 180,916 parameters at 100 classes; `options` are those of `wide_resnet`."""
    return wide_resnet(16, 1, **without_timms(options))


@register_model
def cifar_wrn_16_2(pretrained: bool = False, **options: Any) -> CifarNet:
    """WRN-16-2: 703,284 parameters at 100 classes; `options` are those of `wide_resnet`."""
    return wide_resnet(16, 2, **without_timms(options))


@register_model
def cifar_wrn_40_1(pretrained: bool = False, **options: Any) -> CifarNet:
    """WRN-40-1: 569,780 parameters at 100 classes; `options` are those of `wide_resnet`."""
    return wide_resnet(40, 1, **without_timms(options))


@register_model
def cifar_wrn_40_2(pretrained: bool = False, **options: Any) -> CifarNet:
    """WRN-40-2: 2,255,156 parameters at 100 classes; `options` are those of `wide_resnet`."""
    return wide_resnet(40, 2, **without_timms(options))


@register_model
def cifar_vgg8(pretrained: bool = False, **options: Any) -> CifarNet:
    """VGG-8: 3,965,028 parameters at 100 classes; `options` are those of `vgg`."""
    return vgg([1, 1, 1, 1, 1], **without_timms(options))


@register_model
def cifar_vgg11(pretrained: bool = False, **options: Any) -> CifarNet:
    """VGG-11: 9,277,284 parameters at 100 classes; `options` are those of `vgg`."""
    return vgg([1, 1, 2, 2, 2], **without_timms(options))


@register_model
def cifar_vgg13(pretrained: bool = False, **options: Any) -> CifarNet:
    """VGG-13: 9,462,180 parameters at 100 classes; `options` are those of `vgg`."""
    return vgg([2, 2, 2, 2, 2], **without_timms(options))


@register_model
def cifar_vgg16(pretrained: bool = False, **options: Any) -> CifarNet:
    """VGG-16: 14,774,436 parameters at 100 classes; `options` are those of `vgg`."""
    return vgg([2, 2, 3, 3, 3], **without_timms(options))


@register_model
def cifar_vgg19(pretrained: bool = False, **options: Any) -> CifarNet:
    """VGG-19: 20,086,692 parameters at 100 classes; `options` are those of `vgg`."""
    return vgg([2, 2, 4, 4, 4], **without_timms(options))


@register_model
def cifar_mobilenetv2(pretrained: bool = False, **options: Any) -> CifarNet:
    """MobileNetV2, half as wide: 812,836 parameters at 100 classes; `options` are those of `mobilenetv2`."""
    return mobilenetv2(**without_timms(options))


@register_model
def cifar_shufflenetv1(pretrained: bool = False, **options: Any) -> CifarNet:
    """ShuffleNet: 949,258 parameters at 100 classes; `options` are those of `shufflenetv1`."""
    return shufflenetv1(**without_timms(options))


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **options: Any) -> CifarNet:
    """ShuffleNet V2: 1,355,528 parameters at 100 classes; `options` are those of `shufflenetv2`."""
    return shufflenetv2(**without_timms(options))
