"""Passes in turns."""

from __future__ import annotations

import time

import pytest

from kd.compress.latency import WARM_UP, interleaved


def test_each_pass_runs_once_a_round_in_an_order_that_turns() -> None:
    ran: list[str] = []
    found = interleaved({name: lambda name=name: ran.append(name) for name in "abc"}, rounds=4)  # type: ignore[misc]
    assert ran[: 3 * WARM_UP] == ["a"] * WARM_UP + ["b"] * WARM_UP + ["c"] * WARM_UP
    assert "".join(ran[3 * WARM_UP :]) == "abcbcacababc"
    assert all(0 <= row["low"] <= row["median"] <= row["high"] for row in found.values())


def test_no_round_begins_when_time_is_up_but_for_three(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    ran: list[int] = []
    found = interleaved({"a": lambda: ran.append(1)}, rounds=50, seconds=0)
    assert len(ran) == WARM_UP + 3 and found == {"a": {"median": 1000.0, "low": 1000.0, "high": 1000.0}}
