"""A target's side of an exchange in HTTP/2 (RFC 9113), as its client, with the library h2.

A `Connection` lies over one stream of the agent, which the agent joins to one connection of its
target. It carries one request at a time, as HTTP/1.1 does. So the target's flow control cannot let
visits hold each other up, no answer can go to the wrong visit, and the stream pool keeps such a
stream as it keeps others.

Two threads use it: the exchange's, and the upload's. One lock guards h2 and the events; no thread
holds it while it waits. Whichever thread needs something of the target reads, if the other one does
not read already. So a body moves on while the exchange's thread waits for a slow visitor: the
credit for it (WINDOW_UPDATE) is behind the answer's bytes, and the upload's thread reads both. In
the same way one thread sends what both have queued.
"""

import contextlib
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable
from http import HTTPStatus
from struct import Struct
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    InformationalResponseReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import DataFrame

from gotunnel import START_WINDOW, Deadline, Stream
from gotunnel_agent.common import http1
from gotunnel_agent.common.http1 import Fields, Malformed, Response

from .pages import RETRY
from .request import Request
from .target import TargetFailed, Unprocessed
from .work import Work

# Payload bytes of a frame that the target may send: the least that RFC 9113 §4.2 permits. Larger
# ones would not be faster.
FRAME_SIZE = 16_384
# The window of the whole connection. It never limits: the request's own window does, and beneath it
# that of the agent's stream.
CONNECTION_WINDOW = 2**31 - 1
PROTOCOL_WINDOW = 65_535  # before any WINDOW_UPDATE (RFC 9113 §6.9.2)
# Bytes of the answer that wait for a slow visitor; with more of them the upload's thread does not
# read. Then a target that is deaf to its visitor stops both.
MOST_UNREAD = START_WINDOW
QUANTUM = 64 * 1024  # bytes of a body that are framed before they are sent
# Bytes of our own frames (acknowledgements, credit) that the target has not read. More are an
# attack.
MOST_REPLIES = 256 * 1024
# Work budget for an answer's frames: frames a second in the long run, and at once. A frame takes
# some 25 µs of CPU time. Each FRAME_PAYLOAD bytes permit one more, so bulk data is never slowed.
FRAME_RATE, FRAME_BURST = 4000, 8000
FRAME_PAYLOAD = 1024

_HEADER = Struct("!HBBBL")  # length (24 bits), type, flags, stream id (RFC 9113 §4.1)
_SETTINGS_FRAME, _GOAWAY_FRAME = 4, 7
_GOAWAY = Struct("!LL")  # last stream id, code
_ACK = 1  # a flag of SETTINGS

_STATUS = re.compile(rb"[1-9][0-9][0-9]")
# Names and values with a line end behind each: a name in lower case; a value without control
# characters, and without white space at its ends (§8.2.1).
_FIELDS = re.compile(
    rb"(?:[!#$%&'*+\-.^_`|~0-9a-z]+\n(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?\n)*"
)
_LENGTH = re.compile(r"[0-9]{1,18}")  # as in http1.py
_REASONS = {status.value: status.phrase for status in HTTPStatus}
_NO_CONTENT = (204, 304)

_CONFIG = H2Configuration(
    client_side=True,
    # read_block() checks answers; the request's fields come from a parser as strict as h2's.
    validate_inbound_headers=False,
    normalize_inbound_headers=False,
    validate_outbound_headers=False,
)
_SETTINGS = {
    SettingCodes.ENABLE_PUSH: 0,
    SettingCodes.INITIAL_WINDOW_SIZE: START_WINDOW,
    SettingCodes.MAX_FRAME_SIZE: FRAME_SIZE,
    SettingCodes.MAX_HEADER_LIST_SIZE: http1.HEAD_LIMIT,
}


# Its lines at debug level have each field and its value, secrets too.
logging.getLogger("hpack").setLevel(logging.INFO)
# h2 has each frame that comes written out, for a log that it does not write: of DATA that takes
# more time than all else.
DataFrame.__repr__ = object.__repr__  # type: ignore[method-assign]


class _H2(H2Connection):
    # How many closed streams are remembered. h2's default of 65536 costs megabytes.
    MAX_CLOSED_STREAMS = 64


class GoAway(NamedTuple):
    """The target takes no request on this connection after ``last_id``."""

    last_id: int
    code: int


class Cutter:
    """Cuts a target's bytes into frames, and counts them.

    h2 would end the connection at GOAWAY, though the answer may go on behind it (RFC 9113 §6.8). So
    h2 does not see these frames.
    """

    def __init__(self) -> None:
        self.frames = 0  # so far
        self._held = b""  # an unfinished one

    def feed(self, data: bytes) -> list[bytes | GoAway]:
        """Take the next bytes; whole frames for h2 and GOAWAYs, in order. Raises Malformed."""
        data = self._held + data
        found: list[bytes | GoAway] = []
        at = begun = 0
        while len(data) - at >= _HEADER.size:
            high, low, kind, flags, _ = _HEADER.unpack_from(data, at)
            length = high << 8 | low
            if not self.frames and (kind != _SETTINGS_FRAME or flags & _ACK):
                what = "HTTP/1" if data.startswith(b"HTTP/") else f"a frame of type {kind}"
                raise Malformed(400, f"{what} came first, expected the SETTINGS of HTTP/2")
            if length > FRAME_SIZE:
                raise Malformed(400, f"frame of {length} bytes, expected at most {FRAME_SIZE}")
            end = at + _HEADER.size + length
            if end > len(data):
                break
            self.frames += 1
            if kind == _GOAWAY_FRAME:
                if length < _GOAWAY.size:
                    raise Malformed(400, f"GOAWAY of {length} bytes, expected {_GOAWAY.size}")
                found += [data[begun:at]] if at > begun else []
                last_id, code = _GOAWAY.unpack_from(data, at + _HEADER.size)
                found.append(GoAway(last_id & 0x7FFF_FFFF, code))
                begun = end
            at = end
        found += [data[begun:at]] if at > begun else []
        self._held = data[at:]
        return found


class Connection:
    """The state of an HTTP/2 connection, which lies with its stream between two exchanges."""

    def __init__(self) -> None:
        h2 = self.h2 = _H2(_CONFIG)
        h2.local_settings = Settings(client=True, initial_values=_SETTINGS)
        h2.initiate_connection()
        h2.increment_flow_control_window(CONNECTION_WINDOW - PROTOCOL_WINDOW)
        self.cutter = Cutter()
        self.work = Work(FRAME_RATE, FRAME_BURST)


# The connections of streams that rest in the pool.
_resting: WeakKeyDictionary[Stream, Connection] = WeakKeyDictionary()


class Http2Target:
    """A target.Target that speaks HTTP/2."""

    _stream: Stream
    _connection: Connection
    _h2: H2Connection

    def __init__(
        self,
        request: Request,
        fields: list[tuple[str, str]],
        next: Callable[[float | None], Any],
        timeout: float,
        scheme: str,
    ):
        """As Http1Target; ``scheme`` is "https" if the agent speaks TLS with the target."""
        self._request = request
        self._next = next
        self._timeout = timeout
        self._block = _request_block(request, fields, scheme)
        self._interim = 0  # bytes of interim heads, of which all together are limited
        self._no_content = False  # the final answer has no body by its status or the method
        self.arrived: list[Event] = []
        self.length: int | None = None
        self.trailers: Iterable[tuple[str, str]] = ()
        self.reusable = self.shareable = False
        self._id = 0  # the request's stream in HTTP/2
        self._window = START_WINDOW  # bytes that the target may have on their way to us
        self._changed = threading.Condition()  # guards all below; notified when any of it changes
        self._begin()

    def _begin(self) -> None:
        """The state of a request that was not sent yet."""
        self._pending: deque[memoryview] = deque()  # pieces of the body that no window permits yet
        self._body_complete = not self._request.has_body  # no more pieces will come
        self._trailers: list[tuple[str, str]] = []  # of the request, once its body is complete
        self._sent_all = self._body_complete  # END_STREAM is queued
        self._output = bytearray()
        self._events: list[Event] = []  # of the answer, not read yet
        self._unread = 0  # bytes of payload in them
        self._ended = False  # the answer's end has come
        self._going_away = False
        self._broken: Exception | None = None  # nothing more comes
        self._at_end = False  # the agent's stream has ended, and so the connection
        self._reading = self._sending = False  # a thread is at it

    # The request

    @property
    def unsent(self) -> bool:
        return not self._sent_all and (self._body_complete or bool(self._pending))

    def opening(self, stream: Stream | None) -> bytes:
        self._begin()
        kept = None
        if stream is not None:
            self.carried_by(stream)
            kept = _resting.pop(stream, None)
        self._connection = kept or Connection()
        self._h2 = self._connection.h2
        try:
            self._id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(self._id, self._block, end_stream=not self._request.has_body)
        except ProtocolError as error:  # the target permits no request at all on this connection
            raise Unprocessed(str(error)) from None
        return self._h2.data_to_send()

    def carried_by(self, stream: Stream) -> None:
        self._stream = stream

    def framed(self, pieces: list[bytes]) -> bytes:
        self._take_pieces(pieces)
        with self._changed:
            self._queue_body()
            data, self._output = bytes(self._output), bytearray()
        return data

    def send_body(self, pieces: list[bytes], timeout: float) -> None:
        self._take_pieces(pieces)
        while True:
            with self._changed:
                self._check_wanted()
                self._queue_body()
                blocked = bool(self._pending)
            self._send(wait=True)
            if not blocked:
                return
            if not self._await(self._may_send, timeout, MOST_UNREAD):
                raise TimeoutError(f"the target has granted nothing for {timeout:g} s")

    def _take_pieces(self, pieces: list[bytes]) -> None:
        complete = self._request.body_complete  # not under the lock: the visitor's side has its own
        trailers = list(self._request.trailers) if complete else []
        with self._changed:
            self._pending += map(memoryview, pieces)  # cutting them copies nothing
            self._body_complete = complete
            self._trailers = [(name.lower(), value) for name, value in trailers]

    def _check_wanted(self) -> None:
        if self._broken or self._at_end or self._ended:
            raise ConnectionAbortedError("the target wants no more of the body")

    def _may_send(self) -> bool:
        gone = self._broken or self._at_end or self._ended
        return bool(gone) or self._h2.local_flow_control_window(self._id) > 0

    def _queue_body(self) -> None:
        """Frame what the windows permit, QUANTUM at most. Caller holds the lock."""
        h2, pending, trailers = self._h2, self._pending, self._trailers
        try:
            while pending:
                piece = pending[0]
                window = h2.local_flow_control_window(self._id)
                room = min(window, h2.max_outbound_frame_size, QUANTUM - len(self._output))
                if room <= 0:
                    return
                if len(piece) > room:
                    pending[0], piece = piece[room:], piece[:room]
                else:
                    pending.popleft()
                self._sent_all = self._body_complete and not (pending or trailers)
                h2.send_data(self._id, bytes(piece), end_stream=self._sent_all)
                self._output += h2.data_to_send()
            if self._body_complete and not self._sent_all:
                self._sent_all = True
                if trailers:
                    h2.send_headers(self._id, _encoded(trailers), end_stream=True)
                else:
                    h2.end_stream(self._id)
                self._output += h2.data_to_send()
        except ProtocolError as error:
            raise ConnectionAbortedError(str(error)) from None

    def _send(self, *, wait: bool) -> None:
        """Send what is queued. If the other thread is sending, it sends this, too; ``wait``: until
        it has."""
        with self._changed:
            while self._sending:
                if not wait:
                    return
                self._changed.wait()
            self._sending = True
        try:
            while data := self._next_output():
                self._stream.write(data, self._timeout)
        except OSError:
            with self._changed:
                self._sending = False
                self._changed.notify_all()
            if wait:  # else read() says what has become of the stream, behind the answer's rest
                raise

    def _next_output(self) -> bytes:
        with self._changed:
            data, self._output = bytes(self._output), bytearray()
            if not data:
                self._sending = False
            self._changed.notify_all()
        return data

    # Reading

    def read(self, timeout: float) -> list[Event]:
        if not self._await(self._has_news, timeout):
            raise TimeoutError("timed out")
        with self._changed:
            events, self._events, self._unread = self._events, [], 0
            if not events and self._broken:
                raise self._broken
        return events

    def _has_news(self) -> bool:
        return bool(self._events or self._broken or self._at_end)

    def _await(
        self, ready: Callable[[], bool], timeout: float, most_unread: float = float("inf")
    ) -> bool:
        """Wait until ``ready()``, and read meanwhile, unless the other thread does, or
        ``most_unread`` bytes of the answer are here. False if ``timeout`` seconds have passed."""
        deadline = Deadline(timeout)
        while True:
            with self._changed:
                if ready():
                    return True
                left = deadline.left() or 0.0
                if left <= 0:
                    return False
                if self._reading or self._unread >= most_unread:
                    self._changed.wait(left)
                    continue
                self._reading = True
            self._read_once(left)
            self._send(wait=False)

    def _read_once(self, timeout: float) -> None:
        """Read what has come, and wake the other thread. The caller has set _reading."""
        found: list[bytes | GoAway] = []
        problem: Exception | None = None
        at_end = False
        try:
            data = self._stream.read(timeout=timeout)
            at_end = not data
            cutter = self._connection.cutter
            before = cutter.frames
            found = cutter.feed(data)
            self._connection.work.spend(cutter.frames - before - len(data) // FRAME_PAYLOAD)
        except TimeoutError:
            pass
        except (ConnectionError, Malformed) as error:
            problem = error
        with self._changed:
            self._reading = False
            self._at_end |= at_end
            try:
                for item in found:
                    self._take(item)
            except ProtocolError as error:  # h2 has queued a GOAWAY
                problem = Malformed(400, f"HTTP/2: {error}")
            self._output += self._h2.data_to_send()
            if len(self._output) > MOST_REPLIES:
                problem = problem or ConnectionAbortedError("the target reads nothing it is sent")
            self._broken = self._broken or problem
            self._changed.notify_all()

    def _take(self, item: bytes | GoAway) -> None:
        """Caller holds the lock. Raises ProtocolError."""
        if isinstance(item, GoAway):
            self._going_away = True
            if item.last_id < self._id and not self._ended:
                text = f"the target goes away before this request ({_name(item.code)})"
                self._broken = self._broken or Unprocessed(text)
            return
        for event in self._h2.receive_data(item):
            number = getattr(event, "stream_id", 0)
            if number not in (0, self._id):
                raise ProtocolError(f"a frame of stream {number}, expected {self._id}")
            if isinstance(event, StreamReset):
                if not self._ended:
                    refused = event.error_code == ErrorCodes.REFUSED_STREAM
                    kind = Unprocessed if refused else ConnectionResetError
                    text = f"the target has reset the request ({_name(event.error_code)})"
                    self._broken = self._broken or kind(text)
            elif isinstance(event, _ANSWER):
                if isinstance(event, DataReceived):
                    self._unread += event.flow_controlled_length
                self._ended |= isinstance(event, StreamEnded)
                self._events.append(event)

    # The answer

    def read_head(self) -> Response:
        events = self.arrived or self._next(self._timeout)
        if not events:
            text = f"The site broke off in the middle of its answer. {RETRY}"
            raise TargetFailed(502, "no-answer", text)
        event, self.arrived = events[0], events[1:]
        if not isinstance(event, (InformationalResponseReceived, ResponseReceived)):
            raise Malformed(400, f"{type(event).__name__} came before the answer's head")
        status, items = read_block(event.headers)
        if status is None or status == 101:
            raise Malformed(400, f"status {status or 'missing'}, expected one of HTTP/2")
        response = Response(status, _REASONS.get(status, ""), 1, Fields(items))
        if status < 200:
            self._interim += sum(len(name) + len(value) for name, value in items) + 32
            if self._interim > http1.HEAD_LIMIT:
                text = f"interim answers of {self._interim} bytes, expected the final one"
                raise Malformed(431, text)
            return response
        self.length = _stated_length(response.fields)
        self._no_content = self._request.method == "HEAD" or status in _NO_CONTENT
        if not self._no_content and any(isinstance(event, StreamEnded) for event in self.arrived):
            if all(isinstance(event, StreamEnded) for event in self.arrived):
                self._check_length(0)
                self.length = 0
        return response

    def pass_body(self, send: Callable[[list[bytes]], None]) -> list[bytes]:
        size = credit = 0
        while True:
            pieces: list[bytes] = []
            ended = False
            for event in self.arrived:
                if isinstance(event, DataReceived):
                    credit += event.flow_controlled_length
                    pieces += [event.data] if event.data else []
                elif isinstance(event, TrailersReceived):
                    self.trailers = _read_trailers(event.headers)
                else:
                    ended = True
            size += sum(map(len, pieces))
            if self._no_content:
                if size:
                    raise Malformed(400, f"{size} bytes in an answer that has no body")
                ended = True
                break
            if self.length is not None and size > self.length or ended:
                self._check_length(size)
            if ended:
                break
            send(pieces)
            self._grant(credit)
            credit = 0
            self.arrived = self._next(None)
            if not self.arrived:
                text = f"The site broke off in the middle of its answer. {RETRY}"
                raise TargetFailed(502, "cut-short", text)
        self._grant(credit)
        with self._changed:
            whole = self._ended and self._sent_all and not self._output
            self.shareable = whole and not (self._broken or self._at_end or self._going_away)
        self.reusable = self.shareable
        if self.shareable:
            _resting[self._stream] = self._connection
        return pieces

    def _check_length(self, size: int) -> None:
        if self.length not in (None, size):
            raise Malformed(400, f"body of {size} bytes, its content-length is {self.length}")

    def _grant(self, credit: int) -> None:
        """The visitor has taken ``credit`` bytes: permit the target as many. The window grows as
        that of the agent's stream does, which fits the round trip to the agent."""
        if not credit:
            return
        with self._changed:
            try:
                more = self._stream.window - self._window
                if more > 0 and not self._ended:
                    self._window += more
                    self._h2.increment_flow_control_window(more, self._id)
                self._h2.acknowledge_received_data(credit, self._id)
            except ProtocolError:  # the connection is broken, which read() says
                return
            self._output += self._h2.data_to_send()
        self._send(wait=False)

    def reset(self) -> None:
        with self._changed:
            with contextlib.suppress(ProtocolError):  # it is over already
                if not (self._ended and self._sent_all):
                    self._h2.reset_stream(self._id, ErrorCodes.CANCEL)
            self._output += self._h2.data_to_send()
            data = b"" if self._sending else bytes(self._output)
            self._broken = self._broken or ConnectionAbortedError("the request was given up")
            self._changed.notify_all()
        with contextlib.suppress(OSError):  # the target does not get it: the end says the same
            self._stream.write(data, 0)
        self._stream.cut()


_ANSWER = (
    InformationalResponseReceived,
    ResponseReceived,
    DataReceived,
    TrailersReceived,
    StreamEnded,
)


def _name(code: ErrorCodes | int) -> str:
    try:
        return ErrorCodes(code).name
    except ValueError:
        return f"code {code}"


def _request_block(
    request: Request, fields: list[tuple[str, str]], scheme: str
) -> list[tuple[bytes, bytes]]:
    """The header list of a request. ``fields`` are those that an HTTP/1.1 target would get."""
    authority = next(value for name, value in fields if name.lower() == "host")
    block = [
        (":method", request.method),
        (":scheme", scheme),
        (":authority", authority),
        (":path", request.path),
    ]
    block += [(low, value) for name, value in fields if (low := name.lower()) != "host"]
    if "trailers" in request.fields.tokens("te"):  # gRPC's servers insist on it
        block.append(("te", "trailers"))
    if request.body_length is not None and request.has_body:
        block.append(("content-length", str(request.body_length)))
    return _encoded(block)


def _encoded(items: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in items]


def read_block(block: Iterable[tuple[bytes, bytes]]) -> tuple[int | None, list[tuple[str, str]]]:
    """The status in a header list of a target, None if there is none, and the fields. Raises
    Malformed."""
    status: int | None = None
    items: list[tuple[str, str]] = []
    lines: list[bytes] = []
    for name, value in block:
        if name[:1] == b":":
            if name != b":status" or status is not None or items or not _STATUS.fullmatch(value):
                raise Malformed(400, "a pseudo-header field that is unknown, twice, late or wrong")
            status = int(value)
        else:
            lines += name, value
            items.append((name.decode("latin-1"), value.decode("latin-1")))
    # Checked as one text: with a line end in a name or value there are more lines than these.
    text = b"".join(line + b"\n" for line in lines)
    if text.count(b"\n") != 2 * len(items) or not _FIELDS.fullmatch(text):
        raise Malformed(400, "a field with characters that HTTP/2 does not permit")
    if len(items) > http1.FIELD_LIMIT:
        raise Malformed(431, f"{len(items)} fields, expected at most {http1.FIELD_LIMIT}")
    return status, items


def _read_trailers(block: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    status, items = read_block(block)
    if status is not None:
        raise Malformed(400, ":status in trailers")
    return [item for item in items if not http1.comes_too_late(item[0])]


def _stated_length(fields: Fields) -> int | None:
    lengths = set(fields.all("content-length"))
    if not lengths:
        return None
    length = lengths.pop()
    if lengths or not _LENGTH.fullmatch(length):
        raise Malformed(400, "a content-length that is not one number of 1 to 18 digits")
    return int(length)
