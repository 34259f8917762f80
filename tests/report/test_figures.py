from __future__ import annotations

import json

import pytest

from kd.errors import InputError
from kd.report.costs import size_accuracy
from kd.report.figures import curves, gain, heatmap, label, movers
from kd.report.rows import DISTILLED, TEACHER, collect, over_seeds
from tests.report.cards import STUDENT, card, family


def groups_of(cards, role=None):
    return [group for group in over_seeds(collect(cards)) if role in (None, group["role"])]


def test_the_heatmap_is_the_grid_with_mean_and_deviation():
    figure = heatmap(groups_of(family((8, 1, 4), (0.9, 0.1), (0, 1)), DISTILLED))
    [trace] = figure.data
    assert list(trace.x) == ["1", "4", "8"] and list(trace.y) == ["0.1", "0.9"]
    expected = 100 * (0.96 + 0.008 + 0.0036 - 0.0032 + 0.0015)
    assert trace.z[1][1] == pytest.approx(expected)
    assert trace.text[1][1] == f"{expected:.2f}<br>± 0.21"
    assert "2 seeds" in trace.customdata[1][1]


def test_a_failed_job_leaves_an_empty_cell_and_its_axis_value():
    made = groups_of(family((1, 4), (0.1, 0.9), (0,)), DISTILLED)
    [trace] = heatmap(made[:-1], axes={"temperature": [16.0]}).data
    assert list(trace.x) == ["1", "4", "16"]
    assert trace.z[1][1] is None and trace.text[1][1] == ""
    assert trace.z[0][2] is None
    assert sum(value is not None for line in trace.z for value in line) == 3


def test_two_settings_in_one_cell_are_refused_with_what_to_choose():
    made = groups_of(family((1,), (0.9,), (0,), lr=0.1) + family((1,), (0.9,), (0,), lr=0.2), DISTILLED)
    with pytest.raises(InputError, match=r"choose one config\.fit\.lr"):
        heatmap(made)


def test_any_metric_makes_a_heatmap():
    made = groups_of(family((1, 4), (0.1, 0.9), (0,)), DISTILLED)
    [trace] = heatmap(made, "test/loss").data
    assert trace.z[0][0] == pytest.approx(made[0]["test/loss"].mean)


def test_curves_show_loss_terms_and_validation():
    made = family((4,), (0.9,), (0,))
    figure = curves([made[0], made[-1]], ["the teacher", "the student"])
    names = [trace.name for trace in figure.data]
    assert names == [
        "the teacher", "the teacher ce", "the teacher",
        "the student", "the student ce", "the student kd", "the student",
    ]  # fmt: skip
    assert [trace.name for trace in figure.data if trace.showlegend] == ["the teacher", "the student"]
    total, ce, kd, valid = figure.data[3:]
    epochs = made[-1]["trace"]["epochs"]
    assert list(total.x) == [1, 2, 3, 4, 5] and list(total.y) == [epoch["train/loss"] for epoch in epochs]
    assert list(kd.y) == [epoch["train/kd"] for epoch in epochs] and ce.line.dash != kd.line.dash
    assert list(valid.y) == pytest.approx([100 * epoch["val/accuracy"] for epoch in epochs])


def test_curves_do_without_validation_or_epochs():
    bare = card("Train", STUDENT, 0.9)
    for epoch in bare["trace"]["epochs"]:
        del epoch["val/accuracy"]
    assert [trace.name for trace in curves([bare], ["a"]).data] == ["a", "a ce"]
    assert len(curves([{**bare, "trace": {}}]).data) == 0


def test_movers_show_share_norm_and_cosine_by_term():
    made = family((4,), (0.9,), (0,))
    figure = movers([made[-1]], ["the student"])
    assert [trace.name for trace in figure.data] == ["the student"] * 5
    assert [trace.showlegend for trace in figure.data] == [True, False, False, False, False]
    ce, kd, norm, _, cosine = figure.data
    epochs = made[-1]["gradients"]
    assert list(kd.y) == pytest.approx([90.0] * 5) and list(ce.y) == pytest.approx([10.0] * 5)
    assert ce.line.dash != kd.line.dash and list(ce.x) == [1, 2, 3, 4, 5]
    assert list(norm.y) == [epoch["grad/ce"] for epoch in epochs] and figure.layout.yaxis2.type == "log"
    assert list(cosine.y) == [epoch["grad_cosine/ce/kd"] for epoch in epochs]
    assert "ce solid, kd dot" in figure.layout.annotations[0].text
    assert "ce/kd" in figure.layout.annotations[2].text
    assert len(movers([made[0]]).data) == 0


def grid(**fixed):
    made = []
    for epochs in (1, 5):
        for samples in (1000, None):
            made += family(fixed.get("temperatures", (4,)), (0.9,), (0, 1), epochs=epochs, samples=samples)
    return groups_of(made)


def test_the_gain_over_two_settings_is_a_heatmap_about_zero():
    [trace] = gain(grid()).data
    assert trace.type == "heatmap" and list(trace.x) == ["1,000", "all"] and list(trace.y) == ["1", "5"]
    assert trace.zmin == -trace.zmax < 0
    assert trace.text[0][0].startswith("+0.") and all(value is not None for line in trace.z for value in line)


def test_the_gain_over_epochs_and_samples_takes_what_validated_best():
    groups = grid(temperatures=(1, 4))
    [trace] = gain(groups).data
    assert list(trace.x) == ["1,000", "all"]
    best = max(group["gain"].mean for group in groups if group["gain"] and group["epochs"] == 1)
    assert trace.z[0][0] == pytest.approx(100 * best)


def test_the_gain_over_one_setting_is_bars_with_the_best_on_top():
    [trace] = gain(groups_of(family((1, 4, 8), (0.9,), (0, 1)))).data
    assert trace.type == "bar" and list(trace.x) == sorted(trace.x) and len(trace.x) == 3
    assert trace.error_x.array[0] == pytest.approx(100 * 0.001 / 2**0.5)


def test_names_from_a_card_are_escaped():
    bad = "<a href='javascript:alert(1)'>%{x}$y$</a>"
    rows = over_seeds(collect([card("Train", STUDENT, 0.9, data=bad), card("Train", STUDENT, 0.8)]))
    rows[0]["role"] = bad
    drawn = [size_accuracy(rows), curves([card("Train", STUDENT, 0.9)], [bad])]
    drawn.append(movers(family((4,), (0.9,), (0,))[-1:], [bad]))
    drawn.append(heatmap([{**row, "hash": bad} for row in rows], x="role", y="data"))
    drawn.append(gain([{**row, "gain": row["test/accuracy"]} for row in rows]))
    for figure in drawn:
        text = json.dumps(figure.to_dict(), default=str)
        assert "&lt;a" in text and "<a" not in text and "$" not in text
        assert not any("%{x}&#36;" in str(trace.hovertemplate) for trace in figure.data)


def test_a_label_names_the_role_and_what_sets_it_apart():
    assert label({"role": TEACHER, "model": "cnn", "alpha": None}, ["model", "alpha"]) == "teacher: cnn"
    assert label({"role": TEACHER}, []) == "teacher"
