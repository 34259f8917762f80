"""`kd bench labels`: each way of the pass beside a bare loop, with the classes they agree on."""

from __future__ import annotations

import pytest

from kd.benching.labels import TEXT, WAYS, _summary, bench_labels
from kd.errors import InputError
from tests.shelf import text


def test_a_round_times_each_way_and_says_where_they_agree():
    words = ["data.augment=shift", "labels.batch_size=16", "run.workers=0"]
    data, table = bench_labels(words, rounds=1, samples=32)
    assert set(data["seconds"]) == {"bare", *WAYS} and all(len(s) == 1 and s[0] > 0 for s in data["seconds"].values())
    assert data["agreement"]["ours"] == 1 and all(0 <= share <= 1 for share in data["agreement"].values())
    shown = text(table)
    assert all(TEXT[name] in shown for name in ("bare", *WAYS))


def test_the_ratios_are_medians_of_rounds():
    seconds = {"bare": [1.0, 2.0, 4.0], "ours": [1.0, 4.0, 5.0]}
    data, table = _summary(seconds, 100, {"ours": 1.0})
    assert data["ratios"] == {"bare": 1.0, "ours": 0.8}
    assert data["samples_per_second"]["bare"] == 50
    assert "0.80 (target 0.9)" in text(table)


def test_more_samples_than_there_are_are_refused():
    with pytest.raises(InputError, match="--samples 5000: digits has"):
        bench_labels([], rounds=1, samples=5000)
