"""The page of a search: each trial where it belongs, the best told apart, nothing fetched, nothing injected."""

from __future__ import annotations

import json
import re

import pytest

from kd.report.study import epochs, front, history, slices, write_study
from tests.report.browser import CHROMIUM, open_page

ACCURACY, SIZE = "val/accuracy", "cost/parameters"


def trial(number, state, value, temperature="4", name="small", size=100, **more):
    values = {} if value is None else {ACCURACY: value, SIZE: size}
    return {
        "trial": number,
        "state": state,
        "values": values,
        "params": {"temperature": temperature, "student.name": name},
        "overrides": [f"temperature={temperature}", f"student.name={name}"],
        "command": f"kd run temperature={temperature} student.name={name}",
        "key": f"{number}" * 64,
        "error": None,
        "epochs": {} if value is None else {1: value / 2, 2: value},
        **more,
    }


@pytest.fixture
def trials():
    """As a search gives them: best first."""
    return [
        trial(3, "done", 0.9, "2.5", "large", 900),
        trial(1, "hit", 0.8, "8"),
        trial(0, "done", 0.5, "1.25"),
        trial(2, "pruned", 0.2, "16", epochs={1: 0.2}),
        trial(4, "failed", None, "3", error="step 2: term 'kd' is not finite"),
        trial(5, "running", None, params={"temperature": None, "student.name": None}, command=None, key=None),
    ]


def by_name(figure):
    return {trace.name: trace for trace in figure.data}


def test_the_history_is_in_the_order_of_the_trials_with_the_best_so_far(trials):
    found = by_name(history(trials, ACCURACY, "maximize"))
    assert list(found["run to its end"].x) == [0, 1, 3] and list(found["run to its end"].y) == [50, 80, 90]
    assert list(found["best so far"].y) == [50, 80, 90]
    assert list(found["pruned"].x) == [2] and list(found["pruned"].y) == [20]
    assert list(by_name(history(trials, ACCURACY, "minimize"))["best so far"].y) == [50, 50, 50]
    assert "trial 1: temperature 8, student.name small<br>val accuracy % 80.00" in found["run to its end"].customdata


def test_a_slice_for_each_field_numbers_on_an_axis_of_numbers(trials):
    figure = slices(trials, ACCURACY, ["temperature"])
    ends = [trace for trace in figure.data if trace.name == "run to its end"]
    assert [list(trace.x) for trace in ends] == [[2.5, 8, 1.25], ["large", "small", "small"]]
    assert figure.layout.xaxis.type == "log" and figure.layout.xaxis2.type == "category"
    assert slices(trials, ACCURACY).layout.xaxis.type == "linear"
    assert [trace.showlegend for trace in ends] == [True, False]
    assert figure.layout.xaxis.title.text == "temperature" and figure.layout.yaxis.title.text == "val accuracy %"


def test_the_front_rings_those_that_no_other_beats(trials):
    found = by_name(front(trials, [ACCURACY, SIZE], [3, 1]))
    assert list(found["Pareto front"].x) == [100, 900] and list(found["Pareto front"].y) == [80, 90]
    assert len(found["run to its end"].x) == 3 and "pruned" not in found


def test_the_epochs_show_where_a_trial_was_given_up(trials):
    lines = epochs(trials, ACCURACY).data
    assert [list(line.x) for line in lines] == [[1, 2]] * 3 + [[1]]
    assert lines[-1].name == "pruned" and list(lines[-1].y) == [20]
    assert [line.showlegend for line in lines] == [True, False, False, True]


def test_the_page_is_whole_and_holds_the_trials(trials, tmp_path):
    out = write_study(tmp_path / "x.html", "s", "kd tune 'a=interval(0,1)'", trials, {ACCURACY: "maximize"}, [3])
    page = out.read_text(encoding="utf-8")
    assert "6 trials: 2 done, 1 hit, 1 pruned, 1 failed, 1 running" in page
    assert "largest val accuracy %" in page and "<b>90.00</b>" in page
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert list(figures) == ["history-0", "epochs", "slices-0"]
    assert page.count("<tr class=best>") == 1 and "kd run temperature=2.5 student.name=large</code>" in page
    assert "not finite" in page and not re.search(r'(src|href)="(?!data:)', page.partition("<script>")[0])


def test_the_page_of_several_objectives_has_a_front_and_one_history_each(trials, tmp_path):
    both = {ACCURACY: "maximize", SIZE: "minimize"}
    page = write_study(tmp_path / "x.html", "s", "kd tune", trials, both, [3, 1]).read_text()
    assert all(f'id="{name}"' in page for name in ("front", "history-0", "history-1", "slices-1"))
    assert 'id="epochs"' not in page and "smallest parameters" in page and page.count("<tr class=best>") == 2


def test_a_search_without_a_finished_trial_has_a_page_too(trials, tmp_path):
    page = write_study(tmp_path / "x.html", "s", "kd tune", trials[-2:], {ACCURACY: "maximize"}, []).read_text()
    assert "1 failed, 1 running" in page and "history-0" not in page


def test_no_word_of_a_trial_becomes_code(trials, tmp_path):
    evil = "</script><img src=x onerror=alert(1)>%{x}$a$"
    trials[0] |= {"params": {"temperature": "1", "student.name": evil}, "command": f"kd run {evil}", "error": evil}
    page = write_study(tmp_path / "x.html", evil, evil, trials, {ACCURACY: "maximize"}, [3]).read_text()
    assert "<img" not in page
    texts = slices(trials, ACCURACY).data[2].x
    assert "%{" not in texts[0] and "$" not in texts[0]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_a_browser_draws_each_figure_and_complains_of_nothing(trials, tmp_path):
    both = {ACCURACY: "maximize", SIZE: "minimize"}
    out = write_study(tmp_path / "x.html", "s", "kd tune", trials, both, [3, 1], ["temperature"])
    dom, complaints = open_page(out, tmp_path / "profile")
    assert complaints == [] and dom.count('class="main-svg"') >= 2 * 5
