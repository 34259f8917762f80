"""A table inside a hand-written markdown file, kept between two markers."""

from __future__ import annotations

import re
from pathlib import Path

from kd.errors import InputError, nearest
from kd.store import write_text

_MARKER = re.compile(r"<!-- kd:table (\S+) -->")
_END = "<!-- /kd:table -->"


def update_markdown(path: Path, marker_name: str, table: str) -> bool:
    """Put ``table`` between ``<!-- kd:table NAME -->`` and ``<!-- /kd:table -->``; the file is replaced whole.

    Returns:
        Whether the text changed; an unchanged file is not written.

    Raises:
        InputError: if the file or one of its markers is missing, or a marker stands there twice.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     page = Path(folder, "e01.md")
    ...     _ = page.write_text("before <!-- kd:table main -->old<!-- /kd:table --> after")
    ...     changed = update_markdown(page, "main", "| a |")
    ...     print(page.read_text())
    before <!-- kd:table main -->
    <BLANKLINE>
    | a |
    <BLANKLINE>
    <!-- /kd:table --> after
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is not there; write the page with its markers first") from None
    start = f"<!-- kd:table {marker_name} -->"
    head, found, rest = text.partition(start)
    if not found:
        names = _MARKER.findall(text)
        there = f" (it has {', '.join(names)})" if names else ""
        hint = nearest(marker_name, names) or f"; add `{start}` and `{_END}` where the table belongs"
        raise InputError(f"{path} has no marker `{start}`{there}{hint}")
    if start in rest:
        raise InputError(f"{path} has the marker `{start}` twice; keep one")
    old, end, tail = rest.partition(_END)
    if not end or _MARKER.search(old):
        raise InputError(f"{path}: the table {marker_name!r} has no end; add `{_END}` after it")
    new = f"{head}{start}\n\n{table.strip()}\n\n{_END}{tail}"
    if new != text:
        write_text(path, new)
    return new != text
