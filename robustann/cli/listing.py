"""``robustann list``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

import click

_KINDS = ("attacks", "defenses", "models", "datasets", "presets", "checks")


@click.command("list", short_help="List attacks, defenses, models, data sets, presets or checks.")
@click.argument("what", type=click.Choice(_KINDS))
def listing(what: str) -> None:
    """Show what there is: attacks and defenses with their options, models, datasets, presets, or
    trust checks.

    \b
    Example:
      robustann list attacks
    """
    for name, description in {
        "attacks": _attacks,
        "defenses": _defenses,
        "models": _models,
        "datasets": _datasets,
        "presets": _presets,
        "checks": _checks,
    }[what]():
        click.echo(f"{name:24} {description}".rstrip())


def _attacks() -> Iterator[tuple[str, str]]:
    from robustann.attacks import registered
    from robustann.attacks.art_adapter import ART_ATTACKS

    for name, attack in registered().items():
        paragraph = " ".join(inspect.cleandoc(attack.__doc__ or "").split("\n\n")[0].split())
        yield name, f"{paragraph} {attack.access}; {', '.join(sorted(attack.norms))}"
        for field in dataclasses.fields(attack):
            yield f"  {name}:{field.name}={field.default}", ""
    yield "art:NAME[:OPTION=VALUE]", "An attack of the Adversarial Robustness Toolbox, judged here."
    for name, facts in ART_ATTACKS.items():
        yield f"  art:{name}", f"{facts.access}; {', '.join(sorted(facts.norms))}"


def _defenses() -> Iterator[tuple[str, str]]:
    from robustann.defenses.registry import defense_options

    for name, (kind, facts, options) in defense_options().items():
        yield name, f"{kind}; helps against {'; '.join(facts)}"
        for option, default in options.items():
            yield f"  {name}:{option}={default}", ""


def _models() -> Iterator[tuple[str, str]]:
    from robustann.models import ARCHITECTURES

    yield from ARCHITECTURES.items()


def _datasets() -> Iterator[tuple[str, str]]:
    from robustann.data import DATASETS

    yield from DATASETS.items()


def _presets() -> Iterator[tuple[str, str]]:
    from robustann.auditing import PRESETS

    for name, preset in PRESETS.items():
        yield name, preset.description
        for stage in preset.stages:
            when = [f"in {' and '.join(sorted(stage.norms))} alone"] if stage.norms else []
            if stage.near is not None:
                when.append(f"with at most {stage.near:.0%} of the margin left")
            yield f"  {stage.attack.label}", ", ".join(when)


def _checks() -> Iterator[tuple[str, str]]:
    from robustann.explained import explained

    for name, section in explained().items():
        yield name, section.measures.split(". ")[0].rstrip(".")
