"""Files of images that were made: whole, of the right shape, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kd.data.dreams import IMAGES, SHARD, read, shard, write
from kd.errors import KDError


def test_what_is_written_is_read_as_a_split(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    write(tmp_path / IMAGES, images, torch.tensor([0, 1, 2, 0, 1]))
    split = read(tmp_path / IMAGES, 3, 4)
    assert split.images is not None and split.images.equal(images)
    assert split.targets.tolist() == [0, 1, 2, 0, 1] and split.ids.tolist() == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == [IMAGES]  # no half of it beside


def test_a_shard_is_found_by_its_pattern(tmp_path: Path) -> None:
    write(tmp_path / shard(12), torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.tensor([0]))
    assert [path.name for path in tmp_path.glob(SHARD)] == ["dream-12.safetensors"]


def test_other_images_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / IMAGES
    with pytest.raises(KDError, match="no images can be read from"):
        read(path, 1, 4)
    write(path, torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(KDError, match=r"holds images of \(2, 1, 4, 4\) torch.uint8 for 2 targets"):
        read(path, 3, 4)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(KDError, match="no images can be read from"):
        read(path, 1, 4)
