"""What the README says can be typed: commands parse and compose, links and hashes are right, one part is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from kd.cli import app
from kd.config import Job, jobs
from kd.launch import sweep_id
from kd.listing import KINDS, as_markdown, listing
from kd.pipeline.launchers import split_words
from kd.pipeline.plan import plan
from kd.report.markdown import update_markdown
from kd.store import short
from tests.pipeline.small import WORDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)


def words(line: str) -> list[str]:
    """A line of a shell block as its words, without prompt and comment."""
    return shlex.split(line.strip().removeprefix("$ "), comments=True)


def lines(text: str) -> list[list[str]]:
    """The lines of a block that hold a command."""
    return [found for line in text.replace("\\\n", " ").splitlines() if (found := words(line))]


TYPED = [line for kind, text in BLOCKS if kind in ("bash", "console") for line in lines(text)]
# In the prose and its tables a command stands between single backticks.
INLINE = [words(span) for span in re.findall(r"`(kd [^`]+)`", PROSE)]
NAMED = {line[1] for line in INLINE if len(line) == 2}  # `kd diff` names a command, and is none to type
COMMANDS = [line for line in [*TYPED, *(line for line in INLINE if len(line) > 2)] if line[0] == "kd"]


def after(marker: str) -> str:
    """The text of the block that follows an HTML comment."""
    found = re.search(rf"^<!-- {re.escape(marker)} -->\n```\w*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found, f"the README has no block after <!-- {marker} -->"
    return found[1]


@cache
def composed(overrides: tuple[str, ...], multirun: bool = False, folder: str | None = None) -> tuple[list[Job], bool]:
    """The jobs of a command; those of an experiment are composed once for all lines that name it."""
    return jobs(list(overrides), multirun, folder)


def parsed(line: list[str]) -> tuple[str, dict[str, Any]]:
    """The subcommand's name and its parameters; raises as the command line would."""
    command: Any = get_command(app)
    name, rest = [], line[1:]
    while hasattr(command, "commands"):
        if command.invoke_without_command and not (rest and rest[0] in command.commands):
            break  # `kd doctor --no-gpu`
        assert rest and rest[0] in command.commands, f"`{' '.join(line)}`: no such command"
        name.append(rest[0])
        command, rest = command.commands[rest[0]], rest[1:]
    return " ".join(name), dict(command.make_context(name[-1], list(rest)).params)


def test_the_reader_found_what_there_is_to_check() -> None:
    every = set(get_command(app).commands)
    assert {parsed(line)[0].split()[0] for line in COMMANDS} == every, "an example of each command, and of no other"
    assert every > NAMED
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("line", COMMANDS, ids=" ".join)
def test_a_command_parses_and_its_overrides_compose(line: list[str]) -> None:
    name, given = parsed(line)
    if name in ("run", "plan", "bench step", "doctor run"):
        found, sweep = composed(
            tuple(split_words(given["words"] or ())[0]), given.get("multirun", False), given.get("config_dir")
        )
        assert len(found) > 1 if sweep else len(found) == 1
    elif name == "report":
        for word in given["what"] or []:
            assert "=" not in word or composed((word,), False, None)
        assert given["markdown"] is None or (ROOT / given["markdown"]).is_file()
    elif name == "list":
        assert given["what"] in KINDS


def test_the_make_targets_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {line[1] for line in TYPED if line[0] == "make"} | set(re.findall(r"`(?:exec )?make (\w+)`", PROSE))
    assert {"quickstart", "test"} <= named <= targets
    assert README.splitlines()[2:5][1].startswith("make quickstart"), "the first thing a reader sees is how to start"


def test_every_relative_link_resolves() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PROSE) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        text = (ROOT / path).read_text(encoding="utf-8") if path else README
        heads = [
            re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-")
            for head in re.findall(r"^#+ (.*)", text, re.M)
        ]
        assert not anchor or anchor in heads, link


def test_every_experiment_is_named() -> None:
    for path in (ROOT / "experiments").glob("*.md"):
        assert f"(experiments/{path.name})" in PROSE


def test_the_quoted_hashes_are_those_of_the_quoted_command() -> None:
    text = after("output of quickstart")
    command = next(line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "kd run -m" in line)
    plans = [
        plan(job.config, job.overrides) for job in composed(tuple(words(command.partition("kd run -m")[2])), True)[0]
    ]
    keys = {short(node.key) for one in plans for node in one.nodes if node.name != "labels"}
    quoted = set(re.findall(r"\b[0-9a-f]{16}\b", text))
    # Where a default has changed on purpose: run `make quickstart` and put what it printed into the README.
    assert quoted == keys | {sweep_id(plans)}


def test_the_hashes_of_the_quoted_doctor_are_those_of_its_command() -> None:
    text = after("output of doctor run")
    plans = [plan(job.config, job.overrides) for job in composed(("alpha=0.999",))[0]]
    baseline = [plan(job.config, job.overrides) for job in composed(("pipeline=baseline",))[0]]
    keys = {short(node.key) for node in plans[0].nodes} | {short(baseline[0].key)}
    assert set(re.findall(r"\b[0-9a-f]{16}\b", text)) == keys


def test_a_part_of_it_is_run(tmp_path: Path) -> None:
    environment = {**os.environ, "KD_STORE": str(tmp_path / "store")}
    known, said = "", []
    for line in lines(after("run by tests/test_readme.py")):
        arguments = [known if word == "HASH" else word for word in line[1:]]
        small = WORDS if arguments[0] == "run" else ()
        done = subprocess.run(
            [sys.executable, "-m", "kd", *arguments, *small],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        if found := re.search(r"^run ([0-9a-f]{16}):", done.stdout, re.MULTILINE):
            known = found[1]
    ran, listed, verdict = said
    assert "ran 1 teacher, 1 labels, 1 student" in ran
    assert known and known in listed
    assert "bit-identical" in verdict


def test_the_table_of_losses_is_the_commands(tmp_path: Path) -> None:
    """Mend it by `kd list loss --markdown`, pasted between the markers."""
    page = tmp_path / "README.md"
    page.write_text(README, encoding="utf-8")
    assert not update_markdown(page, "losses", as_markdown(listing("loss")))


def test_the_graph_that_the_readme_draws_is_the_one_of_its_pipeline(tmp_path: Path) -> None:
    from kd.pipeline.tree import tree

    (job,), _ = jobs([f"run.store={tmp_path}", "pipeline=dense", "assistants=[seed_cnn]"])
    assert after("output of plan") == "\n".join(tree(plan(job.config).nodes)) + "\n"
