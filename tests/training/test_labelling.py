"""The teacher's pass: the same rows whatever the batch, the layout of the files and where it was interrupted."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from kd.data import labels
from kd.data.labels import Layout, scheme, shard
from kd.training.labelling import Pass, Speaker, label_views, link
from tests.training.tiny import CLASSES, SIDE, net, run_of, split

MADE_BY = scheme("shift", 3, SIDE)


def passed(folder, views=2, how=None, count=22, features=(), tell=lambda event: None):
    folder.mkdir(parents=True, exist_ok=True)
    layout = Layout(count, CLASSES, views, widths=dict.fromkeys(features, SIDE * SIDE))
    speaker = Speaker(net(), how or Pass(batch_size=8), features, torch.device("cpu"))
    return label_views(
        speaker,
        split(count),
        layout,
        run_of(folder),
        made_by=MADE_BY,
        augment="shift",
        seed=3,
        size=SIDE,
        work=folder,
        tell=tell,
    )


def read(paths):
    return [load_file(path) for path in paths]


def by_hand(view, count=22):
    from kd.data.augment import augment

    images = split(count).images
    with torch.no_grad():
        return net()(augment(images, "shift", 3, torch.arange(count), view))


def test_each_file_holds_the_teachers_logits_of_its_view(tmp_path):
    paths = passed(tmp_path)
    assert [p.name for p in paths] == [shard(0, 0), shard(1, 0)]
    for view, found in enumerate(read(paths)):
        torch.testing.assert_close(found["logits"], by_hand(view))


@pytest.mark.parametrize("size", [1, 5, 22, 64])
def test_the_batch_size_decides_nothing_but_the_last_bits(size, tmp_path):
    """The last batch is filled up, and what fills it is not stored."""
    found = read(passed(tmp_path, how=Pass(batch_size=size)))
    assert all(len(one["logits"]) == 22 for one in found)
    torch.testing.assert_close(found[1]["logits"], by_hand(1))


def test_several_blocks_hold_the_same_rows_as_one(tmp_path, monkeypatch):
    (whole,) = read(passed(tmp_path / "a", views=1))
    monkeypatch.setattr(labels, "SHARD_BYTES", 8 * CLASSES * 4)
    parts = read(passed(tmp_path / "b", views=1))
    assert len(parts) == 3 and torch.cat([p["logits"] for p in parts]).equal(whole["logits"])


def test_what_is_there_is_not_made_again(tmp_path):
    paths = passed(tmp_path)
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    events = []
    again = passed(tmp_path, tell=events.append)
    assert again[0].stat().st_mtime_ns == times[0] and again[1].exists()
    assert sum(event["event"] == "pass" for event in events) == 3  # 22 samples in eights, one view
    events.clear()
    passed(tmp_path, tell=events.append)
    assert [event["event"] for event in events] == ["say"]


def test_size_and_time_are_told_before_the_first_file(tmp_path):
    events = []

    def tell(event):
        events.append((event, len(list(tmp_path.glob("labels-v*")))))

    passed(tmp_path, tell=tell)
    said, files = next((event["line"], files) for event, files in events if event["event"] == "say")
    assert files == 0 and said.startswith("labels: 2 views of 22 samples in float32: 528 bytes to write, about ")


def test_features_are_pooled_and_kept(tmp_path):
    (found,) = read(passed(tmp_path, views=1, features=("0:pooled",)))
    assert found["feature.0:pooled"].shape == (22, SIDE * SIDE)


@pytest.mark.parametrize("how", [Pass(8, channels_last=True), Pass(8, precision="bf16-mixed")])
def test_the_ways_of_the_pass_agree(how, tmp_path):
    found = read(passed(tmp_path, how=how))
    torch.testing.assert_close(found[0]["logits"], by_hand(0), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_a_compiled_teacher_agrees(tmp_path):
    (plain,) = read(passed(tmp_path / "a", views=1, features=("0:pooled",)))
    (compiled,) = read(passed(tmp_path / "b", views=1, features=("0:pooled",), how=Pass(8, compile=True)))
    assert compiled["feature.0:pooled"].shape == plain["feature.0:pooled"].shape  # the taps do fire
    torch.testing.assert_close(compiled["logits"], plain["logits"], rtol=1e-4, atol=1e-5)


def test_linked_files_have_the_same_bytes(tmp_path):
    (path,) = passed(tmp_path / "work", views=1)
    (tmp_path / "out").mkdir()
    link([path], tmp_path / "out")
    assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
