"""Image classification: the metrics of a split."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_stat_scores

from kd.errors import InputError, KDError

BINS = 15  # of the calibration error, as in Guo et al., "On Calibration of Modern Neural Networks" (2017)


def agreement(student: Tensor, teacher: Tensor) -> float:
    """Fraction of rows where the student's logits (N, C) and the teacher, its logits or choices (N,), agree on a class.

    >>> agreement(torch.eye(2), torch.tensor([[0.9, 0.1], [0.6, 0.4]])), agreement(torch.eye(2), torch.tensor([0, 0]))
    (0.5, 0.5)
    """
    chosen = teacher if teacher.ndim == 1 else teacher.argmax(dim=1)
    return _fraction(student.argmax(dim=1).cpu() == chosen.cpu())


def evaluate(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> dict[str, float | list[float]]:
    """All metrics of one split, from its logits.

    `accuracy`, `accuracy_top5` (of min(5, C) classes), macro `precision`, `recall` and `f1`, the same `_per_class` as
    lists, `loss` (cross-entropy in nats), `ece` (expected calibration error, 15 bins), and `agreement` with the
    teacher if its logits are given. A class that is never predicted has precision and F1 0. The macro mean is over
    the classes that occur in the targets or the predictions, as in scikit-learn.

    Args:
        logits: (N, C).
        targets: class indices (N,).
        teacher_logits: (N, C), or only the classes that the teacher chose, (N,).

    Raises:
        InputError: if shapes do not fit, the split is empty, or a target is no class.
        KDError: if logits are not finite, as of a net whose training diverged.

    >>> found = evaluate(torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1, 1, 1]))
    >>> found["accuracy"], found["recall_per_class"]
    (0.75, [1.0, 0.6666666666666666])
    """
    logits, targets = logits.detach().cpu(), targets.detach().cpu()  # where sums come out the same in every run
    classes = _classes(logits, targets)
    scores = multiclass_stat_scores(logits, targets, classes, average="none").double()
    hit, false_alarm, _, missed, support = scores.unbind(dim=1)
    occurs = hit + false_alarm + missed > 0
    per_class = {
        "precision": _ratio(hit, hit + false_alarm),
        "recall": _ratio(hit, support),
        "f1": _ratio(2 * hit, 2 * hit + false_alarm + missed),
    }
    probabilities = logits.double().softmax(dim=1)
    found: dict[str, float | list[float]] = {
        "accuracy": _fraction(logits.argmax(dim=1) == targets),
        "accuracy_top5": _fraction((logits.topk(min(5, classes), dim=1).indices == targets[:, None]).any(dim=1)),
        "loss": F.cross_entropy(logits.double(), targets).item(),
        # Below 1, or torchmetrics gives certainty a bin of its own, above the fifteen.
        "ece": multiclass_calibration_error(probabilities.clamp(max=1 - 2**-24), targets, classes, n_bins=BINS).item(),
    }
    for name, values in per_class.items():
        found[name] = values[occurs].mean().item()
        found[f"{name}_per_class"] = values.tolist()
    if teacher_logits is not None:
        if teacher_logits.shape not in (logits.shape, targets.shape):
            raise InputError(
                f"the teacher's logits have shape {tuple(teacher_logits.shape)} and the student's "
                f"{tuple(logits.shape)}; both must judge the same split"
            )
        found["agreement"] = agreement(logits, teacher_logits)
    return found


def _classes(logits: Tensor, targets: Tensor) -> int:
    """How many classes there are, once the shapes are known to fit."""
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not logits.numel():
        raise InputError(
            f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)} cannot be judged; "
            "(N, C) and (N,) with N of 1 or more were meant"
        )
    if not logits.isfinite().all():
        raise KDError("the net gives logits that are not finite: its training diverged; try a lower learning rate")
    classes = logits.shape[1]
    if targets.min() < 0 or targets.max() >= classes:
        raise InputError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, but the net knows {classes} classes; "
            "num_classes of the data must be theirs"
        )
    return classes


def _fraction(rows: Tensor) -> float:
    return rows.double().mean().item()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where there is nothing to divide by."""
    return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)
