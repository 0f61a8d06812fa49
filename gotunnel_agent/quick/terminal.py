"""The terminal that the status screen is drawn on.

The picture is drawn below what the terminal already shows, and drawn anew in its place. The cursor
rests on the line below the picture, is never hidden, and the terminal's settings stay as they are:
so there is nothing to restore, however the process ends or is stopped.

Without raw mode the terminal itself echoes what is typed, and a line that is typed moves the cursor
down. So typed lines are read, and counted.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from typing import TextIO

from .. import home
from ..common.cells import safe, width

if sys.platform == "win32":
    import ctypes
    import msvcrt

UP, DOWN, ERASE_LINE, ERASE_BELOW = "\x1b[{}A", "\x1b[{}B", "\x1b[K", "\x1b[J"  # ECMA-48
CLEAR = "\x1b[H\x1b[2J"
# Lines of the wrong length, of characters that a terminal takes for wider than we do, must be cut
# and not wrapped (DECAWM). On again at the end of each write.
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"
DEFAULT_SIZE = os.terminal_size((80, 24))
LONGEST_LINE = 4096  # bytes read of what is typed
STDIN = 0  # file descriptor
ENABLE_VIRTUAL_TERMINAL = 4  # of a console mode of Windows


def is_terminal(out: TextIO | None) -> bool:
    """Whether a picture can be drawn on ``out``: it and standard input are a terminal that knows
    escape sequences."""
    try:
        if out is None or sys.stdin is None or not (out.isatty() and sys.stdin.isatty()):
            return False
    except ValueError:  # closed
        return False
    return _knows_sequences(out)


if sys.platform == "win32":

    def _knows_sequences(out: TextIO) -> bool:
        """A console acts on escape sequences once it was told to."""
        try:
            handle, mode = msvcrt.get_osfhandle(out.fileno()), ctypes.c_uint()
            kernel = ctypes.windll.kernel32
            return bool(
                kernel.GetConsoleMode(handle, ctypes.byref(mode))
                and kernel.SetConsoleMode(handle, mode.value | ENABLE_VIRTUAL_TERMINAL)
            )
        except OSError:
            return False

else:

    def _knows_sequences(out: TextIO) -> bool:
        return home.terminal().kind not in ("", "dumb")


def can_write(out: TextIO, text: str) -> bool:
    """Whether the encoding of ``out`` has these characters."""
    try:
        text.encode(out.encoding or "ascii")
        return True
    except (UnicodeError, LookupError):
        return False


class Terminal:
    """Draws pictures on a terminal. One thread uses it, and may hang in it: a terminal that is
    stopped (Ctrl-S) takes nothing."""

    def __init__(self, out: TextIO):
        self._encoding = out.encoding or "ascii"
        # Not Python's buffer: at exit the interpreter takes its lock, which our thread would hold.
        self._raw = getattr(out.buffer, "raw", out.buffer)
        self._descriptor = out.fileno()
        self._reads = hasattr(os, "tcgetpgrp")  # what is typed, as long as there is an input
        self._shown: list[str] = []  # the lines of the picture
        self._below = 0  # lines by which the cursor is lower than it should be
        self._size = self.size()
        # Something else has written to the terminal: the next picture is drawn below that. Set by
        # any thread and by signal handlers, so no lock guards it.
        self.disturbed = False

    def size(self) -> os.terminal_size:
        """Its columns and rows now."""
        try:
            size = os.get_terminal_size(self._descriptor)
        except OSError:
            return DEFAULT_SIZE
        return size if size.columns and size.lines else DEFAULT_SIZE  # a serial line says 0

    def in_foreground(self) -> bool:
        """Whether the terminal is ours. A job in the background must not draw over another one."""
        if not hasattr(os, "tcgetpgrp"):
            return True
        try:
            return os.tcgetpgrp(self._descriptor) == os.getpgrp()
        except OSError:  # not our controlling terminal, so there is no job control (su -c)
            return True

    def read_typed(self) -> None:
        """Take what was typed, and note how far that has moved the cursor. In the foreground only:
        in the background, reading would stop the process (SIGTTIN)."""
        while self._reads:
            try:
                if not select.select([STDIN], [], [], 0)[0]:
                    return
                typed = os.read(STDIN, LONGEST_LINE)
            except (OSError, ValueError):
                typed = b""
            if not typed:  # Ctrl-D, or no input any more
                self._reads = False
            for line in typed.decode(self._encoding, "replace").splitlines():
                self._below += 1 + width(safe(line)) // max(1, self._size.columns)

    def draw(self, lines: Sequence[str], size: os.terminal_size) -> None:
        """Draw a picture in the place of the one before: only what differs. ``size`` is the one
        that it was made for. Raises OSError, ValueError."""
        if self.disturbed:
            self.disturbed = False
            self._forget()
        if size != self._size and self._shown:
            # Some terminals have wrapped the old picture anew, others have cut it.
            self._write(CLEAR)
            self._forget()
        self._size = size
        if self._below and self._shown:  # begin again at the picture's first line
            self._write(UP.format(self._below + len(self._shown)) + "\r" + ERASE_BELOW)
            self._forget()
        if text := self._changes(list(lines)):
            self._write(NO_WRAP + text + WRAP)
        self._shown = list(lines)

    def _forget(self) -> None:
        """The next picture is drawn where the cursor is."""
        self._shown, self._below = [], 0

    def _changes(self, lines: list[str]) -> str:
        """What turns the picture that is shown into this one, and puts the cursor below it."""
        shown, text = self._shown, ""
        at = len(shown)  # the line of the picture on which the cursor is
        for number, line in enumerate(lines):
            if number < len(shown) and shown[number] == line:
                continue
            if number < at:
                text += UP.format(at - number)
            elif number > at:
                text += DOWN.format(number - at)
            text += f"\r{line}{ERASE_LINE}"
            if number < len(shown):
                at = number
            else:  # a new line: the terminal may have to scroll
                text += "\n"
                at = number + 1
        if len(lines) < len(shown):
            text += UP.format(at - len(lines)) if at > len(lines) else ""
            text += DOWN.format(len(lines) - at) if at < len(lines) else ""
            return f"{text}\r{ERASE_BELOW}"
        if not text:
            return ""
        rest = len(lines) - at
        return text + (DOWN.format(rest) if rest else "") + "\r" + ERASE_LINE

    def _write(self, text: str) -> None:
        left = memoryview(text.encode(self._encoding, "replace"))
        while left:
            written = self._raw.write(left)
            if written is None:  # would block: another process made the file non-blocking
                select.select([], [self._raw], [])
            else:
                left = left[written:]
