"""The mean over tokens: one number and gradient whatever the pieces, masks that hold, no more memory than said."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kd.errors import InputError
from kd.losses import tokens
from kd.losses.tokens import pieces, token_mean
from tests.losses.waves import wave

CLASSES = 7


def each(s: Tensor, t: Tensor) -> Tensor:
    """KL of logits, token by token."""
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1)


def logits(*leading: int, phase: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(wave(*leading, CLASSES, phase=phase)).to(dtype)


def some(*leading: int) -> Tensor:
    """Labels, of which two in five do not count, unevenly."""
    found = torch.arange(int(torch.tensor(leading).prod())).reshape(leading)
    return torch.where((found % 5 < 2) | (found < 9), tokens.IGNORED, found % CLASSES)


def plain(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return each(student, teacher)[target != tokens.IGNORED].mean()


@pytest.mark.parametrize("size", [1, 7, 8, 50, 1000])
@pytest.mark.parametrize("leading", [(50,), (5, 10), (10, 5), (1, 50), (50, 1)])
def test_the_pieces_hold_each_token_once_and_none_is_too_large(
    leading: tuple[int, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PIECE", size * CLASSES)
    seen = torch.zeros(leading, dtype=torch.long)
    for at in pieces((*leading, CLASSES)):
        seen[at] += 1
        assert 1 <= seen[at].numel() <= size
    assert seen.eq(1).all()


def test_fifty_tokens_go_into_eight_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven a piece, and one left: published losses split labels and logits in two ways and stop here."""
    monkeypatch.setattr(tokens, "PIECE", 7 * CLASSES)
    assert len(list(pieces((50, CLASSES)))) == 8
    student, teacher, target = logits(50), logits(50, phase=1.0), some(50)
    assert_close(token_mean(each, student, (teacher,), target), plain(student, teacher, target))


@pytest.mark.parametrize("size", [1, 3, 8, 50, 1000])
@pytest.mark.parametrize("leading", [(50,), (5, 10), (10, 5)])
def test_value_and_gradient_do_not_depend_on_the_pieces(
    leading: tuple[int, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, target = logits(*leading, phase=1.0), some(*leading)
    straight = logits(*leading).requires_grad_()
    expected = 3 * plain(straight, teacher, target)
    expected.backward()
    monkeypatch.setattr(tokens, "PIECE", size * CLASSES)
    student = logits(*leading).requires_grad_()
    value = 3 * token_mean(each, student, (teacher,), target)
    value.backward()
    assert_close(value, expected)
    assert_close(student.grad, straight.grad)


def test_the_mean_is_over_tokens_and_not_over_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    # A piece of three that count and one of a single: a mean of means would be (2 + 8) / 2.
    monkeypatch.setattr(tokens, "PIECE", 3)
    values, mask = tensor([[1.0], [2.0], [3.0], [8.0], [99.0], [99.0]]), tensor([True] * 4 + [False] * 2)
    assert token_mean(lambda z: z[..., 0], values, (), mask).item() == 3.5


def test_a_mask_and_labels_say_the_same_and_longer_padding_nothing() -> None:
    student, teacher, target = logits(5, 10), logits(5, 10, phase=1.0), some(5, 10)
    value = token_mean(each, student, (teacher,), target)
    assert token_mean(each, student, (teacher,), target != tokens.IGNORED).equal(value)
    padded = [torch.cat([x, 9 * torch.ones_like(x)], dim=1) for x in (student, teacher)]
    longer = torch.cat([target, torch.full_like(target, tokens.IGNORED)], dim=1)
    assert_close(token_mean(each, padded[0], (padded[1],), longer), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_no_token_counts_the_loss_is_zero_and_so_is_the_gradient_even_of_nan(dtype: torch.dtype) -> None:
    student = torch.full((2, 3, CLASSES), torch.nan, dtype=dtype, requires_grad=True)
    value = token_mean(each, student, (student.detach(),), torch.full((2, 3), tokens.IGNORED))
    value.backward()
    assert value.item() == 0 and student.grad is not None and student.grad.eq(0).all()


def test_a_token_that_does_not_count_spoils_no_other_by_its_nan() -> None:
    student, teacher = logits(4), logits(4, phase=1.0)
    mask = tensor([True, False, True, True])
    expected = token_mean(each, student[mask], (teacher[mask],))
    spoilt = torch.where(mask[:, None], student, torch.nan).requires_grad_()
    value = token_mean(each, spoilt, (teacher,), mask)
    value.backward()
    assert_close(value, expected)
    assert spoilt.grad is not None and spoilt.grad.isfinite().all() and spoilt.grad[1].eq(0).all()


def test_logits_that_lie_apart_in_memory_are_read_where_they_are() -> None:
    whole = logits(5, 11).requires_grad_()
    teacher, target = logits(5, 10, phase=1.0), some(5, 10)
    value = token_mean(each, whole[:, :-1], (teacher,), target)
    value.backward()
    assert_close(value, plain(whole[:, :-1], teacher, target))
    assert whole.grad is not None and whole.grad[:, -1].eq(0).all() and whole.grad[:, :-1].abs().sum() > 0


def test_the_gradient_has_the_students_precision_and_is_computed_in_more() -> None:
    student = logits(50, dtype=torch.bfloat16).requires_grad_()
    exact = student.detach().float().requires_grad_()
    teacher = logits(50, phase=1.0, dtype=torch.bfloat16)
    seen = set()

    def noting(s: Tensor, t: Tensor) -> Tensor:
        seen.update((s.dtype, t.dtype))
        return each(s, t)

    token_mean(noting, student, (teacher,)).backward()
    token_mean(each, exact, (teacher,)).backward()
    assert seen == {torch.float32} and student.grad is not None and exact.grad is not None
    assert student.grad.dtype is torch.bfloat16 and student.grad.equal(exact.grad.bfloat16())


def test_only_the_student_is_pulled_and_as_often_as_asked() -> None:
    student, teacher = logits(4).requires_grad_(), logits(4, phase=1.0).requires_grad_()
    value = token_mean(each, student, (teacher,))
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)
    value.backward()
    assert teacher.grad is None
    weight = tensor(2.0, dtype=torch.float64, requires_grad=True)
    (again,) = torch.autograd.grad(weight * token_mean(each, student, (teacher,)), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


class Sizes(TorchDispatchMode):
    """The number of elements of each tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() > 0:
                self.found.append(value.untyped_storage().nbytes() // value.element_size())
        return result


def test_nothing_larger_than_a_piece_is_made_but_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 5 * CLASSES)
    student, teacher, target = logits(10, 20).requires_grad_(), logits(10, 20, phase=1.0), some(10, 20)
    whole = student.numel()
    with Sizes() as sizes:
        value = token_mean(each, student, (teacher,), target)
    # Slices of the inputs share their storage: those are views, not copies.
    assert {size for size in sizes.found if size > 5 * CLASSES} <= {whole, target.numel()}
    with Sizes() as sizes:
        value.backward()
    made = [size for size in sizes.found if size > 5 * CLASSES and size != target.numel()]
    assert set(made) == {whole}


@pytest.mark.slow
def test_half_precision_logits_of_gpt2_fit_into_four_gigabytes() -> None:
    """(8, 1024, 50257) in bfloat16, forward and backward, by the most that the process ever held."""
    words = """
import resource, torch
from kd.losses.sequence import generalised_jsd
row = torch.randn(8192 + 50257).bfloat16()
def logits(shift):  # row by row: a draw of the whole would be made in single precision
    made = torch.empty(8, 1024, 50257, dtype=torch.bfloat16)
    for i in range(8192):
        made[i // 1024, i % 1024] = row[(start := (i + shift) % 8192) : start + 50257]
    return made
student = logits(0).requires_grad_()
value = generalised_jsd(student, logits(77), torch.zeros(8, 1024, dtype=torch.long))
value.backward()
assert 0.1 < value < 0.7 and student.grad[-1, -1].abs().sum() > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 4 * 2**30


@pytest.mark.parametrize(
    "target", [torch.zeros(4), torch.zeros(5, dtype=torch.long), torch.zeros(4, 1, dtype=torch.long)]
)
def test_a_target_that_is_no_label_a_token_is_refused_in_one_line(target: Tensor) -> None:
    with pytest.raises(InputError, match=r"need a label or a mask a token, \(4,\)") as caught:
        token_mean(each, logits(4), (logits(4),), target)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (torch.zeros(4), torch.zeros(4), r"student's logits are float32 of shape \(4,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long), "teacher's logits are int64"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5), r"floats of shape \(N, C\) or \(B, L, C\)"),
        (torch.zeros(4, 50257), torch.zeros(4, 50304), r"\(4, 50257\) and the teacher's of \(4, 50304\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "not empty"),
    ],
)
def test_logits_that_are_not_of_the_same_tokens_are_refused_in_one_line(
    student: Tensor, teacher: Tensor, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        tokens.check_pair(student, teacher)
    assert "\n" not in str(caught.value)
