"""Running a net again with some channels of a layer as they were for another sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd import names
from kd.errors import InputError
from kd.models.taps import Layout, _first_tensor, channels_axis


@contextmanager
def exchanged(net: nn.Module, given: Mapping[str, tuple[Tensor, Sequence[int] | Tensor]]) -> Iterator[None]:
    """Put channels into layers in each pass inside; the hooks are gone afterwards, and so are changes of buffers.

    What is put in comes before any tap reads the layer. Statistics of batch norms stay as they were: such a pass is of
    inputs that do not exist.

    Args:
        net: the plain net, inside any wrapper; call it uncompiled, for a compiled one does not see new hooks.
        given: path of a layer, with `:input` for what it is given, to a tensor of the shape of its output, and the
            channels that are taken from it.

    Raises:
        InputError: in a pass, if a layer gives another shape.

    >>> net = nn.Sequential(nn.Identity(), nn.Flatten())
    >>> with exchanged(net, {"0": (torch.ones(1, 3), [2])}):
    ...     net(torch.zeros(1, 3))
    tensor([[0., 0., 1.]])
    >>> net(torch.zeros(1, 3))
    tensor([[0., 0., 0.]])
    """
    modules, layout = dict(net.named_modules()), Layout.of(net)
    with ExitStack() as stack:
        stack.enter_context(_aside(net))
        for path, (source, channels) in given.items():
            put = _Put(path, source, torch.as_tensor(channels, device=source.device), layout)
            module = modules[names.layer(path)]
            if names.suffix(path).startswith(names.INPUT):
                handle = module.register_forward_pre_hook(put.given, prepend=True)
            else:
                handle = module.register_forward_hook(put.made, prepend=True)
            stack.callback(handle.remove)
        yield


def width(features: Tensor, layout: Layout) -> int:
    """How many channels features have.

    >>> width(torch.zeros(2, 5, 192), Layout(1, False)), width(torch.zeros(2, 64, 8, 8), Layout(None, False))
    (192, 64)
    """
    return features.shape[_axis(features, layout)]


class _Put:
    """One layer's exchange, as hooks."""

    def __init__(self, path: str, source: Tensor, channels: Tensor, layout: Layout) -> None:
        self.path, self.source = path, source
        axis = _axis(source, layout)
        taken = torch.zeros(source.shape[axis], dtype=torch.bool, device=source.device)
        taken[channels] = True
        self.taken = taken.view([-1 if place == axis else 1 for place in range(source.ndim)])

    def made(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._mixed(output)

    def given(self, module: nn.Module, args: Any) -> Any:
        return self._mixed(args)

    def _mixed(self, values: Any) -> Any:
        """The first tensor with the channels of the source's; what stands beside it stays."""
        tensor = _first_tensor(values)
        if tensor is None or tensor.shape != self.source.shape:
            said = "no tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise InputError(
                f"the layer {self.path!r} gave {tuple(self.source.shape)} before, and {said} in the pass of an "
                "interchange; choose a layer that runs once in each pass"
            )
        mixed = torch.where(self.taken, self.source.to(tensor.dtype), tensor)
        if isinstance(values, Tensor):
            return mixed
        place = next(index for index, value in enumerate(values) if value is tensor)
        return type(values)([*values[:place], mixed, *values[place + 1 :]])


@contextmanager
def _aside(net: nn.Module) -> Iterator[None]:
    """Passes inside write into copies of the buffers."""
    kept = [(module, dict(module._buffers)) for module in net.modules() if module.training and module._buffers]
    try:
        for module, buffers in kept:
            module._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


def _axis(features: Tensor, layout: Layout) -> int:
    if features.ndim == 4:
        return channels_axis(features.shape, layout)
    if features.ndim not in (2, 3):
        raise InputError(f"features of shape {tuple(features.shape)} have no channels to exchange")
    return features.ndim - 1
