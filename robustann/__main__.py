"""``python -m robustann`` is the command line."""

from __future__ import annotations

from robustann.cli.main import main

main()
