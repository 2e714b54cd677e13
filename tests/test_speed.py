"""Switches for speed: next to nothing changes but the time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import robustann as ra
from robustann.attacks import MM, PGD, Square
from robustann.attacks.engine import predict_logits, run
from robustann.auditing.speed import Quick
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
