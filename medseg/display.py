"""What the person at the terminal sees: a progress bar with remaining time, or plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_SECONDS = 15.0


def clock(seconds: float) -> str:
    """Return "1:02:03", "2:03" for seconds."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """Progress of one command; use as a context.

    Parameters
    ----------
    console : where to write; None writes nothing.
    """

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self._bars = (
            Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            if console is not None and console.is_terminal
            else None
        )
        self._task: TaskID | None = None
        self._line = 0.0
        self._name = ""

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Write one lasting line."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stage(self, name: str) -> None:
        """Begin a new bar called `name`."""
        self._line = time.monotonic()
        if self._bars:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(name, total=1.0, note="")
        self._name = name

    def show(self, share: float, note: str = "") -> None:
        """Set the current bar to `share` (0 to 1); without a terminal, write a line now and then."""
        if self._bars and self._task is not None:
            self._bars.update(self._task, completed=share, note=note)
        elif time.monotonic() - self._line > LINE_SECONDS:
            self._line = time.monotonic()
            self.say(f"{self._name}: {100 * share:.0f} % {note}")

    def counted(self, done: int, total: int) -> None:
        """Set the current bar to `done` of `total`."""
        self.show(done / max(1, total), f"{done}/{total}")
