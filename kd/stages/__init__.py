"""Stages: one dataclass each; fields are its config, `run` makes its artifact. Torch is imported late."""

from kd.stages.base import Room, Stage
from kd.stages.branches import Branches
from kd.stages.circle import Circle
from kd.stages.compare import Compare
from kd.stages.dream import Dream
from kd.stages.ensemble import Ensemble
from kd.stages.export import Export
from kd.stages.finetune import FineTune
from kd.stages.fingerprints import code_print, environment_print
from kd.stages.image import Distil, Train
from kd.stages.labels import SoftLabels
from kd.stages.lowrank import LowRank
from kd.stages.meta import MetaDistil
from kd.stages.prune import Prune
from kd.stages.quantize import Quantize

__all__ = [
    "Branches",
    "Circle",
    "Compare",
    "Distil",
    "Dream",
    "Ensemble",
    "Export",
    "FineTune",
    "LowRank",
    "MetaDistil",
    "Prune",
    "Quantize",
    "Room",
    "SoftLabels",
    "Stage",
    "Train",
    "code_print",
    "environment_print",
]
