"""One contract for all losses: a new one is a line in LOSSES."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kd.losses
import kd.losses.layers
from kd.errors import InputError
from kd.losses.across import ReviewKD, SemCKD
from kd.losses.boundary import AB, OFD
from kd.losses.causal import DIITO
from kd.losses.collaborative import General, Linear, MinLogit, Naive
from kd.losses.context import CID
from kd.losses.contrastive import CRD, InfoNCE, WCoRD
from kd.losses.ensemble import ByConfidence, ByCrossEntropy, Each, Gate, MeanLogits, MeanProbabilities, RandomChoice
from kd.losses.exits import OFA, OFAExits
from kd.losses.feature import MGD, VID, Hint
from kd.losses.flow import FSP, KDSVD
from kd.losses.likeliest import TopKKL
from kd.losses.logits import CrossEntropy, LogitMSE, SoftTargetCrossEntropy, SoftTargetKL, Standardised
from kd.losses.maps import AT, CATKD, CWD, FT, NST, ATNorm, ParaphrasedFT
from kd.losses.native import ONE
from kd.losses.own_exits import BYOT
from kd.losses.relation import CC, CCRBF, PKT, RKD, SP, Embedded
from kd.losses.response import DIST, DKD, MLKD, NKD, WSLD
from kd.losses.reuse import SRRL, SimKD
from kd.losses.self_taught import PSKD, USKD, LabelSmoothing, TfKDReg, TfKDSelf
from kd.losses.sequence import (
    ForwardKL,
    GeneralisedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)
from kd.losses.softened import TTM, WTTM, LearnedTemperatureKL
from kd.models import Frozen

Views = dict[str, Tensor]
Shapes = list[tuple[int, ...]]


class Step(nn.Module):
    """A loss as a step of training calls it: the generator set before it, its layers in lists."""

    def __init__(self, loss: nn.Module, layers: tuple[Shapes, ...] | None, teachers: int | None = None) -> None:
        super().__init__()
        self.loss, self.layers, self.teachers = loss, layers, teachers

    def forward(self, **views: Any) -> Tensor:
        if self.teachers:
            views["teacher"] = views["teacher"].tensor_split(self.teachers, dim=1)
        for side, shapes in zip(("student", "teacher"), self.layers or (), strict=False):
            parts = views[side].split([math.prod(shape[1:]) for shape in shapes], dim=1)
            found = [p.unflatten(1, shape[1:]) for p, shape in zip(parts, shapes, strict=True)]
            views[side] = found if len(found) > 1 else found[0]
        torch.manual_seed(0)
        found: Tensor = self.loss(**views)
        return found


def listed(student: Shapes, teacher: Shapes) -> dict[str, Any]:
    """A case of lists: how wide each side is, and that any width is a batch of its own."""
    wide = [(shapes[0][0], sum(math.prod(shape[1:]) for shape in shapes)) for shapes in (student, teacher)]
    return {"student": wide[0], "teacher": wide[1], "layers": (student, teacher), "flat": True, "widths": True}


def alone(student: Shapes) -> dict[str, Any]:
    """A case of a list of the student's layers, and none of a teacher's."""
    return {"student": (student[0][0], sum(math.prod(shape[1:]) for shape in student)), "layers": (student,)}


@dataclass(frozen=True)
class Case:
    """A loss, the shapes it is given, and what its formula says."""

    name: str
    make: Callable[[], nn.Module]
    student: tuple[int, ...] = (8, 5)
    teacher: tuple[int, ...] | None = (8, 5)
    target: bool = False
    zero_at_identity: bool = False
    feature: tuple[int, ...] | None = None
    flat: bool = False  # it takes features of any shape as one vector a sample
    widths: bool = False  # student and teacher may be of two widths
    constants: bool = False  # it has weights made of the student, which its gradient takes as they are
    layers: tuple[Shapes, ...] | None = None  # it takes lists: the tensors are these shapes, side by side
    row: bool = False  # it is given each sample's row in a split of 20
    classes: int | None = None  # where the student gives features, and the target is of so many classes
    part: Callable[[], nn.Module] | None = None  # what it is lent of a teacher
    teachers: int | None = None  # it takes a list of as many teachers' logits: the tensor is these, side by side

    def loss(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        loss = self.make()
        if self.part is not None:
            loss.lend(Frozen(self.part(), through=True))  # type: ignore[operator]
        if hasattr(loss, "bind"):
            teachers: Any = self.teachers and [self.student] * self.teachers
            given: tuple[Any, ...] = self.student, teachers or self.teacher, self.feature
            if self.layers:
                given = (*(shapes if len(shapes) > 1 else shapes[0] for shapes in self.layers), self.feature)
            loss.bind(*(shape for shape in (*given, (20,) if self.row else None) if shape))
        return Step(loss, self.layers, self.teachers).to(dtype)

    def views(self, dtype: torch.dtype = torch.float32) -> Views:
        generator = torch.Generator().manual_seed(1)
        views = {"student": 3 * torch.randn(self.student, generator=generator)}
        for name, shape in (("teacher", self.teacher), ("feature", self.feature)):
            if shape is not None:
                views[name] = 3 * torch.randn(shape, generator=generator)
        # Rounded first, so that each precision is given the same numbers.
        views = {name: value.bfloat16().to(dtype) for name, value in views.items()}
        if self.row:
            views["row"] = torch.arange(self.student[0]) + 5
        if self.target:
            leading, classes = self.student[:-1], self.student[-1]
            if self.classes:
                leading, classes = self.student[:1], self.classes
            views["target"] = (torch.arange(math.prod(leading)) % classes).reshape(leading)
            if len(leading) == 2:
                views["target"][:, -1] = -100  # tokens that do not count
        return views


def settled(loss: CRD) -> CRD:
    """One whose constants a first batch has set, so that they do not follow the student."""
    loss.constants.fill_(20.0)
    return loss.eval()


def told() -> CID:
    """In the third epoch, with contexts of the one before."""
    loss = CID(sample=0.1)
    loss.bind((8, 5), [(8, 6), (8, 4)], (8, 4))
    loss.at(2.5, 12)
    loss.sums, loss.sure = torch.linspace(-1, 1, 20).reshape(4, 5), torch.ones(4)
    return loss


MAPS = (8, 3, 4, 4)
DEEP: Shapes = [(8, 3, 4, 4), (8, 4, 3, 3)]
WIDE: Shapes = [(8, 5, 4, 4), (8, 6, 2, 2)]
THREE: dict[str, Any] = {"teacher": (8, 15), "teachers": 3}
TOKENS: dict[str, Any] = {"student": (4, 3, 5), "teacher": (4, 3, 5), "target": True}
LOSSES = [
    Case("ce", CrossEntropy, teacher=None, target=True),
    Case("kd", lambda: SoftTargetKL(4.0), zero_at_identity=True),
    Case("kd at 1", lambda: SoftTargetKL(1.0), zero_at_identity=True),
    Case("soft_ce", lambda: SoftTargetCrossEntropy(4.0)),
    Case("logit_mse", LogitMSE, zero_at_identity=True),
    Case("lskd", lambda: Standardised(SoftTargetKL(2.0)), zero_at_identity=True),
    Case("dkd standardised", lambda: Standardised(DKD()), target=True, zero_at_identity=True),
    Case("dkd", DKD, target=True, zero_at_identity=True),
    Case("nkd", NKD, target=True),
    Case("wsld", WSLD, target=True, constants=True),
    Case("dist", DIST, zero_at_identity=True),
    Case("mlkd", MLKD, zero_at_identity=True),
    Case("mlkd of all rows", lambda: MLKD(keep=None), zero_at_identity=True),
    Case("ttm", TTM),
    Case("wttm", WTTM),
    Case("ofa", lambda: OFA(power=1.5), target=True),
    Case("ofa_exits", lambda: OFAExits(power=1.5), **listed(DEEP, [(8, 5)]), target=True, classes=5),
    Case("byot", BYOT, teacher=None, target=True, classes=5, feature=(8, 5), **alone(DEEP)),
    Case("one", ONE, teacher=None, target=True, classes=5, feature=(8, 5), constants=True, **alone([(8, 5), (8, 5)])),
    Case("ofa_exits of tokens", OFAExits, (8, 5, 4), (8, 6), target=True, classes=6),
    Case("srrl", SRRL, **listed([(8, 3)], [(8, 5), (8, 4)]), part=lambda: nn.Linear(5, 4)),
    Case("srrl of maps", SRRL, **listed([(8, 3, 4, 4)], [(8, 5), (8, 4)]), part=lambda: nn.Conv2d(5, 4, 1)),
    Case("simkd", SimKD, (8, 3, 4, 4), (8, 5, 2, 2), part=lambda: nn.Linear(5, 4)),
    Case("simkd of vectors", SimKD, (8, 3), (8, 5), part=lambda: nn.Linear(5, 4)),
    Case("ctkd", lambda: LearnedTemperatureKL(end=1.0), zero_at_identity=True),  # at 1, the gradient of the value
    Case("label_smoothing", LabelSmoothing, teacher=None, target=True),
    Case("tfkd_reg", TfKDReg, teacher=None, target=True),
    Case("tfkd_self", TfKDSelf, zero_at_identity=True),
    Case("pskd", PSKD, target=True),
    Case("uskd", USKD, teacher=None, target=True, feature=(8, 3, 4, 4), constants=True),
    Case("sp", SP, zero_at_identity=True, flat=True, widths=True),
    Case("sp of maps", SP, (8, 3, 4, 4), (8, 5, 2, 2), flat=True, widths=True),
    Case("cc", CC, zero_at_identity=True, flat=True),
    Case("cc embedded", lambda: Embedded(CC(), 4), (8, 3, 2, 2), (8, 6), flat=True),
    Case("cc_rbf", lambda: CCRBF(gamma=0.05), zero_at_identity=True, flat=True, widths=True),
    Case("cc_rbf embedded", lambda: Embedded(CCRBF(gamma=0.05), 4), (8, 3), (8, 6), flat=True),
    Case("rkd", RKD, zero_at_identity=True, flat=True, widths=True),
    Case("pkt", PKT, zero_at_identity=True, flat=True, widths=True),
    Case("pkt of two widths", PKT, (8, 3), (8, 5), flat=True, widths=True),
    Case("forward_kl", ForwardKL, zero_at_identity=True),
    Case("forward_kl of sequences", lambda: ForwardKL(2.0), zero_at_identity=True, **TOKENS),
    Case("reverse_kl", lambda: ReverseKL(2.0), zero_at_identity=True, **TOKENS),
    Case("symmetric_kl", SymmetricKL, zero_at_identity=True, **TOKENS),
    Case("jsd", GeneralisedJSD, zero_at_identity=True, **TOKENS),
    Case("jsd at 0", lambda: GeneralisedJSD(beta=0.0), zero_at_identity=True, **TOKENS),
    Case("jsd at 1", lambda: GeneralisedJSD(beta=1.0), zero_at_identity=True, **TOKENS),
    Case("skew_forward_kl", SkewForwardKL, zero_at_identity=True, **TOKENS),
    Case("skew_reverse_kl", SkewReverseKL, zero_at_identity=True, **TOKENS),
    Case("total_variation", TotalVariation, zero_at_identity=True, **TOKENS),
    Case("top_k_kl", lambda: TopKKL(3), **TOKENS),
    Case("top_k_kl with a tail", lambda: TopKKL(3, tail=True), zero_at_identity=True, **TOKENS),
    Case("hint of maps", Hint, (8, 3, 4, 4), (8, 5, 2, 2)),
    Case("hint of vectors", Hint, (8, 3), (8, 5)),
    Case("at", AT, (8, 3, 4, 4), (8, 5, 2, 2), widths=True),
    Case("at of one shape", AT, MAPS, MAPS, zero_at_identity=True, widths=True),
    Case("at of two layers", AT, **listed(DEEP, DEEP), zero_at_identity=True),
    Case("at_norm", ATNorm, MAPS, MAPS, zero_at_identity=True, widths=True),
    Case("nst", NST, (8, 3, 4, 4), (8, 5, 2, 2), widths=True),
    Case("nst of one shape", NST, MAPS, MAPS, zero_at_identity=True, widths=True),
    Case("ft", FT, MAPS, MAPS, zero_at_identity=True, widths=True),
    Case("ft paraphrased", ParaphrasedFT, (8, 3, 4, 4), (8, 6, 2, 2), constants=True),
    Case("fsp", FSP, **listed(DEEP, DEEP), zero_at_identity=True),
    Case("fsp of two widths", FSP, **listed(DEEP, WIDE)),
    Case("ab", AB, MAPS, MAPS),
    Case("ab of two widths", AB, **listed(DEEP, WIDE)),
    Case("kdsvd", KDSVD, **listed(DEEP, DEEP), zero_at_identity=True),
    Case("kdsvd of two widths", KDSVD, **listed([(8, 5, 4, 4), (8, 6, 3, 3)], DEEP)),
    Case("vid", VID, (8, 3, 4, 4), (8, 5, 2, 2)),
    Case("vid of two layers", VID, **listed(DEEP, WIDE)),
    Case("ofd", OFD, (8, 3, 4, 4), (8, 5, 4, 4)),
    Case("reviewkd", ReviewKD, **listed([*DEEP, (8, 7)], [*WIDE, (8, 6)])),
    Case("cwd", lambda: CWD(2.0), MAPS, MAPS, zero_at_identity=True),
    Case("cwd of two widths", CWD, (8, 3, 4, 4), (8, 5, 2, 2)),
    Case("mgd", MGD, (8, 3, 4, 4), (8, 5, 2, 2)),
    Case("catkd", CATKD, MAPS, MAPS, zero_at_identity=True),
    Case("semckd", lambda: SemCKD(batch=9), **listed(DEEP, [(8, 5, 2, 2)])),
    Case("infonce", lambda: InfoNCE(0.5), flat=True),
    Case("infonce embedded", lambda: Embedded(InfoNCE(0.5), 4), (8, 3), (8, 6), flat=True),
    Case("mean_logits", lambda: MeanLogits(SoftTargetKL(4.0)), **THREE),
    Case("mean_logits of labels too", lambda: MeanLogits(DKD()), target=True, **THREE),
    Case("mean_probabilities", lambda: MeanProbabilities(SoftTargetKL(4.0)), **THREE),
    Case("mean_probabilities by weights", lambda: MeanProbabilities(DIST(), [3, 1, 2], 2.0), **THREE),
    Case("confidence", lambda: ByConfidence(SoftTargetKL(4.0)), **THREE),
    Case("kdcl naive", lambda: Naive(SoftTargetKL(4.0)), target=True, **THREE),
    Case("kdcl linear", lambda: Linear(SoftTargetKL(4.0)), target=True, **THREE),
    Case("kdcl minlogit", lambda: MinLogit(SoftTargetKL(4.0)), target=True, **THREE),
    Case("kdcl general", lambda: General(SoftTargetKL(4.0)), **THREE),
    Case("cross_entropy", lambda: ByCrossEntropy(SoftTargetKL(4.0)), target=True, **THREE),
    Case("gate", lambda: Gate(SoftTargetKL(4.0)), constants=True, **THREE),
    Case("gate of maps", lambda: Gate(NKD()), target=True, feature=(8, 3, 4, 4), constants=True, **THREE),
    Case("random", lambda: RandomChoice(SoftTargetKL(4.0)), **THREE),
    Case("each", lambda: Each(DKD()), target=True, **THREE),
    Case("each with a dropped one", lambda: Each(LearnedTemperatureKL(end=1.0), "sum", drop=1), widths=True, **THREE),
    Case("crd", lambda: CRD(4, 16, 0.5).eval(), (8, 5), (8, 6), target=True, row=True, flat=True, constants=True),
    Case("wcord", lambda: settled(WCoRD(4, 16, 0.5)), (8, 5), (8, 6), target=True, row=True, flat=True, constants=True),
]
LOSSES += [
    Case("diito", DIITO, zero_at_identity=True),
    Case("diito of a hidden state", lambda: DIITO(cosine=0.5), **listed([(8, 5), (8, 4)], [(8, 5), (8, 4)])),
    Case("diito of two widths", lambda: DIITO(cosine=0.5), **listed([(8, 5), (8, 4)], [(8, 5), (8, 6)])),
    Case("cid", CID, **listed([(8, 5)], [(8, 6), (8, 4)]), feature=(8, 4), target=True, classes=4),
    Case("cid with contexts", told, **listed([(8, 5)], [(8, 6), (8, 4)]), feature=(8, 4), target=True, classes=4),
]
each = pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
with_teacher = pytest.mark.parametrize("case", [c for c in LOSSES if c.teacher], ids=lambda case: case.name)


def test_every_loss_has_its_line() -> None:
    modules = [importlib.import_module(f"kd.losses.{found.name}") for found in pkgutil.iter_modules(kd.losses.__path__)]
    written = {
        thing
        for module in modules
        for name, thing in vars(module).items()
        if inspect.isclass(thing)
        and issubclass(thing, nn.Module)
        and thing.__module__ == module.__name__
        and not (name.startswith("_") or module is kd.losses.layers)  # parts of losses
    }
    assert written and written == {type(case.make()) for case in LOSSES}


@each
def test_it_is_one_finite_number_that_pulls_the_student(case: Case) -> None:
    views = case.views()
    views["student"].requires_grad_()
    value = case.loss()(**views)
    assert value.shape == () and value.isfinite() and value > 0
    value.backward()
    gradient = views["student"].grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0


@each
def test_a_step_against_the_gradient_lowers_it(case: Case) -> None:
    loss, views = case.loss(torch.float64), case.views(torch.float64)
    views["student"].requires_grad_()
    before = loss(**views)
    (gradient,) = torch.autograd.grad(before, views["student"])
    after = loss(**views | {"student": views["student"].detach() - 1e-3 * gradient / gradient.norm()})
    assert after < before


@with_teacher
def test_it_hears_the_teacher(case: Case) -> None:
    loss, views = case.loss(), case.views()
    assert loss(**views) != loss(**views | {"teacher": views["teacher"].flip(0)})


@with_teacher
def test_it_leaves_the_teacher_and_the_student_as_they_are(case: Case) -> None:
    views, untouched = case.views(), case.views()
    case.loss()(**views)
    assert all(views[name].equal(untouched[name]) for name in views)


@pytest.mark.parametrize("case", [c for c in LOSSES if c.zero_at_identity], ids=lambda case: case.name)
def test_it_is_zero_where_both_agree(case: Case) -> None:
    views = case.views()
    views["student"] = views["teacher"].clone().requires_grad_()
    value = case.loss()(**views)
    assert value.item() == pytest.approx(0, abs=1e-6)
    value.backward()
    gradient = views["student"].grad
    assert gradient is not None and gradient.abs().max() < 1e-6


@each
def test_bfloat16_is_within_two_percent(case: Case) -> None:
    exact = case.loss()(**case.views()).item()
    assert case.loss(torch.bfloat16)(**case.views(torch.bfloat16)).item() == pytest.approx(exact, rel=0.02)


@each
def test_autocast_is_within_two_percent(case: Case) -> None:
    exact = case.loss()(**case.views()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert case.loss()(**case.views()).item() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("case", [c for c in LOSSES if not c.constants], ids=lambda case: case.name)
def test_its_gradient_is_that_of_its_value(case: Case) -> None:
    loss, views = case.loss(torch.float64), case.views(torch.float64)

    def value(student: Tensor, *trained: Tensor) -> Tensor:
        parameters = dict(zip(dict(loss.named_parameters()), trained, strict=True))
        found: Tensor = torch.func.functional_call(loss, parameters, kwargs=views | {"student": student})
        return found

    inputs = [views["student"], *(p.detach().clone() for p in loss.parameters())]
    assert torch.autograd.gradcheck(value, [tensor.requires_grad_() for tensor in inputs])


@each
def test_an_empty_batch_is_refused_in_one_line(case: Case) -> None:
    with pytest.raises(InputError) as caught:
        case.loss()(**{name: value[:0] for name, value in case.views().items()})
    assert "\n" not in str(caught.value)


@with_teacher
def test_a_teacher_of_another_batch_or_width_is_refused_in_one_line(case: Case) -> None:
    views = case.views()
    others = [views["teacher"][1:]]
    others += [] if case.widths else [views["teacher"][:, 1:]]
    others += [] if case.flat else [views["teacher"][..., None]]
    for teacher in others:
        with pytest.raises(InputError) as caught:
            case.loss()(**views | {"teacher": teacher})
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
@each
def test_a_gpu_gives_the_same_number_and_a_deterministic_gradient(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    views = {name: value.cuda() for name, value in case.views().items()}
    views["student"].requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        value = case.loss().cuda()(**views)
        value.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert value.item() == pytest.approx(case.loss()(**case.views()).item(), rel=1e-4)
