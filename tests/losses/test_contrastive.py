"""Contrastive losses: numpy formulas, and a memory that is checkpointed, resumed and drawn from without state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.checks import BadValue
from kd.losses.contrastive import CRD, InfoNCE, WCoRD, infonce, nce
from kd.losses.transport import transport
from tests.losses.waves import softmax, tensors, wave

STUDENT, TEACHER = wave(6, 5), wave(6, 5, phase=1.0)
S, T = tensors(STUDENT, TEACHER)
TARGET, ROW = tensor([0, 1, 2, 0, 1, 2]), tensor([3, 9, 4, 0, 7, 29])


@pytest.mark.parametrize("scale", [0.07, 1.0])
def test_infonce_is_that_of_the_numpy_formula(scale: float) -> None:
    ours, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (STUDENT, TEACHER))
    expected = -np.log(np.diag(softmax(ours @ theirs.T, scale))).mean()
    assert infonce(S, T, scale).item() == pytest.approx(expected, rel=1e-4)


def test_infonce_of_one_sample_is_nothing_and_of_unlike_widths_refused() -> None:
    assert infonce(S[:1], T[:1]).item() == 0
    with pytest.raises(InputError, match="Embedded"):
        infonce(S, T[:, 1:])
    with pytest.raises(BadValue, match="scale"):
        InfoNCE(scale=0)


def test_nce_matches_hand_computation() -> None:
    # K = 2 of M = 4: noise ½. Own 1.5: ln(1.5/2); others ½ and 1: ln(½/1) + ln(½/1.5).
    expected = -(math.log(0.75) + math.log(0.5) + math.log(1 / 3))
    assert nce(tensor([[1.5, 0.5, 1.0]]), samples=4).item() == pytest.approx(expected, rel=1e-5)
    assert nce(tensor([[1.5, 0.5, 1.0]] * 3), samples=4).item() == pytest.approx(expected, rel=1e-5)


def test_nce_without_a_negative_is_refused() -> None:
    with pytest.raises(InputError, match="no sample beside a negative"):
        nce(torch.ones(2, 1), samples=4)


def memory(negatives: int = 12, seed: int = 0) -> CRD:
    torch.manual_seed(seed)
    loss = CRD(width=4, negatives=negatives, scale=0.5)
    loss.bind((2, 5), (2, 5), (30,))
    return loss


def step(loss: CRD, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    found: Tensor = loss(student=S, teacher=T, target=TARGET, row=ROW)
    return found


def test_crd_is_that_of_the_numpy_formula() -> None:
    loss = memory()
    assert loss.student is not None and loss.teacher is not None
    before = [m.clone().double().numpy() for m in (loss.memory_student, loss.memory_teacher) if m is not None]
    torch.manual_seed(1)
    drawn = np.concatenate([ROW.numpy()[:, None], loss._drawn(TARGET).numpy()], axis=1)
    value = step(loss).item()
    expected = 0.0
    for layer, rows, bank in ((loss.student, S, before[1]), (loss.teacher, T, before[0])):
        seen = layer(rows).detach().double().numpy()
        seen /= np.linalg.norm(seen, axis=1, keepdims=True)
        scores = np.exp(np.einsum("nd,nkd->nk", seen, bank[drawn]) / 0.5)
        scores /= scores.mean() * 30
        noise = 12 / 30
        own = np.log(scores[:, 0] / (scores[:, 0] + noise + 1e-7)).sum()
        others = np.log(noise / (scores[:, 1:] + noise + 1e-7)).sum()
        expected -= (own + others) / 6
    assert value == pytest.approx(expected, rel=1e-5)


def test_the_memory_moves_for_the_samples_that_were_seen_and_for_no_other() -> None:
    loss = memory()
    assert loss.memory_student is not None and loss.student is not None and loss.classes is not None
    before = loss.memory_student.clone()
    step(loss)
    moved = (loss.memory_student != before).any(dim=1)
    assert set(moved.nonzero().flatten().tolist()) == set(ROW.tolist())
    seen = torch.nn.functional.normalize(loss.student(S), dim=1)
    assert_close(loss.memory_student[ROW], torch.nn.functional.normalize(before[ROW] + seen, dim=1))
    assert loss.classes[ROW].equal(TARGET) and int((loss.classes < 0).sum()) == 24


def test_the_constants_are_those_of_the_first_batch() -> None:
    loss = memory()
    assert loss.constants.tolist() == [-1, -1]
    step(loss)
    first = loss.constants.clone()
    step(loss, seed=2)
    assert (first > 0).all() and loss.constants.equal(first)


def test_memory_and_constants_are_in_the_state_so_a_resumed_run_goes_on_with_the_same() -> None:
    loss = memory()
    step(loss)
    names = {"memory_student", "memory_teacher", "classes", "constants"}
    assert names <= set(loss.state_dict())
    resumed = memory(seed=5)
    resumed.load_state_dict(loss.state_dict(), strict=True)
    for at in (2, 3):
        assert step(loss, at).equal(step(resumed, at))
    assert all(loss.state_dict()[name].equal(resumed.state_dict()[name]) for name in names)


def test_what_is_drawn_is_decided_by_the_generator_alone() -> None:
    first, again = memory(), memory()
    assert step(first).equal(step(again))
    assert not step(memory(), seed=2).equal(step(memory(), seed=1))


def test_in_evaluation_nothing_is_remembered() -> None:
    loss = memory().eval()
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    step(loss)
    assert all(value.equal(before[name]) for name, value in loss.state_dict().items())


def test_negatives_of_the_anchors_class_are_drawn_again() -> None:
    loss = memory(negatives=2000)
    assert loss.classes is not None
    loss.classes.copy_(torch.arange(30) % 3)
    drawn = loss._drawn(TARGET)
    alike = (loss.classes[drawn] == TARGET[:, None]).float().mean().item()
    assert alike < 0.01 and int(drawn.min()) == 0 and int(drawn.max()) == 29  # a third, were they kept


def test_a_row_that_is_none_or_other_features_are_refused() -> None:
    loss = memory()
    with pytest.raises(InputError, match="from 0 to 29"):
        loss(student=S, teacher=T, target=TARGET, row=ROW + 1)
    with pytest.raises(InputError, match="one of each a sample"):
        loss(student=S, teacher=T, target=TARGET, row=ROW[:5])
    with pytest.raises(InputError, match="crd was bound to 5"):
        loss(student=S[:, 1:], teacher=T, target=TARGET, row=ROW)
    with pytest.raises(InputError, match="call bind"):
        CRD()(student=S, teacher=T, target=TARGET, row=ROW)


def test_the_gradient_is_that_of_the_memory_before_the_batch_was_written_into_it() -> None:
    still, moving = memory().eval(), memory()
    for loss in (still, moving):
        step(loss).backward()
    for first, second in zip(still.parameters(), moving.parameters(), strict=True):
        assert first.grad is not None and second.grad is not None
        assert_close(first.grad, second.grad)


def test_several_devices_are_refused_for_each_would_remember_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.losses.contrastive._several", lambda: True)
    with pytest.raises(InputError, match=r"set run\.devices=1"):
        step(memory())


# WCoRD.


def wcord(local: float = 0.0, seed: int = 0) -> WCoRD:
    torch.manual_seed(seed)
    loss = WCoRD(width=4, negatives=12, scale=0.5, local=local)
    loss.bind((2, 5), (2, 5), (30,))
    return loss


def test_wcord_is_that_of_the_numpy_formula_and_pinned() -> None:
    """CRD's, of embeddings by W / σ(W), at most 1 long; a tenth of the features, so that some stay inside the ball."""
    loss = wcord().eval()
    assert loss.student is not None and loss.teacher is not None
    before = [m.clone().double().numpy() for m in (loss.memory_student, loss.memory_teacher) if m is not None]
    torch.manual_seed(1)
    drawn = np.concatenate([ROW.numpy()[:, None], loss._drawn(TARGET).numpy()], axis=1)
    torch.manual_seed(1)
    value = loss(student=S / 5, teacher=T / 5, target=TARGET, row=ROW).item()
    expected, lengths = 0.0, []
    for layer, rows, bank in ((loss.student, STUDENT, before[1]), (loss.teacher, TEACHER, before[0])):
        weight, bias = layer.parametrizations.weight.original, layer.bias  # type: ignore[union-attr]
        weight, bias = weight.detach().double().numpy(), bias.detach().double().numpy()  # type: ignore[union-attr,operator]
        seen = rows / 5 @ (weight / np.linalg.norm(weight, 2)).T + bias
        lengths += list(np.linalg.norm(seen, axis=1))
        seen /= np.maximum(1, np.linalg.norm(seen, axis=1, keepdims=True))
        scores = np.exp(np.einsum("nd,nkd->nk", seen, bank[drawn]) / 0.5)
        scores /= scores.mean() * 30
        noise = 12 / 30
        own = np.log(scores[:, 0] / (scores[:, 0] + noise + 1e-7)).sum()
        expected -= (own + np.log(noise / (scores[:, 1:] + noise + 1e-7)).sum()) / 6
    assert min(lengths) < 1 < max(lengths)
    assert value == pytest.approx(expected, rel=1e-5) and value == pytest.approx(7.5878739, rel=1e-5)


def test_the_local_part_is_the_transport_between_the_embeddings_times_its_weight() -> None:
    whole, part = wcord(local=0.3).eval(), wcord().eval()
    found = whole._embedded(S, T)
    assert_close(step(whole), step(part) + 0.3 * transport(*found))
    assert not transport(*found).equal(transport(S, T))


def test_wcords_critic_changes_no_faster_than_either_networks_features() -> None:
    """Trained a while, so that the turns of the spectral norm must keep up with the weights."""
    loss = wcord(local=1.0)
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.5)
    for at in range(40):
        optimiser.zero_grad()
        step(loss, at).backward()
        optimiser.step()
    loss.eval()
    gradients = []
    for scale in (0.05, 0.3, 1.0):
        ours, theirs = (scale * S).requires_grad_(), (scale * T).requires_grad_()
        critic = (loss._embedded(ours, theirs)[0] * loss._embedded(ours, theirs)[1]).sum()
        gradients += [g.norm(dim=1).max().item() for g in torch.autograd.grad(critic, (ours, theirs))]
    assert 0.2 < max(gradients) <= 1.01
    assert loss.student is not None
    free = loss.student.parametrizations.weight.original  # type: ignore[union-attr]
    assert torch.linalg.matrix_norm(free, 2).item() > 1.2  # type: ignore[arg-type]


def test_wcords_gradient_in_double_precision_is_that_of_its_value() -> None:
    loss = wcord()
    step(loss)
    loss.eval().double()

    def value(student: Tensor) -> Tensor:
        torch.manual_seed(1)
        found: Tensor = loss(student=student, teacher=T.double() / 5, target=TARGET, row=ROW)
        return found

    assert torch.autograd.gradcheck(value, [(S.double() / 5).requires_grad_()])


def test_wcords_memories_stay_in_the_ball_and_its_turning_vectors_are_resumed() -> None:
    loss = wcord(local=0.1)
    for at in range(3):
        step(loss, at)
    for memory in (loss.memory_student, loss.memory_teacher):
        assert memory is not None and memory[ROW].norm(dim=1).max() <= 1 + 1e-6
    resumed = wcord(local=0.1, seed=5)
    resumed.load_state_dict(loss.state_dict(), strict=True)
    for at in (3, 4):
        assert step(loss, at).equal(step(resumed, at))
    assert all(resumed.state_dict()[name].equal(value) for name, value in loss.state_dict().items())


def test_wcord_says_its_own_name() -> None:
    with pytest.raises(InputError, match="wcord was bound to 5"):
        wcord()(student=S[:, 1:], teacher=T, target=TARGET, row=ROW)
    with pytest.raises(InputError, match="wcord is used before"):
        WCoRD()(student=S, teacher=T, target=TARGET, row=ROW)
    with pytest.raises(BadValue, match="local"):
        WCoRD(local=-1)
