"""Pictures on a terminal: what is written, and what the terminal shows then."""

import contextlib
import io
import os
import random
import sys

import pytest
from emulator import Emulator

from gotunnel_agent import home
from gotunnel_agent.quick import terminal as terminal_module
from gotunnel_agent.quick.terminal import Terminal, can_write, is_terminal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")


class Raw(io.RawIOBase):
    """Takes a few bytes at a time, as a slow terminal does."""

    def __init__(self, emulator):
        self.emulator = emulator
        self.written = 0

    def writable(self):
        return True

    def fileno(self):
        return 99  # no terminal: it has no size, and no foreground

    def write(self, data):
        data = bytes(data)[:7]
        self.emulator.feed(data)
        self.written += len(data)
        return len(data)


@pytest.fixture
def emulator():
    return Emulator(40, 12)


@pytest.fixture
def raw(emulator):
    return Raw(emulator)


@pytest.fixture
def terminal(raw):
    terminal = Terminal(io.TextIOWrapper(io.BufferedWriter(raw), "utf-8"))
    terminal._size = size(40, 12)
    return terminal


def size(columns, rows):
    return os.terminal_size((columns, rows))


def is_drawn(emulator, lines):
    """Whether the lines are the last that are shown, with the cursor below them."""
    assert emulator.wraps
    assert (emulator.row, emulator.column) == (len(emulator.lines) - 1, 0)
    shown = [line.rstrip() for line in emulator.lines[:-1]]
    return shown[len(shown) - len(lines) :] == lines and emulator.lines[-1].strip() == ""


def test_each_picture_takes_the_place_of_the_one_before(terminal, emulator):
    dice = random.Random(3)
    words = ["", "one", "two three", "日本", "é" * 9]
    emulator.feed(b"$ gotunnel http 8080\r\n")
    for _ in range(300):
        lines = [dice.choice(words) for _ in range(dice.randrange(1, 11))]
        terminal.draw(lines, size(40, 12))
        assert is_drawn(emulator, lines)
        assert emulator.lines.count("$ gotunnel http 8080") == 1


def test_only_what_differs_is_written(terminal, raw, emulator):
    lines = [f"line {number}" for number in range(9)]
    terminal.draw(lines, size(40, 12))
    before = raw.written
    terminal.draw(lines, size(40, 12))
    assert raw.written == before
    lines[4] = "other"
    terminal.draw(lines, size(40, 12))
    assert raw.written - before < 50 and is_drawn(emulator, lines)


def test_text_that_is_wider_than_was_thought_is_cut(terminal, emulator):
    lines = ["x" * 60, "next"]
    terminal.draw(lines, size(40, 12))
    terminal.draw(["y" * 60, "next"], size(40, 12))
    assert [line.rstrip() for line in emulator.lines] == ["y" * 40, "next", ""]


def test_another_size_begins_with_an_empty_screen(terminal, emulator):
    terminal.draw(["one", "two"], size(40, 12))
    emulator.columns = 20
    terminal.draw(["one"], size(20, 12))
    assert emulator.shown() == ["one"]


def test_what_another_program_has_written_stays(terminal, emulator):
    terminal.draw(["one", "two"], size(40, 12))
    emulator.feed(b"^Z\r\n[1]+  Stopped\r\n$ fg\r\n")
    terminal.disturbed = True
    terminal.draw(["one", "three"], size(40, 12))
    assert emulator.shown() == ["one", "two", "^Z", "[1]+  Stopped", "$ fg", "one", "three"]


@pytest.mark.parametrize("rows_before", [0, 10])
def test_lines_that_were_typed_do_not_shift_the_picture(
    terminal, emulator, monkeypatch, rows_before
):
    typed, fill = os.pipe()
    monkeypatch.setattr(terminal_module, "STDIN", typed)
    emulator.feed(b"\r\n" * rows_before)
    terminal.draw(["one", "two"], size(40, 12))
    for line in (b"abc\r\n", b"\r\n\r\n", b"x" * 50 + b"\r\n"):
        emulator.feed(line)  # the terminal's echo
        os.write(fill, line.replace(b"\r\n", b"\n"))
        terminal.read_typed()
        terminal.draw(["one", "two"], size(40, 12))
        assert emulator.shown()[-2:] == ["one", "two"] and emulator.shown().count("one") == 1
        assert is_drawn(emulator, ["one", "two"])
    os.close(fill)
    terminal.read_typed()  # no input any more
    os.close(typed)
    terminal.read_typed()


def test_characters_that_the_encoding_lacks_are_replaced(raw, emulator):
    terminal = Terminal(io.TextIOWrapper(io.BufferedWriter(raw), "ascii"))
    terminal.draw(["a→b"], size(80, 24))
    assert emulator.shown() == ["a?b"]


def test_what_an_encoding_can_write():
    for encoding, expected in (("utf-8", True), ("ascii", False), ("cp437", False)):
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        assert can_write(out, "→●") == expected


@pytest.mark.parametrize("variables, expected", [({}, True), ({"NO_COLOR": ""}, True),
                         ({"NO_COLOR": "1"}, False)])  # fmt: skip
def test_no_color(variables, expected):
    assert home.terminal(variables).colours == expected


@pytest.fixture
def pseudo_terminal():
    ours, theirs = os.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        yield stack.enter_context(open(theirs, "w", encoding="utf-8"))


@pytest.mark.parametrize(
    "term, expected", [("xterm-256color", True), ("linux", True), ("dumb", False), ("", False)]
)
def test_a_terminal_that_can_be_drawn_on(monkeypatch, pseudo_terminal, term, expected):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdin", pseudo_terminal)
    assert is_terminal(pseudo_terminal) == expected


def test_what_is_no_terminal(monkeypatch, pseudo_terminal, tmp_path):
    monkeypatch.setenv("TERM", "xterm")
    with open(tmp_path / "file", "w") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert not is_terminal(pseudo_terminal)  # nohup, cron
        monkeypatch.setattr(sys, "stdin", pseudo_terminal)
        assert not is_terminal(file)
    assert not is_terminal(file) and not is_terminal(None)
    monkeypatch.setattr(sys, "stdin", None)
    assert not is_terminal(pseudo_terminal)


def test_a_job_in_the_background_does_not_have_the_terminal(pseudo_terminal, monkeypatch):
    terminal = Terminal(pseudo_terminal)
    assert terminal.size() == (80, 24)
    assert terminal.in_foreground()  # it controls no job: it is not the test's own terminal
    monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp())
    assert terminal.in_foreground()
    monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp() + 1)
    assert not terminal.in_foreground()
