"""A stored model as a folder for those who use it: file, preprocessing, card and script."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from kd.config import jobs
from kd.errors import InputError, KDError
from kd.launch import progress, repeat, writable
from kd.pipeline import jobs as children
from kd.pipeline.plan import Node, Plan
from kd.pipeline.work import run_job
from kd.stages import Export
from kd.store import CARD, Artifact, Store, digest, document, short
from kd.training.settings import Run

MARGIN = 0.01  # of accuracy that integers may lose: the group `export` has the same


def export(
    prefix: str, out: Path, store_dir: str, form: str | None = None, words: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Write a stored model's file and what goes with it into a folder; one that is no file yet is made into one first.

    Args:
        prefix: of the hash of a run whose last stage made a network, or a file.
        out: a folder, made here; one that is there must be empty.
        store_dir: where the run is.
        form: `onnx` or `pt2`; None: as the file is, or `onnx`.
        words: settings under `run.`.

    Returns:
        `hash` of the file's stage, `folder`, and `files` with their bytes.

    Raises:
        InputError: if there is no such run, it made no network, or the folder holds something.
        KDError: if the file cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there and not empty; name a folder that is not")
    store = Store(store_dir)
    found = store.find(prefix)
    if damage := store.damage(found):
        raise InputError(f"{short(found.key)}: {damage}; run it again")
    if not _is_file(found) or form not in (None, found.card["document"]["config"]["format"]):
        found = _made(store, found, form or "onnx", words)
    return {"hash": short(found.key), "folder": str(out), "files": _copied(found, out)}


def _is_file(found: Artifact) -> bool:
    return str(found.card["document"]["stage"]) == "kd.stages.Export"


def _made(store: Store, found: Artifact, form: str, words: tuple[str, ...]) -> Artifact:
    """The file of a network, which is in the store or is made now."""
    source = found
    if _is_file(found):
        parent = store.get(found.card["document"]["inputs"]["model"])
        if parent is None:
            raise InputError(f"{short(found.key)} was made from a network that is not in the store any more")
        source = parent
    if "model.json" not in source.card["files"]:
        raise InputError(
            f"{short(source.key)} is a {source.card.get('stage')}, which holds no network; `kd ls` shows those that do"
        )
    data = source.card["document"]["config"]["data"]
    config = Export.settled({**Export.SINCE, "data": data, "format": form, "margin": MARGIN})
    text = document("kd.stages.Export", Export.VERSION, config, {"model": source.key}, Export.SINCE)
    node = Node("export", digest(text), text, {"model": source.key}, {})
    if (known := store.get(node.key)) is not None:
        return known
    run = Run(**jobs([f"run.store={store.root}", "run.wandb=disabled", *words])[0][0].config["run"])
    writable(store.root)
    children.warm()
    with progress(run.progress) as bars:
        bars.add_task(f"export {short(node.key)}", total=None)
        outcome = children.call(run_job, Plan((node,), "export", {}), run, None, None, tell=repeat)
    if outcome["status"] != "done":
        raise (InputError if outcome.get("exit_code") == 2 else KDError)(outcome["error"])
    made = store.get(node.key)
    assert made is not None
    return made


def _copied(found: Artifact, out: Path) -> dict[str, int]:
    """Copy an artifact's files and card: all of them are there, or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        names = [*found.card["files"], CARD]
        for name in names:
            shutil.copyfile(found.path / name, folder / name)
        folder.chmod(0o755)
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {name: (out / name).stat().st_size for name in names}
