"""The rules of one HTTP/2 connection (RFC 9113): frames in, events out, and what is to be sent.

Pure: no socket, no thread, no clock. The promise: whatever frames come, receive() returns events or
raises Fault, which ends the connection. An error that concerns one stream resets that stream.

The library h2 does the same. But it alone costs a third of the CPU time of a whole request by
HTTP/1.1, ends the connection for a malformed request, and sends nothing after a GOAWAY, so that
answers under way would be lost. Here is only what a server needs: no push, and none of the
priorities of RFC 7540.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from struct import Struct
from typing import NamedTuple, TypeAlias

from . import http2_hpack
from .http2_hpack import BROKEN, Decoder, TooLarge
from .http2_screen import (
    ACK,
    END_HEADERS,
    END_STREAM,
    FRAME_SIZE,
    HEADER,
    HEADER_SIZE,
    Code,
    Fault,
    Frame,
    Type,
    check_priority,
)

# Bytes of a header list, SETTINGS_MAX_HEADER_LIST_SIZE.
LIST_LIMIT = 65_536
# Streams that a connection may have open at a time, SETTINGS_MAX_CONCURRENT_STREAMS. RFC 9113
# §5.1.2 asks for 100 at least.
MOST_STREAMS = 100
# Flow control windows in bytes with which a body, and all bodies of a connection, begin.
START_WINDOW, START_WINDOW_ALL = 65_536, 256 * 1024
# Closed streams that are remembered, to tell late frames from wrong ones.
MOST_CLOSED = 256

_PROTOCOL_WINDOW = 65_535  # a window before SETTINGS or WINDOW_UPDATE (RFC 9113 §6.9.2)
_MOST_WINDOW = 2**31 - 1  # §6.9.1
_SETTING, _LONG = Struct("!HL"), Struct("!L")

# Identifiers of settings (§6.5.2, RFC 8441 §3)
_ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 2, 3, 4, 5
_MAX_HEADER_LIST_SIZE, _ENABLE_CONNECT_PROTOCOL = 6, 8
_OURS = (
    (_MAX_CONCURRENT_STREAMS, MOST_STREAMS),
    (_INITIAL_WINDOW_SIZE, START_WINDOW),
    (_MAX_HEADER_LIST_SIZE, LIST_LIMIT),
    (_ENABLE_CONNECT_PROTOCOL, 1),
)

Block: TypeAlias = "Sequence[tuple[str, str]]"  # a header list


class Requested(NamedTuple):
    """A request has begun. ``size``: of its header list, as LIST_LIMIT counts. ``ended``: it is
    whole (END_STREAM)."""

    stream_id: int
    block: Block
    size: int
    ended: bool


class Came(NamedTuple):
    """DATA; ``flow``: its bytes as flow control counts them, with padding. ``ended``: the request
    is whole."""

    stream_id: int
    data: bytes
    flow: int
    ended: bool


class Trailed(NamedTuple):
    """A request's trailers. It is whole."""

    stream_id: int
    block: Block


class Reset(NamedTuple):
    """A stream is over before its end. ``fault``: by us, because the visitor broke a rule."""

    stream_id: int
    code: int
    fault: bool


class Opened(NamedTuple):
    """The visitor permits more DATA on a stream; on all for 0."""

    stream_id: int


Happened: TypeAlias = "Requested | Came | Trailed | Reset | Opened"


class _Stream:
    __slots__ = ("ours", "theirs", "ended", "we_ended")

    def __init__(self, theirs: int):
        self.ours = START_WINDOW  # bytes that the visitor may send
        self.theirs = theirs  # bytes that we may send; negative after a change of SETTINGS
        self.ended = False  # the visitor has sent END_STREAM
        self.we_ended = False  # we have


class Frames:
    """One connection's state. The methods that send raise ConnectionAbortedError if the stream is
    closed."""

    def __init__(self) -> None:
        self._decoder = Decoder(LIST_LIMIT)
        self._streams: dict[int, _Stream] = {}  # the open ones
        self._latest = 0  # the visitor's highest stream
        # Recently closed streams, and by what: END_STREAM on both sides (None), a reset by us, or
        # by the visitor.
        self._closed: OrderedDict[int, bool | None] = OrderedDict()
        self._ours = START_WINDOW_ALL  # bytes that the visitor may send on all streams
        self._theirs = _PROTOCOL_WINDOW  # bytes that we may send
        self._initial = _PROTOCOL_WINDOW  # the visitor's SETTINGS_INITIAL_WINDOW_SIZE
        settings = b"".join(_SETTING.pack(*setting) for setting in _OURS)
        self.unsent = 0  # bytes of the frames that take() returns
        self._out: list[bytes] = []  # those frames
        self._prefix = http2_hpack.NO_TABLE  # of the next header block
        self._act: dict[int, Callable[[Frame], list[Happened]]] = {
            Type.DATA: self._data,
            Type.HEADERS: self._headers,
            Type.PRIORITY: self._priority,
            Type.RST_STREAM: self._rst_stream,
            Type.SETTINGS: self._settings,
            Type.PUSH_PROMISE: self._push_promise,
            Type.PING: self._ping,
            Type.GOAWAY: self._goaway,
            Type.WINDOW_UPDATE: self._window_update,
        }
        self._put(Type.SETTINGS, 0, 0, settings)
        self._send_window_update(0, START_WINDOW_ALL - _PROTOCOL_WINDOW)

    # Receiving

    def receive(self, frame: Frame) -> list[Happened]:
        """Take a frame. Raises Fault."""
        act = self._act.get(frame.type)
        return [] if act is None else act(frame)  # an extension is ignored (§5.5)

    def _headers(self, frame: Frame) -> list[Happened]:
        stream_id, ended = frame.stream_id, bool(frame.flags & END_STREAM)
        block, size = self._decode(frame.data)  # in any case: it changes the decoder's table
        if stream_id <= self._latest:
            return self._trailers(stream_id, ended, block)
        if stream_id % 2 == 0:
            raise Fault(
                Code.PROTOCOL_ERROR, f"a request on stream {stream_id}, expected an odd one"
            )
        self._latest = stream_id
        stream = self._streams[stream_id] = _Stream(self._initial)
        stream.ended = ended
        return [Requested(stream_id, block, size, ended)]

    def _trailers(self, stream_id: int, ended: bool, block: Block) -> list[Happened]:
        stream = self._open(stream_id, Type.HEADERS)
        if stream is None:
            return []
        if stream.ended:
            return self._fail(stream_id, Code.STREAM_CLOSED)
        if not ended:
            return self._fail(stream_id, Code.PROTOCOL_ERROR)
        self._note_end(stream_id, stream)
        return [Trailed(stream_id, block)]

    def _decode(self, data: bytes) -> tuple[Block, int]:
        try:
            return self._decoder.decode(data)
        except TooLarge:
            text = f"a header list of more than {LIST_LIMIT} bytes"
            raise Fault(Code.ENHANCE_YOUR_CALM, text) from None
        except BROKEN as error:
            raise Fault(Code.COMPRESSION_ERROR, f"HPACK: {error}") from None

    def _data(self, frame: Frame) -> list[Happened]:
        stream_id, flow = frame.stream_id, frame.length
        if flow > self._ours:
            raise Fault(Code.FLOW_CONTROL_ERROR, f"{flow} bytes, the window was {self._ours}")
        self._ours -= flow
        stream = self._open(stream_id, Type.DATA)
        lost = Came(stream_id, b"", flow, False)
        if stream is None:
            return [lost]
        if stream.ended:
            return [*self._fail(stream_id, Code.STREAM_CLOSED), lost]
        if flow > stream.ours:
            return [*self._fail(stream_id, Code.FLOW_CONTROL_ERROR), lost]
        stream.ours -= flow
        ended = bool(frame.flags & END_STREAM)
        if ended:
            self._note_end(stream_id, stream)
        return [Came(stream_id, frame.data, flow, ended)]

    def _open(self, stream_id: int, kind: Type) -> _Stream | None:
        """The stream that a frame is for. None if the frame is to be dropped: it was under way when
        we have reset the stream. Raises Fault for one that may have no such frame (§5.1)."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            return stream
        self._refuse_idle(stream_id, kind)
        by_us = self._closed.get(stream_id, stream_id)
        if by_us is True:
            return None
        if by_us is False:
            self._send_reset(stream_id, Code.STREAM_CLOSED)
            return None
        if by_us is None:
            raise Fault(Code.STREAM_CLOSED, f"{kind.name} on stream {stream_id} after its end")
        if kind is Type.DATA:
            raise Fault(Code.STREAM_CLOSED, f"DATA on stream {stream_id}, which is closed")
        raise Fault(Code.PROTOCOL_ERROR, f"stream {stream_id} after stream {self._latest}")

    def _refuse_idle(self, stream_id: int, kind: Type) -> None:
        """Raise Fault if the stream has not begun, or is not a visitor's."""
        if not stream_id % 2 or stream_id > self._latest:
            text = f"{kind.name} on stream {stream_id}, which is not open"
            raise Fault(Code.PROTOCOL_ERROR, text)

    def _priority(self, frame: Frame) -> list[Happened]:
        if not frame.stream_id:
            raise Fault(Code.PROTOCOL_ERROR, "PRIORITY on stream 0")
        check_priority(frame.stream_id, frame.data)
        return []

    def _rst_stream(self, frame: Frame) -> list[Happened]:
        code = self._number(frame)
        self._refuse_idle(frame.stream_id, Type.RST_STREAM)
        if self._streams.pop(frame.stream_id, None) is None:
            return []
        self._remember(frame.stream_id, False)
        return [Reset(frame.stream_id, code, False)]

    def _settings(self, frame: Frame) -> list[Happened]:
        data = frame.data
        if frame.stream_id:
            raise Fault(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(data) % _SETTING.size or frame.flags & ACK and data:
            raise Fault(Code.FRAME_SIZE_ERROR, f"SETTINGS of {len(data)} bytes")
        if frame.flags & ACK:
            return []
        for setting, value in _SETTING.iter_unpack(data):
            if setting == _INITIAL_WINDOW_SIZE:
                if value > _MOST_WINDOW:
                    raise Fault(Code.FLOW_CONTROL_ERROR, f"an initial window of {value} bytes")
                change, self._initial = value - self._initial, value
                for stream in self._streams.values():
                    stream.theirs += change
                    if stream.theirs > _MOST_WINDOW:
                        raise Fault(Code.FLOW_CONTROL_ERROR, "a window of more than 2^31-1 bytes")
            elif setting in (_ENABLE_PUSH, _ENABLE_CONNECT_PROTOCOL) and value > 1:
                raise Fault(Code.PROTOCOL_ERROR, f"setting {setting} is {value}, expected 0 or 1")
            elif setting == _MAX_FRAME_SIZE and not FRAME_SIZE <= value < 2**24:
                raise Fault(Code.PROTOCOL_ERROR, f"a frame size of {value} bytes")
        self._put(Type.SETTINGS, ACK, 0, b"")
        return [Opened(0)]

    def _push_promise(self, frame: Frame) -> list[Happened]:
        raise Fault(Code.PROTOCOL_ERROR, "PUSH_PROMISE from a client")

    def _ping(self, frame: Frame) -> list[Happened]:
        if frame.stream_id:
            raise Fault(Code.PROTOCOL_ERROR, "PING on a stream")
        if len(frame.data) != 8:
            raise Fault(Code.FRAME_SIZE_ERROR, f"PING of {len(frame.data)} bytes, expected 8")
        if not frame.flags & ACK:
            self._put(Type.PING, ACK, 0, frame.data)
        return []

    def _goaway(self, frame: Frame) -> list[Happened]:
        """The visitor will open no further stream; it still wants the answers under way."""
        if frame.stream_id:
            raise Fault(Code.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(frame.data) < 8:
            raise Fault(Code.FRAME_SIZE_ERROR, f"GOAWAY of {len(frame.data)} bytes")
        return []

    def _window_update(self, frame: Frame) -> list[Happened]:
        stream_id, credit = frame.stream_id, self._number(frame) & _MOST_WINDOW
        if not stream_id:
            self._theirs += credit
            if not credit or self._theirs > _MOST_WINDOW:
                code = Code.FLOW_CONTROL_ERROR if credit else Code.PROTOCOL_ERROR
                raise Fault(code, f"WINDOW_UPDATE by {credit} bytes")
            return [Opened(0)]
        self._refuse_idle(stream_id, Type.WINDOW_UPDATE)
        stream = self._streams.get(stream_id)
        if stream is None:  # it was under way when the stream was closed
            return []
        stream.theirs += credit
        if not credit or stream.theirs > _MOST_WINDOW:
            code = Code.FLOW_CONTROL_ERROR if credit else Code.PROTOCOL_ERROR
            return self._fail(stream_id, code)
        return [Opened(stream_id)]

    @staticmethod
    def _number(frame: Frame) -> int:
        """The payload of a frame that is a number of 32 bits."""
        if len(frame.data) != _LONG.size:
            text = f"a frame of type {frame.type} with {len(frame.data)} bytes, expected 4"
            raise Fault(Code.FRAME_SIZE_ERROR, text)
        number: int = _LONG.unpack(frame.data)[0]
        return number

    def _fail(self, stream_id: int, code: Code) -> list[Happened]:
        """A stream error (§5.4.2)."""
        self.reset(stream_id, code)
        return [Reset(stream_id, code, True)]

    def _note_end(self, stream_id: int, stream: _Stream) -> None:
        stream.ended = True
        if stream.we_ended:
            self._close(stream_id, None)

    def _close(self, stream_id: int, by_us: bool | None) -> None:
        del self._streams[stream_id]
        self._remember(stream_id, by_us)

    def _remember(self, stream_id: int, by_us: bool | None) -> None:
        self._closed[stream_id] = by_us
        if len(self._closed) > MOST_CLOSED:
            self._closed.popitem(last=False)

    # Sending

    def permitted(self, stream_id: int) -> int:
        """How many bytes of DATA the visitor permits on a stream now."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else min(self._theirs, stream.theirs)

    def send_head(self, stream_id: int, block: Block, end: bool) -> int:
        """A head, or trailers. Returns the size of its frames."""
        stream = self._writable(stream_id)
        data = self._prefix + http2_hpack.encode(block)
        self._prefix = b""
        flags = END_STREAM if end else 0
        if len(data) <= FRAME_SIZE:
            sent = self._put(Type.HEADERS, flags | END_HEADERS, stream_id, data)
        else:
            kind, sent = Type.HEADERS, 0
            for at in range(0, len(data), FRAME_SIZE):
                if at + FRAME_SIZE >= len(data):
                    flags |= END_HEADERS
                sent += self._put(kind, flags, stream_id, data[at : at + FRAME_SIZE])
                kind, flags = Type.CONTINUATION, 0
        if end:
            self._end(stream_id, stream)
        return sent

    def send_data(self, stream_id: int, data: bytes, end: bool) -> int:
        """One frame, of at most FRAME_SIZE bytes and as many as are permitted. Returns its size."""
        stream = self._writable(stream_id)
        size = len(data)
        self._theirs -= size
        stream.theirs -= size
        sent = self._put(Type.DATA, END_STREAM if end else 0, stream_id, data)
        if end:
            self._end(stream_id, stream)
        return sent

    def _writable(self, stream_id: int) -> _Stream:
        stream = self._streams.get(stream_id)
        if stream is None or stream.we_ended:
            raise ConnectionAbortedError(f"stream {stream_id} is closed")
        return stream

    def _end(self, stream_id: int, stream: _Stream) -> None:
        stream.we_ended = True
        if stream.ended:
            self._close(stream_id, None)

    def reset(self, stream_id: int, code: Code) -> None:
        """Reset a stream; nothing if it is closed already."""
        if stream_id in self._streams:
            self._close(stream_id, True)
            self._send_reset(stream_id, code)

    def _send_reset(self, stream_id: int, code: Code) -> None:
        self._put(Type.RST_STREAM, 0, stream_id, _LONG.pack(code))

    def grant(self, size: int, stream_id: int = 0) -> None:
        """Permit so many more bytes on a stream, or (0) on all together."""
        if not stream_id:
            self._ours += size
        elif stream_id in self._streams:
            self._streams[stream_id].ours += size
        else:
            return
        self._send_window_update(stream_id, size)

    def _send_window_update(self, stream_id: int, size: int) -> None:
        self._put(Type.WINDOW_UPDATE, 0, stream_id, _LONG.pack(size))

    def say_goodbye(self, code: Code, text: str) -> None:
        """GOAWAY: streams after the latest one are not served. Answers under way go on."""
        data = _LONG.pack(self._latest) + _LONG.pack(code) + text.encode("ascii", "replace")
        self._put(Type.GOAWAY, 0, 0, data)

    def _put(self, kind: Type, flags: int, stream_id: int, data: bytes) -> int:
        """Add a frame to those that are to be sent; returns its size."""
        size = len(data)
        self._out += HEADER.pack(size >> 8, size & 0xFF, kind, flags, stream_id), data
        size += HEADER_SIZE
        self.unsent += size
        return size

    def take(self) -> bytes:
        """What is to be sent now."""
        data = b"".join(self._out)
        self._out.clear()
        self.unsent = 0
        return data
