"""Nets on disk: the same bits back, and one line for what is not a net."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kd.compress.measure import stored_bytes
from kd.errors import KDError
from kd.models import Frozen, Normalised, create, load, plain, save, weights_digest

RECIPE: dict[str, Any] = {
    "model": {"name": "seed_cnn_small", "options": {"widths": [2, 3, 4, 5]}},
    "num_classes": 3,
    "in_chans": 1,
    "size": 8,
}


def net(seed: int = 0) -> Normalised:
    torch.manual_seed(seed)
    inner = create("seed_cnn_small", num_classes=3, in_chans=1, size=8, options={"widths": [2, 3, 4, 5]})
    return Normalised(inner, [0.1307], [0.3081])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(net(), RECIPE, tmp_path / "net")
    return tmp_path / "net"


def test_what_is_loaded_gives_the_same_bits(folder: Path) -> None:
    images = torch.rand(4, 1, 8, 8)
    loaded = load(folder)
    assert loaded(images).equal(net().eval()(images))
    assert weights_digest(loaded) == weights_digest(net()) and not loaded.training


def test_loading_does_not_touch_the_generator(folder: Path) -> None:
    state = torch.get_rng_state()
    load(folder)
    assert torch.get_rng_state().equal(state)


def test_the_files_are_safetensors_of_the_plain_net_and_readable_json(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "model.json"}
    assert set(load_file(folder / "model.safetensors")) == set(net().net.state_dict())
    assert (folder / "model.safetensors").stat().st_size == stored_bytes(net())
    assert json.loads((folder / "model.json").read_text()) == RECIPE | {"mean": [0.1307], "std": [0.3081]}


def test_a_batch_norm_comes_back_with_its_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create("mobilenetv3_small_050", num_classes=3, in_chans=1, size=28)
    model(torch.rand(8, 1, 28, 28))
    recipe = {"model": {"name": "mobilenetv3_small_050", "options": {}}, "num_classes": 3, "in_chans": 1, "size": 28}
    save(model, recipe | {"mean": [0.5], "std": [0.5]}, tmp_path)
    assert weights_digest(load(tmp_path)) == weights_digest(model)


def test_further_entries_of_the_recipe_stay(tmp_path: Path) -> None:
    spec = RECIPE | {"classes": ["a", "b", "c"], "model": RECIPE["model"] | {"pretrained": False}}
    save(net(), spec, tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["classes"] == ["a", "b", "c"]
    load(tmp_path)


def test_memory_layout_and_wrappers_make_no_difference(tmp_path: Path) -> None:
    save(Frozen(net().to(memory_format=torch.channels_last)), RECIPE | {"mean": [0.1], "std": [0.2]}, tmp_path)
    assert weights_digest(load(tmp_path)) == weights_digest(net()) == weights_digest(Frozen(net()))
    inner = nn.Identity()
    assert plain(Frozen(Normalised(inner, [0.0], [1.0]))) is inner and plain(inner) is inner


def test_the_digest_is_pinned_for_ever() -> None:
    layer = nn.Linear(2, 1)
    layer.load_state_dict({"weight": torch.tensor([[1.0, -2.0]]), "bias": torch.tensor([0.5])})
    assert weights_digest(layer) == "e4692f4ea9f2bd6d4afd56f3285a7ba1e8513fae5fa17798a4765b791c4a51c6"


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["weight"].copy_(torch.nextafter(state["weight"], torch.tensor(9.0))),
        lambda state: state.update(weight=state["weight"].reshape(2, 3)),
        lambda state: state.update(weight=state["weight"].half()),
        lambda state: state.update(wait=state.pop("weight")),
    ],
)
def test_the_digest_hears_values_shapes_types_and_names(change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    class Bag(nn.Module):
        def __init__(self, state: dict[str, torch.Tensor]) -> None:
            super().__init__()
            for name, value in state.items():
                self.register_buffer(name, value)

    state = {"weight": torch.arange(6.0).reshape(3, 2) + 1, "bias": torch.zeros(3)}
    before = weights_digest(Bag(state))
    change(state)
    assert weights_digest(Bag(state)) != before
    assert weights_digest(Bag(dict(reversed(state.items())))) == weights_digest(Bag(state))  # order is not heard


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def rewrite(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        recipe = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(recipe | fields))

    return change


def reweigh(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewritten(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return rewritten


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "no net can be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle"), "no net can be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no net can be read"),
        (lambda folder: (folder / "model.json").unlink(), "no net can be read"),
        (lambda folder: (folder / "model.json").write_text("{"), "no net can be read"),
        (lambda folder: (folder / "model.json").write_text("[]"), "'model' is missing"),
        (rewrite(num_classes="3"), "'num_classes' is missing or no int"),
        (rewrite(model={"name": "seed_cnn_small"}), "needs a 'name' and 'options'"),
        (rewrite(mean=["x"]), "'mean' and 'std' must be numbers"),
        (rewrite(model={"name": "seed_cnn_smal", "options": {}}), "did you mean 'seed_cnn_small'"),
        (rewrite(model={"name": "seed_cnn", "options": {"checkpoint_path": "x"}}), "hold 'checkpoint_path'"),
        (rewrite(num_classes=4), r"head\.bias is float32 \(3,\), expected float32 \(4,\) \(2 such\)"),
        (reweigh(lambda state: state.pop("head.bias")), r"head\.bias is missing, expected float32 \(3,\)"),
        (reweigh(lambda state: state.update(extra=torch.ones(1))), "extra is .* expected nothing by that name"),
        (reweigh(lambda state: state.update({"head.bias": torch.ones(3).half()})), r"head\.bias is float16 \(3,\)"),
    ],
)
def test_a_damaged_or_foreign_net_is_refused_in_one_line(
    damage: Callable[[Path], Any], words: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(KDError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({k: v for k, v in RECIPE.items() if k != "size"}, "'size' is missing"),
        (RECIPE | {"classes": {1, 2}}, "no plain data"),
        (RECIPE | {"note": float("nan")}, "no plain data"),
    ],
)
def test_a_recipe_that_could_not_be_read_back_is_refused(spec: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(KDError, match=words):
        save(net(), spec, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_a_plain_net_needs_statistics_in_its_recipe(tmp_path: Path) -> None:
    with pytest.raises(KDError, match="'mean' is missing"):
        save(net().net, RECIPE, tmp_path)
