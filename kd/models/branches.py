"""One net as several: a trunk that all share, and its last stages as many times as there are branches, with a gate.

Lan, Zhu and Gong, "Knowledge Distillation by On-the-Fly Native Ensemble" (2018); Lan1991Xu/ONE_NeurIPS2018,
models/cifar/resnet.py. A branch is all that runs behind a layer of a net, whatever the net: the rest of it is blanked
out, and whether the end alone gives what the whole net gives is tried before it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd import names
from kd.compress.measure import looking
from kd.compress.structure import replace as put
from kd.errors import InputError
from kd.models.outline import Outline, outline
from kd.models.taps import pooled

NET, BRANCHES, ENSEMBLE = "net", "branches", "ensemble"  # names inside a `Branched`


def trunk_of(net: nn.Module, shape: Sequence[int], at: str | None = None) -> str:
    """The path of the layer that a net is branched behind.

    Args:
        net: the plain net.
        shape: of one image, (C, H, W).
        at: the last layer that all branches share: a stage, such as `stage1`, or a path. None: the last stage but one.

    Raises:
        InputError: if there is no such layer, or no stage before the last.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    >>> trunk_of(net, (1, 8, 8))
    '0'
    """
    found = outline(net, shape)
    if at is None:
        if len(found.stages) < 2:
            raise InputError(
                f"{type(net).__name__} cannot be branched: it has {len(found.stages)} stages, and all but the last are "
                "shared; name the last shared layer, e.g. one.at=conv2"
            )
        return names.layer(found.stages[-2])
    if names.part(at) is not None:
        parts = found.find(at)
        if len(parts) != 1 or names.INPUT in parts[0]:
            raise InputError(f"one.at={at} is no single layer; name a stage, e.g. stage1")
        return names.layer(parts[0])
    if at not in dict(net.named_modules()) or not at:
        raise InputError(f"one.at={at!r} is no layer of {type(net).__name__}; `kd list layers` names those there are")
    return at


class Tail(nn.Module):
    """What a net does behind one of its layers, as a module of that layer's output.

    Args:
        net: the plain net; a copy is made, in which all before the layer is blank.
        at: path of the layer.
        shape: of one image, (C, H, W).

    Raises:
        InputError: if what stands behind the layer needs more of the image than the layer gives, or cannot run alone.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> Tail(net, "1", (1, 8, 8))(torch.zeros(2, 4, 6, 6)).shape
    torch.Size([2, 10])
    """

    def __init__(self, net: nn.Module, at: str, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.given = _Given()
        seen = _Order(net, at, self.shape)
        self.net = copy.deepcopy(net)
        try:
            for path in seen.before:
                put(self.net, path, _Blank(seen.shapes[path], self.given))
            put(self.net, at, self.given)
            self.own = self._tried(net, seen)
        except InputError as error:
            raise InputError(f"{type(net).__name__} cannot be branched behind {at!r}: {error}") from error
        except Exception as error:  # a net may look into any of its layers
            line = (str(error).splitlines() or [""])[0]
            said = f"what comes after needs what comes before ({type(error).__name__}: {line})"
            raise InputError(f"{type(net).__name__} cannot be branched behind {at!r}: {said}") from error
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name in self.own and parameter.requires_grad)

    def forward(self, trunk: Tensor) -> Tensor:
        """Logits (N, C) of the layer's output for N images."""
        self.given.value = trunk
        try:
            images = trunk.new_zeros((1, *self.shape)).expand(len(trunk), -1, -1, -1)
            logits: Tensor = self.net(images)
        finally:
            self.given.value = None
        return logits

    def _tried(self, net: nn.Module, seen: _Order) -> set[str]:
        """The names of what is its own, once it is seen to give what the whole net gives."""
        found: dict[str, Tensor] = {}
        handles = []
        for path in seen.after:
            module = self.net.get_submodule(path)
            handles.append(module.register_forward_hook(_keeper(found, path)))
        try:
            with looking(self.net), torch.enable_grad():
                logits = self(seen.trunk)
                weights = [(n, p) for n, p in self.net.named_parameters() if p.requires_grad]
                slopes = torch.autograd.grad(logits.sum(), [p for _, p in weights], allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for path, value in {**seen.outputs, "": seen.logits}.items():
            got = found.get(path) if path else logits
            if got is None or got.shape != value.shape or not torch.allclose(got, value, rtol=1e-4, atol=1e-5):
                raise InputError("what comes after reads more of the image than that layer's output")
        own = {name for (name, _), slope in zip(weights, slopes, strict=True) if slope is not None}
        for path in seen.after:
            own |= {f"{path}.{name}" for name, _ in net.get_submodule(path).named_buffers(recurse=False)}
        return own


class Gate(nn.Module):
    """The share of each branch in the ensemble of a sample: pooled features, linear, batch norm, ReLU, softmax.

    Args:
        width: of the trunk's features.
        count: of branches.

    >>> Gate(4, 3)(torch.rand(8, 4, 2, 2)).shape
    torch.Size([8, 3])
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, count), nn.BatchNorm1d(count), nn.ReLU())

    def forward(self, trunk: Tensor) -> Tensor:
        """Shares (N, count), which add up to 1, of maps (N, D, H, W), tokens (N, L, D) or vectors."""
        shares: Tensor = self.body(pooled(trunk)).softmax(dim=1)
        return shares


class Branched(nn.Module):
    """A net with further branches beside its own end; it gives the logits of one of them.

    What each branch says can be tapped as `branches.0`, `branches.1`, …, and what the gate makes of them as `ensemble`:
    the sum of their logits by the gate's shares. Paths of the net's own layers begin with `net.`.

    Args:
        nets: plain nets of one architecture; all of the first, and of the others what stands behind the layer.
        at: path of the last layer that they share.
        shape: of one image, (C, H, W).
        shipped: the branch whose logits it gives, from 1.

    Raises:
        InputError: if a net cannot be branched there.

    >>> nets = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)) for _ in range(3)]
    >>> net = Branched(nets, "1", (1, 8, 8)).eval()
    >>> net(torch.zeros(2, 1, 8, 8)).shape, net.every(torch.zeros(2, 1, 8, 8)).shape
    (torch.Size([2, 10]), torch.Size([2, 4, 10]))
    """

    def __init__(self, nets: Sequence[nn.Module], at: str, shape: Sequence[int], shipped: int = 1) -> None:
        super().__init__()
        self.net, self.at, self.shipped = nets[0], at, shipped
        tails = [Tail(net, at, shape) for net in nets[1:]]
        if tails:
            self.others = nn.ModuleList(tails)
        self.gate = Gate(pooled(_Order(nets[0], at, shape).trunk).shape[1], len(nets))
        self.branches = nn.ModuleList(nn.Identity() for _ in nets)
        self.ensemble = nn.Identity()
        self._trunk: Tensor | None = None
        self._hook = self.net.get_submodule(at).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._trunk = output.clone()  # an in-place activation behind it would rewrite it

    def every(self, images: Tensor) -> Tensor:
        """The logits (N, branches + 1, C) of each branch, and last of the ensemble."""
        first = self.net(images)
        trunk, self._trunk = self._trunk, None
        assert trunk is not None
        said = [first, *(tail(trunk) for tail in self.others)]
        said = [name(logits) for name, logits in zip(self.branches, said, strict=True)]
        shares = self.gate(trunk)
        together = self.ensemble((torch.stack(said, dim=1) * shares[:, :, None]).sum(dim=1))
        return torch.stack([*said, together], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """The logits (N, C) of the branch that is shipped."""
        return self.every(images)[:, self.shipped - 1]

    def outlined(self, shape: Sequence[int], chosen: Sequence[str] | None = None) -> Outline:
        """The parts of the net, as `outline` has them, and beside them the branches and the ensemble."""
        found = outline(self.net, shape, chosen)

        def inside(paths: Sequence[str]) -> tuple[str, ...]:
            return tuple(_inside(path) for path in paths)

        classifier, embedding, classes, unpooled = (
            None if path is None else _inside(path)
            for path in (found.classifier, found.embedding, found.classes, found.unpooled)
        )
        return replace(
            found,
            stages=inside(found.stages),
            preactivations=inside(found.preactivations),
            branches=tuple(f"{BRANCHES}.{number}" for number in range(len(self.branches))),
            ensemble=ENSEMBLE,
            classifier=classifier,
            embedding=embedding,
            classes=classes,
            unpooled=unpooled,
        )

    def plain(self, which: int) -> nn.Module:
        """The net with one branch as its end, as if there were no others; this module is of no use afterwards.

        Args:
            which: branch, from 1.
        """
        if which > 1:
            tail = self.others[which - 2]
            assert isinstance(tail, Tail)
            state = {name: value for name, value in tail.net.state_dict().items() if name in tail.own}
            self.net.load_state_dict(state, strict=False)
        self._hook.remove()
        return self.net


class Every(nn.Module):
    """A `Branched` that gives what all of its branches and the ensemble say, as `Branched.every`."""

    def __init__(self, net: Branched) -> None:
        super().__init__()
        self.inner = net

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, branches + 1, C)."""
        return self.inner.every(images)


def _inside(path: str) -> str:
    """A name of a layer of the net as one of what stands around it, the layers it goes through with it."""
    steps = names.steps(path)
    text = f"{NET}.{names.layer(path)}"
    for step, named in steps:
        text += f":{step}" + (":" + "+".join(f"{NET}.{one}" for one in named.split("+")) if step == "through" else "")
    return text


class _Given(nn.Module):
    """Stands where a layer stood, and gives what it is told to."""

    value: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.value = None

    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        if self.value is None:
            raise InputError("a branch runs on the output of the trunk alone")
        return self.value


class _Blank(nn.Module):
    """Stands where a layer stood whose output nobody needs, and gives zeros of its shape."""

    def __init__(self, shape: Sequence[int], given: _Given) -> None:
        super().__init__()
        self.shape, self._given = tuple(shape), [given]  # in a list: not a part of this one

    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        value = self._given[0].value
        assert value is not None
        first, *rest = self.shape
        return value.new_zeros((1, *rest)).expand(first * len(value), *rest)


class _Order:
    """One pass through a net: what ran before a layer, what after, and what these gave.

    Args:
        net: the plain net; left as it was found.
        at: path of the layer.
        shape: of one image.

    Raises:
        InputError: if the layer does not run once, or gives no tensor.
    """

    def __init__(self, net: nn.Module, at: str, shape: Sequence[int]) -> None:
        self.trunk = torch.empty(0)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.outputs: dict[str, Tensor] = {}
        called: dict[str, list[int]] = {}
        ended: dict[str, int] = {}
        whole: dict[str, Any] = {}
        clock, handles = iter(range(10**9)), []

        def before(module: nn.Module, args: Any, path: str) -> None:
            called.setdefault(path, []).append(next(clock))

        def after(module: nn.Module, args: Any, output: Any, path: str) -> None:
            ended[path] = next(clock)
            whole[path] = output.clone() if isinstance(output, Tensor) else None

        for path, module in net.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: before(m, a, path)))
            handles.append(module.register_forward_hook(lambda m, a, o, path=path: after(m, a, o, path)))
        first = next(net.parameters())
        # A ramp: another value at each place, and no mean of 0, without asking a generator.
        image = torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=first.dtype, device=first.device).reshape(shape)
        try:
            with looking(net):
                self.logits: Tensor = net(image[None])
        finally:
            for handle in handles:
                handle.remove()
        if len(called.get(at, ())) != 1 or whole.get(at) is None:
            raise InputError(
                f"{type(net).__name__} cannot be branched behind {at!r}: "
                + ("it gives no single tensor" if len(called.get(at, ())) == 1 else "it does not run just once")
            )
        self.trunk = whole[at]
        self.after = [p for p in called if p and called[p][-1] > ended[at]]
        early = [p for p in ended if p and ended[p] < called[at][0] and whole[p] is not None]
        self.before = [p for p in early if not any(p.startswith(f"{other}.") for other in early)]
        self.shapes = {p: tuple(whole[p].shape) for p in self.before}
        self.outputs = {p: whole[p] for p in self.after if whole[p] is not None}


def _keeper(found: dict[str, Tensor], path: str) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found[path] = output.clone()

    return keep
