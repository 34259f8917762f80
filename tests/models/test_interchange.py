"""A net run again with channels of another sample: what goes where, and that nothing of it is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.models import Taps, create
from kd.models.interchange import exchanged, width
from kd.models.taps import Layout

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 3)
    )


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_channels_are_put_in_by_hand() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 1, bias=False))
    nn.init.ones_(model[1].weight)
    rows = torch.tensor([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]])
    with exchanged(model, {"0": (rows.flip(0), torch.tensor([1]))}):
        assert model(rows).flatten().tolist() == [1 + 20 + 4, 10 + 2 + 40]
    with exchanged(model, {"0": (rows.flip(0), [0, 2])}):
        assert model(rows).flatten().tolist() == [10 + 2 + 40, 1 + 20 + 4]
    assert model(rows).flatten().tolist() == [7, 70]


def test_a_layers_own_activations_change_nothing_and_the_hooks_are_gone() -> None:
    model = net().eval()
    taps = Taps(model, ["1", "4:input"])
    plain = model(IMAGES)
    found, before = taps.pop(), hooks(model)
    given = {"1": (found["1"], [0, 3]), "4:input": (found["4:input"], range(50))}
    with exchanged(model, {path: (value, list(some)) for path, (value, some) in given.items()}):
        assert hooks(model) == before + 2
        assert model(IMAGES).equal(plain)
    taps.pop()
    assert hooks(model) == before


def test_the_hooks_are_gone_after_a_pass_that_failed() -> None:
    model = net()
    with pytest.raises(InputError) as refused, exchanged(model, {"0": (torch.zeros(2, 4, 6, 6), [0])}):
        model(IMAGES)
    assert "the layer '0' gave (2, 4, 6, 6) before, and shape (4, 4, 6, 6) in the pass" in str(refused.value)
    assert hooks(model) == 0


def test_such_a_pass_leaves_the_statistics_of_batch_norms_alone() -> None:
    model = net().train()
    model(IMAGES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with exchanged(model, {"0": (torch.ones(4, 4, 6, 6), [0, 1])}):
        model(IMAGES).sum().backward()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    model(IMAGES)
    assert not model[1].running_mean.equal(before["1.running_mean"])


def test_a_tap_reads_what_was_put_in_and_the_gradient_goes_to_both_samples() -> None:
    model = net().eval()
    taps = Taps(model, ["0"])
    source = torch.full((4, 4, 6, 6), 5.0, requires_grad=True)
    with exchanged(model, {"0": (source, [2])}):
        model(IMAGES).sum().backward()
    seen = taps.pop()["0"]
    assert (seen[:, 2] == 5).all() and not (seen[:, [0, 1, 3]] == 5).any()
    assert source.grad is not None and source.grad[:, 2].abs().sum() > 0 and source.grad[:, [0, 1, 3]].abs().sum() == 0
    assert model[0].weight.grad[2].abs().sum() == 0 and model[0].weight.grad[0].abs().sum() > 0  # type: ignore[union-attr]


class Pair(nn.Module):
    """A layer that gives a tensor and more."""

    def forward(self, rows: Tensor) -> Any:
        return rows, "more"


def test_of_several_things_that_a_layer_gives_the_first_tensor_is_changed() -> None:
    model = Pair()
    with exchanged(nn.ModuleDict({"pair": model}), {"pair": (torch.ones(1, 2), [0])}):
        first, more = model(torch.zeros(1, 2))
    assert first.tolist() == [[1, 0]] and more == "more"


@pytest.mark.parametrize(
    ("shape", "layout", "meant"),
    [
        ((2, 5), Layout(None, False), 5),
        ((2, 17, 6), Layout(1, False), 6),
        ((2, 7, 4, 4), Layout(None, False), 7),
        ((2, 4, 4, 7), Layout(None, True), 7),
    ],
)
def test_channels_are_where_the_net_has_them(shape: tuple[int, ...], layout: Layout, meant: int) -> None:
    assert width(torch.zeros(shape), layout) == meant


def test_what_has_no_channels_is_refused() -> None:
    with pytest.raises(InputError, match="no channels to exchange"):
        width(torch.zeros(3), Layout(None, False))


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet10t", "layer2"), ("vit_tiny_patch16_224", "blocks.5"), ("swin_tiny_patch4_window7_224", "layers.1")],
)
def test_timms_nets_answer_for_the_other_sample_where_all_of_a_layer_is_exchanged(name: str, layer: str) -> None:
    options = {"depth": 6} if name.startswith("vit") else {}
    size = 224 if name.startswith("swin") else 32
    model = create(name, num_classes=3, in_chans=1, size=size, options=options).eval()
    taps = Taps(model, [layer])
    images = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(images)
        found = taps.pop()[layer]
        every = torch.arange(width(found, Layout.of(model)))
        with exchanged(model, {layer: (found.flip(0), every)}):
            torch.testing.assert_close(model(images), plain.flip(0))
        with exchanged(model, {layer: (found.flip(0), every[::2])}):
            half = model(images)
    assert not torch.allclose(half, plain) and not torch.allclose(half, plain.flip(0))
