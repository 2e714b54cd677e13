"""What the terms of a report mean, in a sentence or two each."""

from __future__ import annotations

DEFINITIONS: dict[str, str] = {
    "accuracy": "Share of the audited samples that the model classifies correctly.",
    "robust accuracy": (
        "Share of the samples that stay correctly classified under every attack of the audit: "
        "for each sample, its worst outcome counts. Samples that the model gets wrong unattacked "
        "count as wrong."
    ),
    "certified accuracy": (
        "Share of the samples that are proven to be classified correctly whatever the threat model "
        "allows. It bounds the robust accuracy from below, as attacks bound it from above."
    ),
    "interval": (
        "Wilson's 95 % confidence interval. It covers the chance in which test samples were "
        "drawn, not the strength of the attacks nor another training run."
    ),
    "chance": "The accuracy of guessing.",
    "precision": (
        "Of the samples predicted as a class, the share that belongs to it; averaged over "
        "the classes that occur, each with the same weight (macro)."
    ),
    "recall": (
        "Of the samples of a class, the share predicted as it; averaged over the classes that "
        "occur, each with the same weight (macro)."
    ),
    "F1": "The harmonic mean of precision and recall; averaged over the classes that occur.",
    "success rate": (
        "Samples that the attack broke, divided by the samples it attacked: those that the model "
        "classifies correctly unattacked; in a cascade only of those that still stood after the "
        "attacks before, so that the rates of two attacks do not compare. 0 % means it broke "
        "none, not that none can be broken."
    ),
    "median distance": (
        "Median, over the samples that the attack broke, of the distance between the clean and "
        "the attacked image, in the norm of the threat model."
    ),
    "propagations": (
        "Forward plus backward passes of single images: what an attack costs, whatever the "
        "machine. Per image: divided by the samples attacked."
    ),
    "added": "Samples that this attack broke and no earlier one in the table did.",
    "control": (
        "Not an attack but a yardstick: random noise in the same threat model. An attack that "
        "does not beat it has found nothing."
    ),
    "common corruptions": (
        "Gaussian noise and blur, brightness, contrast and JPEG at five severities (Hendrycks and "
        "Dietterich 2019). Nobody chooses them to fool the model, and they keep within no eps: a "
        "control beside the attacks, never part of the worst case."
    ),
    "severity": (
        "How strong a corruption is, from 1 to 5, with the published parameters: of CIFAR-10-C for "
        "images of up to 64 pixels, of ImageNet-C for larger ones."
    ),
    "mean corruption accuracy": (
        "Accuracy averaged over severities and, where it stands for all, over corruptions, each "
        "with the same weight."
    ),
    "Spearman": (
        "Rank correlation between two attribution maps: 1 is the same order of pixels, 0 is no "
        "relation."
    ),
    "bit error rate": (
        "Share of the bits of the stored weights that are inverted, each with this probability, "
        "wherever it lies."
    ),
    "top 5 %": "Of the 5 % most important pixels of one map, the share that the other map has too.",
    "SSIM": (
        "Structural similarity of two attribution maps, each in its own scale: 1 is the same map, "
        "0 is no common structure."
    ),
    "confidence": "The softmax probability that the model gives to its prediction.",
    "margin": (
        "The logit of the true class minus the largest other one: negative where the prediction is "
        "wrong, large where it is safe."
    ),
    "calibration error": (
        "Expected calibration error: in 15 bins of confidence, the gap between mean confidence and "
        "accuracy, weighted by samples. 0 means that the model is right as often as it says."
    ),
    "bootstrap": (
        "A 95 % interval of the median, by drawing the samples again 2,000 times, with "
        "replacement (percentiles)."
    ),
    "re-initialised": (
        "Spearman between a map and that of the same network with random weights (Adebayo et al. "
        "2018). A map that stays the same does not show what the network learned."
    ),
    "infidelity": (
        "How badly a map foretells what small noise does to the output, the map scaled at best "
        "(Yeh et al. 2019); lower is better."
    ),
    "max-sensitivity": (
        "How far a map can be moved by noise of 0.02 of the range of a pixel, relative to its size "
        "(Yeh et al. 2019); lower is better."
    ),
    "completeness": (
        "Integrated gradients sum to the difference of the output between image and black. The "
        "largest gap, relative to the sum of |attribution|; with twice the steps where it is above "
        "0.02. Maps that stay above it, or are empty although the output differs, are not complete."
    ),
    "paired difference": (
        "How many more of the same samples are right, in percentage points, with its 95 % interval "
        "(Agresti and Min 2005)."
    ),
    "McNemar": (
        "McNemar's exact test on the samples that changed sides: how likely so uneven a split is "
        "if nothing differed."
    ),
    "eps": "How much the attacker may change, in the norm of the threat model.",
    "forwards": "Forward passes of single images, over all samples that the attack went to.",
    "backwards": "Backward passes of single images, over all samples that the attack went to.",
    "time": "What the attack took on this machine; the rest of the audit comes on top.",
    "support": "Audited samples of the class.",
    "class precision": "Of the samples predicted as this class, the share that belongs to it.",
    "class recall": "Of the samples of this class, the share predicted as it.",
    "class F1": "The harmonic mean of the class's precision and recall.",
    "flip share": "Of the samples of this class that some attack broke, the share turned so.",
    "mean error": "Share of the samples classified wrongly, averaged over patterns of bit errors.",
    "std": "Standard deviation of the error over patterns of bit errors.",
    "worst pattern": "The largest error among the patterns of bit errors that were tried.",
    "believable": (
        "Whether no check of the evaluation failed without a remedy, and enough could be made."
    ),
}
