"""BYOT: the student's deepest classifier teaches exits from its shallower layers, and so those layers.

Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation"
(2019); luanyunteng/pytorch-be-your-own-teacher, train.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.losses import checks, layers
from kd.losses.exits import _initialised, _MapHead
from kd.losses.layers import Layers, Shapes
from kd.losses.logits import soft_target_kl


def byot(
    exits: Sequence[Tensor], deepest: Tensor, target: Tensor, alpha: float = 0.1, temperature: float = 3.0
) -> Tensor:
    """Over the exits, (1 - alpha) of the cross-entropy and alpha of the KL from the deepest classifier, T² inside: sum.

    Args:
        exits: logits (N, C) of each.
        deepest: logits (N, C) of the network's own end; a constant here.
        target: class indices (N,).
        alpha: from 0 to 1.
        temperature: of the KL; above 0.

    Raises:
        BadValue: if a number is out of its range.
        InputError: if shapes differ, the batch is empty, or a label is no class.

    >>> import torch
    >>> byot([torch.zeros(1, 2)], torch.zeros(1, 2), torch.tensor([0]), alpha=0.5)
    tensor(0.3466)
    """
    alpha = checks.within("alpha", alpha, 0.0, 1.0)
    deepest = checks.logits("deepest exit", deepest).detach()
    each = []
    for exit_ in exits:
        logits, goal = checks.pair(exit_, deepest)
        known = F.cross_entropy(logits, checks.labels(target, logits))
        each.append((1 - alpha) * known + alpha * soft_target_kl(logits, goal, temperature))
    return layers.summed(each)


class BYOT(nn.Module):
    """`byot` for exits that it makes from all layers but the deepest, and each exit's features near the deepest's.

    Maps (N, D, H, W) leave through as many halving blocks as layers follow theirs, are averaged over positions to the
    width of the deepest, and a linear layer gives the logits. The exits are trained and checkpointed with the objective
    and never shipped with the student.

    Args:
        alpha: weight of the KL; 1 - alpha is the label's.
        temperature: of the KL.
        features: weight of half the squared distance between an exit's features and the deepest's, over the batch.

    >>> import torch
    >>> loss = BYOT()
    >>> loss.bind([(8, 16, 8, 8), (8, 32, 4, 4)], (8, 10))
    >>> maps = [torch.rand(8, 16, 8, 8), torch.rand(8, 32, 4, 4)]
    >>> loss(student=maps, feature=torch.rand(8, 10), target=torch.arange(8)).shape
    torch.Size([])
    """

    heads: nn.ModuleList | None
    READS = "maps"
    extra_repr = checks.shown("alpha", "temperature", "features")

    def __init__(self, alpha: float = 0.1, temperature: float = 3.0, features: float = 1e-6) -> None:
        super().__init__()
        self.alpha = checks.within("alpha", alpha, 0.0, 1.0)
        self.temperature = checks.positive("temperature", temperature)
        self.features = checks.within("features", features)
        self.register_module("heads", None)

    def bind(self, student_shape: Shapes, feature_shape: Sequence[int]) -> None:
        """Make the exits, drawing their weights from the global generator; a second time it does nothing.

        Args:
            student_shape: of two layers or more, from the shallowest to the deepest, (N, D, H, W).
            feature_shape: of its logits, (N, C).

        Raises:
            InputError: if there are fewer, or one gives no maps.
        """
        ours = layers.each_shape(student_shape)
        if len(feature_shape) != 2 or len(ours) < 2 or any(len(shape) != 4 for shape in ours):
            raise InputError(
                "byot needs two layers or more of the student that give maps (N, D, H, W), such as student.stages, and "
                f"its logits; it is given {', '.join(map(str, ours))} and {tuple(feature_shape)}"
            )
        if self.heads is None:
            made = [
                _MapHead(shape[1], ours[-1][1], feature_shape[1], following)
                for following, shape in zip(range(len(ours) - 1, 0, -1), ours[:-1], strict=True)
            ]
            self.heads = nn.ModuleList(made).apply(_initialised)

    def forward(self, student: Layers, feature: Tensor, target: Tensor) -> Tensor:
        """The scalar for layers as bound, any batch size, the network's own logits (N, C), and class indices (N,).

        Raises:
            InputError: if `bind` was not called, or the layers are others.
        """
        maps = layers.listed(student)
        if self.heads is None:
            raise InputError("byot is used before it knows its shapes; call bind(student, feature) first")
        if len(maps) != len(self.heads) + 1:
            raise InputError(f"byot was bound to {len(self.heads) + 1} layers and is given {len(maps)}")
        heads = [cast(_MapHead, head) for head in self.heads]
        pooled = [head.pooled(map_) for head, map_ in zip(heads, maps[:-1], strict=True)]
        logits = [head.classifier(vector) for head, vector in zip(heads, pooled, strict=True)]
        loss = byot(logits, feature, target, self.alpha, self.temperature)
        if self.features == 0:
            return loss
        if not checks.floats(maps[-1]) or maps[-1].ndim != 4 or maps[-1].shape[:2] != pooled[-1].shape:
            raise InputError(
                f"the student's deepest features are {checks.spelt(maps[-1])}; byot was bound to maps of "
                f"{pooled[-1].shape[1]} channels"
            )
        goal = checks.widened(maps[-1].mean(dim=(2, 3)).detach())
        far = [(checks.widened(vector) - goal).square().sum() / 2 for vector in pooled]
        return loss + self.features * layers.summed(far)
