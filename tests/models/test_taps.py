"""Layers read while a net runs: the right tensor, with its gradient, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kd.errors import InputError
from kd.models.build import create
from kd.models.frozen import Frozen
from kd.models.taps import Layout, Taps, laid, layers, pooled


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 3))


IMAGES = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)


def test_pop_gives_the_layers_outputs_of_the_last_pass() -> None:
    model = net()
    taps = Taps(model, ["3", "2"])
    model(torch.zeros_like(IMAGES))
    logits = model(IMAGES)
    found = taps.pop()
    assert list(found) == ["3", "2"]
    assert found["3"].equal(logits) and found["2"].shape == (2, 144)


def test_an_in_place_activation_does_not_rewrite_what_was_tapped() -> None:
    model = net()
    taps = Taps(model, ["0", "1"])
    model(IMAGES)
    found = taps.pop()
    assert found["0"].equal(model[0](IMAGES)) and found["0"].min() < 0
    assert found["1"].equal(found["0"].relu())


def test_timms_in_place_layers_are_read_rightly() -> None:
    model = create("resnet18", num_classes=3, in_chans=1, size=28).eval()
    taps = Taps(model, ["bn1", "layer1.0.bn1", "layer4"])
    images = torch.rand(2, 1, 28, 28)
    model(images)
    found = taps.pop()
    assert found["bn1"].equal(model.bn1(model.conv1(images)))
    assert found["layer1.0.bn1"].min() < 0 <= found["layer4"].min()


def test_the_gradient_flows_through_a_tap() -> None:
    model = net()
    taps = Taps(model, ["0"])
    model(IMAGES)
    taps.pop()["0"].square().sum().backward()
    assert model[0].weight.grad is not None and model[3].weight.grad is None


def test_taps_work_in_eval_mode_and_in_a_frozen_net() -> None:
    model = net()
    frozen, taps = Frozen(model), Taps(model, ["2"])
    frozen(IMAGES)
    assert not taps.pop()["2"].requires_grad


def test_popping_lets_go() -> None:
    model = net()
    taps = Taps(model, ["0"])
    model(IMAGES)
    kept = weakref.ref(taps.pop()["0"])
    gc.collect()
    assert kept() is None
    with pytest.raises(InputError, match="'0' was not run by the last forward pass"):
        taps.pop()


def test_no_paths_is_no_work() -> None:
    model = net()
    taps = Taps(model, [])
    model(IMAGES)
    assert taps.pop() == {}


def test_removed_taps_hear_nothing() -> None:
    model = net()
    taps = Taps(model, ["0"])
    taps.remove()
    model(IMAGES)
    with pytest.raises(InputError, match="was not run"):
        taps.pop()


def test_a_copied_net_does_not_speak_into_the_originals_taps() -> None:
    model = net()
    taps = Taps(model, ["0"])
    model(IMAGES)
    twin = copy.deepcopy(model)  # while a tensor of the graph is held
    pickle.loads(pickle.dumps(model))(torch.ones_like(IMAGES))
    twin(torch.ones_like(IMAGES))
    assert taps.pop()["0"].equal(model[0](IMAGES))


def test_a_net_copied_with_its_taps_keeps_them() -> None:
    model = net()
    twin, taps = copy.deepcopy((model, Taps(model, ["0"])))
    twin(IMAGES)
    assert taps.pop()["0"].equal(model[0](IMAGES))


class Pair(nn.Module):
    """Gives what it is told to."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize("output", [(torch.ones(2), torch.zeros(3)), [None, torch.ones(2)]])
def test_of_a_tuple_the_first_tensor_is_taken(output: Any) -> None:
    model = nn.Sequential(Pair(output))
    taps = Taps(model, ["0"])
    model(IMAGES)
    assert taps.pop()["0"].equal(torch.ones(2))


def test_a_layer_without_a_tensor_is_refused() -> None:
    model = nn.Sequential(Pair({"logits": torch.ones(2)}))
    Taps(model, ["0"])
    with pytest.raises(InputError, match="gives a dict"):
        model(IMAGES)


@pytest.mark.parametrize(
    ("path", "words"),
    [("conv9", "did you mean 'conv3'"), ("zzzzzz", "begin with conv1, conv2, conv3, dense, head"), ("", "''")],
)
def test_an_unknown_path_is_refused_and_leaves_no_hook(path: str, words: str) -> None:
    model = create("seed_cnn", num_classes=3, in_chans=1, size=8)
    with pytest.raises(InputError, match=words):
        Taps(model, ["conv1", path])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_taps_fire_in_a_net_that_is_compiled_after_them(backend: str) -> None:
    torch._dynamo.reset()
    model, untapped = net(), net()
    taps = Taps(model, ["0", "2"])
    compiled = torch.compile(model, backend=backend)
    for images in (IMAGES, 2 * IMAGES):
        compiled(images)
        found = taps.pop()
        assert_close(found["0"], untapped[0](images))
        assert_close(found["2"], untapped[:3](images))
        found["0"].sum().backward()
        assert model[0].weight.grad is not None
    with torch.no_grad():
        compiled.eval()(IMAGES)
    assert_close(taps.pop()["2"], untapped[:3](IMAGES))
    torch._dynamo.reset()


def test_layers_lists_paths_classes_and_shapes_and_leaves_no_trace() -> None:
    model = create("seed_cnn", num_classes=10, in_chans=1, size=28).train()
    state = torch.get_rng_state()
    found = {path: (kind, shape) for path, kind, shape in layers(model, (1, 28, 28))}
    assert found["conv3"] == ("Sequential", (1, 64, 3, 3)) and found["conv3.0"] == ("Conv2d", (1, 64, 3, 3))
    assert found["dense"] == ("Sequential", (1, 64)) and found["head"] == ("Linear", (1, 10)) and "" not in found
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert torch.get_rng_state().equal(state)


def test_every_listed_layer_can_be_tapped() -> None:
    model = create("vit_tiny_patch16_224", num_classes=3, in_chans=3, size=32, options={"depth": 2}).eval()
    listed = layers(model, (3, 32, 32))
    taps = Taps(model, [path for path, _, _ in listed])
    model(torch.zeros(1, 3, 32, 32))
    assert {path: tuple(value.shape) for path, value in taps.pop().items()} == {p: shape for p, _, shape in listed}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 3, 4, 4), (2, 3)), ((2, 5, 3), (2, 3)), ((2, 3), (2, 3))],
    ids=["maps", "tokens", "flat"],
)
def test_pooled_features_are_one_vector_a_sample(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    features = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    found = pooled(features)
    assert found.shape == expected
    other = [axis for axis in range(len(shape)) if axis not in (0, 1 if len(shape) == 4 else len(shape) - 1)]
    assert_close(found, features.mean(dim=other) if other else features)


def test_features_of_another_rank_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(2,\) cannot be pooled"):
        pooled(torch.zeros(2))


def test_a_path_may_ask_for_the_pooled_output_beside_the_whole() -> None:
    taps = Taps(model := net(), ["0", "0:pooled"])
    model(IMAGES)
    found = taps.pop()
    assert found["0"].ndim == 4 and found["0:pooled"].equal(found["0"].mean(dim=(2, 3)))
    with pytest.raises(InputError, match=r"'9' is no layer"):
        Taps(model, ["9:pooled"])


def test_a_layers_input_is_read_before_the_layer_works_in_place() -> None:
    model = net()
    taps = Taps(model, ["1:input", "3:input:pooled"])
    model(IMAGES)
    found = taps.pop()
    assert found["1:input"].equal(model[0](IMAGES)) and found["1:input"].min() < 0
    assert found["3:input:pooled"].shape == (2, 144)


def test_tokens_are_laid_on_their_grid_without_those_before_them() -> None:
    model = create("vit_tiny_patch16_224", num_classes=3, in_chans=3, size=32, options={"depth": 1}).eval()
    taps = Taps(model, ["blocks.0", "blocks.0:maps", "blocks.0:maps:through:norm+head:pooled"])
    model(torch.rand(2, 3, 32, 32))
    found = taps.pop()
    tokens, maps = found["blocks.0"], found["blocks.0:maps"]
    assert tokens.shape == (2, 5, 192) and maps.shape == (2, 192, 2, 2)
    assert maps[:, :, 1, 0].equal(tokens[:, 3])
    expected = model.head(model.norm(tokens[:, 1:])).mean(dim=1)
    assert_close(found["blocks.0:maps:through:norm+head:pooled"], expected)


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((2, 6, 3), Layout(2, False), (2, 3, 2, 2)),
        ((2, 4, 3), Layout(1, False), (2, 3, 2, 2)),
        ((2, 5, 3), Layout(None, False), (2, 3, 2, 2)),
        ((2, 4, 4, 3), Layout(None, False), (2, 3, 4, 4)),
        ((2, 3, 4, 4), Layout(None, False), (2, 3, 4, 4)),
        ((2, 3, 4, 4), Layout(None, True), (2, 3, 4, 4)),
    ],
)
def test_features_are_laid_as_maps(shape: tuple[int, ...], layout: Layout, expected: tuple[int, ...]) -> None:
    assert laid(torch.zeros(shape), layout).shape == expected


def test_where_shapes_do_not_tell_the_channels_the_net_does() -> None:
    cube = torch.rand(1, 3, 3, 3)
    assert laid(cube, Layout(None, False)).equal(cube)
    assert laid(cube, Layout(None, True)).equal(cube.permute(0, 3, 1, 2))


def test_tokens_of_no_square_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 7, 3\) cannot be laid on a grid"):
        laid(torch.zeros(2, 7, 3), Layout(1, False))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("0:poled", "nothing is called ':poled'; did you mean 'pooled'"),
        ("0:pooled:input", "':input' must stand right behind the layer"),
        ("0:through:9", "'9' is no layer"),
        ("0:through", "'' is no layer"),
    ],
)
def test_what_cannot_be_done_to_a_layer_is_refused(path: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Taps(net(), [path])


def test_a_copied_net_goes_through_its_own_layers() -> None:
    model = create("cifar_resnet8", num_classes=3, in_chans=3, size=8).eval()
    taps = Taps(model, ["layer3:through:head"])
    twin, copied = copy.deepcopy((model, taps))
    with torch.no_grad():
        twin.head.weight.zero_()
        twin(torch.rand(2, 3, 8, 8))
        model(torch.rand(2, 3, 8, 8))
    assert copied.pop()["layer3:through:head"].abs().max() <= twin.head.bias.abs().max() + 1e-6
    assert taps.pop()["layer3:through:head"].std() > 0


def test_what_is_held_can_be_let_go_of_whether_or_not_all_ran() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    taps = Taps(net, ["0", "1"])
    net[0](torch.zeros(4, 2))
    taps.clear()
    net(torch.zeros(4, 2))
    assert set(taps.pop()) == {"0", "1"}
    net(torch.zeros(4, 2))
    taps.clear()
    with pytest.raises(InputError, match="was not run"):
        taps.pop()
