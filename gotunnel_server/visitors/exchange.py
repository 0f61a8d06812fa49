"""http mode: one request over one stream, the answer streamed back.

`Handler` speaks HTTP/1.1 with one visitor; `Exchange` is one request and its answer. Heads are
read by http1.py, because a gateway that reads a request otherwise than its target does is a hole;
the rest of BaseHTTPRequestHandler is as its readers know it.

The request's body and the answer flow at the same time: a body that has not come whole with its
head gets a thread of its own (`upload`), so a target may answer before it has read everything.
Nothing is held whole. What the target sends is passed on when it comes.

Towards the agent a stream is never half-closed here: a Go agent closes its target when it sees a
FIN, answer or not.
"""

import contextlib
import logging
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from gotunnel import Deadline, Ends, NoThread, SessionClosed, spawn
from gotunnel_agent.common import http1
from gotunnel_agent.common.http1 import Malformed

from ..routes import AgentBusy
from . import forwarded, pages
from .pages import Page
from .sites import Connect

log = logging.getLogger("gotunnel.proxy")

# Methods whose effect is the same if the request arrives twice (RFC 9110 §9.2.2). Only these go
# over a kept stream: its target may close it at the moment that the request is on its way.
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
WATCH = 0.5  # seconds between looks at whether the visitor of a waiting request is still there
LATE_BODY_TIMEOUT = 3  # seconds that a visitor has to stop sending once it has its answer


class VisitorGone(Exception):
    """The visitor has left; nobody is there to be answered."""


class TargetFailed(Exception):
    """There is no answer, or none that can be passed on; ``page`` says so to the visitor."""

    def __init__(self, status, code, text):
        super().__init__(text)
        self.page = pages.error(status, code, text)


class Handler(BaseHTTPRequestHandler):
    """One visitor's connection, request by request.

    ``site(handler)`` decides what a request gets: a Page, a Connect, or a registry.Route to be
    asked.
    Unlike its base it is not run by a server: whoever owns the connection calls head_came() when
    bytes have come, and handle_one_request() when that says True.
    """

    protocol_version = "HTTP/1.1"
    server_version = "gotunnel"
    sys_version = ""  # what we run on is nobody's business

    def __init__(
        self, duplex, address, *,
        site, scheme, sni, proxies, claim_relay, is_draining, idle_timeout, response_timeout,
    ):  # fmt: skip
        # Not super().__init__(): it would serve the connection to its end, in this thread.
        self.connection = self.wfile = duplex
        self.client_address = address
        self.scheme = scheme  # "https" or "http"
        self.sni = sni  # hostname of the TLS hello, None if there was none
        self.proxies = proxies  # forwarding.Proxies
        self.claim_relay = claim_relay  # whether the connection may become a relay
        self.is_draining = is_draining  # whether this answer is to be the last one
        self.idle_timeout = idle_timeout
        self.response_timeout = response_timeout
        self.close_connection = False
        self.switched = None  # the stream that a 101 turned the connection over to, or a Connect
        self.request_head = None  # http1.Request
        self.hostname = ""
        self.body = None  # http1.Body of the request, None if it has none
        self.upload = None  # the Upload that reads it, None if nobody does
        self._site = site
        self._buffer = b""  # of a head that is not whole
        self._seen = 0  # bytes of it that hold no end

    @property
    def in_head(self) -> bool:
        """Part of a head has come, and the rest is awaited."""
        return bool(self._buffer)

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
            self.request_head = None  # that of an earlier request: what comes may be no head
        self.raw_requestline, rest = self._buffer[:end], self._buffer[end:]
        if rest:
            self.connection.unread(rest)
        self._buffer, self._seen = b"", 0
        return True

    def parse_request(self):
        """Read the head that has come; raises Malformed."""
        head = self.request_head = http1.parse_request(self.raw_requestline)
        self.command, self.path, self.headers = head.method, head.target, head.fields
        self.request_version = f"HTTP/1.{head.minor}"
        self.hostname = http1.hostname(head) or self.sni or ""
        self.body = http1.request_body(head)
        # What comes behind a CONNECT may be meant for its other end, and be no request.
        self.close_connection = not http1.keeps_alive(head) or head.method == "CONNECT"

    def handle_one_request(self):
        """Answer the request whose head has come. Raises OSError when the connection broke."""
        try:
            self.parse_request()
            answer = self._site(self)
            if isinstance(answer, Page):
                self.send_page(answer)
            elif isinstance(answer, Connect):
                self._connect(answer)
            else:
                Exchange(self, answer).run()
        except Malformed as error:
            self.send_page(pages.error(error.status, "malformed-request", f"{error}."), last=True)
        except TargetFailed as failure:
            log.info("%s %s: %s", self.hostname, self.command, failure)
            self.send_page(failure.page)
        finally:
            if self.upload is not None:
                self.upload.end()
                self.upload = None

    def _connect(self, answer):
        if not self.claim_relay():
            raise TargetFailed(503, "gateway-busy", "The gateway has no room for it now.")
        self.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self.switched = answer

    @property
    def visitor_address(self) -> str:
        """Where the visitor is, as far as the proxies on its way are to be believed."""
        return forwarded.visitor(
            self.request_head.fields, self.client_address[0], self.proxies
        )

    def ends(self) -> Ends:
        """The two ends of the visitor's connection, for a target that wants to know."""
        return Ends(self.client_address[:2], self.connection.local_address)

    def send_page(self, page, *, last=False):
        """Answer with a page of our own. With ``last``, or if the request brings a body that
        nobody reads, the connection ends after it."""
        if last or self.body is not None and not self.body.complete:
            self.close_connection = True
        request = self.request_head
        page = pages.suited(page, request.fields.all("accept") if request else [])
        fields = [
            ("Content-Type", page.content_type),
            ("Content-Length", str(len(page.body))),
            ("Cache-Control", "no-store"),
            ("Server", self.server_version),
            ("Date", self.date_time_string()),
            *page.fields,
        ]
        head = self.head(page.status, HTTPStatus(page.status).phrase, fields)
        wants_body = request is None or request.method != "HEAD"
        self.write(head + page.body if wants_body else head)

    def head(self, status, reason, fields) -> bytes:
        """The head of an answer, with what it says about the connection."""
        if self.is_draining():
            self.close_connection = True
        if self.close_connection:
            fields.append(("Connection", "close"))
        elif self.request_head.minor == 0:
            fields.append(("Connection", "keep-alive"))
        return http1.encode_head(f"{self.protocol_version} {status} {reason}", fields)

    def write(self, data):
        self.connection.write(data, timeout=self.idle_timeout)

    def visitor_has_left(self) -> bool:
        """Whether the visitor closed the connection while it waits. Only while nobody reads it."""
        if self.connection.pending:
            return self.connection.hung_up
        data = self.connection.receive()
        if data:
            self.connection.unread(data)  # the next request, sent early
        return data == b""

    def log_message(self, format, *args):
        log.debug("%s: " + format, self.client_address[0], *args)


class Upload:
    """A request's body on its way from the visitor to a stream."""

    def __init__(self, handler):
        self._handler = handler
        self._body = handler.body
        self._stream = None
        self._thread = None
        self._wanted = True  # the target still reads
        self.problem = None  # the Malformed, VisitorGone or OSError that ended it early
        self.whole = False  # all of it has come from the visitor

    def at_hand(self) -> bytes:
        """What has come already, framed for the target."""
        if self._body.complete:  # of no bytes
            return self._take(b"")
        data = self._handler.connection.receive()
        if data == b"":
            raise VisitorGone
        return self._take(data) if data else b""

    def start(self, stream):
        """Send the rest to ``stream`` in a thread of its own, which join() waits for."""
        self._stream = stream
        if not self.whole:
            self._thread = spawn("upload", self._run)

    def _run(self):
        handler = self._handler
        try:
            while not self.whole:
                data = handler.connection.read(timeout=handler.idle_timeout)
                if not data:
                    raise VisitorGone
                data = self._take(data)
                if self._wanted:
                    self._pass_on(data)
        except (Malformed, VisitorGone, OSError) as error:
            self.problem = error
            self._stream.reset()  # wakes the worker, which waits for an answer

    def _pass_on(self, data):
        try:
            if data:
                self._stream.write(data, timeout=self._handler.response_timeout)
        except OSError:
            # The target has answered, or died; the worker knows. The visitor may still have to
            # send all before it reads the answer.
            self._wanted = False

    def _take(self, data):
        """Decode what came and frame it for the target; anew, since a target that reads a copied
        frame otherwise than we do would see another request in it."""
        body = self._body
        pieces = body.feed(data) if data else []
        if body.complete:
            if body.rest:
                self._handler.connection.unread(body.rest)
            self.whole = True  # only now: from here on the worker may read the connection
        if body.length is not None:
            return b"".join(pieces)
        data = b"".join(map(http1.encode_chunk, pieces))
        return data + http1.encode_last_chunk(body.trailers) if body.complete else data

    def sent(self) -> bool:
        """Whether all of it is with the stream. Waits a moment: the answer can be quicker than
        the thread that sent what is answered."""
        if self.whole and self._thread is not None:
            self._thread.join(WATCH)
        return self.whole and self._wanted and (
            self._thread is None or not self._thread.is_alive()
        )

    def end(self):
        """Be done with it: the answer has been given, whether the body was wanted or not. The
        stream has been closed or reset, or all is sent."""
        self._wanted = False
        if not self.whole:
            self._handler.close_connection = True
        if self._thread is None:
            return
        if not self.whole and not self.problem:
            # The visitor still sends. Let it see the end of the answer, and give it time to stop:
            # closing at once could destroy what it has not read yet.
            connection = self._handler.connection
            with contextlib.suppress(OSError):  # it has left: all the better
                connection.finish(timeout=LATE_BODY_TIMEOUT)
                self._thread.join(LATE_BODY_TIMEOUT)
            if self._thread.is_alive():
                connection.reset()
        self._thread.join()


class Exchange:
    """One request, asked of a route, and its answer."""

    def __init__(self, handler, route):
        self._handler = handler
        self._request = handler.request_head
        self._route = route
        self._stream = None
        self._head_sent = False  # of the final answer
        if handler.body is not None:
            handler.upload = Upload(handler)
        self._upload = handler.upload
        protocols = self._request.fields.tokens("upgrade")
        self._upgrade = (
            protocols != []
            # To h2c we could not follow, and through it a visitor could pass us by (RFC 9113 §3.1
            # has given it up).
            and "h2c" not in protocols
            and "upgrade" in self._request.fields.tokens("connection")
            and self._request.minor == 1  # RFC 9110 §7.8
            and self._upload is None
        )

    def run(self):
        """Pass the request on and the answer back.

        Raises TargetFailed if the visitor is to be told, OSError if the visitor's connection is
        of no further use (it has left, or was broken because the answer was cut short).
        """
        try:
            self._answer(self._ask())
        except BaseException as error:
            if self._stream is not None:
                self._stream.reset()  # the target need not go on
            if isinstance(error, VisitorGone):
                raise ConnectionResetError("the visitor has left") from None
            if isinstance(error, (TargetFailed, Malformed)) and self._head_sent:
                # What was passed on must not look whole.
                self._handler.connection.reset()
                raise ConnectionAbortedError("the answer was cut short") from None
            if isinstance(error, AgentBusy):
                text = f"{self._route.hostname}: {error}."
                raise TargetFailed(503, "agent-limit", text) from None
            if isinstance(error, Malformed):
                raise TargetFailed(502, "bad-answer", f"The answer is broken: {error}.") from None
            raise

    # Asking

    def _ask(self):
        """Send the request; return the first bytes of what is answered on self._stream."""
        tunnel, route, head = self._route.tunnel, self._route, self._request_head()
        timeout = self._handler.response_timeout
        if self._upload is None and self._request.method in IDEMPOTENT:
            if (stream := tunnel.take_kept(route)) is not None:
                self._stream = stream
                try:
                    stream.write(head, timeout)
                    if data := self._wait(timeout):
                        return data
                except ConnectionError:
                    pass
                stream.close()  # its target closed it meanwhile: once more, on another
        try:
            first = self._upload.at_hand() if self._upload else b""
        except Malformed as error:
            raise self._bad_request(error) from None
        try:
            self._stream = tunnel.open(route, self._handler.ends, head + first)
        except ConnectionError:
            raise self._agent_gone()
        except TimeoutError:
            raise TargetFailed(503, "agent-busy", f"The agent of {route.hostname} is busy.")
        if self._upload:
            try:
                self._upload.start(self._stream)
            except NoThread as error:
                raise TargetFailed(503, "gateway-busy", f"The gateway has no room: {error}.")
        if data := self._next(timeout):
            return data
        raise TargetFailed(502, "no-answer", "The service closed the connection, unanswered.")

    def _request_head(self):
        handler, request = self._handler, self._request
        fields = [
            (name, value)
            for name, value in http1.end_to_end(request.fields, self._upgrade)
            if not forwarded.concerns(name)
        ]
        host = request.fields.get("host")
        if host is None:  # HTTP/1.0; the target hears HTTP/1.1, where it is required
            host = handler.hostname
            fields.append(("Host", host))
        if self._route.host_header is not None:
            fields = [(name, value) for name, value in fields if name.lower() != "host"]
            fields.insert(0, ("Host", self._route.host_header))
        if self._route.policy is not None and self._route.policy.asks_password:
            # It was for us, and has no business in the target's log.
            fields = [(name, value) for name, value in fields if name.lower() != "authorization"]
        fields += forwarded.fields(
            request.fields, handler.client_address[0], handler.scheme, host, handler.proxies
        )
        if self._upgrade:
            fields.append(("Connection", "Upgrade"))
        if handler.body is not None:
            length = handler.body.length
            if length is None:
                fields.append(("Transfer-Encoding", "chunked"))
            else:
                fields.append(("Content-Length", str(length)))
        target = http1.origin_target(request)
        return http1.encode_head(f"{request.method} {target} HTTP/1.1", fields)

    # Answering

    def _wait(self, timeout=None):
        """The next bytes of the answer, b"" at its end. Raises VisitorGone if nobody is left to
        read it, TargetFailed if they take longer than ``timeout`` seconds, ConnectionError."""
        deadline = Deadline(timeout)
        while True:
            try:
                return self._stream.read(timeout=WATCH)
            except TimeoutError:
                pass
            if self._visitor_has_left():
                raise VisitorGone
            try:
                deadline.left()
            except TimeoutError:
                raise TargetFailed(504, "timed-out", "The service did not answer in time.")

    def _visitor_has_left(self):
        if self._upload is None or self._upload.whole:
            return self._handler.visitor_has_left()
        # The upload reads the connection, unless the target does not take what it has.
        return self._handler.connection.hung_up

    def _next(self, timeout=None):
        """As _wait(), where a broken stream cannot be helped any more."""
        try:
            return self._wait(timeout)
        except ConnectionError as error:
            problem = self._upload and self._upload.problem
            if isinstance(problem, Malformed):
                raise self._bad_request(problem)
            if problem:
                raise VisitorGone
            if isinstance(error, SessionClosed):
                raise self._agent_gone()
            raise TargetFailed(502, "cut-short", f"The service cannot be reached: {error}.")

    def _agent_gone(self):
        return TargetFailed(502, "agent-gone", f"The agent of {self._route.hostname} has gone.")

    def _bad_request(self, malformed):
        self._handler.close_connection = True
        return TargetFailed(malformed.status, "malformed-request", f"{malformed}.")

    def _answer(self, data):
        """Pass on interim answers, then the final one."""
        handler = self._handler
        interim = 0  # bytes of heads before the final one, which together are held to the limit
        while True:
            response, data = self._read_head(data)
            if response.status >= 200:
                break
            if response.status == 101:
                self._switch(response, data)
                return
            line = f"HTTP/1.1 {response.status} {response.reason}"
            head = http1.encode_head(line, http1.end_to_end(response.fields))
            interim += len(head)
            if interim > http1.HEAD_LIMIT:
                raise Malformed(431, f"interim answers of {interim} bytes, expected the final one")
            if self._request.minor == 1:  # HTTP/1.0 knows no interim answers
                handler.write(head)
        body = http1.response_body(response, self._request.method)
        head, encode = self._frame(response, body)
        self._head_sent = True
        if body is None:
            last, rest = head, data
        else:
            last, rest = self._pass_body(head, body, encode, data), body.rest
        reusable = http1.keeps_alive(response) and not rest and (
            not isinstance(body, http1.UntilCloseBody)
        )
        # Before the visitor has all of it: its next visit must find this one over, and its stream.
        stream, self._stream = self._stream, None
        if self._upload is not None and not self._upload.sent():
            stream.reset()  # also wakes the upload, if the target has stopped reading it
        elif reusable and self._upload is None:
            # A target that reads no body where it expects none takes it for the next request, and
            # would answer that one to whoever came next: streams that are kept saw no body.
            self._route.tunnel.keep(self._route, stream)
        else:
            stream.close()
        if last:
            handler.write(last)

    def _pass_body(self, head, body, encode, data):
        """Send the head, and the body as it comes, but for its last piece, which is returned: a
        small answer leaves in one."""
        out = [head]
        while True:
            if data:
                out += map(encode, body.feed(data))
            if body.complete:
                break
            if out:
                self._handler.write(b"".join(out))
                out = []
            data = self._next()
            if not data:
                body.eof()
        if encode is http1.encode_chunk:
            out.append(http1.encode_last_chunk(body.trailers))
        return b"".join(out)

    def _read_head(self, data):
        """One head of the answer, and the bytes behind it."""
        seen = 0
        while (end := http1.head_end(data, seen)) < 0:
            seen = len(data)
            more = self._next(self._handler.response_timeout)
            if not more:
                raise TargetFailed(502, "no-answer", "The service's answer ends in its head.")
            data += more
        return http1.parse_response(data[:end]), data[end:]

    def _frame(self, response, body):
        """The head for the visitor, and how pieces of the body are to be encoded for it."""
        handler = self._handler
        wants_upgrade = response.status == 426  # "upgrade first": the field says to what
        fields = http1.end_to_end(response.fields, keep_upgrade=wants_upgrade)
        if wants_upgrade:
            fields.append(("Connection", "Upgrade"))
        encode = _as_it_is
        if body is None:
            length = response.fields.get("content-length")
            if length is not None and response.status != 204:  # what HEAD and 304 do not send
                fields.append(("Content-Length", length))
        elif body.length is not None:
            fields.append(("Content-Length", str(body.length)))
        elif self._request.minor == 1:
            fields.append(("Transfer-Encoding", "chunked"))
            encode = http1.encode_chunk
        else:
            handler.close_connection = True  # HTTP/1.0: the end of the connection is the length
        if self._upload is not None and not self._upload.whole:
            # An early answer. Whether the rest of the body comes is not sure, so no request can
            # follow it.
            handler.close_connection = True
        return handler.head(response.status, response.reason, fields), encode

    def _switch(self, response, data):
        """The connection now speaks something else (RFC 9110 §7.8)."""
        if not self._upgrade:
            raise TargetFailed(502, "bad-answer", "The service changed the protocol unasked.")
        if not self._handler.claim_relay():
            raise TargetFailed(503, "gateway-busy", "The gateway has no room for it now.")
        fields = http1.end_to_end(response.fields, keep_upgrade=True)
        fields.append(("Connection", "Upgrade"))
        self._handler.write(http1.encode_head(f"HTTP/1.1 101 {response.reason}", fields) + data)
        self._handler.switched = self._stream


def _as_it_is(piece):
    return piece
