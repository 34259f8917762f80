"""`kd bench compress`: the same network made smaller in seven ways, each running as it should, timed in turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kd.benching import compress
from kd.benching.compress import ORT, TORCH, bench_compress
from kd.errors import InputError
from tests.shelf import text

WAYS = [
    ("float", TORCH), ("float", ORT), ("float, once more", ORT), ("static int8", ORT), ("dynamic int8", ORT),
    ("channels less 50% of macs", TORCH), ("channels less 50% of macs", ORT),
    ("90% of weights 0", TORCH), ("90% of weights 0", ORT),
    ("low rank, 50% of parameters", TORCH), ("low rank, 50% of parameters", ORT),
]  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], str, list[Any]]:
    """What it says, what it shows, and the ways that it timed."""
    kept: list[Any] = []
    inner = compress._ways

    def watched(*arguments: Any) -> Any:
        ways, left_out = inner(*arguments)
        kept.extend(ways)
        return ways, left_out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "_ways", watched)
        data, table = bench_compress([], rounds=3)
    return data, text(table, 300), kept


def test_every_way_is_timed_at_both_batch_sizes_beside_float_in_its_runtime(measured: Any) -> None:
    data, shown, _ = measured
    assert [(row["way"], row["runtime"]) for row in data["rows"]] == WAYS and data["left_out"] == {}
    base = {row["runtime"]: row for row in data["rows"] if row["way"] == "float"}
    for row in data["rows"]:
        for batch in ("batch1", "batch64"):
            timed = row[f"ms_{batch}"]
            assert 0 < timed["low"] <= timed["median"] <= timed["high"]
            same = base[row["runtime"]][f"ms_{batch}"]["median"] / timed["median"]
            assert row[f"faster_{batch}"] == pytest.approx(same)
    assert all(f"{name} " in shown for name, _ in WAYS) and "nothing on accuracy" in shown


def test_bytes_and_counts_are_those_of_what_ran(measured: Any) -> None:
    data, _, ways = measured
    rows = {(row["way"], row["runtime"]): row for row in data["rows"]}
    whole, file = rows["float", TORCH], rows["float", ORT]
    assert rows["float, once more", ORT]["bytes"] == file["bytes"]
    zeros = rows["90% of weights 0", ORT]
    # As large as before until something packs it, and it says so.
    assert zeros["bytes"] == file["bytes"] and zeros["gzip_bytes"] < 0.4 * file["gzip_bytes"]
    assert zeros["macs"] == file["macs"] and zeros["nonzero"] < 0.2 * file["nonzero"] and "gzip" in zeros["note"]
    assert rows["static int8", ORT]["bytes"] < 0.7 * file["bytes"]
    pruned = rows["channels less 50% of macs", TORCH]
    assert pruned["macs"] <= 0.5 * whole["macs"] and pruned["bytes"] < 0.6 * whole["bytes"]
    assert rows["low rank, 50% of parameters", ORT]["parameters"] <= 0.5 * whole["parameters"]
    assert rows["dynamic int8", ORT]["note"] == "2 of 5 layers"
    assert [row["bytes"] for row in data["rows"]] == [len(way.content) for way in ways]


def test_what_is_timed_gives_what_the_network_gives(measured: Any) -> None:
    _, _, ways = measured
    images = torch.randn((8, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = {(way.name, way.runtime): way.run(images) for way in ways}
    for name in dict.fromkeys(name for name, runtime in WAYS if runtime == TORCH):
        torch.testing.assert_close(found[name, ORT], found[name, TORCH], rtol=1e-4, atol=1e-4)
    exact = found["float", TORCH]
    for how in ("static", "dynamic"):
        assert torch.nn.functional.cosine_similarity(found[f"{how} int8", ORT], exact).min() > 0.98
    for name in ("channels less 50% of macs", "90% of weights 0", "low rank, 50% of parameters"):
        assert not torch.allclose(found[name, TORCH], exact, atol=1e-2)


def test_words_reach_the_steps_and_what_cannot_be_is_left_out_by_name() -> None:
    data, table = bench_compress(["prune.amount=0.3", "lowrank.least=1000"], rounds=3)
    names = {row["way"] for row in data["rows"]}
    assert "channels less 30% of macs" in names and not any(name.startswith("low rank") for name in names)
    assert "lowrank finds no layer of SeedCNN" in data["left_out"]["low rank, 50% of parameters"]
    assert "left out: low rank, 50% of parameters: lowrank finds no layer" in text(table, 300)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune.amont=0.3"], "amount"),
        (["student.name=resnet19"], "resnet19"),
        (["pipeline=distil"], "leave the words pipeline, compress"),
        (["prune.what=weights"], "prune .of channels, in one step."),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        bench_compress(words, rounds=3)
    assert "\n" not in str(refused.value)
