"""From what was measured to one line with ok, warn or FAIL; each verdict is a function of plain numbers and names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd.data.labels import size_text

OK, WARN, FAIL = "ok", "warn", "FAIL"
STATES = (OK, WARN, FAIL)  # from good to bad
LITTLE = 0.01  # of the gradient: a term below it hardly moves the student
NOT_YET = "the teacher is not trained yet"


class Check(NamedTuple):
    """One line: its state, what was looked at, what was found."""

    state: str
    name: str
    said: str


def teacher_accuracy(
    accuracy: float, samples: int, whole: int, chance: float, recorded: float | None, baseline: tuple[float, str] | None
) -> Check:
    """Whether a teacher knows these data better than chance, than its student alone, and as well as its card says.

    Args:
        accuracy: measured on validation.
        samples: of which so many were asked.
        whole: of so many.
        chance: the share of the most frequent class.
        recorded: what its card says of the same split.
        baseline: the best validation accuracy of the same student alone in the store, and its hash.

    >>> teacher_accuracy(0.12, 500, 500, 0.1, None, None)
    Check(state='warn', name='teacher accuracy', said='12.00 % of 500 validation samples, near chance (10.00 %)')
    """
    some = f"{samples:,}" if samples == whole else f"the first {samples:,} of {whole:,}"
    said = f"{100 * accuracy:.2f} % of {some} validation samples"
    if recorded is not None and samples == whole and abs(recorded - accuracy) > 0.005:
        what = "its weights, the images or the order of the classes are not what they were"
        return Check(FAIL, "teacher accuracy", f"{said}, and its card says {100 * recorded:.2f} %: {what}")
    if accuracy < chance + 0.1 * (1 - chance):
        return Check(WARN, "teacher accuracy", f"{said}, near chance ({100 * chance:.2f} %)")
    if baseline is not None:
        alone = f"the student alone has {100 * baseline[0]:.2f} % ({baseline[1]})"
        if accuracy < baseline[0]:
            return Check(WARN, "teacher accuracy", f"{said}, less than its student: {alone}")
        return Check(OK, "teacher accuracy", f"{said}; {alone}")
    return Check(OK, "teacher accuracy", said)


def normalisation(
    role: str,
    own: tuple[Sequence[float], Sequence[float]],
    data: tuple[Sequence[float], Sequence[float]],
    seen: tuple[Sequence[float], Sequence[float]],
    pretrained: bool,
) -> Check:
    """Whether a network's mean and std are the data's, and whether those fit the pixels.

    Args:
        role: teacher or student.
        own: mean and std by channel in front of the network.
        data: those of the data's config.
        seen: those of some training images.
        pretrained: it came with statistics of its own.

    >>> normalisation("teacher", ([0.9], [0.2]), ([0.3], [0.2]), ([0.3], [0.2]), False).said
    'mean 0.900, std 0.200, and the data say mean 0.300, std 0.200'
    """
    name, said = f"{role} normalisation", _statistics(own)
    if not _near(own, data) and not pretrained:
        return Check(FAIL, name, f"{said}, and the data say {_statistics(data)}")
    # What the network is given: about mean 0 and std 1 where the statistics fit.
    shift = max(abs(m - mean) / std for m, mean, std in zip(seen[0], *own, strict=True))
    spread = [s / std for s, std in zip(seen[1], own[1], strict=True)]
    off = shift > 0.5 or not all(0.5 <= value <= 2 for value in spread)
    if off and not pretrained:
        return Check(WARN, name, f"{said}, but training images have {_statistics(seen)}; set data.mean and data.std")
    whose = "its own, of its pretraining" if pretrained and not _near(own, data) else "as the data say"
    return Check(OK, name, f"{said}, {whose}; training images have {_statistics(seen)}")


def class_order(teacher: Sequence[str] | None, data: Sequence[str]) -> Check:
    """Whether a teacher's logits stand for the same classes in the same order.

    >>> class_order(["cat", "dog"], ["dog", "cat"]).said
    "class 0 is 'cat' to the teacher and 'dog' in the data (2 of 2 differ): its logits teach wrong classes"
    """
    name = "class order"
    if teacher is None:
        return Check(WARN, name, "the teacher's artifact names no classes, so their order is not known")
    if len(teacher) != len(data):
        return Check(FAIL, name, f"the teacher has {len(teacher)} classes, the data {len(data)}")
    wrong = [i for i, (one, other) in enumerate(zip(teacher, data, strict=True)) if one != other]
    if wrong:
        first = f"class {wrong[0]} is {teacher[wrong[0]]!r} to the teacher and {data[wrong[0]]!r} in the data"
        return Check(FAIL, name, f"{first} ({len(wrong)} of {len(data)} differ): its logits teach wrong classes")
    return Check(OK, name, f"{len(data)} classes, the same names in the same order")


def frozen(training: Sequence[str], learning: Sequence[str]) -> Check:
    """Whether a teacher stays in eval mode and without gradients while its student trains.

    >>> frozen(["bn1"], [])
    Check(state='FAIL', name='teacher frozen', said='bn1 is in train mode while the student trains')
    """
    name = "teacher frozen"
    if training:
        return Check(FAIL, name, f"{_some(training)} in train mode while the student trains")
    if learning:
        return Check(FAIL, name, f"{_some(learning)} asking for a gradient")
    return Check(OK, name, "in eval mode, without gradients")


def unmoved(moved: Sequence[str], norms: int) -> Check:
    """Whether a teacher is the same after some steps, statistics of its batch norms included."""
    if moved:
        return Check(FAIL, "teacher unmoved", f"{_some(moved)} not what it was before the steps")
    return Check(
        OK, "teacher unmoved", f"weights and the statistics of {norms} batch norms are the same after the steps"
    )


def losses(values: Sequence[float], parts: Sequence[Mapping[str, float]]) -> Check:
    """Whether each step's loss is finite, and each term's in it.

    >>> losses([1.0, math.nan], [{"ce": 1.0, "kd": 0.0}, {"ce": 1.0, "kd": math.nan}])
    Check(state='FAIL', name='loss', said="step 2: term 'kd' is not finite")
    """
    for step, (value, own) in enumerate(zip(values, parts, strict=True)):
        bad = [name for name, part in own.items() if not math.isfinite(part)]
        if bad or not math.isfinite(value):
            named = f"term {' and '.join(map(repr, bad))} is" if bad else "the weighted sum is"
            return Check(FAIL, "loss", f"step {step + 1}: {named} not finite")
    each = ", ".join(f"{name} {part:.3g}" for name, part in parts[0].items())
    return Check(OK, "loss", f"finite over {len(values)} steps, {values[0]:.3g} at the first ({each})")


def shares(gradients: Mapping[str, float], trained: bool) -> Check:
    """Whether each term has a say in where the student goes.

    Args:
        gradients: means of `grad_share/T` and `grad_cosine/A/B`.
        trained: whether the teacher is what it will be.

    >>> shares({"grad_share/ce": 0.995, "grad_share/kd": 0.005}, True).said
    'ce 99.5 %, kd 0.5 %: kd hardly moves the student'
    """
    name = "gradient shares"
    found = {key.removeprefix("grad_share/"): v for key, v in gradients.items() if key.startswith("grad_share/")}
    said = ", ".join(f"{term} {_percent(value)}" for term, value in found.items())
    cosines = [f"{key.removeprefix('grad_cosine/')} {v:.2f}" for key, v in gradients.items() if "_cosine/" in key]
    if cosines:
        said += f"; cosine {', '.join(cosines[:3])}"
    if not all(map(math.isfinite, gradients.values())):
        return Check(FAIL, name, f"{said}: not finite")
    if not trained:
        return Check(OK, name, f"{said}; {NOT_YET}, so these will change")
    silent = [term for term, value in found.items() if value < LITTLE]
    loud = [term for term, value in found.items() if value > 1 - LITTLE]
    if silent:
        return Check(
            WARN, name, f"{said}: {' and '.join(silent)} hardly move{'s' if len(silent) == 1 else ''} the student"
        )
    if loud and len(found) > 1:
        return Check(WARN, name, f"{said}: {loud[0]} drowns the others")
    return Check(OK, name, said)


def stored_labels(agree: float, off: float, samples: int, tolerance: float) -> Check:
    """Whether stored labels are what the teacher says now.

    Args:
        agree: share of samples with the same class on top.
        off: largest difference of a probability.
        samples: looked at.
        tolerance: on ``off``, for the type they are stored in.
    """
    said = (
        f"{100 * agree:.1f} % of {samples} samples have the same class as from the live teacher, probabilities within"
    )
    wrong = off > tolerance or agree < 0.99
    mend = ": they are another teacher's or of other images" if wrong else ""
    return Check(FAIL if wrong else OK, "stored labels", f"{said} {off:.1g}{mend}")


def disk(needed: int, free: int, what: str) -> Check:
    """Whether what will be written fits."""
    said = f"{what}: {size_text(needed)} to write, {size_text(free)} free"
    state = FAIL if needed > free else WARN if 2 * needed > free else OK
    return Check(state, "disk", said)


def worst(checks: Sequence[Check]) -> str:
    """The worst state among some checks.

    >>> worst([Check("ok", "a", ""), Check("warn", "b", "")])
    'warn'
    """
    return max((check.state for check in checks), key=STATES.index, default=OK)


def _statistics(pair: tuple[Sequence[float], Sequence[float]]) -> str:
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in pair)
    return f"mean {mean}, std {std}"


def _near(one: Any, other: Any) -> bool:
    return all(
        len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-4) for x, y in zip(a, b, strict=True))
        for a, b in zip(one, other, strict=True)
    )


def _some(names: Sequence[str]) -> str:
    """The first of some names, and whether there are more.

    >>> _some(["a"]), _some(["a", "b", "c"])
    ('a is', 'a and 2 more are')
    """
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def _percent(share: float) -> str:
    if 0.999 <= share < 1:
        return f"{100 * share:.2f} %"
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.2g} %"
