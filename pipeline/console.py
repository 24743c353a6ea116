"""Progress bars with the time left, drawn by rich; plain lines where the output is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft

PLAIN_EVERY_S = 20.0


class ConsoleProgress:
    """Draws one bar at a time on ``console``; `pipeline.progress.Progress` for people.

    Where the console is no terminal (a log file, CI) a line is printed at most every 20 seconds.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("  {task.description:<26}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._what, self._total, self._done = "", 0, 0
        self._begun = self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:  # else rich would print an empty line
            self._bars.stop()

    def start(self, what: str, total: int) -> None:
        """A new bar replaces the last one."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(what, total=total or None)
        self._what, self._total, self._done = what, total, 0
        self._begun = self._said = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.advance(self._task, amount)
        self._done += amount
        now = time.monotonic()
        if not self.console.is_terminal and now - self._said >= PLAIN_EVERY_S:
            self._said = now
            left = (self._total - self._done) * (now - self._begun) / max(self._done, 1)
            self.console.print(f"  {self._what}: {self._done}/{self._total}, about {left:.0f} s left")

    def say(self, text: str) -> None:
        """One line above the bar."""
        # No line breaks of our own: what is said may hold a command to copy.
        self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)
