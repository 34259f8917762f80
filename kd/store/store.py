"""Artifacts under their keys, written whole or not at all.

Layout: ``artifacts/KEY/`` (finished, with ``card.json``), ``work/KEY/`` (being made; survives a kill, holds the
checkpoint to resume from), ``locks/KEY``, ``sweeps/ID.json``, ``corrupt/`` (what failed its checksum), ``data/``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.errors import InputError, KDError
from kd.store.keys import SHOWN, canonical, digest, short

CARD = "card.json"
_KEY = re.compile(rf"[0-9a-f]{{{SHOWN},64}}")


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write plain data as JSON, whole or not at all; numbers keep their full precision."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder and its card."""

    key: str
    path: Path
    card: dict[str, Any]

    def file(self, name: str) -> Path:
        """The path of one of its files.

        Raises:
            KDError: if the artifact has no such file.
        """
        if name not in self.card["files"]:
            raise KDError(f"artifact {short(self.key)} has no file {name!r}; it has {', '.join(self.card['files'])}")
        return self.path / name


class Store:
    """A folder of artifacts, each under the key of the document that made it."""

    def __init__(self, root: Path | str) -> None:
        """Open the store at ``root``; nothing is created before something is written."""
        self.root = Path(root).expanduser().absolute()
        self._sound: dict[str, tuple[tuple[int, int], ...]] = {}

    def folder(self, key: str) -> Path:
        """Where the finished artifact of ``key`` stands.

        Raises:
            InputError: if it is no key: one may come from a stranger's card, and becomes a path.
        """
        return self.root / "artifacts" / _shown(key)

    def work(self, key: str) -> Path:
        """Where the artifact of ``key`` is being made.

        Raises:
            InputError: as `folder`.
        """
        return self.root / "work" / _shown(key)

    def get(self, key: str) -> Artifact | None:
        """The artifact of ``key``, or None where there is none or it is damaged.

        Raises:
            KDError: if another document's artifact stands under the same shown digits.
        """
        artifact = self.read(self.folder(key))
        if artifact is None:
            return None
        if artifact.key != key:
            raise KDError(f"{short(key)} names two different documents in {self.root}; use another store folder")
        return None if self.damage(artifact) else artifact

    def read(self, folder: Path) -> Artifact | None:
        """The artifact in a folder, its files unchecked; None if there is no card that can be read.

        A card is a stranger's data: one whose key is not its folder's, or that lists files outside its folder, is none.
        """
        try:
            card = json.loads((folder / CARD).read_text())
            key, files, inputs = card["key"], card["files"], card["document"]["inputs"]
            sound = _KEY.fullmatch(key) and key[:SHOWN] == folder.name and isinstance(inputs, dict)
            listed = all(_inside(name) and isinstance(entry["sha256"], str) for name, entry in files.items())
            return Artifact(key, folder, card) if sound and listed else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def damage(self, artifact: Artifact) -> str | None:
        """What is wrong with an artifact's files, in words, or None if each matches its checksum."""
        files = artifact.card["files"]
        try:
            if digest(artifact.card["document"]) != artifact.key:
                return "its recorded config is not what its key names"
        except InputError as error:
            return str(error)
        try:
            found = [(artifact.path / name).stat() for name in files]
        except OSError as error:
            return f"{Path(str(error.filename)).name} is missing"
        for (name, expected), stat in zip(files.items(), found, strict=True):  # before anything large is read
            if stat.st_size != expected.get("bytes", stat.st_size):
                return f"{name} is half-written: {stat.st_size} of {expected['bytes']} bytes"
        stats = tuple((stat.st_mtime_ns, stat.st_size) for stat in found)
        if self._sound.get(artifact.key) == stats:
            return None
        for name, expected in files.items():
            if sha256_file(artifact.path / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
        self._sound[artifact.key] = stats
        return None

    def broken(self, key: str) -> str | None:
        """Why the artifact that stands under ``key`` cannot be used, or None if there is none or it is sound."""
        folder = self.folder(key)
        if not folder.exists():
            return None
        artifact = self.read(folder)
        return "its card cannot be read" if artifact is None else self.damage(artifact)

    def quarantine(self, key: str) -> Path:
        """Move a damaged artifact aside, so that it can be made again and the old one still be looked at."""
        target = self.root / "corrupt" / f"{_shown(key)}-{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        self.folder(key).rename(target)
        return target

    def __iter__(self) -> Iterator[Artifact]:
        """All readable artifacts, oldest first."""
        base = self.root / "artifacts"
        found = [a for folder in (base.iterdir() if base.is_dir() else ()) if (a := self.read(folder))]
        return iter(sorted(found, key=lambda a: (str(a.card.get("time", {}).get("started", "")), a.key)))

    def find(self, prefix: str) -> Artifact:
        """The one artifact whose key begins with ``prefix`` (four or more hexadecimal digits).

        Raises:
            InputError: if the prefix is too short, fits none, or fits several.
        """
        word = prefix.strip().lower()
        if len(word) < 4 or set(word) - set("0123456789abcdef"):
            raise InputError(f"{prefix!r} is no hash: give four or more hexadecimal digits (see `kd ls`)")
        base = self.root / "artifacts"
        names = sorted(p.name for p in (base.iterdir() if base.is_dir() else ()) if p.name.startswith(word[:SHOWN]))
        if not names:
            raise InputError(f"no artifact in {self.root} begins with {word}; `kd ls` shows what is there")
        if len(names) > 1:
            raise InputError(f"{word} fits {len(names)} artifacts ({', '.join(names[:4])}…); give more digits")
        artifact = self.read(base / names[0])
        if artifact is None:
            raise InputError(
                f"the card of {names[0]} cannot be read; run it again, or remove it with `kd rm {names[0]}`"
            )
        if not artifact.key.startswith(word):
            raise InputError(f"no artifact in {self.root} begins with {word}; `kd ls` shows what is there")
        return artifact

    @contextlib.contextmanager
    def lock(
        self,
        key: str,
        waiting: Callable[[str], None] = lambda holder: None,
        poll: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        """Hold ``key`` alone among all processes; a dead holder's lock is free at once (the kernel drops it).

        ``waiting`` is called once with a description of the holder if someone else has it; ``poll`` then again and
        again, in place of a wait that nothing else of this process could run beside.
        """
        path = self.root / "locks" / _shown(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                waiting(file.read().strip() or "another process")
                if poll is None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                while poll is not None:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        poll()
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    def locked(self, key: str) -> bool:
        """Whether some process is making ``key`` right now."""
        path = self.root / "locks" / _shown(key)
        if not path.exists():
            return False
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False

    def put(self, key: str, source: Path, card: Mapping[str, Any]) -> Artifact:
        """Make the folder ``source`` the artifact of ``key``: checksums, card, then one rename.

        Raises:
            KDError: if the card's document does not have this key, or another artifact stands there.
        """
        if digest(card["document"]) != key:
            raise KDError(f"the document does not hash to {short(key)}: nothing was stored")
        names = sorted(p.name for p in source.iterdir() if p.name != CARD)
        files = {n: {"sha256": sha256_file(source / n), "bytes": (source / n).stat().st_size} for n in names}
        full = {**card, "key": key, "files": files}
        write_json(source / CARD, full)
        for name in names:
            _sync(source / name)
        _sync(source)
        target = self.folder(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            source.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            present = self.get(key)
            if present is None or canonical(present.card["document"]) != canonical(card["document"]):
                raise KDError(f"another artifact stands at {target}; remove it with `kd rm {short(key)}`") from error
            shutil.rmtree(source)
            return present
        _sync(target.parent)
        return Artifact(key, target, full)

    def remove(self, key: str) -> None:
        """Delete an artifact: first renamed away, so that no half of it is ever found."""
        doomed = self.root / "work" / f"removed-{_shown(key)}-{time.time_ns()}"
        doomed.parent.mkdir(parents=True, exist_ok=True)
        self.folder(key).rename(doomed)
        shutil.rmtree(doomed)
        shutil.rmtree(self.work(key), ignore_errors=True)

    def users(self, key: str) -> list[Artifact]:
        """The artifacts that have ``key`` among their inputs."""
        return [a for a in self if key in a.card["document"]["inputs"].values()]

    def sweeps(self) -> list[dict[str, Any]]:
        """The records of all sweeps, oldest first; one whose id is not its file's name is left out."""
        base = self.root / "sweeps"
        records = []
        for path in sorted(base.glob("*.json")) if base.is_dir() else ():
            with contextlib.suppress(OSError, ValueError, RecursionError):
                record = json.loads(path.read_text())
                # An id names a report's file too, so it may not lead elsewhere.
                if isinstance(record, dict) and _KEY.fullmatch(path.stem) and record.get("id") == path.stem:
                    records.append(record)
        return sorted(records, key=lambda record: str(record.get("started", "")))


def _shown(key: str) -> str:
    """The part of a key that names its folders."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InputError(f"{str(key)[:40]!r} is no key: 64 hexadecimal digits were meant")
    return key[:SHOWN]


def _inside(name: str) -> bool:
    """Whether a file's name stays in its artifact's folder."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
