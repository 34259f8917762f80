"""The nets of the CIFAR-100 benchmark against RepDistiller's, from which published numbers come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.testing import assert_close

from kd.errors import InputError
from kd.models import Normalised, create, layers, load, save, weights_digest
from kd.models.cifar import CifarNet

# At 100 classes: counted in RepDistiller's models/*.py; those of ResNet-20, -56 and -110 are in imgclsmob's table too.
PARAMETERS = {
    "cifar_resnet8": 83_892,
    "cifar_resnet14": 181_108,
    "cifar_resnet20": 278_324,
    "cifar_resnet32": 472_756,
    "cifar_resnet44": 667_188,
    "cifar_resnet56": 861_620,
    "cifar_resnet110": 1_736_564,
    "cifar_resnet8x4": 1_233_540,
    "cifar_resnet32x4": 7_433_860,
    "cifar_resnet50": 23_705_252,
    "cifar_wrn_16_1": 180_916,
    "cifar_wrn_16_2": 703_284,
    "cifar_wrn_40_1": 569_780,
    "cifar_wrn_40_2": 2_255_156,
    "cifar_vgg8": 3_965_028,
    "cifar_vgg11": 9_277_284,
    "cifar_vgg13": 9_462_180,
    "cifar_vgg16": 14_774_436,
    "cifar_vgg19": 20_086_692,
    "cifar_mobilenetv2": 812_836,
    "cifar_shufflenetv1": 949_258,
    "cifar_shufflenetv2": 1_355_528,
}

# Second to fourth logit of the first of two images, of RepDistiller's code in training mode, where the weights and the
# images are those of `by_formula`: an order or a shortcut that is wrong changes them, and no count would.
LOGITS = {
    "cifar_resnet8": [-3.8150, 4.3155, 1.4311],
    "cifar_resnet8x4": [4.8762, 5.7427, 7.5549],
    "cifar_resnet50": [26.3103, -9.4242, 39.6403],
    "cifar_wrn_16_1": [-1.9220, 4.3749, 2.0998],
    "cifar_wrn_16_2": [6.0417, -1.8944, 1.1968],
    "cifar_vgg11": [4.6196, 3.8165, 6.9786],
    "cifar_mobilenetv2": [21.2364, 17.4978, -5.8973],
    "cifar_shufflenetv1": [92.8183, 86.2265, 126.2991],
    "cifar_shufflenetv2": [7.2517, 0.6659, 9.6593],
}
FAMILIES = [*LOGITS]

# Shapes of RepDistiller's features in order: stem, layer1, layer2, …, pool.
WIDTHS_16 = [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (64,)]
FEATURES = {
    "cifar_resnet8": WIDTHS_16,
    "cifar_resnet110": WIDTHS_16,
    "cifar_resnet32x4": [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (256,)],
    "cifar_resnet50": [(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4), (2048,)],
    "cifar_wrn_40_1": WIDTHS_16,
    "cifar_wrn_40_2": [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8), (128,)],
    "cifar_vgg8": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4), (512,)],
    "cifar_vgg19": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4), (512,)],
    "cifar_mobilenetv2": [(16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2), (1280,)],
    "cifar_shufflenetv1": [(24, 32, 32), (240, 16, 16), (480, 8, 8), (960, 4, 4), (960,)],
    "cifar_shufflenetv2": [(24, 32, 32), (116, 16, 16), (232, 8, 8), (464, 4, 4), (1024,)],
}


def build(name: str, **options: Any) -> CifarNet:
    net = timm.create_model(name, **options)
    assert isinstance(net, CifarNet)
    return net


def by_formula(shape: torch.Size, order: int) -> Tensor:
    """Numbers from -0.5 to 0.5 that look drawn, and are the same everywhere."""
    n = torch.arange(shape.numel())
    return (((31 * n * n + 17 * n + 7 * order) % 1009).double() / 1009 - 0.5).view(shape)


def test_these_are_all_and_none_of_them_is_timms() -> None:
    assert sorted(timm.list_models("cifar_*")) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_are_as_many_as_in_the_reference_and_as_the_docstring_says(name: str) -> None:
    with torch.device("meta"):
        net = build(name)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,} parameters" in (timm.models.model_entrypoint(name).__doc__ or "")


@pytest.mark.parametrize("name", LOGITS)
def test_the_same_weights_give_the_logits_of_the_reference(name: str) -> None:
    with torch.device("meta"):
        net = build(name, num_classes=100)
    net.to_empty(device="cpu").double()
    with torch.no_grad():
        for order, parameter in enumerate(net.parameters()):
            parameter.copy_(by_formula(parameter.shape, order) + (parameter.ndim == 1))
        found = net(by_formula(torch.Size((2, 3, 32, 32)), 0))[0, 1:4]
    assert_close(found, torch.tensor(LOGITS[name], dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FEATURES)
def test_stages_are_tapped_by_the_same_names_in_all_of_them(name: str) -> None:
    with torch.device("meta"):
        net = build(name)
    found = {path: shape[1:] for path, _, shape in layers(net, (3, 32, 32)) if "." not in path and path != "tail"}
    names = ["stem", *(f"layer{n}" for n in range(1, len(FEATURES[name]) - 1)), "pool"]
    assert found == dict(zip(names, FEATURES[name], strict=True)) | {"head": (100,)}


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_end_after_their_relu_where_they_have_one(name: str) -> None:
    net, linear = build(name), name.startswith(("cifar_wrn", "cifar_mobilenet"))
    maps = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for part, module in net.named_children():
            maps = module(maps)
            if part.startswith("layer"):
                assert (maps.min().item() < 0) == linear, part
            if part in ("tail", "pool"):
                assert maps.min().item() >= 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_a_net_takes_the_data_and_every_weight_learns(name: str, channels: int, size: int) -> None:
    torch.manual_seed(0)
    net = create(name, num_classes=7, in_chans=channels, size=size)
    images = torch.randn(4, channels, size, size)
    logits = net(images)
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for path, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path
        owner, _, kind = path.rpartition(".")
        if kind == "weight" or not isinstance(net.get_submodule(owner), nn.Conv2d):  # batch norm takes such biases away
            assert parameter.grad.any(), path


def test_a_net_of_the_benchmark_is_created_by_its_name() -> None:
    assert create("cifar_resnet20", num_classes=100, in_chans=3, size=32)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    with pytest.raises(InputError, match="no weights are published for 'cifar_resnet20'"):
        create("cifar_resnet20", num_classes=100, in_chans=3, size=32, pretrained=True)


def test_an_image_too_small_to_halve_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="cifar_vgg8 does not take images of 4x4 with 3 channels"):
        create("cifar_vgg8", num_classes=10, in_chans=3, size=4)


def test_timm_knows_what_they_were_made_for_and_which_layer_classifies() -> None:
    for name in PARAMETERS:
        described = get_pretrained_cfg(name)
        assert described and not described.fixed_input_size and not described.has_weights
        assert (described.input_size, described.num_classes, described.classifier) == ((3, 32, 32), 100, "head")


def test_a_net_is_stored_and_built_again(tmp_path: Path) -> None:
    recipe = {"model": {"name": "cifar_shufflenetv2", "options": {}}, "num_classes": 5, "in_chans": 3, "size": 32}
    net = Normalised(create("cifar_shufflenetv2", num_classes=5, in_chans=3, size=32), [0.5] * 3, [0.25] * 3)
    net(torch.rand(8, 3, 32, 32))  # so that the statistics of the batch norms are no longer those it starts with
    save(net, recipe, tmp_path)
    again, images = load(tmp_path), torch.rand(2, 3, 32, 32)
    assert weights_digest(again) == weights_digest(net)
    assert again(images).equal(net.eval()(images))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "shuffle" not in name])
def test_convolutions_start_as_wide_as_their_fan_out_says(name: str) -> None:
    torch.manual_seed(0)
    for path, module in build(name).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05), path
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert not module.bias.any()


def test_the_heads_start_as_in_the_reference() -> None:
    torch.manual_seed(0)
    for name in FAMILIES:
        head = build(name, num_classes=100).head
        small = name.startswith(("cifar_vgg", "cifar_mobilenet"))
        spread = 0.01 if small else (3 * head.in_features) ** -0.5  # that of torch's uniform numbers
        assert head.weight.std().item() == pytest.approx(spread, rel=0.05), name
        assert head.bias.any() != (small or name.startswith("cifar_wrn")), name


def test_options_reach_the_architecture() -> None:
    assert [p.shape[0] for n, p in build("cifar_resnet8", widths=[4, 6, 8, 10]).named_parameters() if "conv1" in n] == [
        *(6, 8, 10)
    ]
    dropping = build("cifar_wrn_16_1", drop_rate=0.3)
    assert [m.p for m in dropping.modules() if isinstance(m, nn.Dropout)] == [0.3] * 6
    assert not any(isinstance(m, nn.Dropout) for m in build("cifar_wrn_16_1").modules())
    # RepDistiller's mobile_full and, at width 2, a last convolution that grows too.
    assert build("cifar_mobilenetv2", width=1.0).tail.conv.weight.shape[:2] == (1280, 320)
    assert build("cifar_mobilenetv2", width=2.0, expansion=1).tail.conv.weight.shape[:2] == (2560, 640)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cifar_resnet8", {"widths": [16, 16, 32]}, "four positive integers"),
        ("cifar_resnet8x4", {"widths": [16, 16, 32, 0]}, "four positive integers"),
        ("cifar_mobilenetv2", {"width": 0.05}, "1/16 or more"),
        ("cifar_mobilenetv2", {"expansion": 0}, "a positive integer was meant"),
        ("cifar_wrn_16_2", {"drop_rate": 1.5}, "dropout probability has to be between 0 and 1"),
        ("cifar_vgg8", {"widths": [1]}, "unexpected keyword argument 'widths'"),
    ],
)
def test_options_that_make_no_net_are_refused_in_one_line(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        create(name, num_classes=10, in_chans=3, size=32, options=options)
    assert "\n" not in str(caught.value)
