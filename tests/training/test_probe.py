"""A few steps that nobody keeps: what they show of losses, terms, time, and of a teacher that should stand still."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd.losses.logits import cross_entropy
from kd.models import Frozen, Normalised, create
from kd.objective import Objective
from kd.training.module import Distiller
from kd.training.optimisers import configure
from kd.training.probe import loader_of, pixels, probe, speak
from kd.training.settings import Fit
from tests.training.tiny import label_term, net, run_of, split, teacher_term

DATA = {"augment": "none", "size": 4}
SGD = {"_target_": "torch.optim.SGD"}


def probed(folder, terms, teacher=None, looked=2, timed=2, **more):
    fit = Fit(epochs=2, batch_size=4, optimiser=SGD, **more)
    module = Distiller(net(), Objective(terms), configure(fit, 5), teacher)
    run = run_of(folder)
    return probe(module, loader_of(split(), fit, run, DATA, 0, None, None), fit, run, 0, looked, timed)


def normed(seed=1):
    torch.manual_seed(seed)
    return Normalised(create("cifar_resnet8", num_classes=3, in_chans=1, size=4), [0.5], [0.25])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_steps_are_those_of_a_training(precision, tmp_path):
    found = probed(tmp_path, {"ce": label_term(0.5), "kd": teacher_term(0.5)}, normed(), precision=precision, looked=6)
    assert len(found.losses) == 8 and set(found.parts[0]) == {"ce", "kd"}  # five an epoch: into the second
    for total, own in zip(found.losses, found.parts, strict=True):
        assert total == pytest.approx(0.5 * own["ce"] + 0.5 * own["kd"], rel=1e-2)
    assert found.gradients["grad_share/ce"] + found.gradients["grad_share/kd"] == pytest.approx(1)
    assert found.step_s > 0 and found.peak > 2**20
    assert (found.training, found.learning, found.moved) == ([], [], [])


def test_an_optimiser_that_asks_for_the_loss_again_is_served(tmp_path):
    fit = Fit(epochs=1, batch_size=4, optimiser={"_target_": "torch.optim.LBFGS"})
    module = Distiller(net(), Objective({"ce": label_term()}), configure(fit, 5))
    run = run_of(tmp_path)
    found = probe(module, loader_of(split(), fit, run, DATA, 0, None, None), fit, run, 0, 1, 1)
    assert len(found.losses) == 2 and found.losses[1] != found.losses[0]


def test_a_teacher_in_train_mode_is_seen_with_the_statistics_it_lost(tmp_path, monkeypatch):
    # A wrapper that follows its trainer, as a plain module would.
    monkeypatch.setattr(Frozen, "train", lambda self, mode=True: (self.module.train(mode), self)[1])
    found = probed(tmp_path, {"kd": teacher_term()}, normed())
    assert found.training and any("running_mean" in name for name in found.moved)


def test_a_teacher_that_learns_is_seen(tmp_path, monkeypatch):
    inner = Frozen.__init__

    def thawed(self, module):
        inner(self, module)
        module.requires_grad_(True)

    monkeypatch.setattr(Frozen, "__init__", thawed)
    found = probed(tmp_path, {"kd": teacher_term()}, normed())
    assert "net.stem.conv.weight" in found.learning and not found.training


def test_a_term_of_tiny_weight_has_a_tiny_share_and_one_that_is_not_finite_is_recorded(tmp_path):
    class Odd(nn.Module):
        def forward(self, student, target):
            return cross_entropy(student, target) * float("nan")

    found = probed(tmp_path, {"ce": label_term(), "kd": teacher_term(1e-6)}, net(1))
    assert 0 < found.gradients["grad_share/kd"] < 0.01
    found = probed(tmp_path, {"ce": label_term(), "odd": label_term(0.5, Odd())})
    assert found.parts[0]["odd"] != found.parts[0]["odd"]


def test_what_a_network_says_and_what_pixels_there_are(tmp_path):
    run, part = run_of(tmp_path), split()
    logits, targets, seconds = speak(net(), part, DATA, run, 10)
    assert logits.equal(net().eval()(part.images[:10] / 255).detach()) and targets.equal(part.targets[:10])
    assert seconds > 0
    mean, std = pixels(part, DATA, run, 100)
    assert mean == pytest.approx([(part.images / 255).mean().item()], rel=1e-4)
    assert std == pytest.approx([(part.images / 255).std().item()], rel=1e-3)
