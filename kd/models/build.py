"""From a name to a net, and what stands in front of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import get_deprecated_models, get_pretrained_cfg, is_model_pretrained
from torch import Tensor, nn

from kd import names
from kd.compress.measure import looking
from kd.errors import InputError, nearest
from kd.models import cifar, nets  # noqa: F401  (they register our own with timm)
from kd.models.outline import STAGES

# What the data or the key decides, and what would bring in weights that no key names.
RESERVED = {"cache_dir", "checkpoint_path", "exportable", "img_size", "in_chans", "no_jit", "num_classes", "scriptable"}
RESERVED |= {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_OWN = "own_mean_std"


def create(
    name: str,
    *,
    num_classes: int,
    in_chans: int,
    size: int,
    pretrained: bool = False,
    options: Mapping[str, Any] | None = None,
    stages: Sequence[str] | None = None,
) -> nn.Module:
    """A net by its timm name, or one of ours such as `seed_cnn`, shown to fit the images and classes.

    Its weights are drawn from the global generator: seed it first.

    Args:
        name: such as `resnet18`, or with a tag of pretrained weights, `resnet18.a1_in1k`.
        num_classes: width of the head.
        in_chans: channels of the images.
        size: height and width of the images, px; passed on where the architecture must know it.
        pretrained: fetch published weights through timm; the head is new where the classes differ.
        options: further arguments of the architecture, such as `{"drop_rate": 0.1}`.
        stages: paths of the layers that its `outline` takes for stages, shallow to deep, in the place of what it finds.

    Raises:
        InputError: if there is no such net, weights cannot be had, an option is wrong, or the images do not fit.

    >>> net = create("seed_cnn", num_classes=10, in_chans=1, size=28)
    >>> net(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    >>> create("resnet81", num_classes=10, in_chans=1, size=28)
    Traceback (most recent call last):
        ...
    kd.errors.InputError: there is no model 'resnet81'; did you mean 'resnet18' or ...
    """
    fixed_size = _known(name, pretrained)
    options = dict(options or {})
    if taken := sorted(RESERVED & options.keys()):
        raise InputError(f"options of {name} hold {taken[0]!r}, which the data or the model's own fields decide")
    shape: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if fixed_size:
        shape["img_size"] = size
    try:
        net = timm.create_model(name, pretrained=pretrained, **shape, **options)
    except InputError:
        raise
    except Exception as error:  # each architecture, and the hub, raises as it likes; the user needs one line
        if pretrained:
            raise InputError(
                f"{name} could not be built with its pretrained weights ({_line(error)}); is there a network, or a "
                "cache in HF_HOME? pretrained=false starts from random weights"
            ) from error
        raise InputError(f"{name} cannot be built with options {options}: {_line(error)}") from error
    _fits(net, name, num_classes, (in_chans, size, size))
    if stages is not None:
        name_stages(net, stages)
    if pretrained and (published := get_pretrained_cfg(name)):
        vars(net)[_OWN] = published.mean, published.std
    return net


def name_stages(net: nn.Module, stages: Sequence[str]) -> None:
    """Leave word in a net of which layers are its stages, for `outline`.

    Args:
        net: the plain net.
        stages: paths of layers, shallow to deep.

    Raises:
        InputError: if they are no list of its layers.
    """
    paths = [names.layer(path) for path in stages if isinstance(path, str)] if not isinstance(stages, str) else []
    if not paths or len(paths) != len(stages):
        raise InputError(f"stages are {stages!r}; a list of layers was meant, such as [layer2, layer3]")
    modules = dict(net.named_modules())
    for path in paths:
        if not path or path not in modules:
            raise InputError(f"stages: {path!r} is no layer of {type(net).__name__}{nearest(path, modules)}")
    vars(net)[STAGES] = tuple(stages)


def preprocessing(
    net: nn.Module, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and std by channel to put before a net: its own if it came pretrained, else the data's.

    Args:
        net: as `create` gave it.
        mean: of the data, one a channel.
        std: of the data, one a channel.

    >>> preprocessing(nn.Identity(), [0.5], [0.25])
    ((0.5,), (0.25,))
    """
    if _OWN not in vars(net):
        return tuple(mean), tuple(std)
    own_mean, own_std = vars(net)[_OWN]
    if len(own_mean) == len(mean):
        return tuple(own_mean), tuple(own_std)
    # timm folds the first convolution to the images' channels; one number serves them all.
    return (sum(own_mean) / len(own_mean),) * len(mean), (sum(own_std) / len(own_std),) * len(std)


class Normalised(nn.Module):
    """A net behind its own input statistics: images in [0, 1] go in, whatever data they come from.

    Teacher and student may want other statistics of the same image, so each carries its own. They are no state: the
    weights saved are those of `net`.

    Args:
        net: gets `(images - mean) / std`.
        mean: one a channel, or one for all.
        std: as many, above 0.

    Raises:
        InputError: if they are not as many, or a std is not above 0.

    >>> Normalised(nn.Identity(), [0.5], [0.25])(torch.ones(1, 1, 1, 1))
    tensor([[[[2.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean) or not all(value > 0 for value in std):
            raise InputError(f"mean {list(mean)} and std {list(std)} must be as many, one a channel, each std above 0")
        self.net = net
        self.statistics = [float(value) for value in mean], [float(value) for value in std]  # as they were written
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The net's output for images (N, C, H, W) in [0, 1]."""
        output: Tensor = self.net(self.normalised(images))
        return output

    def normalised(self, images: Tensor) -> Tensor:
        """What the net is given of images in [0, 1]."""
        return (images - self.mean) / self.std


def _known(name: str, pretrained: bool) -> bool:
    """Whether a model by this name must be told the image size; refused if there is none."""
    architecture = name.partition(".")[0]
    renamed = get_deprecated_models()
    if architecture in renamed:
        now = renamed[architecture]
        raise InputError(f"timm no longer knows the model {name!r}" + (f"; its name is now {now!r}" if now else ""))
    if not timm.is_model(name) or "/" in name:
        hint = nearest(architecture, timm.list_models()) or "; timm.list_models() names those there are"
        raise InputError(f"there is no model {name!r}{hint}")
    try:
        described = get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [tagged for tagged in timm.list_pretrained() if tagged.startswith(f"{architecture}.")]
        raise InputError(f"{architecture} has no weights tagged as in {name!r}{nearest(name, tags)}") from error
    if pretrained and not is_model_pretrained(name):
        raise InputError(f"no weights are published for {name!r}; set pretrained=false")
    return bool(described and described.fixed_input_size)


def _fits(net: nn.Module, name: str, num_classes: int, shape: tuple[int, int, int]) -> None:
    """Pass one blank image through the net: what does not fit is found here, not in the first training step."""
    channels, size, _ = shape
    given = f"images of {size}x{size} with {channels} channel{'s' if channels > 1 else ''}"
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    for side in patch if isinstance(patch, tuple | list) else (patch,):
        if isinstance(side, int) and size % side:
            raise InputError(
                f"{name} cuts patches of {side} px, which do not tile {given}: the rest would be dropped unseen; "
                f"set options.patch_size to a divisor of {size}, or choose another model"
            )
    try:
        with looking(net):
            output = net(torch.zeros(1, *shape))
    except Exception as error:  # as above
        raise InputError(
            f"{name} does not take {given} ({_line(error)}); choose another model or its options"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (1, num_classes):
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise InputError(f"{name} gives {found} for one image, not (1, {num_classes}) logits; choose a classifier")


def _line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
