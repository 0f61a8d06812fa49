"""Serves a visitor's connection that speaks HTTP/2 (RFC 9113), several requests at a time.

    reader's thread (http2_reader.py)           exchange's thread, one a request (room.Exchanges)
    bytes -> Screen -> Frames -> read_head  --> site, Exchange -> Http2Request -> Output

http2_screen.py bounds floods, http2_frames.py knows the protocol's rules, and http2_head.py checks
requests. Here the connection is shared between threads: one lock guards the rules and all requests,
and no thread holds it while it writes or waits.

**Receiving.** A request's body waits in its buffer, at most one flow control window of it. Only
what the exchange has read is granted to the visitor again, so a target that reads slowly slows its
visitor down. Windows start small and double while the exchange keeps up.

**Sending.** http2_output.py says how threads take turns.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from gotunnel_agent.common.http1 import Malformed
from gotunnel_agent.common.process import Stopped

from ..net.drops import PROTOCOL, SILENT, SLOW
from ..net.listener import LINGER, Address
from . import http2_head
from .connection import FULL_PARTING_TIME, PARTING_TIME, PARTING_TIMEOUT, Port
from .http2_frames import (
    MOST_STREAMS,
    START_WINDOW_ALL,
    Came,
    Frames,
    Happened,
    Opened,
    Requested,
    Reset,
)
from .http2_output import Output
from .http2_reader import Reader
from .http2_request import Http2Request
from .http2_screen import Code, Fault, Frame, Screen, Type
from .http2_windows import MOST_WINDOW_ALL, Growth, Window
from .sites import Site
from .visit import BLOCKED, CLIENT_CLOSED, Visit
from .visitor import Visitor

log = logging.getLogger("gotunnel.http2_server")

# Bytes of header lists of a connection's requests together, as http2_frames.LIST_LIMIT counts them.
# HPACK makes such a list out of some bytes.
HEADS_LIMIT = 1024 * 1024


class Shared(Protocol):
    """What all connections share: http2.Http2."""

    growth: Growth
    reader: Reader


class Http2Connection:
    """A visitor's HTTP/2 connection. The reader's thread calls the methods of its Connection;
    threads of exchanges and uploads call what their requests need."""

    def __init__(self, port: Port, shared: Shared, visitor: Visitor, site: Site, scheme: str):
        """``site``: see sites.py. ``scheme``: "https" or "http"."""
        self.duplex = visitor.duplex
        self.visitor = visitor
        self.port = port
        self.site = site
        self.scheme = scheme
        self.timeouts = port.timeouts
        self.growth = shared.growth
        self._reader = shared.reader
        self.lock = threading.Lock()  # guards the frames, the requests, the output, and these:
        self._frames = Frames()
        self._requests: dict[int, Http2Request] = {}  # by stream: those that have not ended
        self._heads = 0  # bytes of their header lists
        self._queued: deque[Http2Request] = deque()  # those that wait for a place
        self._served = 0  # those that have a place and a thread
        self._window = Window(START_WINDOW_ALL, MOST_WINDOW_ALL, shared.growth)
        self._leaving = False  # GOAWAY was sent
        self._idle_since = monotonic()  # since when there is no request
        self._forgotten = False  # the reader does not watch it any more
        self._closed = False
        # The reader's thread alone
        self._screen = Screen()
        self._new: list[Http2Request] = []  # requests that have come in this turn
        self._malformed: list[Visit] = []  # records of those that were reset in this turn
        # Since when a part of a frame is here, whose rest must follow in time
        self._incomplete_since: float | None = self._idle_since
        self._parting: tuple[float, float] | None = None  # when to close: in any case, if silent
        self._parts_slowly = False  # it has a place in port.parting
        self.output = Output(
            self._frames,
            self.duplex,
            self.lock,
            self.timeouts.stall,
            port.exchanges.room.crowded,
            lambda: self._reader.wake(self),
            self._screen.note_sent,
        )

    @property
    def address(self) -> Address:
        return self.visitor.address

    @property
    def wants_to_write(self) -> bool:
        return self.output.wants_to_write

    def start(self) -> None:
        """Have the reader read the connection, which is its own from now on. Raises NoThread,
        OSError; then it is still the caller's."""
        self._reader.add(self)

    # Receiving: the reader's thread

    def turn(self, now: float) -> float | None:
        """As Reader's Connection.turn()."""
        try:
            if self.output.broken:
                self._end(self.output.over or "broken")
                return None
            if self.output.wants_to_write:
                self.output.flush_kernel()
            data = self.duplex.receive()
            if data == b"":
                self._end("the visitor has left")
                return None
            if self._parting is not None:
                if data:
                    self._parting = self._parting[0], now + PARTING_TIMEOUT
                self.output.flush()
                return self._half_close()
            if data:
                self.visitor.has_spoken = True
                self._take(data, now)
            self.output.flush()
            return self._part(now, LINGER) if self._is_done() else self._screen.pause(now)
        except Fault as fault:
            self.visitor.why_dropped = PROTOCOL
            return self._refuse(fault, now)
        except OSError as error:
            self._end(str(error) or "broken")
            return None

    def _take(self, data: bytes, now: float) -> None:
        frames = self._screen.frames
        try:
            with self.lock:
                for frame in self._screen.feed(data, now):
                    self._receive(frame, now)
        finally:
            new, self._new = self._new, []
            malformed, self._malformed = self._malformed, []
            for visit in malformed:
                visit.end()
            for request in new:
                self._begin(request)
        if not self._screen.in_message:
            self._incomplete_since = None
        elif self._incomplete_since is None or frames != self._screen.frames:
            self._incomplete_since = now

    def _receive(self, frame: Frame, now: float) -> None:
        """One frame. Caller holds the lock. Raises Fault."""
        if frame.type == Type.DATA:
            request = self._requests.get(frame.stream_id)
            if request is not None and not request.ended and not request.fits(frame):
                self._reset_malformed(request, "its DATA does not fit its length", now)
        elif frame.type == Type.PRIORITY_UPDATE:
            self._update_priority(frame)
        for happened in self._frames.receive(frame):
            self._act(happened, frame, now)

    def _act(self, happened: Happened, frame: Frame, now: float) -> None:
        if isinstance(happened, Requested):
            self._request_came(happened, frame, now)
            return
        request = self._requests.get(happened.stream_id)
        if isinstance(happened, Reset):
            if happened.fault:
                self._screen.count_reset(now)
            if request is not None:
                request.cut(f"its stream was reset with code {happened.code}")
        elif isinstance(happened, Opened):
            if request is not None:
                request.wake()
            else:
                self.output.wake_next()
        elif request is None or request.reset is not None:
            if isinstance(happened, Came):
                self._grant_all(happened.flow, now)  # nobody will read it
        elif isinstance(happened, Came):
            request.take_data(happened.data, happened.flow, happened.ended)
        elif request.is_short:
            self._reset_malformed(request, "its DATA does not fit its length", now)
        else:
            try:
                request.take_trailers(http2_head.read_trailers(happened.block))
            except Malformed as error:
                self._reset_malformed(request, str(error), now)

    def _request_came(self, came: Requested, frame: Frame, now: float) -> None:
        # A stream that its visitor has reset counts until its exchange has ended: so resets make no
        # room for more requests (CVE-2023-44487).
        if (
            self._leaving
            or len(self._requests) >= MOST_STREAMS
            or self._heads + came.size > HEADS_LIMIT
        ):
            self._frames.reset(came.stream_id, Code.REFUSED_STREAM)
            self._screen.count_refused(now)
            return
        visits, visit = self.port.visits, None
        if visits is not None:
            visit = visits.begin(self.address[0])
            visit.received = len(frame.data)
            visit.protocol, visit.scheme = "HTTP/2.0", self.scheme
        try:
            head = http2_head.read_head(came.block, came.ended)
        except Malformed as error:
            log.debug("%s: a malformed request is reset: %s", self.visitor, error)
            self._frames.reset(came.stream_id, Code.PROTOCOL_ERROR)
            if visit is not None:
                visit.fail("malformed-request", error.status)
                self._malformed.append(visit)
            self._screen.count_reset(now)
            return
        request = Http2Request(self, came.stream_id, head, came.ended, came.size, visit)
        self._requests[came.stream_id] = request
        self._heads += came.size
        self._new.append(request)

    def _reset_malformed(self, request: Http2Request, why: str, now: float) -> None:
        log.debug("%s: a malformed request is reset: %s", self.visitor, why)
        request.fail_visit("malformed-request", 400)
        self.output.reset(request, Code.PROTOCOL_ERROR, why)
        self._screen.count_reset(now)

    def _update_priority(self, frame: Frame) -> None:
        """A PRIORITY_UPDATE frame (RFC 9218 §7.1): a stream's id and its priority field."""
        payload = frame.data
        if frame.stream_id or len(payload) < 4:
            raise Fault(Code.PROTOCOL_ERROR, "a PRIORITY_UPDATE frame on a stream, or a short one")
        request = self._requests.get(int.from_bytes(payload[:4], "big") & 0x7FFF_FFFF)
        if request is not None:
            request.urgency = http2_head.read_urgency(payload[4:].decode("latin-1"))

    # Requests: the reader's thread, or a step worker

    def _begin(self, request: Http2Request) -> None:
        if not self.visitor.has_asked:
            self.visitor.seat.settle()
            self.visitor.has_asked = True
        request.describe()
        if not (self.port.absent and request.await_agent()):
            self.give_place(request)

    def give_place(self, request: Http2Request) -> None:
        """Have a thread serve the request, once there is a place for it. While the connection has
        some, it may wait for one of them; otherwise it is refused. Does not wait."""
        exchanges, host = self.port.exchanges, self.address[0]
        if exchanges.room.enter(host):
            with self.lock:
                self._served += 1
            try:
                exchanges.start(self._serve, request)
            except Stopped:
                self._leave_room()
                self._refuse_busy(request)
            return
        with self.lock:
            if self._served and self.output.over is None:
                self._queued.append(request)
                return
        self._refuse_busy(request)

    def _leave_room(self) -> None:
        with self.lock:
            self._served -= 1
        self.port.exchanges.room.leave(self.address[0])

    def _refuse_busy(self, request: Http2Request) -> None:
        request.fail_visit("gateway-busy", 503)
        with self.lock:
            self.output.reset(request, Code.REFUSED_STREAM, "no place")
        self.leave(request)

    def _serve(self, request: Http2Request | None) -> None:
        """Exchange's thread: serve this request, then others that wait for its place."""
        while request is not None:
            request.serve()
            with self.lock:
                request = self._queued.popleft() if self._queued else None
                if request is None:  # in one step: a request that comes now must not be queued
                    self._served -= 1
        self.port.exchanges.room.leave(self.address[0])

    def leave(self, request: Http2Request) -> None:
        """The request has ended, well or badly."""
        now, output = monotonic(), self.output
        with self.lock:
            if self._requests.pop(request.stream_id, None) is None:
                return
            self._heads -= request.head_size
            if output.over is None:
                if not request.sent_end:
                    output.reset(request, Code.CANCEL, "ended")
                elif not request.ended:
                    output.reset(request, Code.NO_ERROR, "answered")
                if request.came_flow:
                    self._grant_all(request.came_flow, now)
            if request.window is not None:
                request.window.end()
            is_last = not self._requests
            if is_last:
                self._idle_since = now
            # The reader must see that the last request has ended, to close the connection.
            closes = is_last and (self._leaving or output.over is not None)
        if request.visit is not None:
            request.visit.end()
        output.flush()
        if closes:
            self._reader.wake(self)
            self._close_if_left()

    # For requests

    def reset(self, request: Http2Request, code: Code, why: str) -> None:
        """Reset a request's stream. Any thread."""
        with self.lock:
            self.output.reset(request, code, why)
        self.output.flush()

    def grant(self, request: Http2Request, window: Window, size: int) -> None:
        """The exchange has read ``size`` bytes of the body, padding included. Caller holds the
        lock, and flushes."""
        now = monotonic()
        granted = window.consumed(size, not request.came, now)
        if granted and not request.ended and request.reset is None and self.output.over is None:
            self._frames.grant(granted, request.stream_id)
        self._grant_all(size, now)

    def _grant_all(self, size: int, now: float) -> None:
        granted = self._window.consumed(size, True, now)
        if granted and self.output.over is None:
            self._frames.grant(granted)

    # Ending

    def drain(self) -> None:
        """As Reader's Connection.drain()."""
        with self.lock:
            self._say_goodbye(Code.NO_ERROR)

    def _say_goodbye(self, code: Code, text: str = "") -> None:
        """GOAWAY. Caller holds the lock, and flushes."""
        if self.output.over is None and (code or not self._leaving):
            self._leaving = True
            self._frames.say_goodbye(code, text)

    def _is_done(self) -> bool:
        if not self._leaving:
            return False
        with self.lock:
            return not self._requests and self.output.is_empty

    def look(self, now: float) -> bool:
        """As Reader's Connection.look()."""
        if self._parting is not None:
            if now >= min(self._parting):
                self._end("closed")
                return False
            return True
        since, most = self._incomplete_since, self.timeouts.header
        if self._screen.in_data:
            most = self.timeouts.idle
        if since is not None and now - since >= most:
            self.visitor.why_dropped = SLOW if self.visitor.has_spoken else SILENT
            return self._refuse(Fault(Code.NO_ERROR, "a frame is incomplete"), now) is not None
        if self._requests or now - self._idle_since < self.timeouts.idle:
            return True
        self.drain()
        self.output.flush()
        return not self._is_done() or self._part(now, LINGER) is not None

    def _refuse(self, fault: Fault, now: float) -> float | None:
        """End the connection by GOAWAY. Its requests break."""
        log.debug("%s: %s; GOAWAY with %s", self.visitor, fault, fault.code.name)
        with self.lock:
            self._say_goodbye(fault.code, str(fault))
            self._give_up("closed")  # under one lock, so that no answer goes on behind GOAWAY
        self.output.flush()
        return self._part(now)

    def _part(self, now: float, silence: float = PARTING_TIMEOUT) -> float | None:
        """Begin the lingering close, as HttpConnection does: half-close, and drop what still comes,
        until the visitor is silent for ``silence`` seconds. Otherwise the kernel would send RST,
        which can destroy our GOAWAY on its way."""
        with self.lock:
            self._give_up("closed")
        self._parts_slowly = self.port.parting.enter(self.address[0])
        most = PARTING_TIME if self._parts_slowly else FULL_PARTING_TIME
        self._parting = now + most, now + min(silence, most)
        return self._half_close()

    def _half_close(self) -> float | None:
        """Half-close once all is written; another thread may be writing still."""
        with self.lock:
            if not self.output.is_empty:
                return 0.0
        try:
            self.duplex.finish(timeout=0)
        except TimeoutError:
            self.output.wants_to_write = True  # the visitor is not reading; a later turn flushes
        except OSError:
            self._end("broken")
            return None
        return 0.0

    def _give_up(self, why: str) -> None:
        """Nothing can be sent or read any more: wake all threads. Caller holds the lock."""
        self.output.over = self.output.over or why
        for request in self._requests.values():
            request.cut(why)

    def _end(self, why: str) -> None:
        """The connection is over, and the reader is about to forget it."""
        with self.lock:
            self._give_up(why)
            if self._requests:  # a thread may wait in the middle of a write
                self.duplex.reset()
            queued = list(self._queued)
            self._queued.clear()
        for request in queued:
            self.leave(request)

    def break_off(self) -> None:
        """As Reader's Connection.break_off()."""
        self._end("the gateway stops")

    def close_when_left(self) -> None:
        """As Reader's Connection.close_when_left()."""
        with self.lock:
            self._give_up("closed")
            self._forgotten = True
        self._close_if_left()

    def _close_if_left(self) -> None:
        with self.lock:
            if not self._forgotten or self._requests or self._closed:
                return
            self._closed = True
            self._window.end()
        if self._parts_slowly:
            self.port.parting.leave(self.address[0])
        self.visitor.close()

    def cut_visits(self, is_cut: Callable[[str], bool]) -> int:
        """Reset the requests under way whose visitor is_cut(address); returns how many. Any
        thread."""
        with self.lock:
            found = [
                request for request in self._requests.values()
                if request.visit is not None and is_cut(request.visit.visitor)
            ]  # fmt: skip
        for request in found:
            request.fail_visit(BLOCKED, CLIENT_CLOSED)
            self.reset(request, Code.CANCEL, "the visitor is blocked")
        return len(found)

    def fail_visits(self, error: str, status: int) -> None:
        """Note for all visits under way why they are cut. Any thread."""
        with self.lock:
            for request in self._requests.values():
                request.fail_visit(error, status)
