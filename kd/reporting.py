"""`kd report` and `kd dashboard`: choose the runs, hand them to the report, say where it is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.errors import InputError, KDError, nearest
from kd.pipeline import jobs as children
from kd.report.costs import accuracy_by_cost, panels
from kd.report.figures import heatmap
from kd.report.markdown import update_markdown
from kd.report.page import write_page
from kd.report.published import judged
from kd.report.rows import DISTILLED, Card, collect, over_seeds, related
from kd.report.tables import markdown as markdown_table
from kd.report.tables import values
from kd.store import Store
from kd.training.settings import Run


def chosen(what: list[str], store: Store) -> tuple[list[Card], dict[str, Any] | None, str]:
    """The cards a report is about, the sweep's record if it is one, and a title.

    Each word is a sweep, ``experiments=NAME`` or the hash of a run; without a word it is the last sweep.

    Raises:
        InputError: if the store is empty or a word names nothing.
    """
    lookup = {a.key: a.card for a in store}
    if not what:
        sweeps = store.sweeps()
        if sweeps:
            return _of_sweep(sweeps[-1], lookup)
        if not lookup:
            raise InputError(f"there is no run in {store.root}; `kd run` makes one")
        return [*lookup.values()], None, "all runs"
    found = [_named(word, store, lookup) for word in what]
    if len(found) == 1:
        return found[0]
    cards = {card["key"]: card for some, _, _ in found for card in some}
    return [*cards.values()], None, ", ".join(title for _, _, title in found)


def _named(word: str, store: Store, lookup: Mapping[str, Card]) -> tuple[list[Card], dict[str, Any] | None, str]:
    """What one word names."""
    if word.startswith("experiments="):
        from kd.config import jobs
        from kd.pipeline.plan import plan

        found, _ = jobs([word, f"run.store={store.root}"])
        keys = [plan(job.config, job.overrides).key for job in found]
        cards: list[Card] = [lookup[k] for k in keys if k in lookup]
        if not cards:
            raise InputError(f"no run of {word} is in {store.root}; `kd run {word}` makes them")
        return cards, None, word.partition("=")[2]
    fitting = [s for s in store.sweeps() if str(s["id"]).startswith(word)] if len(word) >= 4 else []
    if len(fitting) > 1:
        raise InputError(
            f"{word} fits {len(fitting)} sweeps ({', '.join(s['id'] for s in fitting[:4])}); give more digits"
        )
    if fitting:
        return _of_sweep(fitting[0], lookup)
    card = store.find(word).card
    return [card], None, str(card["key"])[:16]


def _of_sweep(sweep: dict[str, Any], lookup: Mapping[str, Card]) -> tuple[list[Card], dict[str, Any], str]:
    keys = dict.fromkeys(job["key"] for job in sweep["jobs"])
    return [lookup[k] for k in keys if k in lookup], sweep, f"sweep {sweep['id']}: {' '.join(sweep['overrides'])}"


def report(what: list[str], out: Path | None, markdown: Path | None, store_dir: str, as_json: bool) -> list[str]:
    """Write the page (and the markdown table); returns the lines to print.

    Raises:
        InputError: if nothing fits what was asked.
    """
    store = Store(store_dir)
    cards, sweep, title = chosen(what, store)
    lookup = {a.key: a.card for a in store}
    if as_json:
        rows = collect(related(cards, lookup), lookup)
        return [json.dumps({"title": title, "sweep": sweep, "rows": rows}, indent=1, default=str)]
    lines = []
    if markdown is not None:
        rows = judged(over_seeds(collect(related(cards, lookup), lookup)))
        changed = update_markdown(markdown, markdown.stem, markdown_table(rows))
        lines.append(f"{markdown} {'written' if changed else 'already says so'}")
    if out is not None or markdown is None:
        name = str(sweep["id"]) if sweep else "-".join(what).replace("experiments=", "") or "all"
        page = write_page(cards, out or store.root / "reports" / f"{name}.html", title, sweep, lookup)
        lines.append(str(page))
    return lines


def log_sweep(sweep: str, run: Run) -> str | None:
    """Send a sweep's table and heatmap to W&B as a run of its own; returns the line that says where, or None."""
    from kd.training.tracking import mode, sync_hint

    chosen_mode = mode(run.wandb)
    if chosen_mode == "disabled":
        return None
    outcome = children.call(_log_sweep, sweep, run, chosen_mode)
    offline = sync_hint(Path(run.store).expanduser())
    return offline if outcome.get("value") and chosen_mode == "offline" else None


def offline_hint(run: Run) -> str | None:
    """How offline W&B runs are looked at and synced, or None where W&B is online or off."""
    from kd.training.tracking import mode, sync_hint

    return sync_hint(Path(run.store).expanduser()) if mode(run.wandb) == "offline" else None


def _log_sweep(sweep: str, run: Run, chosen_mode: str, tell: Any) -> bool:
    """In a child: the record and the cards into one W&B run."""
    from kd.training.tracking import log_sweep

    store = Store(run.store)
    record = next(s for s in store.sweeps() if s["id"] == sweep)
    lookup = {a.key: a.card for a in store}
    cards, _, _ = _of_sweep(record, lookup)
    groups = over_seeds(collect(related(cards, lookup), lookup))
    columns, data = values(groups)
    figures = {}
    distilled = [g for g in groups if g["role"] == DISTILLED]
    with contextlib.suppress(InputError):  # something else varies too: one cell would hide another, the table says all
        if distilled:
            figures["temperature x alpha"] = heatmap(distilled)
    if any("step" in group for group in groups) and (costs := panels(groups)):
        figures["accuracy by cost"] = accuracy_by_cost(groups, costs)
    return log_sweep(
        record,
        columns=columns,
        data=data,
        folder=store.root,
        mode=chosen_mode,
        figures=figures,
        project=run.wandb_project,
    )


def dashboard(what: str, entity: str | None, project: str, store_dir: str) -> list[str]:
    """Open a dashboard; returns the lines to print.

    Raises:
        InputError: if the kind is unknown, or there is nothing to show.
    """
    from kd.training.tracking import mode

    kinds = ("auto", "leet", "report", "workspace")
    if what not in kinds:
        raise InputError(f"--what {what!r} is none of {', '.join(kinds)}{nearest(what, kinds)}")
    store = Store(store_dir)
    offline = store.root / "wandb"
    logged_in = mode("auto", dict(os.environ)) == "online"
    lines: list[str] = []
    if what == "workspace" or (what == "auto" and logged_in):
        lines += _workspace(entity, project, logged_in)
        if what == "workspace":
            return lines
    if what == "leet" or (what == "auto" and sys.stdout.isatty() and offline.is_dir()):
        if not offline.is_dir():
            raise InputError(f"no W&B run in {offline}; `kd run` writes them unless run.wandb=disabled")
        command = [shutil.which("wandb") or str(Path(sys.executable).with_name("wandb")), "leet", str(offline)]
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise KDError(f"`{' '.join(command[1:])}` ended with exit code {done.returncode}")
        return lines
    page = report([], None, None, store_dir, False)[0]
    import webbrowser

    if sys.stdout.isatty():
        webbrowser.open(Path(page).as_uri())
    return [*lines, page]


def _workspace(entity: str | None, project: str, logged_in: bool) -> list[str]:
    from kd.training.workspace import save

    if not logged_in:
        raise InputError("a W&B workspace needs a login: `wandb login`; `kd dashboard --what leet` needs none")
    return [save(entity, project)]
