"""What `kd list` shows: the options of `conf/`, the models, the stages, the layers of a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.config import conf_dir
from kd.errors import InputError, nearest

if TYPE_CHECKING:
    from kd.models import Outline

GROUPS = ("loss", "recipe", "mix", "data", "pair", "fit", "pipeline", "run", "experiments")
KINDS = (*GROUPS, "model", "stage", "layers")
_PAPER = re.compile(r"(?P<method>[^:]+) \((?P<paper>[^()]*\b(?:19|20)\d\d)\): (?P<about>.+)")
_RESPONSE = ("logits", "self_taught", "softened", "exits", "own_exits", "native")
_FEATURE = ("maps", "flow", "boundary", "across", "reuse")
# Of the others the module's name is the family's.
_FAMILIES = dict.fromkeys(_RESPONSE, "response") | dict.fromkeys(_FEATURE, "feature")
_FAMILIES |= {"likeliest": "sequence", "context": "causal"}


def listing(what: str, pattern: str | None = None) -> list[dict[str, Any]]:
    """Rows of what can be composed.

    Raises:
        InputError: if ``what`` is no kind of thing, or the pattern fits nothing.
    """
    if what not in KINDS:
        raise InputError(f"{what!r} is none of {', '.join(KINDS)}{nearest(what, KINDS)}")
    if what == "model":
        return _models(pattern)
    if what == "layers":
        return _layers(pattern)
    if what == "stage":
        return _stages()
    return _described(what)


def _described(group: str) -> list[dict[str, Any]]:
    base = conf_dir()
    folder = base.parent / group if group == "experiments" else base / group
    rows: list[dict[str, Any]] = []
    if not folder.is_dir():
        raise InputError(f"this installation of kd has no {group}/ folder")
    for name, text in described(folder):
        row: dict[str, Any] = {"name": name}
        if group == "loss":
            method, paper, text = cited(text)
            row |= {**_term(name), "paper": paper}
            text = f"{method}: {text}" if method else text
        rows.append({**row, "about": text})
    return rows


def cited(line: str) -> tuple[str, str, str]:
    """The method, its paper with the year, and what it does, of a line that names all three; else only the last.

    >>> cited("DKD (Zhao et al. 2022): label against rest.")
    ('DKD', 'Zhao et al. 2022', 'label against rest.')
    >>> cited("The labels: what is left of alpha.")
    ('', '', 'The labels: what is left of alpha.')
    """
    found = _PAPER.fullmatch(line)
    return (found["method"], found["paper"], found["about"]) if found else ("", "", line)


def described(folder: Path) -> list[tuple[str, str]]:
    """The options of a group, and of the groups inside it, with the first comment of each file."""
    found = []
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        comments = (line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line)
        first = next(comments, "")
        found.append((path.relative_to(folder).with_suffix("").as_posix(), first.lstrip("# ").strip()))
    return found


def _term(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "loss" / f"{name}.yaml"), resolve=False)
    assert isinstance(node, dict)
    term = node[name]
    layers = {"student": "student.<layer>", "teacher": "teacher.<layer>", "feature": "student.<layer>"}
    named = [layers[k] if term[k] == "???" else term[k] for k in (*layers, "target", "row") if k in term]
    views = [str(view) for several in named for view in (several if isinstance(several, list) else [several])]
    if under := term.get("under"):
        views[-1] += f"; exchanged: {under['student']}, {under['teacher']}"
    loss = term["loss"]
    while "loss" in loss:  # one that is given embedded or standardised features is of its own family
        loss = loss["loss"]
    module = str(loss["_target_"]).split(".")[-2]
    # ${alpha} and ${complement:${alpha}}, as one would say them.
    weight = re.sub(r"\$\{(\w+)\}", r"\1", str(term["weight"]))
    weight = re.sub(r"\$\{complement:(\w+)\}", r"1 - \1", weight)
    return {"family": _FAMILIES.get(module, module), "views": ", ".join(views), "weight": weight}


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""Rows as a markdown table, their names as code.

    >>> print(as_markdown([{"name": "a", "about": "x|y"}, {"name": "b", "about": "<z>"}]))
    | name | about |
    | :-- | :-- |
    | `a` | x\|y |
    | `b` | &lt;z> |
    """
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(name: str, value: Any) -> str:
        text = " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
        return f"`{text}`" if text and name in ("name", "path") else text

    body = [[cell(name, row.get(name, "")) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, [":--"] * len(names), *body])


def _models(pattern: str | None) -> list[dict[str, Any]]:
    import timm
    from timm.models import model_entrypoint

    ours = _ours()
    if pattern is None:
        count = len(timm.list_models()) - len(ours)
        rows = [
            {"name": n, "from": "kd", "about": (model_entrypoint(n).__doc__ or "").strip().splitlines()[0]}
            for n in ours
        ]
        return [*rows, {"name": "…", "from": "timm", "about": f"{count} more: kd list model 'resnet*'"}]
    found = timm.list_models(pattern)
    if not found:
        raise InputError(f"no model fits {pattern!r}{nearest(pattern.strip('*'), timm.list_models())}")
    weights = {name.partition(".")[0] for name in timm.list_models(pattern, pretrained=True)}
    return [
        {"name": n, "from": "kd" if n in ours else "timm", "weights": "pretrained" if n in weights else ""}
        for n in found
    ]


def _stages() -> list[dict[str, Any]]:
    import kd.stages as stages

    kinds = [getattr(stages, name) for name in stages.__all__]
    return [
        {"name": f"kd.stages.{k.__name__}", "version": k.VERSION, "about": (k.__doc__ or "").strip().splitlines()[0]}
        for k in kinds
        if isinstance(k, type) and hasattr(k, "VERSION") and k.__name__ != "Stage"
    ]


def _ours() -> list[str]:
    """The models that this project brings, in natural order."""
    import timm
    from timm.models import model_entrypoint

    import kd.models  # noqa: F401  (registers them)

    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("kd.")]


def _layers(name: str | None) -> list[dict[str, Any]]:
    from timm.models import get_pretrained_cfg

    from kd.models import create, layers, outline

    if name is None:
        raise InputError("name a network, e.g. kd list layers resnet18")
    shapes = [(3, 224), (1, 28)]
    if name in _ours() and (made_for := get_pretrained_cfg(name)):
        shapes.insert(0, (made_for.input_size[0], made_for.input_size[-1]))
    first: InputError | None = None
    for channels, size in shapes:
        try:
            net = create(name, num_classes=10, in_chans=channels, size=size)
        except InputError as error:
            first = first or error
            continue
        image = channels, size, size
        parts = _parts(outline(net, image))
        found = [("(image)", "", (1, *image)), *layers(net, image)]
        return [
            {"path": p, "layer": kind, "shape": "x".join(map(str, shape[1:])), "part": ", ".join(parts.get(p, ()))}
            for p, kind, shape in found
        ]
    assert first is not None
    raise first


def _parts(found: Outline) -> dict[str, list[str]]:
    """What each layer is in the outline of its network, by its path; `(input)` where the layer's input is meant."""
    from kd import names

    rows: dict[str, list[str]] = {}
    if found.classifier is not None:
        rows[found.classifier] = ["classifier"]
    for part, paths in found.parts().items():
        if part in (*names.SEVERAL, "middle", "last", "classes"):
            continue
        for path in paths:
            if part.startswith("preactivation") and path in found.stages:
                continue  # where a stage ends without an activation
            reads = " (input)" if names.suffix(path).startswith(names.INPUT) else ""
            rows.setdefault(names.layer(path), []).append(f"{part}{reads}")
    return rows
