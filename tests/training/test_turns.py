"""Jobs that take turns: the least far goes on, batches are made once, one that ends leaves the others alone."""

from __future__ import annotations

import pytest
import torch

from kd.training.loaders import EpochLoader
from kd.training.turns import KEPT, Turns
from tests.training.tiny import fitted, split


class Counting(EpochLoader):
    """A loader that counts the batches it makes."""

    made = 0

    def batches(self, epoch, first=0):
        for batch in super().batches(epoch, first):
            type(self).made += 1
            yield batch


@pytest.fixture
def loader():
    Counting.made = 0
    return lambda: Counting(split(), 4, shuffle=True, seed=3, augment="shift")


def reading(turns, make, epochs, into, start=(0, 0), identity="same", fail=None):
    place = list(start)

    def job():
        shared = turns.shared(identity, make, lambda: tuple(place))
        while place[0] < epochs:
            for batch in shared:
                if tuple(place) == fail:
                    return "failed"
                into.append((tuple(place), batch["row"].tolist(), batch["image"]))
                place[1] += 1
            place[0], place[1] = place[0] + 1, 0
        return "done"

    return job


def test_jobs_that_see_the_same_batches_make_them_once(loader):
    turns, seen = Turns(), [[], [], []]
    ended = []
    found = turns.run([reading(turns, loader, 2, into) for into in seen], lambda n, v: ended.append(n))
    assert found == ["done"] * 3 and ended == [0, 1, 2]
    assert Counting.made == 2 * 6
    alone = [(batch["row"].tolist(), batch["image"]) for epoch in range(2) for batch in loader().batches(epoch)]
    for into in seen:
        assert [rows for _, rows, _ in into] == [rows for rows, _ in alone]
        assert all(image.equal(own) for (_, _, image), (_, own) in zip(into, alone, strict=True))


def test_a_job_that_starts_further_on_or_ends_early_changes_nothing_for_the_others(loader):
    turns, seen = Turns(), [[], [], []]
    jobs = [
        reading(turns, loader, 2, seen[0]),
        reading(turns, loader, 2, seen[1], start=(1, 2)),
        reading(turns, loader, 2, seen[2], fail=(0, 3)),
    ]
    assert turns.run(jobs, lambda n, v: None) == ["done", "done", "failed"]
    assert [place for place, _, _ in seen[0]] == [(e, i) for e in range(2) for i in range(6)]
    assert [place for place, _, _ in seen[1]] == [(1, i) for i in range(2, 6)]
    assert seen[1][0][1] == next(rows for place, rows, _ in seen[0] if place == (1, 2))
    assert len(seen[2]) == 3


def test_the_least_far_goes_on_so_that_few_batches_are_held():
    turns, order = Turns(), []

    def job(name, start):
        def run():
            for step in range(start, 4):
                turns.wait((0, step))
                order.append((name, step))

        return run

    turns.run([job("a", 2), job("b", 0)], lambda n, v: None)
    assert order == [("b", 0), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    assert KEPT >= 2


def test_outside_of_a_run_nobody_is_waited_for(loader):
    turns = Turns()
    turns.wait((0, 0))
    rows = [batch["row"].tolist() for batch in turns.shared("x", loader, lambda: (0, 0))]
    assert rows == [batch["row"].tolist() for batch in loader().batches(0)]


def test_trainings_that_take_turns_leave_the_bits_of_lone_ones(tmp_path):
    lone = [fitted(tmp_path / f"lone{i}", count=22)[0].student.state_dict() for i in range(2)]
    turns, found = Turns(), {}

    def job(number):
        def run():
            found[number] = fitted(tmp_path / f"turns{number}", turns=turns)[0].student.state_dict()

        return run

    turns.run([job(0), job(1)], lambda n, v: None)
    for number in range(2):
        assert all(found[number][name].equal(value) for name, value in lone[number].items())
    assert torch.is_grad_enabled()
