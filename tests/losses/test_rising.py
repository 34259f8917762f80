"""Linear rises over epochs."""

from __future__ import annotations

import pytest

from kd.losses.rising import risen


@pytest.mark.parametrize(
    ("epoch", "share"), [(0.0, 0.05), (0.99, 0.05), (1.0, 0.1), (18.5, 0.95), (19.0, 1.0), (99.0, 1.0)]
)
def test_the_nth_epoch_of_twenty_has_n_twentieths_until_all(epoch: float, share: float) -> None:
    assert risen(epoch, 20) == pytest.approx(share)


def test_over_no_epochs_all_is_there_at_once() -> None:
    assert risen(0.0, 0) == 1.0
