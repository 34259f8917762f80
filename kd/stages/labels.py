"""The stage that writes down what a teacher says of each training sample, once for all its students."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd import names
from kd.data import labels as files
from kd.errors import InputError, KDError
from kd.stages.base import Config, Room, Stage
from kd.stages.bindings import reads_stages
from kd.store import Artifact, with_neutral

if TYPE_CHECKING:
    import torch

    from kd.data import Splits
    from kd.models import Normalised

PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class SoftLabels:
    """The teacher's outputs on the training samples, or on its input `images`, in the order of the split.

    Args:
        data: the data set; its `augment` makes the views.
        views: K of them; None: the one view of a sample that looks the same in every epoch.
        seed: of the views.
        dtype: that they are stored in.
        top_k: logits kept of each row.
        features: layers of the teacher to keep, or parts such as `embedding`, pooled to one vector a sample.
        precision: `32-true` or `bf16-mixed`, of the teacher's pass.
        batch_size: of the teacher's pass.
        channels_last: memory layout of the teacher's pass.
        compile: whether the teacher is compiled.
        stages: layers of the teacher that are its stages, in the place of those that are found.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {
        "views": None,
        "seed": 0,
        "dtype": "float32",
        "top_k": None,
        "features": [],
        "precision": "32-true",
        "batch_size": None,
        "channels_last": False,
        "compile": False,
        "stages": None,
    }

    data: Config
    views: int | None
    seed: int
    dtype: str
    top_k: int | None
    features: list[str]
    precision: str
    batch_size: int | None
    channels_last: bool
    compile: bool
    stages: list[str] | None

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that change nothing here at the value they had before they existed.

        Raises:
            InputError: at a value out of range.
        """
        found = dict(config)
        files.check(found["views"], found["dtype"], found["top_k"], config["data"].get("num_classes"))
        _check_pass(found)
        found["features"] = sorted({path.removesuffix(names.POOLED) for path in found["features"]})
        if several := [path for path in found["features"] if names.part(path) in names.SEVERAL]:
            raise InputError(f"labels.features: {several[0]} are several layers; name each, e.g. [stage1, last]")
        if not reads_stages(found["features"]):
            found["stages"] = None
        still = config["data"].get("augment", "none") == "none"
        if still:
            found |= {"views": None, "seed": 0}
        if found["views"] is None:
            found["batch_size"] = None
            plain = all(found[name] == neutral for name, neutral in cls.SINCE.items())
            if not plain and still:  # all views are one
                found |= {"views": 1, "batch_size": config["batch_size"]}
        return found

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It reads its one input always."""
        return {}

    @classmethod
    def layout(cls, config: Mapping[str, Any], samples: int, widths: Mapping[str, int]) -> files.Layout:
        """How the outputs of a settled config lie on disk; ``config`` names every field."""
        return files.Layout(
            samples=samples,
            classes=int(config["data"]["num_classes"]),
            views=int(config["views"] or 1),
            dtype=config["dtype"],
            top_k=config["top_k"],
            widths=dict(widths),
        )

    @classmethod
    def scheme(cls, config: Mapping[str, Any]) -> str:
        """What its views are made by."""
        data = config["data"]
        return files.scheme(str(data.get("augment", "none")), int(config["seed"]), int(data["size"]))

    @classmethod
    def flaw(cls, artifact: Artifact) -> str | None:
        """What is wrong with stored labels by the word of their own files, which a checksum does not know."""
        config = with_neutral(artifact.card["document"]["config"], cls.SINCE)
        if config["views"] is None:
            return None
        for name in artifact.card["files"]:
            if name.startswith("labels-v"):
                view = int(name[len("labels-v") :].partition("-")[0])
                if wrong := files.flaw(artifact.path / name, cls.scheme(config), view):
                    return wrong
        return None

    @classmethod
    def forecast(cls, config: Mapping[str, Any], samples: int, work: Path) -> tuple[int, str]:
        """Bytes that are still to be written, and what they are in words; features are not counted.

        Args:
            config: settled.
            samples: of the training split.
            work: where an earlier attempt may have left some of them.
        """
        layout, made_by = cls.layout(config, samples, {}), cls.scheme(config)
        there, halves, missing = 0, 0, layout.bytes
        for path in work.glob("labels-v*.safetensors"):
            view, block = (int(word[1:]) for word in path.stem.split("-")[1:])
            if files.flaw(path, made_by, view):
                halves += 1
            else:
                there += 1
                missing -= layout.row * min(layout.block, samples - block * layout.block)
        kept = "" if layout.top_k is None else f", the {layout.top_k} largest logits"
        text = (
            f"{layout.views} view{'s' if layout.views > 1 else ''} of {samples:,} samples in {layout.dtype}{kept}: "
            f"{files.size_text(missing)} to write"
        )
        if there or halves:
            text += f"; {there} of {layout.views * -(-samples // layout.block)} files are there"
        return missing, text + (f", {halves} half-written or of other views, to be made again" if halves else "")

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Look for the layers to keep.

        Raises:
            InputError: if the teacher has no such layer, or it cannot be pooled.
        """
        from kd.stages.splits import images_in
        from kd.training.trainer import check_compiler

        check_compiler("labels.compile", self.compile, room.run)
        images_in(inputs)
        if self.features:
            from kd.training.trainer import blank

            net = room.stand_in(inputs["teacher"])
            widths = _widths(net, self._taps(net), blank(self.data, 2))
            self._fits(widths, images_in(inputs), room)

    def _fits(self, widths: Mapping[str, int], images: int | None, room: Room) -> None:
        """Refuse features that the disk cannot take; planning counts logits alone, for it knows no network."""
        from kd.stages.splits import training_samples

        samples = training_samples(self.data, room) if images is None else images
        needed = self.layout(self.__dict__, samples, widths).bytes
        place = next(path for path in (room.work, *room.work.parents) if path.exists())
        if needed > (free := shutil.disk_usage(place).free):
            raise InputError(too_small(needed, free, place))

    def _taps(self, net: Normalised) -> dict[str, str]:
        """What is tapped for each feature, by the name that it is stored under."""
        from kd.models import outline

        parts = [path for path in self.features if names.part(path)]
        size = int(self.data["size"])
        try:
            found = outline(net.net, (int(self.data["channels"]), size, size), self.stages) if parts else None
            where = {path: found.find(path)[0] for path in parts} if found else {}
        except InputError as error:
            raise InputError(f"labels.features: {error}") from error
        return {names.stored(path): names.stored(where.get(path, path)) for path in self.features}

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """The teacher's pass over the training split."""
        from kd.stages.splits import data_print, learnt_from
        from kd.training.loggers import loggers, summarise

        splits = learnt_from(self.data, inputs, room)
        if self.views is None:
            accuracy = self._still(inputs["teacher"], splits, out, room)
        else:
            accuracy = self._views(inputs["teacher"], splits, self.views, out, room)
        with loggers(
            room.run, key=room.key, stage=room.stage, document=room.document, dials=room.dials, sweep=room.sweep
        ) as sinks:
            summarise(sinks, {"train/accuracy": accuracy}, 0)
        return {"metrics": {"train/accuracy": accuracy}, "fingerprints": {"data": data_print(self.data, room)}}

    def _still(self, teacher: Artifact, splits: Splits, out: Path, room: Room) -> float:
        from safetensors.torch import save_file

        from kd.models import load
        from kd.stages.evaluation import logits_of

        logits = logits_of(load(teacher.path), splits.train, self.data, room)
        save_file({"ids": splits.train.ids.cpu(), "logits": logits.contiguous()}, out / files.INDEX)
        return _accuracy(logits, splits.train.targets)

    def _views(self, teacher: Artifact, splits: Splits, views: int, out: Path, room: Room) -> float:
        import torch
        from safetensors.torch import save_file

        from kd.models import load
        from kd.training.labelling import Pass, Speaker, label_views, link
        from kd.training.trainer import blank, device_of

        config = {**self.__dict__, "views": views}
        net = load(teacher.path)
        taps = self._taps(net)
        widths = _widths(net, taps, blank(self.data, 2))
        layout = self.layout(config, len(splits.train), widths)
        free = shutil.disk_usage(room.work).free
        if layout.bytes > free + sum(path.stat().st_size for path in room.work.glob("labels-v*")):
            raise KDError(too_small(layout.bytes, free, room.work))
        how = Pass(self.batch_size or Pass.batch_size, self.precision, self.channels_last, self.compile)
        paths = label_views(
            Speaker(net, how, taps, device_of(room.run)),
            splits.train,
            layout,
            room.run,
            made_by=self.scheme(config),
            augment=self.data["augment"],
            seed=self.seed,
            size=int(self.data["size"]),
            work=room.work,
            tell=room.tell,
        )
        link(paths, out)
        save_file({"ids": splits.train.ids.cpu()}, out / files.INDEX)
        stored = files.StoredLabels.open(out, splits.train.ids.cpu(), layout.classes, views)
        rows = torch.split(torch.arange(len(splits.train)), 4096)
        return _accuracy(torch.cat([stored.at(0, some)["teacher.logits"] for some in rows]), splits.train.targets)


def too_small(needed: int, free: int, place: Path) -> str:
    """The one line about a disk that cannot take the labels."""
    return (
        f"the labels take {files.size_text(needed)} and {place} has {files.size_text(free)} free; store fewer bytes "
        "(labels.dtype=float16, labels.top_k=…, fewer labels.views or features), or name another folder in run.store"
    )


def _accuracy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    import torch

    return float((logits.argmax(1) == targets.cpu()).to(torch.float64).mean().item())


def _widths(net: Any, paths: Mapping[str, str], images: torch.Tensor) -> dict[str, int]:
    """Width of each pooled layer, from one blank batch."""
    from kd.compress.measure import looking
    from kd.models import Taps

    try:
        taps = Taps(net.net, paths)
        with looking(net):
            net(images)
        found = taps.pop()
    except InputError as error:
        raise InputError(f"labels.features: {error}") from error
    taps.remove()
    return {path: int(value.shape[1]) for path, value in found.items()}


def _check_pass(config: Mapping[str, Any]) -> None:
    size = config["batch_size"]
    if size is not None and not (type(size) is int and size >= 1):
        raise InputError(f"labels.batch_size={size!r}: give 1 or more samples")
    if config["precision"] not in PRECISIONS:
        raise InputError(f"labels.precision={config['precision']!r} is none of {', '.join(PRECISIONS)}")
    for name in ("channels_last", "compile"):
        if not isinstance(config[name], bool):
            raise InputError(f"labels.{name}={config[name]!r} is not true or false")
    seed = config["seed"]
    if type(seed) is not int or seed < 0:
        raise InputError(f"labels.seed={seed!r}: give a whole number, 0 or more")
    features = config["features"]
    if not isinstance(features, (list, tuple)) or not all(isinstance(path, str) for path in features):
        raise InputError(f"labels.features={features!r}: give a list of the teacher's layers, e.g. [layer3]")
