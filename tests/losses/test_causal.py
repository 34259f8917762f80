"""What is compared under an interchange: logits, hidden states, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from kd.errors import InputError
from kd.losses.causal import DIITO, hidden_cosine
from kd.losses.logits import soft_target_kl


def test_the_hidden_part_is_added_by_its_weight() -> None:
    logits, other = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    hidden, theirs = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [4.0, 3.0]])
    cosines = (1 - math.sqrt(0.5) + 1 - 24 / 25) / 2
    assert hidden_cosine(hidden, theirs).item() == pytest.approx(cosines)
    found = DIITO(3.0, cosine=0.5)([logits, hidden], [other, theirs])
    assert found.item() == pytest.approx(soft_target_kl(logits, other, 3.0).item() + 0.5 * cosines)


def test_tokens_have_a_cosine_each() -> None:
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert hidden_cosine(hidden, -hidden).item() == pytest.approx(2)
    assert hidden_cosine(hidden, hidden).item() == pytest.approx(0, abs=1e-6)


def test_two_widths_get_a_layer_that_is_trained() -> None:
    loss = DIITO(cosine=1.0)
    loss.bind([(2, 3), (2, 4)], [(2, 3), (2, 6)])
    assert {p.shape for p in loss.parameters()} == {(6, 4), (6,)}
    same = DIITO(cosine=1.0)
    same.bind([(2, 3), (2, 4)], [(2, 3), (2, 4)])
    assert not list(same.parameters())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: DIITO(temperature=0), "temperature is 0"),
        (lambda: DIITO(cosine=-1), "cosine is -1"),
        (lambda: DIITO(cosine=1.0).bind((2, 3), (2, 3)), "compares 2 views of each network, and is given 1 and 1"),
        (lambda: DIITO()([torch.zeros(1, 2)] * 2, [torch.zeros(1, 2)] * 2), "compares 1 view of each network"),
        (lambda: hidden_cosine(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)), ":pooled makes a vector of maps"),
        (lambda: hidden_cosine(torch.zeros(1, 2), torch.zeros(1, 3)), "have no cosine"),
    ],
)
def test_what_cannot_be_is_refused(call: object, said: str) -> None:
    assert callable(call)
    with pytest.raises(InputError) as refused:
        call()
    assert said in str(refused.value) and "\n" not in str(refused.value)
