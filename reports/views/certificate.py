"""What is proven, beside what is broken."""

from __future__ import annotations

from robustann.results import AuditResult, CertifiedPoint


def proven(result: AuditResult) -> list[CertifiedPoint]:
    """Certified accuracy over rising eps; empty where the audit has no certificate.

    >>> [(point.eps, point.certified_accuracy) for point in proven(result)][:3]
    [(0.0, 1.0), (0.05, 1.0), (0.1, 0.75)]
    """
    found = result.certificate
    return sorted(found.curve, key=lambda point: point.eps) if found else []


# How a certificate was made.
METHODS = {
    "crown": "linear bounds through every layer (CROWN)",
    "ibp": "intervals through every layer (IBP)",
    "smoothing": "randomised smoothing",
}


def undecided(result: AuditResult) -> int:
    """How many samples the model gets right that were neither certified nor broken.

    >>> undecided(result)  # two certified, two broken
    0
    """
    held = result.certificate.certified if result.certificate else (False,) * result.n
    clean, broken_by = result.clean_samples, result.worst_case.broken_by
    rows = zip(clean.label, clean.prediction, broken_by, held, strict=True)
    return sum(y == seen and by is None and not proof for y, seen, by, proof in rows)


def crossed(result: AuditResult, limit: int = 20) -> str:
    """Positions in the test part of samples that are certified and broken.

    >>> crossed(result)
    ''
    """
    if result.certificate is None:
        return ""
    rows = result.certificate.crossed
    more = ", ..." if len(rows) > limit else ""
    return ", ".join(str(result.clean_samples.index[row]) for row in rows[:limit]) + more
