"""Values by rank: ties by class, signs, zeros, and the same from each way of sorting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor

from kd.losses.ranks import by_rank

SCORES = tensor([[0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 3.0, float("inf"), float("-inf"), -3.0]])
HIGHEST_FIRST = [7, 4, 6, 2, 0, 1, 3, 5, 9, 8]


def places(scores: Tensor) -> Tensor:
    return by_rank(scores, torch.arange(scores.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_scores_the_first_class_is_first_and_zero_has_no_sign(dtype: torch.dtype) -> None:
    found = places(SCORES.to(dtype))
    assert found[0, HIGHEST_FIRST].equal(torch.arange(10))


def test_both_ways_of_sorting_agree_on_many_ties() -> None:
    scores = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    scores[:, ::3] = scores[:, ::3].round()
    assert places(scores).equal(places(scores.double()))


def test_rows_that_lie_apart_in_memory_and_a_gradient_do_not_matter() -> None:
    scores = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    assert places(scores.T).equal(places(scores.T.contiguous()))
    assert not by_rank(scores.requires_grad_(), torch.ones(6)).requires_grad


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert places(SCORES.cuda()).cpu().equal(places(SCORES))
