"""What can be composed, with one line each."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from kd.cli import main
from kd.config import conf_dir
from kd.errors import InputError
from kd.listing import GROUPS, KINDS, as_markdown, listing


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_a_group_is_listed_with_a_line(group):
    rows = listing(group)
    folder = conf_dir().parent / group if group == "experiments" else conf_dir() / group
    assert len(rows) == len(list(folder.rglob("*.yaml"))) > 0
    assert all(len(row["about"]) > 10 and "@package" not in row["about"] for row in rows)


def test_a_loss_is_listed_with_what_it_reads_and_weighs():
    rows = {row["name"]: row for row in listing("loss")}
    assert rows["ce"]["weight"] == "1 - alpha" and rows["ce"]["views"] == "student.logits, batch.target"
    assert rows["kd"]["weight"] == "alpha" and rows["kd"]["family"] == "response"
    assert rows["hint"]["views"] == "student.middle, teacher.middle"
    assert rows["uskd"]["views"] == "student.logits, student.stage3, batch.target"
    assert rows["crd"]["views"] == "student.embedding, teacher.embedding, batch.target, batch.row"
    assert rows["reviewkd"]["views"] == "student.stages, student.embedding, teacher.stages, teacher.embedding"
    assert rows["pskd"]["views"] == "student.logits, earlier.logits, batch.target"
    assert rows["crd"]["family"] == "contrastive"
    assert {rows[name]["family"] for name in ("at", "vid", "fsp", "ofd", "reviewkd")} == {"feature"}
    assert rows["dkd"]["weight"] == "1.0" and rows["dkd"]["views"] == "student.logits, teacher.logits, batch.target"


def test_a_loss_is_listed_with_its_paper_and_the_year():
    rows = {row["name"]: row for row in listing("loss")}
    assert rows["dkd"]["paper"] == "Zhao et al. 2022" and rows["dkd"]["about"].startswith("DKD: label against rest")
    assert rows["rkd"]["paper"] == "Park et al. 2019" and rows["rkd"]["family"] == "relation"
    assert rows["jsd"]["paper"] == "GKD, Agarwal et al. 2024" and rows["jsd"]["family"] == "sequence"
    without = {name for name, row in rows.items() if not re.search(r"\b(19|20)\d\d$", row["paper"])}
    assert without == {"ce"}, "the first line of a file in conf/loss is: method (authors and year): what it does"
    assert not any("(" in row["paper"] or row["about"].startswith(":") for row in rows.values())


def test_a_loss_that_is_given_other_features_is_of_its_own_family():
    rows = {row["name"]: row for row in listing("loss")}
    assert rows["infonce"]["family"] == "contrastive"  # of embedded features
    assert rows["lskd"]["family"] == rows["ctkd"]["family"] == rows["ofa_exits"]["family"] == "response"
    families = {"response", "feature", "relation", "contrastive", "sequence", "causal"}
    assert {row["family"] for row in rows.values()} == families


def test_rows_are_written_as_markdown(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["list", "loss", "--markdown"])
    head, rule, *body = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(body) == len(listing("loss"))
    assert head == "| name | family | views | weight | paper | about |" and rule.count(":--") == 6
    (dkd,) = (line for line in body if line.startswith("| `dkd` |"))
    assert dkd.startswith(
        "| `dkd` | response | student.logits, teacher.logits, batch.target | 1.0 | Zhao et al. 2022 | DKD"
    )
    assert as_markdown([{"name": "a", "about": "1|2\n<x>"}]).endswith("| `a` | 1\\|2 &lt;x> |")


def test_losses_are_listed_without_torch():
    words = "import sys; from kd.listing import listing; listing('loss'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0


def test_the_options_of_an_inner_group_are_listed_by_their_path():
    assert [row["name"] for row in listing("run")] == ["local", "logger/csv", "logger/tensorboard"]


def test_our_models_are_listed_and_how_to_see_the_others():
    rows = listing("model")
    ours = {row["name"]: row["about"] for row in rows if row["from"] == "kd"}
    assert {"seed_cnn", "seed_cnn_small", "cifar_resnet20", "cifar_wrn_40_2", "cifar_vgg8"} <= set(ours)
    assert "93,322" in ours["seed_cnn"] and "278,324" in ours["cifar_resnet20"]
    assert rows[-1]["name"] == "…" and "kd list model 'resnet*'" in rows[-1]["about"]


def test_a_pattern_chooses_models_and_says_which_have_weights():
    rows = {row["name"]: row for row in listing("model", "*net18*")}
    assert rows["resnet18"] == {"name": "resnet18", "from": "timm", "weights": "pretrained"}
    ours = listing("model", "seed_cnn*")
    assert [(row["name"], row["from"], row["weights"]) for row in ours] == [
        ("seed_cnn", "kd", ""),
        ("seed_cnn_small", "kd", ""),
    ]
    with pytest.raises(InputError, match=r"no model fits 'resnet81\*'; did you mean 'resnet18'"):
        listing("model", "resnet81*")


def test_every_stage_is_listed_with_its_version():
    rows = {row["name"]: row for row in listing("stage")}
    assert {"kd.stages.Train", "kd.stages.SoftLabels", "kd.stages.Distil"} <= set(rows)
    assert all(row["version"] >= 1 and row["about"].endswith(".") for row in rows.values())


def test_the_layers_of_a_network_are_listed_by_the_path_a_term_reads():
    rows = listing("layers", "seed_cnn_small")
    assert rows[0] == {"path": "(image)", "layer": "", "shape": "1x28x28", "part": ""}
    assert {"path": "conv3", "layer": "Sequential", "shape": "16x3x3", "part": "stage3"} in rows
    small = {row["path"]: row for row in listing("layers", "cifar_resnet8")}
    assert small["(image)"]["shape"] == "3x32x32" and small["layer3"]["shape"] == "64x8x8"
    colour = {row["path"]: row for row in listing("layers", "mobilenetv3_small_050")}
    assert colour["(image)"]["shape"] == "3x224x224" and colour["classifier"]["shape"] == "10"


def test_the_layers_that_are_parts_say_which():
    parts = {row["path"]: row["part"] for row in listing("layers", "resnet18") if row["part"]}
    assert parts == {
        **{f"layer{n}": f"stage{n}" for n in (1, 2, 3)},
        "layer4": "stage4, unpooled",
        **{f"layer{n}.1.act2": f"preactivation{n} (input)" for n in (1, 2, 3, 4)},
        "fc": "classifier, embedding (input)",
    }
    tokens = {row["path"]: row["part"] for row in listing("layers", "vit_tiny_patch16_224") if row["part"]}
    assert tokens == {f"blocks.{3 * n - 1}": f"stage{n}" for n in (1, 2, 3, 4)} | {
        "head": "classifier, embedding (input), unpooled (input)"
    }


def test_a_network_that_is_none_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match=r"there is no model 'resnet81'; did you mean 'resnet18'"):
        listing("layers", "resnet81")
    with pytest.raises(InputError, match=r"name a network, e\.g\. kd list layers resnet18"):
        listing("layers")


def test_a_kind_that_is_none_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match=r"'losss' is none of .*; did you mean 'loss'"):
        listing("losss")
    assert "layers" in KINDS
