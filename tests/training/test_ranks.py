"""One training over several processes: each has its part of every batch, and together they are one training."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from kd.errors import InputError
from kd.losses.response import DIST
from kd.objective import Objective, Term
from kd.pipeline.jobs import call
from kd.store import Store
from kd.training.loaders import EpochLoader
from kd.training.ranks import alone, averaged, check, spread
from kd.training.settings import Fit
from tests.pipeline.small import made, planned
from tests.training.tiny import label_term, split


def test_the_ranks_share_every_batch_and_no_sample_is_seen_twice():
    whole = EpochLoader(split(), 4, seed=1, shuffle=True, drop_last=True, augment="shift")
    parts = [
        list(EpochLoader(split(), 4, seed=1, shuffle=True, drop_last=True, augment="shift", part=(rank, 2)))
        for rank in range(2)
    ]
    for batch, first, second in zip(whole, *parts, strict=True):
        for name in ("id", "row", "target", "image"):
            assert torch.cat((first[name], second[name])).equal(batch[name])
        assert len(first["id"]) == 2


def run_both(store, words, tell):
    """A job of one process and the same of two, in a child of its own; their cards."""
    one = made(store / "one", *words)[1]
    two = made(store / "two", *words, "run.devices=2")[1]
    return one, two


def test_two_processes_train_what_one_trains(tmp_path):
    words = ("data.augment=shift", "labels.views=2", "fit.lr=0.01")
    outcome = call(run_both, tmp_path, words)
    assert outcome["status"] == "done", outcome
    one, two = outcome["value"]
    assert one["key"] == two["key"]
    for name in ("losses",):
        pairs = zip(one["trace"][name], two["trace"][name], strict=True)
        assert all(a == pytest.approx(b, rel=1e-3) for a, b in pairs)
    ends = [card["trace"]["epochs"][-1]["train/loss"] for card in (one, two)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)
    history = Store(tmp_path / "two").find(two["key"][:16]).path / "history.jsonl"
    assert len(history.read_text().splitlines()) == len(
        (Store(tmp_path / "one").find(one["key"][:16]).path / "history.jsonl").read_text().splitlines()
    )


def fails_in_rank_one(one, run, tell):
    """A training whose second rank raises."""
    from kd.pipeline.execute import execute
    from kd.training.module import Distiller

    inner = Distiller.training_step

    def step(self, batch, index):
        if os.environ.get("RANK") == "1":
            raise RuntimeError("rank 1")
        return inner(self, batch, index)

    Distiller.training_step = step
    execute(one, Store(run.store), run, tell)


def test_a_rank_that_fails_ends_the_training_and_stores_nothing(tmp_path):
    one, run = planned(tmp_path, "pipeline=baseline", "run.devices=2")
    told = []
    outcome = call(fails_in_rank_one, one, run, tell=told.append)
    assert outcome["status"] == "failed"
    assert any("rank 1 failed" in event.get("line", "") for event in told)
    assert Store(tmp_path).get(one.key) is None


@pytest.mark.parametrize(
    ("fit", "devices", "gpu", "terms", "said"),
    [
        (Fit(batch_size=64), 3, False, {}, "run.devices=3 cannot share fit.batch_size=64"),
        (Fit(batch_size=64, drop_last=False), 2, False, {}, r"needs fit.drop_last=true"),
        (Fit(batch_size=99), 99, True, {}, "run.devices=99, but torch sees"),
        (Fit(batch_size=64), 2, True, {"dist": Term(DIST(), 1, "student.logits", "teacher.logits")}, "the term dist"),
        (Fit(batch_size=64), 2, False, {"norm": None}, "on the CPU batch normalisation would see only a part"),
    ],
)
def test_what_would_be_another_training_is_refused(fit, devices, gpu, terms, said):
    student = nn.Sequential(nn.BatchNorm1d(2)) if "norm" in terms else nn.Sequential(nn.Linear(2, 2))
    objective = Objective({name: term for name, term in terms.items() if term} or {"ce": label_term()})
    with pytest.raises(InputError, match=said):
        check(fit, devices, gpu, student, objective)
    check(fit, 1, gpu, student, objective)


def test_one_device_is_nothing_special():
    before = dict(os.environ)
    with spread(1, lambda event: None) as rank:
        assert rank == 0 and alone() and averaged(torch.ones(2)).equal(torch.ones(2))
    assert dict(os.environ) == before


@pytest.mark.gpu
def test_two_gpus_train_what_one_trains(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    outcome = call(run_both, tmp_path, ("run.accelerator=gpu", "fit.lr=0.01"))
    one, two = outcome["value"]
    assert one["trace"]["epochs"][-1]["train/loss"] == pytest.approx(two["trace"]["epochs"][-1]["train/loss"], rel=1e-2)
