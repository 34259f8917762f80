"""Several networks that learn at once, each under an objective of its own: peers, or a teacher that its student tunes.

What one hears of another is detached, so a term moves the network that it is a term of and no other, and one backward
pass gives each its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from kd.errors import InputError, nearest
from kd.models import Normalised, Taps
from kd.objective import Objective
from kd.tasks.image import evaluate
from kd.training.again import again
from kd.training.gradients import keep_buffers, of_terms

Batch = dict[str, Tensor]
_PLAIN = frozenset({"_current_fx_name", "parts", "gradients", "gradients_due", "validation"})
ALL, HEAD = "all", "head"


@dataclass
class Member:
    """One network of a circle.

    Args:
        net: with its normalisation.
        objective: its terms, where `student` is this network and `teacher` (or `teacher1`, …) those it hears; None: it
            only speaks, unless something else teaches it.
        hears: members by name, in the order of the teachers.
        tuned: the layers that learn, by path; None: all.
        rate: its learning rate as a multiple of the fit's.
    """

    net: Normalised
    objective: Objective | None
    hears: Sequence[str] = ()
    tuned: Sequence[str] | None = None
    rate: float = 1.0
    taps: dict[str, str] = field(default_factory=dict)

    def roles(self) -> dict[str, str]:
        """Each member that it hears, by what its terms call it: `teacher`, or of several `teacher1`, `teacher2`, ….

        >>> Member(None, None, ["peer1"]).roles(), Member(None, None, ["teacher", "peer1"]).roles()
        ({'teacher': 'peer1'}, {'teacher1': 'teacher', 'teacher2': 'peer1'})
        """
        if len(self.hears) == 1:
            return {"teacher": self.hears[0]}
        return {f"teacher{index}": name for index, name in enumerate(self.hears, 1)}

    def learning(self) -> list[nn.Parameter]:
        """The network's parameters that learn by its terms."""
        return [] if self.objective is None else [p for p in self.net.parameters() if p.requires_grad]


class Circle(pl.LightningModule):
    """Networks that learn together.

    Args:
        members: by name.
        shipped: the member that is validated and selected by, and shipped.
        optimisers: from parameter groups to what `configure_optimizers` returns; `lr` is the fit's learning rate.
        lr: the fit's learning rate.
        alternate: one member learns in each step, in turn, and the others only speak; else all learn in each.
        channels_last: give images to all networks with the channels innermost.
        before: called with the circle and a batch before each step.

    Raises:
        InputError: if a member hears one that is not there, or a layer to tune is none.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        shipped: str,
        optimisers: Callable[[list[Any]], dict[str, Any]],
        lr: float,
        alternate: bool = False,
        channels_last: bool = False,
        before: Prelude | None = None,
    ) -> None:
        """Install the taps: before any compilation, or hooks never fire."""
        super().__init__()
        self.members = dict(members)
        self.shipped, self.optimisers, self.lr, self.alternate = shipped, optimisers, lr, alternate
        self.nets = nn.ModuleDict({name: member.net for name, member in members.items()})
        self.before = before
        self.objectives = nn.ModuleDict({n: m.objective for n, m in members.items() if m.objective is not None})
        wanted: dict[str, set[str]] = {name: set() for name in members}
        for name, member in members.items():
            if member.objective is None:
                continue
            wanted[name] |= set(member.objective.paths("student"))
            for side, other in member.roles().items():
                if other not in members:
                    raise InputError(f"{name} hears {other!r}, who is not in the circle{nearest(other, members)}")
                wanted[other] |= set(member.objective.paths(side))
        self.taps = {name: Taps(members[name].net.net, sorted(paths)) for name, paths in wanted.items()}
        for name, member in members.items():
            _tune(name, member)
            if channels_last:
                member.net.to(memory_format=torch.channels_last)
        self.channels_last = channels_last
        self.group = 0  # of parameters, that is the student's
        self.parts: dict[str, Tensor] = {}
        self.gradients_due = False
        self.gradients: dict[str, Tensor] = {}
        self.seen: list[tuple[dict[str, Tensor], Tensor]] = []
        self.validation: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Plain attributes without nn.Module's search for parameters: Lightning sets one 50 times a step."""
        if name in _PLAIN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def student(self) -> Normalised:
        """The network that is shipped."""
        return self.members[self.shipped].net

    @property
    def net(self) -> torch.nn.Module:
        """The plain net that is judged, kept and stored."""
        return self.student.net

    @property
    def objective(self) -> Objective:
        """The terms of the network that is shipped."""
        found = self.members[self.shipped].objective
        assert found is not None
        return found

    @property
    def student_taps(self) -> Taps:
        """The taps of the network that is shipped."""
        return self.taps[self.shipped]

    @property
    def live(self) -> dict[str, Normalised]:
        """Networks that stay as they are: none."""
        return {}

    def at(self, epoch: float, epochs: int) -> None:
        """Tell all objectives where training stands."""
        for objective in self.objectives.values():
            cast(Objective, objective).at(epoch, epochs)

    @property
    def judges(self) -> list[tuple[str, Any]]:
        """Losses that weigh the members by what they make of the validation split, each with its member."""
        return [
            (name, loss)
            for name, objective in self.objectives.items()
            for loss in cast(Objective, objective).losses.modules()
            if getattr(loss, "JUDGES", False)
        ]

    def train(self, mode: bool = True) -> Self:
        """Training mode for what learns; the frozen part of a network that is tuned in part keeps its statistics."""
        super().train(mode)
        for member in self.members.values():
            if member.tuned is not None:
                member.net.eval()
                for path in member.tuned:
                    member.net.net.get_submodule(path).train(mode)
        return self

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Nothing: the loader made the batch where it is used."""
        return batch

    def spoken(self, batch: Batch, learners: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """What each network says of a batch, logits and tapped layers by name; who does not learn leaves no trace."""
        images, learning = self.laid(batch["image"]), set(learners)
        found: dict[str, dict[str, Tensor]] = {}
        for name, member in self.members.items():
            with torch.set_grad_enabled(name in learning):
                found[name] = {"logits": member.net(images)}
            found[name] |= self.taps[name].pop()
        return found

    def rate(self) -> float:
        """The student's learning rate of this step; without a trainer, the fit's."""
        if self._trainer is None:
            return self.lr
        groups = cast(Any, self.trainer.optimizers[0]).param_groups
        return float(groups[self.group]["lr"])

    def laid(self, images: Tensor) -> Tensor:
        """Images as the networks are given them."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def views(self, name: str, batch: Batch, spoken: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The named tensors that a member's terms bind to: its own as `student.…`, and those it hears, detached."""
        views = {"batch.target": batch["target"]}
        if "row" in batch:
            views["batch.row"] = batch["row"]
        views |= {f"student.{path}": value for path, value in spoken[name].items()}
        for side, other in self.members[name].roles().items():
            views |= {f"{side}.{path}": value.detach() for path, value in spoken[other].items()}
        return views

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the objectives of those whose turn it is; the parts of all stay in `parts`."""
        if self.before is not None:
            self.before(self, batch)
        names = [name for name, member in self.members.items() if member.learning()]
        learners = [names[int(self.global_step) % len(names)]] if self.alternate else names
        spoken = self.spoken(batch, learners)
        parts: dict[str, Tensor] = {}
        totals, own = [], {}
        for name, member in self.members.items():
            if member.objective is None:
                continue
            with torch.set_grad_enabled(name in learners):
                views = self.views(name, batch, spoken)
                if member.objective.again:
                    nets = {side: (self.members[who].net, self.taps[who]) for side, who in member.roles().items()}
                    nets["student"] = member.net, self.taps[name]
                    views |= again(member.objective, nets, self.laid(batch["image"]), views)
                total, found = member.objective(views)
            if name in learners:
                totals.append(total)
            if name == self.shipped:
                own = found
            parts |= {term if name == self.shipped else f"{name}_{term}": value for term, value in found.items()}
        self.parts = parts
        learns = self.shipped in learners
        self.gradients = self.gradients_of_terms(own) if self.gradients_due and learns else {}
        whole: Tensor = sum(totals[1:], start=totals[0])
        return whole

    def gradients_of_terms(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each of the last step's terms does to the student, as `of_terms` has it."""
        return of_terms(parts, self.objective.pulls, self.members[self.shipped].learning())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the logits; metrics are made of the whole split."""
        images = self.laid(batch["image"])
        names = list(self.members) if self.judges else [self.shipped]
        self.seen.append(({name: self.members[name].net(images) for name in names}, batch["target"]))
        for name in names:
            self.taps[name].pop()  # else the last batch's features stay alive

    def on_validation_epoch_end(self) -> None:
        """The shipped member's metrics, in `validation`; and what each that judges makes of the members it hears."""
        targets = torch.cat([target for _, target in self.seen])
        logits = {name: torch.cat([said[name] for said, _ in self.seen]).float() for name in self.seen[0][0]}
        self.seen.clear()
        self.validation = evaluate(logits[self.shipped], targets)
        for name, loss in self.judges:
            loss.judge([logits[other] for other in self.members[name].hears], targets)

    def compile_nets(self) -> None:
        """Compile all networks in place: paths, taps and state stay as they are."""
        keep_buffers()
        for member in self.members.values():
            member.net.compile()

    def plain_nets(self) -> None:
        """Leave compilation behind: what judges and stores a network runs it as it was built."""
        for member in self.members.values():
            member.net._compiled_call_impl = None

    def configure_optimizers(self) -> Any:
        """One group of parameters a member, its objective's own among them, at the member's learning rate."""
        groups: list[dict[str, Any]] = []
        for name, member in self.members.items():
            self.group = len(groups) if name == self.shipped else self.group
            own = [] if member.objective is None else member.objective.parameters()
            trained = [*member.learning(), *(p for p in own if p.requires_grad)]
            if trained:
                groups.append({"params": trained, "lr": self.lr * member.rate})
        return self.optimisers(groups)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With what goes before a step."""
        if self.before is not None:
            checkpoint["before"] = self.before.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give it back what it had."""
        if self.before is not None:
            self.before.load_state_dict(checkpoint["before"])


class Prelude(Protocol):
    """What happens before a step; plain tensors and numbers are all it remembers."""

    def __call__(self, circle: Circle, batch: Batch) -> None:
        """Do it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps of it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it from the checkpoint."""
        ...


def _tune(name: str, member: Member) -> None:
    """Let nothing learn but the layers that are tuned."""
    if member.tuned is None:
        return
    member.net.requires_grad_(False)
    paths = dict(member.net.net.named_modules())
    for path in member.tuned:
        if path not in paths or not path:
            raise InputError(f"{path!r} is no layer of the {name} to tune{nearest(path, paths)}")
        paths[path].requires_grad_(True)
    if not any(p.requires_grad for p in member.net.parameters()):
        raise InputError(f"the layers of the {name} to tune ({', '.join(member.tuned)}) hold nothing that learns")
