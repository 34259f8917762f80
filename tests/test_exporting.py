"""`kd export`: a folder that runs where there is neither this package nor torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kd.cli import main
from kd.errors import InputError
from kd.exporting import MARGIN, export
from kd.models import load
from kd.pipeline.execute import execute
from kd.stages.base import Room
from kd.stages.splits import load_data
from kd.store import Store, short
from tests.pipeline.small import planned

WORDS = (
    "pipeline=compress", "compress=[quantize,export]", "teacher.name=seed_cnn_small", "fit.epochs=6", "fit.lr=0.01",
    "quantize.fit.epochs=0", "quantize.samples=64", "quantize.sensitivity=false",
)  # fmt: skip
# What a Python without torch and this package is like, in one that has both.
BARE = (
    "import runpy, sys\n"
    "for name in ('torch', 'kd', 'torchvision'): sys.modules[name] = None\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], list[tuple[Path, str]]]:
    """A store, the keys by stage, and images of the test split with the class that the quantised network sees."""
    store = tmp_path_factory.mktemp("store")
    one, run = planned(store, *WORDS)
    execute(one, Store(store), run)
    keys = {node.name: node.key for node in one.nodes}
    split = load_data(one.nodes[-1].config["data"], Room(run, store)).test
    assert split.images is not None
    net = load(Store(store).folder(keys["quantize"]))
    with torch.no_grad():
        seen = net(split.images[:8].float() / 255).argmax(dim=1).tolist()
    images = []
    for i, name in enumerate(seen):
        path = store / f"{i}.png"
        Image.fromarray(split.images[i, 0].numpy()).save(path)
        images.append((path, str(name)))
    return store, keys, images


def test_the_folder_runs_without_torch(stored: Any, tmp_path: Path) -> None:
    store, keys, images = stored
    found = export(keys["export"][:8], tmp_path / "a" / "out", str(store))
    assert list(found["files"]) == ["model.onnx", "preprocessing.json", "run.py", "card.json"]
    out = tmp_path / "a" / "out"
    assert json.loads((out / "card.json").read_text())["key"] == keys["export"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    right = 0
    for path, name in images:
        said = subprocess.run(
            [sys.executable, "-c", BARE, str(out / "run.py"), str(path)], capture_output=True, text=True, check=True
        ).stdout
        right += said.partition(":")[0] == name
    assert right >= len(images) - 1  # a rounding of integers may tip one


@pytest.mark.slow
def test_it_runs_in_an_environment_of_three_packages(stored: Any, tmp_path: Path) -> None:
    store, keys, images = stored
    export(keys["export"], tmp_path / "out", str(store))
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    install = [str(python), "-m", "pip", "install", "--quiet", "onnxruntime", "numpy", "pillow"]
    subprocess.run(install, check=True, env=bare)
    assert subprocess.run([str(python), "-c", "import torch"], capture_output=True, env=bare).returncode == 1
    said = []
    for path, _ in images:
        command = [str(python), str(tmp_path / "out" / "run.py"), str(path)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=bare)
        said.append(run.stdout.partition(":")[0])
    assert sum(a == b for a, (_, b) in zip(said, images, strict=True)) >= len(images) - 1


def test_a_network_becomes_a_file_first_which_is_stored_and_found_again(
    stored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, keys, _ = stored
    for name in ("first", "second"):
        with pytest.raises(SystemExit) as end:
            main(["export", keys["student"][:10], str(tmp_path / name), "--store", str(store)])
        assert end.value.code == 0
        assert f"python {tmp_path / name / 'run.py'} IMAGE" in capsys.readouterr().out
    cards = [json.loads((tmp_path / name / "card.json").read_text()) for name in ("first", "second")]
    assert cards[0] == cards[1] and cards[0]["document"]["inputs"] == {"model": keys["student"]}
    assert cards[0]["metrics"]["test/agreement"] == 1.0


def test_another_format_is_made_of_the_files_own_network(stored: Any, tmp_path: Path) -> None:
    store, keys, images = stored
    found = export(keys["export"], tmp_path / "out", str(store), "pt2")
    assert "model.pt2" in found["files"] and found["hash"] != short(keys["export"])
    path, name = images[0]
    script = [sys.executable, str(tmp_path / "out" / "run.py"), str(path)]
    said = subprocess.run(script, capture_output=True, text=True, check=True)
    assert said.stdout.partition(":")[0] == name


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(stored: Any, tmp_path: Path) -> None:
    store, keys, _ = stored
    with pytest.raises(InputError, match=r"is a labels, which holds no network"):
        export(keys["labels"], tmp_path / "out", str(store))
    with pytest.raises(InputError, match=r"export.format='onx' is none of onnx, pt2, pte"):
        export(keys["student"], tmp_path / "out", str(store), "onx")
    with pytest.raises(InputError, match="begins with"):
        export("0000000", tmp_path / "out", str(store))
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(InputError, match=r"full is there and not empty; name a folder that is not"):
        export(keys["export"], tmp_path / "full", str(store))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_margin_is_the_groups() -> None:
    from kd.config import jobs

    assert jobs(["pipeline=compress"])[0][0].config["export"]["margin"] == MARGIN
