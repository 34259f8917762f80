"""Losses through the teacher's classifier: the published code's arithmetic, what is lent, what is shipped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.reuse import SRRL, SimKD, read, srrl
from kd.models import Frozen
from tests.losses.waves import tensors, wave

VECTORS, FEATURES, LOGITS = wave(6, 3), wave(6, 5, phase=1.0), wave(6, 4, phase=2.0)
MAPS, THEIRS = wave(6, 3, 4, 4), wave(6, 5, 2, 2, phase=3.0)
S, T, Z, M, W = tensors(VECTORS, FEATURES, LOGITS, MAPS, THEIRS)


def classifier(convolution: bool = False) -> nn.Module:
    layer = nn.Conv2d(5, 4, 1) if convolution else nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight.copy_(tensors(wave(4, 5, phase=4.0, size=1.0))[0].view_as(layer.weight))
        assert layer.bias is not None
        layer.bias.copy_(tensor([0.5, -0.5, 1.0, 0.0]))
    return Frozen(layer, through=True)


def bound(student: Tensor = S, **lent: nn.Module) -> SRRL:
    torch.manual_seed(0)
    loss = SRRL()
    loss.lend(lent.get("part", classifier()))
    loss.bind(student.shape, [T.shape, Z.shape])
    return loss


def simkd(student: Tensor = M, teacher: Tensor = W, convolution: bool = False, factor: int = 2) -> SimKD:
    torch.manual_seed(0)
    loss = SimKD(factor)
    loss.lend(classifier(convolution))
    loss.bind(student.shape, teacher.shape)
    return loss


# SRRL.


def test_srrl_is_that_of_the_numpy_formula_and_pinned() -> None:
    """mean (f_s - f_t)² + mean (W f_s - z_t)², as DefangChen/SimKD's helper/loops.py adds two nn.MSELoss."""
    predicted, other = wave(6, 4, phase=5.0), wave(6, 5)
    expected = ((other - FEATURES) ** 2).mean() + ((predicted - LOGITS) ** 2).mean()
    found = srrl(*tensors(other, FEATURES, predicted, LOGITS)).item()
    assert found == pytest.approx(expected, rel=1e-5) and found == pytest.approx(39.332336, rel=1e-5)


def test_the_students_features_go_through_projection_and_the_teachers_classifier() -> None:
    loss = bound()
    assert isinstance(loss.projection, nn.Sequential)
    weight, norm = loss.projection[0].weight.detach()[:, :, 0, 0].double().numpy(), loss.projection[1]
    projected = VECTORS @ weight.T
    projected = (projected - projected.mean(0)) / np.sqrt(projected.var(0) + norm.eps)
    projected = np.maximum(projected, 0)
    layer = classifier().module
    assert isinstance(layer, nn.Linear)
    predicted = projected @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    expected = ((projected - FEATURES) ** 2).mean() + ((predicted - LOGITS) ** 2).mean()
    assert loss(student=S, teacher=[T, Z]).item() == pytest.approx(expected, rel=1e-5)


def test_of_maps_the_mean_over_positions_is_read_as_in_the_authors_own_code() -> None:
    """A classifier of the mean is the mean of it at each position; jingyang2017/KD_SRRL pools, then reads."""
    loss = bound(M).eval()
    assert isinstance(loss.projection, nn.Sequential)
    pooled = loss.projection(M).mean((2, 3))
    assert_close(loss(student=M, teacher=[T, Z]), srrl(pooled, T, classifier()(pooled), Z))


def test_a_classifier_that_is_a_convolution_reads_vectors_too() -> None:
    assert_close(read(classifier(convolution=True), T), read(classifier(), T))
    found = [bound(part=classifier(convolution))(student=S, teacher=[T, Z]) for convolution in (False, True)]
    assert_close(found[0], found[1])


def test_the_gradient_reaches_student_and_projection_through_a_classifier_that_stays() -> None:
    loss, part, student = SRRL(), classifier(), S.clone().requires_grad_()
    loss.lend(part)
    loss.bind(S.shape, [T.shape, Z.shape])
    loss(student=student, teacher=[T, Z]).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert all(p.grad is not None for p in loss.parameters()) and len(list(loss.parameters())) == 3
    assert all(p.grad is None and not p.requires_grad for p in part.module.parameters())  # type: ignore[union-attr]
    assert {name.partition(".")[0] for name in loss.state_dict()} == {"projection"}


# SimKD.


def test_simkd_is_the_mean_square_behind_the_published_bottleneck() -> None:
    """1x1, 3x3, 1x1, each with batch norm and ReLU, the student's larger maps averaged down first."""
    loss = simkd().eval()
    assert isinstance(loss.projector, nn.Sequential)
    kinds = [type(layer).__name__ for layer in loss.projector]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 3
    convolutions = [layer for layer in loss.projector if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.bias) for c in convolutions] == [
        (3, 2, 1, None), (2, 2, 3, None), (2, 5, 1, None)
    ]  # fmt: skip
    expected = (loss.projector(nn.functional.avg_pool2d(M, 2)) - W).square().mean()
    assert_close(loss(student=M, teacher=W), expected)


def test_the_projector_of_the_published_pair_has_its_parameters() -> None:
    """ResNet-32x4 to 8x4, 256 channels both, factor 2: 256·128 + 9·128² + 128·256, and two numbers a normed channel."""
    loss = SimKD(2)
    loss.lend(nn.Linear(256, 100))
    loss.bind((2, 256, 8, 8), (2, 256, 8, 8))
    assert sum(p.numel() for p in loss.parameters() if p.requires_grad) - (256 * 100 + 100) == (
        256 * 128 + 9 * 128**2 + 128 * 256 + 2 * (128 + 128 + 256)
    )


def test_simkd_of_equal_maps_is_pinned() -> None:
    """With the projector as it comes out of ReLU(0 · x + ½) everywhere: the mean of (½ - t)²."""
    loss = simkd().eval()
    assert isinstance(loss.projector, nn.Sequential)
    with torch.no_grad():
        loss.projector[-2].weight.zero_()
        loss.projector[-2].bias.fill_(0.5)
    expected = ((0.5 - THEIRS) ** 2).mean()
    assert loss(student=M, teacher=W).item() == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(8.2624326, rel=1e-6)


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize(("student", "teacher"), [(M, W), (W, W), (S, T), (M, T), (S, W)])
def test_what_is_shipped_makes_the_classifiers_logits_of_what_the_loss_compares(
    student: Tensor, teacher: Tensor, convolution: bool
) -> None:
    loss = simkd(student, teacher, convolution).eval()
    seen: list[Tensor] = []
    assert loss.projector is not None
    loss.projector.register_forward_hook(lambda module, args, output: seen.append(output))
    loss(student=student, teacher=teacher)
    assert_close(loss.graft()(student), read(classifier(convolution), seen[0].mean((2, 3))))


def test_what_is_shipped_learns_with_the_loss() -> None:
    loss = simkd()
    tail = loss.graft()
    before = tail.eval()(M)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.1)
    assert not tail(M).equal(before)


def test_the_answer_to_the_teachers_own_maps_is_its_logits_where_it_reads_their_mean() -> None:
    assert_close(simkd().answers(W), classifier()(W.mean((2, 3))))
    assert_close(simkd(S, T).answers(T), classifier()(T))


def test_binding_again_keeps_what_was_learnt() -> None:
    loss, other = simkd(), bound()
    kept = loss.projector, other.projection
    loss.bind(M.shape, W.shape)
    other.bind(S.shape, [T.shape, Z.shape])
    assert (loss.projector, other.projection) == kept


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: SRRL()(student=S, teacher=[T, Z]), "call lend"),
        (lambda: SRRL().bind(S.shape, [T.shape, Z.shape]), "set part=teacher.classifier"),
        (lambda: bound()(student=S, teacher=[T]), "given 1 views of the teacher"),
        (lambda: bound()(student=S[:, 1:], teacher=[T, Z]), "bound to width 3"),
        (lambda: bound().bind((6, 3, 4), [T.shape, Z.shape]), "choose vectors or maps"),
        (lambda: bound().bind(S.shape, [W.shape, Z.shape]), "choose vectors or maps"),
        (lambda: bound().bind(S.shape, [(6, 9), Z.shape]), "width 9 with the teacher's Linear, which takes 5"),
        (lambda: SimKD()(student=M, teacher=W), "call lend"),
        (lambda: SimKD().graft(), "was not lent"),
        (lambda: SimKD().answers(W), "is lent no classifier"),
        (lambda: simkd()(student=W, teacher=W), "have 5 channels; simkd was bound to 3"),
        (lambda: simkd().bind((6, 3, 4), W.shape), "give maps"),
        (lambda: simkd().bind(M.shape, (6, 9, 2, 2)), "width 9 with the teacher's Linear, which takes 5"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(use: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        use()
    assert "\n" not in str(caught.value)
