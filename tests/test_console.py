"""Progress as people see it: a bar in a terminal, few plain lines in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline import console as module
from pipeline.console import PLAIN_EVERY_S, ConsoleProgress


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def lines_of(text: str) -> list[str]:
    return text.split("\n")[:-1]


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), io.StringIO()
    with ConsoleProgress(Console(file=log, width=80)) as progress:
        progress.start("embedding passages", 200)
        for _ in range(100):
            clock.now += 1.0
            progress.advance()
    assert [line.strip() for line in lines_of(log.getvalue())] == [
        f"embedding passages: {done}/200, about {200 - done} s left" for done in range(20, 101, 20)
    ]


def test_a_new_bar_begins_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), io.StringIO()
    with ConsoleProgress(Console(file=log, width=80)) as progress:
        progress.advance()  # before any bar: nothing to move
        progress.start("first", 10)
        progress.advance(9)
        progress.start("second", 4)
        clock.now += PLAIN_EVERY_S
        progress.advance(2)
        progress.start("of unknown length", 0)
        progress.advance(3)
    assert lines_of(log.getvalue()) == ["  second: 2/4, about 20 s left"]


def test_what_is_said_is_one_line_as_it_is() -> None:
    log = io.StringIO()
    said = (
        "skipped [b]x[/].txt: re-encode it: " + "iconv -f latin1 -t utf-8 x.txt > new && mv new x.txt; " * 3
    )
    with ConsoleProgress(Console(file=log, width=40)) as progress:
        progress.start("reading", 3)
        progress.say(said)
    assert log.getvalue() == f"  {said}\n"


def test_silence_prints_nothing() -> None:
    log = io.StringIO()
    with ConsoleProgress(Console(file=log, width=80)):
        pass
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar_which_goes_away_also_after_an_error() -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, width=100, force_terminal=True, legacy_windows=False)

    def stopped() -> None:
        with ConsoleProgress(terminal) as progress:
            progress.start("training", 7)
            progress.advance(3)
            progress.say("loss 1.25")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    shown = screen.getvalue()
    assert "training" in shown
    assert "3/7" in shown
    assert "loss 1.25" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back
