"""Nets by name: real timm names at small sizes, and one line for what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from kd.errors import InputError
from kd.instantiate import instantiate
from kd.models import build
from kd.models.build import Normalised, create, preprocessing


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("seed_cnn", 1, 8),
        ("seed_cnn", 1, 28),
        ("seed_cnn_small", 3, 32),
        ("resnet18", 1, 28),
        ("resnet18", 3, 32),
        ("mobilenetv3_small_050", 1, 28),
        ("mobilenetv3_small_100", 3, 32),
        ("vit_tiny_patch16_224", 3, 32),  # told the size: it was made for 224
        pytest.param("vgg11", 3, 32, marks=pytest.mark.slow),  # 129 million parameters to draw
    ],
)
def test_a_name_gives_a_net_that_learns_from_such_images(name: str, channels: int, size: int) -> None:
    net = create(name, num_classes=7, in_chans=channels, size=size)
    assert net.training
    logits = net(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()


def test_building_draws_from_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(create("seed_cnn", num_classes=3, in_chans=1, size=8).parameters())

    assert weights(1).equal(weights(1)) and not weights(1).equal(weights(2))


def test_the_test_image_changes_neither_statistics_nor_the_generator() -> None:
    torch.manual_seed(0)
    net = create("mobilenetv3_small_050", num_classes=3, in_chans=1, size=28, options={"drop_rate": 0.5})
    state = torch.get_rng_state()
    assert all(int(n) == 0 for name, n in net.named_buffers() if name.endswith("num_batches_tracked"))
    torch.manual_seed(0)
    timm.create_model("mobilenetv3_small_050", num_classes=3, in_chans=1, drop_rate=0.5)
    assert torch.get_rng_state().equal(state)


def test_options_reach_the_architecture() -> None:
    net = create("vit_tiny_patch16_224", num_classes=3, in_chans=1, size=28, options={"patch_size": 7, "depth": 2})
    assert net.patch_embed.num_patches == 16 and len(net.blocks) == 2


def test_a_config_node_builds_it() -> None:
    node = {
        "_target_": "kd.models.create",
        "name": "seed_cnn",
        "pretrained": False,
        "options": {"widths": [2, 2, 2, 2]},
    }
    assert instantiate(node, num_classes=3, in_chans=1, size=8)(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "resnet81"}, "no model 'resnet81'; did you mean 'resnet18'"),
        ({"name": "seed_cn"}, "did you mean 'seed_cnn'"),
        ({"name": "zzz"}, "timm.list_models"),
        ({"name": "timm/resnet18"}, "no model 'timm/resnet18'"),
        ({"name": "hf-hub:timm/resnet18"}, "no model 'hf-hub:timm/resnet18'"),
        ({"name": "vit_tiny_patch16_224_in21k"}, "its name is now 'vit_tiny_patch16_224.augreg_in21k'"),
        ({"name": "resnet18.a1_in2k"}, "did you mean 'resnet18.a1_in1k'"),
        ({"name": "seed_cnn", "pretrained": True}, "no weights are published for 'seed_cnn'; set pretrained=false"),
        ({"options": {"width": [1]}}, "unexpected keyword argument 'width'"),
        ({"options": {"widths": [1]}}, "four positive integers"),
        ({"options": {"checkpoint_path": "x.pth"}}, "hold 'checkpoint_path'"),
        ({"options": {"img_size": 32}}, "hold 'img_size'"),
        ({"size": 3}, "4 px is the least"),
        ({"name": "vit_tiny_patch16_224"}, "patches of 16 px, which do not tile images of 28x28 with 1 channel"),
        ({"name": "convnext_atto"}, "convnext_atto does not take images of 28x28 with 1 channel"),
        ({"name": "resnet18", "options": {"features_only": True}}, "gives a list for one image"),
        ({"name": "resnet18", "num_classes": 0}, r"gives shape \(1, 512\) for one image, not \(1, 0\) logits"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        create(**{"name": "seed_cnn", "num_classes": 10, "in_chans": 1, "size": 28} | fields)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **fields: Any) -> nn.Module:
        raise FileNotFoundError("cannot find the requested files\nin the local cache")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"pretrained weights .*cannot find.*pretrained=false") as caught:
        create("resnet18", num_classes=10, in_chans=3, size=32, pretrained=True)
    assert "\n" not in str(caught.value)


def test_a_pretrained_net_brings_its_own_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **fields: made(name, **fields))
    net = create("resnet18", num_classes=10, in_chans=3, size=32, pretrained=True)
    assert preprocessing(net, [0.1] * 3, [0.2] * 3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = create("resnet18", num_classes=10, in_chans=1, size=28, pretrained=True)
    mean, std = preprocessing(grey, [0.1], [0.2])
    assert_close([*mean, *std], [(0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3])


def test_a_net_from_scratch_takes_the_datas_statistics() -> None:
    net = create("resnet18", num_classes=10, in_chans=1, size=28)
    assert preprocessing(net, [0.1], [0.2]) == ((0.1,), (0.2,))


def test_normalised_images_are_those_of_the_formula() -> None:
    images = torch.rand(2, 3, 4, 4)
    front = Normalised(nn.Identity(), [0.1, 0.2, 0.3], [1.0, 2.0, 4.0])
    for channel, (mean, std) in enumerate(((0.1, 1.0), (0.2, 2.0), (0.3, 4.0))):
        assert_close(front(images)[:, channel], (images[:, channel] - mean) / std)
    assert_close(Normalised(nn.Identity(), [0.5], [0.5])(images), 2 * images - 1)  # one for all channels


def test_statistics_are_no_state_but_follow_the_device_and_type() -> None:
    front = Normalised(nn.Linear(2, 2), [0.5], [0.5])
    assert set(front.state_dict()) == {"net.weight", "net.bias"}
    assert front.to(torch.float64).mean.dtype is torch.float64


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5, 0.5]), ([], []), ([0.5], [0.0]), ([0.5], [-1.0])])
def test_statistics_that_do_not_fit_are_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(InputError, match="must be as many"):
        Normalised(nn.Identity(), mean, std)


def test_what_the_data_or_the_key_decides_is_no_option() -> None:
    assert {"pretrained", "num_classes", "in_chans", "img_size", "checkpoint_path"} <= build.RESERVED
