"""Progress of long work, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, str], None]


@contextmanager
def progress_bar(total: int, *, wanted: bool, unit: str) -> Iterator[Advance]:
    """Yield ``advance(count, what)``, which moves a bar of ``total`` units with the time left.

    Nothing is shown where it is not ``wanted`` or stderr is no terminal.

    >>> with progress_bar(2, wanted=False, unit="images") as advance:
    ...     advance(1, "first")
    """
    if wanted:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if console.is_terminal:
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,} " + unit + ", left"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            ) as bar:
                task = bar.add_task("", total=total)
                yield lambda count, what: bar.update(task, advance=count, description=what)
                return
    yield lambda count, what: None
