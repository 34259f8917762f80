from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from kd.report.page import write_page
from tests.report.browser import CHROMIUM, open_page
from tests.report.cards import STUDENT, card, compression, family, lookup

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'`${x}$title"
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


class Reader(HTMLParser):
    """Elements with their attributes, and the cells of each table."""

    def __init__(self):
        super().__init__()
        self.elements, self.tables, self.texts = [], {}, []
        self.open = None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "table":
            self.open = self.tables.setdefault(attributes.get("id"), [])
        elif tag == "tr" and self.open is not None:
            self.open.append([])
        elif tag in ("td", "th") and self.open:
            self.open[-1].append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1]:
            self.open[-1][-1] += data

    def handle_endtag(self, tag):
        if tag == "table":
            self.open = None


def parse(text):
    reader = Reader()
    reader.feed(text)
    return reader


def sweep_of(cards, failed=()):
    jobs = [{"overrides": [], "key": made["key"], "status": "done", "error": None} for made in cards]
    jobs += [{"overrides": list(o), "key": "f" * 64, "status": "failed", "error": error} for o, error in failed]
    return {
        "schema": 1,
        "id": "0123456789abcdef",
        "started": "2026-11-23",
        "overrides": ["temperature=1,4,8"],
        "jobs": jobs,
    }


@pytest.fixture
def made():
    return family((1, 4, 8), (0.1, 0.9), (0, 1))


def test_the_page_is_whole_and_fetches_nothing(made, tmp_path):
    out = write_page(made, tmp_path / "deep" / "page.html", "T")
    assert out == tmp_path / "deep" / "page.html" and list(out.parent.iterdir()) == [out]
    reader = parse(out.read_text(encoding="utf-8"))
    for tag, attributes in reader.elements:
        for name in ("src", "href", "srcset", "action", "data-src"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "url(" not in attributes.get("style", "")
    [policy] = [a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy
    [style] = re.findall(r"<style>(.*?)</style>", out.read_text(encoding="utf-8"), re.S)
    assert "url(" not in style and "@import" not in style


def test_every_run_is_a_row_with_its_command(made, tmp_path):
    reader = parse(write_page(made, tmp_path / "p.html", "T").read_text(encoding="utf-8"))
    head, *rows = reader.tables["runs"]
    scored = [one for one in made if one["metrics"]]
    assert len(rows) == len(scored) == 15
    assert [row[0] for row in rows] == [f"kd reproduce {one['key'][:16]}" for one in scored]
    assert head[:2] == ["command and hash", "role"] and "accuracy %" in head and "gain (points)" in head
    assert len(reader.tables["settings"]) == 1 + 8
    assert all(len(row) == len(head) for row in rows)


def test_the_headline_compares_the_best_student(made, tmp_path):
    reader = parse(write_page(made, tmp_path / "p.html", "T").read_text(encoding="utf-8"))
    text = " ".join(" ".join(reader.texts).split())
    best = 100 * (0.96 + 0.008 + 0.0036 - 0.0032 + 0.0015)
    assert f"best student {best:.2f} ± 0.21 % seed_cnn_small, temperature 4, alpha 0.9, 2 seeds" in text
    assert "its teacher 99.10 % seed_cnn, 93,322 parameters" in text
    assert "student alone 96.30 ± 0.14 %" in text
    assert "gain of distillation +0.69 ± 0.07 points" in text
    assert "smaller than its teacher 15.4x 6,058 parameters" in text
    assert "chosen by validation accuracy" in text


def test_relatives_come_from_the_store(made, tmp_path):
    students = [one for one in made if one["document"]["stage"] == "kd.stages.Distil"]
    alone = parse(write_page(students, tmp_path / "a.html", "T").read_text(encoding="utf-8"))
    assert len(alone.tables["runs"]) == 1 + 12
    full = write_page(students, tmp_path / "b.html", "T", lookup=lookup(made))
    assert len(parse(full.read_text(encoding="utf-8")).tables["runs"]) == 1 + 15


def test_failed_jobs_stand_there_with_their_error(made, tmp_path):
    failed = [(["temperature=8", "alpha=0.9"], "step 3: not finite"), (["temperature=x"], None)]
    out = write_page(made, tmp_path / "p.html", "T", sweep_of(made, failed))
    reader = parse(out.read_text(encoding="utf-8"))
    assert reader.tables["failed"][1:] == [
        ["temperature=8 alpha=0.9", "step 3: not finite"],
        ["temperature=x", "no reason was recorded"],
    ]
    assert "sweep 0123456789abcdef: 18 jobs (16 done, 2 failed)" in " ".join(reader.texts)


def evil():
    made = family((1, 4), (0.1, 0.9), (0,), student={**STUDENT})
    for one in made:
        one["document"]["config"]["data"]["name"] = EVIL
        for field in ("model", "student"):
            if field in one["document"]["config"]:
                one["document"]["config"][field] = {"name": EVIL}
        for epoch in one.get("trace", {}).get("epochs", ()):
            epoch[f"train/{EVIL}"] = 1.0
    made.append(card("Train", STUDENT, 0.9, data="other"))
    return made


def test_nothing_from_a_card_becomes_markup(tmp_path):
    sweep = sweep_of([], [([EVIL], EVIL)]) | {"id": EVIL, "overrides": [EVIL]}
    out = write_page(evil(), tmp_path / "p.html", EVIL, sweep)
    text = out.read_text(encoding="utf-8")
    reader = parse(text)
    plain = parse(write_page(family((1,), (0.5,), (0,)), tmp_path / "q.html", "T").read_text(encoding="utf-8"))
    assert [t for t, _ in reader.elements].count("script") == [t for t, _ in plain.elements].count("script") == 3
    assert "img" not in {tag for tag, _ in reader.elements}
    assert text.count("<h1>") == 1 and EVIL in "".join(reader.texts)
    [figures] = re.findall(r'id="figures">(.*?)</script>', text, re.S)
    assert "<" not in figures and json.loads(figures)


def test_an_empty_store_makes_a_page_too(tmp_path):
    text = write_page([], tmp_path / "p.html", "T").read_text(encoding="utf-8")
    assert "No finished runs" in text and len(text) < 20_000


def test_a_teacher_by_itself_is_a_headline(tmp_path):
    reader = parse(write_page(family((), (), ()), tmp_path / "p.html", "T").read_text(encoding="utf-8"))
    assert "teacher 99.10 % seed_cnn, 93,322 parameters" in " ".join(" ".join(reader.texts).split())


def test_runs_that_fill_no_grid_get_no_heatmap(tmp_path):
    pairs = [(1 + 0.7 * i, round(0.1 + 0.23 * i % 0.9, 3)) for i in range(6)]
    searched = [one for t, a in pairs for one in family((t,), (a,), (0,))]
    text = write_page(searched, tmp_path / "p.html", "T").read_text(encoding="utf-8")
    assert "Accuracy by temperature and alpha" not in text and 'id="runs"' in text


def test_other_settings_get_a_heatmap_each(tmp_path):
    made = family((1, 4), (0.1, 0.9), (0,), lr=0.1) + family((1, 4), (0.1, 0.9), (0,), lr=0.2)
    text = write_page(made, tmp_path / "p.html", "T").read_text(encoding="utf-8")
    assert "<h3>fit.lr 0.1</h3>" in text and "<h3>fit.lr 0.2</h3>" in text
    many = [one for lr in range(1, 9) for one in family((1, 4), (0.1, 0.9), (0,), lr=float(lr))]
    text = write_page(many, tmp_path / "p.html", "T").read_text(encoding="utf-8")
    assert text.count('id="heatmap-') == 6 and "2 further settings not drawn" in text


def test_the_page_says_which_term_moves_the_student_for_the_best_few(tmp_path):
    page = write_page(family((1, 4, 8), (0.1, 0.9), (0,)), tmp_path / "page.html", "t").read_text()
    assert "Which term moves the student" in page and "the best 4 of 6 runs" in page
    figures = page.partition('id="figures">')[2].partition("</script>")[0]
    assert len({trace["legendgroup"] for trace in json.loads(figures)["movers"]["data"]}) == 4
    silent = [{k: v for k, v in card.items() if k != "gradients"} for card in family((1, 4), (0.9,), (0,))]
    assert "Which term moves" not in write_page(silent, tmp_path / "page.html", "t").read_text()


def test_curves_stay_readable(tmp_path):
    made = family((1, 2, 3, 4, 5), (0.1, 0.9), (0, 1))
    text = write_page(made, tmp_path / "p.html", "T").read_text(encoding="utf-8")
    [figures] = re.findall(r'id="figures">(.*?)</script>', text, re.S)
    shown = [trace["name"] for trace in json.loads(figures)["curves"]["data"] if trace["showlegend"]]
    assert len(shown) == 8 and any(name.startswith("teacher") for name in shown)
    assert "the best 8 of 23 runs" in text


def test_a_compression_has_its_costs_side_by_side(made, tmp_path):
    text = write_page(compression(), tmp_path / "p.html", "T").read_text(encoding="utf-8")
    assert 'id="costs"' in text and 'id="size"' not in text and "Accuracy against bytes, products and time" in text
    text = write_page(made, tmp_path / "q.html", "T").read_text(encoding="utf-8")
    assert 'id="costs"' not in text and 'id="size"' in text


@needs_browser
def test_a_figure_is_saved_as_it_stands_there(tmp_path):
    page = write_page(compression(), tmp_path / "p.html", "T")
    save = """<script>setTimeout(async () => {
  const place = document.getElementById("costs"), options = place._context.toImageButtonOptions;
  const image = await Plotly.toImage(place, { format: "svg", imageDataOnly: true, ...options });
  document.body.dataset.saved = image.match(/width="(\\d+)"/)[1] + " " + place._fullLayout.paper_bgcolor;
}, 500);</script></body>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", save), encoding="utf-8")
    text, console = open_page(page, tmp_path / "profile")
    assert console == []
    saved = re.search(r'data-saved="([^"]*)"', text)
    # As wide as on the screen, and on the card's ground, so that light text stays readable.
    width, ground = saved[1].split(" ", 1)
    assert int(width) > 2000 and ground == "#ffffff"


@needs_browser
def test_a_browser_draws_it_without_complaint(made, tmp_path):
    made = [one for one in made if one["dials"].get("temperature") != 8 or one["dials"].get("alpha") != 0.9]
    sweep = sweep_of(made, [(["temperature=8", "alpha=0.9"], "diverged"), (["temperature=16", "alpha=0.1"], "no")])
    page = write_page(made, tmp_path / "p.html", "T", sweep)
    text, console = open_page(page, tmp_path / "profile")
    assert console == []
    first = text[text.index('id="heatmap-0"') : text.index('id="size"')]
    labels = re.findall(r'class="heatmap-label"><text[^>]*data-unformatted="([^"]*)"', first)
    assert sorted(labels) == sorted(f"{value:.2f}&lt;br&gt;± 0.21" for value in cells(made))
    assert len(labels) == 5  # 3 temperatures x 2 alphas, less the failed one; 16 is an empty column
    assert re.findall(r'class="xtick"><text[^>]*>([^<]*)<', first) == ["1", "4", "8", "16"]
    assert re.findall(r'class="ytick"><text[^>]*>([^<]*)<', first) == ["0.1", "0.9"]
    assert len(parse(text).tables["runs"]) == 1 + 13
    for figure in ("heatmap-0", "size", "gain", "curves", "movers"):
        assert re.search(rf'id="{figure}"[^>]*class="[^"]*js-plotly-plot|js-plotly-plot"[^>]*id="{figure}"', text), (
            figure
        )
    # Plotly's own bar would offer to upload the chart.
    assert set(re.findall(r'data-title="([^"]*)"', text)) == {"Download plot as a PNG", "Reset axes"}


def cells(made):
    """What the heatmap's cells hold, worked out without the code under test."""
    held = {}
    for one in made:
        if one["document"]["stage"] == "kd.stages.Distil":
            place = (one["dials"]["temperature"], one["dials"]["alpha"])
            held.setdefault(place, []).append(100 * one["metrics"]["test/accuracy"])
    return [sum(values) / len(values) for values in held.values()]


@needs_browser
def test_a_browser_sorts_and_is_not_fooled(tmp_path):
    page = write_page(evil(), tmp_path / "p.html", EVIL)
    press = """<script>
    const heads = [...document.querySelectorAll("#runs th")];
    const click = name => heads.find(head => head.textContent === name).querySelector("button").click();
    click("accuracy %"); click("accuracy %");
    </script></body>"""
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", press), encoding="utf-8")
    dom, console = open_page(page, tmp_path / "profile")
    assert console == []
    assert "<title>owned" not in dom and "onerror" not in {name for _, a in parse(dom).elements for name in a}
    head, *rows = parse(dom).tables["runs"]
    column = [row[head.index("accuracy %")] for row in rows]
    assert column == sorted(column, reverse=True) and len(set(column)) > 3
    temperature = [row[head.index("temperature")] for row in rows]
    assert "-" in temperature and dom.count('aria-sort="descending"') == 1


@needs_browser
def test_the_browser_test_would_see_an_error(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<body><script>nothing.here()</script></body>")
    assert len(open_page(page, tmp_path / "profile")[1]) == 1


def test_who_teaches_whom_is_drawn_where_there_is_more_than_one_hop(tmp_path):
    teacher = card("Train", STUDENT, 0.99)
    first = card("Distil", STUDENT, 0.98, inputs={"teacher": teacher["key"]}, lr=0.1)
    first["stage"] = "assistant1"
    last = card("Distil", STUDENT, 0.97, inputs={"teacher": first["key"]}, lr=0.2)
    cards = [teacher, first, last]
    page = write_page([last], tmp_path / "chain.html", "chain", lookup=lookup(cards))
    reader = parse(page.read_text())
    assert "Who teaches whom" in reader.texts and [tag for tag, _ in reader.elements].count("svg") == 1
    plain = write_page([first], tmp_path / "plain.html", "plain", lookup=lookup(cards))
    assert "Who teaches whom" not in parse(plain.read_text()).texts
