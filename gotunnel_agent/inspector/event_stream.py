"""Reads the events of a text/event-stream from its bytes, for show (HTML standard, "Server-sent
events").

Bytes come in, events go out; nothing is raised and nothing is held back. Of each event only the
beginning is kept. Line ends become LF.
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

from .kept import INFLATED_A_STEP, NO_LIMIT, TOO_MANY

CODINGS = ("gzip", "x-gzip", "deflate")  # those that are undone piece by piece
MOST_INFLATED = 1024 * 1024  # bytes that one piece of a compressed stream may give
CUT_SHORT = "cut short"
INFLATER_COST = 48 * 1024  # bytes of memory: zlib's window of 32 KiB and its tables
COMMENT = "a comment"
NOT_READ = "the rest is not read: "
_BLANK_LINES = re.compile(rb"\n+")


class Event(NamedTuple):
    """The beginning of an event's lines, without the blank line behind them, and the size of all of
    them. ``note``: see record.Message."""

    data: bytes
    size: int
    note: str = ""


class EventStream:
    """The events of one answer."""

    def __init__(self, keep: int, coding: str = ""):
        """``keep``: bytes of each event that are kept. ``coding``: the answer's Content-Encoding in
        lower case, "" for none. With one that is not in CODINGS nothing is read."""
        self._keep = keep
        coded = coding not in ("", "identity")
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32) if coded else None
        self._over = coded and coding not in CODINGS
        self._cr = b""  # the last byte, if it is a CR: an LF behind it would belong to it
        self._line_ended = True
        self._held = bytearray()  # the beginning of an event
        self._size = 0
        self._inflated_bytes = self._events = 0  # in all

    @property
    def steps(self) -> int:
        """Steps that the reading took, see kept.py."""
        return self._events + self._inflated_bytes // INFLATED_A_STEP

    @property
    def memory(self) -> int:
        """Bytes of memory that reading itself takes now, about."""
        return len(self._held) + (0 if self._zlib is None else INFLATER_COST)

    def feed(self, data: bytes, most: int = NO_LIMIT) -> list[Event]:
        """The events that end with these bytes. After ``most`` steps the rest is not read."""
        found: list[Event] = []
        if self._over:
            return found
        if most <= 0:
            self._give_up(found)
            return found
        if self._zlib is not None:
            data = self._inflated(data, found)
        last = self.steps + most
        data = self._cr + data
        self._cr = data[-1:] if data.endswith(b"\r") else b""
        self._split(data[: len(data) - len(self._cr)], found, last)
        return found

    def end(self) -> list[Event]:
        """The stream has ended: the event that is not whole, if there is one."""
        found: list[Event] = []
        if self._cr:
            self._split(b"\n", found)
        self._finish(found, CUT_SHORT)
        return found

    def _inflated(self, data: bytes, found: list[Event]) -> bytes:
        inflater = self._zlib
        if inflater is None:
            return data
        try:
            out = inflater.decompress(data, MOST_INFLATED)
            self._inflated_bytes += len(out)
        except zlib.error:
            self._over = True
            found.append(Event(b"", 0, f"{NOT_READ}its compression is broken"))
            return b""
        if inflater.unconsumed_tail:
            self._over = True
            found.append(Event(b"", 0, f"{NOT_READ}it becomes too long when it is decompressed"))
        return out

    def _split(self, data: bytes, found: list[Event], last: int = NO_LIMIT) -> None:
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        at = 0
        while at < len(data):
            if self._line_ended and (blank_lines := _BLANK_LINES.match(data, at)):
                self._finish(found)
                at = blank_lines.end()
                continue
            if self.steps >= last:
                self._give_up(found)
                return
            blank = data.find(b"\n\n", at)
            end = len(data) if blank < 0 else blank + 1
            self._size += end - at
            if len(self._held) < self._keep:
                self._held += data[at : min(end, at + self._keep - len(self._held))]
            self._line_ended = data[end - 1] == 10
            at = end

    def _give_up(self, found: list[Event]) -> None:
        self._over = True
        self._held.clear()
        self._size = 0
        found.append(Event(b"", 0, NOT_READ + TOO_MANY))

    def _finish(self, found: list[Event], note: str = "") -> None:
        if not self._size:
            return
        self._events += 1
        data = bytes(self._held)
        lines = data.rstrip(b"\n").split(b"\n")
        if not note and all(line.startswith(b":") for line in lines):
            note = COMMENT
        # The LF of the last line belongs to the blank one, if the event is kept whole.
        if self._line_ended and len(data) == self._size:
            data = data[:-1]
        found.append(Event(data, self._size - self._line_ended, note))
        self._held.clear()
        self._size = 0
