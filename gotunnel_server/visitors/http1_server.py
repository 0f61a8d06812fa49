"""The visitor's side in HTTP/1.1: a connection, and the requests that it brings (RFC 9112).

`Handler` is the connection, `Http1Request` one request and the way of its answer. sites.py decides
what a request gets, exchange.py asks the target. Heads and bodies are read by http1.py: a gateway
that reads a request otherwise than its target does is a hole.
"""

import contextlib
import logging
import threading
from http.server import BaseHTTPRequestHandler

from gotunnel import Deadline, Ends
from gotunnel_agent.common import http1
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.common.http1 import Fields, Malformed
from gotunnel_agent.common.patience import Patience

from ..net.hung_up import hung_up
from . import pages
from .exchange import Exchange, send_page
from .pages import Page
from .request import LEAST_BYTE_RATE, VisitorGone
from .sites import Connect
from .work import Work

log = logging.getLogger("gotunnel.http1_server")

# Work that a body may make: so much a second in the long run, and so much at once. The unit is some
# 2 µs, what a chunk takes; a read takes READ_WORK with what follows from it, and each WORK_PAYLOAD
# bytes permit a unit of their own. So bulk, and what a person types, are never slowed. A body of
# tiny chunks or tiny segments is, until its next read finds more.
WORK_RATE, WORK_BURST = 4000, 20_000
READ_WORK = 50
WORK_PAYLOAD = 64

NO_FIELDS = Fields([])
NO_CONTENT = (204, 304)  # statuses of answers that have no body (RFC 9112 §6.3)


class Handler(BaseHTTPRequestHandler):
    """A visitor's connection in HTTP/1.1, request by request.

    Unlike its base it is not run by a server: the owner of the connection calls head_came() when
    bytes have come, and handle_one_request() when that returns True. One thread at a time.
    """

    def __init__(
        self, duplex: Duplex, address: tuple, *,
        site, scheme, sni, proxies, owner, claim_relay, is_draining, is_crowded,
        idle_timeout, response_timeout, stall_timeout,
    ):  # fmt: skip
        """``site(request)`` is what a request gets: a Page, a sites.Connect or a sites.Forward.
        ``scheme``, ``sni``, ``owner``: see request.Request. ``proxies``: a forwarded.Proxies.
        ``claim_relay()``: whether the connection may become a relay. ``is_draining()``: whether an
        answer that begins now is the last one. ``is_crowded()``: see request.Request. Timeouts are
        in seconds; ``response_timeout`` is for the target.
        """
        self.scheme = scheme
        self.sni = sni
        self.owner = owner
        self.claim_relay = claim_relay
        self.is_draining = is_draining
        self.is_crowded = is_crowded
        self.idle_timeout = idle_timeout
        self.stall_timeout = stall_timeout
        self.close_connection = False
        self.current = None  # Http1Request, None before the first and while a head comes
        self._reader = None  # Patience with a visitor that reads slowly, from its first wait on
        self.switched = None  # the Upgraded or Connect that raw bytes now flow to
        self._site = site
        self._proxies = proxies
        self._response_timeout = response_timeout
        self._buffer = b""  # of a head that is not whole
        self._seen = 0  # bytes of it that hold no end
        super().__init__(duplex, address, None)

    # What the base's __init__() calls. There it serves the connection to its end, in one thread.

    def setup(self):
        self.connection = self.request

    def handle(self):
        """Nothing: the visitor's first bytes come later, see head_came()."""

    def finish(self):
        """Nothing: the owner of the connection closes it."""

    # Requests

    @property
    def in_head(self) -> bool:
        """Part of a head has come, and the rest is awaited. An empty line is none: some visitors
        send one behind a body, and perhaps nothing more (RFC 9112 §2.2)."""
        return self._buffer not in (b"", b"\r", b"\r\n")

    def head_came(self) -> bool:
        """Take what has come of the next head; True once it is whole. Does not wait.

        Raises VisitorGone, Malformed, OSError.
        """
        while (end := http1.head_end(self._buffer, self._seen)) < 0:
            self._seen = len(self._buffer)
            data = self.connection.receive()
            if data is None:
                return False
            if not data:
                raise VisitorGone
            self._buffer += data
            self.current = None
        self.raw_requestline, rest = self._buffer[:end], self._buffer[end:]
        if rest:
            self.connection.unread(rest)
        self._buffer, self._seen = b"", 0
        return True

    def parse_request(self):
        """Read the head that has come; raises Malformed."""
        self.current = Http1Request(self)
        self.current.read_head(self.raw_requestline)

    def handle_one_request(self):
        """Answer the request whose head has come. Raises VisitorGone or another OSError if the
        connection is of no further use."""
        try:
            self.parse_request()
        except Malformed as error:
            page = pages.error(error.status, "malformed-request", f"{error}.")
            return self.send_page(page, last=True)
        request = self.current
        answer = self._site(request)
        if isinstance(answer, Page):
            send_page(request, answer)
        elif isinstance(answer, Connect):
            if not request.switch(200, "Connection established", [], b"", answer):
                text = "The gateway has no room for it now."
                send_page(request, pages.error(503, "gateway-busy", text))
        else:
            Exchange(request, answer, self._proxies, self._response_timeout).run()

    def send_page(self, page: Page, *, last=False):
        """Answer with a page of our own, also if no head could be read. With ``last`` the
        connection ends after it."""
        if last:
            self.close_connection = True
        send_page(self.current or Http1Request(self), page)

    def write(self, data: bytes):
        """Raises TimeoutError if the visitor reads nothing for ``stall_timeout`` seconds, or almost
        nothing (request.LEAST_BYTE_RATE). Then the connection is reset, so that the part which the
        visitor has got does not look whole."""
        spend = self._wait_for_reader if self.stall_timeout else None
        try:
            self.connection.write(data, self.stall_timeout, spend)
        except OSError as error:
            self.connection.reset()
            if isinstance(error, TimeoutError) and self.stall_timeout:
                hostname = self.current.hostname if self.current else ""
                log.info("%s: the answer to %s is reset, its visitor read %s",
                         hostname, self.client_address[0], error)  # fmt: skip
            raise

    def _wait_for_reader(self, seconds, taken):
        if self._reader is None:
            self._reader = Patience(self.stall_timeout, LEAST_BYTE_RATE, self.is_crowded)
        self._reader.spend(seconds, taken)


class Http1Request:
    """A request.Request that came over a Handler's connection."""

    # Until the head was read; some of it, if it is malformed.
    method = hostname = authority = path = ""
    fields = NO_FIELDS
    minor = 1  # of its version, 0 or 1
    wants_upgrade = has_body = False
    body_length = None
    trailers = ()

    def __init__(self, handler: Handler):
        self.scheme = handler.scheme
        self.sni = handler.sni
        self.owner = handler.owner
        self.peer = handler.client_address[0]
        self.idle_timeout = handler.idle_timeout
        self._handler = handler
        self._connection = handler.connection
        self._body = None  # http1.Body, None if there is none
        # Set once the body was read and the bytes behind it were given back: until then only
        # read_body() reads the connection. None if there is no body.
        self._body_read = None
        self._work = None  # what reading the body may cost, None if there is none
        self._waiting = b""  # head of the answer that has not left yet
        self._chunked = False  # the answer is framed so

    def read_head(self, raw: bytes):
        """Raises Malformed."""
        head = http1.parse_request(raw)
        self.method, self.minor, self.fields = head.method, head.minor, head.fields
        self.hostname = http1.hostname(head) or self.sni or ""
        is_connect = head.method == "CONNECT"
        self.path = "" if is_connect else http1.origin_target(head)
        self.authority = head.target if is_connect else head.fields.get("host", self.hostname)
        body = self._body = http1.request_body(head)
        if body is not None:
            self.has_body, self.body_length = True, body.length
            self._work = Work(WORK_RATE, WORK_BURST)
            self._body_read = threading.Event()
            if body.complete:  # of no bytes
                self._body_read.set()
        if head.minor == 1:  # RFC 9110 §7.8
            protocols = head.fields.tokens("upgrade")
            self.wants_upgrade = (
                protocols != []
                # To h2c we could not follow, and through it a visitor could pass us by (RFC 9113
                # §3.1 has given it up).
                and "h2c" not in protocols
                and "upgrade" in head.fields.tokens("connection")
            )
        # Bytes behind a CONNECT may be meant for its other end, and be no request.
        self._handler.close_connection = not http1.keeps_alive(head) or is_connect

    def ends(self) -> Ends:
        return Ends(self._handler.client_address[:2], self._connection.local_address)

    # The body

    @property
    def body_complete(self) -> bool:
        return self._body_read is None or self._body_read.is_set()

    def read_body(self, timeout: float) -> list[bytes]:
        body, connection, pieces = self._body, self._connection, []
        deadline = Deadline(timeout)
        while not (pieces or body.complete):
            data = connection.receive()
            if data is None:
                connection.wait_readable(deadline.left())
                continue
            if not data:
                raise VisitorGone
            chunks = body.chunks
            pieces = body.feed(data)
            self._work.spend(READ_WORK + body.chunks - chunks - len(data) // WORK_PAYLOAD)
        if body.complete and not self._body_read.is_set():
            if body.rest:
                self._connection.unread(body.rest)
            self.trailers = body.trailers
            self._body_read.set()
        return pieces

    def refuse_body(self):
        # It sees the end of the answer and can stop: closing at once could destroy what it has
        # not read yet.
        with contextlib.suppress(OSError):  # it has left, or reads nothing now
            self._connection.finish(timeout=0)

    def gone(self) -> bool:
        connection = self._connection
        if not self.body_complete or connection.pending:  # read by another thread, or by nobody
            return hung_up(connection)
        data = connection.receive()
        if data:
            connection.unread(data)  # the next request, sent early
        return data == b""

    def crowded(self) -> bool:
        return self._handler.is_crowded()

    # The answer

    def send_interim(self, status: int, reason: str, fields: list):
        if self.minor == 1:  # HTTP/1.0 knows no interim answers
            self._handler.write(http1.encode_head(f"HTTP/1.1 {status} {reason}", fields))

    def send_head(self, status: int, reason: str, fields: list, length: int | None):
        handler = self._handler
        if status == 426:  # "upgrade first": a field says to what
            fields.append(("Connection", "Upgrade"))
        if length is not None:
            if status != 204:
                fields.append(("Content-Length", str(length)))
        elif self.method != "HEAD" and status not in NO_CONTENT:
            if self.minor == 1:
                fields.append(("Transfer-Encoding", "chunked"))
                self._chunked = True
            else:
                handler.close_connection = True  # the end of the connection is the length
                self._connection.cut_unless_finished()
        if not self.body_complete or handler.is_draining():
            # An early answer: whether the rest of the body comes is not sure, so no request can
            # follow it.
            handler.close_connection = True
        if handler.close_connection:
            fields.append(("Connection", "close"))
        elif self.minor == 0:
            fields.append(("Connection", "keep-alive"))
        self._waiting = http1.encode_head(f"HTTP/1.1 {status} {reason}", fields)

    def send_data(self, pieces: list[bytes]):
        self._send(map(http1.encode_chunk, pieces) if self._chunked else pieces)

    def finish(self, pieces: list[bytes], trailers=()):
        if self._chunked:
            pieces = [*map(http1.encode_chunk, pieces), http1.encode_last_chunk(trailers)]
        self._send(pieces)

    def _send(self, parts):
        data = b"".join((self._waiting, *parts))
        self._waiting = b""
        if data:
            self._handler.write(data)

    def abort(self):
        self._connection.reset()

    def switch(self, status: int, reason: str, fields: list, data: bytes, onward) -> bool:
        if not self._handler.claim_relay():
            return False
        if status == 101:
            fields.append(("Connection", "Upgrade"))
        self._handler.write(http1.encode_head(f"HTTP/1.1 {status} {reason}", fields) + data)
        self._handler.switched = onward
        return True
