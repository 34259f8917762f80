"""Presets on pairs of networks: every loss on layers trains a step with no path typed; what is bound is said."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from kd.config import conf_dir, jobs
from kd.errors import InputError
from kd.listing import listing
from kd.models import Normalised, create
from kd.objective import Objective
from kd.stages.base import Room
from kd.stages.bindings import bind, lines, reads_stages, views_of
from kd.stages.building import build_objective
from kd.training.module import Distiller
from kd.training.settings import Run

SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
# teacher, its options, student, its options, channels, size
PAIRS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], int, int]] = {
    "digits": ("seed_cnn", {}, "seed_cnn_small", {}, 1, 8),
    "cnn": ("resnet10t", {}, "mobilenetv3_small_050", {}, 3, 64),
    "vit": ("vit_tiny_patch16_224", {"depth": 4, "embed_dim": 48}, "resnet10t", {"stem_type": ""}, 3, 64),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, "convnext_atto", {"depths": (1, 1, 1, 1)}, 3, 64),
}
LOSSES = [row["name"] for row in listing("loss") if row["family"] in ("feature", "relation", "contrastive", "causal")]


@cache
def nets(pair: str) -> tuple[Normalised, Normalised]:
    torch.manual_seed(0)
    teacher, theirs, student, ours, channels, size = PAIRS[pair]
    made = [
        create(name, num_classes=5, in_chans=channels, size=size, options=options)
        for name, options in ((student, ours), (teacher, theirs))
    ]
    for net in made:  # timm draws some last norms as zeros, behind which nothing learns in the first step
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.rand_like(parameter) + 0.05)
    return Normalised(made[0], [0.5], [0.5]), Normalised(made[1], [0.5], [0.5])


@cache
def config(name: str) -> dict[str, Any]:
    found = dict(jobs([f"loss=[{name}]", "fit.batch_size=6"])[0][0].config["loss"])
    if name in ("crd", "wcord"):
        found[name]["loss"]["negatives"] = 4
    return found


def objective(name: str, **views: Any) -> Objective:
    made = {term: {**fields, **views} for term, fields in config(name).items()}
    return build_objective(made, Room(Run(), conf_dir()))


def bound(name: str, pair: str, **views: Any) -> tuple[Objective, list[str]]:
    torch.manual_seed(0)
    made = objective(name, **views)
    student, teacher = nets(pair)
    data = {"channels": PAIRS[pair][4], "size": PAIRS[pair][5], "num_classes": 5}
    return made, bind(made, student, teacher, data, samples=6, rehearse=True)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", [*LOSSES, "uskd"])
def test_every_loss_on_layers_trains_a_step_with_no_path_typed(name, pair):
    made, said = bound(name, pair)
    assert said and all(line.startswith(f"{name}: student.") for line in said)
    student, teacher = nets(pair)
    module = Distiller(student, made, lambda parameters: {}, teacher)
    try:
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(6, PAIRS[pair][4], *[PAIRS[pair][5]] * 2, generator=generator)
        batch = {"image": images, "target": torch.arange(6) % 5, "row": torch.arange(6)}
        module.train()
        optimiser = torch.optim.SGD([*student.parameters(), *made.parameters()], lr=1e-3)
        optimiser.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        moved = [p.grad.abs().sum() for p in student.parameters() if p.grad is not None]
        assert loss.isfinite() and all(g.isfinite() for g in moved)
        assert sum(moved) > 0, "the student hears the teacher"
        assert not [p for p in teacher.parameters() if p.grad is not None]
    finally:
        module.student_taps.remove()
        for taps in module.teacher_taps.values():
            taps.remove()


def test_the_presets_are_all_that_was_open():
    assert len(LOSSES) >= 21


def test_a_line_says_layers_shapes_connector_and_grid():
    _, said = bound("fsp", "cnn")
    assert said == [
        "fsp: student.blocks.0 (8, 16, 16) <- teacher.layer1 (64, 16, 16), connector 8->64",
        "fsp: student.blocks.1 (16, 8, 8) <- teacher.layer2 (128, 8, 8), connector 16->128",
        "fsp: student.blocks.3 (24, 4, 4) <- teacher.layer3 (256, 4, 4), connector 24->256",
        "fsp: student.blocks.5 (288, 2, 2) <- teacher.layer4 (512, 2, 2), connector 288->512",
    ]
    _, said = bound("at", "vit")
    assert said[0] == ("at: student.layer1 (64, 16, 16) <- teacher.blocks.0:maps (48, 4, 4), 16x16->4x4")
    assert said[-1] == "at: student.layer4 (512, 2, 2) <- teacher.blocks.3:maps (48, 4, 4), the teacher's 4x4->2x2"
    _, said = bound("reviewkd", "vit")
    assert said[3].endswith("teacher.blocks.3:maps (48, 4, 4), connector 512->48, 2x2->4x4")
    assert bound("rkd", "vit")[1] == ["rkd: student.fc:input (512) <- teacher.head:input (48)"]
    assert bound("cc", "vit")[1] == ["cc: student.fc:input (512) <- teacher.head:input (48), both embedded in 128"]
    assert bound("uskd", "digits")[1] == ["uskd: student.logits (5), student.conv3 (16, 2, 2)"]


def test_the_readme_quotes_what_is_bound():
    readme = (conf_dir().parent / "README.md").read_text(encoding="utf-8")
    _, quoted = readme.split("$ kd run 'loss=[ce,kd,at,fsp]'", 1)
    torch.manual_seed(0)
    found = [
        Normalised(create(name, num_classes=10, in_chans=1, size=28), [0.5], [0.5])
        for name in ("mobilenetv3_small_050", "resnet18")
    ]
    made = [line for name in ("at", "fsp") for line in bind(objective(name), *found, {"channels": 1, "size": 28})]
    assert quoted.splitlines()[1:6] == made[:5]


def test_each_with_each_is_one_line():
    (line,) = bound("semckd", "digits")[1]
    assert line.startswith("semckd: student.conv1 (8, 8, 8), student.conv2") and line.endswith(", each with each")


def test_logits_need_no_line():
    assert bound("kd", "digits")[1] == []


def test_where_one_position_is_left_the_line_says_so():
    made = objective("ft", student="student.a", teacher="teacher.b")
    shapes = {"student.a": (2, 3, 1, 1), "teacher.b": (2, 3, 2, 2)}
    assert lines(made, shapes)[0].endswith("the teacher's 2x2->1x1, one position, which says nothing")


@pytest.mark.parametrize(
    ("views", "line"),
    [
        ({"student": "student.layer3", "teacher": "teacher.blocks.1"},
         "hint: student.layer3 (256, 4, 4) <- teacher.blocks.1:maps (48, 4, 4), connector 256->48"),
        ({"student": "student.fc:input", "teacher": "teacher.head:input"},
         "hint: student.fc:input (512) <- teacher.head:input (48), connector 512->48"),
    ],
)  # fmt: skip
def test_tokens_meet_maps_on_a_grid(views, line):
    assert bound("hint", "vit", **views)[1] == [line]


@pytest.mark.parametrize(
    ("name", "views", "words"),
    [
        ("hint", {"student": "student.layer3", "teacher": "teacher.head:input"},
         r"the term 'hint' reads student.layer3 \(256, 4, 4\) and teacher.head:input \(48\): a hint cannot lead"),
        ("at", {"student": "student.fc", "teacher": "teacher.last"},
         r"the term 'at' reads student.fc \(5\) and teacher.blocks.3:maps \(48, 4, 4\): the student's features"),
        ("cc", {"student": "student.layer9"}, "'layer9' is no layer of ResNet; did you mean"),
        ("hint", {"student": "student.stages"}, "names 4 layers as its student .*takes one; name one, such as student"),
        ("fsp", {"student": "student.last"}, "names one layer as its student .*takes a list"),
        ("at", {"student": ["student.layer1", "student.layer2"], "teacher": ["teacher.last"]},
         r"the term 'at' reads student.layer1 \(64, 16, 16\) and .*: the student has 2 layers and the teacher 1"),
        ("rkd", {"student": "student.stage7"}, "the term 'rkd': ResNet has no stage7; it has 4 stages: layer1"),
        ("mgd", {"teacher": "teacher.patch_embed.proj:pooled"}, r"teacher.patch_embed.proj:pooled \(48\): mgd cannot"),
    ],
)  # fmt: skip
def test_what_cannot_be_bridged_is_refused_with_both_shapes_and_paths(name, views, words):
    with pytest.raises(InputError, match=words) as caught:
        bound(name, "vit", **views)
    assert "\n" not in str(caught.value)


def test_what_a_config_reads_of_a_side():
    terms = {
        "at": {"weight": 1, "student": ["student.stages", "student.a"], "teacher": "teacher.last:pooled"},
        "off": {"weight": 0, "student": "student.b", "teacher": "teacher.c"},
        "uskd": {"student": "student.logits", "feature": "student.stage3", "target": "batch.target"},
    }
    assert views_of(terms, "student") == ["stages", "a", "logits", "stage3"]
    assert views_of(terms, "teacher") == ["last:pooled"]
    assert reads_stages(views_of(terms, "teacher")) and not reads_stages(["logits", "a", "embedding:pooled"])
