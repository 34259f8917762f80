"""Losses across layers: the hierarchical context loss, the fusions of ReviewKD, the attention of SemCKD."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.across import ReviewKD, SemCKD, hcl
from kd.losses.checks import BadValue
from tests.losses.waves import tensors, wave

STUDENT = [wave(4, 3, 8, 8), wave(4, 6, 4, 4, phase=1.0), wave(4, 7, phase=2.0)]
TEACHER = [wave(4, 5, 8, 8, phase=3.0), wave(4, 8, 4, 4, phase=4.0), wave(4, 9, phase=5.0)]
S, T = list(tensors(*STUDENT)), list(tensors(*TEACHER))


def test_hcl_is_the_weighed_mean_over_four_grids() -> None:
    student, teacher = (torch.from_numpy(wave(4, 3, 8, 8, phase=p)) for p in (0.0, 1.0))
    parts = [((student - teacher) ** 2).mean()]
    for grid in (4, 2, 1):
        small = [m.reshape(4, 3, grid, 8 // grid, grid, 8 // grid).mean(dim=(3, 5)) for m in (student, teacher)]
        parts.append(((small[0] - small[1]) ** 2).mean())
    expected = (parts[0] + parts[1] / 2 + parts[2] / 4 + parts[3] / 8) / 1.875
    assert_close(hcl(student, teacher), expected)


def test_hcl_leaves_out_grids_that_are_as_high_as_the_maps() -> None:
    # Maps of one position have no smaller grid: (3 - 1)².
    assert_close(hcl(torch.full((2, 1, 1, 1), 3.0), torch.ones(2, 1, 1, 1)), tensor(4.0))


def review(warmup: float = 0) -> ReviewKD:
    torch.manual_seed(0)
    loss = ReviewKD(warmup)
    loss.bind([m.shape for m in S], [m.shape for m in T])
    return loss


def test_reviewkd_fuses_from_the_deepest_layer_up() -> None:
    loss = review().eval()
    assert loss.fusions is not None
    student, teacher = [S[0], S[1], S[2][:, :, None, None]], [T[0], T[1], T[2][:, :, None, None]]
    deep, middle, shallow = (loss.fusions[i] for i in (2, 1, 0))
    carried = deep["squeeze"](student[2])
    fused = [deep["spread"](carried)]
    for parts, maps in ((middle, student[1]), (shallow, student[0])):
        own = parts["squeeze"](maps)
        above = carried.repeat_interleave(own.shape[2] // carried.shape[2], 2)
        above = above.repeat_interleave(own.shape[3] // carried.shape[3], 3)
        shares = parts["attend"](torch.cat([own, above], 1))
        carried = own * shares[:, 0:1] + above * shares[:, 1:2]
        fused.append(parts["spread"](carried))
    assert_close(loss(student=S, teacher=T), hcl(fused[::-1], teacher))


def test_the_deepest_layer_has_nothing_to_attend_to_and_all_parts_are_in_the_state() -> None:
    loss = review()
    assert loss.fusions is not None
    assert ["attend" in parts for parts in loss.fusions] == [True, True, False]
    assert all(parts["squeeze"][0].out_channels == 7 for parts in loss.fusions)  # the deepest of the student's
    fresh = review()
    fresh.load_state_dict(loss.state_dict(), strict=True)


def test_reviewkd_grows_over_its_first_epochs() -> None:
    loss = review(warmup=20)
    found = []
    for epoch in (0.0, 9.5, 19.0, 50.0):
        loss.at(epoch, 240)
        found.append(loss.factor)
    assert found == [0.05, 0.5, 1.0, 1.0]
    whole = loss(student=S, teacher=T)
    loss.at(0, 240)
    assert_close(loss(student=S, teacher=T), whole / 20)


def test_reviewkd_refuses_what_it_was_not_bound_to() -> None:
    with pytest.raises(InputError, match="call bind"):
        ReviewKD()(student=S, teacher=T)
    with pytest.raises(InputError, match="cannot lead from"):
        ReviewKD().bind((4, 3, 5), (4, 3, 5))
    with pytest.raises(InputError, match="was bound to others"):
        review()(student=[S[0], S[1], torch.zeros(4, 8)], teacher=T)
    with pytest.raises(BadValue, match="width is 0"):
        ReviewKD(width=0)


def semantic(batch: int = 4, student: list[Tensor] | None = None) -> SemCKD:
    torch.manual_seed(0)
    loss = SemCKD(batch)
    loss.bind([m.shape for m in (student or S)[:2]], [m.shape for m in T[:2]])
    return loss


def test_semckd_is_the_attention_weighed_sum_over_all_pairs() -> None:
    loss = semantic().eval()
    assert loss.queries is not None and loss.keys is not None and loss.regressors is not None

    def embedded(parts: nn.ModuleList, maps: list[Tensor]) -> Tensor:
        rows = [part(m.flatten(1) @ m.flatten(1).T) for part, m in zip(parts, maps, strict=True)]
        return torch.stack([row / row.norm(dim=1, keepdim=True) for row in rows], 1)

    attention = (embedded(loss.queries, S[:2]) @ embedded(loss.keys, T[:2]).mT).softmax(2)
    expected = torch.zeros(())
    for i, s in enumerate(S[:2]):
        for j, t in enumerate(T[:2]):
            size = min(s.shape[2], t.shape[2])
            ours, theirs = (F.adaptive_avg_pool2d(m, (size, size)) for m in (s, t))
            gap = (loss.regressors[i][j](ours) - theirs).square().flatten(1).mean(1)
            expected = expected + (attention[:, i, j] * gap).sum() / (4 * 2)
    assert_close(loss(student=S[:2], teacher=T[:2]), expected)


def test_semckd_takes_a_smaller_last_batch_and_refuses_a_larger_one() -> None:
    loss = semantic(batch=6)
    assert loss(student=S[:2], teacher=T[:2]).isfinite()
    with pytest.raises(InputError, match="made for batches of 3 and is given 4 samples"):
        semantic(batch=3)(student=S[:2], teacher=T[:2])


def test_semckd_refuses_what_it_was_not_bound_to() -> None:
    with pytest.raises(InputError, match="call bind"):
        SemCKD(4)(student=S[:2], teacher=T[:2])
    with pytest.raises(InputError, match=r"features of shape \(4, 3\)"):
        SemCKD(4).bind((4, 3), (4, 3, 4, 4))
    with pytest.raises(InputError, match="bound to 2 and 2 layers and is given 1 and 2"):
        semantic()(student=S[:1], teacher=T[:2])
    with pytest.raises(InputError, match="of other widths"):
        semantic()(student=S[:2][::-1], teacher=T[:2])
    with pytest.raises(BadValue, match="batch is 0"):
        SemCKD(0)
