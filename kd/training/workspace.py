"""The W&B workspace as code: what the dashboard shows is read here, not clicked together."""

from __future__ import annotations

import importlib
import json
import warnings
from types import ModuleType
from typing import Any

from kd.errors import KDError

NAME = "kd"


def spec(entity: str, project: str) -> dict[str, Any]:
    """The workspace as plain data, the same at each call (W&B's random panel ids are numbered).

    Raises:
        KDError: if wandb-workspaces is not installed.

    >>> [section["name"] for section in _sections(spec("me", "kd"))]
    ['Temperature and alpha', 'Loss by term', 'Size against accuracy']
    """
    # By way of JSON: the model's dump holds enumerations and dates.
    made = json.loads(_build(entity, project)._to_model().model_dump_json())
    number = 0
    for section in _sections(made):
        for panel in section["panels"]:
            panel["id"] = f"panel-{number}"
            number += 1
    return dict(made)


def save(entity: str | None, project: str) -> str:
    """Save the workspace to W&B; returns its address. Without an entity it is the one W&B knows the user by.

    Raises:
        KDError: if wandb-workspaces is not installed, nobody is logged in, or W&B refuses.
    """
    from kd.training.tracking import logged_in, one_line

    if not logged_in():
        raise KDError("W&B has no key here, so nothing was saved; run `wandb login` first")
    try:
        if entity is None:
            import wandb

            entity = str(wandb.Api().default_entity)
        return str(_build(entity, project).save().url)
    except KDError:  # ours already: the extra is not installed
        raise
    except Exception as error:  # the client raises its own, requests' and GraphQL's
        raise KDError(f"W&B did not take the workspace ({one_line(error)})") from error


def _sections(made: dict[str, Any]) -> list[dict[str, Any]]:
    return list(made["spec"]["section"]["panel_bank_config"]["sections"])


def _build(entity: str, project: str) -> Any:
    ws, wr = _load("wandb_workspaces.workspaces"), _load("wandb_workspaces.reports.v2")
    accuracy = wr.SummaryMetric("test/accuracy")
    axes = [wr.Config("dials.temperature"), wr.Config("dials.alpha"), wr.Config("dials.seed"), accuracy]
    names = ["temperature", "alpha", "seed", "test accuracy"]
    columns = [
        wr.ParallelCoordinatesPlotColumn(metric=axis, display_name=name) for axis, name in zip(axes, names, strict=True)
    ]
    step = "trainer/global_step"
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(
                name="Temperature and alpha",
                is_open=True,
                panels=[
                    wr.ParallelCoordinatesPlot(
                        title="temperature x alpha", columns=columns, layout=wr.Layout(w=16, h=8)
                    ),
                    wr.ScatterPlot(title="alpha", x=wr.Config("dials.alpha"), y=accuracy, layout=wr.Layout(w=8, h=8)),
                ],
            ),
            ws.Section(
                name="Loss by term",
                is_open=True,
                panels=[
                    wr.LinePlot(title="train loss", x=step, y=["train/loss"]),
                    wr.LinePlot(title="each term", x=step, metric_regex="train/(?!loss$).*"),
                    wr.LinePlot(title="gradient of each term", x=step, metric_regex="grad/.*", log_y=True),
                    wr.LinePlot(title="share of each term in the gradient", x=step, metric_regex="grad_share/.*"),
                    wr.LinePlot(title="validation accuracy", x=step, y=["val/accuracy"]),
                    wr.LinePlot(title="validation loss", x=step, y=["val/loss"]),
                ],
            ),
            ws.Section(
                name="Size against accuracy",
                is_open=True,
                panels=[
                    wr.ScatterPlot(
                        title=title, x=wr.SummaryMetric(f"cost/{column}"), y=accuracy, log_x=True, layout=wr.Layout(w=8)
                    )
                    for title, column in (
                        ("parameters", "parameters"),
                        ("bytes", "bytes"),
                        ("latency", "latency_ms_batch1"),
                    )
                ],
            ),
        ],
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group"), ws.Metric("JobType")]),
    )


def _load(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            # wandb-workspaces still builds its models the pydantic 1 way, and says so at each import.
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise KDError("the W&B workspace needs wandb-workspaces: pip install 'kd[dashboard]'") from error
