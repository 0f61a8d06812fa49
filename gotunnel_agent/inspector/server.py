"""The inspector's HTTP server: bounded, and for this machine's users alone (access.py).

One thread accepts connections and collects the heads of requests. A whole head goes to a worker,
which reads the body, has the Site answer, and sends that. So connections that are slow or silent
hold no worker; if too many wait, the oldest are closed. One request a connection: the next one
would have to wait somewhere.

A head is read by common/http1.py, as the gateway reads a visitor's: what two readers could read
differently is refused (request smuggling).

Server-sent events hold a worker of their own each. Browsers open six connections to one address at
most, in all tabs together, so a browser gets MOST_BROWSERS of them, and is told to poll beyond.

Threads:

    thread          how many              does                              ends when
    inspect         1                     accepts, reads heads              close()
    inspect_N       at most MOST_SERVED   one request, and its answer       the answer is sent
    inspect_live_N  at most MOST_LIVE     the events of one reader          it leaves, or close()
"""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from http import HTTPStatus
from time import monotonic
from typing import NamedTuple, Protocol
from urllib.parse import parse_qsl

from gotunnel import Deadline, Waker, call_logged, spawn

from ..common import http1
from ..common.one_line import on_one_line
from ..common.process import Stopped, Workers
from .access import Door, Refusal

log = logging.getLogger("gotunnel.server")

BACKLOG = 128  # connections that wait to be accepted
# Connections that wait for their heads or for their peers to close. The oldest of more are closed.
MOST_PARKED = 100
MOST_SERVED = 8  # requests at a time. They come from one user, and most take a millisecond
MOST_QUEUED = 64  # requests that wait for a worker; further ones are refused
MOST_LIVE = 8  # readers of events, and of these
MOST_BROWSERS = 4  # with a cookie: a browser's six connections must leave room for requests
HEAD_TIMEOUT = 10  # seconds for a whole head
BODY_TIMEOUT = 30  # seconds for a whole body
SEND_TIMEOUT = 20  # seconds for a piece of an answer; a browser that stops reading is cut
PIECE = 256 * 1024  # bytes that are sent under one SEND_TIMEOUT
# A body of more bytes than LARGE takes memory that a second one at the same time must not double.
LARGE = 1024 * 1024
# Seconds in which the peer may read the answer and close. A plain close with bytes unread would
# send a RST, which could destroy the answer.
LINGER = 2
LIVE_BUFFER = 64 * 1024  # bytes that the kernel keeps for a reader of events that does not read
PING_TIME = 15  # seconds between two bytes to a reader: proxies cut silent connections after 60
PING = b": ping\n\n"
ACCEPT_PAUSE = 0.1  # seconds to wait when the system has no descriptor for a connection
LAST_WORDS = 1  # seconds that the threads have to end
JSON = "application/json"
METHODS = ("GET", "HEAD", "POST")

# For all answers; a page adds its own policy. "sandbox" is for a body that is opened as a page.
FIELDS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Connection", "close"),
)
NO_CONTENT_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; sandbox"
POLICY = "Content-Security-Policy"


class Asked(NamedTuple):
    """A request that has passed the checks of its place. ``path`` has no query; of several query
    fields of one name the last counts. ``refusal``: why it has not shown the token."""

    method: str  # one of METHODS
    path: str
    query: Mapping[str, str]
    head: http1.Request
    body: bytes
    refusal: Refusal | None

    @property
    def is_from_elsewhere(self) -> bool:
        """Whether a link of another site leads here."""
        return (self.head.fields.get("sec-fetch-site") or "none") not in ("none", "same-origin")


class Answer(NamedTuple):
    """``body`` in pieces is for content that is made while it is sent."""

    status: int
    content_type: str
    body: bytes | Iterable[bytes]
    fields: tuple[tuple[str, str], ...] = ()


class Reader(Protocol):
    """Server-sent events for one reader."""

    def next(self, timeout: float) -> bytes | None:
        """What to send, b"" if there was nothing for ``timeout`` seconds, None after close()."""

    def close(self) -> None:
        """Any thread, any number of times."""


class Live(NamedTuple):
    """The answer is events, without an end."""

    reader: Reader


class Site(Protocol):
    """What the server serves. Workers call it."""

    def body_limit(self, method: str, path: str) -> int:
        """The bytes that a request's body may have."""

    def answer(self, asked: Asked) -> Answer | Live: ...


class Unanswered(Exception):
    """A request is refused. ``allow``: the methods that would not be."""

    def __init__(self, status: int, code: str, text: str, allow: str = ""):
        super().__init__(text)
        self.status, self.code, self.allow = status, code, allow


def as_json(value: object, status: int = 200) -> Answer:
    """Characters beyond ASCII are escaped, so control characters and bidi overrides do nothing to a
    terminal that shows it."""
    return Answer(status, JSON, json.dumps(value).encode() + b"\n")


def refusal(error: Unanswered) -> Answer:
    answer = as_json({"error": error.code, "message": str(error)}, error.status)
    return answer._replace(fields=(("Allow", error.allow),)) if error.allow else answer


class _Connection:
    """A connection that the thread "inspect" looks after: until its head is whole, while its reader
    of events is there, or until its peer has closed."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.came = bytearray()
        self.searched = 0  # bytes of ``came`` without an end of a head
        self.deadline: float | None = monotonic() + HEAD_TIMEOUT
        self.is_over = False  # the answer is sent: what still comes is read for nothing
        self.reader: Reader | None = None  # of events; its worker uses the socket, too


class InspectorServer:
    """start(), then close()."""

    def __init__(self, listening: socket.socket, door: Door, site: Site):
        """``listening``: see listen(). It is closed by close()."""
        self._door, self._site = door, site
        self._listening = listening
        self._waker = Waker()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._workers = Workers(MOST_SERVED, "inspect")
        self._live = Workers(MOST_LIVE, "inspect_live")
        # Insertion order is the order of deadlines, but for those that are over (LINGER). Thread
        # "inspect" only.
        self._parked: dict[socket.socket, _Connection] = {}
        # What workers leave to "inspect": connections to look after, and those of readers of events
        # that are gone.
        self._to_park: deque[_Connection] = deque()
        self._to_close: deque[_Connection] = deque()
        self._large = threading.BoundedSemaphore()  # held by the request with a LARGE body
        self._lock = threading.Lock()  # guards all below, and adding to the two above
        self._ended = False  # "inspect" takes nothing any more: workers close their connections
        self._readers: dict[_Connection, bool] = {}  # of events; whether it is a browser's

    def start(self) -> None:
        """Raises NoThread."""
        self._workers.prepare()
        self._thread = spawn("inspect", self._run)

    def close(self) -> None:
        """Answer no more. Any thread."""
        self._stopping = True
        self._waker.wake()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            readers = list(self._readers)
        for connection in readers:
            if connection.reader is not None:
                connection.reader.close()
        self._workers.shutdown(LAST_WORDS)
        self._live.shutdown(LAST_WORDS)
        self._listening.close()
        self._waker.close()

    # Thread "inspect"

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._waker, selectors.EVENT_READ)
                selector.register(self._listening, selectors.EVENT_READ)
                while not self._stopping:
                    self._turn(selector)
        finally:
            with self._lock:
                self._ended = True
            left = [each for each in self._parked.values() if each.reader is None]
            left += [each for each in self._to_park if each.reader is None]
            # Of the others, a worker has the socket, and closes it.
            for connection in [*left, *self._to_close]:
                connection.sock.close()

    def _turn(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select(self._next_deadline()):
            if key.fileobj is self._waker:
                self._waker.clear()
            elif key.fileobj is self._listening:
                self._accept(selector)
            else:
                call_logged(self._read, selector, key.data)
        self._park(selector)
        self._close_late(selector)

    def _next_deadline(self) -> float | None:
        deadlines = [each.deadline for each in self._parked.values() if each.deadline is not None]
        return max(0, min(deadlines) - monotonic()) if deadlines else None

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            sock, _ = self._listening.accept()
        except BlockingIOError:  # it has left already
            return
        except OSError as error:
            log.debug("a connection could not be accepted: %s", error.strerror)
            selector.unregister(self._listening)
            selector.select(ACCEPT_PAUSE)
            selector.register(self._listening, selectors.EVENT_READ)
            return
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # its peer has left already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._add(selector, _Connection(sock))

    def _add(self, selector: selectors.BaseSelector, connection: _Connection) -> None:
        """Look after a connection, if need be instead of the oldest one without events."""
        self._parked[connection.sock] = connection
        selector.register(connection.sock, selectors.EVENT_READ, connection)
        if len(self._parked) > MOST_PARKED + MOST_LIVE:
            oldest = next(each for each in self._parked.values() if each.reader is None)
            self._forget(selector, oldest)
            oldest.sock.close()

    def _forget(self, selector: selectors.BaseSelector, connection: _Connection) -> None:
        selector.unregister(connection.sock)
        del self._parked[connection.sock]

    def _park(self, selector: selectors.BaseSelector) -> None:
        """Take what workers have left."""
        while self._to_park:
            self._add(selector, self._to_park.popleft())
        while self._to_close:
            connection = self._to_close.popleft()
            if self._parked.get(connection.sock) is connection:
                self._forget(selector, connection)
            connection.sock.close()

    def _close_late(self, selector: selectors.BaseSelector) -> None:
        now = monotonic()
        for connection in list(self._parked.values()):
            if connection.deadline is not None and connection.deadline <= now:
                self._forget(selector, connection)
                connection.sock.close()

    def _read(self, selector: selectors.BaseSelector, connection: _Connection) -> None:
        if self._parked.get(connection.sock) is not connection:
            return  # closed in this very turn
        if connection.reader is not None:
            # A reader of events has nothing to say: it has closed, or breaks the rules. Its worker
            # still has the socket, and leaves it to _park().
            self._forget(selector, connection)
            connection.reader.close()
            return
        try:
            data = connection.sock.recv(http1.HEAD_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget(selector, connection)
            connection.sock.close()
            return
        if connection.is_over:
            return
        came = connection.came
        came += data
        try:
            end = http1.head_end(came, connection.searched)
        except http1.Malformed as error:
            self._hand_over(selector, connection, partial(self._refuse, connection, error))
            return
        connection.searched = len(came)
        if end >= 0:
            self._hand_over(selector, connection, partial(self._serve, connection, end))

    def _hand_over(
        self,
        selector: selectors.BaseSelector,
        connection: _Connection,
        serve: Callable[[], bool],
    ) -> None:
        if self._workers.waiting >= MOST_QUEUED:
            self._turn_away(selector, connection)
            return
        self._forget(selector, connection)
        try:
            self._workers.submit(self._in_worker, connection, serve)
        except Stopped:
            connection.sock.close()

    def _turn_away(self, selector: selectors.BaseSelector, connection: _Connection) -> None:
        """Send a few bytes, which a new connection always takes, and wait for no worker."""
        sock = connection.sock
        busy = Unanswered(503, "busy", f"{MOST_QUEUED} requests wait already, try it later")
        try:
            sock.send(_whole(refusal(busy)))
            sock.shutdown(socket.SHUT_WR)
        except OSError:  # it has left
            self._forget(selector, connection)
            sock.close()
            return
        connection.is_over, connection.deadline = True, monotonic() + LINGER

    # Workers

    def _in_worker(self, connection: _Connection, serve: Callable[[], bool]) -> None:
        sock = connection.sock
        try:
            sock.settimeout(SEND_TIMEOUT)
            if serve():  # events: they have the socket now
                return
            sock.shutdown(socket.SHUT_WR)
            sock.setblocking(False)
        except OSError as error:
            log.debug("a peer got no answer: %s", error)
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        connection.is_over, connection.deadline = True, monotonic() + LINGER
        self._leave(self._to_park, connection)

    def _leave(self, where: deque[_Connection], connection: _Connection) -> None:
        """Leave a connection to "inspect", unless that thread ends."""
        with self._lock:
            ended = self._ended
            if not ended:
                where.append(connection)
        if ended:
            connection.sock.close()
        else:
            self._waker.wake()

    def _refuse(self, connection: _Connection, error: http1.Malformed) -> bool:
        self._send(connection.sock, refusal(Unanswered(error.status, "request", str(error))))
        return False

    def _serve(self, connection: _Connection, end: int) -> bool:
        """Answer a request; returns whether the answer goes on, as events do."""
        sock, came = connection.sock, bytes(connection.came)
        connection.came.clear()
        is_head, minor, is_browser, path = came.startswith(b"HEAD "), 1, True, ""
        answer: Answer | Live
        try:
            request = http1.parse_request(came[:end])
            minor, is_browser = request.minor, self._door.is_browser(request)
            # A query may hold the token, and is not logged.
            path = (request.path or "").partition("?")[0]
            with contextlib.ExitStack() as held:
                asked = self._ask(sock, request, came[end:], held)
                del came
                answer = self._answer(asked)
            if isinstance(answer, Live) and is_head:
                answer.reader.close()
                raise Unanswered(405, "method", "HEAD of events, expected GET", "GET")
        except http1.Malformed as error:
            answer = refusal(Unanswered(error.status, "request", str(error)))
        except Unanswered as error:
            answer = refusal(error)
        except OSError:
            raise
        except Exception:
            log.exception("the inspector: %s could not be answered (bug, traceback follows)",
                          on_one_line(path))  # fmt: skip
            answer = refusal(Unanswered(500, "bug", "a bug of gotunnel; the agent's log has more"))
        if isinstance(answer, Live):
            return self._begin_events(connection, answer.reader, is_browser)
        self._send(sock, answer, with_body=not is_head, chunked=minor > 0)
        return False

    def _answer(self, asked: Asked) -> Answer | Live:
        """An OSError of the site is none of the peer's connection."""
        try:
            return self._site.answer(asked)
        except OSError as error:
            raise RuntimeError(f"the site has failed: {error}") from error

    def _ask(
        self, sock: socket.socket, request: http1.Request, came: bytes, held: contextlib.ExitStack
    ) -> Asked:
        """Check a request and read its body; ``held`` gets what is to be released after the answer.
        Raises Unanswered, Malformed, OSError."""
        door = self._door
        refused = door.refuse_place(request)
        if refused is not None:
            raise Unanswered(*refused)
        path, _, query = http1.origin_target(request).partition("?")
        if request.method not in METHODS:
            raise Unanswered(405, "method", f"method {on_one_line(request.method, 40)}, expected "
                             "GET or POST", ", ".join(METHODS))  # fmt: skip
        stranger = door.refuse_stranger(request)
        body = http1.request_body(request)
        content = b""
        if body is not None and not body.complete:
            if stranger is not None:  # no stranger's body is kept
                raise Unanswered(*stranger)
            limit = self._site.body_limit(request.method, path)
            content = self._read_body(sock, request, body, came, limit, held)
        named = dict(parse_qsl(query, keep_blank_values=True, errors="replace"))
        return Asked(request.method, path, named, request, content, stranger)

    def _read_body(
        self,
        sock: socket.socket,
        request: http1.Request,
        body: http1.Body,
        came: bytes,
        limit: int,
        held: contextlib.ExitStack,
    ) -> bytes:
        too_long = Unanswered(413, "body", f"a body of over {limit} bytes, expected a shorter one")
        if (body.length or 0) > limit:
            raise too_long
        is_large = (body.length or 0) > LARGE
        if is_large:  # before the peer is told to send it
            self._hold_large(held)
        deadline = Deadline(BODY_TIMEOUT)
        if "100-continue" in request.fields.tokens("expect") and request.minor and not came:
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        content = bytearray()
        try:
            while True:
                for piece in body.feed(came):
                    content += piece
                if len(content) > limit:
                    raise too_long
                if not is_large and len(content) > LARGE:
                    self._hold_large(held)
                    is_large = True
                if body.complete:
                    break
                sock.settimeout(deadline.left())
                came = sock.recv(PIECE)
                if not came:
                    raise OSError("the end came within a body")
        except TimeoutError:
            raise Unanswered(408, "body", f"no whole body came in {BODY_TIMEOUT} s") from None
        finally:
            sock.settimeout(SEND_TIMEOUT)
        return bytes(content)

    def _hold_large(self, held: contextlib.ExitStack) -> None:
        """Take the place of the one LARGE body, until ``held`` is closed. Raises Unanswered."""
        if not self._large.acquire(blocking=False):
            raise Unanswered(503, "busy", "another large body is being read, try later")
        held.callback(self._large.release)

    def _send(
        self, sock: socket.socket, answer: Answer, *, with_body: bool = True, chunked: bool = True
    ) -> None:
        fields, body = _fields(answer), answer.body
        if isinstance(body, bytes):
            head = _head(answer.status, fields)
            view = memoryview(head + body[:PIECE] if with_body else head)
            sock.sendall(view)
            if with_body:
                for at in range(PIECE, len(body), PIECE):
                    sock.sendall(memoryview(body)[at : at + PIECE])
            return
        if chunked:
            fields.append(("Transfer-Encoding", "chunked"))
        sock.sendall(_head(answer.status, fields))
        if not with_body:
            return
        for piece in body:
            if self._stopping:
                raise OSError("the inspector stops")
            sock.sendall(http1.encode_chunk(piece) if chunked else piece)
        if chunked:
            sock.sendall(http1.encode_last_chunk())

    # Events

    def _begin_events(self, connection: _Connection, reader: Reader, is_browser: bool) -> bool:
        with self._lock:
            most = MOST_BROWSERS if is_browser else MOST_LIVE
            others = sum(self._readers.values()) if is_browser else len(self._readers)
            is_full = others >= most or len(self._readers) >= MOST_LIVE
            if not is_full:
                connection.reader = reader
                self._readers[connection] = is_browser
        if is_full:
            reader.close()
            self._send(connection.sock, refusal(Unanswered(
                503, "readers", f"{others} others read events, expected fewer: ask for the visits "
                "now and then",
            )))  # fmt: skip
            return False
        connection.deadline = None
        with self._lock:
            if not self._ended:
                self._to_park.append(connection)  # to notice when its reader leaves
        self._waker.wake()
        try:
            self._live.submit(self._tell, connection, reader)
        except Stopped:
            self._end_events(connection, reader)
        return True

    def _tell(self, connection: _Connection, reader: Reader) -> None:
        sock = connection.sock
        fields = [("Content-Type", "text/event-stream"), *FIELDS, (POLICY, NO_CONTENT_POLICY)]
        try:
            with contextlib.suppress(OSError):  # a small buffer is no condition
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LIVE_BUFFER)
            sock.settimeout(SEND_TIMEOUT)
            sock.sendall(_head(200, fields) + PING)
            while not self._stopping and (data := reader.next(PING_TIME)) is not None:
                sock.sendall(data or PING)
        except OSError as error:
            log.debug("a reader of events is gone: %s", error)
        finally:
            self._end_events(connection, reader)

    def _end_events(self, connection: _Connection, reader: Reader) -> None:
        reader.close()
        with self._lock:
            self._readers.pop(connection, None)
        self._leave(self._to_close, connection)


def listen(host: str, port: int) -> socket.socket:
    """A socket for InspectorServer, on an IP address or on localhost, which is 127.0.0.1. Raises
    OSError."""
    host = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listening.setblocking(False)
    return listening


def _fields(answer: Answer) -> list[tuple[str, str]]:
    fields = [("Content-Type", answer.content_type), *FIELDS, *answer.fields]
    if not any(name == POLICY for name, _ in answer.fields):
        fields.append((POLICY, NO_CONTENT_POLICY))
    if isinstance(answer.body, bytes):
        fields.append(("Content-Length", str(len(answer.body))))
    return fields


def _whole(answer: Answer) -> bytes:
    body = answer.body if isinstance(answer.body, bytes) else b"".join(answer.body)
    return _head(answer.status, _fields(answer)) + body


def _head(status: int, fields: Iterable[tuple[str, str]]) -> bytes:
    return http1.encode_head(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", fields)
