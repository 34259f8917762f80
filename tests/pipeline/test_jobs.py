"""Children: whatever one does, the parent hears how it ended and goes on."""

from __future__ import annotations

import pytest

from kd.pipeline.jobs import call
from tests.pipeline import small


def test_a_child_returns_its_value_and_its_events():
    heard: list[dict] = []
    assert call(small.tells, 1, tell=heard.append) == {"status": "done", "value": 2}
    assert heard == [{"event": "say", "line": "got 1"}]


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (small.raises, "RuntimeError: first line (KD_TRACEBACK=1 shows where)"),
        (small.exits, "the job called exit(3)"),
        (small.killed, "the job was killed by SIGKILL (out of memory?); the same command resumes it"),
        (small.vanishes, "the job's process ended by itself with exit code 5 before it was done"),
    ],
)
def test_a_job_that_ends_badly_is_told_in_one_line_and_the_next_one_runs(job, said, monkeypatch):
    monkeypatch.delenv("KD_TRACEBACK", raising=False)
    assert call(job) == {"status": "failed", "error": said, "exit_code": 1}
    assert call(small.tells, 4)["value"] == 5
