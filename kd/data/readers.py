"""File formats to numpy arrays: IDX, CIFAR's batches, parquet shards, and any image that PIL can open."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kd.data.progress import track
from kd.errors import InputError, nearest

Bytes = NDArray[np.uint8]
_REMEDY = "delete it and run again to fetch it anew"


class Blob(NamedTuple):
    """An encoded image that is no file of its own, and where it came from."""

    where: str
    data: bytes


class Header(NamedTuple):
    """What an image says of itself before it is decoded."""

    width: int
    height: int
    grey: bool


def idx(path: Path) -> Bytes:
    """An IDX file of bytes (MNIST's format), plain or ``.gz``.

    Source: http://yann.lecun.com/exdb/mnist/ (zero, zero, type 8, number of dimensions, big-endian sizes, data).

    Raises:
        InputError: if it is no such file or is not as long as it says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}); {_REMEDY}") from error
    dimensions = data[3] if len(data) >= 4 and data[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4")) if len(data) >= start else ()
    if not dimensions or not shape or len(data) != start + int(np.prod(shape)):
        raise InputError(f"{path} is damaged (no IDX file, or cut short at {len(data)} bytes); {_REMEDY}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can make arrays and plain containers, and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names an array's pickle needs."""
        known = {
            "_reconstruct": np.empty(0).__reduce__()[0],  # its module was renamed in numpy 2
            "ndarray": np.ndarray,
            "dtype": np.dtype,
        }
        if module.partition(".")[0] == "numpy" and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data file needs")


def cifar(path: Path) -> dict[str, Any]:
    """One of CIFAR's pickled dictionaries, read without running what a pickle could hold.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html ("python version").

    Raises:
        InputError: if it is damaged or asks for more than arrays.
    """
    try:
        # numpy warns of a flag that old pickles spell 0 and not False.
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _ArraysOnly(file, encoding="latin1").load()
        return dict(found)
    except (pickle.UnpicklingError, OSError, EOFError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is damaged ({error}); {_REMEDY}") from error


def header(item: Path | Blob) -> Header:
    """Width, height and greyness of an encoded image; its pixels are not decoded.

    Raises:
        InputError: if it is no image.
    """
    with _quiet(), _opened(item) as image:
        return Header(image.width, image.height, image.mode in ("1", "L", "LA") or image.mode.startswith("I"))


def decode(item: Path | Blob, side: int, channels: int) -> Bytes:
    """The centre square of an image, brought to ``side`` pixels: uint8 (channels, side, side).

    An image that has this size already keeps its exact pixels; any other is resampled (bilinear, antialiased).

    Raises:
        InputError: if it is no image that can be read to its end.
    """
    with _opened(item) as image:
        try:
            image.draft(None, (side, side))  # lets a large JPEG be decoded at a half, quarter or eighth
            if image.mode.startswith("I"):  # 16 bits: keep the upper eight, where convert() would clip
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            image = image.convert("L" if channels == 1 else "RGB")
            if image.size != (side, side):
                short = min(image.size)
                left, top = (image.width - short) / 2, (image.height - short) / 2
                box = (left, top, left + short, top + short)
                image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(item, error) from error
        pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_rows(items: Sequence[Path], side: int, channels: int) -> Bytes:
    """The images of some files: uint8 (N, channels, side, side)."""
    with _quiet():
        return np.stack([decode(item, side, channels) for item in items])


def decode_all(items: Iterable[Path | Blob], count: int, side: int, channels: int, text: str) -> Bytes:
    """As `decode_rows`, for a whole set: with a progress bar, and several at a time where that is faster."""
    result = np.empty((count, channels, side, side), np.uint8)
    threads = min(16, os.cpu_count() or 1) if side >= 64 else 1  # small images: threads would only wait for each other
    rows = iter(range(count))
    with _quiet(), ThreadPoolExecutor(threads) as pool:
        mapped: Callable[..., Iterable[Bytes]] = map if threads == 1 else pool.map
        # In chunks: the pool would take in all encoded images at once, and they may not fit in memory.
        for chunk in _chunks(track(items, count, text), 64 * threads):
            for pixels in mapped(lambda item: decode(item, side, channels), chunk):
                result[next(rows)] = pixels
    return result


def _chunks(items: Iterable[Path | Blob], size: int) -> Iterator[list[Path | Blob]]:
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


@contextmanager
def _opened(item: Path | Blob) -> Iterator[Image.Image]:
    try:
        image = Image.open(item if isinstance(item, Path) else io.BytesIO(item.data))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(item, error) from error
    with image:
        yield image


def _unreadable(item: Path | Blob, error: Exception) -> InputError:
    where = item if isinstance(item, Path) else item.where
    return InputError(f"{where} is no image that can be read ({error}); replace it or take it out")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PIL's warnings about odd metadata in images that decode all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Table:
    """The labels of some parquet shards, and the way to their images."""

    labels: list[int] | list[str]
    names: tuple[str, ...] | None
    blobs: Callable[[], Iterator[Blob]]


def parquet(paths: Sequence[Path], image_column: str | None = None, label_column: str | None = None) -> Table:
    """Shards of images as the Hugging Face hub keeps them: columns of {bytes, path} and of labels.

    Columns that are not given are found: the image by its type in the schema's metadata or by its name, the label as
    ``fine_label`` or ``label``. Class names come from the same metadata where it has them.

    Raises:
        InputError: if pyarrow is absent, a file is damaged, or a column is missing, ambiguous or of another type.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError("parquet files need pyarrow, which is not installed: pip install 'kd[hub]'") from error

    labels: list[Any] = []
    path = paths[0]
    try:
        schema = pq.read_schema(path)
        features = _features(schema.metadata)
        image = _column(path, schema.names, image_column, "image", _image_names(features, schema.names))
        label = _column(path, schema.names, label_column, "label", ("fine_label", "label", "labels"))
        for path in paths:
            labels += pq.read_table(path, columns=[label])[label].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path} is damaged ({_line(error)}); {_REMEDY}") from error
    if None in labels or min(labels, default=0) == -1:
        raise InputError(f"{path}: column {label!r} has rows without a label; use a set whose rows all have one")
    if not (all(isinstance(value, int) for value in labels) or all(isinstance(value, str) for value in labels)):
        raise InputError(f"{path}: column {label!r} holds no class numbers or names; set data.label_column")

    def blobs() -> Iterator[Blob]:
        for path in paths:
            row = 0
            try:
                for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=[image]):
                    for value in batch.column(0).to_pylist():
                        data = value.get("bytes") if isinstance(value, dict) else value
                        if not isinstance(data, bytes):
                            raise InputError(
                                f"{path} row {row} holds no image bytes in {image!r}; set data.image_column"
                            )
                        yield Blob(f"{path} row {row}", data)
                        row += 1
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path} is damaged ({_line(error)}); {_REMEDY}") from error

    names = features.get(label, {}).get("names")
    return Table(labels, tuple(map(str, names)) if names else None, blobs)


def parquet_rows(path: Path) -> int:
    """Rows of a shard, by its footer.

    Raises:
        InputError: if pyarrow is absent or the file is damaged.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError("parquet files need pyarrow, which is not installed: pip install 'kd[hub]'") from error
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged ({_line(error)}); {_REMEDY}") from error


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """What the hub's own metadata says of each column; empty where there is none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _image_names(features: dict[str, dict[str, Any]], columns: Sequence[str]) -> tuple[str, ...]:
    typed = [name for name, value in features.items() if value.get("_type") == "Image" and name in columns]
    return (typed[0],) if len(typed) == 1 else ("image", "img")


def _column(path: Path, columns: Sequence[str], given: str | None, kind: str, usual: Sequence[str]) -> str:
    found = [given] if given is not None else [name for name in usual if name in columns]
    if not found or found[0] not in columns:
        said = f"no column {given!r}{nearest(given, columns)}" if given is not None else f"no {kind} column found"
        raise InputError(f"{path}: {said}; set data.{kind}_column to one of {', '.join(columns)}")
    return found[0]


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
