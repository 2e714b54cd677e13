"""Gates against an earlier audit: how far may a metric have fallen?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robustann.auditing.gates import counted, outcomes
from robustann.data import Split
from robustann.errors import UsageError
from robustann.hardening.comparing import paired
from robustann.metrics import wilson_interval
from robustann.results import AuditResult, Gate
from robustann.rounding import six_digits
from robustann.threat import ThreatModel


@dataclass(frozen=True)
class Baseline:
    """An earlier audit and the file that it was read from."""

    path: Path
    result: AuditResult


def read_baselines(path: Path) -> tuple[Baseline, ...]:
    """The earlier audits at ``path``: one results.json, or all of a folder.

    A folder, or the summary.json in it, stands for its own results.json and those one folder down.

    Raises:
        UsageError: there are none.
        DataError: one is damaged.

    >>> read_baselines(Path("nowhere.json"))
    Traceback (most recent call last):
    robustann.errors.UsageError: expected a results.json, could not read 'nowhere.json' ...
    """
    folder = path.parent if path.name == "summary.json" else path
    if not folder.is_dir():
        return (Baseline(path, AuditResult.load(path)),)
    files = [folder / "results.json", *sorted(folder.glob("*/results.json"))]
    found = tuple(Baseline(file, AuditResult.load(file)) for file in files if file.is_file())
    if not found:
        raise UsageError(f"expected results of an earlier audit in '{folder}', got no "
                         "results.json; name the file that 'robustann audit' wrote")  # fmt: skip
    return found


def matching(baselines: Sequence[Baseline], threat: ThreatModel) -> Baseline:
    """The baseline in the same threat model.

    Raises:
        UsageError: there is none; says which there are.
    """
    wanted = (threat.norm, six_digits(threat.eps), tuple(map(six_digits, threat.bounds)))
    for one in baselines:
        came = one.result.threat
        if (came.norm, came.eps, tuple(map(six_digits, came.bounds))) == wanted:
            return one
    there = ", ".join(
        f"{one.result.threat.norm} {one.result.threat.eps_text} in '{one.path}'"
        for one in baselines
    )
    raise UsageError(
        f"expected a baseline in the threat model {threat.norm} {threat.eps_text}, got {there}; "
        "name the results of an earlier audit in the same one"
    )


def check_same_data(baseline: Baseline, split: Split, class_names: Sequence[str]) -> None:
    """Refuse a baseline on other images or labels, before any work.

    The earlier audit may have taken other samples of the same data; they are looked up in it.

    Raises:
        UsageError: it was of other data.
    """
    result = baseline.result
    index = list(result.clean_samples.index)
    same = (
        result.class_names == tuple(class_names)
        and max(index) < len(split)
        and min(index) >= 0
        and split.digest(index) == result.provenance.data_sha256
    )
    if not same:
        raise UsageError(
            f"expected a baseline on the same data, got '{baseline.path}', which was made with "
            f"other images, labels or classes ({result.provenance.data}); audit the earlier model "
            "again on these data"
        )


def with_drops(
    result: AuditResult,
    baseline: Baseline,
    allowed: Mapping[str, float],
    on: Literal["lower", "point"] = "lower",
) -> AuditResult:
    """The result with a gate more for each metric that may fall by so many percentage points.

    On the same samples the change is compared sample by sample (Agresti and Min, 2005), else as
    that of two independent shares (Newcombe, Statistics in Medicine 1998, method 10). ``on``
    ``lower`` asks that even the lower end of the change's 95 % interval is no deeper a fall. For
    the worst class it is the class that fell most.

    Raises:
        UsageError: one of both was not certified, and the metric asks it.
    """
    same = result.clean_samples.index == baseline.result.clean_samples.index
    gates = list(result.gates)
    for metric, points in allowed.items():
        try:
            before = outcomes(baseline.result, metric)
        except UsageError as error:
            raise UsageError(f"the baseline '{baseline.path}' does not fit: {error}") from error
        after = outcomes(result, metric)
        changes = {
            name: _change(before[name], after[name], same, on) for name in after if name in before
        }
        worst = min(changes, key=lambda name: changes[name])
        how = f"paired on {counted(len(after[worst]))}"
        if not same:
            how = f"{len(after[worst])} samples against {len(before[worst])}, not the same ones"
        of = f"class '{worst}', " if worst else ""
        # Rounded as results are written, so that 2 points of 100 are not missed by a hair.
        value = round(changes[worst], 9)
        gates.append(
            Gate(
                metric=f"change_of_{metric}",
                on=on,
                threshold=-points / 100,
                value=value,
                passed=value >= -points / 100,
                detail=f"{of}against '{baseline.path}', {how}",
            )
        )
    return result.model_copy(update={"gates": tuple(gates)})


def _change(
    before: Sequence[bool], after: Sequence[bool], same: bool, on: Literal["lower", "point"]
) -> float:
    if same:
        found = paired(before, after)
        return found.interval.low if on == "lower" else found.difference
    old, new = sum(before) / len(before), sum(after) / len(after)
    if on == "point":
        return new - old
    low, _ = wilson_interval(sum(after), len(after))
    _, high = wilson_interval(sum(before), len(before))
    return new - old - math.hypot(new - low, high - old)
