"""`kd pick`: the model to ship under a budget, among all that the chosen runs made on their way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kd.errors import InputError
from kd.report.budget import COLUMNS, Limit, Weighed, closest, limit, told, weigh
from kd.report.rows import ACCURACY, CHOICE, Spread, collect, number, related
from kd.report.tables import terminal
from kd.reporting import chosen
from kd.store import Store

if TYPE_CHECKING:
    from rich.console import Group

SHOWN = 12  # rows of a table; --json has all


def pick(what: list[str], asked: Mapping[str, str | None], store_dir: str) -> tuple[Weighed, list[Limit]]:
    """The configurations of what was named, as for `kd report`, beside the limits.

    Args:
        what: sweeps, hashes, `experiments=NAME`; nothing: the last sweep.
        asked: option -> what was typed behind it, or None.
        store_dir: where the runs are.

    Raises:
        InputError: if a limit cannot be read, nothing was named that is there, or no model is within the limits.
    """
    limits = [limit(option, text) for option, text in asked.items() if text is not None]
    if not limits:
        raise InputError(f"give a limit: {', '.join(COLUMNS)}, e.g. kd pick --max-bytes 200k --max-drop 0.5")
    store = Store(store_dir)
    cards, _, title = chosen(what, store)
    lookup = {a.key: a.card for a in store}
    rows = collect(related(cards, lookup), lookup)
    if not rows:
        raise InputError(f"{title}: no model is finished there")
    weighed = weigh(rows, lookup, limits)
    if not weighed.fitting:
        raise InputError(closest(weighed, limits))
    return weighed, limits


def table(weighed: Weighed, width: int) -> Group:
    """The choice first, then what fits too, then what does not and why."""
    shown = told(weighed)[:SHOWN]
    return terminal(shown, (ACCURACY, CHOICE), width, keep=(*COLUMNS.values(), "hash"))


def lines(weighed: Weighed) -> list[str]:
    """What is below the table: how it was chosen, and how to ship it."""
    first, count = weighed.fitting[0], len(weighed.fitting) + len(weighed.others)
    split = "validation" if weighed.by == CHOICE else "test, for want of validation"
    found = [f"{count - SHOWN} more: --json has all"] if count > SHOWN else []
    found.append(f"{len(weighed.fitting)} of {count} fit; accuracy and what is lost of it are those on {split}")
    if first["role"] != "exported":
        found.append("its bytes are those of its weights; the file that is written may differ, and is measured then")
    return [*found, f"kd export {first['hash']} out/"]


def as_data(weighed: Weighed, limits: list[Limit]) -> dict[str, Any]:
    """The same for a script."""
    names = ("role", "step", "model", "n", "seed", ACCURACY, CHOICE, *COLUMNS.values(), "hash", "key", "why")
    rows = [
        {"fits": row["why"] is None, **{name: _plain(row.get(name)) for name in names}}
        for row in [*weighed.fitting, *weighed.others]
    ]
    return {
        "limits": {one.option: one.text for one in limits},
        "by": weighed.by,
        "choice": rows[0],
        "ship": lines(weighed)[-1],
        "models": rows,
    }


def _plain(value: Any) -> Any:
    return number(value) if isinstance(value, Spread) else value
