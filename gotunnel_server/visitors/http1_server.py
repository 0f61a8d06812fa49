"""Reads a visitor's HTTP/1.1 requests and writes the answers (RFC 9112).

`Handler` is the visitor's connection, `Http1Request` one request with its answer. sites.py decides
what a request gets, and exchange.py forwards it to the target. http1.py parses heads and bodies,
strictly: if gateway and target parse a request differently, a visitor can hide a second request in
it (request smuggling).
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable
from http.server import BaseHTTPRequestHandler
from time import monotonic
from typing import NamedTuple

from gotunnel import Deadline, Ends
from gotunnel_agent.common import http1
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.common.http1 import Fields, Malformed
from gotunnel_agent.common.patience import Patience

from ..net.hung_up import hung_up
from ..net.listener import Address
from . import pages, request_id
from .exchange import exchange, send_page
from .forwarded import Proxies
from .login import Owner
from .pages import Page
from .request import LEAST_BYTE_RATE, AgentLost, Connect, Onward, VisitorGone
from .sites import Forward, Site
from .visit import Visit
from .work import Work

log = logging.getLogger("gotunnel.http1_server")

# Work budget for a request's body: units a second in the long run, and at once. A chunk costs one
# unit, about 2 µs; a read costs READ_WORK units, with all that it causes; each WORK_PAYLOAD bytes
# give one unit back. So neither bulk data nor a person's typing is slowed. Tiny chunks and tiny
# segments are, until one read finds several of them.
WORK_RATE, WORK_BURST = 4000, 20_000
READ_WORK = 50
WORK_PAYLOAD = 64

NO_FIELDS = Fields([])
NO_CONTENT = (204, 304)  # statuses of answers without a body (RFC 9112 §6.3)


class Handler(BaseHTTPRequestHandler):
    """A visitor's HTTP/1.1 connection, one request after the other.

    Unlike its base class it is not run by a server: the owner of the connection calls head_came()
    when bytes have arrived, and handle_one_request() when that returned True. One thread at a time.
    """

    connection: Duplex

    def __init__(
        self,
        duplex: Duplex,
        address: Address,
        *,
        site: Site,
        scheme: str,
        sni: str | None,
        proxies: Proxies,
        owner: Owner | None,
        claim_relay: Callable[[], bool],
        is_draining: Callable[[], bool],
        is_crowded: Callable[[], bool],
        idle_timeout: float,
        response_timeout: float,
        stall_timeout: float,
    ):
        """``site(request)`` decides what a request gets: see sites.py.
        ``scheme``, ``sni``, ``owner``: see request.Request. ``claim_relay()``: whether the
        connection may become a relay. ``is_draining()``: whether an answer that begins now is the
        last one. ``is_crowded()``: as Request.crowded(). Timeouts are in seconds;
        ``response_timeout`` is the target's, the others are the visitor's.
        """
        self.scheme = scheme
        self.sni = sni
        self.owner = owner
        self.claim_relay = claim_relay
        self.is_draining = is_draining
        self.is_crowded = is_crowded
        self.idle_timeout = idle_timeout
        self.stall_timeout = stall_timeout
        self.visit: Visit | None = None  # the present one, if visits are recorded
        self.close_connection = False
        self.may_wait = True  # as Request.may_wait
        self.absent: Collection[str] = ()  # as WaitingRoom.absent
        self.templates = pages.NO_TEMPLATES  # as Request.templates
        self.current: Http1Request | None = None  # None while the next head is incomplete, too
        # For a visitor that reads slowly; made when a write has to wait for the first time.
        self._reader: Patience | None = None
        self.switched: Onward | None = None  # the other end, once raw bytes flow
        self._site = site
        self._proxies = proxies
        self._response_timeout = response_timeout
        self._buffer = b""  # the beginning of a head
        self._again: Http1Request | None = None  # its tunnel did not get it: see unread_body()
        # As the base's __init__(), which would also serve the whole connection.
        self.request = self.connection = duplex
        self.client_address = address

    # Requests

    @property
    def in_head(self) -> bool:
        """Whether part of a head has arrived. An empty line does not count: some visitors send one
        behind a body, and perhaps no further request (RFC 9112 §2.2)."""
        return self._buffer not in (b"", b"\r", b"\r\n")

    def head_came(self) -> bool:
        """Read what has arrived of the next head; True once it is complete. Does not wait.

        Raises VisitorGone, Malformed, OSError.
        """
        end = -1
        while end < 0:
            data = self.connection.receive()
            if data is None:
                return False
            if not data:
                raise VisitorGone
            seen = len(self._buffer)
            self._buffer += data
            self.current = None
            end = http1.head_end(self._buffer, seen)
        self.raw_requestline, rest = self._buffer[:end], self._buffer[end:]
        if rest:
            self.connection.unread(rest)
        self._buffer, self._again = b"", None
        return True

    def read_request(self) -> "Http1Request":
        """Parse the head that has arrived. Raises Malformed."""
        if self._again is not None:
            self._again.may_wait = self.may_wait
            return self._again
        request = self.current = Http1Request(self)
        try:
            request.read_head(self.raw_requestline)
        finally:
            if self.visit is not None:
                self.visit.received = len(self.raw_requestline)
                self.visit.describe(
                    request.method, request.hostname or self.sni or "",
                    request.path or request.authority, f"HTTP/1.{request.minor}", self.scheme,
                    request.fields,
                )  # fmt: skip
        return request

    def forget(self) -> None:
        """The connection is closed, or a relay's. Without this, Handler and request would hold each
        other in a reference cycle, and with it the connection."""
        self.current = self._again = None

    def describe_visit(self) -> None:
        """Note what is known of a request whose head could not be read whole."""
        if self.visit is not None and not self.visit.scheme:
            self.visit.received = len(self._buffer)
            self.visit.describe("", self.sni or "", "", "", self.scheme, NO_FIELDS)

    def keep(self, request: "Http1Request") -> None:
        """The next try is to have this request: a part of its body was read already."""
        self._again = request

    def handle_one_request(self) -> None:
        """Answer the request whose head has arrived. Raises AgentLost if its agent has left and
        nothing was sent: call this again for another try. Raises VisitorGone or an OSError if the
        connection cannot be used any more."""
        try:
            request = self.read_request()
        except Malformed as error:
            page = pages.error(error.status, "malformed-request", pages.MALFORMED.format(error))
            return self.send_page(page, last=True)
        answer = self._site(request)
        if isinstance(answer, Forward):
            if self.visit is not None:
                self.visit.route = answer.route
            exchange(request, answer, self._proxies, self._response_timeout).run()
        elif isinstance(answer, Page):
            if answer.code == pages.NO_TUNNEL and self.absent and self.may_wait:
                raise AgentLost(None)  # the agent may have left since the head was read
            send_page(request, answer)
        elif isinstance(answer, Connect):
            if self.visit is not None:
                self.visit.route = answer.route
            if not request.switch(200, "Connection established", [], b"", answer):
                send_page(request, pages.error(503, "gateway-busy", pages.BUSY))
        else:
            answer.serve(request)

    def send_page(self, page: Page, *, last: bool = False) -> None:
        """Answer with one of the gateway's own pages, even if no head could be parsed. With
        ``last`` the connection ends after it."""
        if last:
            self.close_connection = True
        send_page(self.current or Http1Request(self), page)

    def write(self, data: bytes, last: bool = False) -> None:
        """Send ``data``; with ``last`` also half-close the connection. Raises TimeoutError if the
        visitor reads nothing for ``stall_timeout`` seconds, or less than LEAST_BYTE_RATE
        (request.py). Then the connection is reset, so that the part which the visitor has read does
        not look complete."""
        spend = self._wait_for_reader if self.stall_timeout else None
        try:
            write = self.connection.write_last if last else self.connection.write
            write(data, self.stall_timeout, spend)
            if self.visit is not None:
                self.visit.sent += len(data)
        except OSError as error:
            self.connection.reset()
            if isinstance(error, TimeoutError) and self.stall_timeout:
                hostname = self.current.hostname if self.current else ""
                log.info("%s: the answer to %s is reset, its visitor read %s",
                         hostname, self.client_address[0], error)  # fmt: skip
            raise

    def _wait_for_reader(self, seconds: float, taken: int) -> None:
        if self._reader is None:
            self._reader = Patience(self.stall_timeout, LEAST_BYTE_RATE, self.is_crowded)
        self._reader.spend(seconds, taken)


class Incoming(NamedTuple):
    """A request's body, while it arrives. Only read_body() reads the connection until ``was_read``
    is set: then the bytes behind the body have been given back to the connection."""

    body: http1.Body
    work: Work  # the budget for reading it
    was_read: threading.Event


class Http1Request:
    """A request.Request that arrived over a Handler's connection."""

    # Values before the head is parsed. A malformed head leaves some of them.
    method = hostname = authority = path = ""
    fields = NO_FIELDS
    minor = 1  # of the HTTP version: 0 or 1
    wants_upgrade = has_body = False
    body_length: int | None = None
    trailers: Iterable[tuple[str, str]] = ()

    def __init__(self, handler: Handler):
        self.scheme = handler.scheme
        self.sni = handler.sni
        self.owner = handler.owner
        self.may_wait = handler.may_wait
        self.visit = handler.visit
        self.templates = handler.templates
        self.peer: str = handler.client_address[0]
        self.idle_timeout = handler.idle_timeout
        self._handler = handler
        self._connection = handler.connection
        self._incoming: Incoming | None = None  # None: the request has no body
        self._given_back: list[bytes] = []  # pieces of the body
        self._waiting = b""  # the answer's head, until the first bytes of its body leave with it
        self._chunked = False  # the answer's body is sent in chunks

    def read_head(self, raw: bytes) -> None:
        """Parse the request's head. Raises Malformed."""
        head = http1.parse_request(raw)
        self.method, self.minor, self.fields = head.method, head.minor, head.fields
        self.hostname = http1.hostname(head) or self.sni or ""
        is_connect = head.method == "CONNECT"
        self.path = head.path or ""
        if is_connect:
            self.authority = head.target
        else:
            hosts = head.fields.named.get("host")
            self.authority = hosts[0] if hosts else self.hostname
        body = http1.request_body(head)
        if body is not None:
            self.has_body, self.body_length = True, body.length
            was_read = threading.Event()
            if body.complete:  # Content-Length: 0
                was_read.set()
            self._incoming = Incoming(body, Work(WORK_RATE, WORK_BURST), was_read)
        if head.minor == 1 and "upgrade" in head.fields.connection:  # RFC 9110 §7.8
            protocols = head.fields.tokens("upgrade")
            # h2c: the gateway could not parse what follows, so it could not check it either
            # (request smuggling). RFC 9113 §3.1 has abandoned it.
            self.wants_upgrade = protocols != [] and "h2c" not in protocols
        # Bytes behind a CONNECT may be meant for its other end; they are not the next request.
        self._handler.close_connection = not http1.keeps_alive(head) or is_connect

    def ends(self) -> Ends:
        return Ends(self._handler.client_address[:2], self._connection.local_address)

    # The body

    @property
    def body_complete(self) -> bool:
        return self._incoming is None or self._incoming.was_read.is_set()

    def read_body(self, timeout: float) -> list[bytes]:
        pieces, self._given_back = self._given_back, []
        if self._incoming is None:
            return pieces
        body, work, was_read = self._incoming
        connection, deadline = self._connection, Deadline(timeout)
        while not (pieces or body.complete):
            data = connection.receive()
            if data is None:
                connection.wait_readable(deadline.left())
                continue
            if not data:
                raise VisitorGone
            chunks = body.chunks
            pieces = body.feed(data)
            if self.visit is not None:
                self.visit.received += len(data) - len(body.rest)
            work.spend(READ_WORK + body.chunks - chunks - len(data) // WORK_PAYLOAD)
        if body.complete and not was_read.is_set():
            if body.rest:
                connection.unread(body.rest)
                body.rest = b""
            self.trailers = body.trailers
            was_read.set()
        return pieces

    def unread_body(self, pieces: list[bytes]) -> None:
        if self._incoming is not None:
            self._given_back = pieces
            self._incoming.was_read.clear()
            self._handler.keep(self)

    def refuse_body(self) -> None:
        # Half-close: the visitor sees the end of the answer and can stop sending. Closing now would
        # send RST, which can destroy the part of the answer that it has not read yet.
        with contextlib.suppress(OSError):  # it has left, or reads nothing now
            self._connection.finish(timeout=0)

    def gone(self) -> bool:
        connection = self._connection
        # Do not read while another thread may, nor when there is something to be read already.
        if not self.body_complete or connection.pending:
            return hung_up(connection)
        try:
            data = connection.receive()
        except OSError:  # RST. If raised, the caller would take it for an error of the stream
            return True
        if data:
            connection.unread(data)  # the next request, sent early (pipelining)
        return data == b""

    def crowded(self) -> bool:
        return self._handler.is_crowded()

    # The answer

    def send_interim(self, status: int, reason: str, fields: list[tuple[str, str]]) -> None:
        if self.minor == 1:  # HTTP/1.0 has no interim answers
            self._handler.write(http1.encode_head(f"HTTP/1.1 {status} {reason}", fields))

    def send_head(
        self, status: int, reason: str, fields: list[tuple[str, str]], length: int | None
    ) -> None:
        handler = self._handler
        visit = self.visit
        if visit is not None:
            visit.status, visit.first_byte_at = status, monotonic()
            if visit.request_id:
                fields.append((request_id.FIELD, visit.request_id))
        if status == 426:  # it has an Upgrade field, which Connection must name
            fields.append(("Connection", "Upgrade"))
        if length is not None:
            if status != 204:
                fields.append(("Content-Length", str(length)))
        elif self.method != "HEAD" and status not in NO_CONTENT:
            if self.minor == 1:
                fields.append(("Transfer-Encoding", "chunked"))
                self._chunked = True
            else:
                handler.close_connection = True  # closing it ends the body
                self._connection.cut_unless_finished()
        if self._incoming is not None and not self.body_complete or handler.is_draining():
            # An answer before the body's end: the rest may never arrive, so the next request could
            # not be found.
            handler.close_connection = True
        if handler.close_connection:
            fields.append(("Connection", "close"))
        elif self.minor == 0:
            fields.append(("Connection", "keep-alive"))
        self._waiting = http1.encode_head(f"HTTP/1.1 {status} {reason}", fields)

    def send_data(self, pieces: list[bytes]) -> None:
        self._send(map(http1.encode_chunk, pieces) if self._chunked else pieces)

    def finish(self, pieces: list[bytes], trailers: Iterable[tuple[str, str]] = ()) -> None:
        if self._chunked:
            pieces = [*map(http1.encode_chunk, pieces), http1.encode_last_chunk(trailers)]
        self._send(pieces, self._handler.close_connection)

    def _send(self, parts: Iterable[bytes], last: bool = False) -> None:
        if self._waiting:
            parts = (self._waiting, *parts)
            self._waiting = b""
        data = b"".join(parts)  # no copy if it is a list of one piece: bulk
        if data:
            self._handler.write(data, last)

    def abort(self) -> None:
        self._connection.reset()

    def switch(
        self,
        status: int,
        reason: str,
        fields: list[tuple[str, str]],
        data: bytes,
        onward: Onward,
    ) -> bool:
        if not self._handler.claim_relay():
            return False
        visit = self.visit
        if visit is not None:
            visit.status, visit.first_byte_at = status, monotonic()
            if visit.request_id:
                fields.append((request_id.FIELD, visit.request_id))
        if status == 101:
            fields.append(("Connection", "Upgrade"))
        self._handler.write(http1.encode_head(f"HTTP/1.1 {status} {reason}", fields) + data)
        self._handler.switched = onward
        return True
