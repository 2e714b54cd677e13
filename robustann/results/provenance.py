"""What an audit was asked, of what, and how it was run."""

from __future__ import annotations

from typing import Literal

from pydantic import FiniteFloat

from robustann.results.value import Value
from robustann.rounding import MaybeNumber, Number


class Threat(Value):
    """The threat model of the audit; ``words`` says it in a sentence.

    >>> print(result.threat.words)
    An attacker who may change every pixel by at most 0.2 and wants any wrong class.
    """

    norm: str
    eps: Number
    eps_text: str
    bounds: tuple[float, float]
    targeted: bool
    words: str


class Provenance(Value):
    """What makes the audit repeatable: versions, seed, hashes, and the resolved configuration.

    ``model_sha256`` covers names, shapes and bytes of all parameters and buffers;
    ``data_sha256`` the audited images and labels.

    >>> result.provenance.seed, result.provenance.parameters
    (0, 4)
    """

    versions: dict[str, str]
    seed: int
    model: str
    model_sha256: str
    parameters: int
    data: str
    data_sha256: str
    preset: str | None
    config: dict[str, str | int | float | bool | list[str] | None]


class Seal(Value):
    """Whether the audited file is what was sealed (``robustann seal``), by the manifest beside it.

    ``changes`` say what differs, a sentence each. The signature is not checked in an audit, which
    is given no key: only accidents are ruled out, and ``signed`` says that a check would tell more.

    >>> Seal(intact=False, changes=("1.bias has other values",)).signed
    False
    """

    intact: bool
    changes: tuple[str, ...] = ()
    signed: bool = False


class Tuned(Value):
    """The switches that a timed batch chose for the search, and its ``ratios``: the time of a batch
    with a switch over that without, the worse of a full batch and an eighth of it; None where the
    model failed with it.
    """

    precision: Literal["float32", "bf16", "fp16"]
    channels_last: bool
    ratios: dict[str, MaybeNumber]

    @property
    def words(self) -> str:
        """In a sentence.

        >>> Tuned(precision="bf16", channels_last=False, ratios={"bf16": 0.6}).words
        'searching in bf16; time of a batch with bf16 0.60 of that without'
        """
        chosen = self.precision + (", channels last" if self.channels_last else "")
        told = ", ".join(
            f"{name.replace('_', ' ').replace('+', ' and ')} "
            + ("failed" if ratio is None else f"{ratio:.2f}")
            for name, ratio in self.ratios.items()
        )
        return f"searching in {chosen}" + (
            f"; time of a batch with {told} of that without" if told else ""
        )


class Execution(Value):
    """What differs between two runs of the same audit.

    >>> result.execution.device
    'cpu'
    """

    command: str
    started: str
    seconds: FiniteFloat
    attack_seconds: dict[str, FiniteFloat]
    batch_size: int
    device: str
    threads: int
    tuned: Tuned | None = None
