"""What the server imports once for all jobs: the slow packages. Importing it is all it is for."""

import safetensors.torch
import timm
import torch
import torchmetrics

import kd.pipeline.work
import kd.stages
import kd.training.trainer

__all__ = ["kd", "safetensors", "timm", "torch", "torchmetrics"]
