"""What a term asks for beside its views: that networks are run again with a part of what they computed exchanged."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd import names
from kd.errors import InputError
from kd.losses import checks

Views = str | Sequence[str]


class Interchange:
    """Which layers of both networks take a share of their channels from another sample of the batch.

    Each sample has another as its source: all stand in one circle, in an order that is drawn, and a batch of one is its
    own. The channels are neighbours, the last beside the first, and begin at the same share of the width in both
    networks, so that what stands where in the one is matched by what stands there in the other; where they begin is
    drawn for each pair of layers. Draws are functions of the training's seed and of where it stands, so a resumed run
    draws as if it had not stopped. Where nothing goes around a layer, at `fraction` 1 a network answers as for the
    source, and the loss is a plain one.

    Wu et al., "Causal Distillation for Language Models" (2022); frankaging/Causal-Distill, distillation/
    causal_distiller.py, which exchanges some dimensions of some layers of two sequences.

    Args:
        student: `student.` and the path or the part of a layer, or a list; those of the plain pass are the sources.
        teacher: as many layers of the teacher's, in the same order.
        fraction: of a layer's channels; above 0, at most 1.

    Raises:
        BadValue: if the fraction is out of its range.
        InputError: if a name begins otherwise.

    >>> change = Interchange("student.last", "teacher.last", fraction=0.5)
    >>> change.sources(4).tolist(), change.channels(6).tolist(), change.channels(4).tolist()
    ([1, 3, 0, 2], [5, 0, 1], [3, 0])
    """

    def __init__(self, student: Views, teacher: Views, fraction: float = 0.5) -> None:
        for side, views, start in (("student", student, r"student\.."), ("teacher", teacher, r"teacher\d*\..")):
            for view in _each(views):
                if not re.match(start, str(view)):
                    raise InputError(
                        f"an interchange names {view!r} as a layer of the {side}; a name that begins with '{side}.' "
                        f"was meant, such as '{side}.last'"
                    )
        if not checks.within("fraction", fraction, high=1.0):
            raise checks.BadValue(f"fraction is {fraction!r}; it must be above 0 and at most 1")
        self.student, self.teacher, self.fraction = student, teacher, float(fraction)
        self.seed, self.position = 0, 0.0

    def names(self) -> dict[str, Views]:
        """The layers of each network, as a term's views."""
        return {"student": self.student, "teacher": self.teacher}

    def place(self, found: dict[str, Views]) -> None:
        """Put layers in the place of parts; what is done to a layer's output is left out, but for `:input`.

        Raises:
            InputError: if one network has more of them, or a name says `:through`.
        """
        bare = {role: [_bare(view) for view in _each(views)] for role, views in found.items()}
        if len(bare["student"]) != len(bare["teacher"]):
            ours, theirs = (", ".join(bare[role]) for role in ("student", "teacher"))
            raise InputError(
                f"an interchange pairs layers, and names {ours} of the student and {theirs} of the teacher"
            )
        self.student, self.teacher = bare["student"], bare["teacher"]

    def layers(self, side: str) -> list[str]:
        """Paths in the network of a side, `student`, `teacher` or one of several teachers, in order.

        >>> Interchange("student.a", "teacher2.b:input").layers("teacher2"), Interchange("student.a", "teacher.b").sides
        (['b:input'], ('student', 'teacher'))
        """
        views = [view for several in (self.student, self.teacher) for view in _each(several)]
        return [view.partition(".")[2] for view in views if view.startswith(f"{side}.")]

    @property
    def sides(self) -> tuple[str, ...]:
        """The networks that are run again."""
        views = [view for several in (self.student, self.teacher) for view in _each(several)]
        return tuple(dict.fromkeys(view.partition(".")[0] for view in views))

    def draws_from(self, seed: int) -> None:
        """Take the seed of the draws."""
        self.seed = seed

    def at(self, epoch: float, epochs: int) -> None:
        """Draw for where training stands."""
        self.position = float(epoch)

    def sources(self, count: int) -> Tensor:
        """The source of each of ``count`` samples, as indices (count,)."""
        order = list(range(count))
        random.Random(self._number("sources")).shuffle(order)
        found = torch.empty(count, dtype=torch.long)
        found[torch.tensor(order)] = torch.tensor(order).roll(1)
        return found

    def channels(self, width: int, pair: int = 0) -> Tensor:
        """Indices of the channels that are exchanged in a layer of that width.

        Args:
            width: of the layer.
            pair: which of the pairs of layers it is of.
        """
        begin = math.floor(random.Random(self._number("channels", pair)).random() * width)
        return (begin + torch.arange(max(1, round(self.fraction * width)))) % width

    def _number(self, *words: Any) -> int:
        text = "/".join(map(repr, (self.seed, self.position, *words)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _each(views: Views) -> Sequence[str]:
    return [views] if isinstance(views, str) else views


def _bare(view: str) -> str:
    side, _, name = view.partition(".")
    kinds = [step for step, _ in names.steps(name)]
    if "through" in kinds:
        raise InputError(f"{view!r}: an interchange takes what a layer gives, or with :input what it is given")
    return f"{side}.{names.layer(name)}{names.INPUT if 'input' in kinds else ''}"
