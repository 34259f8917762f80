"""The stages that make a trained network smaller, and the one that trains it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.errors import InputError
from kd.roles import teachers
from kd.stages.base import Config, Room, Stage
from kd.stages.image import FIT_SINCE, Distil
from kd.store import Artifact
from kd.training.settings import Run, one_of

if TYPE_CHECKING:
    import torch

    from kd.data import Splits
    from kd.models import Normalised

WHATS, BYS = ("weights",), ("taylor", "magnitude", "random")
SCOPES = ("global", "layer")
RANKS, FORMS = ("energy", "uniform"), ("svd", "spatial", "tucker")
LOST = 0.5  # of what a network had above chance: when a stage loses more, the network is marked as collapsed


@dataclass(frozen=True)
class Prune:
    """Remove what a network needs least.

    Args:
        data: the data set: what importance is found on, and what is measured.
        seed: of the samples drawn, and of `by=random`.
        what: `weights` sets single weights to 0.
        amount: share that goes.
        by: what is least: `taylor`, `magnitude` or `random`.
        scope: `global` ranks all layers together, `layer` takes the share of each.
        pattern: N:M keeps N of each M weights in a row; the amount follows from it.
        samples: of the training split.
        keep: layers that stay whole.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}
    PHASE: ClassVar[str] = "structure"

    data: Config
    seed: int
    what: str
    amount: float
    by: str
    scope: str
    pattern: str | None
    samples: int
    keep: list[str]

    @classmethod
    def schedule(cls, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The settings of each of the `steps` that lead to the amount.

        >>> from kd.stages.compress import Prune
        >>> [step["amount"] for step in Prune.schedule({"what": "weights", "amount": 0.6, "steps": 3})]
        [0.2, 0.4, 0.6]
        """
        rest = {name: value for name, value in settings.items() if name != "steps"}
        steps, amount = settings.get("steps", 1), settings["amount"]
        if type(steps) is not int or steps < 1:
            raise InputError(f"prune.steps={steps!r} is no number of steps; give 1 or more")
        if steps > 1 and rest.get("pattern") is not None:
            raise InputError(f"prune.steps={steps} and a pattern: a pattern is reached in one step")
        for step in range(1, steps + 1):
            yield {**rest, "amount": round(amount * step / steps, 12)} if steps > 1 else rest

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What changes nothing beside the others is neutral.

        Raises:
            InputError: at a value out of range.
        """
        from kd.compress.masks import pattern

        found = {**config, "keep": sorted(set(_paths("prune.keep", config["keep"])))}
        one_of("prune.what", found["what"], WHATS)
        one_of("prune.by", found["by"], BYS)
        one_of("prune.scope", found["scope"], SCOPES)
        _share("prune.amount", found["amount"])
        _samples("prune.samples", found["samples"])
        if found["pattern"] is not None:
            few, many = pattern(found["pattern"])
            found |= {"amount": 1 - few / many, "scope": "layer"}
        if found["by"] != "taylor":
            found["samples"] = 0
        return found

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It reads its one input always."""
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Prune a stand-in with weights that mean nothing.

        Raises:
            InputError: if a layer to keep is not there, or nothing can be pruned.
        """
        self.stand_in(inputs, room)

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The network as this stage will shape it, with weights that mean nothing."""
        net = room.stand_in(inputs["model"])
        self._pruned(net, None)
        return net

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Prune, measure, save."""
        return _compressed(self, inputs, out, room, self._pruned)

    def _pruned(self, net: Normalised, calibration: Calibration | None) -> tuple[list[dict[str, Any]], list[str]]:
        from kd.compress.masks import bake, choose, choose_pattern, maskable

        _known(net, self.keep, "prune.keep")
        weights = maskable(net.net, [*self.keep, *_classifier(net)])
        if not weights:
            raise InputError("prune.keep leaves no layer to prune; keep fewer")
        scores = _scores(net, weights, self.by, self.seed, calibration)
        said: list[str] = []
        if self.pattern is None:
            masks = choose(scores, self.amount, self.scope)
        else:
            chosen = {name: choose_pattern(score, self.pattern) for name, score in scores.items()}
            masks = {name: mask for name, mask in chosen.items() if mask is not None}
            said += [f"{n} stays whole: its inputs are no multiple of {self.pattern}" for n in chosen if n not in masks]
            if not masks:
                raise InputError(f"prune.pattern={self.pattern}: no layer has a multiple of so many inputs")
        bake(net.net, masks)
        return [{"kind": "masked", "tensors": dict.fromkeys(masks, self.pattern)}], said


@dataclass(frozen=True)
class LowRank:
    """Write layers as chains of thinner ones.

    Args:
        data: the data set, on which the network is measured.
        seed: of the samples drawn.
        by: `energy` or `uniform`.
        budget: share of each layer's parameters that stays (`uniform`).
        energy: share of each layer's squared singular values that stays (`energy`).
        form: `svd`, `spatial` or `tucker`; linear layers know `svd` alone.
        least: layers of fewer inputs stay whole.
        keep: layers that stay whole.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}
    PHASE: ClassVar[str] = "structure"

    data: Config
    seed: int
    by: str
    budget: float
    energy: float
    form: str
    least: int
    keep: list[str]

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What changes nothing beside the others is neutral.

        Raises:
            InputError: at a value out of range.
        """
        found = {**config, "keep": sorted(set(_paths("lowrank.keep", config["keep"])))}
        one_of("lowrank.by", found["by"], RANKS)
        one_of("lowrank.form", found["form"], FORMS)
        _share("lowrank.budget", found["budget"])
        _share("lowrank.energy", found["energy"])
        found["budget" if found["by"] == "energy" else "energy"] = None
        return found

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """It reads its one input always."""
        return {}

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Factorise a stand-in with weights that mean nothing.

        Raises:
            InputError: if a layer to keep is not there.
        """
        self.stand_in(inputs, room)

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The network as this stage will shape it, with weights that mean nothing."""
        net = room.stand_in(inputs["model"])
        self._factorised(net, None)
        return net

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Factorise, measure, save."""
        return _compressed(self, inputs, out, room, self._factorised)

    def _factorised(self, net: Normalised, calibration: Calibration | None) -> tuple[list[dict[str, Any]], list[str]]:
        from kd.compress.lowrank import candidates, factorise, pays, rank_of_energy, rank_of_share
        from kd.compress.structure import replace

        _known(net, self.keep, "lowrank.keep")
        layers = candidates(net.net, self.form, self.least, [*self.keep, *_classifier(net)])
        chosen, said = {}, []
        for path, (layer, form) in layers.items():
            if self.by == "energy":
                rank = rank_of_energy(layer, form, self.energy)
            else:
                rank = rank_of_share(layer, form, self.budget)
            if rank is None or not pays(layer, form, rank):
                said.append(f"{path} stays whole: thinner layers would not be smaller")
                continue
            replace(net.net, path, factorise(layer, form, rank))
            chosen[path] = {"form": form, "rank": rank}
        return [{"kind": "lowrank", "layers": chosen}], said


@dataclass(frozen=True)
class FineTune:
    """Train a network that is there already, under any terms; what compression made of it stays.

    Args:
        data: the data set.
        objective: its terms; a teacher among them is the input `teacher`.
        fit: the schedule.
        seed: of the order and, without ``views``, the augmentation.
        views: as for `Distil`.
        view_seed: as for `Distil`.
        live: as for `Distil`.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {**FIT_SINCE, "views": None, "view_seed": None, "live": False}
    PHASE: ClassVar[str] = "structure"

    data: Config
    objective: Config
    fit: Config
    seed: int
    views: int | None
    view_seed: int | None
    live: bool

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """As for `Distil`."""
        return Distil.settled(config)

    @classmethod
    def unused(cls, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """As for `Distil`."""
        return Distil.unused(config, inputs)

    def check(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> None:
        """Bind the terms on stand-ins of both networks.

        Raises:
            InputError: if a layer path is not there, or shapes cannot be bridged.
        """
        from kd.stages.image import rehearse

        student = room.stand_in(inputs["model"])
        heard = {role: room.stand_in(inputs[role]) for role in teachers(inputs)}
        rehearse(self.data, student, heard, self.objective, self.fit, room)

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The network as it came."""
        return room.stand_in(inputs["model"])

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Train, evaluate against the labels and the teacher, save."""
        from kd.compress.masks import zeros
        from kd.compress.structure import masked
        from kd.models import load, recipe_of
        from kd.stages.image import train_net
        from kd.stages.splits import load_data

        splits = load_data(self.data, room)
        recipe = recipe_of(inputs["model"].path)
        student = load(inputs["model"].path)
        masks = zeros(student.net, list(masked(recipe.get("structure", []))))
        heard = {role: artifact for role, artifact in inputs.items() if role != "model"}
        result = train_net(self, student, heard, splits, out, room, recipe, masks)
        return {**result, **_mark(result, inputs["model"], inputs.get("teacher"), splits, room)}


@dataclass(frozen=True)
class Calibration:
    """What a stage may learn about a network from a few training samples.

    Args:
        images: (N, C, H, W), as they are in the split: in [0, 1].
        targets: (N,).
    """

    images: torch.Tensor
    targets: torch.Tensor


def _compressed(
    stage: Any,
    inputs: Mapping[str, Artifact],
    out: Path,
    room: Room,
    change: Callable[[Normalised, Calibration | None], tuple[list[dict[str, Any]], list[str]]],
) -> dict[str, Any]:
    """Load the model, change it, measure what came of it, save it with its structure."""
    from safetensors.torch import save_file

    from kd.compress.measure import cost
    from kd.models import load, recipe_of, save, weights_digest
    from kd.stages.evaluation import CHOSEN, evaluated, peers_of
    from kd.stages.splits import data_print, load_data
    from kd.training.loggers import loggers, summarise

    model, data = inputs["model"], stage.data
    splits = load_data(data, room)
    recipe, net = recipe_of(model.path), load(model.path)
    calibration = _calibration(splits, getattr(stage, "samples", 0), stage.seed, int(data["size"]), room.run)
    made, said = change(net, calibration)
    for line in said:
        room.tell({"event": "say", "line": f"{room.stage}: {line}"})
    recipe["structure"] = [*recipe.get("structure", []), *made]
    with loggers(
        room.run, key=room.key, stage=room.stage, document=room.document, dials=room.dials, sweep=room.sweep
    ) as sinks:
        metrics, chosen = evaluated(net, peers_of({"teacher": model}, {}, data), splits, data, room)
        net = net.cpu().eval()
        costs = cost(net, (int(data["channels"]), int(data["size"]), int(data["size"])), latency=room.run.latency)
        summarise(sinks, {**metrics, **{f"cost/{name}": value for name, value in costs.items()}}, 0)
    save(net, recipe, out)
    save_file({"test": chosen}, out / CHOSEN)
    result = {
        "metrics": metrics,
        "cost": costs,
        "weights": weights_digest(net.net),
        "said": said,
        "fingerprints": {"data": data_print(data, room)},
    }
    return {**result, **_mark(result, model, None, splits, room)}


def _mark(
    result: Mapping[str, Any], before: Artifact, teacher: Artifact | None, splits: Splits, room: Room
) -> dict[str, Any]:
    """`marks` for the card where the network lost most of what it, or its teacher, had above chance on validation."""
    chance = 1 / len(splits.classes)
    now = result["metrics"]["val/accuracy"]
    known = [a.card.get("metrics", {}).get("val/accuracy") for a in (before, teacher) if a is not None]
    was = max((value for value in known if value is not None), default=now)
    if not now - chance < LOST * (was - chance):
        return {}
    room.tell(
        {
            "event": "say",
            "line": f"{room.stage}: the accuracy on validation collapsed from {was:.3f} to {now:.3f} (chance is "
            f"{chance:.3f}); the network is kept and marked",
        }
    )
    return {"marks": ["collapsed"]}


def _calibration(splits: Splits, samples: int, seed: int, size: int, run: Run) -> Calibration | None:
    """Samples of the training split, balanced over classes; None where none are asked for.

    Raises:
        InputError: if there are not as many.
    """
    import torch

    from kd.stages.splits import taken
    from kd.training.trainer import evaluation_loader

    if not samples:
        return None
    if samples > len(splits.train):
        raise InputError(
            f"samples={samples} to find importance on, and the training split has {len(splits.train)}: ask for fewer"
        )
    split = taken(splits, samples, seed)
    batches = list(evaluation_loader(split, size, run, torch.device("cpu")))
    return Calibration(torch.cat([b["image"] for b in batches]), torch.cat([b["target"] for b in batches]))


def _scores(
    net: Normalised,
    weights: Mapping[str, torch.Tensor],
    by: str,
    seed: int,
    calibration: Calibration | None,
) -> dict[str, torch.Tensor]:
    import torch
    import torch.nn.functional as F

    from kd.training.seeds import mix

    if by == "random":
        generator = torch.Generator().manual_seed(mix(seed, "prune"))
        return {name: torch.rand(value.shape, generator=generator) for name, value in weights.items()}
    if by == "taylor" and calibration is not None:
        net.zero_grad()
        torch.autograd.backward(F.cross_entropy(net.eval()(calibration.images), calibration.targets))
        found = {n: (v.detach() * v.grad).abs() for n, v in weights.items() if v.grad is not None}
        net.zero_grad()
        return found
    return {name: value.detach().abs() for name, value in weights.items()}


def _classifier(net: Normalised) -> list[str]:
    """The path of the layer that makes the logits, which stays whole."""
    from torch import nn

    layers = [path for path, module in net.net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return layers[-1:]


def _known(net: Normalised, paths: Sequence[str], where: str) -> None:
    from kd.errors import nearest

    modules = dict(net.net.named_modules())
    for path in paths:
        if path not in modules:
            raise InputError(f"{where}: {path!r} is no layer of {type(net.net).__name__}{nearest(path, modules)}")


def _share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InputError(f"{name}={value!r} is no share between 0 and 1, e.g. {name}=0.5")


def _samples(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise InputError(f"{name}={value!r} is no number of samples; give 1 or more")


def _paths(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(path, str) for path in value):
        raise InputError(f"{name}={value!r}: give a list of layers, e.g. [conv1] (`kd list layers NAME`)")
    return list(value)
