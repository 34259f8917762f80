from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kd.errors import KDError
from kd.training.workspace import save, spec

SNAPSHOT = Path(__file__).with_name("workspace.json")


def panels(made):
    """What a reader sees: sections, panels and what each draws; the rest is W&B's defaults."""
    found = {}
    for section in made["spec"]["section"]["panel_bank_config"]["sections"]:
        found[section["name"]] = [
            {"type": panel["view_type"], **{k: v for k, v in panel["config"].items() if v is not None}}
            for panel in section["panels"]
        ]
    return found


def test_the_workspace_is_the_snapshot():
    made = spec("someone", "kd")
    assert made == spec("someone", "kd")
    assert (made["entity"], made["project"], made["display_name"]) == ("someone", "kd", "kd")
    # After a wanted change: write panels(made) there with json.dumps(…, indent=1).
    assert panels(made) == json.loads(SNAPSHOT.read_text())


def test_it_has_the_three_views():
    made = panels(spec("someone", "kd"))
    [first] = [panel for panel in made["Temperature and alpha"] if panel["type"] == "Parallel Coordinates Plot"]
    assert [column["accessor"] for column in first["columns"]] == [
        "config:dials.value.temperature", "config:dials.value.alpha", "config:dials.value.seed",
        "summary:test/accuracy",
    ]  # fmt: skip
    regexes = [panel.get("metric_regex") for panel in made["Loss by term"]]
    assert "train/(?!loss$).*" in regexes
    size = made["Size against accuracy"][0]
    assert (size["x_axis"], size["y_axis"], size["x_axis_log_scale"]) == (
        "summary:cost/parameters", "summary:test/accuracy", True,
    )  # fmt: skip


def test_without_the_extra_the_install_line_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(KDError, match=r"pip install 'kd\[dashboard\]'"):
        spec("someone", "kd")


def test_nothing_is_saved_without_a_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(KDError, match="wandb login"):
        save("someone", "kd")


def test_the_entity_is_asked_for_where_none_is_given(monkeypatch):
    import wandb
    from wandb_workspaces.workspaces import Workspace

    class Api:
        default_entity = "me"

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(Workspace, "save", lambda self: type("Saved", (), {"url": f"https://w/{self.entity}"}))
    assert save(None, "kd") == "https://w/me"
    assert save("team", "kd") == "https://w/team"


def test_what_wandb_refuses_is_one_line(monkeypatch):
    from wandb_workspaces.workspaces import Workspace

    def refuse(self):
        raise RuntimeError("permission\ndenied")

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(Workspace, "save", refuse)
    with pytest.raises(KDError, match=r"RuntimeError: permission denied"):
        save("someone", "kd")
