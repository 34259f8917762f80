"""Reads an offline W&B run back: LevelDB log framing around protobuf records."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, up to where a kill cut it short."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    ident, magic, _ = struct.unpack("<4sHB", data[:7])
    assert ident == b":W&B" and magic == 0xBEE1
    position, held = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0 and length == 0:
            position += left
            continue
        chunk = data[position + 7 : position + 7 + length]
        if len(chunk) < length:
            return
        assert zlib.crc32(chunk, zlib.crc32(bytes([kind]))) == checksum
        position += 7 + length
        held = chunk if kind in (1, 2) else held + chunk
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            yield record


def values(items: Any) -> dict[str, Any]:
    """The key/value items of a record as a dict."""
    return {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in items}


def run_folders(folder: Path) -> dict[str, Path]:
    """Run id -> folder of each offline run."""
    return {path.name.rpartition("-")[2]: path for path in sorted((folder / "wandb").glob("offline-run-*"))}


def read(folder: Path, patience: float = 20.0) -> dict[str, Any]:
    """What one run folder holds: run, config, history, summary, exit code.

    W&B's own process may write the file's end a moment after `finish` has returned; an ended run is waited for.
    """
    until = time.monotonic() + patience
    while (found := _read(folder))["exit"] is None and time.monotonic() < until:
        time.sleep(0.1)
    return found


def _read(folder: Path) -> dict[str, Any]:
    [path] = folder.glob("*.wandb")
    found: dict[str, Any] = {"history": [], "summary": {}, "config": {}, "exit": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= values(record.run.config.update)
        elif kind == "config":
            found["config"] |= values(record.config.update)
        elif kind == "history":
            found["history"].append(values(record.history.item))
        elif kind == "summary":
            found["summary"] |= values(record.summary.update)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found
