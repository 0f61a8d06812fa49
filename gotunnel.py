"""gotunnel, the wire: everything that an agent and a gateway say to each other.

An agent runs beside a private service, its target, and opens one TLS connection to a gateway. A
visitor connects to the gateway, which passes the visit on to the agent through that connection.
In this diagram an agent registers ``app.example.com``, then a visitor makes a request:

    visitor            gateway                                agent           target
       |                  |<==== TLS, then yamux: one session ===|               |
       |                  |<---- stream 1, the control stream ---|               |
       |                  |      {"type":"register", ...}        |               |
       |                  |----- {"type":"ack","ok":true} ------>|               |
       |-- https:// ----->|                                      |               |
       |                  |----- SYN, stream 2 ----------------->|               |
       |                  |----- 01 000f app.example.com ------->|-- connect --->|
       |                  |<---- ACK, stream 2 ------------------|               |
       |                  |===== the request's bytes ===========>|==============>|
       |<== answer =======|<==== the answer's bytes =============|<==============|
       |                  |----- FIN --------------------------->|-- close ----->|

yamux is a multiplexer: it carries many streams, each a two-way pipe of bytes, over one connection.
Both sides send frames: a header of 12 bytes, and in DATA frames a payload behind it. A stream lives
like a TCP connection: SYN opens it, ACK accepts it, FIN ends one direction (half-close), RST aborts
both. A slow reader of one stream must not stop the others (head-of-line blocking). So each stream
has a flow control window for each direction: the number of bytes that its receiver still permits.
WINDOW_UPDATE frames add credit to it as the receiver uses the bytes. PING asks for a sign of life,
GO_AWAY says that its sender accepts no more streams.

The agent dials, so it is the yamux client, and its streams have odd numbers. It opens only one, the
control stream: JSON messages, one a line. The gateway opens a data stream for each visit, or reuses
one whose last exchange is complete; their numbers are even. A data stream starts with the data
header, which names the hostname. From then on it carries the raw bytes of the visit. Every 15
seconds the gateway sends ``{"type":"ping"}`` on the control stream, and the agent answers with a
pong. An agent that has asked for it also gets the state of its certificates there
(``{"type":"certificate"}``), and why the gateway ends the session (``{"type":"end"}``).

This file is meant to be read from top to bottom:

    pure       errors, frames, Mux (the rules of yamux), control messages, the data header.
               Bytes in, events and frames out: no clock, no threads, no sockets.
    a banner   a line of "=" across the page
    impure     threads, Waker, Bell; Session (a Mux driven by threads, with its parts Timers, Sender
               and StreamTable) and Stream.
    process    what all sessions of the process share: its memory.

A Session works over a Duplex: the TLS connection, of which one thread may read while another one
writes. Visitors and targets have one too: see gotunnel_agent/common/duplex.py.

Importing this file imports no other file of ours and changes nothing in the process. A session has
one thread, the demultiplexer; its end wakes all callers that wait.

Source: github.com/hashicorp/yamux, spec.md. Where we differ from it, the text says "we".
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import json
import math
import re
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, NoReturn, TypeVar, get_type_hints

__version__ = "0.2.0"

BytesLike = bytes | bytearray | memoryview
Callback = Callable[[], None]
T = TypeVar("T")


# Errors ------------------------------------------------------------------------------------------


class ProtocolError(Exception):
    """The peer broke a rule of the protocol; the session or connection is over."""


class SessionClosed(ConnectionError):
    """The session has ended, or accepts no new streams; the text says why."""


class StreamReset(ConnectionError):
    """The peer, or this side, aborted the stream with RST.

    ``code`` says why: the length field of the RST frame, 0 from a peer that does not use it.
    """

    def __init__(self, text: str = "the peer reset the stream", code: int = 0):
        super().__init__(text)
        self.code = code


# Frames (yamux spec, "Framing") ------------------------------------------------------------------

VERSION = 0
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
NORMAL, PROTOCOL_ERROR, INTERNAL_ERROR = range(3)  # codes in a GO_AWAY frame
# Codes in the length field of a RST frame. They are ours: a Go peer ignores them. A code keeps its
# meaning for ever, since agents and gateways of different versions meet.
REFUSED = 1  # the agent has no target for the stream
# Why the agent rejects an http visit (feature REFUSALS); common/refusals.py has the texts.
TARGET_UNREACHABLE, TARGET_TIMED_OUT, TARGET_UNTRUSTED, TARGET_MISCONFIGURED = 2, 3, 4, 5

HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
HEADER_SIZE = HEADER.size
HTTP_ANSWER = b"HTTP/1."  # from a gateway's port for visitors: the agent has a wrong port
SPEAKS_HTTP = "an answer in HTTP, expected frames"  # the error that then ends the session
MAX_UINT32 = 0xFFFFFFFF  # the largest stream id, length and window


class Header(NamedTuple):
    """The 12 bytes before every frame.

    ``length`` depends on the type. DATA: the payload bytes that follow; no other type has any.
    WINDOW_UPDATE: credit in bytes. PING: a value that the answer repeats. GO_AWAY: a code.
    ``stream_id`` is 0 in PING and GO_AWAY, which concern the session.
    """

    type: int
    flags: int
    stream_id: int
    length: int

    def encode(self) -> bytes:
        return HEADER.pack(VERSION, *self)


def unpack_header(data: BytesLike, at: int = 0) -> tuple[int, int, int, int]:
    """Read the fields of a Header at ``at``; raises ProtocolError if the version or the type is
    unknown."""
    version, kind, flags, stream_id, length = HEADER.unpack_from(data, at)
    if version != VERSION:
        if data[at : at + len(HTTP_ANSWER)] == HTTP_ANSWER:
            raise ProtocolError(SPEAKS_HTTP)
        raise ProtocolError(f"frame version {version}, expected {VERSION}")
    if kind > GO_AWAY:
        raise ProtocolError(f"frame type {kind}, expected 0 to {GO_AWAY}")
    return kind, flags, stream_id, length


# Mux: the rules ----------------------------------------------------------------------------------

# Windows. A stream moves at most one window in a round trip: 1 MiB at 50 ms is 20 MB/s.
INITIAL_WINDOW = 256 * 1024  # bytes each way before any credit (yamux spec, "Flow Control")
START_WINDOW = 4 * INITIAL_WINDOW  # receive window of new streams once the peer is authenticated
MUCH_HELD = 16 * START_WINDOW  # with more bytes in a session's buffers, new windows stay initial
SHARED_WINDOW = 2 * INITIAL_WINDOW  # to which it shrinks beside other busy streams on a near line
MAX_WINDOW = 64 * 1024 * 1024  # no window grows beyond: 335 MB/s at 200 ms, about what we can do
SESSION_GROWTH = 128 * 1024 * 1024  # bytes that all windows of a session together may grow by
CREDIT = 1024 * 1024  # a WINDOW_UPDATE is sent for this many used bytes, or for half a window
IDLE_WINDOW = 10  # seconds; if using half of a grown window takes longer, it shrinks

# Streams.
OPEN_BACKLOG = 256  # streams that we opened and the peer has not accepted: as Go's yamux allows
ACCEPT_BACKLOG = 256  # streams that the peer opened and we have not accepted: as Go's yamux opens
MAX_STREAMS = 1024  # open streams of the peer: 256 MiB, if all initial windows are full
LAST_ID = MAX_UINT32 - 2  # a Go peer opens no stream above it, and neither do we
KEEP_ALIVE = 10  # seconds between pings. A peer that sent nothing since the last ping is dead
DISCARD_LIMIT = 1 << 30  # bytes that we discard of a closed stream before we reset it. It is so
# large because Go's gateway sends the whole of a request before it reads the answer

# Output.
SEND_BUFFER = 256 * 1024  # unsent bytes of one stream; more would use memory and bring no speed
SEND_QUEUE = 8 * 1024 * 1024  # unsent bytes of all streams; above it each may queue FRAME_SHARED
MAX_REPLIES = 32 * 1024  # unsent pongs and resets; above it the peer has stopped reading
# Payload of a DATA frame. With its header it fills four records of TLS, or one.
FRAME_ALONE = 64 * 1024 - HEADER_SIZE  # if only one stream sends: few headers
FRAME_SHARED = 16 * 1024 - HEADER_SIZE  # if several streams send: none waits long for its turn
SMALL = 1024  # bytes; smaller pieces of payload are joined, since each Python object costs memory

# Useless frames (_waste) cost us work: many of them are a denial of service (compare HTTP/2's rapid
# reset, CVE-2023-44487). The budget is large enough for an honest peer: a ping every 10 to 30 s; at
# most LATE_FRAMES frames of a stream that we have ended (credit, ACK, FIN, RST); and streams that
# it opens and resets at once, because their visitors left while the connection hung for a minute.
WASTE, WASTE_A_SECOND = 4096, 64  # allowed in a burst, and per second (token bucket)
WASTE_A_STREAM, WASTE_A_STREAM_SECOND = 128, 2  # added to these for each stream of max_streams
LATE_FRAMES = 4
EARNED = 64 * 1024  # most that our DATA frames and ended streams may add to the budget


class Opened(NamedTuple):
    """The peer opened a stream. Answer it with accept() or reset()."""

    stream_id: int


class Received(NamedTuple):
    """Payload of a stream. Call consumed() once it is used, or the peer runs out of window."""

    stream_id: int
    payload: bytes


class Finished(NamedTuple):
    """The peer half-closed the stream: it sends no more payload."""

    stream_id: int


class WasReset(NamedTuple):
    """The peer reset the stream, or made us reset it by breaking a rule.

    ``cut``: payload was lost, so unread payload must be dropped too, or it would look complete.
    """

    stream_id: int
    code: int
    reason: str
    cut: bool = False


class Writable(NamedTuple):
    """The peer gave credit: room() of the stream may have grown."""

    stream_id: int


class Answered(NamedTuple):
    """The peer answered a stream that we opened: may_open may be true again."""

    stream_id: int


class GoneAway(NamedTuple):
    """The peer accepts no more streams. Any code but NORMAL ends the session."""

    code: int


Event = Opened | Received | Finished | WasReset | Writable | Answered | GoneAway
Events = list[Event]
NEVER = math.inf  # an instant that is not reached


class _Flow:
    """What the Mux knows of one stream. Received bytes are "used" once a thread has read them."""

    __slots__ = ("id", "may_send", "window", "grown", "may_receive", "owed", "used", "since",
                 "kept_up", "queue", "queued", "in_rotation", "finishing", "cutting", "sent_fin",
                 "got_fin", "discarding", "discarded", "alive")  # fmt: skip

    def __init__(self, stream_id: int, window: int):
        self.id = stream_id
        self.may_send = INITIAL_WINDOW  # send window: bytes the peer still permits, less the queue
        self.window = window  # receive window: bytes that may be on their way to us or unused here
        self.grown = 0  # how much it has grown
        self.may_receive = window  # bytes that the peer may still send
        self.owed = 0  # bytes used here, for which the peer has no credit yet
        # Bytes used since the instant ``since``, when the first payload came or half a window had
        # been used; and whether the reader has had all that had come, at any time after it.
        self.used, self.since, self.kept_up = 0, NEVER, False
        self.queue: deque[BytesLike] = deque()  # payload to be sent
        self.queued = 0  # bytes in it
        self.in_rotation = False  # it is in Mux._rotation, to send payload or FIN
        self.finishing = False  # a FIN follows the queue, or was sent
        self.cutting = False  # a RST follows the queue and the FIN
        self.sent_fin = self.got_fin = False
        self.discarding = False  # payload that comes is dropped
        self.discarded = 0  # bytes of it
        self.alive = True


class Memory:
    """The memory that all sessions of a process may use for payload; each has an Account with it.

    ``buffered`` bytes are in memory now: received and not used, or written and not sent.
    ``promised`` bytes may come in addition: the sum by which windows have grown. When much is
    buffered, new windows start small and none grows. A session may never buffer more than is left
    for all others, so one that holds much cannot starve one that holds little.
    """

    # Bytes that a session may buffer however short memory is; below it, no stream of it is reset.
    FLOOR = START_WINDOW

    def __init__(self, machine: int = 1 << 32, lock: AbstractContextManager[Any] = nullcontext()):
        """``machine`` is the memory of the machine in bytes. Several threads need a ``lock``."""
        self.limit = machine // 4  # of buffered bytes; the rest is for threads, TLS and all else
        self.buffered = self.promised = 0
        self.lock = lock

    @property
    def scarce(self) -> bool:
        """Whether so much is buffered that windows must stay small."""
        return self.buffered > self.limit // 2

    @property
    def share(self) -> int:
        """Bytes that one session may buffer now: as much as is free. So the first can hold half of
        the limit, the second half of the rest, and so on."""
        return max(self.limit - self.buffered, self.FLOOR)


class Account:
    """One session's part of a Memory. Not for two threads at once.

    The session adds to ``held`` the bytes that enter a buffer, takes off those that leave it, and
    calls tell() once ``held`` is not between ``low`` and ``high``.
    """

    STEP = 256 * 1024  # smaller changes are not reported to the Memory: all sessions share its lock

    def __init__(self, memory: Memory):
        self.memory = memory
        self.promised = 0
        self.held = self._told = 0
        self.low: float = -self.STEP
        self.high: float = self.STEP

    def tell(self) -> None:
        """Report to the Memory what is held."""
        with self.memory.lock:
            self.memory.buffered += self.held - self._told
        self._told = self.held
        self.low, self.high = self.held - self.STEP, self.held + self.STEP

    def promise(self, count: int) -> bool:
        """Permit a window to grow by ``count`` bytes, or return False: it may take half of the
        growth that is left to its session and to the process, so that others can grow too."""
        memory = self.memory
        with memory.lock:
            left = min(SESSION_GROWTH - self.promised, memory.limit // 2 - memory.promised)
            if memory.scarce or count > left // 2:
                return False
            memory.promised += count
        self.promised += count
        return True

    def take_back(self, count: int) -> None:
        """Return what was promised to a window that has shrunk, or is gone."""
        with self.memory.lock:
            self.memory.promised -= count
        self.promised -= count

    def close(self) -> None:
        """Return everything. Payload that is still read afterwards is not counted any more."""
        self.take_back(self.promised)
        self.held = 0
        self.tell()
        self.low, self.high = -math.inf, math.inf


class Mux:
    """All the rules of yamux for one session, for either role.

    Bytes from the peer go into receive(), which returns events. Bytes for the peer come out of
    pull(). One promise: whatever bytes come, receive() raises ProtocolError or nothing. After a
    ProtocolError the session is over; go_away() and pull() still work, to tell the peer.

    ``now`` is in seconds, of any clock that never goes back. Not for two threads at once: the
    caller holds a lock around every call.
    """

    def __init__(self, *, client: bool, window: int = INITIAL_WINDOW,
                 max_streams: int = MAX_STREAMS, account: Account | None = None):  # fmt: skip
        """``window`` is the receive window of a new stream, ``max_streams`` the number of streams
        that the peer may have open at a time. The caller closes ``account``."""
        if not INITIAL_WINDOW <= window <= MAX_WINDOW:
            raise ValueError(f"window {window}, expected {INITIAL_WINDOW} to {MAX_WINDOW}")
        self._window = window  # receive window of new streams
        self._largest = window  # the largest receive window so far
        self._max_streams = max_streams
        self._account = account or Account(Memory())
        self._parity = 0 if client else 1  # of the ids that the peer may use
        self._next_id = 1 if client else 2
        self._flows: dict[int, _Flow] = {}  # by stream id
        self._unanswered: dict[int, float] = {}  # by stream id: when we opened it; until an answer
        self._unaccepted: set[int] = set()  # ids that the peer opened and we have not accepted
        self._inbound = 0  # streams in _flows that the peer opened
        self._overran = False  # the peer has exceeded a window once
        self._most_waste = WASTE + WASTE_A_STREAM * max_streams
        self._waste_a_second = WASTE_A_SECOND + WASTE_A_STREAM_SECOND * max_streams
        self._wasted = 0.0  # useless frames, less the allowance of _waste(); negative if none
        self._late = 0  # bytes that may still come for streams that we have reset
        self._now = self._wasted_at = 0.0
        self._watched_at: float | None = None  # when keep_alive() was called last
        self._asked_at = 0.0  # when the last ping was queued
        self._asked: int | None = None  # its value, until the pong comes
        self._pings = 0  # sent so far
        self._credited = 0  # the stream that was due credit last
        self.round_trip: float | None = None  # seconds, the shortest of all opens and pings
        self.we_left = False  # go_away() was called
        self.refuses = False  # ... and a stream that the peer opens is reset
        self.peer_left = False  # the peer sent GO_AWAY
        self.strays = 0  # frames of unknown streams
        self.refused = 0  # streams of the peer that we reset because there were too many

        # Input: part of a header, or a DATA frame of which _body_left bytes have not come.
        self._partial = b""
        self._body_left = 0
        self._body_flow: _Flow | None = None  # None: the payload is dropped
        self._body_ends = False  # the frame has FIN

        # Output, sent in this order: nothing of a stream overtakes its SYN, in _control.
        self._replies: deque[bytes] = deque()  # headers: pongs, go away
        self._control: deque[bytes] = deque()  # headers: SYN, ACK, RST
        self._updates: dict[int, int] = {}  # by stream id: credit, added up until it is sent
        self._ping = b""  # a ping
        self._queued = 0  # bytes of unsent payload, of all streams
        self._rotation: deque[_Flow] = deque()  # streams with payload or FIN to send

    # From the peer

    def receive(self, data: BytesLike, now: float) -> Events:
        """Take bytes from the peer, in any pieces; return the events that they cause. Events hold
        copies, so the caller may use the buffer ``data`` again."""
        self._now = now
        events: Events = []
        at, end = 0, len(data)
        while at < end:
            if self._body_left:
                piece = bytes(data[at : at + self._body_left])
                at += len(piece)
                self._body_left -= len(piece)
                flow = self._body_flow
                if flow is None or not flow.alive:
                    continue
                if flow.discarding:
                    self._discard(flow, len(piece), events)
                else:
                    events.append(Received(flow.id, piece))
                if self._body_ends and not self._body_left:
                    self._peer_finished(flow, events)
                continue
            if self._partial or end - at < HEADER_SIZE:
                missing = HEADER_SIZE - len(self._partial)
                self._partial += data[at : at + missing]
                at += missing
                if len(self._partial) < HEADER_SIZE:
                    break
                kind, flags, stream_id, length = unpack_header(self._partial)
                self._partial = b""
            else:
                kind, flags, stream_id, length = unpack_header(data, at)
                at += HEADER_SIZE
            if kind == DATA:
                self._take_data(flags, stream_id, length, events)
            elif kind == WINDOW_UPDATE:
                self._take_window_update(flags, stream_id, length, events)
            elif kind == PING:
                self._take_ping(flags, length)
            else:
                self._take_go_away(length, events)
        return events

    def _discard(self, flow: _Flow, count: int, events: Events) -> None:
        flow.discarded += count
        if flow.discarded <= DISCARD_LIMIT:
            self.consumed(flow.id, count, self._now)
        else:
            self.reset(flow.id)
            events.append(WasReset(flow.id, 0, "the peer sent too much to a closed stream"))

    def _take_data(self, flags: int, stream_id: int, length: int, events: Events) -> None:
        if length > self._largest:  # no honest peer: it may never send more than a window
            raise ProtocolError(f"{length} bytes in a frame, our largest window is {self._largest}")
        flow = self._stream_of(DATA, flags, stream_id, length, events)
        self._body_left, self._body_flow, self._body_ends = length, None, False
        if flow is None:
            return  # the stream is over: its late payload is dropped
        if flow.got_fin:  # the peer said that it sends no more: drop the payload, count the frame
            self._waste("data behind FIN")
            return
        if length > flow.may_receive:
            self._overrun(flow, length, events)
            return
        flow.may_receive -= length
        if length:
            self._body_flow, self._body_ends = flow, bool(flags & FIN)
            if flow.since == NEVER:
                flow.since = self._now
        elif flags & FIN:
            self._peer_finished(flow, events)
        elif not flags & SYN:
            self._waste("data without payload")

    def _take_window_update(self, flags: int, stream_id: int, length: int, events: Events) -> None:
        flow = self._stream_of(WINDOW_UPDATE, flags, stream_id, length, events)
        if flow is None:
            return
        if length:
            flow.may_send += length
            if flow.may_send > MAX_UINT32:
                raise ProtocolError(f"stream {flow.id}: a window above {MAX_UINT32}")
            events.append(Writable(flow.id))
        if flags & FIN and not flow.got_fin:
            self._peer_finished(flow, events)
        elif not flags & SYN:
            # An honest peer sends credit at most once for each DATA frame of ours, and each of
            # these adds to the budget. So only credit without a cause uses the budget up.
            self._waste("credit")

    def _take_ping(self, flags: int, value: int) -> None:
        if flags & SYN:
            self._waste("pings")
            self._reply(self._replies, Header(PING, ACK, 0, value))
        elif flags & ACK and value == self._asked:
            self._measure(self._asked_at)
            self._asked = None  # a second pong does not count
        else:
            self._waste("pongs")

    def _take_go_away(self, code: int, events: Events) -> None:
        if self.peer_left:
            self._waste("GO_AWAY")
        self.peer_left = True
        events.append(GoneAway(code))

    def _measure(self, asked_at: float) -> None:
        """Learn the round trip time from an answer. The shortest one counts, since longer ones
        include waiting behind payload or for a CPU."""
        took = self._now - asked_at
        self.round_trip = took if self.round_trip is None else min(took, self.round_trip)

    def _stream_of(
        self, kind: int, flags: int, stream_id: int, length: int, events: Events
    ) -> _Flow | None:
        """Act on SYN, ACK and RST; return the frame's stream, or None if it is unknown or reset."""
        if flags & SYN:
            self._peer_opens(kind, flags, stream_id, length, events)
        flow = self._flows.get(stream_id)
        if flow is None:
            # A late frame of a stream that is over. Do not answer it with RST: the peer may have
            # forgotten the stream too, and two such peers would answer each other for ever.
            self.strays += 1
            if kind == DATA and 0 < length <= self._late:
                self._late -= length
            else:
                self._waste("frames of streams that are over")
            return None
        # The first frame that comes on a stream we opened is its answer, with ACK or without: a Go
        # peer that gets our FIN before it has accepted the stream never sends ACK. If only ACK
        # counted, such streams could fill OPEN_BACKLOG, and none could be opened meanwhile.
        if stream_id in self._unanswered:
            self._measure(self._unanswered.pop(stream_id))
            events.append(Answered(stream_id))
        if flags & RST:
            self._forget(flow)
            if stream_id % 2 == self._parity:
                self._waste("streams opened and reset")
            code = length if kind == WINDOW_UPDATE else 0
            events.append(WasReset(stream_id, code, "the peer reset the stream"))
            return None
        return flow

    def _peer_opens(
        self, kind: int, flags: int, stream_id: int, length: int, events: Events
    ) -> None:
        if stream_id == 0 or stream_id % 2 != self._parity:
            whose = "even" if self._parity == 0 else "odd"
            raise ProtocolError(f"the peer opened stream {stream_id}, its ids are {whose}")
        if stream_id in self._flows:
            raise ProtocolError(f"the peer opened stream {stream_id}, which is open")
        if flags & RST:
            return
        too_long = kind == DATA and length > INITIAL_WINDOW
        full = self._inbound >= self._max_streams or len(self._unaccepted) >= ACCEPT_BACKLOG
        self.refused += full
        if self.refuses or full or too_long or len(self._control) >= MAX_REPLIES:
            self._reply(self._control, Header(WINDOW_UPDATE, RST, stream_id, 0))
            return
        self._flows[stream_id] = _Flow(stream_id, INITIAL_WINDOW)
        self._unaccepted.add(stream_id)
        self._inbound += 1
        events.append(Opened(stream_id))

    def _waste(self, what: str) -> None:
        """Count a useless frame (token bucket). The budget refills with time, and with the causes
        of an honest peer's useless frames: our DATA frames, and streams that we end."""
        passed, self._wasted_at = self._now - self._wasted_at, self._now
        if self._wasted > 0:
            self._wasted = max(0, self._wasted - passed * self._waste_a_second)
        self._wasted = max(-EARNED, self._wasted) + 1
        if self._wasted > self._most_waste:
            raise ProtocolError(f"too many useless frames, the last of them: {what}")

    def _peer_finished(self, flow: _Flow, events: Events) -> None:
        flow.got_fin = True
        self._updates.pop(flow.id, None)  # nothing more comes, so no credit is needed
        events.append(Finished(flow.id))
        if flow.sent_fin:
            self._end_flow(flow)

    def _overrun(self, flow: _Flow, length: int, events: Events) -> None:
        """The peer exceeded a window. The first time resets the stream, the second time ends the
        session: a Go peer whose write timed out sends the bytes anyway and does not count them."""
        text = f"stream {flow.id}: {length} bytes came, {flow.may_receive} were permitted"
        if self._overran:
            raise ProtocolError(text)
        self._overran = True
        self.reset(flow.id)
        events.append(WasReset(flow.id, 0, text, cut=True))

    def _reply(self, queue: deque[bytes], header: Header) -> None:
        if len(self._replies) + len(self._control) >= MAX_REPLIES:
            raise ProtocolError(f"the peer has not read {MAX_REPLIES} pongs and resets")
        queue.append(header.encode())

    # From us

    def widen(self, window: int) -> None:
        """Give new streams a larger window, since the peer is authenticated now."""
        self._window, self._largest = window, max(window, self._largest)

    @property
    def may_open(self) -> bool:
        """Whether open() would stay within OPEN_BACKLOG."""
        return len(self._unanswered) < OPEN_BACKLOG

    def open(self, now: float) -> int:
        """Open a stream and return its id; raises SessionClosed if no more can be opened."""
        if self.we_left or self.peer_left:
            raise SessionClosed("the session takes no new streams")
        stream_id = self._next_id
        if stream_id > LAST_ID:
            raise SessionClosed("the session has used up its stream ids")
        self._next_id += 2
        self._flows[stream_id] = _Flow(stream_id, self._first_window())
        self._unanswered[stream_id] = now
        extra = self._flows[stream_id].window - INITIAL_WINDOW
        self._control.append(Header(WINDOW_UPDATE, SYN, stream_id, extra).encode())
        return stream_id

    def accept(self, stream_id: int) -> None:
        """Accept a stream that the peer opened. The ACK also announces our window."""
        if stream_id in self._unaccepted:
            self._unaccepted.discard(stream_id)
            flow = self._flows[stream_id]
            extra = self._first_window() - INITIAL_WINDOW
            flow.window += extra
            flow.may_receive += extra
            self._control.append(Header(WINDOW_UPDATE, ACK, stream_id, extra).encode())

    def _first_window(self) -> int:
        slow_readers = self._account.held > MUCH_HELD
        return INITIAL_WINDOW if slow_readers or self._account.memory.scarce else self._window

    def room(self, stream_id: int) -> int:
        """Bytes that send() takes now; 0 once the stream is over, or we have finished it."""
        flow = self._flows.get(stream_id)
        if flow is None or flow.finishing or flow.cutting:
            return 0
        # If much is unsent in the session (SEND_QUEUE, or less if memory is short; never below
        # FLOOR), a stream may only queue its next frame.
        crowded = self._queued >= Memory.FLOOR and self._queued >= min(
            SEND_QUEUE, self._account.memory.share
        )
        most = FRAME_SHARED if crowded else SEND_BUFFER
        return max(0, min(flow.may_send, most - flow.queued))

    def send(self, stream_id: int, payload: BytesLike) -> None:
        """Queue at most room() bytes of payload; this uses up the peer's window."""
        flow, size = self._flows.get(stream_id), len(payload)
        if flow is None or flow.finishing or flow.cutting or size > flow.may_send:
            raise ValueError(f"{size} bytes for a room of {self.room(stream_id)}")
        flow.may_send -= size
        flow.queued += size
        put(flow.queue, payload) if flow.queue else flow.queue.append(payload)
        self._count_queued(size)
        if not flow.in_rotation:
            self._rotate(flow)

    def _count_queued(self, count: int) -> None:
        account = self._account
        self._queued += count
        account.held += count
        if not account.low < account.held < account.high:
            account.tell()

    def finish(self, stream_id: int) -> None:
        """Half-close: send FIN after the queued payload. Never twice: a second FIN would make a Go
        peer end the session."""
        flow = self._flows.get(stream_id)
        if flow is not None and not (flow.finishing or flow.cutting):
            flow.finishing = True
            if not flow.in_rotation:
                self._rotate(flow)

    def reset(self, stream_id: int, code: int = 0) -> None:
        """Abort the stream: drop the queued payload and send RST. ``code``: see StreamReset."""
        flow = self._flows.get(stream_id)
        if flow is not None:
            self._end_flow(flow)
            self._control.append(Header(WINDOW_UPDATE, RST, stream_id, code).encode())

    def cut(self, stream_id: int, now: float) -> None:
        """Abort the stream, but send RST after what is queued, FIN included."""
        flow = self._flows.get(stream_id)
        if flow is None:
            return
        if flow.in_rotation:
            flow.cutting = True
            self.discard(stream_id, now)
        else:
            self.reset(stream_id)

    def consumed(self, stream_id: int, count: int, now: float) -> bool:
        """Count received bytes as used; True if that queued a WINDOW_UPDATE.

        Credit is sent for half a window or CREDIT, whichever is less. More often would cost too
        many frames; less often would leave the line idle while the credit travels."""
        flow = self._flows.get(stream_id)
        if flow is None or flow.got_fin:
            return False
        flow.owed += count
        flow.used += count
        flow.kept_up |= flow.owed == flow.window - flow.may_receive
        idle, crowds = flow.grown and now - flow.since > IDLE_WINDOW, False
        if flow.used >= flow.window // 2 or idle:
            if not idle:
                crowds = self._crowds_out(flow, now - flow.since)
                self._grow_window(flow, now - flow.since)
            flow.used, flow.since, flow.kept_up = 0, now, False
        if flow.owed < CREDIT and flow.owed < flow.window // 2 and not idle:
            return False
        if idle or crowds or self._unread(flow) > flow.window // 2:
            self._shrink_window(flow)
        first, self._credited = not self._credited, stream_id
        if not flow.owed:
            return False
        flow.may_receive += flow.owed
        self._updates[stream_id] = self._updates.get(stream_id, 0) + flow.owed
        flow.owed = 0
        if self.round_trip is None and not first and self._asked is None:
            self._ask(now)  # _grow_window() needs the round trip time, and no answer has given it
        return True

    def _grow_window(self, flow: _Flow, took: float) -> None:
        """Double a window of which half was used, in ``took`` seconds, within two round trips, if
        its reader keeps up. So it grows to four times the line's bandwidth-delay product."""
        if self.round_trip is None or took >= 2 * self.round_trip:
            return
        more = min(flow.window, MAX_WINDOW - flow.window)
        # Half a window is unread for a moment even if the reader is fast: lines deliver in bursts.
        keeps_up = flow.kept_up or self._unread(flow) <= flow.window // 4
        if keeps_up and more and not flow.discarding and self._account.promise(more):
            flow.owed += more
            flow.window += more
            flow.grown += more
            self._largest = max(self._largest, flow.window)

    def _crowds_out(self, flow: _Flow, took: float) -> bool:
        """Whether another stream is busy too, and would wait behind the payload that this window
        permits: more than eight times the line's bandwidth-delay product."""
        busy = self._credited != flow.id and self._credited in self._flows
        return busy and self.round_trip is not None and took > 4 * self.round_trip

    def _shrink_window(self, flow: _Flow) -> None:
        """Withhold credit: few bytes come, or the reader has not used half of the window, or other
        streams would wait."""
        less = min(flow.owed, max(flow.grown, flow.window - SHARED_WINDOW))
        flow.owed -= less
        flow.window -= less
        grown = min(less, flow.grown)
        flow.grown -= grown
        self._account.take_back(grown)

    def _unread(self, flow: _Flow) -> int:
        """Bytes of a stream that have come and were not used."""
        # A header counts its whole payload, of which a part may not have come yet.
        on_way = self._body_left if self._body_flow is flow else 0
        return flow.window - flow.may_receive - flow.owed - on_way

    def discard(self, stream_id: int, now: float) -> None:
        """Drop payload that comes for a stream, but give credit for it: a peer that first sends all
        of its own bytes, and then reads ours, would block otherwise."""
        flow = self._flows.get(stream_id)
        if flow is not None:
            flow.discarding = True
            self.consumed(stream_id, self._unread(flow), now)

    def keep_alive(self, now: float) -> None:
        """Ping the peer; to be called every KEEP_ALIVE seconds. Raises SessionClosed if nothing
        came since the last call. Any byte is a sign of life: payload may delay the pong."""
        if self._watched_at is not None and self._now < self._watched_at:
            raise SessionClosed(f"the peer sent nothing for {KEEP_ALIVE} s, not even a pong")
        self._watched_at = now
        self._ask(now)

    def _ask(self, now: float) -> None:
        self._pings += 1
        self._asked, self._asked_at = self._pings & MAX_UINT32, now
        self._ping = Header(PING, SYN, 0, self._asked).encode()

    def go_away(self, code: int = NORMAL, refuses: bool = True) -> None:
        """Announce that we accept no more streams; any code but NORMAL ends the session. Unless it
        ``refuses``, streams that the peer opens before it reads this are accepted."""
        self.we_left, self.refuses = True, refuses
        self._replies.append(Header(GO_AWAY, 0, 0, code).encode())

    @property
    def ids_left(self) -> int:
        """Streams that open() can still open."""
        return max(0, (LAST_ID - self._next_id) // 2 + 1)

    def unsent(self, stream_id: int) -> bool:
        """Whether payload or the FIN of a stream is not sent yet."""
        flow = self._flows.get(stream_id)
        return flow is not None and (flow.queued > 0 or flow.finishing and not flow.sent_fin)

    def knows(self, stream_id: int) -> bool:
        """Whether a stream is open."""
        return stream_id in self._flows

    def window(self, stream_id: int) -> int:
        """The receive window of a stream; 0 once it is over."""
        flow = self._flows.get(stream_id)
        return 0 if flow is None else flow.window

    def end(self) -> None:
        """Forget all streams: the session is over."""
        for flow in list(self._flows.values()):
            self._forget(flow)

    def pull(self, limit: int) -> tuple[bytes, list[int]]:
        """Take about ``limit`` bytes of frames to send: (bytes, ids of the streams whose payload is
        among them), or (b"", []). Control frames come first, so that a pong never waits behind
        payload; then one frame of each stream in turn (round robin)."""
        parts: list[BytesLike] = []
        served: list[int] = []
        if not (self._rotation or self._updates or self._control or self._replies or self._ping):
            return b"", served
        size = payload = 0
        for queue in (self._replies, self._control):
            while queue and size < limit:
                parts.append(queue.popleft())
                size += HEADER_SIZE
        while self._updates and size < limit:
            stream_id, credit = self._updates.popitem()
            parts.append(Header(WINDOW_UPDATE, 0, stream_id, credit).encode())
            size += HEADER_SIZE
        if self._ping and size < limit:
            parts.append(self._ping)
            size += HEADER_SIZE
            self._ping = b""
        while self._rotation and size < limit:
            flow = self._rotation.popleft()
            flow.in_rotation = False
            if not flow.alive:
                continue
            if flow.queued:
                length = min(flow.queued, FRAME_SHARED if self._rotation else FRAME_ALONE)
                parts.append(HEADER.pack(VERSION, DATA, 0, flow.id, length))
                flow.queued -= length
                payload += length
                size += HEADER_SIZE + length
                served.append(flow.id)
                while length:  # a frame joins payloads that were queued by several sends
                    piece = flow.queue.popleft()
                    if len(piece) > length:
                        piece, rest = memoryview(piece)[:length], memoryview(piece)[length:]
                        flow.queue.appendleft(rest)
                    parts.append(piece)
                    length -= len(piece)
            if flow.queued:
                self._rotate(flow)
                continue
            if flow.finishing:
                parts.append(Header(WINDOW_UPDATE, FIN, flow.id, 0).encode())
                size += HEADER_SIZE
                flow.sent_fin = True
            if flow.cutting:
                parts.append(Header(WINDOW_UPDATE, RST, flow.id, 0).encode())
                size += HEADER_SIZE
            if flow.cutting or flow.sent_fin and flow.got_fin:
                self._end_flow(flow)
        self._count_queued(-payload)
        self._wasted -= len(served)
        return b"".join(parts), served

    def _rotate(self, flow: _Flow) -> None:
        flow.in_rotation = True
        self._rotation.append(flow)

    def _end_flow(self, flow: _Flow) -> None:
        """End a stream from our side: frames of it may still be on their way to us."""
        self._forget(flow)
        if not flow.got_fin:
            self._late = min(self._late + flow.may_receive, MAX_WINDOW)  # no more is on its way
        self._wasted -= LATE_FRAMES

    def _forget(self, flow: _Flow) -> None:
        """Remove a stream from all tables; nothing else does."""
        flow.alive = False
        flow.queue.clear()
        self._count_queued(-flow.queued)
        flow.queued = 0
        if flow.grown:
            self._account.take_back(flow.grown)
        del self._flows[flow.id]
        self._unanswered.pop(flow.id, None)
        self._unaccepted.discard(flow.id)
        self._updates.pop(flow.id, None)
        if flow.id % 2 == self._parity:
            self._inbound -= 1


def put(queue: deque[BytesLike], payload: BytesLike) -> None:
    """Append payload to a deque of pieces. Small pieces are joined: the peer decides how small they
    are, and an object for each would need more memory than the flow control window permits."""
    if not queue or len(payload) >= SMALL:
        queue.append(payload)
    elif type(queue[-1]) is bytearray and len(queue[-1]) < FRAME_ALONE:
        queue[-1] += payload
    else:
        queue.append(bytearray(payload))


# Control messages --------------------------------------------------------------------------------
#
# "Text" in names, errors and docs is a JSON string. An error here says what the peer sent.

MESSAGE_LIMIT = 64 * 1024  # bytes of one message: a registration with some hundred hostnames
TOO_LONG = (
    f"a control message of more than {MESSAGE_LIMIT} bytes, "
    "expected fewer hostnames, or shorter policies"
)  # as only a registration gets so long
UNKNOWN_LIMIT = 4 * MESSAGE_LIMIT  # bytes of unknown messages in a row; more end the session
UNKNOWN_LEAST = 256  # bytes; a smaller one counts as so many, since parsing it takes no less time
UNKNOWN_KINDS = 16  # unknown types that are reported; the sender could invent any number of them
MAX_TS = 1 << 63  # Go's int64

# Features: extensions of the Go program's protocol. The agent lists those that it knows in its
# Register, the gateway answers with those that it uses in its Ack. Go peers ignore them.
HTTP2 = "http2"  # the gateway speaks HTTP/2 with a target, over the data stream
HALF_CLOSE = "half_close"  # the agent passes FIN on to its target, and goes on reading from it
HOST_HEADER = "host_header"  # the gateway replaces the visitor's Host header as the agent says
PORTS = "ports"  # the gateway opens public ports for tcp hostnames
LATER_PORTS = "later_ports"  # the gateway retries ports that it could not open at first
CERTIFICATES = "certificates"  # the gateway reports the state of the hostnames' certificates
VISITOR_ADDRESS = "visitor_address"  # data headers contain the visitor's address
POLICIES = "policies"  # the gateway enforces the agent's rules for visitors (passwords, addresses)
WILDCARDS = "wildcards"  # the gateway accepts hostnames such as *.dev.example.com
REASONS = "reasons"  # the gateway tells why it ends the session
UPGRADES = "upgrades"  # data headers say when an http stream is relayed like one in tcp mode
REFUSALS = "refusals"  # the gateway makes the error page when the agent rejects an http visit
OVERLAP = "overlap"  # a second session of an agent takes over, and the first one's visits go on
URLS = "urls"  # the gateway tells the public address of each hostname
NAMES = "names"  # the gateway completes a hostname LABEL.* by the credential's first wildcard
PARTIAL = "partial"  # the gateway may refuse some hostnames of a registration and serve the others
WAITS = "waits"  # the gateway tells an agent when hostnames that it was denied are free
POOLS = "pools"  # agents of one credential share a hostname, and each visit goes to one of them
HEALTH = "health"  # the agent tells whether its targets are well, and visits go accordingly
MEMBERS = "members"  # the gateway is one of several, and the agent opens a session with each

# Codes of End messages (feature REASONS).
REPLACED = "replaced"  # another session has taken over the hostnames
MOVE = "move"  # the agent must open a new session; this one serves until then
ALREADY = "already here"  # an Ack's error: see Register.besides


class Register(NamedTuple):
    """Agent to gateway, first: asks to serve hostnames.

    ``token`` is a JWT. ``routes`` maps hostname to target; the gateway uses only the hostnames.
    ``modes`` maps hostname to "http" (the default) or "tcp". ``instance`` is a random id that an
    agent keeps over its reconnects: with the same id and the same credential it takes its
    hostnames over at once from its earlier session. The rest needs the feature in parentheses:

    ``host_headers`` maps hostname to the Host header of its target (HOST_HEADER). ``ports`` maps
    hostname to the public port that it wants, as a text, or to ANY_PORT (PORTS). ``addressed``: the
    hostnames whose data headers must have the visitor's address (VISITOR_ADDRESS). ``policies``
    maps hostname to the rules for its visitors (POLICIES); see policy.py. ``overlap``: the earlier
    session keeps its visits (OVERLAP). ``protocols`` maps hostname to "h2c" or "h2" (HTTP2).
    ``pools`` maps hostname to how its visits are shared out (POOLS); see pool.py. ``besides``: the
    members with which the agent has sessions; one of them answers ALREADY (MEMBERS).
    """

    token: str
    routes: dict[str, str]
    modes: dict[str, str]
    features: tuple[str, ...] = ()
    host_headers: dict[str, str] = {}
    ports: dict[str, str] = {}
    addressed: tuple[str, ...] = ()
    policies: dict[str, Any] = {}
    instance: str = ""
    overlap: bool = False
    protocols: dict[str, str] = {}
    pools: dict[str, Any] = {}
    besides: tuple[str, ...] = ()


class Ack(NamedTuple):
    """Gateway to agent, once: the agent is registered, or ``error`` says why not.

    ``features`` are those of the agent's that the gateway will use. ``ports`` maps hostname to the
    public port that was opened for it, as a text; ``refused`` maps hostname to why none was.
    ``denied`` maps a hostname that is not served to the reason (PARTIAL), ``urls`` each other one
    to its public address (URLS), ``names`` a LABEL.* to its whole hostname (NAMES). ``member`` is
    the gateway's own id, and a Members message follows (MEMBERS).
    """

    ok: bool
    error: str = ""
    features: tuple[str, ...] = ()
    ports: dict[str, str] = {}
    refused: dict[str, str] = {}
    denied: dict[str, str] = {}
    urls: dict[str, str] = {}
    names: dict[str, str] = {}
    member: str = ""


class Certificate(NamedTuple):
    """Gateway to agent: the state of a hostname's certificate (feature CERTIFICATES). ``state`` is
    "ready", "waiting", or "failed: REASON"."""

    hostname: str
    state: str


class Port(NamedTuple):
    """Gateway to agent: a public port of Ack.refused is open now (LATER_PORTS). It is a text.
    ``url`` is the hostname's public address from now on (URLS)."""

    hostname: str
    port: str
    url: str = ""


class Health(NamedTuple):
    """Agent to gateway: whether a hostname's target is well, or the ``reason`` (HEALTH)."""

    hostname: str
    ok: bool
    reason: str = ""


class Free(NamedTuple):
    """Gateway to agent: nobody has these hostnames now, which it was denied (WAITS)."""

    hostnames: tuple[str, ...]


class Members(NamedTuple):
    """Gateway to agent: the gateways that are one, now (MEMBERS). ``members`` maps id to HOST:PORT,
    for agents, or to "": the address that the agent has dialled, which leads to any of them."""

    members: dict[str, str]


class End(NamedTuple):
    """Gateway to agent: the session ends now, or the agent must replace it (feature REASONS).
    ``code`` is REPLACED, MOVE or another word, for programs; ``reason`` is a text for people."""

    code: str
    reason: str


class Ping(NamedTuple):
    """Gateway to agent: asks for a Pong. ``ts`` is the sender's wall clock in milliseconds."""

    ts: float


class Pong(NamedTuple):
    """Agent to gateway: answers a Ping. ``ts`` is the sender's wall clock, not that of the Ping."""

    ts: float


Message = Register | Ack | Certificate | Port | Health | Free | Members | End | Ping | Pong
_MESSAGES: dict[str, type[Message]] = {kind.__name__.lower(): kind for kind in Message.__args__}
_TYPES = {kind: get_type_hints(kind) for kind in Message.__args__}  # of its fields, by name
ANY_PORT = "auto"  # any free port of the range that the gateway has for agents


def encode_message(message: Message) -> bytes:
    """Write a control message as Go's json.Encoder does: one object, one newline. Empty fields that
    have a default are left out: a peer without extensions does not see any."""
    fields: dict[str, Any] = {"type": type(message).__name__.lower()}
    for name, value in message._asdict().items():
        if value or name not in message._field_defaults:
            fields[name] = value
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def decode_message(data: bytes) -> Message | str:
    """Read one JSON object into its message, or return its type if that is unknown: its sender is
    a newer version, or another program. Raises ProtocolError."""
    try:
        fields = json.loads(data.decode())
        json.dumps(fields, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except (ValueError, RecursionError):  # UnicodeError is a ValueError
        raise ProtocolError("a control message that is not JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise ProtocolError("a control message that is not a JSON object")
    kind = fields.get("type")
    if not isinstance(kind, str):
        raise ProtocolError('a control message whose "type" is not a text')
    message = _MESSAGES.get(kind)
    if message is None:
        return kind
    if message is Register and not _text(fields, "token"):
        fields["token"] = _text(fields, "auth_token")
    if message is Ack and not isinstance(fields.get("ok"), bool):
        raise ProtocolError('an "ack" whose "ok" is neither true nor false')
    return message(**{name: _READERS[kind](fields, name) for name, kind in _TYPES[message].items()})


def _value(fields: dict[str, Any], name: str, kind: type[T], wanted: str) -> T:
    value = fields.get(name)
    if value is None:  # Go writes an empty map as null
        return kind()
    if not isinstance(value, kind):
        raise ProtocolError(f'"{name}" is not {wanted}')
    return value


def _text(fields: dict[str, Any], name: str) -> str:
    return _value(fields, name, str, "a text")


def _text_map(fields: dict[str, Any], name: str) -> dict[str, str]:
    value = _value(fields, name, dict, "an object")
    if not all(isinstance(text, str) for text in value.values()):
        raise ProtocolError(f'"{name}" does not map texts to texts')
    return value


def _text_list(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    value = _value(fields, name, list, "a list of texts")
    if not all(isinstance(text, str) for text in value):
        raise ProtocolError(f'"{name}" is not a list of texts')
    return tuple(value)


def _milliseconds(fields: dict[str, Any], name: str) -> float:
    value = fields.get(name, 0)
    if not isinstance(value, (int, float)) or not abs(value) < MAX_TS:  # "not <" also rejects NaN
        raise ProtocolError(f'a "{fields["type"]}" whose "{name}" is not a number of milliseconds')
    return value


# How a field is read, by its type as the message's class states it.
_READERS: dict[Any, Callable[[dict[str, Any], str], Any]] = {
    str: _text, dict[str, str]: _text_map, tuple[str, ...]: _text_list, float: _milliseconds,
    bool: lambda fields, name: fields.get(name) is True,
    dict[str, Any]: lambda fields, name: _value(fields, name, dict, "an object"),
}  # fmt: skip


class MessageReader:
    """Cuts a control stream into messages.

    The braces of the JSON object say where a message ends, not the newline: a Go peer accepts any
    white space there, and so do we. Several messages may come in one read, or one in many. Each
    byte is looked at once. Messages of unknown types are skipped, up to UNKNOWN_LIMIT in a row.
    """

    _MARKS = re.compile(rb'["\\{}]')

    def __init__(self, on_unknown: Callable[[str], None] = lambda kind: None):
        """``on_unknown(kind)`` is called once for each of the first UNKNOWN_KINDS unknown types."""
        self._on_unknown = on_unknown
        self._unknown: set[str] = set()  # types that were skipped
        self._unknown_size = 0  # bytes of unknown messages since the last known one
        self._buffer = bytearray()
        self._at = 0  # where the next look begins
        self._depth = 0  # open braces
        self._in_text = False

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that ``data`` completes; raises ProtocolError."""
        self._buffer += data
        messages: list[Message] = []
        while (end := self._object_end()) is not None:
            if end > MESSAGE_LIMIT:
                raise ProtocolError(TOO_LONG)
            message = decode_message(bytes(self._buffer[:end]))
            del self._buffer[:end]
            self._at = 0
            if isinstance(message, str):
                self._pass_over(message, end)
            else:
                self._unknown_size = 0
                messages.append(message)
        if len(self._buffer) > MESSAGE_LIMIT:
            raise ProtocolError(TOO_LONG)
        return messages

    def _pass_over(self, kind: str, size: int) -> None:
        self._unknown_size += max(size, UNKNOWN_LEAST)
        if self._unknown_size > UNKNOWN_LIMIT:
            raise ProtocolError(f"more than {UNKNOWN_LIMIT} bytes of unknown control messages")
        if kind not in self._unknown and len(self._unknown) < UNKNOWN_KINDS:
            self._unknown.add(kind)
            self._on_unknown(kind)

    def _object_end(self) -> int | None:
        """Index behind the first complete object, or None if there is none yet."""
        if self._depth == 0:
            self._buffer = self._buffer.lstrip(b" \t\r\n")
            if self._buffer and not self._buffer.startswith(b"{"):
                raise ProtocolError("a control message that is not a JSON object")
        while mark := self._MARKS.search(self._buffer, self._at):
            at, self._at = mark.start(), mark.end()
            if mark[0] == b'"':
                self._in_text = not self._in_text
            elif mark[0] == b"\\":
                if self._at == len(self._buffer):  # the escaped character has not come yet
                    self._at = at
                    return None
                self._at += 1
            elif not self._in_text:
                self._depth += 1 if mark[0] == b"{" else -1
                if self._depth == 0:
                    return self._at
        self._at = len(self._buffer)
        return None


# The data header ---------------------------------------------------------------------------------

DATA_HEADER = struct.Struct("!BH")  # version, length of the text that follows
DATA_HEADER_PLAIN = 1  # the text is "HOSTNAME". Go peers know only this version
DATA_HEADER_ADDRESSED = 2  # "HOSTNAME ADDRESS PORT ADDRESS PORT": first the visitor's, then ours
DATA_HEADER_RELAYED = 3  # text as in 1 or 2; the agent passes FIN on to the target in any mode


class Ends(NamedTuple):
    """Both ends of a visitor's connection as (IP address, port); ``door`` is the gateway's end."""

    visitor: tuple[str, int]
    door: tuple[str, int]


def encode_data_header(hostname: str, ends: Ends | None = None, relayed: bool = False) -> bytes:
    """The first bytes of a data stream. ``hostname`` is exactly as the agent registered it. With
    ``relayed``, FIN ends one direction and not the visit, in http mode too. ``ends`` needs the
    feature VISITOR_ADDRESS, ``relayed`` UPGRADES."""
    version, text = DATA_HEADER_PLAIN, hostname
    if ends is not None:
        version = DATA_HEADER_ADDRESSED
        text = " ".join(map(str, (hostname, *ends.visitor, *ends.door)))
    if relayed:
        version = DATA_HEADER_RELAYED
    encoded = text.encode()
    return DATA_HEADER.pack(version, len(encoded)) + encoded


def read_data_header(read_exactly: Callable[[int], bytes]) -> tuple[str, Ends | None, bool]:
    """Read a data header with ``read_exactly(count) -> bytes``; returns its hostname, its Ends or
    None, and whether the stream is relayed. Raises ProtocolError if it is malformed.

    Version 2 has four fields after the hostname: IP address and port of the visitor, and of the
    gateway's end of the visitor's connection ("door"). If they are not two valid addresses and
    ports, the header is malformed. A Go gateway writes the visitor's Host header as the hostname,
    perhaps with a port or in upper case.
    """
    version, length = DATA_HEADER.unpack(read_exactly(DATA_HEADER.size))
    first, last = DATA_HEADER_PLAIN, DATA_HEADER_RELAYED
    if not first <= version <= last:
        raise ProtocolError(f"data header version {version}, expected {first} to {last}")
    relayed = version == DATA_HEADER_RELAYED
    try:
        text = read_exactly(length).decode()
        if version == DATA_HEADER_PLAIN or relayed and " " not in text:
            return text, None, relayed
        hostname, *addresses = text.split(" ")
        visitor, visitor_port, door, door_port = addresses
        return hostname, Ends(_end(visitor, visitor_port), _end(door, door_port)), relayed
    except UnicodeDecodeError:
        raise ProtocolError("a data header whose hostname is not UTF-8") from None
    except ValueError:
        raise ProtocolError("a data header that does not hold two addresses") from None


def _end(address: str, port: str) -> tuple[str, int]:
    number = int(port)
    if not 0 <= number <= 0xFFFF:
        raise ValueError
    return str(ipaddress.ip_address(address)), number


# =================================================================================================
# Above: bytes, events, frames. Below: threads and sockets.
# =================================================================================================

import functools  # noqa: E402 (the pure half must not use these)
import heapq  # noqa: E402
import logging  # noqa: E402
import mmap  # noqa: E402
import os  # noqa: E402
import selectors  # noqa: E402
import socket  # noqa: E402
import threading  # noqa: E402
from time import monotonic  # noqa: E402
from typing import TYPE_CHECKING, Protocol  # noqa: E402

log = logging.getLogger("gotunnel")


class NoThread(OSError):
    """The system refused to start a thread."""


def spawn(name: str, function: Callable[..., object], *arguments: object) -> threading.Thread:
    """Start a daemon thread that logs an exception of ``function``. Raises NoThread."""
    thread = threading.Thread(None, call_logged, name, (function, *arguments), daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThread(f"no further thread ({error}): raise the limit (ulimit -u)") from None
    return thread


def call_logged(function: Callable[..., object], *arguments: object) -> None:
    """Call a function that should not raise; log an exception with the thread's name."""
    try:
        function(*arguments)
    except Exception:
        log.exception("thread %s: an unexpected error (bug, traceback follows)",
                      threading.current_thread().name)  # fmt: skip


class Deadline:
    """One timeout for a job of several steps."""

    def __init__(self, timeout: float | None):
        """``timeout`` is in seconds; None: the job may take for ever."""
        self._at = None if timeout is None else monotonic() + timeout

    def left(self) -> float | None:
        """The seconds that are left, None for ever; raises TimeoutError when none are."""
        if self._at is None:
            return None
        if (left := self._at - monotonic()) <= 0:
            raise TimeoutError("timed out")
        return left


class Waker:
    """Wakes a thread that waits in a selector, by a byte in a socket pair.

    After wake() the selector finds the Waker readable until clear(). Any thread may call wake(),
    also after close(): without the lock, the byte could go to a descriptor that the system reused.
    """

    def __init__(self) -> None:
        self._receive, self._send = socket.socketpair()
        self._receive.setblocking(False)
        self._send.setblocking(False)
        self._lock = threading.Lock()  # held to send, and to close

    def fileno(self) -> int:
        return self._receive.fileno()

    def wake(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # full: a byte is there already; or closed
            self._send.send(b"\0")

    def clear(self) -> None:
        """Take the bytes away. Only after the selector has said that there are some."""
        self._receive.recv(4096)

    def close(self) -> None:
        with self._lock:
            self._receive.close()
            self._send.close()


class Bell:
    """Wakes threads that wait until what a lock guards has changed: a condition variable.

    A threading.Condition allocates a lock for each wait and asks again and again whether its own
    lock is held. This one has a binary semaphore from the start. It wakes one thread at a time, so
    a thread that has waited rings for the next one.
    """

    __slots__ = ("waiting", "_lock", "_rung")

    def __init__(self, lock: threading.Lock):
        self.waiting = 0  # threads, in wait()
        self._lock = lock
        self._rung = threading.Lock()  # as a binary semaphore: any thread may release it
        self._rung.acquire()

    def wait(self, timeout: float | None) -> float | None:
        """Wait until the bell rings, or perhaps for no reason; returns what is left of ``timeout``.
        Raises TimeoutError. The caller holds the lock, which is released meanwhile."""
        began = 0.0 if timeout is None else monotonic()
        self.waiting += 1
        self._lock.release()
        try:
            rung = self._rung.acquire(timeout=-1 if timeout is None else max(0, timeout))
        finally:
            self._lock.acquire()
            self.waiting -= 1
        if not rung:
            raise TimeoutError("timed out")
        return None if timeout is None else timeout - (monotonic() - began)

    def ring(self) -> None:
        """Wake one thread, if one waits. With the lock, or after a change that was made with it."""
        if self.waiting:
            try:
                self._rung.release()
            except RuntimeError:  # the bell rings already
                pass


# Session and Stream: a Mux driven by threads -----------------------------------------------------

READ_SIZE = FRAME_ALONE  # bytes per read of one stream or visit
READ_BATCH = 512 * 1024  # bytes per read of a session, which carries many visits
# Send quantum: bytes encrypted per write, and the limit of unsent bytes in the kernel
# (TCP_NOTSENT_LOWAT). Pongs and credit queue behind both, so _pace() halves it on slow lines.
SEND_LEAST, SEND_MOST = 16 * 1024, 64 * 1024
SEND_QUICK = 0.01  # seconds; if the kernel takes a quantum in less, the quantum is doubled
SEND_SLOW = 0.2  # seconds; if it takes more, the quantum is halved
READS_A_TURN = 2  # reads before the demultiplexer sees to its timers and its output again
ACCEPT_TIMEOUT = 30  # seconds until an unaccepted stream is reset. A Go peer ends all after 75
LINGER_TIMEOUT = 300  # seconds that a closed stream waits for the peer's FIN, as in Go: see close()
SWEEP = 5  # seconds between two checks for such streams
FLUSH_TIMEOUT = 3  # seconds that a closing session may take to send its last frames
Batch = tuple[bytes, Sequence[int]]  # frames, and the ids of the streams whose payload they hold
NOTHING: Batch = (b"", ())


class Buffers:
    """A pool of receive buffers of one size. A thread gives its buffer back before it waits.

    Allocating one for each read would cost as much as decrypting what is read. They are mappings,
    of which only what was read into takes memory: a bytearray is filled with zeros."""

    def __init__(self, size: int, most: int):
        self._size = size
        self._spare: deque[memoryview] = deque(maxlen=most)  # unused ones
        self.give_back, self.clear = self._spare.append, self._spare.clear

    def take(self) -> memoryview:
        try:
            return self._spare.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, self._size))


# Few sessions receive at one time, but many visits do. The unused buffers of both pools together
# take 4 MiB at most.
LARGE_BUFFERS = Buffers(READ_BATCH, 4)
BUFFERS = Buffers(READ_SIZE, 32)


class Timers:
    """Functions to be called later: a heap of (monotonic instant, serial number, function).

    The number keeps the order of functions that are due at the same instant. ``next_at`` is the
    first instant, infinite if there is none; any thread may read it. All else needs the owner's
    lock."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callback]] = []
        self._count = 0
        self.next_at = math.inf

    def add(self, at: float, function: Callback) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, function))
        self.next_at = self._heap[0][0]

    def pop(self, now: float) -> Callback | None:
        """Remove and return the first function that is due; None if none is."""
        if self.next_at > now:
            return None
        function = heapq.heappop(self._heap)[2]
        self.next_at = self._heap[0][0] if self._heap else math.inf
        return function


class Transport(Protocol):
    """What a Session needs of the connection under it: a Duplex."""

    stall_timeout: float

    def fileno(self) -> int: ...
    @property
    def pending(self) -> bool: ...
    def receive_into(self, view: memoryview) -> int | None: ...
    def send(self, data: bytes) -> bool: ...
    def flush(self) -> bool: ...
    def read(self, *, timeout: float | None) -> bytes: ...
    def write(self, data: bytes, timeout: float | None) -> None: ...
    def finish(self, timeout: float | None) -> None: ...
    def limit_unsent(self, count: int) -> None: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...
    def observed(self, observer: Callable[[bool, BytesLike], None]) -> Transport: ...


class Sender:
    """Takes frames out of a Mux and sends them, in the thread that queued them (flat combining).

    A thread that queues frames in the Mux sends them itself, so no other thread must be woken. If
    another thread sends already (``busy``), it leaves them there: that thread asks the Mux for more
    before it stops. So one thread sends at a time, and bytes leave in the Mux's order. If the
    kernel's buffer is full (``jammed``), the thread returns, and the demultiplexer goes on with
    resume() when the socket is writable.
    """

    def __init__(self, duplex: Transport, mux: Mux, lock: threading.Lock,
                 streams: dict[int, Stream], wake: Callback):  # fmt: skip
        """``lock`` is the session's: take() is called with it held, all else without. ``wake()``
        wakes the demultiplexer."""
        self.busy = False
        self.jammed = False
        self.postponed = False  # an ACK is queued; the answer's write or a blocking read sends it
        self.closing = False  # wake the demultiplexer when all is sent
        self._jammed_at = 0.0
        self._quantum = SEND_LEAST
        self._stopped = False
        self._duplex, self._mux, self._lock = duplex, mux, lock
        self._streams, self._wake = streams, wake

    def take(self) -> Batch:
        """Return a batch for send(); empty if there is nothing to send, or if the busy thread will
        send it. Caller holds the lock, and must call send() without it."""
        self.postponed = False
        if self.busy:
            return NOTHING
        data, served = self._mux.pull(self._quantum)
        self.busy = bool(data)
        return data, served

    def send(self, batch: Batch) -> None:
        """Send a batch, and frames that are queued meanwhile, until the kernel takes no more."""
        data, served = batch
        if not data:
            return
        while data:
            try:
                done = self._duplex.send(data)
            except OSError:
                if not self._stopped:
                    self._duplex.reset()  # the demultiplexer sees it and ends the session
                return
            except BaseException:  # MemoryError, for example: frames are lost, so the session is
                self._duplex.reset()
                raise
            if not done:
                self._jammed_at = monotonic()
                self.jammed = True
                self._wake()
            elif self._quantum < SEND_MOST and len(data) >= self._quantum:
                self._pace(0)
            with self._lock:
                for stream_id in served:
                    if stream_id in self._streams and self._streams[stream_id]._writable.waiting:
                        self._streams[stream_id]._writable.ring()
                if not done:
                    return
                data, served = self._mux.pull(self._quantum)
                self.busy = bool(data) or self._stopped
        if self.closing:
            self._wake()

    def flush(self) -> None:
        """Send what is queued, unless another thread does so already."""
        with self._lock:
            batch = self.take()
        self.send(batch)

    def send_postponed(self) -> None:
        """As flush(). Caller holds the lock, which is released meanwhile."""
        self._lock.release()
        try:
            self.flush()
        finally:
            self._lock.acquire()

    def resume(self) -> None:
        """Go on after a jam: send the rest of the batch, then what was queued meanwhile.
        Demultiplexer only."""
        if not self._duplex.flush():
            return
        self.jammed = False
        self._pace(monotonic() - self._jammed_at)
        with self._lock:
            self.busy = self._stopped
        self.flush()
        if self.closing:
            self._wake()

    def idle(self) -> bool:
        """Send what is queued; whether the kernel has all of it."""
        self.flush()
        with self._lock:
            return not self.busy

    def stop(self) -> None:
        """Send nothing from now on. Caller holds the lock."""
        self._stopped = self.busy = True

    def _pace(self, took: float) -> None:
        """Adapt the quantum; ``took``: the kernel's seconds for the last one. Busy thread only."""
        if took < SEND_QUICK and self._quantum < SEND_MOST:
            self._quantum *= 2
        elif took > SEND_SLOW and self._quantum > SEND_LEAST:
            self._quantum //= 2
        else:
            return
        self._duplex.limit_unsent(self._quantum)


class StreamTable:
    """The streams of a session, and the threads that wait for one.

    A stream is in ``known`` as long as the Mux knows its id. Afterwards, a stream with unread bytes
    is in ``over`` until they are read. ``unread`` is always the sum of the unread bytes of both.
    All methods need the session's lock, except run_callbacks().
    """

    def __init__(self, session: Session, mux: Mux, account: Account, lock: threading.Lock):
        self.known: dict[int, Stream] = {}
        self.over: set[Stream] = set()
        self.unread = 0
        self.expiring: dict[int, tuple[float, Stream]] = {}  # by id: (when it is reset, Stream)
        self.arrived: deque[Stream] = deque()  # opened by the peer, for accept()
        # Several threads may wait for these two, and get their turns in order.
        self.arrival = threading.Condition(lock)  # arrived grew, or the session ended
        self.slot = threading.Condition(lock)  # open() may be possible again, or the session ended
        self.callbacks: list[Callback] = []  # on_death() functions, to be called without the lock
        self.bells: list[Callback] = []  # ring for readers whose payload has come; likewise
        self._session, self._mux, self._account, self._lock = session, mux, account, lock

    def add(self, stream_id: int) -> Stream:
        stream = self.known[stream_id] = Stream(self._session, stream_id)
        return stream

    def count_unread(self, stream: Stream, count: int) -> None:
        account = self._account
        stream._unread += count
        self.unread += count
        account.held += count
        if not account.low < account.held < account.high:
            account.tell()
        if not stream._unread and stream in self.over:
            self.over.discard(stream)
            stream._on_death = None  # both directions have ended with FIN, and all is read

    def drop_if_over(self, stream: Stream) -> None:
        """Once both sides have sent FIN, forget the stream. Its unread bytes can still be read."""
        if stream._got_fin and stream._sent_fin:
            self._forget(stream.id)
            self.slot.notify()
            if stream._unread:
                self.over.add(stream)
            else:
                stream._on_death = None

    def reset(self, stream: Stream, text: str, code: int = 0) -> None:
        """Reset a stream, if it is still known."""
        if stream._known:
            self._forget(stream.id)
            self._mux.reset(stream.id, code)
            self.slot.notify()
        stream._die(StreamReset(text))
        stream._cut()

    def cut(self, stream: Stream, text: str) -> None:
        """Reset a stream after what was written, if it is still known."""
        if stream._known:
            self._forget(stream.id)
            self._mux.cut(stream.id, monotonic())
            self.slot.notify()
        stream._die(StreamReset(text))
        stream._cut()

    def expire(self, stream: Stream, timeout: float) -> None:
        """Reset a stream within SWEEP seconds after ``timeout``, unless it is over or accepted."""
        self.expiring[stream.id] = (monotonic() + timeout, stream)

    def sweep(self) -> None:
        """Reset the streams that have expired."""
        now = monotonic()
        for deadline, stream in list(self.expiring.values()):
            if deadline > now:
                pass
            elif self._mux.unsent(stream.id):  # the line is slow, not the peer
                self.expire(stream, LINGER_TIMEOUT)
            else:
                self.reset(stream, "the stream was reset: it was not accepted or ended in time")

    def end(self, reason: str) -> None:
        """Forget all streams: the session is over."""
        streams = list(self.known.values())
        for stream in streams:
            stream._known = False
        self.known.clear()
        self.expiring.clear()
        for stream in self.over:
            stream._on_death = None  # it ended before the session did
        self.over.clear()
        self.arrived.clear()
        for stream in streams:
            stream._die(SessionClosed(reason))
        self.arrival.notify_all()
        self.slot.notify_all()

    def run_callbacks(self) -> None:
        """Call the on_death() functions of dead streams. Without the lock."""
        with self._lock:
            functions, self.callbacks = self.callbacks, []
        for function in functions:
            call_logged(function)

    def _forget(self, stream_id: int) -> Stream | None:
        """Remove a stream from the tables and return it; None if it was not there."""
        expires = self.expiring.pop(stream_id, None) is not None
        stream = self.known.pop(stream_id, None)
        if stream is not None:
            stream._known = False
            if expires and stream in self.arrived:
                self.arrived.remove(stream)
        return stream

    def _make_room(self) -> None:
        """If the session holds more unread bytes than Memory allows it now, reset the stream that
        has most of them, so that the others can go on."""
        if self.unread <= self._account.memory.share:
            return
        streams = [*self.known.values(), *self.over]
        worst = max(streams, key=lambda stream: stream._unread)
        self.callbacks.append(functools.partial(
            log.warning, "%s: stream %d is reset: memory is short and %d bytes of it are unread",
            self._session.name, worst.id, worst._unread,
        ))  # fmt: skip
        self.reset(worst, "the stream was reset: memory is short and much of it was unread")

    # The Mux's events. _make_room() may have reset the stream since.

    def _on_received(self, event: Received) -> None:
        stream_id, payload = event
        stream = self.known.get(stream_id)
        if stream is None:
            return
        if stream._at_rest:
            self.reset(stream, "the stream was reset: bytes came while it was at rest")
            return
        put(stream._chunks, payload) if stream._chunks else stream._chunks.append(payload)
        stream._silent = False
        self.count_unread(stream, len(payload))
        if stream._readable.waiting:
            self.bells.append(stream._on_payload)
        if self.unread > Memory.FLOOR:
            self._make_room()

    def _on_opened(self, event: Opened) -> None:
        if not self._mux.knows(event.stream_id):  # the peer has reset it already
            return
        stream = self.add(event.stream_id)
        self.arrived.append(stream)
        self.arrival.notify()
        self.expire(stream, ACCEPT_TIMEOUT)

    def _on_finished(self, event: Finished) -> None:
        stream = self.known.get(event.stream_id)
        if stream is None:
            return
        stream._got_fin = True
        stream._readable.ring()
        if stream._at_rest:
            stream._announce_death()
            stream._finish()
            stream._fail(StreamReset("the peer ended the stream while it was at rest"))
        else:
            self.drop_if_over(stream)

    def _on_was_reset(self, event: WasReset) -> None:
        self.slot.notify()
        unaccepted = event.stream_id in self.expiring
        stream = self._forget(event.stream_id)
        if stream is None:
            return
        error = StreamReset(event.reason, event.code)
        stream.refused = stream._silent and event.code == REFUSED
        # What came before the RST can still be read.
        if stream._unread and not (unaccepted or event.cut):
            if stream._got_fin:  # the peer's bytes are complete
                stream._fail(error)
            else:
                stream._die(error)
            self.over.add(stream)
        else:
            stream._die(error)
            stream._cut()

    def _on_writable(self, event: Writable) -> None:
        if event.stream_id in self.known:  # not if both sides have finished
            self.known[event.stream_id]._writable.ring()

    def _on_answered(self, event: Answered) -> None:
        self.slot.notify()

    def _on_gone_away(self, event: GoneAway) -> None:
        self.slot.notify_all()
        if event.code != NORMAL:
            raise SessionClosed(f"the peer ended the session with code {event.code}")

    on_event: dict[type, Callable[[StreamTable, Any], None]] = {  # by type of event
        Received: _on_received, Opened: _on_opened, Finished: _on_finished,
        WasReset: _on_was_reset, Writable: _on_writable, Answered: _on_answered,
        GoneAway: _on_gone_away,
    }  # fmt: skip


class Session:
    """One multiplexed connection: a Mux, its streams, and the threads that drive them.

    The demultiplexer thread (start()) reads from the connection and gives each stream its bytes.
    It never waits for a stream's reader or for output; flow control bounds what it has to keep. A
    thread that writes sends the frames itself, or leaves them to the thread that is sending (see
    Sender). Before start(), the owner may call turn() for one round of the demultiplexer's work.

    One lock guards the Mux, the streams and the timers. No I/O is done while it is held.
    """

    def __init__(self, duplex: Transport, *, client: bool, name: str, window: int = INITIAL_WINDOW,
                 max_streams: int = MAX_STREAMS, memory: Memory | None = None,
                 observer: Callable[[bool, BytesLike], None] | None = None):  # fmt: skip
        """``name`` is for thread names and the log. ``memory``: process_memory() if None. For
        ``observer`` see Duplex.observed(), for the rest Mux. The session closes ``duplex``."""
        self.name = name
        self.stall_timeout = duplex.stall_timeout  # seconds, see Stream.write()
        self.ended = ""  # why the session is over; "" while it lives
        self.heard_at = monotonic()  # when the peer last sent something
        # Called once each: by the demultiplexer when the peer has sent GO_AWAY, when the session is
        # over and all its streams are dead, and when its connection is closed.
        self.on_leave: Callback | None = None
        self.on_end: Callback | None = None
        self.on_close: Callback | None = None
        self._duplex = duplex if observer is None else duplex.observed(observer)
        self._lock = lock = threading.Lock()
        self._account = account = Account(memory or process_memory())
        self._mux = Mux(client=client, window=window, max_streams=max_streams, account=account)
        self._streams = StreamTable(self, self._mux, account, lock)
        self._sender = Sender(duplex, self._mux, lock, self._streams.known, self._wake)
        self._timers = Timers()
        self._closing: tuple[str, float] | None = None  # (reason, deadline) once close() was called
        self._started = False  # the demultiplexer runs, and only it ends the session
        self._thread: threading.Thread | None = None
        self._waker: Waker | None = None  # of the demultiplexer, from start() on

    def widen(self, window: int) -> None:
        """See Mux.widen()."""
        with self._lock:
            self._mux.widen(window)

    @property
    def jammed(self) -> bool:
        """Whether output waits because the kernel's send buffer is full."""
        return self._sender.jammed

    # Streams

    def open(self, first: bytes = b"", timeout: float | None = None,
             permit: AbstractContextManager[Any] = nullcontext()) -> Stream:  # fmt: skip
        """Open a stream; ``first`` bytes leave together with its SYN, if the window permits.

        Waits while the peer has OPEN_BACKLOG streams to accept. Raises TimeoutError, SessionClosed
        if nothing was sent, StreamReset if a part of ``first`` was. ``permit`` is a context manager
        that counts streams, and may raise an exception to refuse this one. It must take no
        session's lock.
        """
        deadline = Deadline(timeout)
        mux, slot = self._mux, self._streams.slot
        with self._lock:
            try:
                while not (self.ended or mux.may_open or mux.we_left or mux.peer_left):
                    slot.wait(deadline.left())
                if self.ended:
                    raise SessionClosed(self.ended)
                with permit:
                    stream = self._streams.add(mux.open(monotonic()))
            except BaseException:
                slot.notify()  # this thread was woken for a slot that another one can use
                raise
            room = mux.room(stream.id)
            if first:
                mux.send(stream.id, first[:room])
            batch = self._sender.take()
        self._sender.send(batch)
        if len(first) > room:
            try:
                stream.write(first[room:], deadline.left())
            except OSError as error:
                stream.reset()
                if isinstance(error, SessionClosed):
                    raise StreamReset(str(error)) from error
                raise
        return stream

    def accept(self, timeout: float | None = None) -> Stream:
        """Wait for the next stream that the peer opens; raises TimeoutError, SessionClosed."""
        deadline = Deadline(timeout)
        streams, sender = self._streams, self._sender
        with self._lock:
            while not (self.ended or streams.arrived):
                streams.arrival.wait(deadline.left())
            if self.ended:
                raise SessionClosed(self.ended)
            stream = streams.arrived.popleft()
            streams.expiring.pop(stream.id, None)
            self._mux.accept(stream.id)
            # If the peer has sent a request already, the ACK leaves together with the answer.
            sender.postponed = stream._unread > 0
            batch = NOTHING if sender.postponed else sender.take()
        sender.send(batch)
        return stream

    def streams_in_use(self) -> list[Stream]:
        """The streams that our side has not closed; one that ends meanwhile may be there twice.

        Takes no lock, since a permit of open() calls it while other sessions' locks are held.
        copy() of a dict or a set is atomic, also on a free-threaded Python."""
        streams = (*self._streams.known.copy().values(), *self._streams.over.copy())
        return [stream for stream in streams if not stream._discarding]

    @property
    def ids_left(self) -> int:
        """Streams that open() can still open in this session."""
        return self._mux.ids_left

    @property
    def arrived(self) -> bool:
        """Whether accept() would return at once."""
        return bool(self._streams.arrived)

    # The demultiplexer

    def start(self) -> None:
        """Start the demultiplexer thread; it ends with the session.

        Raises NoThread, and SessionClosed if close() was called before.
        """
        waker = Waker()
        with self._lock:
            over = self.ended or self._closing
            if not over:
                self._waker = waker
                self._started = True
        if over:
            waker.close()
            raise SessionClosed("the session was closed before it started")
        self._duplex.limit_unsent(self._sender._quantum)
        self.call_later(KEEP_ALIVE, self._keep_alive)
        self.call_later(SWEEP, self._sweep)
        self._wake()  # bytes may be in the Duplex already, where the selector does not see them
        try:
            self._thread = spawn(f"demux {self.name}", self._run, waker)
        except NoThread:
            self._started = False
            raise

    def _run(self, waker: Waker) -> None:
        reason = "internal error"
        last_frame: bytes | None = None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(waker, selectors.EVENT_READ)
                selector.register(self._duplex, selectors.EVENT_READ)
                reason = self._serve(selector, waker)
                last_frame = b""
        except ProtocolError as error:
            reason = f"protocol error: {error}"
            last_frame = Header(GO_AWAY, 0, 0, PROTOCOL_ERROR).encode()
        except OSError as error:
            reason = str(error)
        except Exception:
            log.exception("session %s ends: an unexpected error (bug, traceback follows)",
                          self.name)  # fmt: skip
        finally:
            self._end(reason, last_frame)

    def _serve(self, selector: selectors.BaseSelector, waker: Waker) -> str:
        """Work until the session must end; return the reason."""
        sender, writing, patience = self._sender, False, 0.0
        while True:
            if sender.jammed is not writing:
                writing = sender.jammed
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
                selector.modify(self._duplex, events)
            for key, _ in selector.select(patience):
                if key.fileobj is waker:
                    waker.clear()
            if sender.jammed:
                sender.resume()
            self.turn()
            patience = self._run_timers()  # after turn(), which may have read a sign of life
            if self._closing:
                patience = min(patience, self._closing[1] - monotonic())
                if sender.idle() or patience <= 0:
                    return self._closing[0]

    def turn(self) -> None:
        """Read what has come and answer it, without waiting. Raises ProtocolError, OSError.

        Demultiplexer only; before start(), the owner's thread.
        """
        streams, on_event = self._streams, StreamTable.on_event
        for _ in range(READS_A_TURN):
            buffer = LARGE_BUFFERS.take()
            try:
                count = self._duplex.receive_into(buffer)
                if count is None:
                    break
                if not count:
                    raise SessionClosed("the peer closed the connection")
                now = self.heard_at = monotonic()
                with self._lock:
                    for event in self._mux.receive(buffer[:count], now):
                        on_event[type(event)](streams, event)
                    batch = self._sender.take()
            finally:
                LARGE_BUFFERS.give_back(buffer)
                for ring in streams.bells:  # now the whole batch is there, and the lock is free
                    ring()
                streams.bells.clear()
            self._sender.send(batch)
            if streams.callbacks:
                streams.run_callbacks()
            if count < READ_BATCH and not self._duplex.pending:
                break  # nothing is left
        else:
            self._wake()  # more may be in the Duplex, where the selector does not see it
        if self._mux.peer_left and self.on_leave is not None:
            leave = self.on_leave
            self.on_leave = None
            leave()

    def _wake(self) -> None:
        if self._waker is not None:
            self._waker.wake()

    def flush(self) -> None:
        """Send what was queued by Stream.offer(), of all streams."""
        self._sender.flush()

    # Timers

    def call_later(self, delay: float, function: Callback) -> None:
        """Have the demultiplexer call ``function`` in ``delay`` seconds, if it still runs then. The
        function must not wait."""
        with self._lock:
            self._timers.add(monotonic() + delay, function)
        if threading.current_thread() is not self._thread:
            self._wake()

    def _run_timers(self) -> float:
        """Call the functions that are due; returns the seconds until the next one is."""
        while (wait := self._timers.next_at - monotonic()) <= 0:
            with self._lock:
                function = self._timers.pop(monotonic())
            if function is not None:
                function()
        return wait

    def _sweep(self) -> None:
        with self._lock:
            self._streams.sweep()
            refused, self._mux.refused = self._mux.refused, 0
        self._sender.flush()
        self._streams.run_callbacks()
        if refused:
            log.warning("%s: %d new streams were reset: too many are open", self.name, refused)
        self.call_later(SWEEP, self._sweep)

    def _keep_alive(self) -> None:
        """Ping; end the session if the peer was silent, since a dead line reports no error."""
        with self._lock:
            self._mux.keep_alive(monotonic())
        self._sender.flush()
        self.call_later(KEEP_ALIVE, self._keep_alive)

    # The end

    def leave(self, refuses: bool = True) -> None:
        """Tell the peer that we accept no new streams: see Mux.go_away(). The open ones go on."""
        with self._lock:
            if self.ended or self._mux.we_left:
                return
            self._mux.go_away(refuses=refuses)
            self._streams.slot.notify_all()
        self._sender.flush()

    def close(
        self, reason: str = "closed", code: int = NORMAL, patience: float | None = None
    ) -> None:
        """End the session once everything queued is sent, at the latest after ``patience`` seconds
        (FLUSH_TIMEOUT if None). GO_AWAY carries ``code``. Any thread. Does not wait: see join()."""
        patience = FLUSH_TIMEOUT if patience is None else patience
        with self._lock:
            if self._closing is None:
                self._closing = (reason, monotonic() + patience)
                self._sender.closing = True
                if not self._mux.we_left:
                    self._mux.go_away(code)
            started = self._started
        self._sender.flush()
        if started:
            self._wake()
        else:
            self._end(reason, None)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the demultiplexer has ended, if it was started."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _end(self, reason: str, last_frame: bytes | None) -> None:
        """End everything, once: first wake the threads that wait, then tell the peer.

        ``last_frame`` may be b"" for none, or None if the connection is already broken.
        """
        with self._lock:
            if self.ended:
                return
            if self._closing:
                reason = self._closing[0]  # the peer may have hung up because of it
            self.ended = reason or "closed"
            self._streams.end(self.ended)
            self._mux.end()
            self._account.close()
            self._sender.stop()
            self._timers = Timers()
        self._streams.run_callbacks()
        if self._mux.strays:
            log.debug("%s: %d frames were for unknown streams", self.name, self._mux.strays)
        if self.on_end is not None:
            call_logged(self.on_end)
        if last_frame is not None:
            self._hang_up(last_frame)
        self._duplex.close()
        if self._waker is not None:
            self._waker.close()
        if self.on_close is not None:
            call_logged(self.on_close)

    def _hang_up(self, last_frame: bytes) -> None:
        """Half-close, and read until the peer has hung up too. If input were unread, or came after
        the close, the kernel would send a TCP RST, and the peer would lose our last frames."""
        deadline = Deadline(FLUSH_TIMEOUT)
        with contextlib.suppress(OSError):  # the peer is gone, or does not read in time
            if last_frame:
                self._duplex.write(last_frame, timeout=deadline.left())
            self._duplex.finish(timeout=deadline.left())
            while self._duplex.read(timeout=deadline.left()):
                pass


class Stream:
    """One two-way pipe of bytes within a session.

    One thread may read while another one writes. Both get StreamReset or SessionClosed, which are
    ConnectionErrors, once the stream or its session is gone.
    """

    __slots__ = (
        "id", "refused", "_silent", "session", "_mux", "_streams", "_sender",
        "_lock", "_readable", "_writable", "_chunks", "_unread", "_got_fin", "_sent_fin",
        "_discarding", "_error", "_on_payload", "_on_death", "_at_rest", "_known", "__weakref__",
    )  # fmt: skip

    def __init__(self, session: Session, stream_id: int):
        self.id = stream_id
        self.refused = False  # the peer reset it with REFUSED, and had sent no payload
        self._silent = True  # no payload has come
        self.session = session
        self._mux, self._streams = session._mux, session._streams
        self._sender = session._sender
        self._lock = session._lock  # guards all below
        self._readable = Bell(self._lock)
        self._writable = Bell(self._lock)
        self._chunks: deque[BytesLike] = deque()  # unread payload, as much as the window permits
        self._unread = 0  # bytes in it
        self._got_fin = False
        self._sent_fin = False
        self._discarding = False  # close() was called: payload that comes is dropped
        self._error: StreamReset | SessionClosed | None = None
        self._on_payload: Callback = self._readable.ring  # called if payload comes for a reader
        self._on_death: Callback | None = None
        self._at_rest = False  # from rest() until the next write()
        # Whether the session knows this stream. Comparing ids is not enough: a peer that breaks the
        # specification may reuse the id of a stream that is over.
        self._known = True

    # Called by the session, which holds the lock

    def _fail(self, error: StreamReset | SessionClosed) -> None:
        self._error = error
        self._readable.ring()
        self._writable.ring()

    def _die(self, error: StreamReset | SessionClosed) -> None:
        self._fail(error)
        self._announce_death()

    def _announce_death(self) -> None:
        if self._on_death is not None:
            self._streams.callbacks.append(self._on_death)

    def _raise_error(self) -> NoReturn:
        # A new one each time: if threads raised the same one, their tracebacks would mix.
        if isinstance(self._error, StreamReset):
            raise StreamReset(str(self._error), self._error.code)
        raise SessionClosed(str(self._error))

    def _cut(self) -> None:
        """Drop unread payload: the bytes behind it are lost, so it must not look complete."""
        if self._chunks:
            self._drop_chunks()
            self._got_fin = False

    def _drop_chunks(self) -> None:
        self._streams.count_unread(self, -self._unread)
        self._chunks.clear()

    # Called by the threads that use the stream

    def on_death(self, function: Callback) -> None:
        """Have ``function`` called once the stream is reset or its session ends, or now if that has
        happened: it wakes a thread that waits for something else. It must not wait itself."""
        with self._lock:
            dead = self._error is not None
            self._on_death = function
        if dead:
            function()

    @property
    def is_dead(self) -> bool:
        """Whether it was reset, or its session has ended. There may be unread payload."""
        return self._error is not None

    @property
    def window(self) -> int:
        """The receive window in bytes; 0 once the stream is over."""
        return self._mux.window(self.id) if self._known else 0

    @property
    def quiet(self) -> bool:
        """Whether nothing is unread and nothing has ended: it can be kept for another visit."""
        return not (self._chunks or self._got_fin or self._sent_fin or self._error)

    def rest(self, on_end: Callback) -> bool:
        """Put the stream aside until the next write(), which uses it again. False, and no change,
        if the peer has sent or ended something already.

        If payload or FIN comes before all of the next write() is queued, the stream is reset, and
        ``on_end()`` is called as by on_death(). So late bytes of one exchange are never read as the
        answer to the next one (HTTP desync).
        """
        with self._lock:
            self._at_rest = not (self._chunks or self._got_fin or self._sent_fin or self._error)
            if self._at_rest:
                self._on_death = on_end
            return self._at_rest

    def read(self, size: int = READ_SIZE, timeout: float | None = None) -> bytes:
        """Wait for bytes; b"" after the peer's FIN. Raises TimeoutError, ConnectionError."""
        with self._lock:
            try:
                while not self._chunks:
                    if self._got_fin or self._discarding:
                        return b""
                    if self._error is not None:
                        self._raise_error()
                    if self._sender.postponed:
                        self._sender.send_postponed()
                    else:
                        timeout = self._readable.wait(timeout)
                data = self._take_out(size)
            finally:
                if self._readable.waiting:
                    self._readable.ring()  # an event wakes one reader; this may concern others
            self._streams.count_unread(self, -len(data))
            due = self._known and self._mux.consumed(self.id, len(data), monotonic())
            batch = self._sender.take() if due else NOTHING
        if due:
            self._sender.send(batch)
        return data

    def _take_out(self, size: int) -> bytes:
        """Remove up to ``size`` bytes of the payload; they are copied once at most."""
        parts: list[BytesLike] = []
        most = size
        while self._chunks and size:
            chunk = self._chunks.popleft()
            if len(chunk) > size:
                if size < most // 2:  # it is cheaper to leave the chunk whole for the next time
                    self._chunks.appendleft(chunk)
                    break
                self._chunks.appendleft(chunk[size:])
                chunk = chunk[:size]
            if type(chunk) is bytes and not (parts or self._chunks):
                return chunk
            parts.append(chunk)
            size -= len(chunk)
        return b"".join(parts)

    def shortcut(self, take: Callable[[bytes], int]) -> None:
        """While a thread waits in read(), have the demultiplexer offer small payload to take(data)
        first, to spare the thread's wake-up. take() returns how many bytes it took, and must not
        wait. read() returns the others, in order."""
        self._on_payload = functools.partial(self._pass_on, take)

    def _pass_on(self, take: Callable[[bytes], int]) -> None:
        with self._lock:
            if not self._chunks:  # the reader has them already
                return
            # A reader that does not wait may have earlier bytes in its hands.
            mine = self._readable.waiting and not self._got_fin and self._error is None
            if not mine or self._unread > FRAME_SHARED:
                self._readable.ring()
                return
            data = self._take_out(FRAME_SHARED)
            self._streams.count_unread(self, -len(data))
        try:
            taken = take(data)
        except OSError:  # the reader meets it too, and deals with it
            taken = 0
        with self._lock:
            if self._discarding or not self._known:  # it was closed or reset meanwhile
                return
            if taken < len(data):
                self._chunks.appendleft(data[taken:])
                self._streams.count_unread(self, len(data) - taken)
                self._readable.ring()
            due = self._mux.consumed(self.id, taken, monotonic())
            batch = self._sender.take() if due else NOTHING
        self._sender.send(batch)

    def read_exactly(self, count: int, timeout: float | None = None) -> bytes:
        """Wait for ``count`` bytes; raises ProtocolError if the peer's FIN comes before."""
        deadline = Deadline(timeout)
        parts = []
        while count:
            data = self.read(count, deadline.left())
            if not data:
                raise ProtocolError(f"the stream ended, {count} more bytes were expected")
            parts.append(data)
            count -= len(data)
        return b"".join(parts)

    def write(self, data: BytesLike, timeout: float | None = None) -> None:
        """Send all of it, waiting for the peer's window. Raises TimeoutError if the peer permits
        nothing for ``timeout`` seconds; what was queued before is still sent.

        Without a timeout, the stream is reset (and the log says so) if the peer permits nothing for
        the session's ``stall_timeout``.
        """
        while data:
            try:
                data = self._write_some(data, timeout)
            except TimeoutError:
                if timeout is not None:
                    raise
                stalled = self.session.stall_timeout
                text = f"the stream was reset: the peer read nothing of it for {stalled:g} s"
                log.info("session with %s: stream %d: %s", self.session.name, self.id, text)
                self.reset(text)
                raise StreamReset(text) from None

    def _write_some(self, data: BytesLike, timeout: float | None) -> BytesLike:
        """Queue what the window permits, and return the rest."""
        session, mux, sender = self.session, self._mux, self._sender
        left: float | None = session.stall_timeout if timeout is None else timeout
        with self._lock:
            try:
                while True:
                    if self._error is not None:
                        self._raise_error()
                    if session._closing:  # close() sends only what was queued before
                        raise SessionClosed(session._closing[0])
                    if self._sent_fin:
                        raise ValueError("write() after finish()")
                    room = mux.room(self.id)
                    if room > 0:
                        break
                    left = self._writable.wait(left)
                if room >= len(data):
                    mux.send(self.id, data)
                    data = b""
                    if self._at_rest:
                        self._at_rest, self._on_death = False, None
                else:
                    data = memoryview(data)
                    mux.send(self.id, data[:room])
                    data = data[room:]
            finally:
                if self._writable.waiting:
                    self._writable.ring()  # credit wakes one writer; it may suffice for others
            batch = sender.take()
        sender.send(batch)
        return data

    def offer(self, data: BytesLike) -> bool:
        """Queue ``data``, without waiting, if the peer's window has room for all of it; else False.
        It leaves with Session.flush(). Only while no other thread is in write()."""
        with self._lock:
            over = self._error is not None or self.session._closing or self._sent_fin
            if over or self._mux.room(self.id) < len(data):
                return False
            self._mux.send(self.id, data)
            return True

    def finish(self) -> None:
        """Half-close: no more bytes from us. It never waits, unlike Duplex.finish()."""
        with self._lock:
            self._finish()
            batch = self._sender.take()
        self._sender.send(batch)

    def _finish(self) -> None:
        if not self._sent_fin and self._error is None:
            self._sent_fin = True
            self._writable.ring()
            self._mux.finish(self.id)
            self._streams.drop_if_over(self)

    def reset(self, text: str = "the stream was reset", code: int = 0) -> None:
        """Abort both directions with RST, which carries ``code``. Threads that read or write get
        StreamReset(text)."""
        with self._lock:
            if self._error is not None:
                self._cut()
                return
            self._streams.reset(self, text, code)
        self._sender.flush()
        self._streams.run_callbacks()

    def cut(self, text: str = "the stream was reset") -> None:
        """As reset(), but the peer first gets all that was written. If the stream is already dead,
        what came before can still be read."""
        with self._lock:
            if self._error is not None:
                return
            self._streams.cut(self, text)
        self._sender.flush()
        self._streams.run_callbacks()

    def close(self) -> None:
        """Send FIN after what was written, and drop what still comes.

        If the peer sends no FIN within LINGER_TIMEOUT, the stream is reset. Not earlier: a RST
        would make a Go peer drop bytes that its application has not read yet.
        """
        with self._lock:
            self._finish()
            self._discarding |= self._error is None  # else its reader must get the error, not b""
            self._drop_chunks()
            if self._known:
                self._mux.discard(self.id, monotonic())
                self._streams.expire(self, LINGER_TIMEOUT)
            self._readable.ring()
            batch = self._sender.take()
        self._sender.send(batch)


# The process -------------------------------------------------------------------------------------

# The memory limit of a container, in the two versions of Linux's control groups.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Bytes of memory of the machine, or of the container if that is less; 1 GiB if unknown."""
    sizes = []
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not a Unix
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in CGROUP_LIMITS:
        with contextlib.suppress(ValueError, OSError), open(path, encoding="ascii") as file:
            sizes.append(int(file.read()))  # "max" is no number: there is no limit
    return min(sizes, default=1 << 30)


_process_memory: Memory | None = None
_process_memory_lock = threading.Lock()  # guards it


def process_memory() -> Memory:
    """The Memory that all sessions share; made on the first call, since that reads files."""
    global _process_memory
    with _process_memory_lock:
        _process_memory = _process_memory or Memory(machine_memory(), threading.Lock())
        return _process_memory


EMBEDDED = "forward", "ForwardError", "NoAccount", "NotGranted", "OpenTunnel", "Unreachable"
if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """gotunnel.forward() and its errors (PEP 562). Imported on use: they import this file."""
        if name not in EMBEDDED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("gotunnel_agent.embedded"), name)
