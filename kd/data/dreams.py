"""Images that were made, not taken: what a stage writes of them, shard by shard, and the split that they become."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kd.errors import KDError

if TYPE_CHECKING:
    from torch import Tensor

    from kd.data.split import Split

IMAGES = "images.safetensors"
SHARD = "dream-*.safetensors"  # what survives a kill in a work folder


def shard(number: int) -> str:
    """The file of one batch of images.

    >>> shard(7)
    'dream-7.safetensors'
    """
    return SHARD.replace("*", str(number))


def write(path: Path, images: Tensor, targets: Tensor) -> None:
    """Write images and what they were made to show, whole or not at all.

    Args:
        path: of the file.
        images: uint8 (N, C, side, side).
        targets: int64 (N,).
    """
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    save_file({"images": images.cpu().contiguous(), "targets": targets.cpu().contiguous()}, temporary)
    temporary.replace(path)


def read(path: Path, channels: int, side: int) -> Split:
    """The images of a file as a split; a sample's id is its row.

    Args:
        path: what `write` wrote.
        channels: that each must have.
        side: likewise.

    Raises:
        KDError: if it cannot be read, or holds other images.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder) / IMAGES, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([3, 4]))
    ...     read(Path(folder) / IMAGES, 1, 8).targets
    tensor([3, 4])
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from kd.data.split import Split

    try:
        found = load_file(path)
        images, targets = found["images"], found["targets"]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise KDError(f"no images can be read from {path}: {str(error).splitlines()[0]}") from error
    if images.dtype != torch.uint8 or images.shape[1:] != (channels, side, side) or len(images) != len(targets):
        raise KDError(
            f"{path} holds images of {tuple(images.shape)} {images.dtype} for {len(targets)} targets; "
            f"uint8 (N, {channels}, {side}, {side}) was meant"
        )
    return Split(torch.arange(len(targets)), targets, images)
