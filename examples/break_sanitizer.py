"""What sanitizers are worth against attackers who know of them.

    python examples/break_sanitizer.py --sanitizer jpeg:quality=50 --sanitizer bit-depth:bits=3

Each is attacked in five ways. The first, an attacker who does not know of it, is how such defenses
are often measured; the minimum over all five is what counts.
"""

from __future__ import annotations

import click

import robustann as ra
from robustann.defenses import parse_sanitizer
from robustann.hardening import measure_sanitizer


@click.command()
@click.option(
    "--sanitizer",
    "sanitizers",
    multiple=True,
    default=["bit-depth:bits=3", "median", "jpeg:quality=50"],
    show_default=True,
)
@click.option("--eps", default=0.1, show_default=True)
@click.option("--samples", default=60, show_default=True)
@click.option("--epochs", default=10, show_default=True)
@click.option("--queries", default=300, show_default=True, help="Of the search, an image.")
def main(
    sanitizers: tuple[str, ...], eps: float, samples: int, epochs: int, queries: int
) -> None:  # fmt: skip
    """Train a model on the digits, and attack it behind each sanitizer."""
    data = ra.load_data("digits")
    model = ra.train("small-cnn", data, epochs=epochs).model
    threat = ra.ThreatModel("linf", eps)
    for text in sanitizers:
        found = measure_sanitizer(
            model, parse_sanitizer(text), data, threat, max_samples=samples, queries=queries
        )
        print(
            f"{text}: clean {found.clean_accuracy:.1%}; "
            f"without it {found.bare_robust_accuracy:.1%} robust"
        )
        for way in found.ways:
            print(f"  {way.name:10} {way.robust_accuracy:6.1%}  {way.words}")
        print(f"  minimum    {found.robust_accuracy:6.1%}")


if __name__ == "__main__":
    main()
