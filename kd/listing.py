"""What `kd list` shows: the options of `conf/`, the models, the stages, the layers of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.config import conf_dir
from kd.errors import InputError, nearest

GROUPS = ("loss", "data", "fit", "pipeline", "run", "experiments")
KINDS = (*GROUPS, "model", "stage", "layers")


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
    for name, text in described(folder):
        row: dict[str, Any] = {"name": name}
        if group == "loss":
            row |= _term(name)
        rows.append({**row, "about": text})
    return rows


def described(folder: Path) -> list[tuple[str, str]]:
    """The options of a group with the first comment of each file."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        comments = (line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line)
        first = next(comments, "")
        found.append((path.stem, first.lstrip("# ").strip()))
    return found


def _term(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "loss" / f"{name}.yaml"), resolve=False)
    assert isinstance(node, dict)
    term = node[name]
    views = [str(term[k]) for k in ("student", "teacher", "target") if term.get(k)]
    family = str(term["loss"]["_target_"]).split(".")[-2]
    return {"family": family, "views": ", ".join(views), "weight": str(term["weight"])}


def _models(pattern: str | None) -> list[dict[str, Any]]:
    import timm

    import kd.models.nets as nets

    ours = sorted(timm.list_models(module="nets")) or sorted(n for n in timm.list_models() if hasattr(nets, n))
    if pattern is None:
        count = len(timm.list_models()) - len(ours)
        rows = [
            {"name": n, "from": "kd", "about": (getattr(nets, n).__doc__ or "").strip().splitlines()[0]} for n in ours
        ]
        return [*rows, {"name": "…", "from": "timm", "about": f"{count} more: kd list model 'resnet*'"}]
    found = timm.list_models(pattern)
    if not found:
        raise InputError(f"no model fits {pattern!r}{nearest(pattern.strip('*'), timm.list_models())}")
    weights = set(timm.list_models(pattern, pretrained=True))
    return [
        {"name": n, "from": "kd" if n in ours else "timm", "about": "pretrained weights" if n in weights else ""}
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


def _layers(name: str | None) -> list[dict[str, Any]]:
    from kd.models import create, layers

    if name is None:
        raise InputError("name a network, e.g. kd list layers resnet18")
    for channels, size in ((3, 224), (1, 28)):
        try:
            net = create(name, num_classes=10, in_chans=channels, size=size)
            found = layers(net, (channels, size, size))
        except InputError as error:
            if "no such" in str(error) or "did you mean" in str(error):
                raise
            continue
        return [{"path": p, "layer": kind, "shape": "x".join(map(str, shape[1:]))} for p, kind, shape in found]
    raise InputError(f"{name} takes neither 224x224 colour nor 28x28 grey images")
