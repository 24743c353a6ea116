"""How stages tell what they are doing; the front door draws it."""

from __future__ import annotations

import sys
import time
from typing import Protocol


class Progress(Protocol):
    """Receives progress of one stage. ``total`` may be 0 where it is not known yet."""

    def start(self, what: str, total: int) -> None:
        """A new bar: ``what`` in a few words, ``total`` in the unit that `advance` counts."""

    def advance(self, amount: int = 1) -> None:
        """``amount`` more units are done."""

    def say(self, text: str) -> None:
        """One line worth reading, printed above the bars."""


class Silent:
    """Progress for tests and programs: keeps the lines that were said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, what: str, total: int) -> None:
        """Draws nothing."""

    def advance(self, amount: int = 1) -> None:
        """Draws nothing."""

    def say(self, text: str) -> None:
        """Keeps the line."""
        self.lines.append(text)


class Lines:
    """Progress for benchmarks: lines on standard error with the seconds since the start; single units are not told."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def start(self, what: str, total: int) -> None:
        """A step begins."""
        self.say(f"{what} ({total})" if total else what)

    def advance(self, amount: int = 1) -> None:
        """Draws nothing."""

    def say(self, text: str) -> None:
        """One line."""
        sys.stderr.write(f"[{time.monotonic() - self._began:6.0f} s] {text}\n")
        sys.stderr.flush()
