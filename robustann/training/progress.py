"""The progress bar of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress


class Display:
    """A bar on stderr over all steps; nothing where it is not wanted or stderr is no terminal."""

    def __init__(self, wanted: bool, epochs: int, steps: int) -> None:
        self._epochs, self._steps, self._epoch = epochs, steps, 1
        self._bar: Progress | None = None
        if not wanted:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                TextColumn("loss {task.fields[loss]}, validation {task.fields[validation]}, left"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            total = self._epochs * self._steps
            self._task = self._bar.add_task("", total=total, epoch="-", loss="-", validation="-")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, epoch: int) -> None:
        """A new epoch; the first is 1."""
        self._epoch = epoch
        self._update(epoch=f"{epoch}/{self._epochs}")

    def advance(self, step: int, loss: float) -> None:
        """So many steps of this epoch are done, the last with this loss."""
        self._update(completed=(self._epoch - 1) * self._steps + step, loss=f"{loss:.3f}")

    def validated(self, accuracy: float) -> None:
        """The epoch has ended with this validation accuracy."""
        self._update(validation=f"{accuracy:.1%}")

    def _update(self, **values: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, **values)
