"""The stage that removes what a network needs least: channels, heads and units, or single weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kd.errors import InputError
from kd.stages.base import Config, Room, Stage
from kd.stages.compress import (
    Calibration,
    _classifier,
    _compressed,
    _known,
    _paths,
    _samples,
    _share,
    gradients,
    listed,
    probe,
)
from kd.store import Artifact
from kd.training.settings import one_of, require

if TYPE_CHECKING:
    import torch

    from kd.models import Normalised

WHATS = ("channels", "weights")
OFS = ("macs", "parameters", "channels")
BYS = {"channels": ("taylor", "magnitude", "group_norm", "random"), "weights": ("taylor", "magnitude", "random")}
SCOPES = {"channels": ("global", "isomorphic", "layer"), "weights": ("global", "layer")}
_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


@dataclass(frozen=True)
class Prune:
    """Remove what a network needs least.

    Args:
        data: the data set: what importance is found on, and what is measured.
        seed: of the samples drawn, and of `by=random`.
        what: `channels` makes the network narrower, by channels, attention heads and recurrent units; `weights` sets
            single weights to 0, where they stay.
        amount: share that goes, of the input's cost or of the weights.
        of: what the share is of, for channels: `macs`, `parameters` or `channels`.
        by: what is least: `taylor`, `magnitude`, `group_norm` (channels) or `random`.
        scope: `global` ranks all layers together, `isomorphic` those of a kind (channels), `layer` takes the same share
            of each.
        pattern: for weights, N:M keeps N of each M in a row; the amount follows from it.
        round_to: for channels, widths are multiples of this where they can be.
        most: for channels, the largest share of one layer's that may go.
        samples: of the training split, that `taylor` looks at.
        keep: layers that stay whole.
    """

    VERSION: ClassVar[int] = 1
    SINCE: ClassVar[dict[str, Any]] = {}
    PHASE: ClassVar[str] = "structure"

    data: Config
    seed: int
    what: str
    amount: float
    of: str | None
    by: str
    scope: str
    pattern: str | None
    round_to: int
    most: float | None
    samples: int
    keep: list[str]

    @classmethod
    def schedule(cls, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The settings of each of the `steps` that lead to the amount: equal shares of what there was at first.

        What goes in a step is a share of what the step is given, but for weights: zeros that are there stay and count.

        >>> from kd.stages.prune import Prune
        >>> [step["amount"] for step in Prune.schedule({"what": "weights", "amount": 0.6, "steps": 3})]
        [0.2, 0.4, 0.6]
        >>> [step["amount"] for step in Prune.schedule({"what": "channels", "amount": 0.6, "steps": 3})]
        [0.2, 0.25, 0.333333333333]
        """
        rest = {name: value for name, value in settings.items() if name != "steps"}
        steps, amount = settings.get("steps", 1), settings["amount"]
        if type(steps) is not int or steps < 1:
            raise InputError(f"prune.steps={steps!r} is no number of steps; give 1 or more")
        if steps > 1 and rest.get("pattern") is not None:
            raise InputError(f"prune.steps={steps} and a pattern: a pattern is reached in one step")
        if steps == 1:
            yield rest
            return
        _share("prune.amount", amount)
        for step in range(1, steps + 1):
            before, after = (1 - amount * at / steps for at in (step - 1, step))
            yield {**rest, "amount": round(1 - after / (before if rest["what"] == "channels" else 1), 12)}

    @classmethod
    def settled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What changes nothing beside the others is neutral.

        Raises:
            InputError: at a value out of range.
        """
        found = {**config, "keep": sorted(set(_paths("prune.keep", config["keep"])))}
        one_of("prune.what", found["what"], WHATS)
        one_of("prune.by", found["by"], BYS[found["what"]])
        one_of("prune.scope", found["scope"], SCOPES[found["what"]])
        _share("prune.amount", found["amount"])
        _samples("prune.samples", found["samples"])
        step = found["round_to"]
        require(type(step) is int and step >= 1, "prune.round_to", step, "a whole number, 1 or more")
        if found["what"] == "weights":
            found |= {"of": None, "round_to": 1, "most": None}
        else:
            one_of("prune.of", str(found["of"]), OFS)
            _share("prune.most", found["most"])
            if found["pattern"] is not None:
                raise InputError(f"prune.pattern={found['pattern']} is of single weights; set prune.what=weights")
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
            InputError: if a layer to keep is not there, so much cannot go, or a package is missing.
        """
        room.stand_in(self)

    def stand_in(self, inputs: Mapping[str, Stage | Artifact], room: Room) -> Normalised:
        """The network as this stage will shape it, with weights that mean nothing."""
        net = room.stand_in(inputs["model"])
        self._pruned(net, None)
        return net

    def run(self, inputs: Mapping[str, Artifact], out: Path, room: Room) -> dict[str, Any]:
        """Prune, measure, save."""
        return _compressed(self, inputs, out, room, self._pruned)

    def _pruned(self, net: Normalised, calibration: Calibration | None) -> tuple[list[dict[str, Any]], list[str]]:
        _known(net, self.keep, "prune.keep")
        return self._narrowed(net, calibration) if self.what == "channels" else self._masked(net, calibration)

    def _narrowed(self, net: Normalised, calibration: Calibration | None) -> tuple[list[dict[str, Any]], list[str]]:
        from kd.compress.channels import OUTPUTS
        from kd.compress.prune import prune
        from kd.training.seeds import mix

        # A stand-in's gradients would mean as little as its weights.
        by = "group_norm" if calibration is None and self.by == "taylor" else self.by
        assert self.of is not None and self.most is not None
        try:
            made = prune(
                net.net,
                probe(net, self.data),
                amount=self.amount,
                of=self.of,
                by=by,
                gradients=gradients(net, calibration) if calibration is not None else None,
                scope=self.scope,
                most=self.most,
                round_to=self.round_to,
                keep=self.keep,
                seed=mix(self.seed, "prune"),
            )
        except InputError as error:
            raise InputError(f"prune: {error}") from error
        net.net = made.net
        reasons: dict[str, list[str]] = {}
        for path, reason in made.whole.items():
            if reason != OUTPUTS:  # that goes without saying
                reasons.setdefault(reason, []).append(path)
        said = [f"{listed(paths)} whole: {reason}" for reason, paths in reasons.items()]
        return [{**made.change, "left": made.left}], said

    def _masked(self, net: Normalised, calibration: Calibration | None) -> tuple[list[dict[str, Any]], list[str]]:
        from kd.compress.masks import bake, choose, choose_pattern, maskable

        weights = maskable(net.net, [*self.keep, _classifier(net, self.data)])
        if not weights:
            raise InputError("prune.keep leaves no layer to prune; keep fewer")
        scores = self._scores(net, weights, calibration)
        said: list[str] = []
        if self.pattern is None:
            masks = choose(scores, self.amount, self.scope)
        else:
            chosen = {name: choose_pattern(score, *pattern(self.pattern)) for name, score in scores.items()}
            masks = {name: mask for name, mask in chosen.items() if mask is not None}
            said += [f"{n} stays whole: its inputs are no multiple of {self.pattern}" for n in chosen if n not in masks]
            if not masks:
                raise InputError(f"prune.pattern={self.pattern}: no layer has a multiple of so many inputs")
        bake(net.net, masks)
        return [{"kind": "masked", "tensors": dict.fromkeys(masks, self.pattern)}], said

    def _scores(
        self, net: Normalised, weights: Mapping[str, torch.Tensor], calibration: Calibration | None
    ) -> dict[str, torch.Tensor]:
        import torch

        from kd.training.seeds import mix

        if self.by == "random":
            generator = torch.Generator().manual_seed(mix(self.seed, "prune"))
            return {name: torch.rand(value.shape, generator=generator) for name, value in weights.items()}
        if self.by == "taylor" and calibration is not None:
            found = gradients(net, calibration)
            return {name: (value.detach() * found[name]).abs() for name, value in weights.items()}
        return {name: value.detach().abs() for name, value in weights.items()}


def pattern(text: Any) -> tuple[int, int]:
    """N and M of `N:M`: of each M weights in a row, N are kept.

    Raises:
        InputError: if it is none.

    >>> from kd.stages.prune import pattern
    >>> pattern("2:4")
    (2, 4)
    """
    found = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    if not found or int(found[1]) >= int(found[2]):
        raise InputError(f"prune.pattern={text!r} is no pattern N:M with N less than M, e.g. '2:4'")
    return int(found[1]), int(found[2])
