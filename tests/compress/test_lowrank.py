"""Factorised layers are exact at full rank, best at any other, and chosen only where they pay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kd.compress.lowrank import (
    candidates,
    factorise,
    factors,
    rank_of_energy,
    ranks,
    spectrum,
    tucker,
    weights,
)
from kd.errors import KDError

CONV: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


def layers() -> list[tuple[nn.Module, str, Any, torch.Tensor]]:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 5, (3, 5), **CONV)
    images = torch.rand(2, 6, 12, 12)
    return [
        (nn.Linear(6, 4), "svd", 4, torch.rand(3, 6)),
        (nn.Linear(4, 6, bias=False), "svd", 4, torch.rand(2, 3, 4)),
        (conv, "svd", 5, images),
        (conv, "spatial", 18, images),
        (conv, "tucker", [6, 5], images),
        (nn.Conv2d(6, 9, 1, bias=False), "svd", 6, images),
        (nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), "svd", 5, images),
    ]


@pytest.mark.parametrize(("layer", "form", "rank", "inputs"), layers())
def test_at_full_rank_the_outputs_are_the_layers(layer: nn.Module, form: str, rank: Any, inputs: torch.Tensor) -> None:
    assert ranks(layer, form)[-1] == rank  # type: ignore[arg-type]
    torch.testing.assert_close(factorise(layer, form, rank)(inputs), layer(inputs), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("layer", "form", "rank", "inputs"), layers())
def test_empty_factors_have_the_shapes_of_full_ones(
    layer: nn.Module, form: str, rank: Any, inputs: torch.Tensor
) -> None:
    state = factorise(layer, form, rank).state_dict()
    empty = factors(layer, form, rank)
    empty.load_state_dict(state, strict=True)
    assert weights(layer, form, rank) == sum(v.numel() for n, v in state.items() if "weight" in n)  # type: ignore[arg-type]
    assert empty(inputs).shape == layer(inputs).shape


def test_the_error_of_a_truncation_is_what_the_singular_values_say() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(9, 7)
    found = factorise(layer, "svd", 3)
    error = (found[1].weight @ found[0].weight - layer.weight).double().pow(2).sum()
    torch.testing.assert_close(error, spectrum(layer, "svd")[3:].sum(), rtol=1e-5, atol=1e-8)


def test_whitened_factors_err_less_on_the_inputs_they_were_made_for() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 12, bias=False)
    inputs = torch.randn(512, 16) @ torch.diag(torch.logspace(0, -2, 16)) @ torch.randn(16, 16)
    root = torch.linalg.cholesky((inputs.T @ inputs).double() / len(inputs) + 1e-9 * torch.eye(16))
    plain, white = factorise(layer, "svd", 4), factorise(layer, "svd", 4, root)
    errors = [(net(inputs) - layer(inputs)).pow(2).sum() for net in (plain, white)]
    assert errors[1] < 0.7 * errors[0]
    best = spectrum(layer, "svd", root)[4:].sum() * len(inputs)  # no rank 4 does better
    torch.testing.assert_close(errors[1].double(), best, rtol=1e-3, atol=1e-6)


def test_tucker_errs_no_more_than_its_two_modes_together() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    core, outer, inner = tucker(weight, [4, 5])
    assert core.shape == (5, 4, 3, 3)
    error = (torch.einsum("bahw,ob,ia->oihw", core, outer, inner) - weight).pow(2).sum()
    cut = [torch.linalg.svdvals(m.flatten(1)).pow(2)[r:].sum() for m, r in ((weight, 5), (weight.transpose(0, 1), 4))]
    assert max(cut) <= error <= sum(cut)


@pytest.mark.parametrize(
    ("layer", "form", "rank", "said"),
    [
        (nn.Linear(4, 4), "svd", 0, "rank 0 is none"),
        (nn.Linear(4, 4), "svd", 5, "rank 5 is more than the 4"),
        (nn.Linear(4, 4), "tucker", [1, 1], "Linear has no low-rank form"),
        (nn.Conv2d(4, 4, 3), "tucker", 2, "two for tucker"),
        (nn.Conv2d(4, 4, 3, groups=2), "svd", 1, "Conv2d has no low-rank form"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "spatial", 1, "padded with 'circular'"),
    ],
)
def test_what_cannot_be_factorised_is_refused(layer: nn.Module, form: str, rank: Any, said: str) -> None:
    with pytest.raises(KDError, match=said):
        factors(layer, form, rank)


def test_ranks_by_energy() -> None:
    layer = nn.Linear(10, 10)
    nn.init.eye_(layer.weight)
    assert [rank_of_energy(layer, "svd", share) for share in (0.5, 0.51, 1.0)] == [5, 6, 10]
    assert rank_of_energy(layer, "svd", 0.5, torch.diag(torch.tensor([3.0] + [0.1] * 9))) == 1
    assert rank_of_energy(nn.Conv2d(4, 6, 3), "tucker", 1.0) == [4, 6]


def test_candidates_are_plain_layers_that_nobody_reads_past() -> None:
    class Odd(nn.Linear):
        pass

    shared = nn.Linear(16, 16)
    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(16, 16, 3),
            "point": nn.Conv2d(16, 16, 1),
            "depth": nn.Conv2d(16, 16, 3, groups=16),
            "thin": nn.Conv2d(4, 16, 3),
            "fc": nn.Linear(16, 16),
            "odd": Odd(16, 16),
            "one": shared,
            "two": shared,
            "encoder": nn.TransformerEncoderLayer(16, 2),
        }
    )
    assert {n: form for n, (_, form) in candidates(net, "tucker", 8).items()} == {
        "conv": "tucker",
        "point": "svd",
        "fc": "svd",
    }
    assert list(candidates(net, "svd", 8, keep=["fc", "conv"])) == ["point"]
