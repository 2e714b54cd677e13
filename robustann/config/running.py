"""Audits in several threat models, one after the other, into one verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from robustann import files
from robustann.attacks.engine import model_device
from robustann.auditing import Audit, Estimate, forget, with_gates
from robustann.certificates import Smoothed
from robustann.config.drops import (
    Baseline,
    check_same_data,
    matching,
    read_baselines,
    with_drops,
)
from robustann.config.reading import Job, Settings
from robustann.data import ImageData
from robustann.defenses.sanitizers import Sanitized, parse_sanitizer
from robustann.defenses.seal import Manifest, manifest_path, verify_model
from robustann.errors import RobustannError, UsageError
from robustann.hardening.sanitized import LEAST_DRAWS
from robustann.models import load_model
from robustann.models.foreign.programs import PROGRAMS
from robustann.outputs import (
    Audited,
    Verdict,
    conclude,
    junit,
    model_card,
    sarif,
    summary_json,
    summary_page,
)
from robustann.results import AuditResult, Seal

# Of a broken seal, so many changes are told.
_CHANGES = 20
_RESULTS = ("results.json", "samples.csv", "report.html")


@dataclass(frozen=True)
class Run:
    """What shall be run, and where its results go; :func:`prepare` makes it.

    >>> from robustann.config.reading import resolve
    >>> settings = resolve(None, {"model": {"path": "m.safetensors"}})
    >>> [path.name for path in prepare(settings, Path("runs/m")).targets]
    ['results.json', 'samples.csv', 'report.html', 'summary.json']
    """

    settings: Settings
    folder: Path
    jobs: tuple[Job, ...]
    baselines: Mapping[str, Baseline]

    def place(self, job: Job) -> Path:
        """The folder of one threat model's results; that of the run if there is but one."""
        return self.folder if len(self.jobs) == 1 else self.folder / job.slug

    @property
    def targets(self) -> tuple[Path, ...]:
        """Every file that will be written."""
        files_of_jobs = [self.place(job) / name for job in self.jobs for name in _RESULTS]
        return (*files_of_jobs, self.folder / "summary.json", *self._wanted)

    @property
    def _wanted(self) -> dict[Path, Callable[[Verdict], str]]:
        output = self.settings.values.output
        makers = {
            output.junit: junit,
            output.sarif: sarif,
            output.markdown: summary_page,
            output.model_card: model_card,
        }
        return {Path(name): make for name, make in makers.items() if name is not None}

    def estimates(self, model: nn.Module, data: ImageData) -> list[tuple[str, Estimate]]:
        """What each threat model will cost at most."""
        audited, _ = self._model(model, "")
        surrogate = self._surrogate(model)
        return [
            (_words(job), Audit(job.config).estimate(
                audited, data.test, class_names=data.class_names, surrogate=surrogate))
            for job in self.jobs
        ]  # fmt: skip

    def forget(self) -> None:
        """Remove what a stopped run left to go on from."""
        for job in self.jobs:
            forget(self.place(job) / "unfinished")

    def run(
        self,
        model: nn.Module,
        data: ImageData,
        *,
        model_name: str,
        progress: bool = False,
        command: str = "",
        notify: Callable[[str], None] = lambda message: None,
        shared: bool = False,
    ) -> Verdict:
        """Audit in every threat model; write results and verdict.

        A stopped run goes on where it was. Where one of several threat models fails with an error,
        the others are audited all the same, and the verdict is ``not finished``.

        Args:
            model: maps images in [0, 1] to logits.
            data: its test part is audited.
            model_name: shown in the reports, as is ``command``.
            progress: show bars on stderr if that is a terminal.
            notify: told in words what begins.
            shared: whether other processes that run the same take part; each returns the verdict.

        Raises:
            UsageError: the baseline is of other data.
            RobustannError: no threat model could be audited.
        """
        from robustann.reports.explain import explain

        for baseline in self.baselines.values():
            check_same_data(baseline, data.test, data.class_names)
        audited, name = self._model(model, model_name)
        told = self.settings.provenance
        if (program := _program(model)) is not None:
            told = {**told, "code": [*told.get("code", ()), f"{program} in {model_name}"]}
        surrogate = self._surrogate(model)
        found: list[Audited] = []
        errors: list[RobustannError] = []
        several = len(self.jobs) > 1
        for number, job in enumerate(self.jobs, 1):
            prefix = f"{_words(job)}: " if several else ""
            if several:
                notify(f"{_words(job)} ({number} of {len(self.jobs)})")
            place = self.place(job)

            def save(result: AuditResult, job: Job = job, place: Path = place) -> AuditResult:
                result = self._decided(job, result, notify, told)
                result.save(place)
                return result

            try:
                result = Audit(job.config).run(
                    audited,
                    data.test,
                    class_names=data.class_names,
                    model_name=name,
                    data_name=data.name,
                    explainer=partial(explain, more=job.config.attributions),
                    progress=progress,
                    command=command,
                    state=place / "unfinished",
                    draws=self._draws,
                    surrogate=surrogate,
                    notify=lambda message, prefix=prefix: notify(f"{prefix}{message}"),  # type: ignore[misc]
                    shared=shared,
                    save=save,
                )
            except RobustannError as error:
                errors.append(error)
                found.append(
                    Audited(job.slug, _words(job), place.as_posix(), None, str(error),
                            error.exit_code)
                )  # fmt: skip
                continue
            found.append(Audited(job.slug, _words(job), place.as_posix(), result))
        if len(errors) == len(self.jobs):
            self.tell_refused(errors[0], name)
            raise errors[0]
        source = self.settings.source or self.place(self.jobs[0]) / "results.json"
        verdict = conclude(
            found,
            strict=self.settings.values.gates.strict,
            source=str(source),
            model=name,
            data=data.name,
        )
        self._write(verdict)
        # What a shared run came to stays, for processes that are still to come.
        if not errors and not shared:
            # Only now: a run that stopped in the second threat model has the first one still.
            self.forget()
        return verdict

    def tell_refused(self, error: RobustannError, model: str, source: str | None = None) -> None:
        """Write what CI reads, where no audit came to an end: why, in each threat model.

        Args:
            error: what ended it.
            model: what was to be audited, in words.
            source: the file that the error is about; by default the configuration.
        """
        asked = self.settings.values
        unfinished = [
            Audited(job.slug, _words(job), self.place(job).as_posix(), None, str(error),
                    error.exit_code)
            for job in self.jobs
        ]  # fmt: skip
        if source is None:
            source = str(self.settings.source or asked.model.path or "audit")
        self._write(conclude(unfinished, strict=asked.gates.strict, source=source, model=model,
                             data=asked.data.name))  # fmt: skip

    def _write(self, verdict: Verdict) -> None:
        files.write_text(self.folder / "summary.json", summary_json(verdict))
        for path, make in self._wanted.items():
            files.write_text(path, make(verdict))

    def _model(self, model: nn.Module, name: str) -> tuple[nn.Module, str]:
        sanitize = self.settings.values.model.sanitize or ()
        if sanitize:
            # The attacker knows the sanitizers: gradients through them, or through stand-ins.
            parts = map(parse_sanitizer, sanitize)
            model = Sanitized(model, *parts).seen_through("surrogate").eval()
            name = f"{name} behind {', '.join(sanitize)}"
        sigma = self.settings.values.model.smoothing
        if sigma is None:
            return model, name
        return Smoothed(model, sigma), f"{name}, smoothed with sigma {sigma:g}"

    def _surrogate(self, model: nn.Module) -> nn.Module | None:
        path = self.settings.values.attacks.surrogate
        return None if path is None else load_model(path, device=model_device(model))

    @property
    def _draws(self) -> int:
        """Forwards to average: sanitizers that draw are known to, whether or not checks look."""
        parts = [parse_sanitizer(one) for one in self.settings.values.model.sanitize or ()]
        return 1 if all(part.deterministic for part in parts) else LEAST_DRAWS

    def _decided(
        self,
        job: Job,
        result: AuditResult,
        notify: Callable[[str], None],
        told: Mapping[str, str | list[str]],
    ) -> AuditResult:
        """The result with its gates, and with where its configuration came from."""
        on = self.settings.values.gates.gate_on
        result = with_gates(result, job.demands, on)
        baseline = self.baselines.get(job.slug)
        if baseline is not None:
            before, after = baseline.result.provenance, result.provenance
            if before.preset != after.preset:
                notify(
                    f"the baseline was audited with the preset {before.preset}, this is "
                    f"{after.preset}: a fall may come of other attacks"
                )
            result = with_drops(result, baseline, job.drops, on)
        provenance = result.provenance.model_copy(
            update={"config": {**result.provenance.config, **told}}
        )
        seal = _sealed(self.settings.values.model.path)
        if seal is not None and not seal.intact:
            notify("the model file is not what was sealed; the report says what differs")
        return result.model_copy(update={"provenance": provenance, "seal": seal})


def _sealed(path: str | None) -> Seal | None:
    """Whether a model file is what was sealed; None where there is no manifest beside it."""
    if path is None or not manifest_path(path).is_file():
        return None
    try:
        manifest = Manifest.load(manifest_path(path))
        found = verify_model(path, manifest)
    except RobustannError as error:
        return Seal(intact=False, changes=(str(error),))
    return Seal(
        intact=found.intact,
        changes=found.changes[:_CHANGES],
        signed=manifest.signature is not None,
    )


def prepare(settings: Settings, folder: Path) -> Run:
    """Read the baselines, and refuse what cannot be run, before any work.

    Raises:
        UsageError: a baseline is missing or of another threat model, or two files have one name.

    >>> from robustann.config.reading import resolve
    >>> threats = {"linf": ["8/255"], "l2": ["0.5"]}
    >>> run = prepare(
    ...     resolve(None, {"model": {"path": "m.safetensors"}, "threats": threats}), Path("runs/m")
    ... )
    >>> [run.place(job).as_posix() for job in run.jobs]
    ['runs/m/linf-8-255', 'runs/m/l2-0.5']
    """
    run = Run(settings, folder, settings.jobs, _baselines(settings))
    output = settings.values.output
    named = [name for name in (output.junit, output.sarif, output.markdown, output.model_card)
             if name is not None]  # fmt: skip
    places = [Path(name).absolute() for name in named]
    taken = {path.absolute() for path in run.targets[: len(run.targets) - len(run._wanted)]}
    for place, name in zip(places, named, strict=True):
        if places.count(place) > 1 or place in taken:
            raise UsageError(f"expected each output in a file of its own, got '{name}' twice; "
                             "rename one")  # fmt: skip
    return run


def _baselines(settings: Settings) -> dict[str, Baseline]:
    asked = settings.values.gates.baseline
    if asked is None:
        return {}
    known = read_baselines(Path(asked))
    found = {}
    for job in settings.jobs:
        if not job.drops:
            continue
        baseline = matching(known, job.config.threat)
        if "certified_accuracy" in job.drops and baseline.result.certificate is None:
            raise UsageError(
                f"expected a baseline with a certificate for the drop of certified_accuracy, got "
                f"'{baseline.path}'; audit the earlier model again with --certify"
            )
        found[job.slug] = baseline
    return found


def _program(model: nn.Module) -> str | None:
    """What the model's file is, if it is a program, which was opened because it was allowed."""
    arch = getattr(getattr(model, "spec", None), "arch", None)
    return arch if arch in PROGRAMS else None


def _words(job: Job) -> str:
    threat = job.config.threat
    return f"{threat.norm} {threat.eps_text}"
