"""A net with another end: what runs, what it weighs, that it learns with the net, and that it is plain data on disk."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kd.compress.measure import cost
from kd.errors import InputError, KDError
from kd.models import Frozen, Grafted, Normalised, Taps, create, load, outline, part_of, save, weights_digest
from kd.models.graft import described, regrafted

SHAPE = (1, 8, 8)
NAMES = ["cifar_resnet8", "seed_cnn_small", "cifar_shufflenetv2", "cifar_mobilenetv2"]


def net(name: str = "cifar_resnet8", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create(name, num_classes=10, in_chans=1, size=8).eval()


def tail(channels: int, classes: int = 10) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, classes),
    ).eval()  # fmt: skip


def last(made: nn.Module) -> str:
    return outline(made, SHAPE).stages[-1]


def width(made: nn.Module, at: str, images: Tensor) -> tuple[int, Tensor]:
    taps = Taps(made, [at])
    made(images)
    found = taps.pop()[at]
    taps.remove()
    return found.shape[1], found


IMAGES = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_net_as_far_as_the_layer_and_then_the_tail(name: str) -> None:
    whole = net(name)
    at = last(whole)
    channels, features = width(whole, at, IMAGES)
    end = tail(channels)
    made = Grafted(whole, at, end, SHAPE).eval()
    assert_close(made(IMAGES), end(features))
    assert sorted(whole.state_dict()) == sorted(net(name).state_dict()), "the net itself stays as it is"
    assert_close(whole(IMAGES), net(name)(IMAGES))


def test_what_stands_behind_the_layer_is_no_part_of_it_and_costs_nothing() -> None:
    whole = net()
    made = Grafted(whole, "layer2", tail(32), SHAPE)
    assert made.without == ("head", "layer3", "pool")
    kept = {name: value for name, value in whole.state_dict().items() if name.split(".")[0] not in made.without}
    assert sorted(made.trunk.state_dict()) == sorted(kept)
    behind = sum(p.numel() for part in (whole.layer3, whole.head) for p in part.parameters())  # type: ignore[union-attr]
    ours, theirs = cost(made, SHAPE, latency=False), cost(whole, SHAPE, latency=False)
    own = sum(p.numel() for p in made.tail.parameters())
    assert ours["parameters"] == theirs["parameters"] - behind + own
    until_layer2 = sum(cost(part, shape, latency=False)["macs"] for part, shape in (
        (whole.stem, SHAPE), (whole.layer1, (16, 8, 8)), (whole.layer2, (16, 8, 8)),  # type: ignore[arg-type]
    ))  # fmt: skip
    assert ours["macs"] == until_layer2 + 32 * 6 * 4 * 4 + 6 * 10


def test_it_shares_what_is_before_the_layer_and_learns_with_it() -> None:
    whole = net()
    made = Grafted(whole, "layer3", tail(64), SHAPE).eval()
    before = made(IMAGES)
    mine, others = {id(p) for p in whole.parameters()}, {id(p) for p in made.tail.parameters()}
    assert {id(p) for p in made.parameters()} <= mine | others
    with torch.no_grad():
        whole.layer1[0].join.body.conv1.weight.add_(1)  # type: ignore[index,union-attr]
        made.tail[-1].bias.add_(1)  # type: ignore[union-attr]
    assert not made(IMAGES).equal(before)
    assert whole.layer3 is made.trunk.layer3


def test_the_nets_own_modes_and_hooks_are_left_alone() -> None:
    whole = net().train()
    taps = Taps(whole, ["layer3", "head"])
    made = Grafted(whole, "layer3", tail(64), SHAPE)
    assert all(module.training for module in whole.modules())
    taps.clear()
    with torch.no_grad():
        made(IMAGES)
    with pytest.raises(InputError, match="'head' was not run"):
        taps.pop()  # the layer itself is shared
    taps.clear()
    whole(IMAGES)
    assert set(taps.pop()) == {"layer3", "head"}


def test_a_layer_in_the_middle_of_a_container_and_what_goes_into_a_layer() -> None:
    whole = net()
    inner = "layer2.0.join"
    made = Grafted(whole, inner, tail(32), SHAPE)
    assert "layer2.0.relu" in made.without and "layer3" in made.without
    before = Grafted(whole, "layer3:input", tail(32), SHAPE).eval()
    _, features = width(whole, "layer2", IMAGES)
    assert_close(before(IMAGES), before.tail(features))


def test_tokens_are_laid_on_their_grid() -> None:
    torch.manual_seed(0)
    options = {"patch_size": 2, "embed_dim": 12, "depth": 3, "num_heads": 2}
    whole = create("vit_tiny_patch16_224", num_classes=10, in_chans=1, size=8, options=options).eval()
    made = Grafted(whole, "blocks.1:maps", tail(12), SHAPE).eval()
    _, features = width(whole, "blocks.1:maps", IMAGES)
    assert features.shape == (3, 12, 4, 4) and "blocks.2" in made.without
    assert_close(made(IMAGES), made.tail(features))


def test_a_copy_is_whole_and_can_be_exported() -> None:
    made = Grafted(net(), "layer3", tail(64), SHAPE).eval()
    again = copy.deepcopy(made)
    assert again(IMAGES).equal(made(IMAGES))
    exported = torch.export.export(made, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("count", min=1, max=64)},))
    assert_close(exported.module()(IMAGES[:2]), made(IMAGES[:2]))


def test_it_has_the_parts_that_any_network_has() -> None:
    found = outline(Grafted(net(), "layer3", tail(64), SHAPE).eval(), SHAPE)
    assert found.classifier == "tail.5" and found.embedding == "tail.5:input" and found.stages


def test_it_is_stored_as_plain_data_and_read_again_in_a_fresh_process(tmp_path: Path) -> None:
    whole = net()
    chain = tail(64)
    nested = nn.Sequential(chain[:3], chain[3:5], Frozen(chain[5]))  # as a loss gives it
    made = Normalised(Grafted(whole, "layer3", nested, SHAPE), [0.3], [0.4]).eval()
    graft = made.net
    assert isinstance(graft, Grafted)
    spec = {"model": {"name": "cifar_resnet8", "options": {}}, "num_classes": 10, "in_chans": 1, "size": 8}
    save(made, {**spec, "structure": [graft.change]}, tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["structure"][0]["tail"][0] == {
        "_target_": "torch.nn.Conv2d", "in_channels": 64, "out_channels": 6, "kernel_size": [1, 1], "stride": [1, 1],
        "padding": [0, 0], "dilation": [1, 1], "groups": 1, "bias": False, "padding_mode": "zeros",
    }  # fmt: skip
    again = load(tmp_path)
    assert weights_digest(again) == weights_digest(made) and again(IMAGES).equal(made(IMAGES))
    torch.save(IMAGES, tmp_path / "images.pt")
    words = (
        f"import torch; from pathlib import Path; from kd.models import load; folder = Path({str(tmp_path)!r}); "
        "print(load(folder)(torch.load(folder / 'images.pt', weights_only=True)).double().sum().item())"
    )
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert float(said.stdout) == pytest.approx(made(IMAGES).double().sum().item(), rel=1e-6)


def test_a_graft_on_a_graft_is_read_again(tmp_path: Path) -> None:
    first = Grafted(net(), "layer3", tail(64), SHAPE)
    second = Grafted(first, "tail.2", tail(6), SHAPE).eval()
    made = Normalised(second, [0.0], [1.0]).eval()
    spec = {"model": {"name": "cifar_resnet8", "options": {}}, "num_classes": 10, "in_chans": 1, "size": 8}
    save(made, {**spec, "structure": [first.change, second.change]}, tmp_path)
    assert load(tmp_path)(IMAGES).equal(made(IMAGES))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "graft", "at": "nope", "tail": []},
        {"kind": "graft", "at": "layer3"},
        {"kind": "graft", "at": "layer3", "tail": [{"_target_": "kd.models.create", "name": "seed_cnn"}]},
        {"kind": "graft", "at": "layer3", "tail": [{"_target_": "torch.nn.Linear", "in_features": -1}]},
        {"kind": "graft", "at": "layer3", "tail": [{"_target_": "builtins.open"}]},
        {"kind": "graft", "at": "layer3", "tail": ["torch.nn.ReLU"]},
    ],
)
def test_a_graft_that_is_none_is_refused_in_one_line(change: dict[str, object]) -> None:
    with pytest.raises(KDError, match="the structure's graft is not to be had") as caught:
        regrafted(net(), change, SHAPE)
    assert "\n" not in str(caught.value)


def test_what_is_no_layer_of_torchs_cannot_stand_in_a_graft() -> None:
    class Own(nn.Linear):
        pass

    for layer in (Own(2, 3), nn.MultiheadAttention(4, 1), net()):
        with pytest.raises(InputError, match="stored as layers of torch"):
            described(nn.Sequential(layer))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 4, bias=False), nn.Conv2d(4, 6, (3, 1), stride=2, padding=1, groups=2),
        nn.BatchNorm2d(3, eps=1e-3), nn.AdaptiveAvgPool2d((2, 1)), nn.Unflatten(1, (3, 1, 1)),
        nn.LayerNorm(5), nn.Dropout(0.1), nn.GELU(),
    ],
)  # fmt: skip
def test_a_layer_is_made_again_of_its_description(layer: nn.Module) -> None:
    (said,) = described(layer)
    again = regrafted(nn.Sequential(nn.Identity()), {"at": "0", "tail": [json.loads(json.dumps(said))]}, SHAPE).tail[0]
    assert repr(again) == repr(layer)


def test_a_part_is_a_frozen_copy_through_which_gradients_go() -> None:
    whole = net()
    part = part_of(whole, "classifier", SHAPE)
    assert part.module is not whole.head and part_of(whole, "head", SHAPE).module.in_features == 64
    features = torch.rand(2, 64, requires_grad=True)
    part(features).sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0
    assert (
        not list(part.parameters())
        and not part.state_dict()
        and not any(p.requires_grad for p in part.module.parameters())
    )
    assert all(p.requires_grad for p in whole.parameters())


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="'heat' is no layer of CifarNet; did you mean 'head'"):
        part_of(net(), "heat", SHAPE)
    with pytest.raises(InputError, match="no linear layer gives the logits"):
        part_of(nn.Sequential(nn.Flatten()), "classifier", SHAPE)
