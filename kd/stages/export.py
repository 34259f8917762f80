"""The stage that writes a network as a file, and judges the file by running it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.errors import InputError, KDError
from kd.stages.base import Config, Room, Stage
from kd.store import Artifact
from kd.training.settings import one_of, require

if TYPE_CHECKING:
    import torch

    from kd.data import Splits
    from kd.models import Normalised

FORMATS = ("onnx", "pt2", "pte")
CLOSE = 1e-4  # of logits in float, or of the largest of them where that is above 1


@dataclass(frozen=True)
class Export:
    """Write a network as a file.

    Args:
        data: the data set: the file is judged on its whole test split.
        format: `onnx`; `pt2`, a program of torch; or `pte`, one of ExecuTorch.
        margin: of accuracy on test that a file with integers may lose against torch.
        names: of what is within an ONNX file: `full` or `short`.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {"names": "full"}
    PHASE: ClassVar[str] = "file"

    data: Config
    format: str
    margin: float
    names: str

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Every field counts, but names where the format has none to choose.

        Raises:
            InputError: at a value out of range.
        """
        one_of("export.format", config["format"], FORMATS)
        margin = config["margin"]
        number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
        require(number and 0 <= margin < 1, "export.margin", margin, "from 0 to 1")
        one_of("export.names", config["names"], ("full", "short"))
        return {**config, "names": config["names"] if config["format"] == "onnx" else "full"}

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Soft labels say nothing of a file."""
        return {"labels": "a file hears no teacher"} if "labels" in inputs else {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Write a stand-in with weights that mean nothing.

        Raises:
            InputError: if a package is missing, or the network does something that the exporter lacks.
        """
        from kd.compress import edge
        from kd.compress.export import needs

        if self.format != "pt2":
            needs(*((edge.NEEDS, "edge") if self.format == "pte" else ()))
        net = room.stand_in(inputs["model"])
        # What is written depends on the layers and their shapes alone, and these stand in the text.
        room.once(("export", self.format, repr(net.net), repr(self._shape)), lambda: self._tried(net, room))

    @property
    def _shape(self) -> tuple[int, int, int]:
        return int(self.data["channels"]), int(self.data["size"]), int(self.data["size"])

    def _tried(self, net: Normalised, room: Room) -> bool:
        import tempfile

        import torch

        from kd.compress.edge import to_pte
        from kd.compress.export import to_onnx, to_pt2
        from kd.compress.quantize import described

        try:
            with tempfile.TemporaryDirectory() as folder:
                if self.format == "onnx":
                    to_onnx(net.net, self._shape)
                elif self.format == "pt2":
                    to_pt2(net.net, self._shape, Path(folder) / "model.pt2")
                else:
                    blank = torch.zeros(2, *self._shape)
                    to_pte(net.net, self._shape, Path(folder) / "model.pte", described(net.net), [blank])
        except KDError as error:
            raise InputError(str(error)) from error
        return True

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Write, run the file on validation and the whole test split, compare with torch, time.

        Raises:
            KDError: if the file does not do what the network does.
        """
        from kd.compress.measure import cost, file_bytes
        from kd.compress.quantize import quantised
        from kd.compress.shipping import PREPROCESSING, SCRIPT, preprocessing, script
        from kd.models import load, recipe_of, weights_digest
        from kd.stages.splits import data_print, load_data
        from kd.training.loggers import loggers, summarise

        splits = load_data(self.data, room)
        source = inputs["model"]
        recipe, net = recipe_of(source.path), load(source.path)
        change = quantised(recipe.get("structure", []))
        path = out / f"model.{self.format}"
        if self.format == "pt2":
            made = self._pt2(net, change, path)
        elif self.format == "pte":
            made = self._pte(net, change, splits, path, room)
        else:
            made = self._onnx(net, change, splits, path, room)
        for line in made.said:
            room.tell({"event": "say", "line": f"{room.stage}: {line}"})
        metrics, told = self._judged(net, made, splits, room)
        sizes = file_bytes(path)
        costs = {**cost(net.net, self._shape, latency=False), **sizes}
        beside: dict[str, Any] = {}
        if "teacher" in inputs:
            theirs, beside = self._beside(inputs["teacher"], room.work / f"teacher.{self.format}")
            told |= {f"teacher_{name}": value for name, value in theirs.items()}
        timings = self._timed(net, made, beside) if room.run.latency else {}
        for batch, found in timings.items():
            now, before = found["runtime"]["median"], found.get("runtime_float", {}).get("median")
            costs[f"latency_ms_{batch}"] = now
            if before is not None and now > before:
                count = batch.removeprefix("batch")
                line = f"a batch of {count} takes {now:.3g} ms with integers and {before:.3g} ms in float: no gain here"
                room.tell({"event": "say", "line": f"{room.stage}: {line}"})
        unpack = bool(change and change["how"] != "static" and self.format == "onnx")
        given = preprocessing(recipe, self.data.get("side"), unpack)
        (out / PREPROCESSING).write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
        (out / SCRIPT).write_text(script(self.format), encoding="utf-8")
        with loggers(
            room.run, key=room.key, stage=room.stage, document=room.document, dials=room.dials, sweep=room.sweep
        ) as sinks:
            summarise(sinks, {**metrics, **{f"cost/{name}": value for name, value in costs.items()}}, 0)
        return {
            "metrics": metrics,
            "cost": costs,
            "weights": weights_digest(net.net),
            "export": told,
            **({"latency": timings} if timings else {}),
            "said": made.said,
            "fingerprints": {"data": data_print(self.data, room)},
        }

    def _onnx(self, net: Normalised, change: Mapping[str, Any] | None, splits: Splits, path: Path, room: Room) -> Made:
        import torch

        from kd.compress.export import OPSET, answer, session, shortened, to_onnx, told
        from kd.compress.integers import to_integers

        threads = torch.get_num_threads()
        model, places = to_onnx(net.net, self._shape)
        exact = session(model.SerializeToString(), threads)
        said: list[str] = []
        opened = exact
        if change is not None:
            batches = self._samples(net, change, splits, room)
            model, said = to_integers(model, places, net.net, change, batches)
        if self.names == "short":
            model = shortened(model)
        path.write_bytes(model.SerializeToString(deterministic=True))
        if change is not None or self.names == "short":
            opened = session(path, threads, unpack=change is not None and change["how"] != "static")
        about = {"format": "onnx", "opset": OPSET, "nodes": dict(told(model))}
        return Made(
            lambda images: answer(opened, images),
            (lambda images: answer(exact, images)) if change is not None else None,
            about,
            said,
        )

    def _samples(
        self, net: Normalised, change: Mapping[str, Any], splits: Splits, room: Room
    ) -> Iterator[torch.Tensor]:
        """The samples that the network's ranges were found on, as it takes them, 64 at a time."""
        import torch

        from kd.stages.splits import taken
        from kd.training.loaders import EpochLoader

        split = taken(splits, int(change["samples"]), int(change["seed"]))
        device = torch.device("cpu")
        for batch in EpochLoader(split, 64, size=int(self.data["size"]), device=device, workers=room.run.workers):
            yield (batch["image"] - net.mean) / net.std

    def _pte(self, net: Normalised, change: Mapping[str, Any] | None, splits: Splits, path: Path, room: Room) -> Made:
        from kd.compress.edge import program, to_pte

        batches = () if change is None else self._samples(net, change, splits, room)
        to_pte(net.net, self._shape, path, change, batches)
        return Made(program(path), None, {"format": "pte"}, [], change is not None)

    def _pt2(self, net: Normalised, change: Mapping[str, Any] | None, path: Path) -> Made:
        import torch

        from kd.compress.export import to_pt2

        to_pt2(net.net, self._shape, path)
        program = torch.export.load(path).module()
        said = []
        if change is not None and change["how"] != "weights":
            said = ["torch makes numbers of the integers at each pass: this file is smaller, and not faster"]
        return Made(lambda images: program(images), None, {"format": "pt2"}, said, bool(change))

    def _judged(self, net: Normalised, made: Made, splits: Splits, room: Room) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metrics of the file, and how they compare with torch's over the whole test split."""
        import torch

        from kd.compress.quantize import only
        from kd.tasks.image import evaluate
        from kd.training.trainer import evaluation_loader

        net.cpu().eval()
        integers = made.exact is not None or made.integers
        metrics: dict[str, Any] = {}
        for name, split in (("val", splits.validation), ("test", splits.test)):
            loader = evaluation_loader(split, int(self.data["size"]), room.run, torch.device("cpu"))
            columns: dict[str, list[torch.Tensor]] = {}
            with torch.no_grad():
                for i, batch in enumerate(loader):
                    images = (batch["image"] - net.mean) / net.std
                    found = {"file": made.answer(images), "torch": net.net(images)}
                    if made.exact is not None:
                        found["file in float"] = made.exact(images)
                        with only(net.net, []):
                            found["torch in float"] = net.net(images)
                    for role, logits in found.items():
                        columns.setdefault(role, []).append(logits.float())
                    room.tell({"event": "pass", "step": i + 1, "total": len(loader)})
            logits = {role: torch.cat(parts) for role, parts in columns.items()}
            targets = split.targets.cpu()
            other = logits["torch"] if name == "test" else None
            metrics |= {f"{name}/{k}": v for k, v in evaluate(logits["file"], targets, other).items()}
        theirs = float(evaluate(logits["torch"], targets)["accuracy"])  # type: ignore[arg-type]
        told = {
            **made.about,
            "agreement": metrics["test/agreement"],
            "torch_accuracy": theirs,
            "difference": float((logits["file"] - logits["torch"]).abs().max()),
        }
        if made.exact is not None:
            told["difference_in_float"] = _close(logits["file in float"], logits["torch in float"])
        elif not integers:
            _close(logits["file"], logits["torch"])
        lost = theirs - metrics["test/accuracy"]
        if integers and lost > self.margin:
            raise KDError(
                f"the file's accuracy on test is {metrics['test/accuracy']:.4f} and torch's {theirs:.4f}: more is lost "
                f"than export.margin={self.margin}, so it is not stored; keep layers in float (quantize.keep, "
                "quantize.tolerance), or raise the margin"
            )
        return metrics, told

    def _beside(self, teacher: Artifact, path: Path) -> tuple[dict[str, int], dict[str, Any]]:
        """The teacher written by the same exporter: its sizes, and how it runs, in the file and in torch."""
        import torch

        from kd.compress.edge import program, to_pte
        from kd.compress.export import answer, session, to_onnx, to_pt2
        from kd.compress.measure import file_bytes
        from kd.compress.quantize import strip
        from kd.models import load

        net = strip(load(teacher.path).net).eval()
        if self.format == "onnx":
            path.write_bytes(to_onnx(net, self._shape)[0].SerializeToString(deterministic=True))
            opened = session(path, torch.get_num_threads())
            run: Callable[[torch.Tensor], Any] = partial(answer, opened)
        elif self.format == "pt2":
            to_pt2(net, self._shape, path)
            run = torch.export.load(path).module()
        else:
            to_pte(net, self._shape, path, None)
            run = program(path)
        return file_bytes(path), {"teacher_runtime": run, "teacher_torch": net}

    def _timed(self, net: Normalised, made: Made, beside: Mapping[str, Any]) -> dict[str, Any]:
        """Milliseconds of the file and of torch, beside the teacher's, in turns: by batch, then by what ran."""
        import torch

        from kd.compress.latency import interleaved
        from kd.compress.quantize import strip

        runs: dict[str, Callable[[torch.Tensor], Any]] = {"runtime": made.answer, "torch": strip(net.net).eval()}
        runs |= {} if made.exact is None else {"runtime_float": made.exact}
        runs |= beside
        found: dict[str, Any] = {}
        for batch in (1, 64):
            images = torch.linspace(-1, 1, batch * int(torch.Size(self._shape).numel())).reshape(batch, *self._shape)
            with torch.no_grad():
                found[f"batch{batch}"] = interleaved({name: partial(run, images) for name, run in runs.items()})
        return found


@dataclass(frozen=True)
class Made:
    """A file, running.

    Args:
        answer: its logits for normalised images.
        exact: those of the same network's file in float, where this one has integers.
        about: its part of the card.
        said: what could not be as asked.
        integers: whether there are some in it though there is no file in float beside it.
    """

    answer: Callable[[torch.Tensor], torch.Tensor]
    exact: Callable[[torch.Tensor], torch.Tensor] | None
    about: dict[str, Any]
    said: list[str]
    integers: bool = False


def _close(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits.

    Raises:
        KDError: if it is more than rounding makes.
    """
    worst, scale = float((found - expected).abs().max()), max(1.0, float(expected.abs().max()))
    if not worst <= CLOSE * scale:
        raise KDError(
            f"the file's logits differ from torch's by {worst:.3g} on test, where rounding makes {CLOSE * scale:.1g}: "
            "the exporter wrote another network, so nothing is stored"
        )
    return worst
