"""Images from a network alone: noise that is moved until it looks to the network as its training data did.

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion" (2020); NVlabs/DeepInversion,
cifar10/deepinversion_cifar10.py, without its competition with the student, and with the last images where its "best"
ones are the last too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import InputError
from kd.models import Normalised
from kd.training.seeds import mix


@dataclass(frozen=True)
class Recipe:
    """How images are made: all of it is hashed.

    Args:
        steps: of Adam, on each batch.
        lr: of Adam, on normalised pixels.
        statistics: weight of the distance to the running statistics of batch norms.
        first: of these, what that of the first is multiplied by.
        variation: weight of the total variation.
        l2: weight of the norm of the pixels.
        jitter: pixels that the images are rolled by at most, another way in each step.
    """

    steps: int
    lr: float
    statistics: float
    first: float
    variation: float
    l2: float
    jitter: int


def total_variation(images: Tensor) -> Tensor:
    """Four L2 norms, added up: of the differences to the neighbour beside, below, and on both diagonals.

    Each is the norm over the whole batch (N, C, H, W), as in the authors' code, so it grows with the root of N.

    >>> total_variation(torch.tensor([[[[0.0, 3.0], [4.0, 0.0]]]]))
    tensor(11.)
    """
    pairs = (
        (images[:, :, :, :-1], images[:, :, :, 1:]),
        (images[:, :, :-1, :], images[:, :, 1:, :]),
        (images[:, :, 1:, :-1], images[:, :, :-1, 1:]),
        (images[:, :, :-1, :-1], images[:, :, 1:, 1:]),
    )
    return torch.stack([torch.linalg.vector_norm(one - other) for one, other in pairs]).sum()


def norms_of(net: nn.Module) -> list[nn.Module]:
    """The batch norms of a network that keep running statistics, in the order of its modules."""
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return [m for m in net.modules() if isinstance(m, kinds) and m.running_mean is not None]


def check(net: nn.Module) -> None:
    """Refuse a network that says nothing of the data it was trained on.

    Raises:
        InputError: if it has no batch norm.
    """
    if not norms_of(net):
        raise InputError(
            f"the teacher {type(net).__name__} has no batch normalisation, and images are made from its statistics: "
            "choose another, e.g. teacher.name=cifar_resnet8, or distil on data (pipeline=distil)"
        )


class Statistics:
    """How far the batch that a network sees is from the running statistics of its batch norms.

    For each: the L2 distance of the means of what it is given plus that of the variances (biased, over batch and
    positions). Hooks are there until `remove`.

    Args:
        net: the plain net, in eval mode.
    """

    def __init__(self, net: nn.Module) -> None:
        self.found: list[Tensor] = []
        self._handles = [norm.register_forward_pre_hook(self._see) for norm in norms_of(net)]

    def _see(self, norm: Any, args: Sequence[Tensor]) -> None:
        given = args[0]
        axes = [axis for axis in range(given.ndim) if axis != 1]
        mean, variance = given.mean(dim=axes), given.var(dim=axes, unbiased=False)
        far = torch.linalg.vector_norm(mean - norm.running_mean)
        self.found.append(far + torch.linalg.vector_norm(variance - norm.running_var))

    def pop(self, first: float = 1.0) -> Tensor:
        """The sum over all batch norms of the last pass, the first times ``first``."""
        found, self.found = self.found, []
        return torch.stack([found[0] * first, *found[1:]]).sum()

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()


def dream(
    teacher: Normalised,
    targets: Tensor,
    shape: Sequence[int],
    recipe: Recipe,
    seed: int,
    batch: int,
    tell: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Make one batch of images: a function of the teacher, the targets, the recipe, the seed and the batch's number.

    Minimises cross-entropy with the targets + statistics * distance to the running statistics + variation * total
    variation + l2 * norm, on normalised pixels that stay within those of an image. Gives uint8 (N, C, H, W).

    Args:
        teacher: on the device where it is done; left in eval mode.
        targets: class indices (N,).
        shape: of an image, (C, H, W).
        recipe: how.
        seed: of the noise and the jitter.
        batch: its number.
        tell: hears of each step.

    Raises:
        InputError: if the teacher has no batch norm.
    """
    check(teacher)
    teacher.eval().requires_grad_(False)
    device = teacher.mean.device
    generator = torch.Generator().manual_seed(mix(seed, "dream", batch))  # on the CPU: the same for any device
    low, high = ((edge - teacher.mean) / teacher.std for edge in (0.0, 1.0))
    noise = torch.randn((len(targets), *shape), generator=generator).to(device)
    pixels = torch.minimum(torch.maximum(noise, low), high).requires_grad_()
    targets = targets.to(device)
    optimiser = torch.optim.Adam([pixels], lr=recipe.lr)
    offsets = torch.randint(-recipe.jitter, recipe.jitter + 1, (recipe.steps, 2), generator=generator).tolist()
    statistics = Statistics(teacher.net)
    try:
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            for step, (down, right) in enumerate(offsets):
                seen = torch.roll(pixels, (down, right), dims=(2, 3))
                loss = F.cross_entropy(teacher.net(seen), targets) + recipe.statistics * statistics.pop(recipe.first)
                if recipe.variation:
                    loss = loss + recipe.variation * total_variation(seen)
                if recipe.l2:
                    loss = loss + recipe.l2 * torch.linalg.vector_norm(seen)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                with torch.no_grad():
                    pixels.copy_(torch.minimum(torch.maximum(pixels, low), high))
                tell(step)
    finally:
        statistics.remove()
    images = (pixels.detach() * teacher.std + teacher.mean) * 255
    return images.round().clamp(0, 255).to(torch.uint8).cpu()


def judged(teacher: Normalised, images: Tensor, targets: Tensor, batch_size: int) -> tuple[float, float]:
    """How often the teacher says of an image what it was made to show, and the mean distance of a batch's statistics.

    Args:
        teacher: on the device where it is asked.
        images: uint8 (N, C, H, W), as a student sees them.
        targets: class indices (N,).
        batch_size: images whose statistics are taken together.
    """
    device, statistics = teacher.mean.device, Statistics(teacher.eval().net)
    right, far = 0, []
    try:
        with torch.no_grad():
            for some, wanted in zip(torch.split(images, batch_size), torch.split(targets, batch_size), strict=True):
                said = teacher(some.to(device).float() / 255).argmax(dim=1)
                right += int((said == wanted.to(device)).sum())
                far.append(float(statistics.pop()))
    finally:
        statistics.remove()
    return right / len(targets), sum(far) / len(far)
