from __future__ import annotations

import pytest

from kd.errors import InputError
from kd.report.markdown import update_markdown

PAGE = """# E01
<!-- kd:table main -->
| old |
<!-- /kd:table -->
between
<!-- kd:table second -->
<!-- /kd:table -->
after
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "e01.md"
    path.write_text(PAGE)
    return path


def test_only_the_named_table_changes(page):
    assert update_markdown(page, "second", "| new |\n")
    text = page.read_text()
    assert text == PAGE.replace("second -->\n<", "second -->\n\n| new |\n\n<")
    assert update_markdown(page, "main", "| α ± 1 |")
    assert "| α ± 1 |" in page.read_text(encoding="utf-8") and "| old |" not in page.read_text()
    assert list(page.parent.iterdir()) == [page]


def test_the_same_table_again_leaves_the_file_alone(page):
    update_markdown(page, "main", "| new |")
    before = page.stat().st_mtime_ns
    assert not update_markdown(page, "main", "| new |")
    assert page.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        (PAGE, "mian", "did you mean 'main'"),
        ("nothing", "main", "add `<!-- kd:table main -->`"),
        (PAGE + PAGE, "main", "twice"),
        ("<!-- kd:table main -->\nno end", "main", "has no end"),
        ("<!-- kd:table main -->\n<!-- kd:table second -->\n<!-- /kd:table -->", "main", "has no end"),
    ],
)
def test_markers_that_are_not_right_are_refused_and_nothing_is_written(page, text, name, says):
    page.write_text(text)
    with pytest.raises(InputError, match=says):
        update_markdown(page, name, "| new |")
    assert page.read_text() == text


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        update_markdown(tmp_path / "none.md", "main", "")
