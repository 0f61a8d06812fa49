"""Reads the messages of a WebSocket from the bytes of one direction (RFC 6455), for show.

Bytes come in, messages go out; nothing is raised and nothing is held back. Of each message only the
beginning is kept, so a frame of gigabytes costs no more than its count.

A frame says where the next one begins. After one that breaks the rules so that this cannot be
trusted any more, the rest is not read: a guess would show a payload as messages. Where a rule is
broken and the frames are still plain, the message gets a note.

permessage-deflate (RFC 7692) is undone with limits. A compressor may refer to earlier messages, so
each byte of a direction has to be inflated or none: after a message over a limit, those that
follow are shown as they passed, unless the ends have agreed on no_context_takeover.
"""

from __future__ import annotations

import codecs
import zlib
from typing import NamedTuple

from .kept import INFLATED_A_STEP, NO_LIMIT, TOO_MANY

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KINDS = {TEXT: "text", BINARY: "binary", CLOSE: "close", PING: "ping", PONG: "pong"}
LOST = "lost"  # the kind of what is told once, when the rest cannot be read

MOST_CONTROL = 125  # bytes of a control frame's payload (RFC 6455 §5.5)
LONGEST_HEADER = 14  # bytes
# Of one compressed message, bytes that are inflated, and bytes that this may give. More takes a
# processor seconds, and comes from a file transfer or from a zip bomb.
MOST_DEFLATED = 1024 * 1024
MOST_INFLATED = 4 * 1024 * 1024
INFLATED_AT_ONCE = 64 * 1024  # bytes
# Memory of an inflater in bytes: zlib's window of 32 KiB and its tables.
INFLATER_COST = 48 * 1024
TAIL = b"\x00\x00\xff\xff"  # what the sender has removed from a compressed message (§7.2.1)

CUT_SHORT = "cut short"
COMPRESSED = "compressed"
NOT_INFLATED = "compressed, and not inflated"


class Read(NamedTuple):
    """A message. ``kind`` is one of KINDS' values or LOST, ``data`` the beginning of its payload,
    ``size`` the bytes of all of it as they passed; ``note``: see record.Message."""

    kind: str
    data: bytes
    size: int
    note: str = ""


class Agreed(NamedTuple):
    """The extensions that both ends have agreed on: permessage-deflate, and whether each message of
    the visitor's or the target's is compressed for itself. ``other``: the name of one that we do
    not know, "" if there is none."""

    deflate: bool = False
    visitor_alone: bool = False
    target_alone: bool = False
    other: str = ""


def agreed(extensions: str) -> Agreed:
    """What the Sec-WebSocket-Extensions of an answer say (RFC 6455 §9.1)."""
    found = Agreed()
    for extension in filter(None, (part.strip() for part in extensions.lower().split(","))):
        name, *parameters = (part.strip() for part in extension.split(";"))
        if name != "permessage-deflate" or found.deflate:
            return Agreed(other=name[:40] or "?")
        found = Agreed(
            True,
            "client_no_context_takeover" in parameters,
            "server_no_context_takeover" in parameters,
        )
    return found


class Reader:
    """The messages of one direction."""

    def __init__(self, keep: int, extensions: Agreed = Agreed(), *, from_visitor: bool = False):
        """``keep``: bytes of each message that are kept."""
        self.lost = False  # nothing more is read
        self._frames = 0  # that were read
        self._keep = keep
        self._other = extensions.other
        self._inflater: _Inflater | None = None
        if extensions.deflate:
            alone = extensions.visitor_alone if from_visitor else extensions.target_alone
            self._inflater = _Inflater(keep, alone)
        self._header = b""  # of a frame, while it is not whole
        # The frame whose payload is being read.
        self._opcode = 0
        self._left = 0  # bytes to come
        self._offset = 0  # bytes that have come
        self._mask = b""  # 4 bytes; b"": not masked
        self._final = False
        self._control = bytearray()  # payload of a control frame
        # The message whose frames are being read; control frames may come between them.
        self._message: _Message | None = None

    @property
    def memory(self) -> int:
        """Bytes of memory that reading itself takes now, about."""
        held = 0 if self._message is None else self._message.held
        return held + (0 if self._inflater is None else INFLATER_COST + self._inflater.held)

    @property
    def steps(self) -> int:
        """Steps that the reading took, see kept.py."""
        inflated = 0 if self._inflater is None else self._inflater.given
        return self._frames + inflated // INFLATED_A_STEP

    def feed(self, data: bytes, most: int = NO_LIMIT) -> list[Read]:
        """The messages that end with these bytes. After ``most`` steps the rest is not read."""
        found: list[Read] = []
        at, end = 0, len(data)
        last = self.steps + most
        while at < end and not self.lost:
            if self._left:
                count = min(self._left, end - at)
                self._payload(data, at, count)
                at += count
                self._left -= count
                if not self._left:
                    self._end_frame(found)
            elif self.steps >= last:
                self._lose(found, TOO_MANY)
            else:
                at = self._read_header(data, at, found)
        return found

    def end(self) -> list[Read]:
        """The stream has ended: the message that is not whole, if there is one."""
        if self.lost or not (self._message or self._header or self._left):
            return []
        self.lost = True
        if self._message is not None:
            if self._opcode < CLOSE:
                self._message.size -= self._left
            return [self._message.read(self._inflater, CUT_SHORT)]
        if self._left:
            return [Read(KINDS[self._opcode], bytes(self._control), len(self._control), CUT_SHORT)]
        return [Read(LOST, b"", 0, "cut short in the header of a frame")]

    def _lose(self, found: list[Read], why: str) -> int:
        self._frames = self.steps  # the inflater's, too
        self.lost, self._message, self._inflater = True, None, None
        found.append(Read(LOST, b"", 0, f"the rest is not read: {why}"))
        return 0

    def _read_header(self, data: bytes, at: int, found: list[Read]) -> int:
        had = len(self._header)
        header = self._header + data[at : at + LONGEST_HEADER - had]
        length = header[1] & 127 if len(header) > 1 else 0
        begin = 2 + (2 if length == 126 else 8 if length == 127 else 0)
        whole = begin + (4 if len(header) > 1 and header[1] & 128 else 0)
        if len(header) < whole:
            self._header = header
            return len(data)
        self._header = b""
        self._frames += 1
        if length > 125:
            length = int.from_bytes(header[2:begin], "big")
        opcode, final, reserved = header[0] & 15, bool(header[0] & 128), header[0] & 0x70
        if opcode not in KINDS and opcode != CONTINUATION:
            return self._lose(found, f"a frame has opcode {opcode}, which no message has")
        if length >> 63:
            return self._lose(found, "a frame has a length of over 63 bits")
        if opcode >= CLOSE and (length > MOST_CONTROL or not final):
            return self._lose(found, f"a {KINDS[opcode]} is longer than {MOST_CONTROL} bytes, or "
                              "in parts")  # fmt: skip
        may = 0x40 if self._inflater is not None and opcode in (TEXT, BINARY) else 0
        if reserved & ~may and not self._other:
            return self._lose(found, "a frame has bits that no extension explains")
        self._opcode, self._final, self._left, self._offset = opcode, final, length, 0
        self._mask = header[begin:whole]
        if opcode < CLOSE:
            self._begin_frame(opcode, bool(reserved), found)
        if not length:
            self._end_frame(found)
        return at + whole - had

    def _begin_frame(self, opcode: int, reserved: bool, found: list[Read]) -> None:
        message = self._message
        if opcode == CONTINUATION:
            if message is None:
                message = _Message(BINARY, self._keep)
                message.notes.append("a continuation of no message")
        else:
            if message is not None:
                found.append(message.read(self._inflater, "cut short by another message"))
            message = _Message(opcode, self._keep)
            message.compressed = reserved and not self._other
            if reserved and self._other:
                message.notes.append(f"in the extension {self._other}, which is not known here")
        message.frames += 1
        message.size += self._left
        self._message = message

    def _payload(self, data: bytes, at: int, count: int) -> None:
        message = self._message
        if self._opcode >= CLOSE:
            self._control += self._unmasked(data[at : at + count])
        elif message is not None:
            wanted = count
            if not message.compressed or self._inflater is None or not self._inflater.wants():
                wanted = min(count, message.room)
            if wanted:
                piece = self._unmasked(data[at : at + wanted])
                message.keep(piece)
                if message.compressed and self._inflater is not None:
                    self._inflater.feed(piece)
        self._offset += count

    def _unmasked(self, data: bytes) -> bytes:
        if not self._mask:
            return data
        turn = self._offset % 4
        key = (self._mask[turn:] + self._mask[:turn]) * (len(data) // 4 + 1)
        number = int.from_bytes(data, "little") ^ int.from_bytes(key[: len(data)], "little")
        return number.to_bytes(len(data), "little")

    def _end_frame(self, found: list[Read]) -> None:
        if self._opcode >= CLOSE:
            data = bytes(self._control)
            self._control.clear()
            note = ""
            if self._opcode == CLOSE and data:
                note = f"code {int.from_bytes(data[:2], 'big')}" if len(data) > 1 else "no code"
            found.append(Read(KINDS[self._opcode], data, len(data), note))
        elif self._final and self._message is not None:
            found.append(self._message.read(self._inflater))
            self._message = None


class _Message:
    """A message while its frames come."""

    def __init__(self, opcode: int, keep: int):
        self.opcode, self.room = opcode, keep
        self.size = self.frames = 0
        self.compressed = False
        self.notes: list[str] = []
        self._kept = bytearray()

    @property
    def held(self) -> int:
        return len(self._kept)

    def keep(self, piece: bytes) -> None:
        if self.room:
            self._kept += piece[: self.room]
            self.room = max(0, self.room - len(piece))

    def read(self, inflater: _Inflater | None, note: str = "") -> Read:
        data, notes = bytes(self._kept), self.notes
        total = self.size
        if self.compressed and inflater is not None:
            inflated, total = inflater.end()
            notes.append(NOT_INFLATED if inflated is None else COMPRESSED)
            data = data if inflated is None else inflated
        if self.frames > 1:
            notes.append(f"in {self.frames} frames")
        if self.opcode == TEXT and NOT_INFLATED not in notes and not _is_text(data, total):
            notes.append("not UTF-8")
        if note:
            notes.append(note)
        return Read(KINDS[self.opcode], data, self.size, "; ".join(notes))


def _is_text(data: bytes, total: int) -> bool:
    """Whether the beginning of a text of ``total`` bytes may be UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, len(data) == total)
    except UnicodeDecodeError:
        return False
    return True


class _Inflater:
    """Undoes permessage-deflate in one direction."""

    def __init__(self, keep: int, alone: bool):
        """``alone``: each message is compressed for itself."""
        self._keep, self._alone = keep, alone
        self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)
        self._broken = False  # of this message, and of those after it unless each is alone
        self.given = 0  # bytes, of all messages
        self._begin()

    def _begin(self) -> None:
        self._out = bytearray()
        self._fed = self._total = 0

    @property
    def held(self) -> int:
        return len(self._out)

    def wants(self) -> bool:
        """Whether it needs all bytes, also those behind the beginning that is kept."""
        return not self._broken

    def feed(self, piece: bytes) -> None:
        self._fed += len(piece)
        if self._fed > MOST_DEFLATED:
            self._break()
        while piece and not self._broken:
            try:
                out = self._zlib.decompress(piece, INFLATED_AT_ONCE)
            except zlib.error:
                self._break()
                return
            self._total += len(out)
            self.given += len(out)
            if len(self._out) < self._keep:
                self._out += out[: self._keep - len(self._out)]
            piece = self._zlib.unconsumed_tail
            if self._total > MOST_INFLATED:
                self._break()

    def end(self) -> tuple[bytes | None, int]:
        """The message has ended: its beginning, and the size of all of it; None if it could not be
        inflated."""
        self.feed(TAIL)
        out = None if self._broken else bytes(self._out)
        total = self._total
        self._begin()
        if self._alone or self._zlib.eof:
            # A last block (BFINAL) ends a stream of zlib's; the next message begins another one.
            self._zlib, self._broken = zlib.decompressobj(-zlib.MAX_WBITS), False
        return out, total

    def _break(self) -> None:
        self._broken = True
        self._out.clear()
