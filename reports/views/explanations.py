"""What the drift of attribution maps says."""

from __future__ import annotations

from robustann.results import Drift


def reading(drift: Drift) -> str:
    """What a row of the drift table says, and what it does not."""
    attacked, noise = drift.attacked, drift.noise
    if not attacked.n or attacked.spearman is None or noise.spearman is None:
        return (
            "No broken sample had maps to compare: either nothing broke, or the maps are constant "
            "because the model has no gradient there."
        )
    gap = noise.spearman - attacked.spearman
    if gap >= 0.05:
        text = "The attack moves this map further than random noise of the same size does."
    elif gap <= -0.05:
        text = "The attack moves this map less than random noise of the same size does."
    else:
        text = (
            "The attack moves this map about as far as random noise of the same size does: the "
            "drift shows how restless the map is, not what the attack did."
        )
    if noise.spearman < 0.5:
        text += " Noise alone already reorders it, so a single map says little."
    if attacked.n < 20:
        text += f" With {attacked.n} samples this is no more than a hint."
    return text
