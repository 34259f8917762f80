"""Nets: built by name, normalised, frozen, tapped, stored."""

from kd.models.build import Normalised, create, name_stages, preprocessing
from kd.models.files import load, plain, recipe_of, save, weights_digest
from kd.models.frozen import Frozen
from kd.models.graft import Grafted, part_of
from kd.models.outline import Outline, outline
from kd.models.taps import Taps, layers

__all__ = [
    "Frozen",
    "Grafted",
    "Normalised",
    "Outline",
    "Taps",
    "create",
    "layers",
    "load",
    "name_stages",
    "outline",
    "part_of",
    "plain",
    "preprocessing",
    "recipe_of",
    "save",
    "weights_digest",
]
