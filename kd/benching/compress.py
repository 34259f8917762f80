"""`kd bench compress`: what each way of making a network smaller does for its time and bytes, in interleaved rounds.

Weights are random, norms hold the statistics of the inputs: there is nothing here about accuracy.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kd.config import jobs
from kd.errors import InputError
from kd.pipeline.plan import plan
from kd.training.settings import Run

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kd.models import Normalised

BATCHES = (1, 64)
ZEROS = 0.9  # of the weights, in the row of single weights
TORCH, ORT = "torch", "ONNX Runtime"
# By the pipeline's own names, so that words change them: prune.amount=0.3, lowrank.of=macs.
BASE = ("pipeline=compress", "compress=[prune,lowrank]", "recover.fit.epochs=0", "run.wandb=disabled")


@dataclass(frozen=True)
class Way:
    """One row: a network in one runtime.

    Args:
        name: what was done to it.
        runtime: what runs it.
        run: its logits of normalised images.
        content: the file of it, or of its weights.
        net: what is counted; None where it is that of the row `float`.
        note: what has to be known beside the numbers.
    """

    name: str
    runtime: str
    run: Callable[[Any], Any]
    content: bytes
    net: nn.Module | None = None
    note: str = ""


@dataclass(frozen=True)
class Given:
    """A network as the stage that made it would give it."""

    net: Normalised

    def stand_in(self, inputs: Mapping[str, Any], room: Any) -> Normalised:
        """A copy."""
        import copy

        return copy.deepcopy(self.net)


def bench_compress(words: list[str], rounds: int, seconds: float = math.inf) -> tuple[dict[str, Any], Group]:
    """Milliseconds at batch 1 and 64, bytes, gzip'd bytes of the student, as it is and made smaller: as data and table.

    Args:
        words: overrides, e.g. `student.name=resnet18 data=cifar10 prune.amount=0.3`.
        rounds: of each batch size, in which each way runs once.
        seconds: of a batch size, after which no further round is begun, but for three.

    Raises:
        InputError: if a package is missing, or the network is one that a way cannot make smaller.
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from kd.compress.latency import interleaved
    from kd.compress.measure import cost, looking
    from kd.models import Normalised
    from kd.stages.base import Room
    from kd.stages.building import build

    config = jobs([*BASE, *words])[0][0].config
    nodes = {node.name: node.config for node in plan(config).nodes}
    missing = [name for name in ("student", "prune", "lowrank") if name not in nodes]
    if missing or nodes["prune"]["what"] != "channels":
        raise InputError(
            "kd bench compress takes student, prune (of channels, in one step) and lowrank of pipeline=compress: leave "
            "the words pipeline, compress, prune.what and prune.steps out"
        )
    data, run = nodes["student"]["data"], Run(**config["run"])
    room = Room(run, Path())
    shape = (int(data["channels"]), int(data["size"]), int(data["size"]))
    images = torch.randn((max(BATCHES), *shape), generator=torch.Generator().manual_seed(0))
    net = _alive(build(nodes["student"]["student"], data, None, 0, room), images)
    assert isinstance(net, Normalised)
    ways, left_out = _ways(net, nodes, shape, images, room)
    found: dict[str, dict[str, Any]] = {}
    console = Console(stderr=True)
    for batch in track(BATCHES, "measuring", console=console, transient=True, disable=not console.is_terminal):
        with torch.no_grad():
            passes = {f"{way.name}, {way.runtime}": partial(way.run, images[:batch].clone()) for way in ways}
            found[f"batch{batch}"] = interleaved(passes, rounds, seconds)
    counted: dict[str, Any] = {}
    for way in ways:
        if way.net is not None and way.name not in counted:
            with looking(way.net):
                counted[way.name] = cost(way.net, shape, latency=False)
    rows = [_row(way, found, counted.get(way.name) or counted["float"]) for way in ways]
    said = {
        "network": nodes["student"]["student"]["name"],
        "data": data["name"],
        "shape": list(shape),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "rows": rows,
        "left_out": left_out,
    }
    return said, _table(said)


def _alive(made: Normalised, images: torch.Tensor) -> Normalised:
    """The network with norms as training leaves them: scales of 0, as some begin, would be folded away."""
    from kd.compress.sites import drawn

    made.net = drawn(made.net, images).float().eval()
    return made


def _ways(
    net: Normalised, nodes: Mapping[str, Any], shape: tuple[int, ...], images: torch.Tensor, room: Any
) -> tuple[list[Way], dict[str, str]]:
    """All ways, and why those that cannot be are left out."""
    from kd.stages import LowRank, Prune

    prune, lowrank = nodes["prune"], nodes["lowrank"]
    sparse = Prune.settled({**prune, "what": "weights", "amount": ZEROS, "by": "magnitude", "scope": "global"})
    zeros = "gzip alone sees a zero"
    steps: dict[str, tuple[Any, str]] = {
        f"channels less {prune['amount']:.0%} of {prune['of']}": (Prune(**prune), ""),
        f"{ZEROS:.0%} of weights 0": (Prune(**sparse), zeros),
        f"low rank, {_share(lowrank)}": (LowRank(**lowrank), ""),
    }
    left_out: dict[str, str] = {}
    ways = _floats("float", net.net, shape)
    ways.append(_file("float, once more", net.net, shape, note="the same again: what is noise"))
    for how in ("static", "dynamic"):
        try:
            ways.append(_integers(how, net.net, shape, images))
        except InputError as error:
            left_out[f"{how} int8"] = str(error)
    for name, (stage, note) in steps.items():
        try:
            ways += _floats(name, stage.stand_in({"model": Given(net)}, room).net, shape, note)
        except InputError as error:
            left_out[name] = str(error)
    return ways, left_out


def _share(lowrank: Mapping[str, Any]) -> str:
    if lowrank["budget"] is None:
        return f"{lowrank['energy']:.0%} of energy"
    return f"{lowrank['budget']:.0%} of {lowrank['of']}"


def _floats(name: str, net: nn.Module, shape: tuple[int, ...], note: str = "") -> list[Way]:
    """A network in torch and as a file."""
    from safetensors.torch import save

    content = save({key: value.contiguous() for key, value in net.state_dict().items()})
    return [Way(name, TORCH, net.eval(), content, net, note), _file(name, net, shape, note)]


def _file(name: str, net: nn.Module, shape: tuple[int, ...], note: str = "") -> Way:
    import torch

    from kd.compress.export import answer, session, to_onnx

    content = to_onnx(net, shape)[0].SerializeToString(deterministic=True)
    return Way(name, ORT, partial(answer, session(content, torch.get_num_threads())), content, None, note)


def _integers(how: str, net: nn.Module, shape: tuple[int, ...], images: torch.Tensor) -> Way:
    """A file of integers, its ranges found on the images.

    Raises:
        InputError: if no layer can be quantised so.
    """
    import copy

    import torch

    from kd.compress.export import answer, session, to_onnx
    from kd.compress.folding import fold, pairs
    from kd.compress.integers import to_integers
    from kd.compress.quantize import begin, candidates, finish, ranges_of

    plain = copy.deepcopy(net)
    fold(plain, pairs(plain, images))
    layers, others = candidates(plain, how)
    ranges = ranges_of(plain, layers, [images])
    able: dict[str, tuple[float, float] | None] = {path: ranges[path] for path in layers if path in ranges}
    if not able:
        raise InputError(
            f"there is no layer to quantise: {'; '.join(f'{p}: {w}' for p, w in list(others.items())[:3])}"
        )
    begin(plain, how, 8, None, able)
    change = {"kind": "quantized", "how": how, "bits": 8, "block": None, "layers": finish(plain)}
    model, places = to_onnx(plain, shape)
    content = to_integers(model, places, plain, change, [images])[0].SerializeToString(deterministic=True)
    every = sum(1 for _ in candidates(net, "static")[0])
    note = f"{len(able)} of {every} layers" if how == "dynamic" else ""
    opened = session(content, torch.get_num_threads(), unpack=how != "static")
    return Way(f"{how} int8", ORT, partial(answer, opened), content, None, note)


def _row(way: Way, found: Mapping[str, Mapping[str, Any]], counted: Mapping[str, Any]) -> dict[str, Any]:
    """One way's numbers: times beside those of the network as it was in the same runtime, bytes, what is left of it."""
    row: dict[str, Any] = {"way": way.name, "runtime": way.runtime}
    for batch, timed in found.items():
        mine, base = timed[f"{way.name}, {way.runtime}"], timed[f"float, {way.runtime}"]
        row[f"ms_{batch}"] = mine
        row[f"faster_{batch}"] = base["median"] / mine["median"]
    row |= {"bytes": len(way.content), "gzip_bytes": len(gzip.compress(way.content, 6, mtime=0))}
    row |= {name: counted[name] for name in ("parameters", "nonzero", "macs")}
    return row | {"note": way.note}


def _table(said: Mapping[str, Any]) -> Group:
    table = Table(box=None, header_style="bold", pad_edge=False)
    names = ("way", "runs in", "ms (batch 1)", "", "ms (batch 64)", "", "bytes", "gzip bytes", "parameters", "MACs", "")
    for at, name in enumerate(names):
        table.add_column(name, justify="left" if at in (0, 1, len(names) - 1) else "right", no_wrap=at < 2)
    for row in said["rows"]:
        cells = [row["way"], row["runtime"]]
        for batch in BATCHES:
            timed = row[f"ms_batch{batch}"]
            spread = f"{timed['median']:.3g} ({timed['low']:.3g} to {timed['high']:.3g})"
            cells += [spread, f"{row[f'faster_batch{batch}']:.2f}x"]
        cells += [f"{row[name]:,}" for name in ("bytes", "gzip_bytes", "nonzero", "macs")]
        table.add_row(*map(Text, [*cells, row["note"]]))
    size = "x".join(map(str, said["shape"]))
    head = f"{said['network']} of {said['data']}, {size}, random weights: time and bytes, nothing on accuracy"
    tail = (
        f"medians and quartiles of {said['rounds']} interleaved rounds on {said['threads']} "
        f"thread{'s' if said['threads'] > 1 else ''}; x: faster than float in the same runtime; parameters: those that "
        "are not 0; MACs: dense"
    )
    left = [Text(f"left out: {name}: {why}") for name, why in said["left_out"].items()]
    return Group(Text(head), table, *left, Text(tail, style="dim"))
