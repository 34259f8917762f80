"""Small data sets in each of the layouts that are read, with the same code paths as the real ones."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def encoded(image: np.ndarray, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(folder: Path, train: int = 40, test: int = 20) -> None:
    folder.mkdir(parents=True)
    for part, count, seed in (("train", train, 1), ("t10k", test, 2)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels(count, 28, 28, seed=seed)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))


def write_cifar(folder: Path, names: Sequence[str], meta: dict[str, Any], labels: str, classes: int) -> None:
    folder.mkdir(parents=True)
    for seed, name in enumerate(names):
        batch = {"data": pixels(20, 3072, seed=seed), labels: [i % classes for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=4))
    (folder / ("meta" if labels == "fine_labels" else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=4))


def write_shard(
    file: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any],
    *,
    image: str = "image",
    label: str = "label",
    names: Sequence[str] | None = None,
    plain: bool = False,
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    column = list(images) if plain else [{"bytes": data, "path": None} for data in images]
    kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(column, kind), label: pa.array(list(labels))})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=5)


def write_folder(folder: Path, parts: dict[str, dict[str, int]], size: tuple[int, int] = (40, 30)) -> None:
    for part, classes in parts.items():
        for name, count in classes.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                data = encoded(pixels(size[1], size[0], 3, seed=hash_of(part, name, i)))
                (folder / part / name / f"{i}.png").write_bytes(data)


def hash_of(*words: object) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate("/".join(map(str, words)))) % 2**32


@pytest.fixture
def make() -> SimpleNamespace:
    """The functions above, for tests: under importlib they cannot import this file by its name."""
    functions = (pixels, encoded, idx, write_mnist, write_cifar, write_shard, write_folder)
    return SimpleNamespace(**{function.__name__: function for function in functions})
