from __future__ import annotations

import builtins
import gzip
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kd.data import readers
from kd.data.readers import Blob
from kd.errors import InputError

# --- IDX


def test_idx_plain_and_packed(tmp_path: Path, make: Any) -> None:
    images = make.pixels(3, 28, 28)
    (tmp_path / "a").write_bytes(make.idx(images))
    (tmp_path / "a.gz").write_bytes(gzip.compress(make.idx(images)))
    for name in ("a", "a.gz"):
        found = readers.idx(tmp_path / name)
        assert (found == images).all() and found.flags.writeable


@pytest.mark.parametrize("damage", ["empty", "cut", "long", "type", "text", "header"])
def test_a_damaged_idx_is_named(tmp_path: Path, make: Any, damage: str) -> None:
    good = make.idx(make.pixels(3, 4, 4))
    bad = {
        "empty": b"",
        "cut": good[:-1],
        "long": good + b"x",
        "type": b"\0\0\x0d" + good[3:],
        "text": b"<html>404</html>",
        "header": good[:9],
    }[damage]
    (tmp_path / "a").write_bytes(bad)
    with pytest.raises(InputError, match=r"/a is damaged .*; delete it and run again"):
        readers.idx(tmp_path / "a")


def test_a_damaged_gz_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(InputError, match=r"a\.gz is damaged"):
        readers.idx(tmp_path / "a.gz")


# --- CIFAR's pickles


def test_a_batch_of_today(tmp_path: Path, make: Any) -> None:
    data = make.pixels(4, 3072)
    (tmp_path / "a").write_bytes(pickle.dumps({"data": data, "labels": [1, 2, 3, 4]}, protocol=4))
    found = readers.cifar(tmp_path / "a")
    assert (found["data"] == data).all() and found["labels"] == [1, 2, 3, 4]


def test_a_batch_as_python_2_wrote_it(tmp_path: Path) -> None:
    # Written out, opcode by opcode: protocol 2, numpy's old module names, bytes as latin-1 strings, and the flag 0
    # where numpy now wants False.
    data = bytes(range(250, 256))
    text = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x06" + data + b"tbU\x06labels](K\x05K\x06eu."
    )
    (tmp_path / "a").write_bytes(text)
    found = readers.cifar(tmp_path / "a")
    assert found["data"].tolist() == [[250, 251, 252], [253, 254, 255]] and found["labels"] == [5, 6]


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("what", [Evil(), {"data": Evil()}, {"data": np.load}])
def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(pickle.dumps(what))
    with pytest.raises(InputError, match=r"a is damaged \(it asks for .*, which no data file needs\)"):
        readers.cifar(tmp_path / "a")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("data", [b"", b"\x80\x02}(", b"nonsense", pickle.dumps(5)])
def test_a_damaged_pickle_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(InputError, match="a is damaged"):
        readers.cifar(tmp_path / "a")


# --- images


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF"])
def test_an_image_of_the_right_size_keeps_its_pixels(make: Any, form: str) -> None:
    image = make.pixels(1, 16, 16, 3)[0]
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, lossless=True) if form == "WEBP" else Image.fromarray(image).save(
        file, form
    )
    found = readers.decode(Blob("row 0", file.getvalue()), 16, 3)
    assert found.shape == (3, 16, 16) and found.flags.c_contiguous and (found == image.transpose(2, 0, 1)).all()


def test_grey_stays_grey(make: Any) -> None:
    image = make.pixels(1, 9, 9)[0]
    assert (readers.decode(Blob("", make.encoded(image)), 9, 1) == image).all()
    assert (readers.decode(Blob("", make.encoded(image)), 9, 3) == image).all()


def test_another_shape_gives_its_centre_square() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    for side in (10, 40, 50):
        found = readers.decode(Blob("", file.getvalue()), side, 3)
        assert (found[:, :, 2:-2] == 200).all() and (found >= 170).all()  # the filter looks beyond the square


def test_a_large_jpeg_is_read_at_a_reduced_scale_and_looks_the_same() -> None:
    line = np.linspace(0, 255, 512).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.repeat(np.repeat(line[:, None, None], 512, 1), 3, 2)).save(file, "JPEG")
    found = readers.decode(Blob("", file.getvalue()), 32, 3).astype(int)
    assert abs(found - ((np.arange(32) + 0.5) * 8)[:, None]).max() < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_read(mode: str, tmp_path: Path) -> None:
    array = np.full((8, 8), 200, np.uint16) * 257 if mode == "I;16" else np.full((8, 8), 200, np.uint8)
    image = Image.fromarray(array) if mode == "I;16" else Image.fromarray(array).convert(mode)
    file = tmp_path / "a.tif"
    image.save(file)
    for channels in (1, 3):
        found = readers.decode(file, 8, channels)
        assert found.shape == (channels, 8, 8)
        assert abs(found.astype(int) - (255 if mode == "1" else 200)).max() <= 4 or mode == "1"
    assert readers.header(file).grey == (mode in ("1", "L", "LA", "I;16"))


def test_odd_metadata_raises_no_warning(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(200)))
    assert readers.decode_rows([tmp_path / "a.png"], 8, 3).shape == (1, 3, 8, 8)
    assert readers.header(tmp_path / "a.png") == (8, 8, False)


@pytest.mark.parametrize("damage", ["text", "cut", "missing", "empty"])
def test_a_damaged_image_is_named(tmp_path: Path, make: Any, damage: str) -> None:
    file = tmp_path / "a.png"
    good = make.encoded(make.pixels(1, 32, 32, 3)[0])
    if damage != "missing":
        file.write_bytes({"text": b"not an image", "cut": good[: len(good) // 2], "empty": b""}[damage])
    with pytest.raises(InputError, match=r"a\.png is no image that can be read .*; replace it or take it out"):
        readers.decode(file, 32, 3)


def test_a_damaged_blob_is_named_by_its_row() -> None:
    with pytest.raises(InputError, match="shard row 7 is no image"):
        readers.header(Blob("shard row 7", b"nothing"))


@pytest.mark.parametrize("side", [8, 64])
def test_a_whole_set_in_its_order(make: Any, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    images = make.pixels(150, side, side)
    items = [Blob(f"row {i}", make.encoded(image)) for i, image in enumerate(images)]
    found = readers.decode_all(iter(items), 150, side, 1, "decoding")
    assert (found[:, 0] == images).all()


def test_files_and_blobs_decode_alike(tmp_path: Path, make: Any) -> None:
    make.write_folder(tmp_path, {"train": {"a": 3}})
    paths = sorted(tmp_path.rglob("*.png"))
    blobs = [Blob("", path.read_bytes()) for path in paths]
    assert (readers.decode_rows(paths, 16, 3) == readers.decode_all(blobs, 3, 16, 3, "")).all()


# --- parquet


def test_columns_and_names_are_found(tmp_path: Path, make: Any) -> None:
    images = make.pixels(12, 8, 8, 3)
    data = [make.encoded(image) for image in images]
    make.write_shard(
        tmp_path / "a.parquet", data[:7], [0, 1] * 3 + [0], image="photo", label="label", names=["cat", "dog"]
    )
    make.write_shard(tmp_path / "b.parquet", data[7:], [1] * 5, image="photo", label="label", names=["cat", "dog"])
    table = readers.parquet([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert table.labels == [0, 1] * 3 + [0] + [1] * 5 and table.names == ("cat", "dog")
    blobs = list(table.blobs())
    assert [blob.data for blob in blobs] == data
    assert blobs[8].where.endswith("b.parquet row 1")


def test_columns_without_metadata(tmp_path: Path, make: Any) -> None:
    data = [make.encoded(image) for image in make.pixels(4, 8, 8, 3)]
    make.write_shard(tmp_path / "a.parquet", data, ["x", "y", "x", "y"], image="img", label="fine_label", plain=True)
    table = readers.parquet([tmp_path / "a.parquet"])
    assert table.labels == ["x", "y", "x", "y"] and table.names is None
    assert [blob.data for blob in table.blobs()] == data


def test_given_columns_win(tmp_path: Path, make: Any) -> None:
    data = [make.encoded(image) for image in make.pixels(2, 8, 8, 3)]
    make.write_shard(tmp_path / "a.parquet", data, [3, 4], image="thumb", label="breed")
    table = readers.parquet([tmp_path / "a.parquet"], "thumb", "breed")
    assert table.labels == [3, 4] and len(list(table.blobs())) == 2


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (None, "breed", r"no image column found; set data\.image_column to one of thumb, breed"),
        ("thumb", None, r"no label column found; set data\.label_column"),
        ("thumbs", "breed", r"no column 'thumbs'; did you mean 'thumb'\?; set data\.image_column"),
    ],
)
def test_a_missing_column_is_named(
    tmp_path: Path, make: Any, image: str | None, label: str | None, message: str
) -> None:
    make.write_shard(tmp_path / "a.parquet", [b"x"], [3], image="thumb", label="breed")
    with pytest.raises(InputError, match=message):
        readers.parquet([tmp_path / "a.parquet"], image, label)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, None], "rows without a label"), ([0, -1], "rows without a label"), ([0.5, 1.0], "no class numbers or names")],
)
def test_labels_that_are_none(tmp_path: Path, make: Any, labels: list[Any], message: str) -> None:
    make.write_shard(tmp_path / "a.parquet", [b"x", b"y"], labels)
    with pytest.raises(InputError, match=message):
        readers.parquet([tmp_path / "a.parquet"])


def test_a_row_without_bytes_is_named(tmp_path: Path, make: Any) -> None:
    make.write_shard(tmp_path / "a.parquet", [b"x", None], [0, 1])
    with pytest.raises(InputError, match=r"a\.parquet row 1 holds no image bytes in 'image'; set data\.image_column"):
        list(readers.parquet([tmp_path / "a.parquet"]).blobs())


def test_a_damaged_shard_is_named(tmp_path: Path, make: Any) -> None:
    file = tmp_path / "a.parquet"
    make.write_shard(file, [b"x" * 1000] * 20, [0, 1] * 10)
    good = file.read_bytes()
    file.write_bytes(good[:-100])
    with pytest.raises(InputError, match=r"a\.parquet is damaged .*; delete it"):
        readers.parquet([file])


def test_without_pyarrow_the_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'kd\[hub\]'"):
        readers.parquet([tmp_path / "a.parquet"])
