"""`kd bench loss`: what each loss of `conf/loss` costs beside plain KL of as many numbers; rounds, medians, ratios."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from kd.config import conf_dir, jobs
from kd.errors import InputError, nearest
from kd.listing import listing
from kd.names import layer
from kd.training.settings import Run

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SHAPES = ("256x100", "256x1000", "2048x50257", "64xmaps")
TARGET = 3.0  # of plain KL's time, for a loss on the response at 1000 classes
ROWS = 50_000  # samples of the split, for a loss that remembers them
CLASSES = 100  # beside layers
BRANCHES = 3  # of one network
LARGE = 2**22  # logits from which a fraction of the rows is looked at first
# (channels, height, width) of a layer of the student and of the teacher: two stages, of which the deeper is the last.
STAGES = (((64, 16, 16), (128, 8, 8)), ((128, 16, 16), (256, 8, 8)))
PARTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "middle": ((64, 16, 16), (256, 8, 8)),
    "last": ((64, 16, 16), (256, 8, 8)),
    "classes": ((CLASSES, 8, 8), (CLASSES, 8, 8)),
    "embedding": ((64,), (256,)),
    "feature": ((16, 4, 4), (16, 4, 4)),
}
NOTES = {
    "mlkd": "at each of five temperatures a KL and five products of all samples with all, of N²C multiplications each",
    "uskd": "ranks all classes, as long as the KL; half a KL is the weak classifier that it trains on 16 channels",
    "top_k_kl": "finds the 64 likeliest of all classes",
    "jsd": "two KLs against a mixture that is made in logarithms",
    "crd": "16384 negatives a sample, out of memories of 50000",
    "wcord": "crd, and fifty rounds of scaling the plan between all samples of the batch",
    "rkd": "angles of any three samples",
    "diito": "without the two passes that it asks for: `kd bench step loss=[ce,kd,diito]` counts them",
}


@dataclass
class Case:
    """A loss with what it is given; `leaves` are the student's tensors, which get the gradient."""

    name: str
    loss: nn.Module
    given: dict[str, Any]
    leaves: list[Tensor]

    def step(self) -> None:
        """Value and gradient, of which nothing is left."""
        self.loss(**self.given).backward()
        for tensor in (*self.leaves, *self.loss.parameters()):
            tensor.grad = None

    @property
    def inputs(self) -> int:
        """Bytes of all that the loss is given."""
        return sum(tensor.nbytes for tensor in _tensors(self.given))


def bench_losses(
    words: Sequence[str],
    shapes: Sequence[str] = SHAPES,
    rounds: int = 7,
    memory: float = 8.0,
    seconds: float = 20.0,
    dtype: str = "float32",
) -> tuple[list[dict[str, Any]], Group]:
    """Time and most memory of value and gradient, beside plain KL of as many numbers, as data and as tables.

    On a processor it is the processor's own time in one thread, which other work on the machine does not lengthen.

    Args:
        words: names of losses, all by default, and overrides such as `temperature=2`.
        shapes: of the logits, as `256x1000` or `8x1024x50257` (tokens), or `64xmaps` for losses on layers, of 64
            samples. The KL beside a loss on layers is that of the student's layers as rows of logits.
        rounds: of all losses, one after the other; a warm-up comes before.
        memory: GiB that a loss may hold, its inputs included; what would need more is skipped.
        seconds: what would take longer for once is skipped.
        dtype: of logits and layers: float32 or bfloat16.

    Raises:
        InputError: if a loss, a shape or a type is none.
    """
    import torch

    from kd.training.memory import keep_memory

    keep_memory()
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: give float32 or bfloat16")
    overrides = [word for word in words if "=" in word]
    families = {row["name"]: row["family"] for row in listing("loss")}
    names = [word for word in words if "=" not in word] or list(families)
    for name in names:
        if name not in families:
            raise InputError(f"{name!r} is no loss{nearest(name, families)} (`kd list loss` names them)")
    sizes = [_size(shape) for shape in shapes]
    rows, tables = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shape, size in zip(shapes, sizes, strict=True):
            bench = _Bench(names, families, overrides, getattr(torch, dtype), memory, seconds)
            found = bench.measure(shape, size, rounds)
            rows += found
            tables.append(_table(found, f"{shape}, {dtype}, {bench.device.type}"))
    finally:
        torch.set_num_threads(threads)
    return rows, Group(*tables)


def _size(shape: str) -> tuple[int, ...]:
    """256x1000 as numbers; of maps the samples alone."""
    found = re.fullmatch(r"(\d+)x(?:maps|(\d+)(?:x(\d+))?)", shape)
    size = tuple(int(number) for number in found.groups() if number) if found else ()
    if not size or min(size) < 2:
        raise InputError(f"--shape {shape}: give logits as 256x1000, tokens as 8x1024x50257, or 64xmaps; 2 up")
    return size


class _Bench:
    """What stays the same for all losses at one shape."""

    def __init__(
        self,
        names: Sequence[str],
        families: Mapping[str, str],
        overrides: Sequence[str],
        dtype: torch.dtype,
        memory: float,
        seconds: float,
    ) -> None:
        from kd.training.trainer import device_of

        self.names, self.families, self.dtype = names, families, dtype
        self.overrides, self.memory, self.seconds = list(overrides), memory * 2**30, seconds
        self.device = device_of(Run(**jobs(["run.wandb=disabled", *overrides])[0][0].config["run"]))
        self.made: dict[tuple[str, tuple[int, ...], int], Tensor] = {}  # all losses are given the same
        self.clock: Callable[[], float] = time.process_time if self.device.type == "cpu" else _waited

    def measure(self, shape: str, size: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
        from rich.console import Console
        from rich.progress import track

        from kd.benching.memory import peak_bytes

        terms = self._terms(size)
        on_layers = len(size) == 1
        rows: list[dict[str, Any]] = []
        cases: dict[str, Case] = {}
        plain: dict[str, Case] = {}
        for name in self.names:
            if _on_logits(terms[name]) == on_layers:
                continue
            row: dict[str, Any] = {"loss": name, "family": self.families[name], "shape": shape}
            rows.append(row)
            build = partial(self._case, name, terms[name])
            try:
                cases[name] = self._within(build, size)
            except InputError as error:
                row["skipped"] = str(error)
                continue
            try:
                plain[name] = self._within(lambda size, build=build: self._plain(build(size)), size)  # type: ignore[misc]
            except InputError as error:
                row["no_ratio"] = f"kd itself {error}"
        sides = {name: [case, *([plain[name]] if name in plain else [])] for name, case in cases.items()}
        repeats = {name: [self._repeats(case) for case in both] for name, both in sides.items()}
        seconds: dict[str, list[list[float]]] = {name: [] for name in cases}
        order = [name for _ in range(rounds) for name in cases]
        console = Console(stderr=True)
        for name in track(order, "measuring", console=console, transient=True, disable=not console.is_terminal):
            pairs = zip(sides[name], repeats[name], strict=True)
            seconds[name].append([self._timed(case, times) for case, times in pairs])
        for row in rows:
            if (name := row["loss"]) in cases:
                held = [peak_bytes(case.step, self.device) for case in sides[name]]
                row |= _compared(seconds[name], held) | {"inputs": cases[name].inputs}
        return rows

    def _terms(self, size: tuple[int, ...]) -> dict[str, Any]:
        """Each loss's term as a config describes it."""
        from omegaconf import OmegaConf

        words = [f"loss=[{','.join(self.names)}]", f"fit.batch_size={size[0]}"]
        for name in self.names:
            node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "loss" / f"{name}.yaml"), resolve=False)
            assert isinstance(node, dict)
            for role in ("student", "teacher", "feature"):
                if node[name].get(role) == "???":
                    words.append(f"loss.{name}.{role}={'teacher' if role == 'teacher' else 'student'}.logits")
        terms: dict[str, Any] = jobs([*words, *self.overrides])[0][0].config["loss"]
        return terms

    def _case(self, name: str, term: Mapping[str, Any], size: tuple[int, ...]) -> Case:
        """The loss, bound to tensors of the shapes that its views have at a size."""
        import torch

        from kd.instantiate import instantiate
        from kd.models import Frozen

        torch.manual_seed(0)
        loss = instantiate(term["loss"])
        given = {
            role: self._view(role, term[role], size)
            for role in ("student", "teacher", "feature", "target", "row")
            if term.get(role) is not None
        }
        if term.get("part") is not None:  # the teacher's classifier, which reads its first view or the mean of its maps
            width = _tensors(given["teacher"])[0].shape[1]
            loss.lend(Frozen(torch.nn.Linear(width, _logits(size)[-1]), through=True))
        if hasattr(loss, "bind"):
            shapes = {role: _shapes(value) for role, value in given.items() if role != "target"}
            loss.bind(*((ROWS,) if role == "row" else shape for role, shape in shapes.items()))
        leaves = [tensor for tensor in _tensors(given) if tensor.requires_grad]
        return Case(name, loss.to(self.device), given, leaves)

    def _view(self, role: str, views: Any, size: tuple[int, ...]) -> Any:
        import torch

        if role == "row":
            return torch.arange(size[0], device=self.device)
        if role == "target":
            tokens, classes = _logits(size)[:-1], _logits(size)[-1]
            return torch.arange(math.prod(tokens), device=self.device).reshape(tokens) % classes
        several = not isinstance(views, str)
        shapes = [shape for view in (views if several else [views]) for shape in _layers(role, view, size)]
        made = [self._made(role, shape, shapes[:at].count(shape)) for at, shape in enumerate(shapes)]
        return made if several or len(made) > 1 else made[0]

    def _made(self, role: str, shape: tuple[int, ...], number: int = 0) -> Tensor:
        """The numbers of a role, drawn row by row, so that no second copy is made on the way to half precision.

        Those of one shape that a loss is given together, as branches are, differ by their number.
        """
        import torch

        key = role, shape, number
        if key not in self.made:
            generator = torch.Generator(self.device).manual_seed(len(role) + 100 * number)
            made = torch.empty(shape, device=self.device, dtype=self.dtype)
            for row in made:
                row.copy_(3 * torch.randn(row.shape, generator=generator, device=self.device))
            # The teacher is frozen; the gradient of a feature goes on into the student.
            self.made[key] = made.requires_grad_(role != "teacher")
        return self.made[key]

    def _plain(self, case: Case) -> Case:
        """The plain KL of as many numbers as the student's views have; of the same logits where they are logits."""
        import torch

        from kd.losses.logits import SoftTargetKL

        student, teacher = (_tensors(case.given.get(role)) for role in ("student", "teacher"))
        leaf = torch.cat([_as_rows(tensor) for tensor in student], dim=1).requires_grad_()
        same = len(teacher) == 1 and teacher[0].shape == student[0].shape
        other = _as_rows(teacher[0]) if same else self._made("teacher", tuple(leaf.shape))
        return Case("kd", SoftTargetKL(4.0), {"student": leaf, "teacher": other}, [leaf])

    def _within(self, build: Callable[[tuple[int, ...]], Case], size: tuple[int, ...]) -> Case:
        """The case, unless a look at a few of its rows says that the whole would need too much.

        Raises:
            InputError: if it would, or the loss does not take the shape.
        """
        if math.prod(size) >= LARGE:
            at = 0 if len(size) == 2 else 1
            looks = [self._looked(build(_fraction(size, at, parts))) for parts in (16, 8)]
            # What grows with the square of the rows grows fourfold from one look to the next, and so on.
            held, took = (b * (max(b / max(a, 1e-9), 1.0)) ** 3 for a, b in zip(*looks, strict=True))
            if held > self.memory:
                raise InputError(f"needs some {held / 2**30:.1f} GiB; --memory is {self.memory / 2**30:g}")
            if took > self.seconds:
                raise InputError(f"takes some {took:.0f} s; --seconds is {self.seconds:g}")
        try:
            case = build(size)
            case.step()
        except (RuntimeError, MemoryError) as error:
            raise InputError(f"cannot: {' '.join(str(error).split())[:90]}") from error
        return case

    def _looked(self, case: Case) -> tuple[float, float]:
        from kd.benching.memory import peak_bytes

        return peak_bytes(case.step, self.device) + case.inputs, min(self._timed(case, 1) for _ in range(2))

    def _repeats(self, case: Case) -> int:
        """How many steps take a few hundredths of a second, so that the clock is no part of it."""
        return max(1, math.ceil(0.03 / max(self._timed(case, 1), 1e-6)))

    def _timed(self, case: Case, repeats: int) -> float:
        """Seconds a step."""
        started = self.clock()
        for _ in range(repeats):
            case.step()
        return (self.clock() - started) / repeats


def _waited() -> float:
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def _on_logits(term: Mapping[str, Any]) -> bool:
    return term["student"] in ("student.logits", "student.branches")


def _fraction(size: tuple[int, ...], at: int, parts: int) -> tuple[int, ...]:
    return tuple(max(2, length // parts) if place == at else length for place, length in enumerate(size))


def _logits(size: tuple[int, ...]) -> tuple[int, ...]:
    return size if len(size) > 1 else (*size, CLASSES)


def _layers(role: str, view: str, size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of what a view names: logits, or layers of two nets of the usual widths."""
    side, _, name = view.partition(".")
    place = 0 if side == "student" else 1
    if layer(name) in ("logits", "ensemble"):
        return [_logits(size)]
    if layer(name) == "branches":
        return [_logits(size)] * BRANCHES
    if layer(name) in ("stages", "preactivations"):
        return [(size[0], *stage) for stage in STAGES[place]]
    part = "feature" if role == "feature" else layer(name) if layer(name) in PARTS else "last"
    return [(size[0], *PARTS[part][place])]


def _tensors(given: Any) -> list[Tensor]:
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [tensor for value in given.values() for tensor in _tensors(value)]
    return list(given) if isinstance(given, list) else [given]


def _as_rows(tensor: Tensor) -> Tensor:
    """A layer as one vector a sample, tokens as so many rows of logits."""
    return tensor.detach().flatten(0, 1) if tensor.ndim == 3 else tensor.detach().flatten(1)


def _shapes(given: Any) -> Any:
    return [tuple(tensor.shape) for tensor in given] if isinstance(given, list) else tuple(given.shape)


def _compared(rounds: list[list[float]], held: list[int]) -> dict[str, Any]:
    """Round by round, a loss and the KL right after it: what slows the machine for a moment slows both."""
    found: dict[str, Any] = {"seconds": median(ours for ours, *_ in rounds), "bytes": held[0]}
    if len(held) > 1:
        found |= {"ratio": median(ours / plain for ours, plain in rounds), "bytes_ratio": held[0] / held[1]}
    return found


def _table(rows: list[dict[str, Any]], where: str) -> Table:
    said = f"; target: {TARGET:g} of kd's time for the family response" if "x1000," in where else ""
    table = Table(title=f"{where}{said}", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in ("loss", "family", "ms", "of kd", "MiB held", "of kd", "with inputs", ""):
        table.add_column(column, justify="left" if column in ("loss", "family", "") else "right")
    for row in rows:
        if "skipped" in row:
            table.add_row(row["loss"], row["family"], *5 * [""], f"skipped: {row['skipped']}")
            continue
        table.add_row(
            row["loss"],
            row["family"],
            f"{1e3 * row['seconds']:.2f}",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['bytes_ratio']:.2f}" if "ratio" in row else "",
            f"{(row['bytes'] + row['inputs']) / 2**20:.1f}",
            row.get("no_ratio", NOTES.get(row["loss"], "")),
        )
    return table
