"""Channels that go together, found by torch-pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.compress.recurrent import Shell, shells, unit_touches
from kd.compress.sites import CONVS, MIXING, Site, Touch, first_tensor
from kd.errors import InputError

OUTPUTS = "it makes the outputs"


def library() -> Any:
    """torch-pruning, or a line that says how to get it.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise InputError("pruning channels needs torch-pruning: pip install 'kd[compress]'") from error
    return torch_pruning


def channel_sites(net: nn.Module, inputs: Tensor, apart: Sequence[str] = ()) -> tuple[list[Site], dict[str, str]]:
    """The groups of coupled channels and of recurrent units, without scores yet; and what stays whole, why.

    Args:
        net: is not changed.
        inputs: one sample, (1, …).
        apart: layers whose outputs another kind of site cuts.

    Raises:
        InputError: if torch-pruning is missing, or the net cannot be traced.
    """
    pruning = library()
    work = copy.deepcopy(net).eval().requires_grad_(True)
    paths: dict[int, str] = {id(module): path for path, module in work.named_modules()}
    paths |= {id(value): name for name, value in work.named_parameters()}
    with shells(work, _dealers(work, inputs)) as hidden, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths |= {id(shell): path for path, shell in hidden.items()}
        graph = pruning.DependencyGraph()
        ends: list[Any] = []

        def forward(model: nn.Module, images: Tensor) -> Tensor:
            output = first_tensor(model(images))
            ends.append(output.grad_fn)
            return output

        try:
            graph.build_dependency(
                work,
                inputs,
                forward_fn=forward,
                customized_pruners={Shell: _shell_pruner(pruning)},
                verbose=False,
            )
            groups = list(
                graph.get_all_groups(root_module_types=[pruning.ops.TORCH_CONV, pruning.ops.TORCH_LINEAR, Shell])
            )
        except Exception as error:  # whatever a net does that its tracing does not know
            raise InputError(
                f"torch-pruning cannot trace {type(net).__name__} ({type(error).__name__}: {error})"
            ) from error
    last = [node.module for node in graph.module2node.values() if node.grad_fn is ends[0]]
    found, whole = [], {}
    for group in groups:
        root = group[0].dep.target.module
        path = paths[id(root)]
        if path in apart or (isinstance(root, Shell) and not isinstance(root.inner, nn.RNNBase)):
            continue
        if any(item.dep.target.module is end for item in group for end in last if _outwards(graph, item)):
            whole[path] = OUTPUTS
            continue
        made = _site(graph, group, paths, path)
        if isinstance(made, str):
            whole[path] = made
            continue
        found.append(made)
    return found, whole


def _outwards(graph: Any, item: Any) -> bool:
    return bool(graph.is_out_channel_pruning_fn(item.dep.handler))


def _dealers(net: nn.Module, inputs: Tensor) -> list[str]:
    """Layers without parameters that put channels in another order, such as a channel shuffle: found by trying them."""
    found: list[str] = []
    handles = []
    for path, module in net.named_modules():
        plain = type(module).__module__.startswith("torch.nn.")
        if path and not plain and not [*module.children(), *module.parameters()]:

            def note(module: nn.Module, given: Any, output: Any, path: str = path) -> None:
                if not given or not isinstance(output, Tensor) or given[0].ndim < 2 or given[0].shape[1] < 2:
                    return
                if output.ndim != given[0].ndim or output.shape[1] != given[0].shape[1]:
                    return
                for channel in (0, 1, given[0].shape[1] - 2):
                    moved = given[0].clone()
                    moved[:, channel] += 1
                    apart = (type(module).forward(module, moved, *given[1:]) != output).flatten(2).any(dim=2)[0]
                    if apart.nonzero().flatten().tolist() not in ([], [channel]):
                        found.append(path)
                        return

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        net(inputs)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(found))


def _site(graph: Any, group: Any, paths: Mapping[int, str], path: str) -> Site | str:
    """A group as a site, or why it is none."""
    root = group[0].dep.target.module
    units = isinstance(root, Shell)
    width = int(graph.get_out_channels(root))
    joined = list(range(width))  # a forest: which of the root's channels can only go together

    def top(channel: int) -> int:
        while joined[channel] != channel:
            joined[channel] = joined[joined[channel]]
            channel = joined[channel]
        return channel

    places: dict[tuple[str, str], Tensor] = {}
    tag: list[str] = []
    for module, outwards, indices in _reached(graph, group):
        if isinstance(module, MIXING):
            return f"a {type(module).__name__} mixes its channels"
        if isinstance(module, nn.MultiheadAttention):
            return "a MultiheadAttention needs all of them"
        if isinstance(module, Shell) and (module is not root or not units):
            if not isinstance(module.inner, nn.RNNBase):
                return f"a {type(module.inner).__name__} deals its channels out anew"
            if outwards:
                return "a recurrent layer's units are coupled to it"
        if id(module) not in paths:  # an operation without parameters
            continue
        if any(channel is None for _, channel in indices):
            return "which of its channels meet cannot be told"
        side = _side(module, outwards, graph)
        place = (paths[id(module)], side)
        if place not in places:
            places[place] = torch.full((_length(module, side, graph),), -1, dtype=torch.int64)
            tag.append(f"{type(module).__name__}.{side}")
        owner = places[place]
        for index, channel in indices:
            assert channel is not None
            if owner[index] < 0:
                owner[index] = channel
            else:
                joined[top(channel)] = top(int(owner[index]))
        if side in ("in", "out") and getattr(module, "groups", 1) > 1:
            # The same places go in each group of a convolution.
            for place_in_group in owner.view(module.groups, -1).T.tolist():
                known = [channel for channel in place_in_group if channel >= 0]
                for channel in known[1:]:
                    joined[top(channel)] = top(known[0])
    if units:
        outputs = {place: owner for place, owner in places.items() if place != (path, "out")}
        return unit_touches(root.inner, path, outputs)
    tops = [top(channel) for channel in range(width)]
    number = {channel: slot for slot, channel in enumerate(dict.fromkeys(tops))}
    slot = torch.tensor([number[channel] for channel in tops] + [-1])
    touches = [Touch(place, side, slot[owner]) for (place, side), owner in places.items()]
    return Site(path, "channels", len(number), touches, sizes=slot[:-1].bincount(), tag=" ".join(tag))


def _reached(graph: Any, group: Any) -> list[tuple[Any, bool, list[tuple[int, int | None]]]]:
    """All that a group touches, again: its own list keeps one of the root's channels for each index, and all count.

    Each entry is a module, whether on its output side, and pairs of an index there and a channel of the root.
    """
    start = group[0].dep
    first: list[tuple[int, int | None]] = [(i, i) for i in range(int(graph.get_out_channels(start.target.module)))]
    found = [(start.target.module, True, first)]
    seen: set[tuple[int, int, tuple[tuple[int, int | None], ...]]] = set()
    open_: list[tuple[Any, Any, list[tuple[int, int | None]]]] = [(start.target, start.handler, [*first])]
    hybrid = library()._helpers._HybridIndex
    while open_:
        node, function, indices = open_.pop()
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(function):
                continue
            mapped = [hybrid(idx=index, root_idx=channel) for index, channel in indices]
            for mapping in dependency.index_mapping:
                mapped = mapped if mapping is None else mapping(mapped)
            pairs = [(entry.idx, entry.root_idx) for entry in mapped]
            place = (id(dependency.target), id(dependency.handler), tuple(sorted(pairs, key=str)))
            if not pairs or place in seen:
                continue
            seen.add(place)
            found.append((dependency.target.module, graph.is_out_channel_pruning_fn(dependency.handler), pairs))
            open_.append((dependency.target, dependency.handler, pairs))
    return found


def _side(module: Any, outwards: bool, graph: Any) -> str:
    if isinstance(module, nn.Parameter):
        return f"dim{graph.module2node[module].pruning_dim}"
    if isinstance(module, CONVS):
        if module.groups == module.out_channels and module.groups > 1:
            return "both"
        return "out" if outwards else "in"
    if isinstance(module, (nn.Linear, Shell)):
        return "out" if outwards else "in"
    return "both"


def _length(module: Any, side: str, graph: Any) -> int:
    if side.startswith("dim"):
        return int(module.shape[int(side[3:])])
    found = graph.get_in_channels(module) if side == "in" else graph.get_out_channels(module)
    return int(found)


def _shell_pruner(pruning: Any) -> Any:
    """What tells the graph how wide a recurrent layer is; the cutting is done elsewhere."""

    class Pruner(pruning.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
            return layer

        def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.widths[1])

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.widths[0])

    return Pruner()
