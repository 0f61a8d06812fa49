"""One HTTP/2 request and its answer, for the exchange: a request.Request in a stream."""

import hashlib
import logging
import os
import threading
from base64 import b64encode
from collections.abc import Iterable
from time import monotonic
from typing import Protocol

from gotunnel import Ends, NoThread
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.common.http1 import Fields, Malformed
from gotunnel_agent.common.patience import Patience

from ..net.listener import Address
from ..routes import Tunnel
from . import login, pages, relays, request_id
from .connection import Port
from .exchange import exchange, send_page
from .http1_server import READ_WORK, WORK_BURST, WORK_PAYLOAD, WORK_RATE
from .http2_frames import START_WINDOW
from .http2_head import Head
from .http2_output import Output
from .http2_relay import StreamEnd, StreamVisitor
from .http2_screen import END_STREAM, Code, Frame
from .http2_windows import MOST_WINDOW, Growth, Window
from .login import Owner
from .pages import Page
from .request import LEAST_BYTE_RATE, AgentLost, Connect, Onward, Upgraded, VisitorGone
from .room import Timeouts
from .sites import Forward, Site
from .visit import BUG, CLIENT_CLOSED, LEFT, SLOW, Visit
from .visitor import Visitor
from .work import Work

log = logging.getLogger("gotunnel.http2_request")

# How often a request whose agent has left is tried on the next route without a wait between.
MOST_TRIES = 3
# Fields of an HTTP/1.1 answer that HTTP/2 does not have: of a 426, and what a target might send
# against the rules.
_NOT_IN_HTTP2 = frozenset({"connection", "upgrade", "keep-alive", "transfer-encoding"})
_WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3


class Connection(Protocol):
    """What a request needs of its http2_server.Http2Connection, which explains the members."""

    lock: threading.Lock
    output: Output
    visitor: Visitor
    port: Port
    site: Site
    scheme: str
    timeouts: Timeouts
    growth: Growth

    def reset(self, request: "Http2Request", code: Code, why: str) -> None: ...

    def grant(self, request: "Http2Request", window: Window, size: int) -> None: ...

    def leave(self, request: "Http2Request") -> None: ...

    def give_place(self, request: "Http2Request") -> None: ...


class Http2Request:
    """A request.Request in a stream of an Http2Connection, whose lock guards what its own threads
    share with the reader's."""

    owner: Owner | None = (
        None  # logins that are bound to a connection need HTTP/1.1: see send_head()
    )
    trailers: Iterable[tuple[str, str]] = ()
    may_wait = True
    wants_upgrade = False
    switched: Onward | None = None  # the other end, once raw bytes flow
    reset: str | None = None  # why the stream is over before its end
    # The body
    came_flow = 0  # bytes in ``came``, as flow control counts them, with padding
    _received = 0  # payload bytes so far
    _unwanted = False  # see stop_reading()
    # The answer
    turn = 0  # number of the last turn that it sent in: see rank
    waits_for = 0  # while its thread waits to send: bytes of DATA, 0 for a head
    sent_end = False
    _waiting: list[tuple[str, str]] | None = None  # the head, until it leaves with the body
    _patience: Patience | None = None

    _websocket_key = ""  # of a WebSocket (RFC 8441), which over HTTP/2 has none
    # When it gets its page though its agent is not back (monotonic); tries without a wait
    _wait_until = 0.0
    _tries = 0
    _changed: threading.Condition | None = None  # made by the first thread that waits
    _relayed: StreamVisitor  # set by switch()

    def __init__(
        self,
        connection: Connection,
        stream_id: int,
        head: Head,
        ended: bool,
        head_size: int,
        visit: Visit | None,
    ):
        """``ended``: END_STREAM has come with the head. ``head_size``: of its header list."""
        self.stream_id = stream_id
        self.method = head.method
        self.hostname = head.hostname
        self.authority = head.authority
        self.path = head.path
        self.fields = head.fields
        self.scheme = connection.scheme
        self.sni = connection.visitor.sni
        self.visit = visit
        self.templates = connection.port.templates
        self.peer: str = connection.visitor.address[0]
        self.has_body, self.body_length = head.has_body, head.body_length
        self.idle_timeout = connection.timeouts.idle
        self.head_size = head_size
        self._connection = connection
        self._head = head
        if head.protocol == "websocket":
            self._become_upgrade()
        self.ended = ended  # the visitor has sent END_STREAM
        self.window: Window | None = None  # for what it may send
        if not ended:
            self.window = Window(START_WINDOW, MOST_WINDOW, connection.growth)
        self.came = bytearray()  # payload that was not read yet
        self._read_whole = ended and (not self.has_body or self.body_length == 0)
        self._work = Work(WORK_RATE, WORK_BURST) if self.has_body else None
        self.urgency = head.urgency

    def _become_upgrade(self) -> None:
        """Translate an extended CONNECT into the request that asks an HTTP/1.1 target for a
        WebSocket (RFC 8441 §5, RFC 6455 §4.1)."""
        self._websocket_key = b64encode(os.urandom(16)).decode()
        self.method, self.wants_upgrade = "GET", True
        added = [("Upgrade", "websocket"), ("Sec-WebSocket-Key", self._websocket_key)]
        items = [item for item in self.fields if item[0] != "sec-websocket-key"]
        self.fields = Fields(items + added)

    @property
    def address(self) -> Address:
        return self._connection.visitor.address

    @property
    def duplex(self) -> Duplex:
        return self._connection.visitor.duplex

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among those that wait to send: the smallest first."""
        return self.urgency, self.turn

    # Caller holds the lock

    def wait(self, timeout: float | None) -> None:
        """Wait until another thread calls wake()."""
        if self._changed is None:
            self._changed = threading.Condition(self._connection.lock)
        self._changed.wait(timeout)

    def wake(self) -> None:
        if self._changed is not None:
            self._changed.notify_all()

    # The reader's thread. Caller holds the lock

    def fits(self, frame: Frame) -> bool:
        """Count a DATA frame; False if it is more, or less, than the content-length says."""
        self._received += len(frame.data)
        if self.body_length is None:
            return True
        if frame.flags & END_STREAM:
            return self._received == self.body_length
        return self._received <= self.body_length

    @property
    def is_short(self) -> bool:
        return self.body_length is not None and self._received != self.body_length

    def take_data(self, data: bytes, flow: int, ended: bool) -> None:
        """Payload has come; ``flow``: its bytes with padding. ``ended``: the request is whole."""
        self.came += data
        self.came_flow += flow
        self.ended = ended
        if self.visit is not None:
            self.visit.received += len(data)
        self.wake()

    def take_trailers(self, trailers: list[tuple[str, str]]) -> None:
        """The request is whole."""
        self.trailers, self.ended = trailers, True
        self.wake()

    def cut(self, why: str) -> None:
        """The stream is over: wake its threads."""
        if self.reset is None:
            self.reset = why
        self.wake()

    def describe(self) -> None:
        """Complete the record of the visit."""
        if self.visit is not None:
            self.visit.describe(
                self.method, self.hostname, self.path or self.authority, "HTTP/2.0",
                self.scheme, self.fields,
            )  # fmt: skip

    # Serving: the exchange's thread

    def serve(self) -> None:
        """Answer the request, and end it."""
        connection = self._connection
        try:
            self._serve()
        except AgentLost as error:
            if self.await_agent(error.tunnel):
                return
            # Its agent is back, or it must not wait: then this is the last try.
            self._tries += 1
            self.may_wait = self._tries < MOST_TRIES and monotonic() < self._wait_until
            return self.serve()
        except NoThread as error:
            log.warning("%s: %s; the visit is reset", connection.visitor, error)
            self.fail_visit("gateway-busy", 503)
        except TimeoutError as error:
            log.debug("%s: %s", connection.visitor, error)
            self.fail_visit(SLOW, CLIENT_CLOSED)
        except (OSError, VisitorGone) as error:
            log.debug("%s: %s", connection.visitor, error or "left")
            self.fail_visit(LEFT, CLIENT_CLOSED)
        except Exception:
            log.exception("%s: a request is reset (bug, traceback follows)", connection.visitor)
            self.fail_visit(BUG, 500)
            self.abort()
        else:
            if self.switched is not None:
                return self._start_relay(self.switched)
        connection.leave(self)

    def _serve(self) -> None:
        head, connection = self._head, self._connection
        if self.reset is not None:
            raise VisitorGone
        if head.too_large is not None:
            text = pages.MALFORMED.format(head.too_large)
            return send_page(self, pages.error(head.too_large.status, "malformed-request", text))
        if head.protocol not in (None, "websocket"):
            text = "This gateway knows no extended CONNECT for that protocol. It knows websocket."
            return send_page(self, pages.error(501, "malformed-request", text))
        answer = connection.site(self)
        if isinstance(answer, Forward):
            if self.visit is not None:
                self.visit.route = answer.route
            exchange(self, answer, connection.port.proxies, connection.timeouts.response).run()
        elif isinstance(answer, Page):
            if answer.code == pages.NO_TUNNEL and connection.port.absent and self.may_wait:
                raise AgentLost(None)  # the agent may have left since the head was read
            send_page(self, answer)
        elif isinstance(answer, Connect):
            if self.visit is not None:
                self.visit.route = answer.route
            if not self.switch(200, "", [], b"", answer):
                send_page(self, pages.error(503, "gateway-busy", pages.BUSY))
        else:
            answer.serve(self)

    def _start_relay(self, onward: Onward) -> None:
        visitor = self._relayed
        try:
            if isinstance(onward, Upgraded):
                relays.start_switched(visitor, *onward)
            elif isinstance(onward, Connect):
                relays.start_tcp(visitor, onward.route)
            else:
                relays.start_feed(visitor, onward)
        except NoThread as error:
            log.warning("%s: %s; the visit is reset", visitor, error)
            visitor.fail_visit("gateway-busy", 503)
            visitor.close()

    def await_agent(self, lost: Tunnel | None = None) -> bool:
        """Let the request wait for its agent, if that is expected; then it has no thread."""
        port = self._connection.port
        waiting = port.waiting
        if waiting is None or not self.may_wait or port.is_draining():
            return False
        now = monotonic()
        self._wait_until = self._wait_until or now + waiting.timeout
        if now >= self._wait_until:
            return False
        listener, left = self._connection.visitor.listener, self._wait_until - now
        return waiting.enter(self.hostname, self, listener, self.ready, left, lost)

    # As a listener's Parkable, for the waiting room

    silent = brief = False

    def ready(self) -> None:
        """Worker: the waiting is over."""
        self._connection.give_place(self)

    expired = ready

    def close(self) -> None:
        """The gateway stops."""
        self._connection.leave(self)

    def fail_visit(self, error: str, status: int) -> None:
        if self.visit is not None:
            self.visit.fail(error, status)

    # request.Request

    def ends(self) -> Ends:
        return self._connection.visitor.ends()

    @property
    def body_complete(self) -> bool:
        return self._read_whole or not self.has_body

    def read_body(self, timeout: float) -> list[bytes]:
        if self.body_complete:
            return []
        data = self.read(timeout)
        if self._work is not None:
            self._work.spend(READ_WORK - len(data) // WORK_PAYLOAD)
        return [data] if data else []

    def unread_body(self, pieces: list[bytes]) -> None:
        with self._connection.lock:
            self.came[:0] = b"".join(pieces)
            self._read_whole = self.ended and not self.came

    def read(self, timeout: float | None) -> bytes:
        """What has come, b"" at the end. Raises TimeoutError, VisitorGone."""
        until = None if timeout is None else monotonic() + timeout
        connection = self._connection
        with connection.lock:
            while not (self.came or self.ended or self._unwanted):
                if self.reset is not None:
                    raise VisitorGone(self.reset)
                left = None if until is None else until - monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("the visitor sent nothing in time")
                self.wait(left)
            if self.reset is not None and not self.ended:
                raise VisitorGone(self.reset)
            data, self.came = bytes(self.came), bytearray()
            flow, self.came_flow = self.came_flow, 0
            self._read_whole = self.ended
            if flow and self.window is not None:
                connection.grant(self, self.window, flow)
        connection.output.flush()
        return data

    def crowded(self) -> bool:
        return self._connection.port.exchanges.room.crowded()

    def spend_patience(self, seconds: float, granted: int) -> None:
        """The visitor's window was closed for some time, and is open now by so many bytes."""
        if self._patience is None:
            stall = self._connection.timeouts.stall
            self._patience = Patience(stall, LEAST_BYTE_RATE, self.crowded)
        self._patience.spend(seconds, granted)

    def send_interim(self, status: int, reason: str, fields: list[tuple[str, str]]) -> None:
        self._connection.output.send(self, _block(status, fields))

    def send_head(
        self, status: int, reason: str, fields: list[tuple[str, str]], length: int | None
    ) -> None:
        visit = self.visit
        if visit is not None:
            visit.status, visit.first_byte_at = status, monotonic()
            if visit.request_id:
                fields.append((request_id.FIELD, visit.request_id))
        if status == 401 and login.concerns_connection(Fields(fields), "www-authenticate"):
            # NTLM and Negotiate log a connection in, not a request. Clients repeat the request by
            # HTTP/1.1, where the connection can have a stream of its own (login.py).
            self._connection.reset(self, Code.HTTP_1_1_REQUIRED, "its login needs HTTP/1.1")
            raise VisitorGone("its login needs HTTP/1.1")
        if length is not None and status != 204:
            fields.append(("content-length", str(length)))
        self._waiting = _block(status, fields)

    def send_data(self, pieces: list[bytes]) -> None:
        self._send(pieces)

    def finish(self, pieces: list[bytes], trailers: Iterable[tuple[str, str]] = ()) -> None:
        self._send(pieces, end=True, trailers=_in_http2(trailers) if trailers else None)

    def _send(
        self,
        pieces: list[bytes],
        end: bool = False,
        trailers: list[tuple[str, str]] | None = None,
    ) -> None:
        head, self._waiting = self._waiting, None
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if head is not None or data or end:
            self._connection.output.send(self, head, data, end, trailers)

    def refuse_body(self) -> None:
        if self.sent_end:
            self._connection.reset(self, Code.NO_ERROR, "answered")

    def abort(self) -> None:
        self._connection.reset(self, Code.INTERNAL_ERROR, "the answer was cut short")

    def gone(self) -> bool:
        return self.reset is not None

    def switch(
        self,
        status: int,
        reason: str,
        fields: list[tuple[str, str]],
        data: bytes,
        onward: Onward,
    ) -> bool:
        if isinstance(onward, Upgraded):
            fields = self._accepted(fields)
        visitor = StreamVisitor(self._connection.visitor, StreamEnd(self), self.visit)
        if not visitor.claim_relay():
            return False
        self._relayed = visitor
        visit = self.visit
        if visit is not None:
            visit.status, visit.first_byte_at = status, monotonic()
            if visit.request_id:
                fields.append((request_id.FIELD, visit.request_id))
        try:
            self._connection.output.send(self, _block(200, fields), data)
        except BaseException:
            visitor.close()
            raise
        self.switched = onward
        return True

    def _accepted(self, fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The fields of the answer 101 as those of 200 (RFC 8441 §5). The visitor cannot check that
        the target speaks WebSocket, so it is checked here (RFC 6455 §4.1). Raises Malformed."""
        digest = hashlib.sha1((self._websocket_key + _WEBSOCKET_GUID).encode()).digest()
        came = Fields(fields)
        if came.get("sec-websocket-accept") != b64encode(digest).decode():
            raise Malformed(400, "answer 101 without the right Sec-WebSocket-Accept")
        dropped = ("upgrade", "sec-websocket-accept")
        return [item for item in fields if item[0].lower() not in dropped]

    # As the end of a relay: see http2_relay.py

    def send_raw(self, data: bytes, end: bool = False) -> None:
        self._connection.output.send(self, None, data, end)

    def end(self, code: Code, why: str) -> None:
        self._connection.reset(self, code, why)

    def stop_reading(self) -> None:
        """Make read() return what has come, and then b""."""
        with self._connection.lock:
            self._unwanted = True
            self.wake()

    def leave(self) -> None:
        self._connection.leave(self)


def _block(status: int, fields: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """An answer's header list."""
    return [(":status", str(status)), *_in_http2(fields)]


def _in_http2(fields: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        (lower, value) for name, value in fields if (lower := name.lower()) not in _NOT_IN_HTTP2
    ]
