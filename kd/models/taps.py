"""Reading a net's layers while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd.compress.measure import looking
from kd.errors import InputError, nearest

POOLED = ":pooled"  # behind a layer's path in a view's name


class Taps:
    """Keeps the outputs of some layers of a forward pass until they are popped.

    Hooks are installed here and now: a hook that comes after the first call of a compiled net never fires. A copy of
    the net has taps of its own, so running it does not disturb these.

    Args:
        net: the plain net, inside any wrapper: paths are those of its `named_modules`.
        paths: of the layers to keep; with `:pooled` behind it, a layer's output becomes one vector a sample.

    Raises:
        InputError: if there is no layer of that path.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> taps = Taps(net, ["0"])
    >>> _ = net(torch.zeros(4, 2))
    >>> taps.pop()["0"].shape
    torch.Size([4, 3])
    """

    def __init__(self, net: nn.Module, paths: Iterable[str]) -> None:
        modules = dict(net.named_modules())
        self._taps: dict[str, _Tap] = {}
        self._handles: list[RemovableHandle] = []
        wanted = list(dict.fromkeys(paths))
        for path in map(_layer, wanted):
            if not path or path not in modules:
                raise InputError(
                    f"{path!r} is no layer of {type(net).__name__}"
                    f"{nearest(path, modules) or '; its layers begin with ' + _beginning(modules)}"
                )
        for path in wanted:
            self._taps[path] = _Tap(path)
            self._handles.append(modules[_layer(path)].register_forward_hook(self._taps[path]))

    def pop(self) -> dict[str, Tensor]:
        """Path to output of the last forward pass, which is let go of; a layer that ran twice gives its last.

        Raises:
            InputError: if a layer has not run since the last pop.
        """
        found: dict[str, Tensor] = {}
        silent: list[str] = []
        for path, tap in self._taps.items():
            if tap.output is None:
                silent.append(path)
            else:
                found[path], tap.output = tap.output, None
        if silent:
            raise InputError(f"the layer {silent[0]!r} was not run by the last forward pass; choose one that always is")
        return found

    def remove(self) -> None:
        """Take the hooks out of the net again."""
        for handle in self._handles:
            handle.remove()


def layers(net: nn.Module, shape: Sequence[int]) -> list[tuple[str, str, tuple[int, ...]]]:
    """All layers that can be tapped: path, class name, and shape of the output for a batch of one image.

    Args:
        net: the plain net, inside any wrapper.
        shape: of one image, (C, H, W).

    >>> for layer in layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), (1, 5, 5)):
    ...     print(*layer)
    0 Conv2d (1, 4, 3, 3)
    1 Flatten (1, 36)
    """
    found: dict[str, tuple[int, ...]] = {}
    handles = []
    for path, module in net.named_modules():

        def note(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            if (tensor := _first_tensor(output)) is not None:
                found[path] = tuple(tensor.shape)

        handles.append(module.register_forward_hook(note))
    first = next(net.parameters(), None)
    try:
        with looking(net):
            net(torch.zeros(1, *shape, device=first.device if first is not None else None))
    finally:
        for handle in handles:
            handle.remove()
    return [
        (path, type(module).__name__, found[path]) for path, module in net.named_modules() if path in found and path
    ]


class _Tap:
    """A hook that is an object, so that deepcopy gives a copied net a tap of its own."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.output: Tensor | None = None

    def __reduce__(self) -> tuple[type[_Tap], tuple[str]]:
        """A copy is empty: what is held belongs to a pass, and is part of a graph, which cannot be copied."""
        return _Tap, (self.path,)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is None:
            raise InputError(f"the layer {self.path!r} gives a {type(output).__name__}, which holds no tensor to tap")
        # A copy: an in-place activation after this layer would rewrite what was tapped.
        self.output = pooled(tensor) if self.path.endswith(POOLED) else tensor.clone()


def pooled(features: Tensor) -> Tensor:
    """One vector a sample: maps (N, C, H, W) averaged over both sides, tokens (N, L, D) over them, vectors as they are.

    Raises:
        InputError: if the features are of another rank.

    >>> pooled(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[2., 3.]])
    """
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    if features.ndim == 3:
        return features.mean(dim=1)
    if features.ndim != 2:
        raise InputError(f"features of shape {tuple(features.shape)} cannot be pooled to one vector a sample")
    return features.clone()


def _layer(path: str) -> str:
    return path.removesuffix(POOLED)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, tuple | list):
        return next((entry for entry in output if isinstance(entry, Tensor)), None)
    return output if isinstance(output, Tensor) else None


def _beginning(modules: Iterable[str]) -> str:
    """The outermost names, as a start for whoever guesses."""
    return ", ".join(dict.fromkeys(path.partition(".")[0] for path in modules if path))
