"""Cuts a visitor's HTTP/2 bytes into frames, and ends floods.

http2_frames.py holds one connection to the rules of RFC 9113. This module bounds what those rules
allow: frames without payload that are read and answered for ever (SETTINGS, PING, empty DATA),
streams that are opened and reset at once (CVE-2023-44487, rapid reset), header blocks in endless
CONTINUATION frames (CVE-2024-27316). Here each of them has a number. Bytes and the time come in,
frames go out; no I/O.

The promise: whatever bytes come, feed() returns frames or raises Fault.
"""

from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # a client's first bytes (RFC 9113 §3.4)
HEADER = Struct("!HBBBL")  # length (24 bits), type, flags, stream id
HEADER_SIZE = 9
# Payload bytes of a frame, both ways: the least that everybody must accept (RFC 9113 §4.2). Larger
# ones would only make a small answer wait longer behind a download.
FRAME_SIZE = 16_384
# A header block: bytes before decompression, and CONTINUATION frames. With frames of FRAME_SIZE, 4
# of them fill the limit; some clients cut smaller ones.
BLOCK_LIMIT = 65_536
MOST_CONTINUATIONS = 16

# Token bucket of frames that cost work and carry nothing: SETTINGS, PING, PRIORITY, WINDOW_UPDATE,
# empty DATA, unknown types, and HEADERS that we refuse. BURST at once, RATE a second in the long
# run. A frame with payload in either direction returns one token, since a visitor answers payload
# with WINDOW_UPDATE, and gRPC's clients also with a PING. Beyond it the connection ends.
IDLE_FRAMES_RATE, IDLE_FRAMES_BURST = 100, 1000
# A frame that we send returns its token from so many bytes on: otherwise a visitor that opens its
# window by one byte at a time would have each WINDOW_UPDATE paid for by the byte that it got.
LEAST_PAYLOAD = 512
# Token bucket of streams that were reset: by the visitor, or by us because of its fault. A browser
# that leaves a page resets those that are open, at most 100.
RESETS_RATE, RESETS_BURST = 20, 200
# Budget that delays a connection's reading, without an end: a frame costs one unit, some 25 µs of
# CPU time, and each PACE_PAYLOAD bytes return one. So bulk data is never delayed, and tiny frames
# cost a tenth of a CPU at most.
PACE_RATE, PACE_BURST = 4000, 8000
PACE_PAYLOAD = 1024


class Code(IntEnum):
    """Error codes of GOAWAY and RST_STREAM (RFC 9113 §7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7  # the visitor may repeat the request: nothing was done for it
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11  # the visitor causes too much work
    HTTP_1_1_REQUIRED = 13


class Type(IntEnum):
    """Types of frames (RFC 9113 §6); others are extensions."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9
    PRIORITY_UPDATE = 16  # RFC 9218 §7.1


END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 1, 1, 4, 8, 32  # flags


class Fault(Exception):
    """The visitor broke a rule, or a limit: its connection ends by GOAWAY with this code."""

    def __init__(self, code: Code, text: str):
        super().__init__(text)
        self.code = code


class Frame(NamedTuple):
    """A whole frame. ``data``: its payload, without padding and HEADERS' priority. A header block
    in several frames is one Frame. ``length``: bytes of the payload with padding."""

    type: int
    flags: int
    stream_id: int
    data: bytes
    length: int


class Bucket:
    """A token bucket (GCRA, as in token_bucket.py) for one connection."""

    def __init__(self, rate: float, burst: float):
        self._interval, self._tolerance = 1 / rate, burst / rate
        self._full_at = 0.0

    def take(self, now: float) -> bool:
        """Take a token; False if there was none."""
        self._full_at = max(self._full_at, now) + self._interval
        return self._full_at <= now + self._tolerance

    def give_back(self) -> None:
        self._full_at -= self._interval


class Screen:
    """One connection's bytes. One thread at a time, but any thread may call note_sent()."""

    def __init__(self) -> None:
        self.frames = 0  # that were whole
        self._preface = PREFACE  # the part that has not come yet
        self._first_frame = True  # the next one is the first
        self._held = b""  # an unfinished frame
        self._block: list[bytes] = []  # the parts of an unfinished header block
        self._first: tuple[int, int] = 0, 0  # its flags and stream id
        self._idle = Bucket(IDLE_FRAMES_RATE, IDLE_FRAMES_BURST)
        self._resets = Bucket(RESETS_RATE, RESETS_BURST)
        self._paid_at = 0.0  # time at which PACE_RATE has paid for all frames so far

    @property
    def in_message(self) -> bool:
        """Whether a part of a frame or header block has come: the rest must follow soon."""
        return bool(self._held or self._block or self._preface)

    @property
    def in_data(self) -> bool:
        """Whether that is a DATA frame, which takes its time on a slow line."""
        return self._held[3:4] == b"\0" and not (self._block or self._preface)

    def feed(self, data: bytes, now: float) -> Iterator[Frame]:
        """Take the next bytes; the frames that are whole. A caller that stops early, because a
        frame was refused, must not call again."""
        if self._preface:
            data = self._after_preface(data)
        if self._held:
            data = self._held + data
            self._held = b""
        at, end, cost = 0, len(data), 0
        while end - at >= HEADER_SIZE:
            high, low, kind, flags, stream_id = HEADER.unpack_from(data, at)
            length = high << 8 | low
            if length > FRAME_SIZE:
                text = f"frame of {length} bytes, expected at most {FRAME_SIZE}"
                raise Fault(Code.FRAME_SIZE_ERROR, text)
            behind = at + HEADER_SIZE + length
            if behind > end:
                break
            stream_id &= 0x7FFF_FFFF
            cost += 1
            frame = self._pass(kind, flags, stream_id, data[at + HEADER_SIZE : behind], now)
            at = behind
            if frame is not None:
                self.frames += 1
                yield frame
        self._held = data[at:]
        paid = max(self._paid_at, now - PACE_BURST / PACE_RATE)
        self._paid_at = paid + max(0, cost - end // PACE_PAYLOAD) / PACE_RATE

    def pause(self, now: float) -> float:
        """Seconds for which the connection must not be read, 0 for none."""
        return max(0.0, self._paid_at - now)

    def count_reset(self, now: float) -> None:
        """A stream was reset, by the visitor or because of its fault. Raises Fault."""
        if not self._resets.take(now):
            text = f"more than {RESETS_RATE} streams a second are reset, and {RESETS_BURST} at once"
            raise Fault(Code.ENHANCE_YOUR_CALM, text)

    def count_refused(self, now: float) -> None:
        """A stream was refused. Raises Fault."""
        self._count_idle(now)

    def note_sent(self, size: int) -> None:
        """A DATA frame of ``size`` bytes was sent."""
        if size >= LEAST_PAYLOAD:
            self._idle.give_back()

    def _after_preface(self, data: bytes) -> bytes:
        size = min(len(self._preface), len(data))
        if data[:size] != self._preface[:size]:
            raise Fault(Code.PROTOCOL_ERROR, "no client connection preface")
        self._preface = self._preface[size:]
        return data[size:]

    def _pass(self, kind: int, flags: int, stream_id: int, data: bytes, now: float) -> Frame | None:
        """The frame, None if its header block is unfinished. Raises Fault."""
        if self._first_frame:
            self._first_frame = False
            if kind != Type.SETTINGS or flags & ACK:
                raise Fault(Code.PROTOCOL_ERROR, "a first frame that is not SETTINGS")
        if self._block or kind == Type.CONTINUATION:
            return self._continue(kind, flags, stream_id, data)
        length = len(data)
        if kind == Type.HEADERS:
            if flags & (PADDED | PRIORITY):
                data = _header_block(flags, stream_id, data)
            if not flags & END_HEADERS:
                self._block.append(data)
                self._first = flags, stream_id
                return None
        elif kind == Type.DATA:
            if flags & PADDED:
                data = _without_padding(data)
            if data:
                self._idle.give_back()
            elif not flags & END_STREAM:
                self._count_idle(now)
        elif kind == Type.RST_STREAM:
            self.count_reset(now)
        else:
            self._count_idle(now)
        return Frame(kind, flags, stream_id, data, length)

    def _count_idle(self, now: float) -> None:
        if not self._idle.take(now):
            text = (
                f"more than {IDLE_FRAMES_RATE} frames without payload a second, and "
                f"{IDLE_FRAMES_BURST} at once"
            )
            raise Fault(Code.ENHANCE_YOUR_CALM, text)

    def _continue(self, kind: int, flags: int, stream_id: int, data: bytes) -> Frame | None:
        first_flags, first_stream = self._first
        if not self._block or kind != Type.CONTINUATION or stream_id != first_stream:
            text = "a CONTINUATION frame without HEADERS, or other frames in a header block"
            raise Fault(Code.PROTOCOL_ERROR, text)
        self._block.append(data)
        size = sum(map(len, self._block))
        if len(self._block) > 1 + MOST_CONTINUATIONS or size > BLOCK_LIMIT:
            text = (
                f"header block of {len(self._block)} frames and {size} bytes, expected at most "
                f"{1 + MOST_CONTINUATIONS} and {BLOCK_LIMIT}"
            )
            raise Fault(Code.ENHANCE_YOUR_CALM, text)
        if not flags & END_HEADERS:
            return None
        block, self._block = b"".join(self._block), []
        return Frame(Type.HEADERS, first_flags | END_HEADERS, first_stream, block, size)


def _without_padding(data: bytes) -> bytes:
    """The rest of a payload that begins with the length of its padding (RFC 9113 §6.1)."""
    if not data:
        raise Fault(Code.FRAME_SIZE_ERROR, "a padded frame without its padding's length")
    if data[0] >= len(data):
        raise Fault(Code.PROTOCOL_ERROR, "padding that is longer than its frame")
    return data[1 : len(data) - data[0]]


def _header_block(flags: int, stream_id: int, data: bytes) -> bytes:
    """The header block in a HEADERS frame with padding or a priority (RFC 9113 §6.2)."""
    if flags & PADDED:
        data = _without_padding(data)
    if flags & PRIORITY:
        check_priority(stream_id, data[:5])
        data = data[5:]
    return data


def check_priority(stream_id: int, data: bytes) -> None:
    """The five bytes of a priority (RFC 9113 §6.3). Priorities themselves are deprecated."""
    if len(data) != 5:
        raise Fault(Code.FRAME_SIZE_ERROR, f"a priority of {len(data)} bytes, expected 5")
    if int.from_bytes(data[:4], "big") & 0x7FFF_FFFF == stream_id:
        raise Fault(Code.PROTOCOL_ERROR, f"stream {stream_id} depends on itself")
