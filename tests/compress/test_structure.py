"""What compression made of a net is plain data, and made again of a fresh one; a stranger's structure is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from kd.compress.structure import difference, masked, rebuild, replace
from kd.errors import KDError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())


def narrow() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 3, groups=5), nn.Flatten())


def test_a_narrower_net_is_rebuilt_from_its_difference_alone() -> None:
    change = json.loads(json.dumps(difference(net(), narrow())))
    made = rebuild(net(), [change])
    made.load_state_dict(narrow().state_dict(), strict=True)
    images = torch.rand(2, 3, 8, 8)
    assert made.eval()(images).equal(narrow().eval()(images))
    assert repr(made) == repr(narrow())


def test_changes_are_made_in_their_order() -> None:
    first = difference(net(), narrow())
    made = rebuild(net(), [first, {"kind": "lowrank", "layers": {"0": {"form": "tucker", "rank": [2, 4]}}}])
    assert [tuple(p.shape) for p in made[0].parameters()] == [(2, 3, 1, 1), (4, 2, 3, 3), (5, 4, 1, 1), (5,)]
    assert made(torch.rand(2, 3, 8, 8)).shape == (2, 5 * 16)


def test_a_recurrent_layer_and_a_tied_weight_are_rebuilt() -> None:
    class Talker(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, width, bidirectional=True, batch_first=True)
            self.words, self.head = nn.Linear(2 * width, 6), nn.Linear(2 * width, 6)
            self.head.weight = self.words.weight

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.rnn(inputs)[0]) + self.words(self.rnn(inputs)[0])
            return found

    small = Talker(3)
    made = rebuild(Talker(5), [difference(Talker(5), small)])
    made.load_state_dict(small.state_dict(), strict=True)
    assert made.head.weight is made.words.weight
    inputs = torch.rand(2, 7, 4)
    assert made(inputs).equal(small(inputs))


def test_a_replaced_layer_keeps_its_path_and_its_mode() -> None:
    made = net().eval()
    replace(made, "0", nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 8, 1)))
    assert not made[0][1].training and dict(made.named_modules())["0.1"].out_channels == 8


def test_masks_are_of_what_was_masked_and_not_factorised_or_reshaped_since() -> None:
    mask: dict[str, Any] = {"kind": "masked", "tensors": {"0.weight": "2:4", "3.weight": "2:4"}}
    assert masked([]) == {}
    assert masked([mask]) == {"0.weight": "2:4", "3.weight": "2:4"}
    assert masked([mask, {"kind": "lowrank", "layers": {"0": {}}}]) == {"3.weight": "2:4"}
    assert masked([mask, {"kind": "pruned", "modules": {}, "tensors": {"0.weight": [1, 2, 3, 3]}}])["0.weight"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("prune", "no change that this kd knows"),
        ({"kind": "quantised"}, "no change that this kd knows"),
        ({"kind": "pruned", "modules": {"9": {}}, "tensors": {}}, "'9' is no layer of Sequential"),
        ({"kind": "pruned", "modules": {"0": {"forward": 1}}, "tensors": {}}, "sets 'forward' of 0"),
        ({"kind": "pruned", "modules": {"0": {"out_channels": -1}}, "tensors": {}}, "is no width"),
        ({"kind": "pruned", "modules": {"0": {"out_channels": [3]}}, "tensors": {}}, "is no width"),
        ({"kind": "pruned", "modules": {"0": 3}, "tensors": {}}, "sets '' of 0"),
        ({"kind": "pruned", "modules": {}, "tensors": {"0.weight": [8, 3, 3, 4]}}, "pruning only shrinks"),
        ({"kind": "pruned", "modules": {}, "tensors": {"0.weight": [8, 3]}}, "pruning only shrinks"),
        ({"kind": "pruned", "modules": {}, "tensors": {"0.wait": [8]}}, "there is none"),
        ({"kind": "pruned", "modules": {}}, "is no mapping of paths"),
        ({"kind": "lowrank", "layers": {"0": {"form": "cp", "rank": 2}}}, "none of svd, spatial, tucker"),
        ({"kind": "lowrank", "layers": {"0": {"form": "svd", "rank": 10**9}}}, "is more than the 8"),
        ({"kind": "lowrank", "layers": {"0": {"form": "svd"}}}, "rank None is none"),
        ({"kind": "lowrank", "layers": {"1": {"form": "svd", "rank": 1}}}, "BatchNorm2d has no low-rank form"),
        ({"kind": "masked", "tensors": {"0.wait": None}}, "masks '0.wait'"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused_in_one_line(change: Any, said: str) -> None:
    with pytest.raises(KDError, match=said) as caught:
        rebuild(copy.deepcopy(net()), [change])
    assert "\n" not in str(caught.value)
