"""The stage that lets a network compute with integers: by calibration, or trained to under the network as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.errors import InputError
from kd.stages.base import Config, Room, Stage
from kd.stages.compress import _compressed, _mark, _paths
from kd.stages.image import FIT_SINCE
from kd.store import Artifact
from kd.training.settings import one_of, require

if TYPE_CHECKING:
    import torch

    from kd.data import Split, Splits
    from kd.models import Normalised

HOWS, RANGES = ("static", "dynamic", "weights"), ("minmax", "percentile")
LEAST = 16  # samples: the range of a layer over fewer says little
BATCH = 64  # samples a pass of calibration
BLOCKS = (16, 32, 64, 128, 256)  # that ONNX Runtime's kernels know


@dataclass(frozen=True)
class Quantize:
    """Let a network compute with integers; its layers stay the modules they are.

    Args:
        data: the data set: what ranges are found on, and what is measured.
        objective: what it is trained under; the input `teacher`, else the network as it was, is the teacher.
        fit: the schedule; None: nothing is trained.
        seed: of the samples drawn and of the training.
        how: `static`, weights and activations; `dynamic`, linear and recurrent layers, whose activations' range is
            each batch's own; `weights`, weights alone.
        bits: of a weight.
        block: inputs of a linear layer that share a step, for `weights` of 4 bits.
        samples: of the training split.
        ranges: `minmax` or `percentile`.
        keep: layers that stay in float.
        tolerance: a layer that alone costs more validation accuracy stays in float.
        sensitivity: whether the card says what each layer costs alone.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {**FIT_SINCE}
    PHASE: ClassVar[str] = "numbers"

    data: Config
    objective: Config
    fit: Config | None
    seed: int
    how: str
    bits: int
    block: int | None
    samples: int
    ranges: str
    keep: list[str]
    tolerance: float | None
    sensitivity: bool

    @classmethod
    def schedule(cls, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """At 0 epochs there is nothing to train.

        >>> from kd.stages.quantize import Quantize
        >>> list(Quantize.schedule({"fit": {"epochs": 0, "lr": 1.0}, "bits": 8}))
        [{'fit': None, 'bits': 8}]
        """
        fit = settings.get("fit")
        none = isinstance(fit, Mapping) and fit.get("epochs") == 0
        yield {**settings, "fit": None} if none else dict(settings)

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What changes nothing beside the others is neutral.

        Raises:
            InputError: at a value out of range.
        """
        found = {**config, "keep": sorted(set(_paths("quantize.keep", config["keep"])))}
        one_of("quantize.how", found["how"], HOWS)
        one_of("quantize.ranges", found["ranges"], RANGES)
        require(found["bits"] in (4, 8), "quantize.bits", found["bits"], "8 or 4")
        if found["how"] == "dynamic" and found["bits"] == 4:
            raise InputError("quantize.bits=4: dynamic knows 8 bits alone; use quantize.how=weights, or static")
        samples, tolerance = found["samples"], found["tolerance"]
        if type(samples) is not int or samples < LEAST:
            raise InputError(f"quantize.samples={samples!r} is too few to find ranges on: give {LEAST} or more")
        sound = tolerance is None or (isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool))
        require(sound and (tolerance is None or 0 <= tolerance < 1), "quantize.tolerance", tolerance, "from 0 to 1")
        if found["how"] == "weights" and found["bits"] == 4:
            require(found["block"] in BLOCKS, "quantize.block", found["block"], ", ".join(map(str, BLOCKS)))
        else:
            found["block"] = None
        if found["how"] != "static":
            found["ranges"] = "minmax"
        if tolerance is not None:
            found["sensitivity"] = True
        if found["fit"] is None:
            found["objective"] = {}
        return found

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Without training no teacher is heard; with it, it is heard live."""
        if config["fit"] is None:
            return {role: "nothing is trained" for role in inputs if role != "model"}
        return {"labels": "a quantised network hears its teacher live"} if "labels" in inputs else {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Quantise a stand-in with weights that mean nothing, and bind the terms on it.

        Raises:
            InputError: if a layer to keep is not there, nothing can be quantised, or the terms do not fit.
        """
        from kd.stages.image import rehearse

        student = self.stand_in(inputs, room)
        if self.fit is not None:
            teacher = room.stand_in(inputs.get("teacher", inputs["model"]))
            rehearse(self.data, student, {"teacher": teacher}, self.objective, self.fit, room)

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The network as this stage will shape it, with weights that mean nothing."""
        from kd.compress.quantize import finish
        from kd.training.trainer import blank

        net = room.stand_in(inputs["model"])
        self._begin(net, [blank(self.data, 2)], blank=True)
        finish(net.net)
        return net

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Find ranges, train where that is asked for, measure, save."""
        from kd.compress.masks import zeros
        from kd.compress.quantize import finish
        from kd.compress.structure import masked
        from kd.models import load, recipe_of
        from kd.stages.image import train_net
        from kd.stages.splits import load_data, taken

        splits = load_data(self.data, room)
        if self.samples > len(splits.train):
            raise InputError(
                f"quantize.samples={self.samples} to find ranges on, and the training split has {len(splits.train)}: "
                "ask for fewer"
            )
        source = inputs["model"]
        found: list[Begun] = []

        def begun(student: Normalised) -> list[dict[str, Any]]:
            images = self._images(taken(splits, self.samples, self.seed), room)[0]
            found.append(self._begin(student, images, self._judges(splits, room)))
            for line in found[0].said:
                room.tell({"event": "say", "line": f"{room.stage}: {line}"})
            return [{"kind": "folded", "norms": found[0].norms}] if found[0].norms else []

        def finished(student: Normalised) -> dict[str, Any]:
            told = {"how": self.how, "bits": self.bits, "block": self.block, "samples": self.samples, "seed": self.seed}
            return {"kind": "quantized", **told, "layers": finish(student.net)}

        if self.fit is None:
            result = _compressed(self, inputs, out, room, lambda net, _: ([*begun(net), finished(net)], []))
            return {**result, **found[0].card}
        recipe, student = recipe_of(source.path), load(source.path)
        folded = begun(student)
        recipe["structure"] = [*recipe.get("structure", []), *folded]
        masks = zeros(student.net, list(masked(recipe["structure"])))
        heard = {"teacher": inputs.get("teacher", source)}
        result = train_net(self, student, heard, splits, out, room, recipe, masks, finish=lambda net: [finished(net)])
        marks = _mark(result, source, splits, room)
        return {**result, **found[0].card, **marks}

    def _images(self, split: Split, room: Room) -> tuple[list[torch.Tensor], torch.Tensor]:
        """A split's images in batches, in [0, 1], and their classes."""
        import torch

        from kd.training.loaders import EpochLoader
        from kd.training.trainer import device_of

        # Ranks are forked later, and a process that has touched CUDA cannot be forked.
        device = device_of(room.run) if room.run.devices == 1 else torch.device("cpu")
        loader = EpochLoader(split, BATCH, size=int(self.data["size"]), device=device, workers=room.run.workers)
        batches = list(loader)
        return [batch["image"] for batch in batches], torch.cat([batch["target"] for batch in batches])

    def _judges(self, splits: Splits, room: Room) -> tuple[list[torch.Tensor], torch.Tensor] | None:
        """What sensitivity is judged on: samples of validation, as many as for ranges, each class its share."""
        from kd.data.split import stratified

        if not self.sensitivity:
            return None
        split = splits.validation
        if len(split) > self.samples:
            split = split.subset(stratified(split.ids.cpu(), split.targets.cpu(), self.samples, self.seed))
        return self._images(split, room)

    def _begin(
        self,
        net: Normalised,
        images: list[torch.Tensor],
        judges: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        blank: bool = False,
    ) -> Begun:
        """Fold norms, choose the layers, give them their ranges, in place.

        Args:
            net: with its own statistics in front.
            images: batches that ranges are found on.
            judges: what sensitivity is judged on, if it is.
            blank: whether the images mean nothing, so that no range is refused.
        """
        from kd.compress.folding import fold, pairs
        from kd.compress.quantize import begin, candidates, chosen, ranges_of, strip
        from kd.compress.sensitivity import sensitivity

        net.to(images[0].device)
        plain = strip(net.net)
        kept = chosen(plain, self.keep, "quantize.keep")
        inputs = [(batch - net.mean) / net.std for batch in images]
        norms = pairs(plain, inputs[0])
        fold(plain, norms)
        layers, reasons = candidates(plain, self.how)
        reasons |= {path: "quantize.keep names it" for path in layers.keys() & kept}
        ranges = ranges_of(plain, layers.keys() - kept, inputs, self.ranges)
        able: dict[str, tuple[float, float] | None] = {}
        for path in layers.keys() - reasons.keys():
            low, high = ranges.get(path, (0.0, 0.0))
            if path not in ranges:
                reasons[path] = "it does not run, or something reads its weight past it"
            elif blank:
                able[path] = (0.0, 1.0)
            elif self.how == "static" and not 0 < max(high, 0.0) - min(low, 0.0) < math.inf:
                reasons[path] = f"on the samples it is given nothing but {low:g} to {high:g}"
            else:
                able[path] = (low, high)
        if not able:
            raise InputError(
                f"quantize.how={self.how} finds no layer of {type(plain).__name__} to quantise: "
                + "; ".join(f"{path}: {why}" for path, why in sorted(reasons.items())[:3])
            )
        able = {path: able[path] for path in layers if path in able}
        begin(plain, self.how, self.bits, self.block, able, self.ranges)
        report: dict[str, Any] | None = None
        if judges is not None:
            wanted = [(batch - net.mean) / net.std for batch in judges[0]]
            exact, found = sensitivity(plain, able, wanted, judges[1])
            report = {"samples": len(judges[1]), "accuracy": exact, "layers": found}
            if self.tolerance is not None:
                for path, row in found.items():
                    if exact - row["accuracy"] > self.tolerance:
                        reasons[path] = f"alone it costs {exact - row['accuracy']:.4f} of validation accuracy"
                        strip(plain, [path])
                if found.keys() <= reasons.keys():
                    raise InputError(
                        f"quantize.tolerance={self.tolerance} leaves no layer to quantise: each alone costs more; "
                        "raise it"
                    )
        net.cpu()
        return Begun(norms, dict(sorted(reasons.items())), report)


@dataclass(frozen=True)
class Begun:
    """What was found before training.

    Args:
        norms: those folded, each with the layer that it is in now.
        reasons: the layers that stay in float, with the reason.
        sensitivity: what each layer costs alone, where that was asked for.
    """

    norms: dict[str, str]
    reasons: dict[str, str]
    sensitivity: dict[str, Any] | None

    @property
    def said(self) -> list[str]:
        """A line for each layer that stays in float."""
        return [f"{path} stays in float: {why}" for path, why in self.reasons.items()]

    @property
    def card(self) -> dict[str, Any]:
        """Its part of the card."""
        return {"said": self.said, **({} if self.sensitivity is None else {"sensitivity": self.sensitivity})}
