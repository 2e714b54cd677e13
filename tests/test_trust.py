"""Trust checks: a broken defense fails the check that names its fault, a sound model fails none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attacking import streams
from torch import Tensor, nn
from zoo import ZOO, Quantised, Saturated

import robustann as ra
from robustann.attacks import FGSM, PGD, engine
from robustann.attacks.engine import predict_logits
from robustann.defenses import AdversarialTraining
from robustann.errors import DataError
from robustann.findings import Finding, unresolved
from robustann.results import AttackOutcome, AttackSamples, CurvePoint, Interval, Scores
from robustann.threat import ThreatModel
from robustann.trust import (
    CHECKS,
    combine,
    diagnose,
    losses_used,
    probe,
    review,
    surrogate_agrees,
)
from robustann.trust.checks import conclude, not_run
from robustann.trust.reviewing import (
    black_box,
    compare,
    compare_losses,
    last_tenth,
    lost_on_the_way,
    noise,
    single_step,
    twice_the_steps,
    unbounded,
)

LINF = ThreatModel("linf", 0.1)


@pytest.fixture(scope="session")
def undefended(digits: ra.ImageData) -> nn.Module:
    return ra.train("small-cnn", digits, epochs=8).model


@pytest.fixture(scope="session")
def sound(digits: ra.ImageData, undefended: nn.Module) -> dict[str, nn.Module]:
    def hardened(attack: Any) -> nn.Module:
        return ra.train("small-cnn", digits, epochs=8, step=AdversarialTraining(attack, LINF)).model

    class Linear(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, 10))

    return {
        "undefended": undefended,
        # Without label smoothing, and for longer: as sure of itself as plain training makes it.
        "confident": ra.train("small-cnn", digits, epochs=30, label_smoothing=0.0).model,
        "pgd-trained": hardened(PGD(steps=5)),
        "fgsm-trained": hardened(FGSM()),
        "linear": ra.train(Linear(), digits, epochs=8).model,
        "log-softmax": nn.Sequential(undefended, nn.LogSoftmax(dim=1)).eval(),
    }


SOUND = ("undefended", "confident", "pgd-trained", "fgsm-trained", "linear", "log-softmax")


def some(digits: ra.ImageData, count: int = 64) -> tuple[Tensor, Tensor]:
    return digits.test.images(slice(0, count)), digits.test.labels[:count]


def failed(findings: Sequence[Finding]) -> set[str]:
    return {one.check for one in findings if one.verdict == "fail"}


# -------------------------------------------------------------------------- before the attacks


@pytest.mark.parametrize("name", ZOO)
def test_diagnosis_names_the_fault_of_each_broken_defense(
    name: str, undefended: nn.Module, digits: ra.ImageData
) -> None:
    exhibit = ZOO[name]
    x, labels = some(digits)
    model = exhibit.make(undefended).eval()
    found = diagnose(model, x, labels, LINF)
    assert exhibit.check in failed(found.findings)
    finding = next(one for one in found.findings if one.check == exhibit.check)
    assert CHECKS[exhibit.check].advice in finding.explanation
    booleans = {
        "gradient-missing": found.gradient_partly_missing,
        "gradient-mismatch": found.gradient_unreliable,
        "gradient-shattered": found.gradient_unreliable,
        "saturated-loss": found.saturated,
        "randomised": found.randomised,
        "softmax-output": found.softmax_output,
        "batch-dependent": found.batch_dependent,
        "dynamic-defense": found.dynamic,
    }
    assert booleans[exhibit.check]


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("eps", [0.03, 0.3])
def test_diagnosis_finds_no_fault_in_sound_models(
    name: str, eps: float, sound: dict[str, nn.Module], digits: ra.ImageData
) -> None:
    x, labels = some(digits)
    found = diagnose(sound[name], x, labels, ThreatModel("linf", eps))
    assert [one.verdict for one in found.findings] == ["pass"] * 10


def flat_images(count: int) -> Tensor:
    """Black, half white and noise: pooling has ties there, and ReLUs sit at their kink."""
    x = torch.rand((count, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    x[::3] = 0.0
    x[1::3, :, 4:] = 1.0
    return x


def test_no_fault_in_an_untrained_resnet() -> None:
    model = ra.create_model(
        "preactresnet-18", class_names=[str(i) for i in range(10)], shape=(3, 16, 16), seed=0
    ).eval()
    x = flat_images(3)
    found = diagnose(model, x, predict_logits(model, x).argmax(1), LINF)
    assert [f.verdict for f in found.findings] == ["pass"] * 10


@pytest.mark.parametrize("pooling", [nn.MaxPool2d, nn.AvgPool2d])
def test_no_fault_in_ties(pooling: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), pooling(2), nn.Flatten(),
        nn.Linear(8 * 49, 5)
    ).eval()  # fmt: skip
    x = flat_images(9)
    found = diagnose(model, x, predict_logits(model, x).argmax(1), LINF)
    assert [f.verdict for f in found.findings] == ["pass"] * 10


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_diagnosis_leaves_no_trace(norm: Any, digits: ra.ImageData) -> None:
    x, labels = some(digits, 12)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
    )
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    backward, grad = torch.autograd.backward, torch.autograd.grad
    labels = predict_logits(model, x).argmax(1)
    first = diagnose(model, x, labels, ThreatModel(norm, 1.0), seed=3)
    again = diagnose(model, x, labels, ThreatModel(norm, 1.0), seed=3)
    assert first == again
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.autograd.backward, torch.autograd.grad) == (backward, grad)


def test_training_mode_is_told_and_mended(digits: ra.ImageData) -> None:
    x, labels = some(digits)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    labels = predict_logits(model, x).argmax(1)
    running = model[1].running_mean.clone()
    found = diagnose(model, x, labels, LINF)
    assert failed(found.findings) == {"training-mode"}
    (finding,) = (one for one in found.findings if one.verdict == "fail")
    assert "BatchNorm2d" in finding.explanation
    assert finding.remedy
    assert not unresolved(found.findings)
    assert torch.equal(model[1].running_mean, running)
    assert not failed(diagnose(model.eval(), x, labels, LINF).findings)
    # A layer that no flag changes is the same in both modes.
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()
    labels = predict_logits(plain, x).argmax(1)
    assert not failed(diagnose(plain, x, labels, LINF).findings)


def test_a_layer_that_refuses_eval_mode(digits: ra.ImageData) -> None:
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Stubborn:
            return super().train(True)

    x, _ = some(digits)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), Stubborn(4), nn.Flatten(), nn.Linear(144, 10))
    labels = predict_logits(model, x).argmax(1)
    found = diagnose(model, x, labels, LINF)
    assert {"training-mode", "batch-dependent"} & failed(found.findings)
    assert any("Stubborn" in one.explanation for one in found.findings)


def test_float32_written_into_a_model_is_no_fault(
    undefended: nn.Module, digits: ra.ImageData
) -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = [undefended]

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](x.float())

    x, labels = some(digits)
    assert not failed(diagnose(Casting(), x, labels, LINF).findings)


def test_gradients_that_are_not_finite(undefended: nn.Module, digits: ra.ImageData) -> None:
    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            # The slope of a root at nought.
            return undefended(x + (x - x.detach()).sqrt())

    x, labels = some(digits)
    found = diagnose(Infinite(), x, labels, LINF)
    assert found.gradient_missing
    assert "not finite for 32 of 32" in next(
        one.explanation for one in found.findings if one.check == "gradient-missing"
    )


def test_nothing_to_look_at(undefended: nn.Module, digits: ra.ImageData) -> None:
    x, labels = some(digits, 5)
    wrong = (predict_logits(undefended, x).argmax(1) + 1) % 10
    found = diagnose(undefended, x, wrong, LINF)
    assert {one.verdict for one in found.findings} == {"not run"}
    assert {one.verdict for one in probe(undefended, x, wrong, LINF, random=streams(5))} == {
        "not run"
    }
    alone = diagnose(undefended, x[:1], predict_logits(undefended, x[:1]).argmax(1), LINF)
    assert not failed(alone.findings)
    with pytest.raises(DataError, match="expected 5 integer labels"):
        diagnose(undefended, x, labels[:2], LINF)


# ---------------------------------------------------------------------------------- the probes


@pytest.mark.parametrize("name", SOUND)
def test_probes_find_no_fault_in_sound_models(
    name: str, sound: dict[str, nn.Module], digits: ra.ImageData
) -> None:
    x, labels = some(digits)
    found = probe(sound[name], x, labels, LINF, random=streams(64))
    assert [one.check for one in found if one.verdict != "pass"] == []
    assert len(found) == 10


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_probes_know_the_other_norms(
    norm: Any, undefended: nn.Module, digits: ra.ImageData
) -> None:
    x, labels = some(digits, 24)
    found = probe(undefended, x, labels, ThreatModel(norm, 0.5), random=streams(24))
    assert not failed(found)
    assert {one.verdict for one in found} == {"pass"}


def test_probes_on_missing_gradients(undefended: nn.Module, digits: ra.ImageData) -> None:
    x, labels = some(digits)
    zero = probe(Quantised(undefended), x, labels, LINF, random=streams(64))
    assert {"black-box-wins", "unbounded-attack"} <= failed(zero)
    none = probe(
        ZOO["detached"].make(undefended), x, labels, LINF, random=streams(64), gradients=False
    )
    assert failed(none) == {"black-box-wins"}
    assert sum(one.verdict == "not run" for one in none) == 9


class Counted(nn.Module):
    """A network that counts the images it is shown and the gradients it gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.spent = 0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        self.spent += len(x)
        if logits.requires_grad:
            logits.register_hook(self._back)  # type: ignore[no-untyped-call]
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.spent += len(gradient)


@pytest.mark.parametrize("gradients", [True, False])
def test_probes_count_what_they_cost(
    gradients: bool,
    undefended: nn.Module,
    digits: ra.ImageData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without padding every image counts.
    monkeypatch.setattr(engine, "ALIGNMENT", 1)
    x, labels = some(digits, 20)
    model = Counted(undefended)
    found = probe(model, x, labels, LINF, random=streams(20), queries=30, gradients=gradients)
    assert found.propagations == model.spent
    assert found.propagations > (1000 if gradients else 100)


def test_silent_success_is_looked_for_on_the_attacks_own_path(
    undefended: nn.Module, digits: ra.ImageData
) -> None:
    """Where nothing ever turns back, the path's end agrees with its best: the streams match."""
    x, labels = some(digits, 24)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    labels = predict_logits(model, x).argmax(1)
    found = {one.check: one for one in probe(model, x, labels, LINF, random=streams(24))}
    assert found["silent-success"].value == 0


def test_probes_do_not_hang_on_the_images_behind_those_looked_at(
    undefended: nn.Module, digits: ra.ImageData
) -> None:
    x, labels = some(digits, 40)
    few = probe(undefended, x[:20], labels[:20], LINF, random=streams(20), images=8, queries=20)
    many = probe(undefended, x, labels, LINF, random=streams(40), images=8, queries=20)
    assert few.findings == many.findings
    # The clean look at the other twenty.
    assert many.propagations - few.propagations == 20


# ---------------------------------------------------------------------------------- the review


def outcome(
    name: str,
    success: Sequence[bool],
    *,
    tried: Sequence[bool] | None = None,
    access: str = "white-box",
    control: bool = False,
    added: int = 0,
    **parameters: Any,
) -> AttackOutcome:
    n = len(success)
    tried = [True] * n if tried is None else tried
    interval = Interval(low=0.0, high=1.0)
    return AttackOutcome(
        name=name,
        label=name,
        access=access,
        paper="",
        control=control,
        parameters=parameters,
        scores=Scores(
            accuracy=0.5,
            interval=interval,
            precision=0.5,
            recall=0.5,
            f1=0.5,
            classes=(),
            confusion=(),
        ),
        attempted=sum(tried),
        succeeded=sum(success),
        added=added,
        success_rate=0.5,
        success_interval=interval,
        median_distance=None,
        forwards=1,
        backwards=1,
        samples=AttackSamples(
            prediction=(0,) * n,
            success=tuple(success),
            distance=(None,) * n,
            margin=(None,) * n,
            forwards=tuple(int(was) for was in tried),
            backwards=(0,) * n,
            first_success=(None,) * n,
        ),
    )


def share(broken: int, n: int = 100) -> list[bool]:
    return [i < broken for i in range(n)]


def verdict(check: str, *outcomes: AttackOutcome, curve: Sequence[CurvePoint] = ()) -> str:
    findings = review(outcomes, curve, chance=0.1, widest=1.0)
    assert {one.check for one in findings} <= set(CHECKS)
    return next(one.verdict for one in findings if one.check == check)


def test_single_step_beating_many() -> None:
    def case(one: int, many: int, **changes: Any) -> str:
        return verdict(
            "single-step-wins", outcome("fgsm", share(one)), outcome("pgd", share(many), **changes)
        )

    assert case(60, 40) == "fail"
    assert case(40, 60) == "pass"
    # A sample or two is chance.
    assert case(42, 40) == "pass"
    # In a cascade the second sees what the first left.
    assert case(60, 0, tried=[not fell for fell in share(60)]) == "not run"
    assert verdict("single-step-wins", outcome("fgsm", share(60))) == "not run"
    # The best of the iterative attacks counts.
    assert (
        verdict(
            "single-step-wins",
            outcome("fgsm", share(60)),
            outcome("pgd", share(20)),
            outcome("apgd", share(80)),
        )
        == "pass"
    )


def test_black_box_beating_white_box() -> None:
    def case(extra: int, **parameters: Any) -> str:
        return verdict(
            "black-box-wins",
            outcome("pgd", share(40, 1000)),
            outcome("square", share(40 + extra, 1000), access="score", **parameters),
        )

    assert case(0) == "pass"
    assert case(2) == "pass"
    assert case(3) == "fail"
    # From a gradient attack's images a search is part white box.
    assert case(60, start="best") == "pass"
    assert case(101, start="best") == "fail"
    assert verdict("black-box-wins", outcome("pgd", share(4))) == "not run"
    # One sample of few is chance, though it is more than 0.2 points.
    assert black_box(1, 50).verdict == "pass"
    assert black_box(2, 50).verdict == "fail"
    assert black_box(0, 50, hybrid=20).threshold == 0.1


def test_noise_fooling_a_survivor() -> None:
    def case(fooled: Sequence[bool], **changes: Any) -> str:
        return verdict(
            "noise-wins",
            outcome("noise", fooled, access="none", control=True),
            outcome("pgd", share(40), **changes),
        )

    assert case(share(40)) == "pass"
    assert case(share(41)) == "fail"
    # What noise broke and no gradient attack tried says nothing about these.
    assert case(share(41), tried=[not fell for fell in share(41)]) == "pass"
    assert verdict("noise-wins", outcome("pgd", share(40))) == "not run"
    # Other controls may leave the threat model.
    assert (
        verdict(
            "noise-wins",
            outcome("blur", share(90), access="none", control=True),
            outcome("pgd", share(40)),
        )
        == "not run"
    )


def points(*pairs: tuple[float, float]) -> list[CurvePoint]:
    return [
        CurvePoint(eps=eps, robust_accuracy=value, interval=Interval(low=0.0, high=1.0))
        for eps, value in pairs
    ]


def test_curve_rising_with_eps() -> None:
    assert verdict("rising-curve", curve=points((0, 0.9), (0.1, 0.5), (0.2, 0.5))) == "pass"
    assert verdict("rising-curve", curve=points((0.2, 0.6), (0, 0.9), (0.1, 0.5))) == "fail"
    assert verdict("rising-curve", curve=points((0, 0.9))) == "not run"


def test_unbounded_attack_must_succeed() -> None:
    some_attack = outcome("pgd", share(50))

    def case(*pairs: tuple[float, float]) -> str:
        return verdict("unbounded-attack", some_attack, curve=points(*pairs))

    assert case((0, 0.9), (1.0, 0.0)) == "pass"
    assert case((0, 0.9), (1.0, 0.3)) == "fail"
    assert case((0, 0.9), (0.6, 0.08)) == "pass"
    assert case((0, 0.9), (0.1, 0.4)) == "not run"
    assert case() == "not run"
    # Of two classes half is chance, and still far from what everything allowed must reach.
    assert unbounded(0.3, 50, chance=0.5).verdict == "fail"
    assert unbounded(1 / 50, 50, chance=0.001).verdict == "pass"


def test_cross_entropy_against_margin() -> None:
    def case(ce: int, other: int, **changes: Any) -> str:
        return verdict(
            "loss-choice",
            outcome("pgd", share(ce), steps=20, loss="ce"),
            outcome("pgd", share(other), loss="margin", **{"steps": 20, **changes}),
        )

    assert case(40, 60) == "fail"
    assert case(60, 40) == "fail"
    assert case(40, 44) == "pass"
    assert case(40, 60, steps=99) == "not run"
    assert compare_losses(share(40), share(60)).value == pytest.approx(0.2)
    assert "cross-entropy breaks 40.0%" in compare_losses(share(40), share(60)).explanation


def test_the_better_loss_is_the_remedy_where_it_was_used() -> None:
    few, many = share(40), share(60)
    assert compare_losses(few, many, {"margin"}).remedy
    assert compare_losses(many, few, {"ce"}).remedy
    assert compare_losses(few, many, {"ce"}).remedy is None
    assert compare_losses(many, few, {"margin"}).remedy is None
    assert compare_losses(few, few, {"ce", "margin"}).remedy is None
    # Both ran on the same samples: the worst case counts the better one.
    both = [
        outcome("pgd", few, steps=20, loss="ce"),
        outcome("pgd", many, steps=20, loss="margin"),
    ]
    found = review(both, chance=0.1, widest=1.0)
    assert unresolved(one for one in found if one.check == "loss-choice") == ()
    assert losses_used(both) == {"ce", "margin"}
    idle = outcome("mm", share(0), tried=[False] * 100)
    assert losses_used([idle, outcome("apgd", few, loss="dlr")]) == {"margin"}
    assert losses_used([outcome("fgsm", few, loss="ce")]) == losses_used([idle]) == frozenset()


def test_success_still_climbing() -> None:
    def case(added: int, rounds: int = 3) -> str:
        stages = [outcome("mm", share(50), added=10) for _ in range(rounds - 1)]
        return verdict("restarts-help", *stages, outcome("mm", share(50), added=added))

    assert case(0) == "pass"
    assert case(1) == "pass"
    assert case(2) == "fail"
    # A second attack adds to a first as a matter of course.
    assert case(9, rounds=2) == "not run"


def test_findings_of_plain_data() -> None:
    long, short = share(60), share(40)
    assert twice_the_steps(long, short, 20).verdict == "fail"
    assert twice_the_steps(share(41), short, 20).verdict == "pass"
    assert last_tenth([5, 5], [3, 3], [2, 2], 20).verdict == "fail"
    assert last_tenth([5, 5], [2.01, 2], [2, 2], 20).verdict == "pass"
    assert last_tenth([5.0], [5.0], [5.0], 20).value == 0
    # One image alone says nothing.
    assert last_tenth([5.0], [3.0], [2.0], 20).verdict == "pass"
    silent = lost_on_the_way(share(40), share(20))
    assert (silent.verdict, silent.value) == ("fail", 0.2)
    assert silent.remedy
    assert lost_on_the_way(share(40), share(39)).verdict == "pass"
    assert noise(0, 0).verdict == "pass"
    assert single_step(compare(share(60), share(40))).verdict == "fail"
    assert surrogate_agrees(0.5, 20).verdict == "fail"
    assert surrogate_agrees(0.0, 0).verdict == "not run"


def test_sign_test() -> None:
    # Five pairs that all lean one way: 1 / 32.
    assert compare(share(5), share(0)).p == pytest.approx(1 / 32)
    assert compare(share(5), share(5)).p == 1
    both = compare([True, False] * 4, [False, True] * 4)
    assert both.p == pytest.approx(163 / 256)


# -------------------------------------------------------------------------------- the findings


def test_every_check_says_what_it_means_and_what_to_do() -> None:
    for name, check in CHECKS.items():
        assert name == name.lower().replace(" ", "-")
        for text in (check.means, check.advice):
            assert text.endswith(".")
            assert text[0].isupper()


def test_the_worst_of_several_findings_stays() -> None:
    bad = conclude("randomised", True, "It is.", value=1.0)
    good = conclude("randomised", False, "It is not.", value=0.0)
    none = not_run("randomised", "Not looked at.")
    other = conclude("rising-curve", False, "It falls.")
    assert combine([other, good], [bad], [none]) == (bad, other)
    assert combine([none], [good]) == (good,)
    assert bad.explanation == f"It is. {CHECKS['randomised'].means} {CHECKS['randomised'].advice}"
    assert good.explanation == "It is not."


def test_a_remedy_makes_a_failure_bearable() -> None:
    bad = conclude("saturated-loss", True, "It is.", value=float("inf"))
    assert bad.value is None
    assert unresolved([bad]) == (bad,)
    assert unresolved([bad.remedied("Margin losses were used.")]) == ()


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-4, 1e3])
def test_the_scale_of_the_logits_is_no_fault_of_the_gradient(
    scale: float, undefended: nn.Module, digits: ra.ImageData
) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scale * undefended(x)

    x, labels = some(digits)
    make: Callable[[], nn.Module] = Scaled
    expected = {"saturated-loss"} if scale > 1 else set()
    found = diagnose(make(), x, labels, LINF).findings
    assert failed(found) == expected
    assert "not run" not in {one.verdict for one in found}
    assert "saturated-loss" in failed(diagnose(Saturated(undefended), x, labels, LINF).findings)


def test_tiny_logits_do_not_hide_a_wrong_gradient(
    undefended: nn.Module, digits: ra.ImageData
) -> None:
    wrong = ZOO["quantised, straight through"].make(undefended)

    class Tiny(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e-12 * wrong(x)

    x, labels = some(digits)
    assert "gradient-mismatch" in failed(diagnose(Tiny(), x, labels, LINF).findings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_in_half_precision_are_probabilities(
    dtype: torch.dtype, undefended: nn.Module, digits: ra.ImageData
) -> None:
    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = undefended(x).softmax(1)
            return answer.to(dtype)

    x, labels = some(digits)
    assert "softmax-output" in failed(diagnose(Halved(), x, labels, LINF).findings)


class Silenced(nn.Module):
    """Gives no number for images off the 17 grey levels of the data."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        level = 16 * x
        off = ((level - level.round()).abs().flatten(1).amax(1) > 1e-3)[:, None]
        return torch.where(off, torch.full_like(logits, torch.nan), logits)


def test_answers_that_are_no_numbers_are_told(undefended: nn.Module, digits: ra.ImageData) -> None:
    x, labels = some(digits)
    found = {one.check: one for one in probe(Silenced(undefended), x, labels, LINF,
                                             random=streams(64))}  # fmt: skip
    assert found["answer-missing"].verdict == "fail"
    assert found["silent-success"].verdict == "not run"
    found = {one.check: one for one in probe(undefended, x, labels, LINF, random=streams(64))}
    assert found["answer-missing"].value == 0


def test_margins_that_are_no_numbers_gain_nothing() -> None:
    infinite = float("inf")
    found = last_tenth([4.0, 4.0, 4.0], [2.0, infinite, infinite], [1.0, infinite, 2.0], 20)
    assert found.value == 0.333333
    assert "over 1 images" in found.explanation
    assert last_tenth([4.0], [infinite], [infinite], 20).verdict == "not run"


# ----------------------------------------------------------------------------------- whole audits


@pytest.mark.parametrize("preset", ["quick", "standard"])
@pytest.mark.parametrize("threat", [LINF, ThreatModel("l2", 0.5)], ids=["linf", "l2"])
def test_no_check_fires_in_an_audit_of_a_sound_model(
    preset: str, threat: ThreatModel, sound: dict[str, nn.Module], digits: ra.ImageData
) -> None:
    for name in ("undefended", "pgd-trained", "fgsm-trained"):
        result = ra.audit(sound[name], digits, threat, preset, max_samples=64, explain=False)
        assert failed(result.findings) == set(), name
        assert result.believable
        # Nor is anything of an attack's made up: these models are neither broken nor perfect.
        assert 0.2 < result.robust_accuracy < result.clean_accuracy
        assert not any("remedy" in one.label for one in result.attacks)
