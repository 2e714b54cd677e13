"""Switches for speed: next to nothing changes but the time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import robustann as ra
from robustann.attacks import FMN, MM, PGD, Square
from robustann.attacks.engine import predict_logits, run
from robustann.auditing import runner, speed
from robustann.auditing.speed import Quick, tune
from robustann.rng import SampleRandom

THREAT = ra.ThreatModel("linf", eps=0.1)
ASKED = {"preset": "quick", "max_samples": 64, "explain": False, "trust": False, "curve": False}


@pytest.fixture(scope="module")
def plain(model_file, digits):
    return ra.audit(ra.load_model(model_file), digits, THREAT, **ASKED)


@pytest.mark.parametrize("switch", [{"precision": "bf16"}, {"precision": "fp16"},
                                    {"channels_last": True}])  # fmt: skip
def test_an_audit_with_a_switch_says_the_same(switch, model, digits, plain):
    found = ra.audit(model, digits, THREAT, **ASKED, **switch)
    assert found.clean_accuracy == plain.clean_accuracy
    # One image of 64.
    assert abs(found.robust_accuracy - plain.robust_accuracy) <= 1 / 64 + 1e-9
    ((name, value),) = switch.items()
    assert found.provenance.config[name] == value
    assert name not in plain.provenance.config


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("attack", [PGD(steps=10), MM(steps=10), Square(queries=40)])
def test_what_a_search_in_low_precision_finds_holds_in_float32(precision, attack, model, digits):
    x, y = digits.test.images(slice(0, 64)), digits.test.labels[:64]
    seen = []

    def note(module, inputs, output):
        seen.append(output.dtype)

    handle = model.register_forward_hook(note)
    found = run(attack, model, x, y, THREAT, random=SampleRandom.create(0, torch.arange(64)),
                precision=precision)  # fmt: skip
    handle.remove()
    # It did search in low precision, and judge in float32.
    assert {torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]} == set(seen)
    logits = predict_logits(model, found.adversarial)
    assert torch.equal(found.prediction, logits.argmax(1))
    assert torch.equal(found.success, logits.argmax(1) != y)
    assert torch.equal(found.success, found.first_success >= 0)
    assert found.success.any()
    assert not found.success.all()
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    assert torch.allclose(found.margin, own - others, atol=1e-5)


class Coarse(nn.Module):
    """In low precision its logits are too near each other to be told apart."""

    def forward(self, x):
        shift = nn.functional.linear(x.flatten(1).sum(1, keepdim=True), torch.tensor([[1e-3]]))
        return torch.cat([torch.full_like(shift, 300.25), 300 + shift], 1)


def test_what_low_precision_does_not_see_is_judged_at_the_end():
    x, y = torch.full((8, 1, 20, 20), 0.5), torch.zeros(8, dtype=torch.int64)
    threat = ra.ThreatModel("linf", eps=0.3)
    for precision in ("float32", "bf16"):
        found = run(
            PGD(steps=5, loss="margin"),
            Coarse(),
            x,
            y,
            threat,
            precision=precision,
            random=SampleRandom.create(0, torch.arange(8)),
        )
        logits = predict_logits(Coarse(), found.adversarial)
        assert torch.equal(found.success, logits.argmax(1) == 1)
        assert torch.equal(found.first_success >= 0, found.success)
    with pytest.raises(ra.UsageError, match="float32"):
        run(PGD(), Coarse(), x, y, threat, random=SampleRandom.create(0, torch.arange(8)),
            precision="float8")  # fmt: skip
    with pytest.raises(ra.UsageError, match="precision"):
        ra.audit(Coarse(), (x, y), threat, precision="half")


def test_compiled_attacks_find_the_same(model, digits, monkeypatch):
    genuine, calls = torch.compile, []

    def quickly(function, **options):
        calls.append(options)
        # Without a C++ compiler, and without its minute.
        return genuine(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", quickly)
    x, y = digits.test.images(slice(0, 48)), digits.test.labels[:48]
    quick = Quick(model, compiled=True)
    assert calls == [{"dynamic": True}]
    random = SampleRandom.create(0, torch.arange(48))
    # Without and with a leak, which compiled code would not see.
    for attack in (PGD(steps=8), MM(steps=8, leak=0.02)):
        one = run(attack, model, x, y, THREAT, random=random)
        two = run(attack, quick, x, y, THREAT, random=random)
        assert (one.success != two.success).sum() <= 1
        assert torch.allclose(one.margin, two.margin, atol=0.05)
    assert not model.training


class Hasty(nn.Module):
    """Stands for a faster form of a model: one that is wrong."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


def backwards(logits):
    return logits.flip(1)


def loyal(logits):
    return logits + torch.tensor([0.1, 0.0])


def test_the_judge_confirms_what_a_faster_form_claims(model, digits):
    x, y = digits.test.images(slice(0, 48)), digits.test.labels[:48]
    wrong = Hasty(model, backwards)
    random = SampleRandom.create(0, torch.arange(48))
    found = run(PGD(steps=8), wrong, x, y, THREAT, random=random, judge=model)
    logits = predict_logits(model, found.adversarial)
    assert torch.equal(found.prediction, logits.argmax(1))
    assert torch.equal(found.success, logits.argmax(1) != y)
    # To the faster form nearly all have fallen before they are attacked.
    assert not found.success.all()
    assert (run(PGD(steps=8), wrong, x, y, THREAT, random=random).success).all()
    # What claims nothing is looked at in the end.
    x, y = torch.full((8, 1, 20, 20), 0.5), torch.zeros(8, dtype=torch.int64)
    random = SampleRandom.create(0, torch.arange(8))
    asked = {"random": random, "known_correct": True, "judge": Coarse()}
    attack, threat = PGD(steps=5, loss="margin"), ra.ThreatModel("linf", eps=0.3)
    one = run(attack, Hasty(Coarse(), loyal), x, y, threat, **asked)
    assert torch.equal(one.success, predict_logits(Coarse(), one.adversarial).argmax(1) == 1)
    assert one.success.any()


def test_minimum_norm_attacks_search_with_the_judge(model, digits):
    x, y = digits.test.images(slice(0, 16)), digits.test.labels[:16]
    wrong, random = Hasty(model, backwards), SampleRandom.create(0, torch.arange(16))
    one = run(FMN(steps=20), wrong, x, y, THREAT, random=random, judge=model)
    two = run(FMN(steps=20), model, x, y, THREAT, random=random)
    assert torch.equal(one.distance, two.distance)
    assert torch.equal(one.adversarial, two.adversarial)


@pytest.mark.parametrize("switch", ["compile", "channels_last"])
def test_the_verdict_of_an_audit_is_the_callers_model_s(switch, model, digits, monkeypatch, plain):
    wrong = Hasty(model, backwards)
    if switch == "compile":
        monkeypatch.setattr(speed.torch, "compile", lambda call, **options: wrong)
    else:
        monkeypatch.setattr(Quick, "forward", lambda self, x: wrong(x))
    found = ra.audit(model, digits, THREAT, **ASKED, **{switch: True})
    assert found.clean_accuracy == plain.clean_accuracy
    # To the wrong one nearly all have fallen.
    assert found.robust_accuracy > plain.robust_accuracy - 0.1 > 0


PLAIN = ("float32", False)


def timed(seconds, log=None):
    def timer(*switches):
        if log is not None:
            log.append(switches)
        found = seconds[switches]
        if isinstance(found, Exception):
            raise found
        return found

    return timer


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        # Nothing saves more than 5 %.
        ({("bf16", False): 0.96, ("float32", True): 1.3}, ("float32", False)),
        ({("bf16", False): 0.5, ("float32", True): 0.96}, ("bf16", False)),
        ({("bf16", False): 3.0, ("float32", True): 0.94}, ("float32", True)),
        ({("bf16", False): 0.5, ("float32", True): 0.9, ("bf16", True): 0.4}, ("bf16", True)),
        # Each helps, but not together.
        ({("bf16", False): 0.5, ("float32", True): 0.9, ("bf16", True): 0.5}, ("bf16", False)),
        ({("bf16", False): 0.9, ("float32", True): 0.5, ("bf16", True): 0.6}, ("float32", True)),
        ({("bf16", False): 0.5, ("float32", True): 0.9, ("bf16", True): RuntimeError()},
         ("bf16", False)),
        ({("bf16", False): RuntimeError("no such kernel"), ("float32", True): 0.9},
         ("float32", True)),
    ],
)  # fmt: skip
def test_only_switches_that_clearly_pay_are_kept(seconds, chosen):
    found = tune(timed({PLAIN: 1.0, **seconds}), low=("bf16",))
    assert (found.precision, found.channels_last) == chosen
    for name, switches in (("bf16", ("bf16", False)), ("channels_last", ("float32", True))):
        failed = isinstance(seconds[switches], Exception)
        assert found.ratios[name] == (None if failed else pytest.approx(seconds[switches]))
        assert not failed or f"{name.replace('_', ' ')} failed" in found.words


def test_the_faster_low_precision_is_kept_and_what_was_asked_for_stays():
    seconds = {PLAIN: 1.0, ("bf16", False): 0.8, ("fp16", False): 0.6, ("float32", True): 2.0}
    assert tune(timed(seconds), low=("bf16", "fp16")).precision == "fp16"
    log = []
    seconds = {("fp16", False): 1.0, ("fp16", True): 0.5}
    found = tune(timed(seconds, log), precision="fp16", low=("bf16", "fp16"))
    assert (found.precision, found.channels_last, found.ratios) == (
        "fp16", True, {"channels_last": 0.5}
    )  # fmt: skip
    assert set(log) == set(seconds)
    found = tune(timed({}), precision="bf16", channels_last=True, low=("bf16", "fp16"))
    assert (found.precision, found.channels_last, found.ratios) == ("bf16", True, {})


def test_one_slow_round_does_not_decide():
    """And the first, which warms up, does not count."""
    laps = {"bf16": iter([50.0, 0.6, 9.0, 0.6, 0.6, 0.6])}
    found = tune(
        lambda precision, last: next(laps[precision]) if precision in laps else 1.0 + last,
        low=("bf16",),
    )
    assert found.precision == "bf16"


def test_what_slows_a_small_batch_down_is_off():
    full = timed({PLAIN: 1.0, ("bf16", False): 0.5, ("float32", True): 0.5, ("bf16", True): 0.2})
    small = timed({PLAIN: 0.1, ("bf16", False): 0.12, ("float32", True): 0.09})
    found = tune(full, small, low=("bf16",))
    assert (found.precision, found.channels_last) == ("float32", True)
    assert found.ratios == {"bf16": pytest.approx(1.2), "channels_last": pytest.approx(0.9)}


@pytest.fixture
def bf16_pays(monkeypatch):
    genuine = runner.measure

    def stub(called, split, positions, threat, gradients=True, precision="float32"):
        rate = genuine(called, split, positions, threat, gradients, precision)
        seconds = 0.5 if precision == "bf16" else 1.0
        return type(rate)(rate.batch_size, seconds / 2, seconds / 2)

    monkeypatch.setattr(runner, "measure", stub)


def test_an_audit_uses_what_its_trial_chose_and_says_so(bf16_pays, model, digits, plain):
    asked = {**ASKED, "batch_size": 32}
    found = ra.audit(model, digits, THREAT, **asked, tune=True)
    tuned = found.execution.tuned
    assert tuned is not None
    assert (tuned.precision, tuned.channels_last) == ("bf16", False)
    assert tuned.ratios == {"bf16": 0.5, "channels_last": 1.0}
    assert found.provenance.config["tune"] is True
    assert "precision" not in found.provenance.config
    assert plain.execution.tuned is None
    # The very search that it says.
    same = ra.audit(model, digits, THREAT, **asked, precision="bf16")
    assert found.attacks == same.attacks
    assert found.worst_case == same.worst_case
    with pytest.raises(ra.UsageError, match="compile or tune"):
        ra.audit(model, digits, THREAT, **ASKED, tune=True, compile=True)


def test_an_audit_that_goes_on_keeps_the_first_choice(
    bf16_pays, model, digits, tmp_path, monkeypatch
):
    genuine, shards = runner.Passes.first, []

    def stopping(self, *arguments):
        if shards:
            raise KeyboardInterrupt
        shards.append(arguments)
        return genuine(self, *arguments)

    def audited():
        return ra.audit(
            model, digits, THREAT, **{**ASKED, "batch_size": 32}, tune=True, state=tmp_path
        )

    monkeypatch.setattr(runner.Passes, "first", stopping)
    with pytest.raises(KeyboardInterrupt):
        audited()
    monkeypatch.setattr(runner.Passes, "first", genuine)

    def never(*arguments, **options):
        raise AssertionError("tuned again")

    monkeypatch.setattr(runner, "tune", never)
    found = audited()
    assert found.execution.tuned is not None
    assert found.execution.tuned.precision == "bf16"


class Replayed:
    """Stands in for ``torch.compile``: as a captured graph does, each answers from one buffer, for
    one size and precision."""

    def __init__(self) -> None:
        self.options: list[dict[str, object]] = []

    def __call__(self, call, **options):
        self.options.append(options)
        buffer, seen = [], []

        def replay(x):
            if options.get("dynamic"):
                return call(x)
            seen.append((len(x), torch.is_autocast_enabled("cpu")))
            assert len(set(seen)) == 1
            answer = call(x)
            if not buffer:
                buffer.append(torch.empty_like(answer))
            return buffer[0].copy_(answer)

        return replay


@pytest.fixture
def replayed(monkeypatch):
    fake = Replayed()
    monkeypatch.setattr(speed.torch, "compile", fake)
    monkeypatch.setattr(speed, "_captures", lambda model: True)
    return fake


def test_a_replay_does_not_overwrite_what_another_returned(replayed, model):
    quick = Quick(model.eval(), compiled=True)
    first, second = torch.rand(2, 11, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        early = quick(first)
        late = quick(second)
        expected = model(first), model(second)
    assert torch.allclose(early, expected[0], atol=1e-5)
    assert torch.allclose(late, expected[1], atol=1e-5)
    assert early.shape == (11, 10)


def test_graphs_come_in_few_sizes_and_each_precision_has_its_own(replayed, model):
    quick = Quick(model.eval(), compiled=True)
    with torch.no_grad():
        for count in (1, 3, 8, 9, 16, 40, 64, 100):
            for low in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    quick(torch.rand(count, 1, 8, 8))
    # 8, 16, 64 and 128 rows in two precisions, and the program for calls with gradients.
    assert len(replayed.options) == 1 + 4 * 2
    assert [one["dynamic"] for one in replayed.options] == [True] + [False] * 8
    assert {one["mode"] for one in replayed.options[1:]} == {"reduce-overhead"}


def test_an_attack_through_graphs_finds_what_it_finds_without(replayed, model, digits):
    x, y = digits.test.images(slice(0, 48)), digits.test.labels[:48]
    for attack in (PGD(steps=6), Square(queries=30)):
        plain, quick = (
            run(attack, one, x, y, THREAT, random=SampleRandom.create(0, torch.arange(48)))
            for one in (model, Quick(model, compiled=True))
        )
        assert torch.equal(plain.success, quick.success)
        assert torch.allclose(plain.margin, quick.margin, atol=1e-4)


def test_no_program_is_lost_to_a_limit_that_models_share(model):
    # Eight programs a function are kept; what comes then would run as it is, unnoticed.
    compiled = []

    def backend(graph, inputs):
        compiled.append(tuple(inputs[-1].shape))
        return graph.forward

    torch._dynamo.reset()
    models = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3 + number)) for number in range(12)]
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for number, one in enumerate(models):
            call = speed._compiled(one, dynamic=True, backend=backend)
            assert call(torch.rand(8, 1, 2, 2)).shape == (8, 3 + number)
            assert call(torch.rand(16, 1, 2, 2)).shape == (16, 3 + number)
    assert len(compiled) == len(models)
