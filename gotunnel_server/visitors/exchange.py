"""Forwards one request to its route's target over a stream, and the answer back to the visitor.

The visitor is a request.Request, whatever protocol it speaks. The target gets HTTP/1.1, written by
http1.py.

The request's body and the answer flow at the same time: a body that has not arrived whole with its
head gets a thread of its own (`Upload`), so a target may answer before it has read everything. Both
are streamed, never held whole.

A stream is never half-closed here: a Go agent closes its target as soon as it sees FIN, even if the
target has not answered yet.
"""

import logging
import threading
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus
from time import monotonic

from gotunnel import NoThread, SessionClosed, Stream, spawn
from gotunnel_agent.common import http1, refusals
from gotunnel_agent.common.http1 import Body, Malformed, Response
from gotunnel_agent.common.patience import Patience

from ..routes import AgentBusy
from . import forwarded, login, pages, request_id
from .forwarded import Proxies
from .pages import RETRY, Page
from .request import LEAST_BYTE_RATE, AgentLost, Request, Upgraded, VisitorGone
from .sites import Forward
from .visit import CUT
from .work import Work

log = logging.getLogger("gotunnel.exchange")

# Methods whose effect is the same if the request arrives twice (RFC 9110 §9.2.2). Only these use a
# kept stream: the target may close it while the request is on its way, and then it is sent again.
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
# Fields that the gateway does not pass on. A target must not believe what a visitor itself says of
# its address, nor a visitor what a target says in the gateway's name (X-Gotunnel-Error).
NOT_FOR_TARGETS = http1.HOP_BY_HOP | forwarded.KINDS
NOT_FOR_VISITORS = http1.HOP_BY_HOP | pages.OURS
NOT_WITH_AN_ID = NOT_FOR_VISITORS | {request_id.KIND}
# Work budget for the chunks of an answer: chunks a second in the long run, and at once. Each
# CHUNK_PAYLOAD bytes permit one more. A stream of server-sent events has about a hundred a second.
# Without it, sixteen endless answers of one-byte chunks slowed every other visit from 5 to 400 ms.
CHUNK_RATE, CHUNK_BURST = 10_000, 5_000
CHUNK_PAYLOAD = 2048
# Interval in seconds of the checks whether the visitor of a waiting request is still connected, and
# whether the request's body is still wanted.
WATCH = 0.5
# Seconds that an upload's thread gets to end. Nothing can block it by then: its stream is over, and
# it checks every WATCH whether its request is.
UPLOAD_END_TIMEOUT = 5


class TargetFailed(Exception):
    """The target gave no answer that can be passed on; ``page`` tells the visitor.
    ``detail`` is for the log only: it may quote what the visitor must not learn."""

    def __init__(self, status: int, code: str, text: str, detail: str = ""):
        super().__init__(f"{text} {detail}".rstrip())
        self.page = pages.error(status, code, text)


def send_page(request: Request, page: Page) -> None:
    """Answer with one of the gateway's own pages. Raises OSError."""
    if request.visit is not None:
        request.visit.error = request.visit.error or page.code
    page = pages.suited(page, request.fields.all("accept"))
    fields = [
        ("Content-Type", page.content_type),
        ("Cache-Control", "no-store"),
        ("Server", "gotunnel"),
        ("Date", formatdate(usegmt=True)),
        *page.fields,
    ]
    request.send_head(page.status, HTTPStatus(page.status).phrase, fields, len(page.body))
    request.finish([] if request.method == "HEAD" else [page.body])


class Upload:
    """Copies a request's body from the visitor to a stream.

    The exchange's thread calls the methods. The copying runs in a second thread, if start() finds
    that the body is not complete yet.
    """

    _stream: Stream  # set by start()

    def __init__(self, request: Request, timeout: float):
        """``timeout``: how many seconds the target may read nothing."""
        self._request = request
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._unwanted = threading.Event()  # the target, or the exchange, wants no more of the body
        self._over = threading.Event()  # the request was answered, or never will be
        self._patience = Patience(request.idle_timeout, LEAST_BYTE_RATE, request.crowded)
        # The visitor waits for 100 (Continue) before it sends the body (RFC 9110 §10.1.1).
        self._held_back = "100-continue" in request.fields.tokens("expect")
        self.stuck = False  # the target has read nothing for ``timeout`` seconds
        self._lock = threading.Lock()  # guards _problem
        self._problem: Exception | None = None

    @property
    def problem(self) -> Exception | None:
        """The Malformed, VisitorGone or OSError that ended the upload early and reset its stream.
        It is a TimeoutError if the visitor was too slow."""
        with self._lock:
            return self._problem

    def at_hand(self) -> bytes:
        """The part of the body that has arrived already, framed for the target. Raises Malformed,
        VisitorGone, OSError."""
        request = self._request
        try:
            pieces: list[bytes] = [] if request.body_complete else request.read_body(0)
        except TimeoutError:
            return b""
        self._held_back = False
        return self._framed(pieces)

    def start(self, stream: Stream, first: bytes = b"") -> None:
        """Send the rest to ``stream``; in a thread, if it has not arrived yet. ``first`` is what
        at_hand() returned, unless it was sent with the head. Raises NoThread."""
        self._stream = stream
        if first:
            self._pass_on(first)
        if not self._request.body_complete:
            self._thread = spawn(f"upload {self._request.hostname}", self._run)

    @property
    def under_way(self) -> bool:
        """Whether the target still waits for a part of the body, and so cannot be expected to
        answer yet."""
        thread = self._thread
        wanted = not (self._unwanted.is_set() or self._held_back)
        return wanted and thread is not None and thread.is_alive()

    def ask_for_body(self) -> None:
        """The target has sent 100 (Continue): it wants the body."""
        self._held_back = False

    def note_answer(self) -> None:
        """A piece of the answer has come. The visitor may read it and send nothing meanwhile."""
        self._patience.restore()

    def _run(self) -> None:
        request = self._request
        try:
            while not (request.body_complete or self._over.is_set()):
                data = self._framed(self._read())
                if data and not self._unwanted.is_set():
                    self._pass_on(data)
        except (Malformed, VisitorGone, OSError) as error:
            self._fail(error)
        except Exception as error:  # a bug; the thread's outermost function logs it
            self._fail(error)
            raise

    def _read(self) -> list[bytes]:
        """The next pieces; none if none came within WATCH. Raises TimeoutError if the visitor is
        too slow."""
        request, began = self._request, monotonic()
        pieces: list[bytes] = []
        try:
            pieces = request.read_body(min(WATCH, request.idle_timeout / 4))
            self._held_back = False
        except TimeoutError:
            if self._held_back:
                return pieces
        if not request.body_complete:
            self._patience.spend(monotonic() - began, sum(map(len, pieces)))
        return pieces

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._problem = error
        self._stream.reset()  # wakes the exchange's thread, which waits for an answer

    def _pass_on(self, data: bytes) -> None:
        try:
            self._stream.write(data, timeout=self._timeout)
        except TimeoutError:
            self.stuck = True
            self._unwanted.set()
        except OSError:
            # The target has answered, or its stream is reset; the exchange sees that by itself. Go
            # on reading: the visitor may read the answer only after it has sent the whole body.
            self._unwanted.set()

    def _framed(self, pieces: list[bytes]) -> bytes:
        """The pieces as they go to the target. Chunks are encoded anew, not copied: a target that
        parses a copied frame differently would find another request in it (request smuggling)."""
        request = self._request
        if request.body_length is not None:
            return b"".join(pieces)
        data = b"".join(map(http1.encode_chunk, pieces))
        return data + http1.encode_last_chunk(request.trailers) if request.body_complete else data

    def ended(self, timeout: float) -> bool:
        """Wait ``timeout`` seconds at most for the copying to end; whether it has."""
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def sent(self) -> bool:
        """Whether the whole body was written to the stream. Waits up to WATCH: the answer can
        arrive before the upload's thread has returned from its last write."""
        thread, whole = self._thread, self._request.body_complete
        if whole and thread is not None:
            thread.join(WATCH)
            whole = not thread.is_alive()
        return whole and not self._unwanted.is_set()

    def end(self) -> None:
        """Stop the upload: the request is answered. The caller has closed or reset the stream, or
        the whole body is sent.

        The owner of the visitor's connection deals with what the visitor still sends. Raises
        TimeoutError if the thread does not end, and so still uses the connection.
        """
        self._unwanted.set()
        self._over.set()
        thread = self._thread
        if thread is None:
            return
        if thread.is_alive() and not self._request.body_complete and self.problem is None:
            self._request.refuse_body()
        thread.join(WATCH + UPLOAD_END_TIMEOUT)
        if thread.is_alive():
            self._request.abort()
            raise TimeoutError("the upload of an answered request does not end")


class Exchange:
    """One request to a route's target, and its answer."""

    _stream: Stream  # the one that carries the request; set by _ask()

    def __init__(
        self, request: Request, forward: Forward, proxies: Proxies, response_timeout: float
    ):
        """``response_timeout``: seconds from the whole request to the first byte of the answer."""
        self._request = request
        self._visit = request.visit
        self._id = "" if request.visit is None else request.visit.request_id
        self._forward = forward
        self._route = forward.route
        self._proxies = proxies
        self._timeout = response_timeout
        self._holds_stream = False  # _stream is ours to reset if the exchange fails
        self._fresh: Stream | None = None  # a new stream that has not sent its first byte yet
        self._head_sent = False  # the final answer's head went to the visitor
        self._half_close = False  # the agent was told that FIN on _stream ends one direction only
        self._login = False  # a login may bind _stream to this visitor (login.py)
        self._upload = Upload(request, response_timeout) if request.has_body else None

    def run(self) -> None:
        """Forward the request, and the answer back; without an answer, a page that says why.

        Raises AgentLost if the agent has left before it got the request, which may then wait for
        another. Raises VisitorGone or an OSError if the visitor's connection cannot be used any
        more: the visitor has left, or the answer was cut short and the connection reset.
        """
        try:
            self._run()
        except (TargetFailed, AgentBusy, Malformed) as error:
            failure = self._failure(error)
            if self._head_sent:
                if self._visit is not None:
                    is_cut = isinstance(error, Malformed)
                    self._visit.fail(CUT if is_cut else failure.page.code)
                raise ConnectionAbortedError("the answer was cut short") from None
            named = f" {self._id}" if self._id else ""
            log.info("%s %s%s: %s", self._request.hostname, self._request.method, named, failure)
            send_page(self._request, failure.page)
        finally:
            if self._upload is not None:
                self._upload.end()

    def _run(self) -> None:
        try:
            self._answer(self._ask())
        except BaseException:
            if self._holds_stream:
                self._stream.reset()  # so that the target stops working on the request
            if self._head_sent:
                self._request.abort()  # the part that the visitor got must not look complete
            raise

    def _failure(self, error: TargetFailed | AgentBusy | Malformed) -> TargetFailed:
        if isinstance(error, AgentBusy):
            text = f"{self._route.hostname} has reached a limit: {error}. {RETRY}"
            return TargetFailed(503, "agent-limit", text)
        if isinstance(error, Malformed):
            text = "The service's answer is broken: it is not valid HTTP."
            return TargetFailed(502, "bad-answer", text, f"{error}.")
        return error

    # Asking

    def _ask(self) -> bytes:
        """Send the request on self._stream, and return the first bytes of the answer."""
        tunnel, route, upload = self._route.tunnel, self._route, self._upload
        head, timeout = self._head(), self._timeout
        repeatable = upload is None and self._request.method in IDEMPOTENT
        self._login = login.concerns_connection(self._request.fields, "authorization")
        # The agent must know when the stream opens that FIN may end one direction only. Not with a
        # login: it takes several requests on one stream, and a relayed stream is not kept.
        relayed = self._request.wants_upgrade and tunnel.upgrades and not self._login
        try:
            first = upload.at_hand() if upload else b""
        except Malformed as error:
            raise _bad_request(error) from None
        if (stream := self._take_up(repeatable and not relayed)) is not None:
            self._stream, self._holds_stream = stream, True
            if self._visit is not None:
                self._visit.stream = stream.id
            try:
                stream.write(head, timeout)
                # A request that must not arrive twice is sent again only if writing its head
                # failed: no target acts on half a head.
                if not repeatable:
                    return self._await_answer(first)
                if data := self._wait(timeout):
                    return data
            except ConnectionError:
                pass
            stream.close()  # the target had closed it: send the request again, on a new stream
        tunnel.make_way(route)
        self._half_close = relayed
        try:
            self._stream = tunnel.open(route, self._request.ends, head + first, relayed)
        except ConnectionError as error:
            if upload is None and self._request.may_wait:
                raise AgentLost(tunnel) from error
            raise self._agent_gone() from error
        except TimeoutError as error:
            text = f"The agent of {route.hostname} accepts no more requests at the moment. {RETRY}"
            raise TargetFailed(503, "agent-busy", text) from error
        self._holds_stream = True
        self._fresh = stream = self._stream
        if self._visit is not None:
            self._visit.stream = stream.id
        try:
            return self._await_answer()
        finally:
            self._fresh = None
            tunnel.served(route, stream)

    def _take_up(self, repeatable: bool) -> Stream | None:
        """A stream that was used before, or None. The visitor's own stream may carry any request:
        if an answer on it goes to the wrong request, no other visitor is affected."""
        owner, route = self._request.owner, self._route
        stream = None if owner is None else owner.take(route)
        if stream is not None:
            self._login = True
        elif repeatable:
            stream = route.tunnel.take_kept(route)
        return stream

    def _await_answer(self, first: bytes = b"") -> bytes:
        """self._stream has the head. Send ``first`` and the rest of the body, and return the first
        bytes of the answer."""
        if self._upload:
            try:
                self._upload.start(self._stream, first)
            except NoThread as error:
                log.warning("%s: %s; a request is refused", self._route.hostname, error)
                raise TargetFailed(503, "gateway-busy", pages.BUSY) from error
        if data := self._next(self._timeout):
            return data
        raise TargetFailed(502, "no-answer", "The service closed the connection without an answer.")

    def _head(self) -> bytes:
        """The request's head, as the target gets it."""
        request, strip = self._request, self._forward.strip
        if self._id:
            strip = (*strip, request_id.KIND)
        dropping = NOT_FOR_TARGETS.union(strip) if strip else NOT_FOR_TARGETS
        fields = http1.end_to_end(request.fields, request.wants_upgrade, dropping)
        if self._route.host_header is not None:
            fields = [(name, value) for name, value in fields if name.lower() != "host"]
            fields.insert(0, ("Host", self._route.host_header))
        elif "host" not in request.fields:  # HTTP/1.1 requires it
            fields.append(("Host", request.authority))
        fields += forwarded.fields(
            request.fields, request.peer, request.scheme, request.authority, self._proxies
        )
        fields += self._forward.add
        if self._id:
            fields.append((request_id.FIELD, self._id))
        if request.wants_upgrade:
            fields.append(("Connection", "Upgrade"))
        if request.has_body:
            if request.body_length is None:
                fields.append(("Transfer-Encoding", "chunked"))
            else:
                fields.append(("Content-Length", str(request.body_length)))
        return http1.encode_head(f"{request.method} {request.path} HTTP/1.1", fields)

    # Answering

    def _wait(self, timeout: float | None = None) -> bytes:
        """The next bytes of the answer, b"" at its end. Raises VisitorGone, ConnectionError; and
        TargetFailed if they take more than ``timeout`` seconds, counted from the whole request."""
        upload, began = self._upload, monotonic()
        looks = 0
        while True:
            try:
                return self._stream.read(timeout=WATCH)
            except TimeoutError:
                pass
            if self._request.gone():
                raise VisitorGone
            looks += 1
            # Only at looks 1, 2, 4, 8 ...: each closes kept streams that other visits could use.
            if self._fresh is not None and looks & (looks - 1) == 0:
                self._route.tunnel.give_up_kept(self._route, self._fresh)
            if timeout is None:
                continue
            if upload is not None and upload.under_way:
                began = monotonic()
            elif monotonic() - began >= timeout or upload is not None and upload.stuck:
                raise TargetFailed(504, "timed-out", "The service did not answer in time.")

    def _next(self, timeout: float | None = None) -> bytes:
        """As _wait(), but a broken stream raises TargetFailed: the request is not sent again."""
        try:
            return self._wait(timeout)
        except ConnectionError as error:
            self._check_upload()
            if isinstance(error, SessionClosed):
                raise self._agent_gone() from error
            refusal = refusals.BY_CODE.get(getattr(error, "code", 0))
            if refusal is not None:
                raise TargetFailed(502, refusal.word, refusal.text) from error
            text = "The connection to the service broke before the answer was complete."
            raise TargetFailed(502, "cut-short", text, f"{error}.") from error

    def _check_upload(self) -> None:
        """If the upload ended early, raise the reason."""
        problem = None if self._upload is None else self._upload.problem
        if isinstance(problem, Malformed):
            raise _bad_request(problem)
        if isinstance(problem, TimeoutError):
            raise self._too_slow(problem)
        if problem:
            raise VisitorGone

    def _too_slow(self, problem: TimeoutError) -> TargetFailed:
        text = f"The request's body came too slowly: {problem}."
        if self._head_sent:  # too late for a page
            log.info("%s %s: the answer is reset. %s",
                     self._request.hostname, self._request.method, text)  # fmt: skip
        return TargetFailed(408, "body-timeout", text)

    def _agent_gone(self) -> TargetFailed:
        text = f"The connection to the agent of {self._route.hostname} was lost. {RETRY}"
        return TargetFailed(502, "agent-gone", text)

    def _answer(self, data: bytes) -> None:
        """Pass on interim answers (1xx), then the final one. ``data``: the first bytes."""
        request = self._request
        interim = 0  # bytes of interim heads, of which all together are limited
        loose = False  # the target's HTTP is sloppy, so the answer's end is not certain either
        while True:
            size, response, data = self._read_head(data)
            loose |= response.loose
            if response.status >= 200:
                break
            if response.status == 101:
                self._switch(response, data)
                return
            interim += size
            if interim > http1.HEAD_LIMIT:
                raise Malformed(431, f"interim answers of {interim} bytes, expected the final one")
            request.send_interim(response.status, response.reason, self._fields(response))
            if response.status == 100 and self._upload is not None:
                self._upload.ask_for_body()
        body = http1.response_body(response, request.method)
        self._send_head(response, body)
        pieces: list[bytes]
        trailers: Iterable[tuple[str, str]]
        if body is None:
            pieces, trailers, rest = [], (), data
        else:
            pieces, trailers, rest = self._pass_body(body, data), body.trailers, body.rest
            loose |= body.loose
        reusable = (
            http1.keeps_alive(response)
            and not (rest or loose)
            and (not isinstance(body, http1.UntilCloseBody))
        )
        # Some targets send a body where none may be, such as to HEAD. On a kept stream the next
        # visitor would get those bytes as its answer (HTTP desync).
        certain = body is not None and response.status != 205
        self._login |= login.concerns_connection(response.fields, "www-authenticate")
        # The stream is given back before the answer's last bytes leave: the visitor's next request
        # must find it, and must not be counted beside this one.
        stream, self._holds_stream = self._stream, False
        if self._upload is not None and not self._upload.sent():
            stream.reset()  # also wakes the upload's thread, if the target has stopped reading
        elif self._half_close:  # upgrade declined; a FIN would end one direction only
            stream.reset()
        elif self._login:
            if reusable and request.owner is not None:
                request.owner.keep(self._route, stream)
            else:
                stream.close()
        elif reusable and certain and self._upload is None:
            # Never after a request with a body: a target that ignores such a body would parse it as
            # the next request, and answer that to the next visitor (request smuggling).
            self._route.tunnel.keep(self._route, stream)
        else:
            stream.close()
        trailers = [field for field in trailers if http1.plain_name(field[0]) not in pages.OURS]
        request.finish(pieces, trailers)

    def _send_head(self, response: Response, body: Body | None) -> None:
        # 426 (Upgrade Required): its Upgrade field names the protocol (RFC 9110 §15.5.22).
        fields = self._fields(response, keep_upgrade=response.status == 426)
        if body is not None:
            length = body.length
        else:  # of the body that GET would have got; none is sent
            stated = response.fields.get("content-length")
            length = None if stated is None else int(stated)
        self._head_sent = True
        self._request.send_head(response.status, response.reason, fields, length)

    def _pass_body(self, body: Body, data: bytes) -> list[bytes]:
        """Send the body as it comes, except for its last pieces. They are returned, so that a small
        answer leaves in one write together with its head."""
        work: Work | None = None
        while True:
            chunks = body.chunks
            pieces = body.feed(data) if data else []
            if body.complete:
                return pieces
            units = body.chunks - chunks - len(data) // CHUNK_PAYLOAD
            if units > 0:
                work = work or Work(CHUNK_RATE, CHUNK_BURST)
                work.spend(units)
            self._request.send_data(pieces)
            if self._upload is not None:
                self._upload.note_answer()
            data = self._next()
            if not data:
                body.eof()

    def _read_head(self, data: bytes) -> tuple[int, Response, bytes]:
        """One head of the answer: its size, the parsed head, and the bytes behind it."""
        seen = 0
        while (end := http1.answer_end(data, seen)) < 0:
            seen = len(data)
            more = self._next(self._timeout)
            if not more:
                text = "The service closed the connection in the middle of its answer."
                raise TargetFailed(502, "no-answer", text)
            data += more
        return end, http1.parse_response(data[:end]), data[end:]

    def _fields(self, response: Response, keep_upgrade: bool = False) -> list[tuple[str, str]]:
        """The fields of the target's answer that the visitor gets."""
        dropping = NOT_WITH_AN_ID if self._id else NOT_FOR_VISITORS
        return http1.end_to_end(response.fields, keep_upgrade, dropping)

    def _switch(self, response: Response, data: bytes) -> None:
        """The target has answered 101 (Switching Protocols, RFC 9110 §7.8)."""
        if not self._request.wants_upgrade:
            text = "The service switched to another protocol, which the request did not ask for."
            raise TargetFailed(502, "bad-answer", text)
        self._await_upload()
        fields = self._fields(response, keep_upgrade=True)
        onward = Upgraded(self._stream, self._half_close)
        if not self._request.switch(101, response.reason, fields, data, onward):
            raise TargetFailed(503, "gateway-busy", pages.BUSY)

    def _await_upload(self) -> None:
        """Wait for the request's body: the new protocol begins behind the whole request (RFC 9110
        §7.8), and a target may answer 101 as soon as it has the head."""
        if self._upload is None:
            return
        self._upload.ask_for_body()
        while not self._upload.ended(WATCH):
            if self._request.gone():
                raise VisitorGone
        self._check_upload()
        if not self._upload.sent():
            text = "The service switched to another protocol before it had read the whole request."
            raise TargetFailed(502, "bad-answer", text)


def _bad_request(malformed: Malformed) -> TargetFailed:
    return TargetFailed(malformed.status, "malformed-request", pages.MALFORMED.format(malformed))
