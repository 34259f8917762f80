"""Augmentation without state: what happens to a sample depends on the seed, its id and the view, and on nothing else.

Not on the order of the batch, its size, the number of workers or what was drawn before, so training may stop anywhere
and go on elsewhere. Random numbers are hashes in integer arithmetic, the same on CPU and GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.data.source import AUGMENTS
from kd.errors import InputError, nearest

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_APART = 0xD1342543DE82EF95
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def bits(seed: int, ids: Tensor, view: int, stream: int | Tensor) -> Tensor:
    """64 random bits for each id, as int64: splitmix64, started at a hash of seed and view.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).

    Args:
        seed: any whole number.
        ids: int64, any shape; each is a position in the sequence, and each stream a sequence far from the others.
        view: which look at the sample, for instance the epoch.
        stream: which of the numbers for the same look; a tensor of several broadcasts with ``ids``.

    >>> bits(0, torch.tensor([7, 8]), 0, 0).shape
    torch.Size([2])
    """
    start = 0
    for part in (seed, view):
        start = _mixed(start + part + _GOLDEN)
    apart = stream * _signed(_APART) if isinstance(stream, Tensor) else _signed(stream * _APART)
    return mix64((ids + 1) * _signed(_GOLDEN) + apart + _signed(start))


def mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 (the product wraps, as it does for unsigned numbers).

    >>> golden = 0x9E3779B97F4A7C15 - 2**64
    >>> int(mix64(torch.tensor(1234567) + golden))  # the sequence of seed 1234567 begins with it
    6457827717110365317
    """
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A logical shift to the right: the one torch has keeps the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int64 with the same last 64 bits."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def uniform(seed: int, ids: Tensor, view: int, stream: int | Tensor) -> Tensor:
    """A random number in [0, 1) for each id: float32, a multiple of 2^-24, pure in (seed, id, view, stream).

    >>> ids = torch.arange(4)
    >>> uniform(0, ids, view=1, stream=0).equal(uniform(0, ids.flip(0), view=1, stream=0).flip(0))
    True
    """
    return _shifted(bits(seed, ids, view, stream), 40).float() * 2**-24


def augment(images: Tensor, name: str, seed: int, ids: Tensor, view: int, size: int | None = None) -> Tensor:
    """A batch as a network is given it: one look at each sample, in [0, 1], on the images' own device.

    - ``none``: the centre.
    - ``shift``: moved by up to 2 pixels; zeros come in.
    - ``crop_flip``: 4 pixels of zeros all round, a random crop, mirrored half of the time (He et al. 2015, 4.2).
    - ``resized_crop_flip``: a random box of 8 to 100 % of the area and a ratio of 3:4 to 4:3, brought to size, mirrored
      half of the time (Szegedy et al. 2014; a box that would stick out is cut to the side, not drawn again).

    The first three move whole pixels, exactly, on every device; only the last one interpolates.

    Args:
        images: (B, C, side, side), uint8 in 0..255 or floating in [0, 1].
        name: one of the four.
        seed: of the run.
        ids: int64 (B,).
        view: which look, for instance the epoch.
        size: pixels of the result (None: as they are). If it is larger than the side, the result is scaled up.

    Raises:
        InputError: at another name, with the nearest ones.

    >>> images = torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)
    >>> augment(images, "none", 0, torch.arange(2), 0, size=2)
    tensor([[[[1., 1.],
              [1., 1.]]],
            [[[1., 1.],
              [1., 1.]]]])
    """
    if name not in AUGMENTS:
        raise InputError(f"data.augment={name!r} is none of {', '.join(AUGMENTS)}{nearest(name, AUGMENTS)}")
    size = images.shape[-1] if size is None else size
    if name == "resized_crop_flip":
        return _resized_crop_flip(_unit(images), seed, ids, view, size)
    crop = min(size, images.shape[-1])
    if name == "shift":
        images = _crop(images, crop, 2, seed, ids, view, flip=False)
    elif name == "crop_flip":
        images = _crop(images, crop, 4, seed, ids, view, flip=True)
    elif crop < images.shape[-1]:
        start = (images.shape[-1] - crop) // 2
        images = images[..., start : start + crop, start : start + crop]
    images = _unit(images)
    return images if crop == size else F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def _unit(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.float().div_(255)


def _crop(images: Tensor, size: int, pad: int, seed: int, ids: Tensor, view: int, flip: bool) -> Tensor:
    """A square at a random place of the padded image, as an exact copy of whole pixels."""
    count, channels, side = images.shape[:3]
    device = images.device
    mirrored, *place = uniform(seed, ids, view, torch.arange(3, device=device)[:, None])
    if flip:
        # Chosen by index out of both: torch.where on bytes takes ten times as long.
        mirrored = (mirrored < 0.5).long()
        both = torch.cat((images, images.flip(-1)))
        images = both.index_select(0, torch.arange(count, device=device) + count * mirrored)
    width = side + 2 * pad
    top, left = ((draw * (width - size + 1)).long() for draw in place)
    # All rows of pixels of the batch lie one after the other; a crop is `size` of them, each from its left on.
    row = torch.arange(count * channels, device=device).view(count, channels, 1) * width + top.view(-1, 1, 1)
    first = (row + torch.arange(size, device=device)) * width + left.view(-1, 1, 1)
    windows = F.pad(images, (pad, pad, pad, pad)).flatten().unfold(0, size, 1)
    return windows.index_select(0, first.flatten()).view(count, channels, size, size)


def _resized_crop_flip(images: Tensor, seed: int, ids: Tensor, view: int, size: int) -> Tensor:
    mirrored, y, x, area, ratio = uniform(seed, ids, view, torch.arange(5, device=images.device)[:, None])
    area = 0.08 + 0.92 * area
    stretch = ((2 * ratio - 1) * (math.log(4 / 3) / 2)).exp()  # the ratio's root; the ratio is uniform in its logarithm
    width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)  # 1 is the whole side
    sign = 1 - 2 * (mirrored < 0.5).float()
    # The coordinates run from -1 to 1, so a box of width w has its centre within ±(1 - w). Made by hand: affine_grid is
    # a matrix product, which would lose bits under autocast or TF32.
    line = (2 * torch.arange(size, device=images.device) + 1) / size - 1
    columns = ((2 * x - 1) * (1 - width))[:, None] + (width * sign)[:, None] * line
    rows = ((2 * y - 1) * (1 - height))[:, None] + height[:, None] * line
    shape = (len(images), size, size)
    grid = torch.stack((columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)), -1).to(images.dtype)
    # Half a pixel beyond the border may be asked for; rounding may leave [0, 1] by a hair.
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False).clamp_(0, 1)
