"""What a net costs: parameters, multiply-accumulates, bytes, milliseconds."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn
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
    blank = hollow(net)
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.get_default_dtype())
    counter = FlopCounterMode(display=False)
    with looking(blank), counter:
        blank(torch.empty(1, *shape, dtype=dtype, device="meta"))
    return int(counter.get_total_flops()) // 2


def hollow(net: nn.Module) -> nn.Module:
    """A copy of a net without data, on the device `meta`: it takes neither time nor memory, and knows all shapes.

    >>> hollow(nn.Linear(3, 5))(torch.empty(2, 3, device="meta")).shape
    torch.Size([2, 5])
    """
    # What deepcopy finds in its memo it takes as it is: parameters and buffers are replaced, not copied first.
    blank: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in net.parameters()
    }
    blank |= {id(b): torch.empty_like(b, device="meta") for b in net.buffers()}
    return copy.deepcopy(net, blank)


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
    """A net's price: `parameters`, `macs` of one sample, `bytes` on disk, `latency_ms_batch1`, `latency_ms_batch64`.

    Args:
        net: any module of one input; left as it was found.
        shape: of one sample, such as (C, H, W).
        latency: whether to measure time; without, its two keys are missing.
        repeats: timed passes a batch size, at most.
        seconds: limit on the timed passes of a batch size.

    >>> cost(nn.Linear(3, 5), (3,), latency=False)
    {'parameters': 20, 'macs': 15, 'bytes': 208}
    """
    found: Cost = {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "macs": macs(net, shape),
        "bytes": stored_bytes(net),
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
