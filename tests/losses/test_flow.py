"""Losses on the flow between layers: numpy formulas, signs and gradients of singular vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.flow import FSP, KDSVD, fsp, kdsvd
from tests.losses.waves import svd_flow, tensors, wave

STUDENT = [wave(3, 4, 4, 4), wave(3, 5, 2, 2, phase=1.0), wave(3, 6, 2, 2, phase=2.0)]
TEACHER = [wave(3, 4, 4, 4, phase=3.0), wave(3, 5, 2, 2, phase=4.0), wave(3, 6, 2, 2, phase=5.0)]
S, T = list(tensors(*STUDENT)), list(tensors(*TEACHER))


def positive(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(4, 5, 4, 4, generator=generator) for _ in range(3)]


def test_fsp_is_that_of_the_numpy_formula() -> None:
    small = [m.reshape(3, m.shape[1], 2, -1, 2, m.shape[3] // 2).mean(axis=(3, 5)) for m in STUDENT + TEACHER]
    expected = 0.0
    for i in (0, 1):
        ours, theirs = (np.einsum("nchw,ndhw->ncd", small[k], small[k + 1]) / 4 for k in (i, i + 3))
        expected += ((ours - theirs) ** 2).mean()
    assert fsp(S, T).item() == pytest.approx(expected, rel=1e-5)


def test_layers_are_taken_by_neighbours_and_added_up() -> None:
    for loss in (fsp, kdsvd):
        assert_close(loss(S, T), loss(S[:2], T[:2]) + loss(S[1:], T[1:]))


def test_kdsvd_is_that_of_the_formula_sample_by_sample() -> None:
    student, teacher = positive(0), positive(1)
    assert kdsvd(student, teacher).item() == pytest.approx(svd_flow(student, teacher).sum(), rel=1e-4)


def test_the_sign_that_a_library_gives_a_singular_vector_does_not_matter() -> None:
    # Maps of the other sign have the same singular vectors, and a library is free to give either.
    student, teacher = positive(0), positive(1)
    turned = [teacher[0], -teacher[1], teacher[2]]
    assert_close(kdsvd(student, turned), kdsvd(student, teacher))
    assert svd_flow(student, teacher, frozenset({(1, 0)})).sum() != pytest.approx(svd_flow(student, teacher).sum())


def test_dead_channels_and_equal_singular_values_leave_the_gradient_finite() -> None:
    student = [torch.zeros(2, 6, 3, 3), torch.zeros(2, 6, 3, 3)]
    for maps in student:
        maps[:, 0, 0, 0] = maps[:, 1, 1, 1] = 1.0  # two equal values, four zeros
        maps.requires_grad_()
    teacher = [torch.rand(2, 6, 3, 3), torch.rand(2, 6, 3, 3)]
    value = kdsvd(student, teacher)
    value.backward()
    assert value.isfinite() and all(maps.grad is not None and maps.grad.isfinite().all() for maps in student)


@pytest.mark.parametrize("make", [FSP, KDSVD])
def test_one_layer_has_no_flow(make: type[FSP]) -> None:
    with pytest.raises(InputError, match="name two or more of each"):
        make().bind((3, 4, 4, 4), (3, 4, 4, 4))
    with pytest.raises(InputError, match="name two or more of each"):
        fsp(S[:1], T[:1])


def test_two_widths_are_refused_by_the_function_and_bridged_by_the_module() -> None:
    teacher = [torch.rand(3, 7, 4, 4), T[1]]
    with pytest.raises(InputError, match="4 channels and the teacher's 7"):
        fsp(S[:2], teacher)
    loss = FSP()
    loss.bind([m.shape for m in S[:2]], [m.shape for m in teacher])
    assert set(loss.state_dict()) == {"connectors.0.0.weight"}
    assert loss(student=S[:2], teacher=teacher).isfinite()


def test_a_rank_that_is_none_is_refused() -> None:
    with pytest.raises(BadValue, match="rank is 0"):
        KDSVD(rank=0)
    with pytest.raises(BadValue, match="rank is 0"):
        kdsvd(S, T, rank=0)


def test_signs_of_the_library_are_those_of_its_own_decomposition() -> None:
    first = [torch.linalg.svd(maps.flatten(2).mT, full_matrices=False).Vh[:, 0].sum(1) for maps in T[:2]]
    turned = frozenset((layer, i) for layer, sums in enumerate(first) for i, total in enumerate(sums) if total < 0)
    assert turned  # or both kinds are one
    assert kdsvd(S[:2], T[:2], signs="library").item() == pytest.approx(svd_flow(S[:2], T[:2], turned).sum(), rel=1e-4)
    with pytest.raises(BadValue, match="signs is 'any'; fixed or library was meant"):
        KDSVD(signs="any")
