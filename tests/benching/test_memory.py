"""The most that is held at a time: made and not given, freed when nothing refers to it, backward included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kd.benching.memory import peak_bytes

SIZE = 4 * 1000


@pytest.fixture
def given() -> Tensor:
    return torch.ones(1000)


def test_what_is_given_and_views_of_it_do_not_count(given: Tensor) -> None:
    assert peak_bytes(lambda: given[10:].view(-1, 10).t().mul_(2)) == 0


def test_what_was_freed_makes_room(given: Tensor) -> None:
    def one_after_another() -> None:
        for _ in range(5):
            given + 1

    def all_at_once() -> None:
        held = [given + 1 for _ in range(5)]
        assert held

    assert peak_bytes(one_after_another) == SIZE
    assert peak_bytes(all_at_once) == 5 * SIZE


def test_what_is_kept_for_the_backward_pass_counts_and_so_does_the_gradient(given: Tensor) -> None:
    def step() -> None:
        leaf = given.detach().requires_grad_()
        leaf.exp().sum().backward()

    # The exponential is kept; the ones for its gradient are a view of one number, and the product is the gradient.
    assert 2 * SIZE <= peak_bytes(step) <= 2 * SIZE + 16


def test_it_is_what_the_allocator_says() -> None:
    from torch.profiler import ProfilerActivity, profile

    student, teacher = torch.randn(64, 100), torch.randn(64, 100)

    def step() -> None:
        leaf = student.detach().requires_grad_()
        torch.nn.functional.kl_div(leaf.log_softmax(1), teacher.softmax(1), reduction="batchmean").backward()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = peak = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak_bytes(step) == pytest.approx(peak, rel=0.01)


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_is_asked() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    given = torch.ones(2**20, device="cuda")
    assert 2 * 2**22 <= peak_bytes(lambda: (given + 1) * 2, "cuda") < 3 * 2**22
