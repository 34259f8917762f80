"""Soft labels on disk: sizes, headers, top-k with the mass of the rest, reading by sample and view."""

from __future__ import annotations

import pytest
import torch

from kd.data import labels
from kd.data.labels import Layout, StoredLabels, check, flaw, header, pack, scheme, shard, unpack, write_shard
from kd.errors import InputError, KDError

MADE_BY = scheme("crop_flip", 0, 32)


def outputs(samples=10, classes=5, seed=0):
    return 3 * torch.randn(samples, classes, generator=torch.Generator().manual_seed(seed))


def stored(folder, views, layout, ids):
    """Labels of these views in a folder, as the stage leaves them."""
    from safetensors.torch import save_file

    for view, logits in enumerate(views):
        for number, first, rows in layout.blocks():
            packed = pack(logits[first : first + rows], layout, {})
            write_shard(folder / shard(view, number), packed, MADE_BY, view)
    save_file({"ids": ids}, folder / labels.INDEX)


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        (Layout(10, 100, 1), 400),
        (Layout(10, 100, 1, "float16"), 200),
        (Layout(10, 100, 1, "bfloat16", top_k=8), 8 * (2 + 2) + 2),
        (Layout(10, 50_257, 1, "float16", top_k=8), 8 * (2 + 4) + 2),
        (Layout(10, 100, 1, "float16", widths={"a": 64}), 200 + 128),
    ],
)
def test_a_row_takes_the_bytes_that_its_layout_says(layout, row, tmp_path):
    assert layout.row == row and layout.bytes == 10 * row
    features = {name: torch.zeros(10, width) for name, width in layout.widths.items()}
    tensors = pack(outputs(10, layout.classes), layout, features)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 10 * row


def test_blocks_cover_the_samples_once(monkeypatch):
    monkeypatch.setattr(labels, "SHARD_BYTES", 4 * 20)
    layout = Layout(samples=10, classes=5, views=1)
    assert list(layout.blocks()) == [(0, 0, 4), (1, 4, 4), (2, 8, 2)]


def test_top_k_keeps_its_probabilities_and_the_mass_of_the_rest_exactly():
    logits = outputs(classes=20)
    back = unpack(pack(logits, Layout(10, 20, 1, top_k=3), {}), 20)["teacher.logits"]
    best = logits.topk(3).indices
    torch.testing.assert_close(back.softmax(1).gather(1, best), logits.softmax(1).gather(1, best))
    torch.testing.assert_close(back.gather(1, best), logits.gather(1, best), rtol=0, atol=0)
    assert back.scatter(1, best, 0).ne(0).sum() == 10 * 17  # the others share one value a row


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_back_as_float32_within_its_step(dtype):
    logits = outputs()
    back = unpack(pack(logits, Layout(10, 5, 1, dtype), {}), 5)["teacher.logits"]
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, logits, rtol=2**-8, atol=1e-3)


def test_features_come_back_under_their_views_name():
    packed = pack(outputs(4), Layout(4, 5, 1, widths={"layer3:pooled": 2}), {"layer3:pooled": torch.ones(4, 2)})
    assert unpack(packed, 5)["teacher.layer3:pooled"].equal(torch.ones(4, 2))


@pytest.mark.parametrize("bytes_", [10**6, 4 * 20])
def test_rows_are_found_by_sample_and_view_in_one_file_or_several(bytes_, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "SHARD_BYTES", bytes_)
    layout, ids = Layout(10, 5, 3), torch.arange(10) * 7 + 100
    views = [outputs(seed=seed) for seed in range(3)]
    stored(tmp_path, views, layout, ids)
    assert len(list(tmp_path.glob("labels-v*"))) == (3 if bytes_ > 100 else 9)
    wanted = torch.tensor([163, 100, 142])  # samples 9, 0 and 6
    read = StoredLabels.open(tmp_path, wanted, 5, 3)
    assert read.views == 3
    for view in (1, 0, 2):
        assert read.at(view, torch.tensor([2, 0]))["teacher.logits"].equal(views[view][[6, 9]])


def test_only_the_rows_that_are_asked_for_are_read(tmp_path):
    """The file is mapped: a few rows of 200 MB leave almost all of them on the disk."""
    layout = Layout(500_000, 100, 1)
    monkeyed = torch.zeros(layout.samples, layout.classes)
    write_shard(tmp_path / shard(0, 0), {"logits": monkeyed}, MADE_BY, 0)
    ids = torch.arange(layout.samples)
    del monkeyed
    read = StoredLabels([[tmp_path / shard(0, 0)]], ids, classes=100)

    def resident() -> int:
        with open("/proc/self/status") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(("RssFile", "RssAnon")))

    try:
        before = resident()
    except OSError:
        pytest.skip("needs /proc")
    read.at(0, torch.tensor([3, 400_000]))
    assert resident() - before < 40_000  # kB; 200,000 would be all of it


def test_samples_that_are_not_stored_are_refused(tmp_path):
    stored(tmp_path, [outputs()], Layout(10, 5, 1), torch.arange(10))
    with pytest.raises(KDError, match="other samples"):
        StoredLabels.open(tmp_path, torch.tensor([3, 10]), 5, 1)


def test_a_view_that_is_missing_is_named(tmp_path):
    stored(tmp_path, [outputs()], Layout(10, 5, 1), torch.arange(10))
    with pytest.raises(KDError, match="no view 1 of 2"):
        StoredLabels.open(tmp_path, torch.arange(10), 5, 2)


def test_a_shard_that_is_cut_short_or_of_another_scheme_is_known_by_its_header(tmp_path):
    path = tmp_path / shard(2, 0)
    write_shard(path, {"logits": outputs()}, MADE_BY, 2)
    assert header(path)["scheme"] == MADE_BY and flaw(path, MADE_BY, 2) is None
    other = scheme("crop_flip", 1, 32)
    assert "'crop_flip/1 seed 1 size 32' was meant" in str(flaw(path, other, 2))
    assert "no view 3" in str(flaw(path, MADE_BY, 3))
    whole = path.read_bytes()
    for cut in (0, 5, 50, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "half-written" in str(flaw(path, MADE_BY, 2))
    assert "half-written" in str(flaw(tmp_path / "absent", MADE_BY, 2))


def test_a_shard_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    import safetensors.torch

    def cut(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", cut)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / shard(0, 0), {"logits": outputs()}, MADE_BY, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0, "float32", None), "labels.views=0: give the number of views"),
        ((1.5, "float32", None), "labels.views=1.5"),
        ((True, "float32", None), "labels.views=True"),
        ((3, "int8", None), "labels.dtype='int8' is none of float32, float16, bfloat16"),
        ((3, "float16", 10), "labels.top_k=10: give how many logits to keep, 1 or more and fewer than the 10 classes"),
        ((3, "float16", 0), "labels.top_k=0"),
    ],
)
def test_settings_that_no_teacher_could_meet_are_refused(values, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        check(*values, classes=10)
    check(3, "float16", 9, classes=10)
