"""What the terminal shows, and what a log holds."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from medseg import display as module
from medseg.display import Display, clock


def log() -> Console:
    return Console(file=io.StringIO(), width=40, force_terminal=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0:00"), (-3, "0:00"), (59.6, "1:00"), (123, "2:03"), (3723, "1:02:03")]
)
def test_clock(seconds: float, expected: str) -> None:
    assert clock(seconds) == expected


def test_lines_are_written_as_they_are() -> None:
    """No wrapping at the width of a log, no markup: a path with [brackets] stays what it is."""
    console = log()
    line = "/a/very/long/path/" + "x" * 60 + "/[bold]1/[/red] 12"
    Display(console).say(line)
    assert text_of(console) == line + "\n"


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = log()
    with Display(console) as display:
        display.stage("reading")
        for second in range(40):
            now[0] = float(second)
            display.show(second / 40, f"{second}/40")
    assert text_of(console).splitlines() == ["reading: 40 % 16/40", "reading: 80 % 32/40"]


def test_counting_nothing_is_fine() -> None:
    display = Display(log())
    display.counted(0, 0)
    display.show(0.5)


def test_without_a_console_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(None) as display:
        display.stage("x")
        display.say("y")
        display.counted(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_names_that_look_like_markup() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Display(console) as display:
        display.stage("case [/a] [b")
        display.show(0.25, "note [/x]")
        display.stage("second")
        display.counted(2, 2)
        display.say("done [1]")
    assert "done [1]" in text_of(console)
