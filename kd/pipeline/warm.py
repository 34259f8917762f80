"""What the server imports once for all jobs: the slow packages and the code. Importing it is all it is for.

timm brings wandb along: half a second that each job would spend again. Nothing of it is started before a job is forked.
"""

import safetensors.torch
import timm
import torch
import torchmetrics

import kd.compress.channels
import kd.compress.heads
import kd.compress.lowrank
import kd.compress.masks
import kd.compress.measure
import kd.compress.prune
import kd.compress.ranks
import kd.compress.recurrent
import kd.compress.sites
import kd.compress.structure
import kd.data.augment
import kd.data.readers
import kd.losses.across
import kd.losses.boundary
import kd.losses.collaborative
import kd.losses.contrastive
import kd.losses.ensemble
import kd.losses.feature
import kd.losses.flow
import kd.losses.layers
import kd.losses.logits
import kd.losses.maps
import kd.losses.native
import kd.losses.own_exits
import kd.losses.relation
import kd.losses.response
import kd.losses.self_taught
import kd.losses.sequence
import kd.losses.tokens
import kd.models
import kd.objective
import kd.pipeline.work
import kd.stages.labels
import kd.tasks.image
import kd.training.labelling
import kd.training.loggers
import kd.training.optimisers
import kd.training.trainer
from kd.stages import code_print
from kd.training.memory import keep_memory

__all__ = ["kd", "safetensors", "timm", "torch", "torchmetrics"]

# Kept for the forked jobs: the digest on a card is of the code they run, not of files edited since.
code_print()
keep_memory()  # the forked jobs inherit it
