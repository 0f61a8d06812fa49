"""Forwards one request to its route's target over a stream, and the answer back to the visitor.

The visitor is a request.Request, and the target a target.Target, whatever protocols they speak.

The request's body and the answer flow at the same time: a body that has not arrived whole with its
head gets a thread of its own (`Upload`), so a target may answer before it has read everything. Both
are streamed, never held whole.

A stream is never half-closed here: a Go agent closes its target as soon as it sees FIN, even if the
target has not answered yet.
"""

import logging
from email.utils import formatdate
from http import HTTPStatus
from importlib import import_module
from time import monotonic
from typing import Any

from gotunnel import NoThread, SessionClosed, Stream
from gotunnel_agent.common import http1, refusals
from gotunnel_agent.common.http1 import Malformed, Response

from ..routes import H2, AgentBusy
from . import forwarded, login, pages, request_id
from .forwarded import Proxies
from .http1_target import Http1Target
from .pages import LATER, RETRY, Page
from .request import AgentLost, Request, Upgraded, VisitorGone
from .sites import Forward
from .target import Target, TargetFailed, Unprocessed
from .upload import Upload
from .visit import CUT

log = logging.getLogger("gotunnel.exchange")

# Methods whose effect is the same if the request arrives twice (RFC 9110 §9.2.2). Only these use a
# kept stream: the target may close it while the request is on its way, and then it is sent again.
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
# Fields that the gateway does not pass on. A target must not believe what a visitor itself says of
# its address, nor a visitor what a target says in the gateway's name (X-Gotunnel-Error).
NOT_FOR_TARGETS = http1.HOP_BY_HOP | forwarded.KINDS
NOT_FOR_VISITORS = http1.HOP_BY_HOP | pages.OURS
NOT_WITH_AN_ID = NOT_FOR_VISITORS | {request_id.KIND}
NOT_FOR_TARGETS_WITH_AN_ID = NOT_FOR_TARGETS | {request_id.KIND}
# Interval in seconds of the checks whether the visitor of a waiting request is still connected.
WATCH = 0.5


def send_page(request: Request, page: Page) -> None:
    """Answer with one of the gateway's own pages. Raises OSError."""
    if request.visit is not None:
        request.visit.error = request.visit.error or page.code
    id_ = "" if request.visit is None else request.visit.request_id
    dress = pages.Dress(request.templates, request.hostname, id_)
    page = pages.suited(page, request.fields.all("accept"), dress)
    fields = [
        ("Content-Type", page.content_type),
        ("Cache-Control", "no-store"),
        ("Server", "gotunnel"),
        ("Date", formatdate(usegmt=True)),
        *page.fields,
    ]
    request.send_head(page.status, HTTPStatus(page.status).phrase, fields, len(page.body))
    request.finish([] if request.method == "HEAD" else [page.body])


class Exchange:
    """One request to a route's target, and its answer."""

    _stream: Stream  # the one that carries the request; set by _ask(), as is _target
    _target: Target
    _pieces: list[bytes]  # of the body that had come with the head; likewise

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
        self._upload = self._new_upload() if request.has_body else None

    def _new_upload(self) -> Upload:
        return Upload(self._request, self._timeout)

    def run(self) -> None:
        """Forward the request, and the answer back; without an answer, a page that says why.

        Raises AgentLost if the agent has left before it got the request, which may then wait for
        another. Raises VisitorGone or an OSError if the visitor's connection cannot be used any
        more: the visitor has left, or the answer was cut short and the connection reset.
        """
        try:
            self._run()
        except (TargetFailed, AgentBusy, Malformed, Unprocessed) as error:
            self._fail(error)
        finally:
            if self._upload is not None:
                self._upload.end()
            # The target has our _next: a reference cycle, which would keep the visitor's connection
            # in memory until Python looks for cycles, perhaps hours later.
            self._upload = None
            if hasattr(self, "_target"):
                del self._target

    def _fail(self, error: Exception) -> None:
        """The page, or a cut. Not in run(), whose frame would hold the error, and that the frame: a
        reference cycle, which would keep the visitor's connection in memory."""
        failure = self._failure(error)
        if self._head_sent:
            if self._visit is not None:
                is_cut = isinstance(error, Malformed)
                self._visit.fail(CUT if is_cut else failure.page.code)
            raise ConnectionAbortedError("the answer was cut short") from None
        named = f" {self._id}" if self._id else ""
        log.info("%s %s%s: %s", self._request.hostname, self._request.method, named, failure)
        send_page(self._request, failure.page)

    def _run(self) -> None:
        try:
            self._ask()
            self._answer()
        except BaseException:
            if self._holds_stream:
                self._target.reset()  # so that it stops working on the request
            if self._head_sent:
                self._request.abort()  # the part that the visitor got must not look complete
            raise

    def _failure(self, error: Exception) -> TargetFailed:
        if isinstance(error, TargetFailed):
            return error
        if isinstance(error, AgentBusy):
            text = f"{self._route.hostname} serves as many visitors as it may. {RETRY}"
            return TargetFailed(503, "agent-limit", text, f"{error}.")
        if isinstance(error, Malformed):
            text = f"The site's answer is broken, and cannot be shown. {LATER}"
            return TargetFailed(502, "bad-answer", text, f"{error}.")
        text = f"The site took no request at the moment. {RETRY}"
        return TargetFailed(502, "no-answer", text, f"{error}.")

    # Asking

    def _ask(self) -> None:
        """Send the request on self._stream, and wait for the beginning of the answer."""
        tunnel, route, upload = self._route.tunnel, self._route, self._upload
        timeout = self._timeout
        if route.protocol:
            self._target = self._speak_http2()
        else:
            self._target = Http1Target(self._request, self._head(), self._next, timeout)
        target = self._target
        repeatable = upload is None and self._request.method in IDEMPOTENT
        self._login = login.concerns_connection(self._request.fields, "authorization")
        # The agent must know when the stream opens that FIN may end one direction only. Not with a
        # login: it takes several requests on one stream, and a relayed stream is not kept.
        relayed = self._request.wants_upgrade and tunnel.upgrades and not self._login
        try:
            pieces = self._pieces = upload.at_hand() if upload else []
        except Malformed as error:
            raise _bad_request(error) from None
        # A target that speaks HTTP/2 says which requests it has not seen before it closes, so there
        # any request may use a kept stream.
        may_be_late = repeatable and not relayed or route.protocol != ""
        if (stream := self._take_up(may_be_late)) is not None:
            self._stream, self._holds_stream = stream, True
            if self._visit is not None:
                self._visit.stream = stream.id
            try:
                stream.write(target.opening(stream), timeout)
                # A request that must not arrive twice is sent again only if writing its head
                # failed: no target acts on half a head.
                if not repeatable:
                    self._await_answer(target.framed(pieces) if upload else b"")
                    return
                target.arrived = self._wait(timeout)
                if target.arrived:
                    return
            except ConnectionError:
                pass
            stream.close()  # the target had closed it: send the request again, on a new stream
        tunnel.make_way(route)
        self._half_close = relayed
        first = target.opening(None)
        if upload:
            first += target.framed(pieces)
        try:
            stream = self._stream = tunnel.open(route, self._request.ends, first, relayed)
        except ConnectionError as error:
            # Not if a part of the body was sent: its target may have acted on it.
            if self._may_be_lost() and (upload is None or isinstance(error, SessionClosed)):
                if upload is not None:
                    self._request.unread_body(pieces)
                raise AgentLost(tunnel) from error
            raise self._agent_gone() from error
        except TimeoutError as error:
            text = f"{route.hostname} takes no more visitors at the moment. {RETRY}"
            raise TargetFailed(503, "agent-busy", text) from error
        target.carried_by(stream)
        self._holds_stream = True
        self._fresh = stream
        if self._visit is not None:
            self._visit.stream = stream.id
        try:
            self._await_answer()
        finally:
            self._fresh = None
            tunnel.served(route, stream)

    def _may_be_lost(self) -> bool:
        """Whether AgentLost may be raised: another tunnel may get the request."""
        return self._request.may_wait

    def _speak_http2(self) -> Target:
        if self._request.wants_upgrade:
            text = "This site has no WebSocket here: it speaks HTTP/2 to the gateway."
            raise TargetFailed(501, "no-upgrade", text)
        # Loaded when the first such target is asked, so that other gateways do not need h2.
        speak = import_module(f"{__package__}.http2_target").Http2Target
        scheme = "https" if self._route.protocol == H2 else "http"
        target: Target = speak(self._request, self._head(), self._next, self._timeout, scheme)
        return target

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

    def _await_answer(self, first: bytes = b"") -> None:
        """self._stream has the head. Send ``first`` and the rest of the body, and wait for the
        beginning of the answer."""
        if self._upload:
            try:
                self._upload.start(self._target, self._stream, first)
            except NoThread as error:
                log.warning("%s: %s; a request is refused", self._route.hostname, error)
                raise TargetFailed(503, "gateway-busy", pages.BUSY) from error
        self._target.arrived = self._next(self._timeout)
        if not self._target.arrived:
            text = f"The site closed the connection without an answer. {RETRY}"
            raise TargetFailed(502, "no-answer", text)

    def _head(self) -> list[tuple[str, str]]:
        """The fields of the request that the target gets, without its framing."""
        request, strip = self._request, self._forward.strip
        dropping = NOT_FOR_TARGETS_WITH_AN_ID if self._id else NOT_FOR_TARGETS
        if strip:
            dropping = dropping.union(strip)
        fields = http1.end_to_end(request.fields, request.wants_upgrade, dropping)
        if self._route.host_header is not None:
            fields = [(name, value) for name, value in fields if name.lower() != "host"]
            fields.insert(0, ("Host", self._route.host_header))
        elif "host" not in request.fields.named:  # HTTP/1.1 requires it
            fields.append(("Host", request.authority))
        fields += forwarded.fields(
            request.fields, request.peer, request.scheme, request.authority, self._proxies
        )
        fields += self._forward.add
        if self._id:
            fields.append((request_id.FIELD, self._id))
        return fields

    # Answering

    def _wait(self, timeout: float | None = None) -> Any:
        """What the target's read() returns. Raises VisitorGone, ConnectionError; and TargetFailed
        if it takes more than ``timeout`` seconds, counted from the whole request."""
        upload, began = self._upload, monotonic()
        looks = 0
        while True:
            try:
                return self._target.read(timeout=WATCH)
            except TimeoutError:
                pass
            if self._request.gone():
                raise VisitorGone
            self._look()
            looks += 1
            # Only at looks 1, 2, 4, 8 ...: each closes kept streams that other visits could use.
            if self._fresh is not None and looks & (looks - 1) == 0:
                self._route.tunnel.give_up_kept(self._route, self._fresh)
            if timeout is None:
                continue
            if upload is not None and upload.under_way:
                began = monotonic()
            elif monotonic() - began >= timeout or upload is not None and upload.stuck:
                raise TargetFailed(504, "timed-out", f"The site did not answer in time. {LATER}")

    def _look(self) -> None:
        """Called every WATCH seconds while nothing comes from the target. For PooledExchange."""

    def _next(self, timeout: float | None) -> Any:
        """As _wait(), but a broken stream raises TargetFailed: the request is not sent again. Only
        Unprocessed is raised as it is, if the whole request is here. No local name is given to what
        is raised: see _fail()."""
        try:
            return self._wait(timeout)
        except ConnectionError as error:
            if isinstance(error, Unprocessed) and not (self._upload and self._upload.has_thread):
                raise
            self._check_upload()
            if isinstance(error, SessionClosed):
                raise self._agent_gone() from error
            refusal = self._route.tunnel.refusals.get(getattr(error, "code", 0))
            if refusal is not None:
                self._look_for_another(refusal, error)
                raise self._refused(refusal) from error
            text = f"The connection to the site broke before its answer was complete. {RETRY}"
            raise TargetFailed(502, "cut-short", text, f"{error}.") from error

    def _refused(self, refusal: refusals.Refusal) -> TargetFailed:
        failure = TargetFailed(refusal.status, refusal.word, refusal.text)
        if refusal is refusals.UNHEALTHY:
            failure.page = pages.unhealthy(self._request.hostname)
        return failure

    def _look_for_another(self, refusal: refusals.Refusal, error: Exception) -> None:
        """Raise AgentLost if another gateway has refused the request as its agent has left, and
        the body is here: nothing of the request was passed on, so the next agent may get it."""
        upload = self._upload
        if refusal is not refusals.GONE or self._head_sent or not self._may_be_lost():
            return
        if not (upload and upload.has_thread):
            if upload is not None:
                self._request.unread_body(self._pieces)
            raise AgentLost(self._route.tunnel) from error

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
        text = "What you sent came too slowly. Try again, by a better connection if there is one."
        if self._head_sent:  # too late for a page
            log.info("%s %s: the answer is reset. The request's body came too slowly: %s.",
                     self._request.hostname, self._request.method, problem)  # fmt: skip
        return TargetFailed(408, "body-timeout", text, f"{problem}.")

    def _agent_gone(self) -> TargetFailed:
        text = f"The connection to {self._route.hostname} was lost. {RETRY}"
        return TargetFailed(502, "agent-gone", text)

    def _answer(self) -> None:
        """Pass on interim answers (1xx), then the final one."""
        request, target = self._request, self._target
        while (response := target.read_head()).status < 200:
            if response.status == 101:
                self._switch(response)
                return
            request.send_interim(response.status, response.reason, self._fields(response))
            if response.status == 100 and self._upload is not None:
                self._upload.ask_for_body()
        # 426 (Upgrade Required): its Upgrade field names the protocol (RFC 9110 §15.5.22).
        fields = self._fields(response, keep_upgrade=response.status == 426)
        self._head_sent = True
        request.send_head(response.status, response.reason, fields, target.length)
        pieces = target.pass_body(request.send_data if self._upload is None else self._send_data)
        self._login |= login.concerns_connection(response.fields, "www-authenticate")
        # The stream is given back before the answer's last bytes leave: the visitor's next request
        # must find it, and must not be counted beside this one.
        stream, self._holds_stream = self._stream, False
        if self._upload is not None and not self._upload.sent():
            target.reset()  # also wakes the upload's thread, if the target has stopped reading
        elif self._half_close:  # upgrade declined; a FIN would end one direction only
            stream.reset()
        elif self._login:
            if target.reusable and request.owner is not None:
                request.owner.keep(self._route, stream)
            else:
                stream.close()
        elif target.shareable:
            self._route.tunnel.keep(self._route, stream)
        else:
            stream.close()
        trailers = target.trailers
        if trailers:
            trailers = [field for field in trailers if http1.plain_name(field[0]) not in pages.OURS]
        request.finish(pieces, trailers)

    def _send_data(self, pieces: list[bytes]) -> None:
        self._request.send_data(pieces)
        if self._upload is not None:
            self._upload.note_answer()

    def _fields(self, response: Response, keep_upgrade: bool = False) -> list[tuple[str, str]]:
        """The fields of the target's answer that the visitor gets."""
        dropping = NOT_WITH_AN_ID if self._id else NOT_FOR_VISITORS
        return http1.end_to_end(response.fields, keep_upgrade, dropping)

    def _switch(self, response: Response) -> None:
        """The target has answered 101 (Switching Protocols, RFC 9110 §7.8)."""
        if not self._request.wants_upgrade:
            text = "The site's answer is broken: it changes to a protocol that was not asked for."
            raise TargetFailed(502, "bad-answer", text)
        self._await_upload()
        fields = self._fields(response, keep_upgrade=True)
        onward = self._onward()
        if not self._request.switch(101, response.reason, fields, self._target.arrived, onward):
            raise TargetFailed(503, "gateway-busy", pages.BUSY)

    def _onward(self) -> Upgraded:
        return Upgraded(self._stream, self._half_close)

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
            text = "The site's answer is broken: it changes its protocol within a request."
            raise TargetFailed(502, "bad-answer", text)


def exchange(
    request: Request, forward: Forward, proxies: Proxies, response_timeout: float
) -> Exchange:
    """The Exchange for a request, by its route: for the arguments see there."""
    pool = forward.route.pool
    if pool is None:
        return Exchange(request, forward, proxies, response_timeout)
    # Loaded when the first pool is asked: other gateways have no need of it.
    kind = import_module(f"{__package__}.pooled").PooledExchange
    pooled: Exchange = kind(request, forward, pool, proxies, response_timeout)
    return pooled


def _bad_request(malformed: Malformed) -> TargetFailed:
    return TargetFailed(malformed.status, "malformed-request", pages.MALFORMED.format(malformed))
