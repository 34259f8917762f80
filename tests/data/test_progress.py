from __future__ import annotations

import pytest

from kd.data import progress


def test_what_is_quick_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(5), 5, "reading")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_what_is_slow_loses_no_item_and_stays_off_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    assert list(progress.track(iter(range(5)), 5, "reading")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out == ""


def test_an_error_in_the_middle_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    with pytest.raises(ZeroDivisionError):
        list(progress.track((1 // (3 - i) for i in range(5)), 5, "reading"))
