"""Reading a net's layers while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd import names
from kd.compress.measure import looking
from kd.errors import InputError, nearest
from kd.models.positions import over

STEPS = ("input", "output", "maps", "pooled", "through")  # what may stand behind a path


class Taps:
    """Keeps the outputs of some layers of a forward pass until they are popped.

    Hooks are installed here and now: a hook that comes after the first call of a compiled net never fires. A copy of
    the net has taps of its own, so running it does not disturb these.

    Args:
        net: the plain net, inside any wrapper: paths are those of its `named_modules`.
        paths: of the layers to keep. Behind a path may stand `:input`, for what the layer is given; `:maps`, for tokens
            laid on their grid; `:pooled`, for one vector a sample; `:through:a+b`, for what the layers `a` and `b` make
            of each position; or several of them, done from left to right. A mapping gives each the
            name under which it is popped.

    Raises:
        InputError: if there is no layer of that path, or no such thing to do with it.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> taps = Taps(net, ["0"])
    >>> _ = net(torch.zeros(4, 2))
    >>> taps.pop()["0"].shape
    torch.Size([4, 3])
    """

    def __init__(self, net: nn.Module, paths: Iterable[str] | Mapping[str, str]) -> None:
        modules = dict(net.named_modules())
        self._taps: dict[str, _Tap] = {}
        self._handles: list[RemovableHandle] = []
        called = dict(paths) if isinstance(paths, Mapping) else {path: path for path in paths}
        wanted = {name: _plan(path, modules, net) for name, path in called.items()}
        for name, steps in wanted.items():
            self._taps[name] = tap = _Tap(called[name], steps, Layout.of(net))
            module = modules[names.layer(called[name])]
            if tap.reads_input:
                self._handles.append(module.register_forward_pre_hook(tap))
            else:
                self._handles.append(module.register_forward_hook(tap))

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

    def clear(self) -> None:
        """Let go of what is held, whether or not all layers ran."""
        for tap in self._taps.values():
            tap.output = None

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


@dataclass(frozen=True)
class Layout:
    """How a net lays its features out, where shapes do not say it.

    Args:
        prefix: tokens before those of the image, such as a class token; None where the net does not tell.
        channels_last: whether its maps are (N, H, W, C).

    >>> Layout.of(nn.Identity())
    Layout(prefix=None, channels_last=False)
    """

    prefix: int | None
    channels_last: bool

    @classmethod
    def of(cls, net: nn.Module) -> Layout:
        """The layout of a net by timm's attributes."""
        prefix = getattr(net, "num_prefix_tokens", None)
        return cls(prefix if isinstance(prefix, int) else None, getattr(net, "output_fmt", None) == "NHWC")


def laid(features: Tensor, layout: Layout) -> Tensor:
    """Features as maps (N, C, H, W): tokens (N, L, D) on their square grid, channels before positions.

    Args:
        features: tokens, or maps of square images, with the channels anywhere.
        layout: of the net that they come from.

    Raises:
        InputError: if they are neither, or the tokens fill no square.

    >>> laid(torch.zeros(2, 5, 3), Layout(prefix=1, channels_last=False)).shape
    torch.Size([2, 3, 2, 2])
    """
    shape = tuple(features.shape)
    if features.ndim == 4:
        if channels_axis(shape, layout) == 1:
            return features.clone()
        return features.permute(0, 3, 1, 2).contiguous()
    side = square(shape, layout)
    if side is None:
        raise InputError(f"features of shape {shape} cannot be laid on a grid; tokens (N, L, D) of a square were meant")
    return features[:, shape[1] - side * side :].transpose(1, 2).reshape(shape[0], shape[2], side, side)


def channels_axis(shape: Sequence[int], layout: Layout) -> int:
    """The axis of the channels of maps of shape (N, C, H, W) or (N, H, W, C); positions make a square.

    >>> channels_axis((1, 7, 7, 96), Layout(None, False)), channels_axis((1, 7, 7, 7), Layout(None, False))
    (3, 1)
    """
    return 3 if shape[1] == shape[2] and (shape[2] != shape[3] or layout.channels_last) else 1


def square(shape: Sequence[int], layout: Layout) -> int | None:
    """The side of the square that tokens of shape (N, L, D) fill, or None.

    >>> [square((1, tokens, 192), Layout(1, False)) for tokens in (197, 196, 7)]
    [14, 14, None]
    """
    if len(shape) != 3:
        return None
    # Some nets add their class token only behind the last blocks.
    for prefix in (layout.prefix, 0) if layout.prefix is not None else (0, 1, 2):
        side = math.isqrt(max(shape[1] - prefix, 0))
        if side and side * side == shape[1] - prefix:
            return side
    return None


class _Tap:
    """A hook that is an object, so that deepcopy gives a copied net a tap of its own."""

    def __init__(self, path: str, steps: Sequence[tuple[str, tuple[nn.Module, ...]]], layout: Layout) -> None:
        self.path, self.steps, self.layout = path, tuple(steps), layout
        self.reads_input = bool(steps) and steps[0][0] == "input"
        self.output: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is empty: what is held belongs to a pass, and is part of a graph, which cannot be copied."""
        return _Tap, (self.path, self.steps, self.layout)

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        given = args if self.reads_input else output
        tensor = _first_tensor(given)
        if tensor is None:
            verb = "is given" if self.reads_input else "gives"
            raise InputError(f"the layer {self.path!r} {verb} a {type(given).__name__}, which holds no tensor to tap")
        done = [entry for entry in self.steps if entry[0] not in ("input", "output")]
        if not done or done[0][0] != "pooled":  # which makes a new tensor itself
            # A copy: an in-place activation after this layer would rewrite what was tapped.
            tensor = tensor.clone()
        for step, modules in done:
            if step == "maps":
                tensor = laid(tensor, self.layout)
            elif step == "pooled":
                tensor = pooled(tensor)
            elif step == "through":
                tensor = over(tensor, modules)
        self.output = tensor


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


def _plan(path: str, modules: Mapping[str, nn.Module], net: nn.Module) -> list[tuple[str, tuple[nn.Module, ...]]]:
    """What is done to a layer's output, with the layers it goes through."""
    steps = names.steps(path)
    through = [layer for step, named in steps for layer in named.split("+") if step == "through"]
    for wanted in (names.layer(path), *through):
        if not wanted or wanted not in modules:
            raise InputError(
                f"{wanted!r} is no layer of {type(net).__name__}"
                f"{nearest(wanted, modules) or '; its layers begin with ' + _beginning(modules)}"
            )
    for place, (step, _) in enumerate(steps):
        if step not in STEPS:
            raise InputError(f"{path!r}: nothing is called ':{step}'{nearest(step, STEPS)}")
        if step in ("input", "output") and place:
            raise InputError(f"{path!r}: ':{step}' must stand right behind the layer")
    return [(step, tuple(modules[layer] for layer in named.split("+") if layer)) for step, named in steps]


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, tuple | list):
        return next((entry for entry in output if isinstance(entry, Tensor)), None)
    return output if isinstance(output, Tensor) else None


def _beginning(modules: Iterable[str]) -> str:
    """The outermost names, as a start for whoever guesses."""
    return ", ".join(dict.fromkeys(path.partition(".")[0] for path in modules if path))
