"""The parts of networks of many families, found and tapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd import names
from kd.errors import InputError
from kd.models import create
from kd.models.outline import Outline, outline
from kd.models.taps import Taps


def net(name: str, channels: int = 3, size: int = 32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create(name, num_classes=7, in_chans=channels, size=size, options=options).eval()


def tapped(model: nn.Module, wanted: list[str], channels: int, size: int) -> tuple[dict[str, Tensor], Tensor]:
    taps = Taps(model, wanted)
    with torch.no_grad():
        logits = model(torch.rand(2, channels, size, size))
    return taps.pop(), logits


SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
FAMILIES = [
    # name, channels, size, options, stages, embedding, whether the class maps' mean is the logits; None: no class maps
    ("seed_cnn_small", 1, 8, {}, ["conv1", "conv2", "conv3"], "head:input", False),
    ("seed_cnn", 1, 28, {}, ["conv1", "conv2", "conv3"], "head:input", False),
    ("cifar_resnet8", 3, 32, {}, ["layer1", "layer2", "layer3"], "head:input", True),
    ("cifar_wrn_16_1", 3, 32, {}, ["layer1", "layer2", "tail"], "head:input", True),
    ("cifar_vgg8", 3, 32, {}, ["stem", "layer1", "layer2", "layer4"], "head:input", True),
    ("cifar_mobilenetv2", 3, 32, {}, ["layer1", "layer2", "layer3", "tail"], "head:input", True),
    ("resnet10t", 1, 8, {}, ["layer1", "layer2", "layer3", "layer4"], "fc:input", True),
    ("resnetv2_50", 3, 64, {"layers": [1, 1, 1, 1]}, [f"stages.{i}" for i in range(4)], "head.fc:input:pooled", True),
    ("regnetx_002", 3, 64, {}, ["s1", "s2", "s3", "s4"], "head.fc:input", True),
    ("mobilenetv3_small_050", 3, 32, {}, [f"blocks.{i}" for i in (0, 1, 3, 5)], "classifier:input", True),
    ("ghostnet_050", 3, 32, {}, [f"blocks.{i}" for i in (1, 3, 5, 7)], "classifier:input", None),
    ("densenet121", 3, 32, {"block_config": (1, 1, 1, 1)},
     [*(f"features.denseblock{i}" for i in (1, 2, 3)), "features.norm5"], "classifier:input", True),
    ("repvgg_a0", 3, 32, {}, ["stages.0", "stages.1", "stages.2", "final_conv"], "head.fc:input", True),
    ("convnext_atto", 3, 64, {}, [f"stages.{i}" for i in range(4)], "head.fc:input", False),
    ("poolformer_s12", 3, 64, {}, [f"stages.{i}" for i in range(4)], "head.fc:input", False),
    ("vit_tiny_patch16_224", 3, 64, {}, [f"blocks.{i}:maps" for i in (2, 5, 8, 11)], "head:input", False),
    ("deit_tiny_distilled_patch16_224", 3, 64, {"depth": 4},
     [f"blocks.{i}:maps" for i in range(4)], "head:input", False),
    ("beit_base_patch16_224", 3, 64, {"depth": 2, "embed_dim": 24, "num_heads": 2},
     ["blocks.0:maps", "blocks.1:maps"], "head:input", False),
    ("cait_xxs24_224", 3, 64, {"depth": 4}, [f"blocks.{i}:maps" for i in range(4)], "head:input", None),
    ("mixer_s32_224", 3, 64, {},
     [f"blocks.{i}:maps" for i in (1, 3, 5, 7)], "head:input", True),
    ("swin_tiny_patch4_window7_224", 3, 64, SWIN, [f"layers.{i}:maps" for i in range(4)], "head.fc:input", True),
    ("levit_128s", 3, 64, {}, [f"stages.{i}:maps" for i in range(3)], "head.linear:input", False),
    ("mvitv2_tiny", 3, 32, {},
     ["stages.0:maps", "stages.1:maps", "stages.2:maps", "norm:maps"], "head.fc:input", False),
    ("twins_svt_small", 3, 64, {"depths": (1, 1, 1, 1)},
     ["pos_block.0:maps", "pos_block.1:maps", "pos_block.2:maps", "norm:maps"], "head:input", True),
    ("hrnet_w18_small", 3, 64, {},
     ["act1", "incre_modules.0", "downsamp_modules.0.2", "downsamp_modules.1.2", "final_layer"],
     "classifier:input", True),
]  # fmt: skip


# The maps whose mean the classifier reads; where none is named, it reads no mean.
UNPOOLED = {
    "cifar_resnet8": "layer3",
    "cifar_wrn_16_1": "tail",
    "cifar_vgg8": "layer4",
    "cifar_mobilenetv2": "tail",
    "resnet10t": "layer4",
    "resnetv2_50": "head.fc:input",
    "regnetx_002": "s4",
    "densenet121": "features.norm5",
    "repvgg_a0": "final_conv",
    "mixer_s32_224": "norm:maps",
    "swin_tiny_patch4_window7_224": "norm:maps",
    "levit_128s": "stages.2:maps",
    "mvitv2_tiny": "norm:maps",
    "twins_svt_small": "norm:maps",
    "hrnet_w18_small": "final_layer",
}


@pytest.mark.parametrize(
    ("name", "channels", "size", "options", "stages", "embedding", "exact"), FAMILIES, ids=[f[0] for f in FAMILIES]
)
def test_the_parts_of_a_family_are_found_and_can_be_tapped(name, channels, size, options, stages, embedding, exact):
    model = net(name, channels, size, **options)
    found = outline(model, (channels, size, size))
    assert list(found.stages) == stages and found.embedding == embedding
    assert len(found.preactivations) == len(stages)
    wanted = [*found.stages, *found.preactivations, found.embedding, found.unpooled]
    wanted += [found.classes] if found.classes else []
    values, logits = tapped(model, list(dict.fromkeys(wanted)), channels, size)
    maps = [values[path] for path in found.stages]
    sides = [m.shape[2] for m in maps]
    assert all(m.ndim == 4 and m.shape[2] == m.shape[3] for m in maps) and sides == sorted(sides, reverse=True)
    assert [values[path].shape for path in found.preactivations] == [m.shape for m in maps]
    head = dict(model.named_modules())[found.classifier]
    assert values[found.embedding].shape == (2, head.weight.shape[1])
    mean = values[found.unpooled].mean(dim=(2, 3)) if values[found.unpooled].ndim == 4 else values[found.unpooled]
    torch.testing.assert_close(mean, values[found.embedding], atol=1e-4, rtol=1e-3)
    assert found.unpooled == UNPOOLED.get(name, found.embedding)
    if exact is None:
        assert found.classes is None
    else:
        classes = values[found.classes]
        assert classes.shape == (2, 7, *maps[-1].shape[2:])
        if exact:
            torch.testing.assert_close(classes.mean(dim=(2, 3)), logits, atol=1e-4, rtol=1e-3)


def test_what_comes_before_a_relu_has_both_signs_and_becomes_the_stage():
    for name, channels, size in (("cifar_resnet8", 3, 32), ("seed_cnn", 1, 28), ("resnet10t", 3, 64)):
        model = net(name, channels, size)
        found = outline(model, (channels, size, size))
        values, _ = tapped(model, [*found.stages, *found.preactivations], channels, size)
        assert found.preactivations[-1].endswith(":input")
        for stage, before in zip(found.stages, found.preactivations, strict=True):
            assert values[before].relu().equal(values[stage])
        assert min(values[before].min() for before in found.preactivations) < 0


def test_where_a_stage_ends_without_an_activation_it_is_its_own_preactivation():
    found = outline(net("convnext_atto"), (3, 32, 32))
    assert found.preactivations == found.stages


def test_looking_leaves_the_net_as_it_was():
    model = net("cifar_resnet8").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    outline(model, (3, 32, 32))
    assert model.training and torch.get_rng_state().equal(generator)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parts_have_names_and_take_what_stands_behind_them():
    found = outline(net("cifar_resnet8"), (3, 32, 32))
    assert found.find("stages") == ("layer1", "layer2", "layer3") and found.find("stage2") == ("layer2",)
    assert found.find("middle") == ("layer2",) and found.find("last:pooled") == ("layer3:pooled",)
    assert found.find("embedding") == ("head:input",) and found.find("preactivation1") == ("layer1.0.relu:input",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stage4", r"CifarNet has no stage4; it has 3 stages: layer1, layer2, layer3"),
        ("laast", r"'laast' is no part of a network; did you mean 'last'"),
    ],
)
def test_a_part_that_is_not_there_is_refused_with_those_there_are(name, words):
    with pytest.raises(InputError, match=words):
        outline(net("cifar_resnet8"), (3, 32, 32)).find(name)


def test_a_net_of_vectors_has_no_stage_and_says_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    found = outline(model, (3, 2, 2))
    assert found.stages == () and found.embedding == "3:input" and found.classes is None
    with pytest.raises(InputError, match="Sequential has no last; none of its layers gives maps"):
        found.find("last")
    with pytest.raises(InputError, match="cannot be laid over the positions"):
        found.find("classes")
    with pytest.raises(InputError, match="no linear layer gives its logits"):
        Outline("Net", (), ()).find("embedding")


def test_a_user_may_name_the_stages():
    model = create("cifar_resnet8", num_classes=7, in_chans=3, size=32, stages=["stem", "layer3"])
    found = outline(model, (3, 32, 32))
    assert found.stages == ("stem", "layer3") and found.preactivations == ("stem.relu:input", "layer3.0.relu:input")
    assert outline(model, (3, 32, 32), ["layer1:pooled"]).stages == ("layer1:pooled",)
    tokens = outline(net("vit_tiny_patch16_224", depth=2), (3, 32, 32), ["blocks.1"])
    assert tokens.stages == ("blocks.1:maps",)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["layer9"], r"stages: 'layer9' is no layer of CifarNet; did you mean 'layer[123]'"),
        ([], r"stages are \[\]; a list of layers was meant"),
        ("layer1", r"stages are 'layer1'; a list"),
        ([1], r"stages are \[1\]; a list"),
    ],
)
def test_stages_that_are_none_are_refused(stages, words):
    with pytest.raises(InputError, match=words):
        create("cifar_resnet8", num_classes=7, in_chans=3, size=32, stages=stages)


def test_a_chosen_layer_without_maps_is_refused():
    with pytest.raises(InputError, match=r"stages: 'pool' of CifarNet gives \(1, 64\), and no maps or tokens"):
        outline(net("cifar_resnet8"), (3, 32, 32), ["pool"])
    with pytest.raises(InputError, match=r"stages: 'layer7' is no layer of CifarNet that runs; did you mean 'layer"):
        outline(net("cifar_resnet8"), (3, 32, 32), ["layer7"])


def test_every_part_that_is_found_is_a_part_by_its_name():
    assert all(names.part(part) == part for part in outline(net("cifar_resnet8"), (3, 32, 32)).parts())
