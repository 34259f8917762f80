from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from kd.data import cache
from kd.data.readers import Blob
from kd.errors import InputError


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are really read."""
    names: list[str] = []
    real = cache._sha256
    monkeypatch.setattr(cache, "_sha256", lambda path: (names.append(path.name), real(path))[1])
    return names


def test_a_file_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    a, b, kept = tmp_path / "a", tmp_path / "b", tmp_path / "cache" / "digests.json"
    a.write_bytes(b"one")
    b.write_bytes(b"two")
    assert cache.file_digests([a, b], kept) == [sha(b"one"), sha(b"two")]
    assert cache.file_digests([b, a], kept) == [sha(b"two"), sha(b"one")]
    assert reads == ["a", "b"]


def test_a_changed_file_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    file, kept = tmp_path / "a", tmp_path / "digests.json"
    file.write_bytes(b"one")
    cache.file_digests([file], kept)
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert cache.file_digests([file], kept) == [sha(b"two")]
    assert reads == ["a", "a"]


def test_a_packed_file_counts_as_its_content(tmp_path: Path) -> None:
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(b"one"))
    assert cache.file_digests([file], tmp_path / "digests.json") == [sha(b"one")]


@pytest.mark.parametrize("text", ["{", "[1]", '{"PATH": "nonsense"}', '{"PATH": [1, 2]}'])
def test_a_damaged_cache_is_remade(tmp_path: Path, text: str) -> None:
    file, kept = tmp_path / "a", tmp_path / "digests.json"
    file.write_bytes(b"one")
    kept.write_text(text.replace("PATH", str(file)))
    assert cache.file_digests([file], kept) == [sha(b"one")]
    assert json.loads(kept.read_text())[str(file)][2] == sha(b"one")


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    a, b, kept = tmp_path / "a", tmp_path / "b", tmp_path / "digests.json"
    a.write_bytes(b"one")
    b.write_bytes(b"two")
    cache.file_digests([a], kept)
    cache.file_digests([b], kept)
    assert set(json.loads(kept.read_text())) == {str(a), str(b)}


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert cache.file_digests([file], file / "digests.json") == [sha(b"one")]


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    good, bad, kept = tmp_path / "a", tmp_path / "b.gz", tmp_path / "digests.json"
    good.write_bytes(b"one")
    bad.write_bytes(b"not packed")
    with pytest.raises(InputError, match=r"cannot read the data file .*b\.gz"):
        cache.file_digests([good, bad], kept)
    assert set(json.loads(kept.read_text())) == {str(good)}


class Maker:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"train": np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2), "test": np.zeros((1, 3, 2, 2), np.uint8)}


def test_arrays_are_made_once(tmp_path: Path) -> None:
    make = Maker()
    first, second = cache.arrays(tmp_path, "key", make), cache.arrays(tmp_path, "key", make)
    assert make.calls == 1 and set(first) == set(second) == {"train", "test"}
    assert all((first[name] == second[name]).all() for name in first)
    cache.arrays(tmp_path, "other", make)
    assert make.calls == 2
    assert sorted(p.name for p in (tmp_path / "decoded").iterdir()) == ["key.safetensors", "other.safetensors"]


def test_without_a_folder_they_are_made_each_time() -> None:
    make = Maker()
    cache.arrays(None, "key", make)
    cache.arrays(None, "key", make)
    assert make.calls == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_arrays_are_made_again(tmp_path: Path, damage: str) -> None:
    make = Maker()
    expected = cache.arrays(tmp_path, "key", make)
    file = tmp_path / "decoded" / "key.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 255
    file.write_bytes({"flip": bytes(data), "cut": bytes(data[:-5]), "empty": b""}[damage])
    found = cache.arrays(tmp_path, "key", make)
    assert make.calls == 2 and (found["train"] == expected["train"]).all()
    assert cache.arrays(tmp_path, "key", make) and make.calls == 2


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert cache.arrays(tmp_path / "file", "key", Maker())["test"].shape == (1, 3, 2, 2)


def blobs(count: int) -> list[Blob]:
    return [Blob(f"row {i}", bytes([i])) for i in range(count)]


def test_blobs_become_files_in_their_order(tmp_path: Path) -> None:
    paths = cache.unpacked(tmp_path, "key", blobs(12), 12)
    assert [p.read_bytes() for p in paths] == [bytes([i]) for i in range(12)]
    assert cache.unpacked(tmp_path, "key", iter(()), 12) == paths  # nothing is read again


def test_an_interrupted_unpacking_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> object:
        yield from blobs(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.unpacked(tmp_path, "key", broken(), 12)  # type: ignore[arg-type]
    assert list((tmp_path / "files").iterdir()) == []
    assert len(cache.unpacked(tmp_path, "key", blobs(12), 12)) == 12


def test_a_folder_that_lost_files_is_named(tmp_path: Path) -> None:
    cache.unpacked(tmp_path, "key", blobs(3), 3)[0].unlink()
    with pytest.raises(InputError, match=r"holds 2 of 3 images; delete that folder"):
        cache.unpacked(tmp_path, "key", blobs(3), 3)


def test_no_room_to_unpack_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot unpack 3 images into .*; make room there"):
        cache.unpacked(tmp_path / "file", "key", blobs(3), 3)
