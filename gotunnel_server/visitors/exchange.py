"""The route's side of one request: it goes to the target over a stream, the answer comes back.

The visitor is a request.Request here, in whatever protocol it speaks; towards the target it is
HTTP/1.1, by http1.py.

The request's body and the answer flow at the same time: a body that has not come whole with its
head gets a thread of its own (`Upload`), so a target may answer before it has read everything.
Nothing is held whole. What the target sends is passed on when it comes.

Towards the agent a stream is never half-closed here: a Go agent closes its target when it sees a
FIN, answer or not.
"""

import logging
import threading
from email.utils import formatdate
from http import HTTPStatus
from time import monotonic
from typing import NamedTuple

from gotunnel import NoThread, SessionClosed, Stream, spawn
from gotunnel_agent.common import http1, refusals
from gotunnel_agent.common.http1 import Malformed
from gotunnel_agent.common.patience import Patience

from ..routes import AgentBusy
from . import forwarded, login, pages
from .forwarded import Proxies
from .pages import Page
from .request import LEAST_BYTE_RATE, Request, VisitorGone
from .sites import Forward
from .work import Work

log = logging.getLogger("gotunnel.exchange")

# Methods whose effect is the same if the request arrives twice (RFC 9110 §9.2.2). Only these go
# over a kept stream: its target may close it at the moment that the request is on its way.
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
# Seconds between looks at whether the visitor of a waiting request is still there, and whether its
# body is still wanted.
# Chunks of an answer: so many a second in the long run, and so many at once; each CHUNK_PAYLOAD
# bytes permit one more. A stream of events sends some hundred. Sixteen answers of one-byte chunks
# without end slowed every other visit from 5 to 400 ms.
CHUNK_RATE, CHUNK_BURST = 10_000, 5_000
CHUNK_PAYLOAD = 2048
WATCH = 0.5
# Seconds for an upload's thread to end once nothing can hold it: its stream is over, and it looks
# each WATCH whether its request is.
UPLOAD_END_TIMEOUT = 5


class Upgraded(NamedTuple):
    """The target has answered 101 on ``stream``. ``half_close``: the agent passes FIN on to it."""

    stream: Stream
    half_close: bool


class TargetFailed(Exception):
    """There is no answer, or none that can be passed on; ``page`` says so to the visitor.
    ``detail`` is for the log alone: it may name what is not the visitor's to know."""

    def __init__(self, status, code, text, detail=""):
        super().__init__(f"{text} {detail}".rstrip())
        self.page = pages.error(status, code, text)


def send_page(request: Request, page: Page):
    """Answer with a page of our own. Raises OSError."""
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
    """A request's body on its way from the visitor to a stream.

    The thread of the exchange calls the methods; the loop runs in a thread of its own if start()
    finds that more is to come.
    """

    def __init__(self, request: Request, timeout: float):
        """``timeout``: seconds that the target may take nothing."""
        self._request = request
        self._timeout = timeout
        self._stream = None
        self._thread = None
        self._unwanted = threading.Event()  # the target, or the exchange, wants no more of it
        self._over = threading.Event()  # the request was answered, or never will be
        self._patience = Patience(request.idle_timeout, LEAST_BYTE_RATE, request.crowded)
        # The visitor holds its body back until it is asked for (RFC 9110 §10.1.1).
        self._held_back = "100-continue" in request.fields.tokens("expect")
        self.stuck = False  # the target has taken nothing for ``timeout`` seconds
        self._lock = threading.Lock()  # guards _problem
        self._problem = None

    @property
    def problem(self) -> Exception | None:
        """The Malformed, VisitorGone or OSError that ended it early, and reset its stream: a
        TimeoutError if the visitor was too slow."""
        with self._lock:
            return self._problem

    def at_hand(self) -> bytes:
        """What has come already, framed for the target. Raises Malformed, VisitorGone, OSError."""
        request = self._request
        try:
            pieces = [] if request.body_complete else request.read_body(0)
        except TimeoutError:
            return b""
        self._held_back = False
        return self._framed(pieces)

    def start(self, stream, first=b""):
        """Send the rest to ``stream``, in a thread if it has not come yet. ``first`` is what
        at_hand() has returned, if the stream has not got it. Raises NoThread."""
        self._stream = stream
        if first:
            self._pass_on(first)
        if not self._request.body_complete:
            self._thread = spawn(f"upload {self._request.hostname}", self._run)

    @property
    def under_way(self) -> bool:
        """Whether the target still waits for some of it: then no answer can be expected yet."""
        thread = self._thread
        wanted = not (self._unwanted.is_set() or self._held_back)
        return wanted and thread is not None and thread.is_alive()

    def ask_for_it(self):
        """The target has said that it wants the body."""
        self._held_back = False

    def note_answer(self):
        """The answer streams: its visitor may be silent meanwhile."""
        self._patience.restore()

    def _run(self):
        request = self._request
        try:
            while not (request.body_complete or self._over.is_set()):
                data = self._framed(self._read())
                if data and not self._unwanted.is_set():
                    self._pass_on(data)
        except (Malformed, VisitorGone, OSError) as error:
            self._fail(error)
        except Exception as error:  # a bug, which the thread's top frame logs
            self._fail(error)
            raise

    def _read(self):
        """The next pieces; none if none came for a while. Raises TimeoutError if the visitor is
        too slow."""
        request, began, pieces = self._request, monotonic(), []
        try:
            pieces = request.read_body(min(WATCH, request.idle_timeout / 4))
            self._held_back = False
        except TimeoutError:
            if self._held_back:
                return pieces
        if not request.body_complete:
            self._patience.spend(monotonic() - began, sum(map(len, pieces)))
        return pieces

    def _fail(self, error):
        with self._lock:
            self._problem = error
        self._stream.reset()  # wakes the exchange, which waits for an answer

    def _pass_on(self, data):
        try:
            self._stream.write(data, timeout=self._timeout)
        except TimeoutError:
            self.stuck = True
            self._unwanted.set()
        except OSError:
            # The target has answered, or died; the exchange knows. The visitor may still have to
            # send all before it reads the answer.
            self._unwanted.set()

    def _framed(self, pieces):
        """The pieces as the target gets them; framed anew, since a target that reads a copied
        frame otherwise than we do would see another request in it."""
        request = self._request
        if request.body_length is not None:
            return b"".join(pieces)
        data = b"".join(map(http1.encode_chunk, pieces))
        return data + http1.encode_last_chunk(request.trailers) if request.body_complete else data

    def ended(self, timeout: float) -> bool:
        """Whether no more of it is to come, in ``timeout`` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def sent(self) -> bool:
        """Whether all of it is with the stream. Waits a moment: the answer can be quicker than
        the thread that sent what is answered."""
        thread, whole = self._thread, self._request.body_complete
        if whole and thread is not None:
            thread.join(WATCH)
            whole = not thread.is_alive()
        return whole and not self._unwanted.is_set()

    def end(self):
        """Be done with it: the answer has been given, whether the body was wanted or not. The
        stream has been closed or reset, or all is sent.

        What the visitor still sends is left to the owner of its connection. Raises TimeoutError if
        the thread goes on: then it still has the connection.
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
    """One request, asked of a route, and its answer."""

    def __init__(
        self, request: Request, forward: Forward, proxies: Proxies, response_timeout: float
    ):
        """``response_timeout``: seconds to the first byte of the answer."""
        self._request = request
        self._forward = forward
        self._route = forward.route
        self._proxies = proxies
        self._timeout = response_timeout
        self._stream = None
        self._fresh = None  # a new stream, while its first byte is awaited
        self._head_sent = False  # of the final answer
        self._half_close = False  # what the agent was told of self._stream
        self._login = False  # self._stream knows, or may know, who the visitor is (login.py)
        self._upload = Upload(request, response_timeout) if request.has_body else None

    def run(self):
        """Pass the request on and the answer back; if there is none, a page that says why.

        Raises VisitorGone or another OSError if the visitor's connection is of no further use: it
        has left, or the answer was cut short and aborted.
        """
        try:
            self._run()
        except (TargetFailed, AgentBusy, Malformed) as error:
            if self._head_sent:
                raise ConnectionAbortedError("the answer was cut short") from None
            failure = self._failure(error)
            log.info("%s %s: %s", self._request.hostname, self._request.method, failure)
            send_page(self._request, failure.page)
        finally:
            if self._upload is not None:
                self._upload.end()

    def _run(self):
        try:
            self._answer(self._ask())
        except BaseException:
            if self._stream is not None:
                self._stream.reset()  # the target need not go on
            if self._head_sent:
                self._request.abort()  # what was passed on must not look whole
            raise

    def _failure(self, error):
        if isinstance(error, AgentBusy):
            return TargetFailed(503, "agent-limit", f"{self._route.hostname}: {error}.")
        if isinstance(error, Malformed):
            text = "The service's answer is broken: it breaks a rule of HTTP."
            return TargetFailed(502, "bad-answer", text, f"{error}.")
        return error

    # Asking

    def _ask(self):
        """Send the request; return the first bytes of what is answered on self._stream."""
        tunnel, route, upload = self._route.tunnel, self._route, self._upload
        head, timeout = self._head(), self._timeout
        repeatable = upload is None and self._request.method in IDEMPOTENT
        self._login = login.concerns_connection(self._request.fields, "authorization")
        # The agent has to know from the beginning that FIN may be one direction's only. A login in
        # several steps needs the same stream for the next one, and a relayed stream is not kept.
        relayed = self._request.wants_upgrade and tunnel.upgrades and not self._login
        try:
            first = upload.at_hand() if upload else b""
        except Malformed as error:
            raise _bad_request(error) from None
        if (stream := self._take_up(repeatable and not relayed)) is not None:
            self._stream = stream
            try:
                stream.write(head, timeout)
                if not repeatable:  # from here on: no target does what half a head asks for
                    return self._await_answer(first)
                if data := self._wait(timeout):
                    return data
            except ConnectionError:
                pass
            stream.close()  # its target closed it meanwhile: once more, on another
        tunnel.make_way(route)
        self._half_close = relayed
        try:
            self._stream = tunnel.open(route, self._request.ends, head + first, relayed)
        except ConnectionError as error:
            raise self._agent_gone() from error
        except TimeoutError as error:
            raise TargetFailed(
                503, "agent-busy", f"The agent of {route.hostname} is busy."
            ) from error
        self._fresh = stream = self._stream
        try:
            return self._await_answer()
        finally:
            self._fresh = None
            tunnel.served(route, stream)

    def _take_up(self, repeatable):
        """A stream that has served a visit before, or None. The visitor's own one serves requests
        of any kind: if it is out of step, no other visitor is concerned."""
        owner, route = self._request.owner, self._route
        stream = None if owner is None else owner.take(route)
        if stream is not None:
            self._login = True
        elif repeatable:
            stream = route.tunnel.take_kept(route)
        return stream

    def _await_answer(self, first=b""):
        """The head is with self._stream: send ``first`` and the rest of the body, return the first
        bytes of the answer."""
        if self._upload:
            try:
                self._upload.start(self._stream, first)
            except NoThread as error:
                log.warning("%s: %s; a request is refused", self._route.hostname, error)
                raise TargetFailed(
                    503, "gateway-busy", "The gateway has no room for it now."
                ) from error
        if data := self._next(self._timeout):
            return data
        raise TargetFailed(502, "no-answer", "The service closed the connection, unanswered.")

    def _head(self):
        """The request's head for the target."""
        request, strip = self._request, self._forward.strip
        fields = [
            (name, value)
            for name, value in http1.end_to_end(request.fields, request.wants_upgrade)
            if not forwarded.concerns(name)
        ]
        if strip:
            fields = [field for field in fields if http1.plain_name(field[0]) not in strip]
        if self._route.host_header is not None:
            fields = [(name, value) for name, value in fields if name.lower() != "host"]
            fields.insert(0, ("Host", self._route.host_header))
        elif "host" not in request.fields:  # HTTP/1.1 requires it
            fields.append(("Host", request.authority))
        fields += forwarded.fields(
            request.fields, request.peer, request.scheme, request.authority, self._proxies
        )
        fields += self._forward.add
        if request.wants_upgrade:
            fields.append(("Connection", "Upgrade"))
        if request.has_body:
            if request.body_length is None:
                fields.append(("Transfer-Encoding", "chunked"))
            else:
                fields.append(("Content-Length", str(request.body_length)))
        return http1.encode_head(f"{request.method} {request.path} HTTP/1.1", fields)

    # Answering

    def _wait(self, timeout=None):
        """The next bytes of the answer, b"" at its end. Raises VisitorGone, TargetFailed if they
        take longer than ``timeout`` seconds from the whole request on, ConnectionError."""
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
            # At looks 1, 2, 4, 8 ...: a slow answer must not cost the other visits much.
            if self._fresh is not None and looks & (looks - 1) == 0:
                self._route.tunnel.give_up_kept(self._route, self._fresh)
            if timeout is None:
                continue
            if upload is not None and upload.under_way:
                began = monotonic()
            elif monotonic() - began >= timeout or upload is not None and upload.stuck:
                raise TargetFailed(504, "timed-out", "The service did not answer in time.")

    def _next(self, timeout=None):
        """As _wait(), but a broken stream is a TargetFailed: the request cannot be repeated."""
        try:
            return self._wait(timeout)
        except ConnectionError as error:
            self._check_upload()
            if isinstance(error, SessionClosed):
                raise self._agent_gone() from error
            refusal = refusals.BY_CODE.get(getattr(error, "code", 0))
            if refusal is not None:
                raise TargetFailed(502, refusal.word, refusal.text) from error
            raise TargetFailed(
                502, "cut-short", f"The service cannot be reached: {error}."
            ) from error

    def _check_upload(self):
        """Raise what has ended the request's body early, if anything."""
        problem = self._upload and self._upload.problem
        if isinstance(problem, Malformed):
            raise _bad_request(problem)
        if isinstance(problem, TimeoutError):
            raise self._too_slow(problem)
        if problem:
            raise VisitorGone

    def _too_slow(self, problem):
        text = f"The request's body is too slow: {problem}."
        if self._head_sent:  # no page will say it
            log.info("%s %s: the answer is reset. %s",
                     self._request.hostname, self._request.method, text)  # fmt: skip
        return TargetFailed(408, "body-timeout", text)

    def _agent_gone(self):
        return TargetFailed(502, "agent-gone", f"The agent of {self._route.hostname} has gone.")

    def _answer(self, data):
        """Pass on interim answers, then the final one."""
        request = self._request
        interim = 0  # bytes of heads before the final one, which together are held to the limit
        loose = False  # the target breaks rules of HTTP, perhaps also where its answer ends
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
            request.send_interim(response.status, response.reason, _of_target(response))
            if response.status == 100 and self._upload is not None:
                self._upload.ask_for_it()
        body = http1.response_body(response, request.method)
        self._send_head(response, body)
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
        # Targets that treat HEAD as GET, or put a body where none may be, send bytes that the next
        # visitor would get as its answer.
        certain = body is not None and response.status != 205
        self._login |= login.concerns_connection(response.fields, "www-authenticate")
        # Before the visitor has all of it: its next visit must find this one over, and its stream.
        stream, self._stream = self._stream, None
        if self._upload is not None and not self._upload.sent():
            stream.reset()  # also wakes the upload, if the target has stopped reading it
        elif self._half_close:  # the upgrade was declined, and FIN would not end it at the agent
            stream.reset()
        elif self._login:
            if reusable and request.owner is not None:
                request.owner.keep(self._route, stream)
            else:
                stream.close()
        elif reusable and certain and self._upload is None:
            # A target that reads no body where it expects none takes it for the next request, and
            # would answer that one to the visitor that comes next: kept streams saw no body.
            self._route.tunnel.keep(self._route, stream)
        else:
            stream.close()
        trailers = [field for field in trailers if http1.plain_name(field[0]) not in pages.OURS]
        request.finish(pieces, trailers)

    def _send_head(self, response, body):
        # 426 asks the visitor to upgrade first: Upgrade names the protocol (RFC 9110 §15.5.22).
        fields = _of_target(response, keep_upgrade=response.status == 426)
        if body is not None:
            length = body.length
        else:  # of what is not sent
            length = response.fields.get("content-length")
            length = None if length is None else int(length)
        self._head_sent = True
        self._request.send_head(response.status, response.reason, fields, length)

    def _pass_body(self, body, data) -> list:
        """Send the body as it comes, but for its last pieces, which are returned: a small answer
        leaves in one write, with its head."""
        work = None
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

    def _read_head(self, data):
        """One head of the answer: its size, what it says, and the bytes behind it."""
        seen = 0
        while (end := http1.answer_end(data, seen)) < 0:
            seen = len(data)
            more = self._next(self._timeout)
            if not more:
                raise TargetFailed(502, "no-answer", "The service's answer ends in its head.")
            data += more
        return end, http1.parse_response(data[:end]), data[end:]

    def _switch(self, response, data):
        """The connection now speaks something else (RFC 9110 §7.8)."""
        if not self._request.wants_upgrade:
            raise TargetFailed(502, "bad-answer", "The service changed the protocol unasked.")
        self._await_upload()
        fields = _of_target(response, keep_upgrade=True)
        onward = Upgraded(self._stream, self._half_close)
        if not self._request.switch(101, response.reason, fields, data, onward):
            raise TargetFailed(503, "gateway-busy", "The gateway has no room for it now.")

    def _await_upload(self):
        """A protocol is changed behind a whole request (RFC 9110 §7.8). A target may say 101 as
        soon as it has the head."""
        if self._upload is None:
            return
        self._upload.ask_for_it()
        while not self._upload.ended(WATCH):
            if self._request.gone():
                raise VisitorGone
        self._check_upload()
        if not self._upload.sent():
            raise TargetFailed(502, "bad-answer", "The service changed the protocol too early.")


def _of_target(response, keep_upgrade=False):
    return http1.end_to_end(response.fields, keep_upgrade, dropping=pages.OURS)


def _bad_request(malformed):
    return TargetFailed(malformed.status, "malformed-request", f"{malformed}.")
