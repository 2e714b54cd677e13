"""A running hardening on disk, so that a stop loses at most what was being done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from robustann import files
from robustann.auditing import forget as forget_audit
from robustann.auditing.shown import Shown
from robustann.defenses.detection import DetectionResult
from robustann.errors import RobustannError
from robustann.hardening.sanitized import SanitizedResult
from robustann.models import tensor_digest
from robustann.results import AuditResult
from robustann.training.checkpoint import load_checkpoint, save_checkpoint

_TENSORS = ("attempted", "forwards", "backwards", "found", "images")
_WORDS = ("name", "access", "paper")


class Kept:
    """The folder of one hardening; without one, nothing is kept.

    Args:
        folder: for this and other hardenings.
        identity: everything that the result depends on, as JSON values. What was left by a
            hardening of another identity lies elsewhere in ``folder``, and is not taken up.

    Raises:
        UsageError: the folder cannot be written.

    >>> Kept(None, {}).path("training.pt")
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        self._folder: Path | None = None
        if folder is not None:
            text = json.dumps(identity, sort_keys=True)
            self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
            files.check_writable_folder(self._folder)

    def path(self, name: str) -> Path | None:
        """Where something of this name is kept, if anything is."""
        return None if self._folder is None else self._folder / name

    def audit(self, stage: str, model: nn.Module) -> AuditResult | None:
        """The finished audit of a stage, if there is one of this very model; one that is damaged is
        done again."""
        path = self.path(f"{stage}.json")
        if path is None or not path.exists():
            return None
        try:
            result = AuditResult.load(path)
        except RobustannError:
            return None
        return result if result.provenance.model_sha256 == tensor_digest(model) else None

    def keep_audit(self, stage: str, result: AuditResult) -> None:
        """Keep a finished audit in the place of its batches."""
        path, batches = self.path(f"{stage}.json"), self.path(stage)
        if path is not None and batches is not None:
            files.write_text(path, result.to_json())
            forget_audit(batches)

    def measured(self, network: nn.Module) -> tuple[SanitizedResult, tuple[Shown, ...]] | None:
        """What the attackers of sanitizers in front of this network found, if they are done."""
        path = self.path("sanitizers.pt")
        if path is None or not path.exists():
            return None
        taken: list[dict[str, Any]] = []
        try:
            load_checkpoint(path, {"network": tensor_digest(network)}, taken.append)
        except RobustannError:
            # Of another network, or damaged: an hour of work at most, and none that is wrong.
            return None
        shown = tuple(Shown(**one) for one in taken[0]["shown"])
        return SanitizedResult.model_validate_json(taken[0]["measured"]), shown

    def detected(self, network: nn.Module) -> DetectionResult | None:
        """How the detector beside this network fared, if that was measured."""
        path = self.path("detector.json")
        if path is None or not path.exists():
            return None
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if told["network"] != tensor_digest(network):
                return None
            return DetectionResult.model_validate(told["found"])
        except (ValueError, KeyError, TypeError):
            # Damaged: it is measured again.
            return None

    def keep_detected(self, network: nn.Module, found: DetectionResult) -> None:
        """Keep how the detector fared."""
        path = self.path("detector.json")
        if path is not None:
            told = {"network": tensor_digest(network), "found": found.model_dump(mode="json")}
            files.write_text(path, json.dumps(told))

    def keep_measured(
        self, network: nn.Module, measured: SanitizedResult, shown: Sequence[Shown]
    ) -> None:
        """Keep what the attackers found."""
        path = self.path("sanitizers.pt")
        if path is not None:
            listed = [{key: getattr(one, key) for key in (*_WORDS, *_TENSORS)} for one in shown]
            state = {"measured": measured.model_dump_json(), "shown": listed}
            save_checkpoint(path, state, {"network": tensor_digest(network)}, [])


def forget(folder: Path) -> None:
    """Remove what hardenings left in a folder; nothing else.

    >>> forget(Path("no such folder"))
    """
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and re.fullmatch("[0-9a-f]{16}", path.name):
                shutil.rmtree(path, ignore_errors=True)
    # Somebody else's files may be in it, or it was never made.
    with contextlib.suppress(OSError):
        folder.rmdir()
