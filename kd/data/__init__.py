"""Data sets as splits: uint8 images, labels and stable sample ids; planning with them needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kd.data.source import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST, HubImages, ImageFolder, Source, Synthetic

if TYPE_CHECKING:
    from kd.data.split import Split, Splits

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Digits",
    "FashionMNIST",
    "HubImages",
    "ImageFolder",
    "Source",
    "Split",
    "Splits",
    "Synthetic",
]


def __getattr__(name: str) -> Any:
    """`Split` and `Splits` on first use: they hold tensors, and planning must not wait for torch."""
    if name in ("Split", "Splits"):
        from kd.data import split

        return getattr(split, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
