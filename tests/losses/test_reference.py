"""The values that the methods' own published code gives for stored inputs, where that folder of numbers is at hand.

Each method is pinned in its own test file as well; this one says whether the same formula was meant.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.losses.across import hcl
from kd.losses.boundary import ab
from kd.losses.feature import hint
from kd.losses.flow import fsp, kdsvd
from kd.losses.logits import SoftTargetKL, Standardised, soft_target_kl
from kd.losses.maps import at, ft, nst
from kd.losses.relation import cc, pkt, rkd, sp
from kd.losses.response import dist, dkd, nkd
from kd.losses.sequence import forward_kl, generalised_jsd, reverse_kl, skew_forward_kl, skew_reverse_kl
from kd.losses.softened import ttm, wttm
from tests.losses.waves import svd_flow

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("KD_REFERENCE", ROOT.parent / "shared" / "reference"))
CASES = ("a", "b")
HAS = (FOLDER / "losses.json").is_file() and (FOLDER / "losses.npz").is_file()


class Inputs:
    """One case's tensors by name, and lists of them by the name before the slash."""

    def __init__(self, case: str) -> None:
        self.turned = TURNED[case]
        with np.load(FOLDER / "losses.npz") as stored:
            self.tensors = {
                name.partition("/")[2]: torch.from_numpy(stored[name])
                for name in stored.files
                if name.startswith(f"{case}/")
            }

    def __getattr__(self, name: str) -> Any:
        """A tensor, or the list of those that are numbered under this name."""
        if name in self.tensors:
            return self.tensors[name]
        numbered = sorted(full for full in self.tensors if full.startswith(f"{name}/"))
        return [self.tensors[full] for full in numbered]

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        return self.logits_s, self.logits_t

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows as tokens, of which every fourth is left out."""
        count = len(self.target)
        return self.logits_s, self.logits_t, torch.where(torch.arange(count) % 4 == 3, -100, self.target)

    @property
    def entropy(self) -> Tensor:
        """Of the teacher, over the tokens that count: the published forward divergences are cross-entropies."""
        _, teacher, target = self.tokens
        log_p = teacher.double().log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1)[target != -100].mean()

    def layers(self, loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        return [loss(s, t) for s, t in zip(self.feat_s, self.feat_t, strict=True)]


Found = Tensor | list[Tensor]

# Of KD-SVD the published code leaves a singular vector's sign to the library, and for two samples of case b it came
# out the other way; ours is fixed.
TURNED = {"a": frozenset(), "b": frozenset({(1, 6), (2, 18)})}

CHECKED: dict[str, Callable[[Inputs], Found]] = {
    "kd@T=1.0": lambda x: soft_target_kl(*x.logits, 1.0),
    "kd@T=4.0": lambda x: soft_target_kl(*x.logits, 4.0),
    "kd@T=20.0": lambda x: soft_target_kl(*x.logits, 20.0),
    "dkd@alpha=1.0,beta=8.0,T=4.0": lambda x: dkd(*x.logits, x.target),
    "dkd@alpha=1.0,beta=2.0,T=1.0": lambda x: dkd(*x.logits, x.target, beta=2.0, temperature=1.0),
    "nkd@T=1,gamma=1.5": lambda x: nkd(*x.logits, x.target),
    "dist@beta=1,gamma=1,T=1": lambda x: dist(*x.logits),
    "dist@beta=2,gamma=2,T=1": lambda x: dist(*x.logits, beta=2.0, gamma=2.0),
    "lskd@T=2": lambda x: Standardised(SoftTargetKL(2.0))(student=x.logits_s, teacher=x.logits_t),
    "ttm@gamma=0.1": lambda x: ttm(*x.logits, gamma=0.1),
    "wttm@gamma=0.1": lambda x: wttm(*x.logits, gamma=0.1),
    "fkl_masked(last of every 4 masked)": lambda x: forward_kl(*x.tokens) + x.entropy,
    "rkl_masked": lambda x: reverse_kl(*x.tokens),
    "sfkl@lam=0.1": lambda x: skew_forward_kl(*x.tokens, skew=0.1) + x.entropy,
    "srkl@lam=0.1": lambda x: skew_reverse_kl(*x.tokens, skew=0.1),
    "jsd@lam=0.9": lambda x: generalised_jsd(*x.tokens, beta=0.1),  # their lam is the student's share
    "sp": lambda x: x.layers(sp),
    "cc": lambda x: cc(x.emb_s, x.emb_t),
    "rkd@wd=25,wa=50": lambda x: rkd(x.emb_s, x.emb_t),
    "rkd@wd=1,wa=0": lambda x: rkd(x.emb_s, x.emb_t, 1.0, 0.0),
    "rkd@wd=0,wa=1": lambda x: rkd(x.emb_s, x.emb_t, 0.0, 1.0),
    "pkt": lambda x: pkt(x.emb_s, x.emb_t),
    "fitnet_mse": lambda x: x.layers(hint),
    "at@p=2": lambda x: x.layers(at),
    "nst": lambda x: x.layers(nst),
    "ft@p1=2,p2=1": lambda x: x.layers(ft),
    "fsp": lambda x: [fsp(x.feat_s[i : i + 2], x.feat_t[i : i + 2]) for i in (0, 1)],
    "kdsvd@k=1": lambda x: [kdsvd(x.feat_s[i : i + 2], x.feat_t[i : i + 2], signs="library") for i in (0, 1)],
    "ab@margin=1": lambda x: [ab(x.raw_s[i], x.raw_t[i]) / 2 ** (2 - i) for i in range(3)],
    "hcl": lambda x: hcl(x.feat_s, x.feat_t),
}
# Methods that have no loss here yet; the list may only shrink.
MISSING: frozenset[str] = frozenset()

pytestmark = pytest.mark.skipif(not HAS, reason=f"no losses.json and losses.npz in {FOLDER}; name it in KD_REFERENCE")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CHECKED)
def test_it_is_the_value_of_the_published_code(name: str, case: str) -> None:
    expected = json.loads((FOLDER / "losses.json").read_text())[case][name]
    found = CHECKED[name](Inputs(case))
    numbers = [value.item() for value in found] if isinstance(found, list) else found.item()
    assert numbers == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_kdsvd_is_the_published_one_but_for_the_signs_it_leaves_open(case: str) -> None:
    inputs = Inputs(case)
    expected = svd_flow(inputs.feat_s, inputs.feat_t)
    ours = [kdsvd(inputs.feat_s[i : i + 2], inputs.feat_t[i : i + 2]).item() for i in (0, 1)]
    assert ours == pytest.approx(expected.tolist(), rel=1e-5)
    if inputs.turned:  # the signs that the library left when the values were taken
        published = svd_flow(inputs.feat_s, inputs.feat_t, inputs.turned).tolist()
        assert published == pytest.approx(json.loads((FOLDER / "losses.json").read_text())[case]["kdsvd@k=1"], rel=1e-5)
    else:
        assert ours == pytest.approx(json.loads((FOLDER / "losses.json").read_text())[case]["kdsvd@k=1"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_stored_value_is_checked_or_has_no_loss_yet(case: str) -> None:
    stored = json.loads((FOLDER / "losses.json").read_text())
    assert set(stored) == set(CASES)
    assert set(stored[case]) == set(CHECKED) | MISSING and not set(CHECKED) & MISSING
