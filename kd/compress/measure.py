"""What a net costs: parameters, multiply-accumulates, bytes, milliseconds."""

from __future__ import annotations

import copy
import gzip
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Cost = dict[str, int | float]
BATCHES = (1, 64)
WARM_UP = 3  # passes before the first that counts: memory is taken and kernels are chosen in them


@contextmanager
def looking(net: nn.Module) -> Iterator[None]:
    """Forward passes that leave no trace: eval mode, no gradient, the generators and each module's mode put back.

    >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with looking(net):
    ...     net.training
    False
    >>> net.training, net[1].training
    (True, False)
    """
    modes = {module: module.training for module in net.modules()}
    cuda = [parameter.device for parameter in net.parameters() if parameter.is_cuda][:1]
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        net.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def macs(net: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulates of one sample's forward pass, as torch's flop counter finds them: products only.

    Counted on a copy without data, so a large net takes neither time nor memory.

    Args:
        net: any module of one input.
        shape: of one sample, such as (C, H, W).

    >>> macs(nn.Linear(3, 5), (3,))
    15
    """
    blank, images = hollow(net), _nothing(net, shape)
    counter = FlopCounterMode(display=False)
    with looking(blank), counter:
        blank(images)
    return int(counter.get_total_flops()) // 2


def hollow(net: nn.Module) -> nn.Module:
    """A copy of a net without data, on the device `meta`: it takes neither time nor memory, and knows all shapes.

    Quantised layers compute in float there.

    >>> hollow(nn.Linear(3, 5))(torch.empty(2, 3, device="meta")).shape
    torch.Size([2, 5])
    """
    # What deepcopy finds in its memo it takes as it is: parameters and buffers are replaced, not copied first.
    blank: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in net.parameters()
    }
    blank |= {id(b): torch.empty_like(b, device="meta") for b in net.buffers()}
    empty = copy.deepcopy(net, blank)
    for module in empty.modules():
        if "quant" in vars(module):
            module.quant.active = False  # type: ignore[union-attr]
    return empty


def _nothing(net: nn.Module, shape: Sequence[int]) -> Tensor:
    """One sample without data, in the net's own precision."""
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return torch.empty(1, *shape, dtype=dtype, device="meta")


def watched(
    net: nn.Module,
    shape: Sequence[int],
    which: Callable[[nn.Module], bool],
    note: Callable[[str, Any, Any, Any], None],
) -> None:
    """Show what goes into some modules and comes out of them, for one sample, on a copy without data.

    Args:
        net: any module of one input.
        shape: of one sample, such as (C, H, W).
        which: modules are of interest.
        note: is called with the path, the module, its inputs as a tuple and its output, in the order that they run.

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    >>> def note(path, module, inputs, output): print(path, tuple(inputs[0].shape), tuple(output.shape))
    >>> watched(net, (3,), lambda module: isinstance(module, nn.Linear), note)
    0 (1, 3) (1, 5)
    """
    blank = hollow(net)
    for path, module in blank.named_modules():
        if which(module):
            module.register_forward_hook(lambda module, inputs, output, path=path: note(path, module, inputs, output))
    with looking(blank):
        blank(_nothing(net, shape))


def activation_bytes(net: nn.Module, shape: Sequence[int]) -> int:
    """The most bytes that the tensors of one sample's pass hold at a time: its input and all that is made, no weights.

    Counted on a copy without data, so neither a device nor its allocator has a part in it.

    Args:
        net: any module of one input.
        shape: of one sample, such as (C, H, W).

    >>> activation_bytes(nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 4)), (2,))  # 2 + 8 + 4 numbers
    56
    """
    empty, images = hollow(net), _nothing(net, shape)
    held = Storages()
    held.note(images, made=True)
    with looking(empty), held:
        empty(images)
    return held.peak


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations made and that something still refers to, each once.

    `now` are there, and `peak` were at the most.

    >>> with Storages() as held:
    ...     kept = (torch.zeros(10) + 1).view(2, 5) * 2
    >>> held.now, held.peak
    (40, 80)
    """

    def __init__(self) -> None:
        """Nothing is counted yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation: what it is given was there before, what it gives and was not yet seen it made."""
        for value in tree_leaves((args, kwargs)):
            self.note(value, made=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self.note(value, made=True)
        return result

    def note(self, value: Any, made: bool) -> None:
        """See a tensor's storage; where it is for the first time, count it if it was made."""
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        place, size = storage._cdata, storage.nbytes() if made else 0
        if place in self.seen:
            return

        def gone(_: object) -> None:
            self.now -= size
            self.seen.pop(place, None)

        self.seen[place] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def stored_bytes(net: nn.Module) -> int:
    """Size of the safetensors file that the net's state makes.

    A wrapper that holds no state but that of its `net` counts as that net, which is what is stored.

    >>> stored_bytes(nn.Linear(1, 1)) > 8
    True
    """
    state = net.state_dict()
    if all(name.startswith("net.") for name in state):
        state = {name.removeprefix("net."): value for name, value in state.items()}
    return len(serialise({name: value.contiguous() for name, value in state.items()}))


def file_bytes(path: Path) -> dict[str, int]:
    """Size of a file, and of what gzip makes of it: zeros cost bytes until something packs them."""
    content = path.read_bytes()
    return {"bytes": len(content), "gzip_bytes": len(gzip.compress(content, 6, mtime=0))}


def milliseconds(net: nn.Module, shape: Sequence[int], batch: int, repeats: int = 30, seconds: float = 3.0) -> float:
    """Median milliseconds of a forward pass on the net's own device, after a warm-up.

    Args:
        net: any module of one input.
        shape: of one sample, such as (C, H, W).
        batch: samples a pass.
        repeats: passes that count, at most.
        seconds: no further pass is begun after this long, but for three.

    >>> milliseconds(nn.Linear(3, 5), (3,), batch=1) > 0
    True
    """
    first = next(net.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    dtype = first.dtype if first is not None else torch.get_default_dtype()
    # A ramp: values as an image has them, without asking a generator.
    inputs = torch.linspace(0, 1, batch * int(torch.Size(shape).numel()), dtype=dtype, device=device)
    inputs = inputs.reshape(batch, *shape)
    with looking(net):
        for _ in range(WARM_UP):
            _timed(net, inputs)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < repeats and (len(times) < 3 or time.perf_counter() < end):
            times.append(_timed(net, inputs))
    return 1000 * statistics.median(times)


def cost(net: nn.Module, shape: Sequence[int], latency: bool = True, repeats: int = 30, seconds: float = 3.0) -> Cost:
    """A net's price: what it holds, computes and takes.

    `parameters`, and of them `nonzero`; `macs` and `activation_bytes` of one sample; `bytes` of its file of weights;
    `latency_ms_batch1`, `latency_ms_batch64`.

    Args:
        net: any module of one input; left as it was found.
        shape: of one sample, such as (C, H, W).
        latency: whether to measure time; without, its two keys are missing.
        repeats: timed passes a batch size, at most.
        seconds: limit on the timed passes of a batch size.

    >>> cost(nn.Linear(3, 5), (3,), latency=False)
    {'parameters': 20, 'nonzero': 20, 'macs': 15, 'bytes': 208, 'activation_bytes': 32}
    """
    found: Cost = {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "nonzero": sum(int(parameter.count_nonzero()) for parameter in net.parameters()),
        "macs": macs(net, shape),
        "bytes": stored_bytes(net),
        "activation_bytes": activation_bytes(net, shape),
    }
    if latency:
        found |= {f"latency_ms_batch{batch}": milliseconds(net, shape, batch, repeats, seconds) for batch in BATCHES}
    return found


def _timed(net: nn.Module, inputs: Tensor) -> float:
    """Seconds of one pass; a GPU is waited for before and after."""
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)
    start = time.perf_counter()
    net(inputs)
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)
    return time.perf_counter() - start
