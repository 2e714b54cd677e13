"""The checks: their thresholds, what a failure means and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from robustann.findings import Finding, FindingVerdict


@dataclass(frozen=True)
class Check:
    """A question to an evaluation.

    Attributes:
        threshold: the check fails beyond it (where it says so: below it); None where the answer
            is yes or no.
        means: what a failure means for the robust accuracy.
        advice: what to do then.

    >>> CHECKS["randomised"].threshold
    0.0001
    """

    threshold: float | None
    means: str
    advice: str


CHECKS: Mapping[str, Check] = {
    # Of the model, before the attacks.
    "randomised": Check(
        1e-4,
        "A single gradient shows one draw only and attacks chase noise, so robustness looks "
        "larger than it is.",
        "Average gradients and logits over draws (EOT: run(..., draws=20)), or audit the model "
        "with its randomness fixed.",
    ),
    "batch-dependent": Check(
        1e-3,
        "An image's prediction depends on its neighbours, so an attacked image may be judged "
        "otherwise alone, and results change with the batch size.",
        "Set batch statistics to fixed ones (BatchNorm in eval mode with running statistics), or "
        "make the model treat each image alone.",
    ),
    "training-mode": Check(
        1e-3,
        "Dropout or batch statistics are active in one mode and not in the other: two models are "
        "being spoken of.",
        "Call model.eval() before use, and let eval() reach every layer; the figures of this "
        "audit hold for eval mode only.",
    ),
    "softmax-output": Check(
        None,
        "Where probabilities round to 0 or 1 the losses of attacks lose their slope, and attacks "
        "that expect logits fail.",
        "Take the softmax off the model's output; train with a loss on logits.",
    ),
    "dynamic-defense": Check(
        None,
        "The model optimises something while it predicts. Its gradient as seen from outside is "
        "not that of what it does, and attacks that do not know this fail.",
        "Attack through the inner optimisation (unroll it), or with attacks that need no "
        "gradients, and transfer from the model without it.",
    ),
    "gradient-missing": Check(
        0.05,
        "Gradient attacks cannot move these images, so their failure says nothing about "
        "robustness.",
        "Remove detach, no_grad, rounding or argmax from the forward pass, replace them in the "
        "backward pass (BPDA), or rely on score-based, decision-based and transfer attacks.",
    ),
    "saturated-loss": Check(
        40.0,
        "Softmax rounds to exactly 0 and 1 in float32, and textbook cross-entropy has no "
        "gradient left.",
        "Attack with margin or DLR losses, or divide the logits by a constant first.",
    ),
    "gradient-mismatch": Check(
        0.1,
        "The gradient that autograd returns is not the slope of the function that is judged: a "
        "step in the forward pass has another backward pass, or none that counts.",
        "Give that step a faithful or smooth backward pass (BPDA), and check with attacks that "
        "need no gradients.",
    ),
    "gradient-shattered": Check(
        0.5,
        "The slope is right at the point and wrong a step further: the surface is so rough that "
        "gradient attacks lose their way (shattered gradients).",
        "Average gradients over a neighbourhood, take the smooth part of the model for the "
        "backward pass (BPDA), and check with score-based and transfer attacks.",
    ),
    "discontinuous": Check(
        0.05,
        "The gradient is right where it is taken and knows nothing of the jumps, so what lies "
        "behind them is found by search alone.",
        "Search without gradients, give the step that jumps (a nearest neighbour, a codebook, a "
        "choice among branches) a smooth stand-in in the backward pass (BPDA), and transfer from "
        "the model without it.",
    ),
    # Of the attacks: what their outcomes say, and what extra runs on a few images show.
    "single-step-wins": Check(
        0.01,
        "Many small steps contain the one large step; where they do worse, the path is blocked: "
        "gradients are masked, or the step size is unfit.",
        "Tune the step size, add steps and random starts, use a margin loss, and check with "
        "attacks that need no gradients.",
    ),
    "black-box-wins": Check(
        0.002,
        "Who knows the weights can do whatever an outsider can; where the outsider does better, "
        "gradients mislead.",
        "Count the black-box successes (the worst case does), give that attack more queries, let "
        "gradient attacks start from its images, and adapt the gradient attack to the defense.",
    ),
    "noise-wins": Check(
        0.0,
        "An attack that misses what blind chance finds has failed, not met robustness.",
        "Start the attack from random points, repair its gradients, and add a search that needs "
        "none.",
    ),
    "rising-curve": Check(
        0.0,
        "A larger ball contains the smaller one, so an attack that breaks less in it was lost on "
        "the way.",
        "Add steps in proportion to eps, and start from the images found at smaller eps.",
    ),
    "unbounded-attack": Check(
        0.1,
        "An attacker who may change the image into any other one must always succeed; where an "
        "attack does not, it fails for reasons other than robustness.",
        "Repair the attack before believing any figure: look for masked gradients, saturation and "
        "randomness, and use attacks that need no gradients.",
    ),
    "loss-choice": Check(
        0.05,
        "Two losses for the same goal should do about as well; where one does not, it has no "
        "slope to climb or aims elsewhere.",
        "Use the better loss, and several targeted ones.",
    ),
    "restarts-help": Check(
        0.01,
        "The last round of the attack still broke new samples, so another round would break more.",
        "Use a stronger preset or more restarts, until nothing is added.",
    ),
    "steps-help": Check(
        0.02,
        "The attack had not finished when it stopped.",
        "Use more steps, until twice as many change nothing.",
    ),
    # A loss that rises evenly to the end gains a tenth in its last tenth.
    "incomplete-optimisation": Check(
        0.1,
        "The loss was still rising when the attack stopped.",
        "Use more steps or larger ones.",
    ),
    "silent-success": Check(
        0.05,
        "The attack was there and walked on: its last image is judged, a better one is forgotten. "
        "The optimisation is unsteady.",
        "Keep the best image on the way, and let the step size decay.",
    ),
    "answer-missing": Check(
        0.0,
        "What is no number counts as no success, so the model seems robust where it does not work.",
        "Make the model answer every image with finite logits: look for divisions, logarithms and "
        "overflows, or count such answers as wrong.",
    ),
    "surrogate-disagrees": Check(
        0.1,
        "What fools a surrogate says little about a target that sees images otherwise.",
        "Train the surrogate on the target's own predictions, or choose one that is alike.",
    ),
    "budget-cut": Check(
        0.01,
        "The attacks stopped because the budget was spent, not because they had nothing more to "
        "find, so robustness looks larger than it is.",
        "Give a larger budget, or none.",
    ),
    "certificate-crossed": Check(
        0.0,
        "A proof and an attack cannot both be right: the certificate is faulty, or the attack was "
        "judged by another model or threat model than was certified.",
        "Believe neither figure. Run these samples through the model one by one, and check that "
        "the certified network is the one that is attacked, in the same precision; then report "
        "the fault.",
    ),
}


def conclude(
    check: str,
    failed: bool,
    seen: str,
    *,
    value: float | None = None,
    threshold: float | None = None,
    remedy: str | None = None,
) -> Finding:
    """The finding of a check that ran; a failure says what it means and what to do.

    >>> conclude("softmax-output", False, "The model returns logits.").verdict
    'pass'
    """
    rule = CHECKS[check]
    verdict: FindingVerdict = "fail" if failed else "pass"
    return Finding(
        check=check,
        verdict=verdict,
        value=value,
        threshold=rule.threshold if threshold is None else threshold,
        explanation=f"{seen} {rule.means} {rule.advice}" if failed else seen,
        remedy=remedy if failed else None,
    )


def not_run(check: str, why: str) -> Finding:
    """The finding of a check that could not be made.

    >>> not_run("randomised", "No image was classified correctly.").verdict
    'not run'
    """
    return Finding(
        check=check, verdict="not run", threshold=CHECKS[check].threshold, explanation=why
    )


def combine(*groups: Iterable[Finding]) -> tuple[Finding, ...]:
    """One finding a check, in the order of :data:`CHECKS`: the worst where several were made.

    >>> passed = conclude("softmax-output", False, "Logits.")
    >>> combine([not_run("softmax-output", "No images.")], [passed]) == (passed,)
    True
    """
    rank = {"not run": 0, "pass": 1, "fail": 2}
    worst: dict[str, Finding] = {}
    for group in groups:
        for one in group:
            held = worst.get(one.check)
            if held is None or rank[one.verdict] > rank[held.verdict]:
                worst[one.check] = one
    return tuple(worst[check] for check in CHECKS if check in worst)
