"""Mistakes that published implementations make, numbered as we found them, and the test that would see each here.

Most tests stand beside what they are about; `MISTAKES` says where. Those that are about all losses, or about no one
loss, stand below.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kd.errors import InputError
from kd.losses.logits import CrossEntropy, SoftTargetKL, Standardised
from kd.losses.sequence import ForwardKL
from kd.models import Frozen
from kd.models.taps import Taps
from kd.objective import Objective, Term
from kd.training.module import Distiller
from kd.training.settings import Fit
from tests.losses.test_contract import LOSSES, Case
from tests.training import tiny

ROOT = Path(__file__).resolve().parents[2]
HERE = "losses/test_mistakes.py"
MISTAKES: dict[str, list[tuple[str, str]]] = {
    "1. an alpha of 0 drops the temperature squared and the weight": [
        (HERE, "test_a_sweep_of_alpha_that_begins_at_zero_keeps_the_temperature_squared"),
        ("test_objective.py", "test_alpha_is_continuous_at_its_ends"),
    ],
    "2. the second argument of normalize taken for an axis": [
        ("losses/test_relation.py", "test_sp_normalises_rows_by_their_l2_norm_and_not_by_their_sum")
    ],
    "3. a correlation added in place of 1 less it": [
        ("losses/test_response.py", "test_dist_is_zero_at_identity_and_largest_where_the_classes_are_turned_round")
    ],
    "4. terms in a plain dict, so that memories and layers are lost on resuming": [
        (HERE, "test_no_loss_keeps_a_tensor_or_a_layer_where_its_state_does_not_see_it"),
        (
            "losses/test_contrastive.py",
            "test_memory_and_constants_are_in_the_state_so_a_resumed_run_goes_on_with_the_same",
        ),
    ],
    "5. hooks set on the class, so that a second training overwrites the first": [
        (HERE, "test_two_trainings_in_one_process_do_not_hear_each_others_layers"),
        ("test_readme.py", "test_a_command_parses_and_its_overrides_compose"),  # theirs had options that are none
    ],
    "6. stored outputs found by index alone, whatever the crop; none in bfloat16": [
        ("stages/test_labels.py", "test_as_many_views_as_epochs_are_the_live_teacher_to_the_last_bit"),
        ("stages/test_labels.py", "test_a_student_that_sees_other_views_than_its_labels_is_refused"),
        ("data/test_labels.py", "test_half_precision_is_read_back_as_float32_within_its_step"),
    ],
    "7. variances in a list, never trained": [
        ("losses/test_feature.py", "test_vid_trains_its_variances_and_they_are_in_the_state")
    ],
    "8. a sum over the batch that is called a mean": [
        (HERE, "test_no_loss_is_a_sum_over_the_batch"),
        ("losses/test_response.py", "test_dkd_is_a_mean_over_the_batch_and_not_its_sum"),
    ],
    "9. a teacher whose dropout is on": [
        ("models/test_frozen.py", "test_batch_statistics_stay_as_they_were_and_outputs_repeat"),
        ("models/test_frozen.py", "test_it_stays_in_eval_mode_whatever_its_owner_does"),
    ],
    "10. a mean over classes too; terms in the order of a set": [
        ("losses/test_logits.py", "test_the_mean_is_over_the_batch_and_the_sum_over_classes"),
        ("losses/test_sequence.py", "test_the_divisor_is_the_number_of_tokens_and_not_of_logits"),
        ("test_objective.py", "test_the_seed_decides_the_projections_and_the_order_of_the_terms_does_not"),
    ],
    "11. labels and logits cut into other pieces; a cross-entropy that is called KL; a mean divided once more": [
        ("losses/test_tokens.py", "test_fifty_tokens_go_into_eight_pieces"),
        ("losses/test_sequence.py", "test_it_is_zero_at_identity"),
        (HERE, "test_the_gradient_over_tokens_is_divided_by_their_number_once"),
    ],
    "12. a squared error that is called KL; a student left in evaluation; gradients through the teacher": [
        ("losses/test_logits.py", "test_kl_matches_hand_computation"),
        (HERE, "test_the_student_is_back_in_training_after_a_validation"),
        ("models/test_frozen.py", "test_nothing_of_it_asks_for_gradients"),
    ],
    "13. no temperature squared, so that a sweep of the temperature is one of the weight": [
        ("losses/test_logits.py", "test_the_gradient_keeps_its_size_while_the_temperature_grows")
    ],
    "14. a beta that is the student's share": [("losses/test_sequence.py", "test_beta_is_the_teachers_share")],
    "15. teacher and student exchanged in the KL": [
        ("losses/test_logits.py", "test_kl_is_of_the_teacher_to_the_student_and_not_the_reverse")
    ],
    "16. what an editor imported; parts computed and then left out": [
        (HERE, "test_losses_import_the_standard_library_torch_and_no_screen"),
        ("losses/test_response.py", "test_each_temperature_of_mlkd_adds_its_class_part_for_the_views_it_is_given"),
    ],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_has_a_test_that_is_there(mistake: str) -> None:
    for path, name in MISTAKES[mistake]:
        tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path} has no {name}"


def test_all_sixteen_are_told() -> None:
    assert [int(mistake.partition(".")[0]) for mistake in MISTAKES] == list(range(1, 17))


# 1.


@pytest.mark.parametrize("loss", [SoftTargetKL(4.0), Standardised(SoftTargetKL(4.0))], ids=["kd", "lskd"])
def test_a_sweep_of_alpha_that_begins_at_zero_keeps_the_temperature_squared(loss: nn.Module) -> None:
    views = {"student.logits": torch.tensor([[1.0, 0.0, 2.0]]), "teacher.logits": torch.tensor([[0.0, 3.0, 1.0]])}
    views["batch.target"] = torch.tensor([0])

    def total(alpha: float) -> float:
        ce = Term(CrossEntropy(), 1 - alpha, student="student.logits", target="batch.target")
        kd = Term(loss, alpha, student="student.logits", teacher="teacher.logits")
        return float(Objective({"ce": ce, "kd": kd})(views)[0])

    hard, soft = total(0.0), float(loss(student=views["student.logits"], teacher=views["teacher.logits"]))
    assert hard == CrossEntropy()(views["student.logits"], views["batch.target"])  # the label alone, to the bit
    for alpha in (1e-6, 0.1, 0.5, 1.0):
        assert total(alpha) == pytest.approx((1 - alpha) * hard + alpha * soft, rel=1e-6)


# 4.


REGISTERS = ("_parameters", "_buffers", "_modules")


def hidden(thing: Any, registered: set[int]) -> Iterator[Any]:
    """Tensors and layers in lists, tuples and dicts, but for those that are registered."""
    if isinstance(thing, (Tensor, nn.Module)):
        if id(thing) not in registered:
            yield thing
    elif isinstance(thing, (list, tuple, set)):
        for one in thing:
            yield from hidden(one, registered)
    elif isinstance(thing, dict):
        yield from hidden(list(thing.values()), registered)


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_no_loss_keeps_a_tensor_or_a_layer_where_its_state_does_not_see_it(case: Case) -> None:
    loss = case.loss()
    loss(**case.views())  # what it makes when it is first used included
    known = {id(thing) for thing in [*loss.modules(), *loss.parameters(), *loss.buffers()]}
    # What is lent of a teacher is hidden on purpose: it follows `.to()`, and is neither trained nor stored.
    known |= {id(module.module) for module in loss.modules() if isinstance(module, Frozen)}
    for module in loss.modules():
        plain = {name: value for name, value in vars(module).items() if name not in REGISTERS}
        found = list(hidden(plain, known))
        assert not found, f"{type(module).__name__} keeps {found} where no state_dict, optimiser or .to() finds it"


def test_a_layer_in_a_plain_dict_would_be_found() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.terms = {"a": [nn.Linear(1, 1)]}

    assert len(list(hidden(vars(Careless())["terms"], set()))) == 1


# 5.


def test_two_trainings_in_one_process_do_not_hear_each_others_layers() -> None:
    class Net(nn.Sequential):
        pass

    first, second = (Net(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, width)) for width in (4, 5))
    hears_first, hears_second = Taps(first, ["0"]), Taps(second, ["2"])
    image = torch.ones(1, 2)
    first(image)
    second(image)
    assert {name: value.shape for name, value in hears_first.pop().items()} == {"0": (1, 3)}
    assert {name: value.shape for name, value in hears_second.pop().items()} == {"2": (1, 5)}
    third = Net(nn.Linear(2, 3))
    third(image)
    with pytest.raises(InputError, match="was not run"):  # nothing has passed through the first since
        hears_first.pop()


# 8.


ALONE = [case for case in LOSSES if not any(getattr(part, "COMPARES_SAMPLES", False) for part in case.make().modules())]


# One draws a mask for each sample, and one sums a part over the batch, as its authors do, by a weight of 1e-6.
SPARED = ("mgd", "byot")


@pytest.mark.parametrize("case", [case for case in ALONE if case.name not in SPARED], ids=lambda case: case.name)
def test_no_loss_is_a_sum_over_the_batch(case: Case) -> None:
    loss, views = case.loss(torch.float64), case.views(torch.float64)
    twice = {name: torch.cat([view, view]) for name, view in views.items()}
    assert_close(loss(**twice), loss(**views))


# 11.


def test_the_gradient_over_tokens_is_divided_by_their_number_once() -> None:
    student, teacher = torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 6, 5)
    counts = torch.arange(12).reshape(2, 6) % 4 != 3
    ForwardKL()(student, teacher, counts).backward()
    expected = (student.detach().softmax(-1) - teacher.softmax(-1)) * counts[..., None] / counts.sum()
    assert student.grad is not None
    assert_close(student.grad, expected)


# 12.


def test_the_student_is_back_in_training_after_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[str, bool]] = []

    def noted(name: str, step: Any) -> Any:
        def noting(self: Distiller, *given: Any) -> Any:
            modes.append((name, self.student.training))
            return step(self, *given)

        return noting

    for name in ("training_step", "validation_step"):
        monkeypatch.setattr(Distiller, name, noted(name, getattr(Distiller, name)))
    fit = Fit(epochs=3, batch_size=4, lr=0.1, optimiser={"_target_": "torch.optim.SGD"})
    tiny.fitted(tmp_path, fit)
    assert modes.count(("training_step", True)) == 15 and ("training_step", False) not in modes
    assert modes.count(("validation_step", False)) >= 3 and ("validation_step", True) not in modes
    assert modes[-1][0] == "validation_step" != modes[-2][0]  # the last one came after the last step


# 16.


def test_losses_import_the_standard_library_torch_and_no_screen() -> None:
    roots = set()
    for path in (ROOT / "kd" / "losses").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots |= {name.partition(".")[0] for name in names}
    assert {"torch", "kd"} <= roots
    assert roots - {"torch", "kd"} <= set(sys.stdlib_module_names) - {"turtle", "termios", "tkinter", "curses"}
