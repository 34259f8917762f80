"""The passes that terms ask for beside the plain one: both networks under an interchange of activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kd.models import Normalised, Taps
from kd.models.interchange import exchanged, width
from kd.models.taps import Layout
from kd.objective import Objective, own_view


def again(
    objective: Objective,
    nets: Mapping[str, tuple[Normalised, Taps]],
    images: Tensor,
    views: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What the networks say of a batch under what the terms of this step intervene by; empty where none does.

    Only the student's passes leave a trace for the gradient, if gradients are wanted at all. They run uncompiled.

    Args:
        objective: its terms, where training stands.
        nets: by side, `student` and the teachers that are heard, each with the taps of its objective's layers.
        images: as the networks are given them.
        views: of the plain passes, which the exchanged activations come from.
    """
    found: dict[str, Tensor] = {}
    for name, change in objective.again.items():
        sources = change.sources(len(images)).to(images.device, non_blocking=True)
        for side in change.sides:
            net, taps = nets[side]
            layout, given = Layout.of(net.net), {}
            for pair, path in enumerate(change.layers(side)):
                plain = views[f"{side}.{path}"]
                given[path] = plain.index_select(0, sources), change.channels(width(plain, layout), pair)
            wanted = torch.is_grad_enabled() and side == "student"
            with torch.set_grad_enabled(wanted), exchanged(net.net, given):
                found[own_view(name, f"{side}.logits")] = net.forward(images)
            found |= {own_view(name, f"{side}.{path}"): value for path, value in taps.pop().items()}
    return found
