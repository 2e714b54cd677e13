"""The result of an audit, and its file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError, model_validator

from robustann import files
from robustann.errors import DataError, UsageError, first_invalid
from robustann.findings import Finding, unresolved
from robustann.results.certificate import Certificate
from robustann.results.corruptions import Corruptions
from robustann.results.explanation import Explanation
from robustann.results.hardening import Hardening
from robustann.results.outcomes import AttackOutcome, CleanSamples, CurvePoint, WorstCase
from robustann.results.protocol import Protocol
from robustann.results.provenance import Execution, Provenance, Seal, Threat
from robustann.results.scores import MATRIX_LIMIT, Scores
from robustann.results.value import Value
from robustann.results.weights import Weights
from robustann.rounding import Number

SCHEMA_VERSION = 1
# Some kilobytes a sample, at most.
_LARGEST = 2**30


class Gate(Value):
    """A demand on a figure: ``value`` (the interval's lower bound or the point) >= threshold.

    Where the figure is a change against an earlier audit, ``metric`` is named so
    (``change_of_robust_accuracy``) and a fall is negative. ``detail`` says what was compared.

    >>> from robustann.auditing import with_gates
    >>> gate = with_gates(result, {"robust_accuracy": 0.4}).gates[0]
    >>> gate.on, gate.threshold, gate.value, gate.passed
    ('lower', 0.4, 0.150039, False)
    """

    metric: str
    on: Literal["lower", "point"]
    threshold: Number
    value: Number
    passed: bool
    detail: str | None = None


class AuditResult(Value):
    """What an audit found. Read from and written to ``results.json``.

    In a ``cascade`` each attack went only to the samples that the ones before had not broken, and
    the scores listed with it are those after it and all before it.

    The three figures most asked for are properties: :attr:`clean_accuracy`,
    :attr:`robust_accuracy` (per-sample worst case over all attacks) and :attr:`propagations`.

    >>> result.clean_accuracy, result.robust_accuracy, result.certificate.certified_accuracy
    (1.0, 0.5, 0.5)
    >>> result.believable, [one.check for one in result.findings if one.verdict == "fail"]
    (True, [])
    >>> AuditResult.model_validate_json(result.to_json()) == result
    True
    """

    schema_version: Literal[1] = 1
    threat: Threat
    class_names: tuple[str, ...]
    n: int
    chance: Number
    clean: Scores
    clean_samples: CleanSamples
    attacks: tuple[AttackOutcome, ...]
    cascade: bool
    worst_case: WorstCase
    curve: tuple[CurvePoint, ...]
    curve_propagations: int
    trust_propagations: int = 0
    explanation: Explanation | None
    hardening: Hardening | None = None
    certificate: Certificate | None = None
    weights: Weights | None = None
    corruptions: Corruptions | None = None
    protocol: Protocol | None = None
    seal: Seal | None = None
    findings: tuple[Finding, ...] = ()
    gates: tuple[Gate, ...] = ()
    provenance: Provenance
    execution: Execution

    @model_validator(mode="after")
    def _fits_together(self) -> AuditResult:
        """Refuse what no audit yields: a report of it would fail, or mislead."""
        if self.n < 1:
            raise ValueError(f"expected n to be at least 1, got {self.n}")
        if not self.class_names:
            raise ValueError("expected at least one class name, got none")
        for place, eps in [
            ("threat", self.threat.eps),
            *(("curve", point.eps) for point in self.curve),
        ]:
            if eps < 0:
                raise ValueError(f"expected eps of {place} to be at least 0, got {eps}")
        for attack in self.attacks:
            self._check_scores(f"attack {attack.label!r:.60}", attack.scores)
            self._check_lengths(f"attack {attack.label!r:.60}", attack.samples)
            self._check_classes(f"attack {attack.label!r:.60}", attack.samples.prediction)
        self._check_scores("clean", self.clean)
        self._check_scores("worst_case", self.worst_case.scores)
        self._check_lengths("clean_samples", self.clean_samples)
        if self.worst_case.confidence or self.worst_case.margin:
            self._check_lengths("worst_case", self.worst_case)
        else:
            # An older result has neither.
            told = self.worst_case.model_copy(update={"confidence": None, "margin": None})
            self._check_lengths("worst_case", told)
        self._check_classes("clean_samples", self.clean_samples.label)
        self._check_classes("clean_samples", self.clean_samples.prediction)
        self._check_classes("worst_case", self.worst_case.prediction)
        self._check_shares("curve", [point.robust_accuracy for point in self.curve])
        self._check_shares("chance", [self.chance])
        if self.explanation is not None:
            for shown in self.explanation.gallery:
                classes = [shown.label, shown.clean_prediction, shown.attacked_prediction]
                classes += [attribution.target for attribution in shown.attributions]
                classes += [point.prediction for point in shown.path]
                self._check_classes("the gallery", classes)
        if self.certificate is not None:
            self._check_certificate(self.certificate)
        return self

    def _check_certificate(self, found: Certificate) -> None:
        if len(found.certified) != self.n:
            raise ValueError(
                f"expected {self.n} entries in certified of the certificate, "
                f"got {len(found.certified)}"
            )
        shares = [found.certified_accuracy, *(point.certified_accuracy for point in found.curve)]
        self._check_shares("the certificate", shares)
        if min([found.eps, *(point.eps for point in found.curve)]) < 0:
            raise ValueError("expected eps of the certificate to be at least 0")
        share = sum(found.certified) / self.n
        if abs(found.certified_accuracy - share) > 1e-5:
            raise ValueError(
                f"expected a certified accuracy of {share:.6g}, the share of the certified "
                f"samples, got {found.certified_accuracy}"
            )
        if list(found.crossed) != sorted({*found.crossed} & {*range(self.n)}):
            raise ValueError(f"expected crossed as rising places from 0 to {self.n - 1}")
        broken = zip(found.certified, self.worst_case.broken_by, strict=True)
        both = {row for row, (held, by) in enumerate(broken) if held and by is not None}
        # A vote decides whether the smoothed classifier was broken.
        if found.method != "smoothing" and not both <= {*found.crossed}:
            raise ValueError("expected every sample that is certified and broken among crossed")

    def _check_scores(self, place: str, scores: Scores) -> None:
        size = len(self.class_names)
        if len(scores.classes) != size:
            raise ValueError(
                f"expected scores of {size} classes for {place}, got {len(scores.classes)}"
            )
        widths = [len(row) for row in scores.confusion]
        if size > MATRIX_LIMIT:
            if set(widths) - {3}:
                raise ValueError(
                    f"expected (class, prediction, samples) in the confusion of {place}"
                )
            cells = [(label, prediction) for label, prediction, _ in scores.confusion]
            if cells != sorted({*cells}):
                raise ValueError(f"expected each pair once, in order, in the confusion of {place}")
            self._check_classes(
                f"the confusion of {place}", [one for cell in cells for one in cell]
            )
        elif widths != [size] * size:
            raise ValueError(f"expected a confusion of {size} x {size} for {place}")
        if min(scores.counts().values(), default=0) < 0:
            raise ValueError(f"expected no negative count in the confusion of {place}")
        self._check_shares(place, [scores.accuracy])

    def _check_lengths(self, place: str, samples: BaseModel) -> None:
        for name, column in samples:
            if isinstance(column, tuple) and len(column) != self.n:
                raise ValueError(
                    f"expected {self.n} entries in {name} of {place}, got {len(column)}"
                )

    def _check_classes(self, place: str, classes: Sequence[int]) -> None:
        last = len(self.class_names) - 1
        for wrong in classes:
            if not 0 <= wrong <= last:
                raise ValueError(f"expected classes 0 to {last} in {place}, got {wrong}")

    @staticmethod
    def _check_shares(place: str, shares: Sequence[float]) -> None:
        for wrong in shares:
            if not 0 <= wrong <= 1:
                raise ValueError(f"expected shares from 0 to 1 in {place}, got {wrong}")

    @property
    def clean_accuracy(self) -> float:
        """Share of the samples classified correctly, unattacked."""
        return self.clean.accuracy

    @property
    def robust_accuracy(self) -> float:
        """Share of the samples that are classified correctly under every attack."""
        return self.worst_case.scores.accuracy

    @property
    def believable(self) -> bool:
        """Whether no trust check failed without a remedy.

        False also where none was made, or fewer than half could be: what nobody looked at is not
        known. A robust accuracy of 0 needs fewer, for nothing can be lower.
        """
        made = sum(one.verdict != "not run" for one in self.findings)
        enough = 2 * made >= len(self.findings) or self.robust_accuracy == 0
        return made > 0 and enough and not unresolved(self.findings)

    @property
    def propagations(self) -> int:
        """Forwards plus backwards, summed over samples: clean pass, attacks, curve, trust checks
        and corruptions."""
        return (
            self.n
            + sum(attack.forwards + attack.backwards for attack in self.attacks)
            + self.curve_propagations
            + self.trust_propagations
            + (0 if self.corruptions is None else self.corruptions.forwards)
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``results.json``, ``samples.csv`` and ``report.html`` into ``folder``, and
        ``gallery.npz`` with the exact images of the gallery, where they are at hand: ``index``,
        ``label``, ``clean``, ``attacked`` and ``nearest``, float32 of shape (n, C, H, W)."""
        root = Path(folder)
        files.write_text(root / "results.json", self.to_json())
        files.write_text(root / "samples.csv", self.samples_csv())
        if self.explanation is not None and self.explanation.tensors:
            files.write_bytes(root / "gallery.npz", self.explanation.tensors)
        self.save_report(root / "report.html")

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Write the report, one self-contained HTML file, to ``path``."""
        from robustann.reports import render

        files.write_text(path, render(self))

    def to_json(self) -> str:
        """The result as JSON text; :meth:`load` reads it again."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AuditResult:
        """Read a ``results.json``.

        Raises:
            UsageError: the file is missing, cannot be read, or is no regular one.
            DataError: it is not a result of this schema version, or its parts do not fit together.
        """
        try:
            with files.open_regular(path) as stream:
                text = stream.read(_LARGEST + 1)
        except OSError as error:
            raise UsageError(
                f"expected a results.json, could not read '{path}' ({error.strerror or error}); "
                "name the file that 'robustann audit' wrote"
            ) from error
        if len(text) > _LARGEST:
            raise DataError(
                f"expected a results.json of at most {_LARGEST} bytes, got more in '{path}'; name "
                "the file that 'robustann audit' wrote"
            )
        try:
            result = cls.model_validate_json(text)
        except ValidationError as error:
            place, reason = first_invalid(error)
            raise DataError(
                f"expected a results.json of schema version {SCHEMA_VERSION}, but in '{path}' "
                f"at {place}: {reason}; run the audit again to make a new one"
            ) from error
        if "schema_version" not in result.model_fields_set:
            raise DataError(
                f"expected a results.json of schema version {SCHEMA_VERSION}, but '{path}' has no "
                "schema_version; run the audit again to make a new one"
            )
        return result

    def samples_csv(self) -> str:
        """Outcomes as CSV: index, label, clean prediction, per attack prediction and success,
        and whether the sample is certified, if there is a certificate.

        In a cascade an attack goes to some samples only: both its cells are empty for a sample
        on which it made no forward. Without a cascade every cell is filled; a sample whose clean
        prediction is wrong keeps that prediction, with success 0.
        """
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        header = ["index", "label", "clean_prediction"]
        columns: list[Sequence[int | None]] = [
            self.clean_samples.index,
            self.clean_samples.label,
            self.clean_samples.prediction,
        ]
        for attack in self.attacks:
            header += [f"{attack.label} prediction", f"{attack.label} success"]
            ran = [bool(forwards) or not self.cascade for forwards in attack.samples.forwards]
            for column in (attack.samples.prediction, attack.samples.success):
                cells = zip(column, ran, strict=True)
                columns.append([int(value) if went else None for value, went in cells])
        if self.certificate is not None:
            header.append("certified")
            columns.append([int(held) for held in self.certificate.certified])
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))
        return buffer.getvalue()
