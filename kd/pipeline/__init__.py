"""Pipelines: plan the keys of the stages, run what is missing, reproduce what is stored."""

from kd.pipeline.execute import execute
from kd.pipeline.plan import Node, Plan, plan

__all__ = ["Node", "Plan", "execute", "plan"]
