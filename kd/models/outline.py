"""The parts that any network has, under names of their own: stages, what their ReLU is given, embedding, classifier."""

from __future__ import annotations

import math
import re
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd import names
from kd.compress.measure import looking
from kd.errors import InputError, nearest
from kd.models.positions import is_activation, lays_over, over
from kd.models.taps import Layout, _first_tensor, channels_axis, laid, square

QUARTERS = 4  # stages of a net whose layers are all alike
HEAD = 8  # layers from the last stage to the logits, at most, for class maps
STAGES = "_stages"  # where `create` leaves what a user named
_STEM = re.compile(r"(?:conv_)?stem\b")


@dataclass(frozen=True)
class Outline:
    """Where a network's parts are: names of layers as `Taps` takes them, shallow to deep.

    Args:
        net: the network's class, for messages.
        stages: each gives maps (N, C, H, W).
        preactivations: as many: what the ReLU at the end of a stage is given, or the stage where there is none.
        classifier: path of the last linear layer or 1x1 convolution; None where there is none.
        embedding: the vector (N, D) that it reads.
        classes: maps (N, classes, H, W): the last stage's positions through what stands before and in the classifier.
        unpooled: the maps whose mean over positions is the embedding, or the embedding where there are none.
        branches: logits (N, classes) of each of several ends (`kd.models.branches`).
        ensemble: what these say together.
    """

    net: str
    stages: tuple[str, ...]
    preactivations: tuple[str, ...]
    classifier: str | None = None
    embedding: str | None = None
    classes: str | None = None
    unpooled: str | None = None
    branches: tuple[str, ...] = ()
    ensemble: str | None = None

    def find(self, name: str) -> tuple[str, ...]:
        """The layers that a part stands for, with what the name asks for behind each.

        Args:
            name: such as `stages`, `stage2`, `last:pooled`, `embedding`.

        Raises:
            InputError: if the network has no such part.

        >>> found = Outline("Net", ("a", "b", "c"), ("a", "b.1:input", "c"), "fc", "fc:input")
        >>> found.find("stages"), found.find("middle"), found.find("last:pooled"), found.find("preactivation2")
        (('a', 'b', 'c'), ('b',), ('c:pooled',), ('b.1:input',))
        >>> found.find("stage4")
        Traceback (most recent call last):
            ...
        kd.errors.InputError: Net has no stage4; it has 3 stages: a, b, c
        """
        part = names.part(name)
        if part is None:
            raise InputError(f"{name!r} is no part of a network{nearest(names.layer(name), self.parts())}")
        found = self.parts().get(part)
        if not found:
            raise InputError(f"{self.net} has no {part}; {self._has(part)}")
        return tuple(path + names.suffix(name) for path in found)

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Each part by its name, and the layers it stands for."""
        found: dict[str, tuple[str, ...]] = {}
        for one, several in (("stage", self.stages), ("preactivation", self.preactivations)):
            if several:
                found[f"{one}s"] = several
                found |= {f"{one}{number}": (path,) for number, path in enumerate(several, 1)}
        if self.stages:
            found |= {"middle": (self.stages[(len(self.stages) - 1) // 2],), "last": (self.stages[-1],)}
        if self.branches:
            found["branches"] = self.branches
            found |= {f"branch{number}": (path,) for number, path in enumerate(self.branches, 1)}
        single = {"embedding": self.embedding, "unpooled": self.unpooled, "classes": self.classes}
        single["ensemble"] = self.ensemble
        return found | {name: (path,) for name, path in single.items() if path}

    def _has(self, part: str) -> str:
        if part == "ensemble" or part.startswith("branch"):
            count = len(self.branches)
            return f"it has {count} branches" if count else "only pipeline=one gives a network branches"
        if part == "classes":
            return "its classifier cannot be laid over the positions of its last stage, as class maps need"
        if part in ("embedding", "unpooled"):
            return "no linear layer gives its logits"
        if not self.stages:
            return "none of its layers gives maps or tokens of a square; name layers by their paths"
        return f"it has {len(self.stages)} stages: {', '.join(self.stages)}"


def outline(net: nn.Module, shape: Sequence[int], chosen: Sequence[str] | None = None) -> Outline:
    """The outline of a network, found with one blank image.

    Stages are timm's `feature_info` where the network has one: its last entry of each stride and width, without a stem
    of one convolution and without poolings. Else they are the last layer of each grid among the network's outermost
    layers. Where all are of one stride and width, as in a ViT, they are the ends of the four quarters of its depth.

    Args:
        net: the plain net, inside any wrapper; left as it was found.
        shape: of one image, (C, H, W), as high as wide.
        chosen: names of layers that are the stages, in the place of what is found; else those that `create` was given.

    Raises:
        InputError: if a chosen layer is none, or gives no maps.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(),
    ...     nn.Linear(8, 10))
    >>> found = outline(net, (1, 8, 8))
    >>> found.stages, found.preactivations, found.embedding
    (('1', '4'), ('1:input', '4:input'), '6:input')
    """
    if callable(around := getattr(net, "outlined", None)):  # a net around another says so itself
        whole: Outline = around(shape, chosen)
        return whole
    seen = _Seen.of(net, shape)
    chosen = chosen if chosen is not None else vars(net).get(STAGES)
    if chosen is None:
        stages = tuple(seen.as_maps(path) for path in _stages(net, seen))
    else:
        stages = tuple(_chosen(name, net, seen) for name in chosen)
    before = []
    for name in stages:
        activation = None if names.INPUT in name else seen.activated.get(names.layer(name))
        before.append(name if activation is None else f"{activation}:input{names.suffix(name)}")
    classifier = _classifier(net, seen)
    embedding = classes = unpooled = None
    if classifier is not None:
        embedding = f"{classifier}:input" + ("" if len(seen.inputs[classifier]) == 2 else names.POOLED)
        classes = _classes(net, stages, classifier, seen)
        unpooled = _unpooled(stages, classifier, seen) or embedding
    return Outline(type(net).__name__, stages, tuple(before), classifier, embedding, classes, unpooled)


@dataclass
class _Seen:
    """What one pass showed: of each layer that ran, when it was called and ended, what it took and gave."""

    layout: Layout
    modules: dict[str, nn.Module]
    called: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    taken: dict[str, Tensor] = field(default_factory=dict)  # vectors (1, D), or the mean of maps over positions
    given: dict[str, Tensor] = field(default_factory=dict)
    activated: dict[str, str] = field(default_factory=dict)  # a layer, and the activation that its output is that of

    @classmethod
    def of(cls, net: nn.Module, shape: Sequence[int]) -> _Seen:
        seen = cls(Layout.of(net), dict(net.named_modules()))
        clock = iter(range(10**9))
        last: list[tuple[str, weakref.ref[Tensor]]] = []

        def before(module: nn.Module, args: Any, path: str) -> None:
            seen.called[path] = next(clock)
            if (tensor := _first_tensor(args)) is not None:
                seen.inputs[path] = tuple(tensor.shape)
                if isinstance(module, nn.Linear | nn.Conv2d):
                    seen.taken[path] = tensor.mean(dim=(2, 3)) if tensor.ndim == 4 else tensor.clone()

        def after(module: nn.Module, output: Any, path: str) -> None:
            if (tensor := _first_tensor(output)) is None:
                return
            seen.ended[path] = next(clock)
            seen.outputs[path] = tuple(tensor.shape)
            if seen.grid(path) is not None:
                seen.given[path] = laid(tensor, seen.layout).mean(dim=(2, 3))
            if is_activation(module):
                last[:] = [(path, weakref.ref(tensor))]
            seen.activated.pop(path, None)
            if last and last[0][1]() is tensor:
                seen.activated[path] = last[0][0]

        handles = []
        for path, module in seen.modules.items():
            handles.append(module.register_forward_pre_hook(lambda m, args, path=path: before(m, args, path)))
            handles.append(module.register_forward_hook(lambda m, _, output, path=path: after(m, output, path)))
        first = next(net.parameters(), None)
        try:
            with looking(net):
                # A ramp: of a black image two layers may give the same by chance.
                ramp = torch.linspace(0, 1, math.prod(shape), device=first.device if first is not None else None)
                net(ramp.reshape(1, *shape))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def grid(self, path: str) -> tuple[int, int] | None:
        """Channels and side of a layer's maps or tokens; None where it gives neither."""
        shape = self.outputs.get(path, ())
        if len(shape) == 4:
            axis = channels_axis(shape, self.layout)
            height, width = shape[2:] if axis == 1 else shape[1:3]
            return (shape[axis], height) if height == width else None  # of square images there are square maps
        side = square(shape, self.layout)
        return None if side is None else (shape[2], side)

    def side(self, path: str) -> int:
        """Height of a layer's maps, or of the square its tokens fill."""
        grid = self.grid(path)
        assert grid is not None
        return grid[1]

    def as_maps(self, path: str) -> str:
        """The name of a layer's maps (N, C, H, W)."""
        shape = self.outputs[path]
        return path if len(shape) == 4 and channels_axis(shape, self.layout) == 1 else path + names.MAPS


def _chosen(name: str, net: nn.Module, seen: _Seen) -> str:
    path = names.layer(name)
    if path not in seen.outputs:
        known = [p for p in seen.outputs if p]
        raise InputError(f"stages: {path!r} is no layer of {type(net).__name__} that runs{nearest(path, known)}")
    if names.suffix(name):
        return name
    if seen.grid(path) is None:
        raise InputError(f"stages: {path!r} of {type(net).__name__} gives {seen.outputs[path]}, and no maps or tokens")
    return seen.as_maps(path)


def _stages(net: nn.Module, seen: _Seen) -> list[str]:
    """Paths of the stages' last layers."""
    return _published(net, seen) or _by_grid(net, seen)


def _published(net: nn.Module, seen: _Seen) -> list[str]:
    """Those of timm's `feature_info`; none where it names layers that are not there."""
    listed = getattr(net, "feature_info", None)
    entries = [dict(entry) for entry in listed] if isinstance(listed, list) else []
    paths = [str(entry.get("module")) for entry in entries]
    if not paths or any(seen.grid(path) is None for path in paths):
        return []
    kept: dict[str, Any] = {}
    for path, entry in zip(paths, entries, strict=True):
        if "Pool" not in type(seen.modules[path]).__name__:
            kept.pop(path, None)
            kept[path] = (entry.get("reduction"), entry.get("num_chs", path))
    paths = list(kept)
    convolutions = [_convolutions(seen.modules[path]) for path in paths[:2]]
    if len(paths) > 2 and (_STEM.match(paths[0]) or convolutions[0] <= 1 < convolutions[1]):
        paths = paths[1:]
    return _ends([(path, kept[path]) for path in paths])


def _by_grid(net: nn.Module, seen: _Seen) -> list[str]:
    """The last of each grid among the outermost layers; a grid on which nothing has weights is a pooling's."""
    steps = [path for path in _outermost(net, "", seen) if seen.grid(path) is not None]
    sides: dict[int, list[str]] = {}
    for path in sorted(steps, key=lambda path: seen.ended[path]):
        sides.setdefault(seen.side(path), []).append(path)
    weighted = {
        side: paths for side, paths in sides.items() if any(list(seen.modules[path].parameters()) for path in paths)
    }
    if len(weighted) != 1:
        return [weighted[side][-1] for side in sorted(weighted, reverse=True)]
    ((_, paths),) = weighted.items()
    kinds = Counter(type(seen.modules[path]) for path in paths)
    alike, count = kinds.most_common(1)[0]
    return _ends([(p, None) for p in paths if count == 1 or type(seen.modules[p]) is alike])


def _ends(layers: list[tuple[str, Any]]) -> list[str]:
    """The last of each run of equals; of one run alone, the ends of its quarters."""
    kinds = [kind for _, kind in layers]
    if len(set(map(repr, kinds))) == 1:
        parts = min(QUARTERS, len(layers))
        return [layers[(number * len(layers)) // parts - 1][0] for number in range(1, parts + 1)]
    return [path for (path, kind), after in zip(layers, [*kinds[1:], object()], strict=True) if kind != after]


def _outermost(module: nn.Module, path: str, seen: _Seen) -> Iterator[str]:
    """The layers that a net is a chain of, as far out as their grids do not change inside."""
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if here not in seen.ended:
            yield from _outermost(child, here, seen)  # a list of layers, which itself does not run
            continue
        inner = [f"{here}.{part}" for part, _ in child.named_children()]
        grids = {grid[1] for one in inner if one in seen.ended and (grid := seen.grid(one)) is not None}
        if isinstance(child, nn.Sequential) and len(grids) > 1:
            yield from _outermost(child, here, seen)
        else:
            yield here


def _convolutions(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Conv2d) for part in module.modules())


def _classifier(net: nn.Module, seen: _Seen) -> str | None:
    """The linear layer or 1x1 convolution that gives the logits: what timm names, else the last of their width."""
    logits = seen.outputs.get("", ())
    if len(logits) != 2:
        return None
    found = [
        path
        for path in sorted(seen.ended, key=lambda path: seen.ended[path])
        if isinstance(seen.modules[path], nn.Linear | nn.Conv2d)
        and seen.outputs[path][1:] in (logits[1:], (*logits[1:], 1, 1))
        and path in seen.inputs
    ]
    named = net.get_classifier() if hasattr(net, "get_classifier") else None  # type: ignore[operator]
    first = next(iter(named), None) if isinstance(named, tuple | list | nn.ModuleList) else named
    if isinstance(first, nn.Module):
        inside = {id(part) for part in first.modules()}
        found = [path for path in found if id(seen.modules[path]) in inside] or found
    return found[-1] if found else None


def _unpooled(stages: Sequence[str], classifier: str, seen: _Seen) -> str | None:
    """The layer whose maps have the mean that the classifier reads: the last stage, else that of the largest grid."""
    if len(seen.inputs[classifier]) == 4:
        return f"{classifier}:input"
    read = seen.taken[classifier]
    scale = float(read.abs().max())
    alike = [
        path
        for path, mean in seen.given.items()
        if mean.shape == read.shape
        and seen.ended[path] < seen.called[classifier]
        and torch.allclose(mean, read, rtol=1e-4, atol=1e-5 * scale)
    ]
    if stages and names.layer(stages[-1]) in alike:
        return stages[-1]
    wide = [path for path in alike if seen.side(path) > 1]
    return seen.as_maps(max(wide, key=lambda path: (seen.side(path), seen.ended[path]))) if wide else None


def _classes(net: nn.Module, stages: Sequence[str], classifier: str, seen: _Seen) -> str | None:
    """The last stage's positions through all that stands before the logits, where that can be done at a position."""
    if not stages:
        return None
    last = names.layer(stages[-1])
    begin, end = seen.ended[last], seen.called[classifier]
    chain = []
    for path in sorted(seen.called, key=lambda path: seen.called[path]):
        module = seen.modules[path]
        own = bool(list(module.parameters(recurse=False))) or is_activation(module)
        if own and begin < seen.called[path] <= end:
            if not lays_over(module):
                return None
            chain.append(path)
    grid = seen.grid(last)
    if grid is None or len(chain) > HEAD:  # more are no head but further blocks, which may have shortcuts
        return None
    like = next(seen.modules[classifier].parameters())
    try:
        with torch.no_grad():
            found = over(like.new_zeros(1, grid[0], grid[1], grid[1]), [seen.modules[path] for path in chain])
    except InputError:
        return None
    if found.shape[1] != seen.outputs[""][1]:
        return None
    return f"{stages[-1]}{names.THROUGH}{'+'.join(chain)}"
