"""Nets: built by name, normalised, frozen, tapped, stored."""

from kd.models.build import Normalised, create, preprocessing
from kd.models.files import load, plain, save, weights_digest
from kd.models.frozen import Frozen
from kd.models.taps import Taps, layers

__all__ = [
    "Frozen",
    "Normalised",
    "Taps",
    "create",
    "layers",
    "load",
    "plain",
    "preprocessing",
    "save",
    "weights_digest",
]
