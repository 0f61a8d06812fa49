"""One GET request in HTTP/2, and the status of its answer: for checks of targets that speak nothing
else (health.py). The relay passes HTTP/2 on and never reads it, so the agent has no library for it.

The request is one HEADERS frame, whose fields are literals (RFC 7541 §6.2.2). Of the answer only
the first field is read: pseudo-header fields come first (RFC 9113 §8.3), and an answer has no other
one than :status. The dynamic table is turned off, so that this field stands for itself.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from gotunnel import Deadline

from .common.duplex import Duplex

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME = struct.Struct(
    "!BHBBI"
)  # length (high byte, low bytes), type, flags, stream (RFC 9113 §4.1)
HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 1, 3, 4, 6, 7
ACK = END_STREAM = 0x1
END_HEADERS, PADDED, PRIORITY = 0x4, 0x8, 0x20
# SETTINGS_HEADER_TABLE_SIZE 0, SETTINGS_ENABLE_PUSH 0
OUR_SETTINGS = struct.pack("!HIHI", 1, 0, 2, 0)
LONGEST = 16384  # bytes of a frame, as we announce no other limit
MOST_READ = 256 * 1024  # bytes until the answer's first field; a target sends some hundred
# Indices of the static table (RFC 7541, Appendix A)
AUTHORITY, METHOD_GET, PATH, SCHEMES = 1, 2, 4, {"http": 6, "https": 7}
STATUSES = {8: 200, 9: 204, 10: 206, 11: 304, 12: 400, 13: 404, 14: 500}
# The codes of digits (RFC 7541, Appendix B), as texts of bits
DIGITS = ("00000", "00001", "00010", "011001", "011010", "011011", "011100", "011101", "011110",
          "011111")  # fmt: skip


class NotHttp2(Exception):
    """The answer breaks a rule, or is of another protocol."""


def status(
    target: Duplex,
    scheme: str,
    host: str,
    path: str,
    fields: Sequence[tuple[str, str]],
    deadline: Deadline,
) -> int:
    """The status of the answer to a GET request. Raises NotHttp2, OSError."""
    block = bytes((0x80 | METHOD_GET, 0x80 | SCHEMES[scheme]))
    block += bytes((AUTHORITY,)) + _text(host) + bytes((PATH,)) + _text(path)
    for name, value in fields:
        block += b"\0" + _text(name.lower()) + _text(value)
    out = PREFACE + frame(SETTINGS, 0, 0, OUR_SETTINGS)
    target.write(out + frame(HEADERS, END_STREAM | END_HEADERS, 1, block), deadline.left())
    reader = _Reader(target, deadline)
    while (found := _status_of(_answer(reader))) < 200:  # an interim one (RFC 9110 §15.2)
        pass
    return found


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    size = len(payload)
    return FRAME.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def _text(text: str) -> bytes:
    data = text.encode("latin-1")
    return _number(len(data), 7) + data


def _number(value: int, bits: int) -> bytes:
    """An integer (RFC 7541 §5.1), whose first byte has nothing before it."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((value,))
    out, value = [most], value - most
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


class _Reader:
    """Frames of a target."""

    def __init__(self, target: Duplex, deadline: Deadline):
        self._target, self._deadline = target, deadline
        self._came = b""
        self._read = 0

    def next(self) -> tuple[int, int, int, bytes]:
        """Type, flags, stream and payload of the next frame; settings and pings are answered."""
        while True:
            high, low, kind, flags, stream = FRAME.unpack(self._take(FRAME.size))
            size = high << 16 | low
            if size > LONGEST:
                raise NotHttp2(f"a frame of {size} bytes, expected at most {LONGEST}")
            payload = self._take(size)
            if kind in (SETTINGS, PING) and not flags & ACK:
                answer = payload if kind == PING else b""
                self._target.write(frame(kind, ACK, 0, answer), self._deadline.left())
            return kind, flags, stream & 0x7FFFFFFF, payload

    def _take(self, count: int) -> bytes:
        while len(self._came) < count:
            data = self._target.read(timeout=self._deadline.left())
            self._read += len(data)
            if not data:
                raise ConnectionAbortedError("it was closed without an answer")
            if self._read > MOST_READ:
                raise NotHttp2(f"no answer in its first {MOST_READ} bytes")
            self._came += data
        taken, self._came = self._came[:count], self._came[count:]
        return taken


def _answer(reader: _Reader) -> bytes:
    """The field block of the next HEADERS frame, as much as one frame has."""
    while True:
        kind, flags, stream, payload = reader.next()
        if kind == GOAWAY or kind == RST_STREAM and stream == 1:
            raise ConnectionAbortedError("it refused the request")
        if kind == HEADERS and stream == 1:
            padding = payload[0] if flags & PADDED and payload else 0
            start = bool(flags & PADDED) + 5 * bool(flags & PRIORITY)
            if start + padding > len(payload):
                raise NotHttp2("more padding than the frame has bytes")
            return payload[start : len(payload) - padding]


def _status_of(block: bytes) -> int:
    """The status in a field block, which stands first there."""
    at = 0
    while at < len(block) and block[at] & 0xE0 == 0x20:  # the dynamic table's size (§6.3)
        at += 1
        if block[at - 1] & 0x1F == 0x1F:
            while at < len(block) and block[at] & 0x80:
                at += 1
            at += 1
    first = block[at] if at < len(block) else 0
    if first & 0x80:
        found = STATUSES.get(first & 0x7F)
    else:  # a literal (§6.2), with :status as an index of the static table
        index = first & (0x3F if first & 0x40 else 0x0F)
        found = _digits(block[at + 1 :]) if index in STATUSES else None
    if found is None:
        raise NotHttp2("an answer whose first field is no :status")
    return found


def _digits(data: bytes) -> int | None:
    """The number of three digits in a string literal (§5.2)."""
    size = data[0] & 0x7F if data else 0
    value = data[1 : 1 + size]
    if data and data[0] & 0x80:
        bits = "".join(f"{byte:08b}" for byte in value[:4])
        text = ""
        for _ in range(3):
            digit = next((n for n, code in enumerate(DIGITS) if bits.startswith(code)), None)
            if digit is None:
                return None
            text, bits = f"{text}{digit}", bits[len(DIGITS[digit]) :]
        return int(text)
    return int(value) if len(value) == 3 and value.isdigit() else None
