"""`kd bench loss`: each loss of conf/loss beside plain KL, and what is too large is skipped with a reason."""

from __future__ import annotations

import json

import pytest
import torch

from kd.benching import losses
from kd.benching.losses import NOTES, TARGET, bench_losses
from kd.cli import main
from kd.config import options
from kd.errors import InputError
from tests.shelf import text

ON_RESPONSE = ["kd", "dkd", "uskd", "jsd"]


def test_every_loss_is_measured_on_logits_or_on_layers():
    rows, table = bench_losses([], ["4x5", "3xmaps"], rounds=1)
    assert {row["loss"] for row in rows} == set(options("loss")) and len(rows) == len(options("loss"))
    skipped = {row["loss"]: row["skipped"] for row in rows if "skipped" in row}
    assert not skipped
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["bytes"] > 0 for row in rows)
    shapes = {row["loss"]: row["shape"] for row in rows}
    assert {shapes[name] for name in (*ON_RESPONSE, "one")} == {"4x5"} and shapes["hint"] == shapes["rkd"] == "3xmaps"
    shown = text(table)
    assert "4x5, float32" in shown and "3xmaps, float32" in shown and "at each of five" in shown


def test_the_notes_are_about_losses_that_there_are():
    assert set(NOTES) <= set(options("loss"))


def test_memory_is_counted_beside_the_inputs_and_held_against_the_kl():
    rows, _ = bench_losses(["kd", "logit_mse", "ce"], ["64x1000"], rounds=1)
    kd, mse, ce = rows
    logits = 64 * 1000 * 4
    assert kd["bytes_ratio"] == 1 and kd["inputs"] == 2 * logits and ce["inputs"] == logits + 64 * 8
    # Two softened logits and two log-probabilities are kept, and the first gradient is made beside them.
    assert kd["bytes"] == pytest.approx(5 * logits, rel=0.01)
    assert mse["bytes"] == pytest.approx(2 * logits, rel=0.01)


def test_half_precision_halves_the_inputs():
    (wide,), _ = bench_losses(["forward_kl"], ["2x4x50"], rounds=1)
    (half,), _ = bench_losses(["forward_kl"], ["2x4x50"], rounds=1, dtype="bfloat16")
    assert wide["inputs"] - half["inputs"] == 2 * 2 * 4 * 50 * 2


def test_the_ratio_is_of_neighbours_in_a_round_and_the_median_of_rounds(monkeypatch):
    # A loss, the KL after it; in the second round the machine is slow, in the third the loss is alone with that.
    taken = iter([0.0, 0.0, 2.0, 1.0, 200.0, 100.0, 50.0, 1.0])
    monkeypatch.setattr(losses._Bench, "_timed", lambda *_: next(taken))
    (row,), _ = bench_losses(["dkd"], ["4x5"], rounds=3)
    assert row["ratio"] == 2 and row["seconds"] == 50


def test_what_needs_too_much_is_skipped_with_a_reason_and_the_rest_is_measured(monkeypatch):
    monkeypatch.setattr(losses, "LARGE", 1000)
    rows, table = bench_losses(["mlkd", "logit_mse"], ["64x100"], rounds=1, memory=200 / 2**20)
    assert rows[0]["skipped"] == "needs some 0.0 GiB; --memory is 0.000190735" and rows[1]["bytes"] > 0
    assert "skipped: needs" in text(table)
    (row,), _ = bench_losses(["mlkd"], ["64x100"], rounds=1, seconds=1e-6)
    assert "--seconds is 1e-06" in row["skipped"]


def test_where_the_kl_itself_needs_too_much_a_loss_in_pieces_is_measured_without_it(monkeypatch):
    monkeypatch.setattr(losses, "LARGE", 1000)
    monkeypatch.setattr("kd.losses.tokens.PIECE", 1000)
    rows, table = bench_losses(["forward_kl"], ["2x64x100"], rounds=1, memory=200_000 / 2**30)
    (row,) = rows
    assert row["bytes"] > 0 and row["seconds"] > 0 and "ratio" not in row
    assert row["no_ratio"].startswith("kd itself needs some") and "kd itself" in text(table)


def test_a_loss_that_does_not_take_the_shape_or_runs_out_of_memory_is_skipped(monkeypatch):
    rows, _ = bench_losses(["dkd", "forward_kl"], ["2x4x50"], rounds=1)
    assert "a loss on logits needs floats of shape (N, C)" in rows[0]["skipped"] and "skipped" not in rows[1]

    def full(self):
        raise RuntimeError("DefaultCPUAllocator: not enough memory:\n you tried to allocate 9 bytes.")

    monkeypatch.setattr(losses.Case, "step", full)
    (row,), _ = bench_losses(["dkd"], ["4x5"], rounds=1)
    assert row["skipped"].startswith("cannot: DefaultCPUAllocator: not enough memory: you tried")


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (["dkdd"], {}, "'dkdd' is no loss; did you mean 'dkd'"),
        (["temprature=2"], {}, "did you mean 'temperature'"),
        ([], {"shapes": ["256"]}, "--shape 256: give logits as 256x1000"),
        ([], {"shapes": ["1x10"]}, "--shape 1x10: give logits as 256x1000"),
        ([], {"dtype": "float8"}, "--dtype float8: give float32 or bfloat16"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, options, said):
    with pytest.raises(InputError, match=said):
        bench_losses(words, rounds=1, **options)


def test_the_command_prints_data_and_leaves_the_threads(capsys):
    before = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        main(["bench", "loss", "dkd", "temperature=2", "--shape", "4x5", "--rounds", "1", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and row["loss"] == "dkd" and row["family"] == "response"
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_no_loss_on_the_response_costs_more_than_three_times_plain_kl_at_1000_classes():
    rows, _ = bench_losses([], ["256x1000"], rounds=15)
    over = {row["loss"]: row["ratio"] for row in rows if row["family"] == "response" and row["ratio"] > TARGET}
    # The first compares all samples with all, five times; the second sorts all classes. Both are said in its table.
    assert set(over) <= {"mlkd", "uskd"} <= set(NOTES)
    assert over.get("mlkd", 0) < 80 and over.get("uskd", 0) < 5
