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
    "Spearman": (
        "Rank correlation between two attribution maps: 1 is the same order of pixels, 0 is no "
        "relation."
    ),
    "bit error rate": (
        "Share of the bits of the stored weights that are inverted, each with this probability, "
        "wherever it lies."
    ),
    "top 5 %": "Of the 5 % most important pixels of one map, the share that the other map has too.",
}
