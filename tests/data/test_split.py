from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import kd.data
from kd.data.augment import uniform
from kd.data.split import Split, Splits, held, stratified, tensor


def split(count: int = 6) -> Split:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return Split(torch.arange(count) * 10, torch.arange(count) % 3, images)


def test_the_package_hands_them_out() -> None:
    assert kd.data.Split is Split and kd.data.Splits is Splits
    with pytest.raises(AttributeError, match="no attribute 'Spilt'"):
        _ = kd.data.Spilt


def test_a_subset_keeps_ids_and_images_together() -> None:
    part = split().subset(torch.tensor([4, 1]))
    assert part.ids.tolist() == [40, 10] and part.targets.tolist() == [1, 1] and len(part) == 2
    assert part.images is not None and part.images[:, 0, 0, 0].tolist() == [4, 1]
    assert (part.side, part.channels) == (4, 3)


def test_without_is_the_rest_in_order() -> None:
    assert split().without(torch.tensor([4, 1])).ids.tolist() == [0, 20, 30, 50]


def test_files_follow_their_rows() -> None:
    paths = tuple(Path(f"{i}.png") for i in range(4))
    whole = Split(torch.arange(4), torch.zeros(4, dtype=torch.int64), paths=paths, side=8, channels=1)
    part = whole.subset(torch.tensor([3, 0]))
    assert part.paths == (paths[3], paths[0]) and (part.side, part.channels) == (8, 1)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"images": torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "paths": (Path("a"), Path("b"))},
        {"images": torch.zeros(3, 1, 4, 4, dtype=torch.uint8)},
    ],
)
def test_what_does_not_fit_together_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"images"):
        Split(torch.arange(2), torch.arange(2), **given)  # type: ignore[arg-type]


def test_held_copies_whole_numbers_to_int64() -> None:
    part = held(np.zeros((2, 1, 4, 4), np.uint8), np.array([1, 2], np.uint8), np.array([7, 9]))
    assert part.targets.dtype == part.ids.dtype == torch.int64 and part.ids.tolist() == [7, 9]
    source = np.array([1, 2])
    copy = tensor(source)
    source[0] = 5
    assert copy.tolist() == [1, 2]


TARGETS = torch.tensor([0] * 500 + [1] * 300 + [2] * 199 + [3])
IDS = torch.arange(1000) + 5000


def test_each_class_has_its_share() -> None:
    rows = stratified(IDS, TARGETS, 100, seed=0)
    assert len(rows) == 100 == len(rows.unique()) and rows.diff().gt(0).all()
    assert TARGETS[rows].bincount(minlength=4).tolist() == [50, 30, 20, 0]


@pytest.mark.parametrize("count", [0, 1, 7, 999, 1000])
def test_the_count_is_exact(count: int) -> None:
    assert len(stratified(IDS, TARGETS, count, seed=3)) == count


def test_the_draw_depends_on_ids_and_seed_and_not_on_the_order() -> None:
    rows = stratified(IDS, TARGETS, 100, seed=0)
    shuffle = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    again = stratified(IDS[shuffle], TARGETS[shuffle], 100, seed=0)
    assert set(IDS[shuffle][again].tolist()) == set(IDS[rows].tolist())
    other = stratified(IDS, TARGETS, 100, seed=1)
    assert len(set(other.tolist()) & set(rows.tolist())) < 30


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    stratified(IDS, TARGETS, 100, seed=0)
    assert torch.get_rng_state().equal(before)


def test_being_in_validation_says_nothing_about_augmentation() -> None:
    # Drawn from the same numbers, the samples left in train would never see part of the crops of epoch 0.
    ids = torch.arange(20_000)
    taken = stratified(ids, torch.zeros_like(ids), 2_000, seed=0)
    for stream in range(5):
        assert abs(uniform(0, ids[taken], 0, stream).mean().item() - 0.5) < 0.03


def test_classes_need_not_be_numbered_from_zero() -> None:
    targets = torch.tensor([7, 7, 7, 7, -2, -2])
    assert targets[stratified(torch.arange(6), targets, 3, seed=0)].tolist().count(7) == 2
