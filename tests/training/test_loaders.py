from __future__ import annotations

import gc
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kd.data.source import AUGMENTS
from kd.data.split import Split
from kd.errors import InputError
from kd.training.loaders import Batch, EpochLoader

COUNT, SIDE = 23, 16


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Split, Split]:
    """The same samples in memory and as files."""
    folder = tmp_path_factory.mktemp("images")
    images = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    paths = tuple(folder / f"{i}.png" for i in range(COUNT))
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    ids, targets = torch.arange(COUNT) * 7 + 3, torch.arange(COUNT) % 5
    held = Split(ids, targets, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return held, Split(ids, targets, paths=paths, side=SIDE, channels=3)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert set(a) == set(b) == {"image", "target", "id", "row"}
        assert all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


def rows(loader: EpochLoader) -> list[int]:
    return [row for batch in loader for row in batch["row"].tolist()]


def test_a_batch_is_what_it_says(pair: tuple[Split, Split]) -> None:
    split, _ = pair
    batches = list(EpochLoader(split, 5, shuffle=True, seed=1))
    assert [len(batch["id"]) for batch in batches] == [5, 5, 5, 5, 3]
    for batch in batches:
        assert batch["image"].dtype == torch.float32 and batch["image"].shape[1:] == (3, SIDE, SIDE)
        assert all(batch[name].dtype == torch.int64 for name in ("target", "id", "row"))
        assert split.ids[batch["row"]].equal(batch["id"]) and split.targets[batch["row"]].equal(batch["target"])
        assert split.images is not None and (split.images[batch["row"]] / 255).equal(batch["image"])
    assert sorted(row for batch in batches for row in batch["row"].tolist()) == list(range(COUNT))


@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("size", [None, 12, 20])
def test_memory_and_files_and_any_number_of_workers_give_the_same(
    pair: tuple[Split, Split], name: str, size: int | None
) -> None:
    held, files = pair
    choices = {"seed": 3, "augment": name, "size": size, "shuffle": True, "position": lambda: (2, 0)}
    first = list(EpochLoader(held, 6, **choices))  # type: ignore[arg-type]
    assert first[0]["image"].shape[-1] == (size or SIDE)
    for workers in (0, 2) if size is None else (0,):
        assert_same(first, list(EpochLoader(files, 6, workers=workers, **choices)))  # type: ignore[arg-type]


def test_more_workers_than_cores_or_batches(pair: tuple[Split, Split]) -> None:
    held, files = pair
    assert_same(list(EpochLoader(held, 12)), list(EpochLoader(files, 12, workers=5)))


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_a_pass_from_the_middle_is_the_tail(pair: tuple[Split, Split], kind: int, first: int) -> None:
    choices = {"seed": 9, "augment": "crop_flip", "shuffle": True}
    whole = list(EpochLoader(pair[kind], 5, position=lambda: (3, 0), **choices))  # type: ignore[arg-type]
    tail = EpochLoader(pair[kind], 5, position=lambda: (3, first), **choices)  # type: ignore[arg-type]
    assert_same(whole[first:], list(tail))
    assert len(tail) == 5


def test_position_is_asked_at_the_first_batch_and_not_before(pair: tuple[Split, Split]) -> None:
    where = (0, 0)
    asked = []

    def position() -> tuple[int, int]:
        asked.append(where)
        return where

    loader = EpochLoader(pair[0], 5, shuffle=True, position=position)
    iterator = iter(loader)
    assert asked == []
    where = (4, 2)
    assert next(iterator)["row"].tolist() == loader.order(4)[10:15].tolist()
    assert asked == [(4, 2)]
    assert len(list(iterator)) == 2 and len(asked) == 1


def test_order_depends_on_seed_and_epoch_alone(pair: tuple[Split, Split]) -> None:
    held, files = pair
    order = EpochLoader(held, 5, shuffle=True, seed=1).order(2)
    assert order.sort().values.equal(torch.arange(COUNT))
    torch.manual_seed(99)
    assert EpochLoader(files, 3, shuffle=True, seed=1, augment="crop_flip", workers=2).order(2).equal(order)
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not EpochLoader(held, 5, shuffle=True, seed=seed).order(epoch).equal(order)
    assert EpochLoader(held, 5, seed=1).order(2).equal(torch.arange(COUNT))


def test_without_position_each_pass_is_the_same(pair: tuple[Split, Split]) -> None:
    loader = EpochLoader(pair[0], 5, shuffle=True, augment="crop_flip")
    assert_same(list(loader), list(loader))


def test_epochs_differ_in_order_and_in_views(pair: tuple[Split, Split]) -> None:
    epoch = 0
    loader = EpochLoader(pair[0], COUNT, augment="crop_flip", position=lambda: (epoch, 0))
    (first,) = loader
    epoch = 1
    (second,) = loader
    assert first["id"].equal(second["id"]) and not first["image"].equal(second["image"])
    loader = EpochLoader(pair[0], COUNT, shuffle=True, position=lambda: (epoch, 0))
    later = rows(loader)
    epoch = 2
    assert rows(loader) != later


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(pair: tuple[Split, Split], workers: int) -> None:
    for split in pair:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        list(EpochLoader(split, 5, shuffle=True, augment="resized_crop_flip", workers=workers))
        assert torch.get_rng_state().equal(before[0]) and random.getstate() == before[1]
        assert (np.random.get_state()[1] == before[2]).all()


def test_two_passes_at_once_do_not_disturb_each_other(pair: tuple[Split, Split]) -> None:
    loader = EpochLoader(pair[1], 5, shuffle=True, augment="shift", workers=1)
    expected = list(EpochLoader(pair[0], 5, shuffle=True, augment="shift"))
    both = list(zip(loader, loader, strict=True))
    assert_same(expected, [a for a, _ in both])
    assert_same(expected, [b for _, b in both])


def test_a_pass_can_be_left_early(pair: tuple[Split, Split]) -> None:
    iterator = iter(EpochLoader(pair[1], 2, workers=2))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("batch", "drop_last", "count"), [(5, False, 5), (5, True, 4), (23, True, 1), (100, False, 1)])
def test_the_length(pair: tuple[Split, Split], batch: int, drop_last: bool, count: int) -> None:
    for split in pair:
        loader = EpochLoader(split, batch, drop_last=drop_last)
        assert len(loader) == count == len(list(loader))


def test_an_empty_split_has_no_batches(pair: tuple[Split, Split]) -> None:
    for split in pair:
        empty = split.subset(torch.empty(0, dtype=torch.int64))
        assert list(EpochLoader(empty, 5, drop_last=True, workers=2)) == [] and len(EpochLoader(empty, 5)) == 0


def test_sizes_that_cannot_be_are_refused(pair: tuple[Split, Split]) -> None:
    with pytest.raises(InputError, match=r"fit\.batch_size=100 is larger than the 23 samples; .* fit\.drop_last=false"):
        EpochLoader(pair[0], 100, drop_last=True)
    with pytest.raises(InputError, match=r"fit\.batch_size=0: give 1 or more"):
        EpochLoader(pair[0], 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_one_line_from_any_process(pair: tuple[Split, Split], tmp_path: Path, workers: int) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    _, files = pair
    assert files.paths is not None
    split = Split(files.ids, files.targets, paths=(*files.paths[:-1], bad), side=SIDE, channels=3)
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        list(EpochLoader(split, 5, workers=workers))
    gc.collect()
    assert time.monotonic() - started < 4  # the workers are gone at once, and not when their time is up
    assert str(caught.value).startswith(f"{bad} is no image") and "\n" not in str(caught.value)


def test_images_in_memory_are_not_copied_on_their_own_device(pair: tuple[Split, Split]) -> None:
    loader = EpochLoader(pair[0], 5)
    assert loader._images is pair[0].images


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTS)
def test_a_gpu_is_never_waited_for_and_gives_the_same(pair: tuple[Split, Split], name: str) -> None:
    held, files = pair
    choices = {"augment": name, "shuffle": True}
    here = list(EpochLoader(held, 5, **choices))  # type: ignore[arg-type]
    iterator = iter(EpochLoader(held, 5, device="cuda", **choices))  # type: ignore[arg-type]
    there = [next(iterator)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        there += list(iterator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    from_files = list(EpochLoader(files, 5, device="cuda", workers=2, **choices))  # type: ignore[arg-type]
    for a, b, c in zip(here, there, from_files, strict=True):
        assert b["image"].device.type == "cuda" and b["image"].equal(c["image"])
        assert all(a[key].equal(b[key].cpu()) for key in ("target", "id", "row"))
        torch.testing.assert_close(b["image"].cpu(), a["image"], rtol=0, atol=1e-5)


def test_a_batch_s_images_belong_to_the_batch(pair: tuple[Split, Split]) -> None:
    split, _ = pair
    before: Tensor = split.images.clone()  # type: ignore[union-attr]
    for batch in EpochLoader(split, 5):
        batch["image"].zero_()
    assert split.images is not None and split.images.equal(before)
