"""What is costly to find out about data files, kept: their digests, and images already decoded."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.data.progress import track
from kd.errors import InputError
from kd.store import sha256_file, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kd.data.readers import Blob


def file_digests(files: Iterable[Path], cache: Path) -> list[str]:
    """The sha256 of each file's content (unpacked, if it is a ``.gz``), read once per absolute path, size and mtime.

    Args:
        files: the files.
        cache: the JSON file that keeps the digests; made if absent, remade if it cannot be read.

    Raises:
        InputError: if a file cannot be read.
    """
    known = _known(cache)
    paths = [Path(os.path.abspath(file)) for file in files]  # not resolved: a link may point elsewhere next time
    result, new = [], {}
    try:
        for path in track(paths, len(paths), "checksums of the data"):
            stat = path.stat()
            entry = known.get(str(path))
            if not (isinstance(entry, list) and len(entry) == 3 and entry[:2] == [stat.st_size, stat.st_mtime_ns]):
                entry = new[str(path)] = [stat.st_size, stat.st_mtime_ns, _sha256(path)]
            result.append(str(entry[2]))
    except (OSError, EOFError) as error:
        raise InputError(
            f"cannot read the data file {path} ({error}); delete it, or give the right to read it"
        ) from error
    finally:
        # What was read so far is kept even if the user loses patience; what others wrote meanwhile stays.
        if new:
            with contextlib.suppress(OSError):  # no place to keep them: they are read again next time
                write_json(cache, {**_known(cache), **new})
    return result


def _known(cache: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        data = json.loads(cache.read_text())
        if isinstance(data, dict):
            return data
    return {}


def _sha256(path: Path) -> str:
    if path.suffix != ".gz":
        return sha256_file(path)
    with gzip.open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def arrays(
    cache: Path | None, key: str, make: Callable[[], Mapping[str, NDArray[np.uint8]]]
) -> dict[str, NDArray[np.uint8]]:
    """The arrays kept under ``key`` in the folder ``cache``, or made now and kept.

    A file that is damaged, or whose arrays do not match their checksum, is made again.
    """
    if cache is None:
        return dict(make())
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file

    path = cache / "decoded" / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as file:
        found = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if file.metadata() == {"sha256": _checksum(found)}:
            return found
    made = dict(make())
    with contextlib.suppress(OSError):  # a full or read-only disk costs the next start some seconds, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(made, temporary, metadata={"sha256": _checksum(made)})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return made


def _checksum(arrays: Mapping[str, NDArray[np.uint8]]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.reshape(-1).data)
    return digest.hexdigest()


def unpacked(cache: Path, key: str, blobs: Iterable[Blob], count: int) -> list[Path]:
    """Each blob as a file of its own in the folder ``cache``: written once, whole or not at all."""
    folder = cache / "files" / key
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            try:
                for index, blob in enumerate(track(blobs, count, "unpacking images")):
                    (temporary / f"{index:08d}").write_bytes(blob.data)
                with contextlib.suppress(OSError):  # another process may have been first
                    temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise InputError(f"cannot unpack {count} images into {folder} ({error}); make room there") from error
    paths = sorted(folder.iterdir())
    if len(paths) != count:
        raise InputError(f"{folder} holds {len(paths)} of {count} images; delete that folder and run again")
    return paths
