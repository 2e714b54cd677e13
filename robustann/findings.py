"""What the trust checks of an evaluation say: is it to be believed?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from robustann.rounding import MaybeNumber

FindingVerdict = Literal["pass", "fail", "not run"]


class Finding(BaseModel):
    """The outcome of one trust check.

    Attributes:
        check: name of the check, also the anchor of its documentation.
        verdict: ``fail`` says that the evaluation may be wrong for this reason.
        value: what was measured, to six digits; None where the check has no number.
        threshold: the value beyond which the check fails.
        explanation: what was seen, what it means and what to do.
        remedy: what the audit itself did about a failure, None if nothing.

    >>> Finding(check="saturated-loss", verdict="pass", value=1 / 3, threshold=40.0,
    ...         explanation="Fine.").value
    0.333333
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    verdict: FindingVerdict
    value: MaybeNumber = None
    threshold: MaybeNumber = None
    explanation: str
    remedy: str | None = None

    def remedied(self, remedy: str) -> Finding:
        """The same finding, with what the audit did about it.

        >>> failed = Finding(check="randomised", verdict="fail", explanation="It is.")
        >>> failed.remedied("averaged gradients over 20 draws").remedy
        'averaged gradients over 20 draws'
        """
        return self.model_copy(update={"remedy": remedy})


def unresolved(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The failed checks that nothing was done about: while there are any, do not believe.

    >>> failed = Finding(check="randomised", verdict="fail", explanation="It is.")
    >>> len(unresolved([failed, failed.remedied("EOT")]))
    1
    """
    return tuple(one for one in findings if one.verdict == "fail" and one.remedy is None)
