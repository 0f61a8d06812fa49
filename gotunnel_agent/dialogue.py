"""Reads the requests and answers of one http stream from its bytes, beside the relay (RFC 9112).

A Dialogue is told what passes in both directions, in the order in which it passes: asked(),
answered(), and ended() at last. It returns nothing and raises nothing; it calls ``tell`` for each
Exchange that is over. It holds no byte back, since the relay passes them on without it.

The gateway keeps a stream for several requests after each other (RFC 9112 §9.3), so one Dialogue
has many exchanges. A Dialogue that is not sure where a message ends gives up: a wrong guess would
take the bytes of a body for a request. From then on it only counts, and the exchange says why.

Pure: no socket, no clock, no thread. ``now`` is always monotonic time.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from .common.http1 import (
    HEAD_LIMIT,
    Body,
    ChunkedBody,
    Malformed,
    Request,
    Response,
    SizedBody,
    answer_end,
    head_end,
    parse_request,
    parse_response,
    request_body,
    response_body,
)

# Requests that wait for their answers (pipelining, RFC 9112 §9.3.2). A gateway sends the next
# request after the answer, so more than a few are no visit of ours.
MOST_WAITING = 100
SWITCHING_PROTOCOLS = 101  # afterwards the stream speaks another protocol, such as WebSocket's

VERSIONS = (b"HTTP/1.1", b"HTTP/1.0")
# Content-Length in a head in lower case: at most 18 digits, as in http1.py, and no fold behind it.
_LENGTH = re.compile(rb"\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*\r\n(?![ \t])")

# Why an exchange is not whole.
NO_ANSWER = "no answer"
CUT_SHORT = "cut short"
NOT_FOLLOWED = "not followed"  # how the other reasons begin

# Hears the content of bodies, one call a piece: hear(False, piece, now) for the request's,
# hear(True, piece, now) for the answer's. Chunk lines are no content. After a change of protocol it
# hears all bytes.
Hear: TypeAlias = Callable[[bool, bytes, float], None]

MOST_INTERIM = 8  # interim answers whose heads an exchange keeps; a target may send them for ever


class Exchange:
    """One request and its answer, as far as they have come.

    ``method`` and ``target`` are the request's, "" if it could not be read; ``status`` is the final
    answer's, 0 until its head has come. ``request_head`` and ``response_head`` are the bytes of
    both heads, ``interim`` the heads of 1xx answers before it, MOST_INTERIM at most. The trailers
    are those that came behind chunked bodies.

    ``began`` is when the request's first byte came, ``answer_began`` when the final answer's head
    was whole, ``over`` when both bodies had ended. ``answered``: the answer is whole, though the
    request may go on. ``bytes_in`` and ``bytes_out`` count the content of both bodies; after a
    change of protocol, and once it is not followed any more, all bytes. ``may_switch``: the request
    asks for another protocol on its stream (RFC 9110 §7.8, §9.3.6). ``problem`` says why the
    exchange is not whole or not followed; "" if all is well.
    """

    __slots__ = (
        "method", "target", "status", "request_head", "response_head", "began", "answer_began",
        "over", "answered", "bytes_in", "bytes_out", "may_switch", "problem", "hear", "interim",
        "request_trailers", "response_trailers", "_host",
    )  # fmt: skip

    def __init__(self, began: float):
        self.method = self.target = self.problem = ""
        self.status = 0
        self.request_head = self.response_head = b""
        self.began = began
        self.answer_began = self.over = 0.0
        self.bytes_in = self.bytes_out = 0
        self.may_switch = self.answered = False
        self.interim: tuple[bytes, ...] = ()
        self.request_trailers: Sequence[tuple[str, str]] = ()
        self.response_trailers: Sequence[tuple[str, str]] = ()
        self.hear: Hear | None = None
        self._host: str | None = None  # None: not looked up yet

    @property
    def host(self) -> str:
        """The request's Host; "" if there is none. It is parsed once: a screen asks for it four
        times a second, for each visit that goes on."""
        if self._host is None:
            if not self.request_head:
                return ""
            request = self.request
            self._host = "" if request is None else request.fields.get("host") or ""
        return self._host

    @property
    def request(self) -> Request | None:
        """The request's head, parsed anew each time; None if it could not be read."""
        return _parsed(parse_request, self.request_head)

    @property
    def response(self) -> Response | None:
        """Likewise the answer's."""
        return _parsed(parse_response, self.response_head)

    def switches(self) -> bool:
        """Whether the answer agrees to another protocol."""
        if not self.may_switch:
            return False
        status = self.status
        return 200 <= status < 300 if self.method == "CONNECT" else status == SWITCHING_PROTOCOLS


Head = TypeVar("Head", Request, Response)


def _parsed(parse: Callable[[bytes], Head], head: bytes) -> Head | None:
    try:
        return parse(head) if head else None
    except Malformed:
        return None


# Most heads say all that is needed in a few words. Reading only these takes a quarter of the time
# of a whole parser, and each request of each visit waits for the GIL meanwhile. Any head that is
# not plainly of this kind goes to the parser.


def read_request(exchange: Exchange) -> Body | None:
    """Fill in an exchange from its request's head, and return the decoder of the request's body,
    None if it has none. Raises Malformed."""
    head = exchange.request_head
    lower = head.lower()
    if not (
        b"\ncontent-length" in lower
        or b"\ntransfer-encoding" in lower
        or b"\nupgrade:" in lower
        or lower.startswith(b"connect")
    ):
        words = head[: head.find(b"\r")].split(b" ")
        if len(words) == 3 and words[2] in VERSIONS and words[0].isalpha():
            exchange.method, exchange.target = words[0].decode(), words[1].decode("latin-1")
            return None
    request = parse_request(head)
    exchange.method, exchange.target = request.method, request.target
    exchange.may_switch = request.method == "CONNECT" or "upgrade" in request.fields
    return request_body(request)


def read_answer(exchange: Exchange) -> Body | int | None:
    """Fill in an exchange from its answer's head, and return the length of the answer's body, or
    its decoder; None if it has none. Raises Malformed."""
    head = exchange.response_head
    lower = head.lower()
    status = head[9:12]
    if (
        head.startswith(b"HTTP/1.1 ")
        and status.isdigit()
        and status >= b"200"
        and exchange.method != "CONNECT"
    ):
        chunked = lower.count(b"\ntransfer-encoding")
        length = lower.count(b"\ncontent-length")
        body: Body | int | None = None
        if chunked == 1 and not length and b"\ntransfer-encoding: chunked\r\n" in lower:
            body = ChunkedBody(lenient=True)
        elif length == 1 and not chunked and (match := _LENGTH.search(lower)):
            body = int(match[1])
        if body is not None and head[12:13] in b" \r":
            exchange.status = int(status)
            has_none = exchange.method == "HEAD" or exchange.status in (204, 304)
            return None if has_none else body
    response = parse_response(head)
    exchange.status = response.status
    return response_body(response, exchange.method)


Tell: TypeAlias = Callable[[Exchange], None]


class Counted:
    """A stream whose bytes are counted and not read: in tcp mode, or to an HTTP/2 target."""

    def __init__(
        self,
        tell: Tell,
        began: float,
        problem: str = "",
        listen: Callable[[Exchange], Hear | None] | None = None,
    ):
        """``problem``: why it is not followed; "" in tcp mode, in which nothing can be.
        ``listen(exchange)`` is called at once; nothing is heard."""
        self._tell = tell
        self._exchange = Exchange(began)
        self._exchange.problem = problem
        if listen is not None:
            listen(self._exchange)

    def current(self) -> Exchange | None:
        """The exchange that goes on. Any thread."""
        return self._exchange

    def asked(self, data: bytes, now: float) -> None:
        self._exchange.bytes_in += len(data)

    def answered(self, data: bytes, now: float) -> None:
        self._exchange.bytes_out += len(data)

    def give_up(self, why: str, now: float) -> None:
        """Nothing is expected of it but its count, which lacks some bytes then."""

    def ended(self, now: float) -> None:
        self._exchange.over = now
        self._tell(self._exchange)


class Dialogue:
    """The exchanges of one http stream.

    Each direction has a state: the method that reads its next bytes. It returns those of them that
    are for the next state.
    """

    def __init__(
        self,
        tell: Tell,
        hold: Callable[[int], bool] = lambda count: True,
        listen: Callable[[Exchange], Hear | None] | None = None,
    ):
        """``tell(exchange)`` is called once for each exchange, when it is over. ``hold(count)``
        takes memory for ``count`` bytes of unfinished heads, or gives it back if count is negative;
        false: there is none. ``listen(exchange)`` is called when a request's head is whole, and
        returns the function that hears the bodies, or None."""
        self._tell, self._hold, self._listen = tell, hold, listen
        self._read_request, self._read_answer = self._request_head, self._answer_head
        self._held_in, self._held_out = bytearray(), bytearray()  # unfinished heads
        # Exchanges whose answers are not whole, the oldest first. There is one at least once the
        # stream is not followed any more, or has switched to another protocol.
        self._waiting: deque[Exchange] = deque()
        self._asking = Exchange(0)  # whose request is being read, or was read last
        self.uploading = False  # a request's head has come, and not all of its body
        self._request_body: Body = Body()
        self._answer_body: Body = Body()

    def current(self) -> Exchange | None:
        """The oldest exchange that is not over. Any thread."""
        try:
            return self._waiting[0]
        except IndexError:
            return None

    def asked(self, data: bytes, now: float) -> None:
        """These bytes go to the target."""
        try:
            while data:
                data = self._read_request(data, now)
        except Malformed as error:
            self.give_up(f"{NOT_FOLLOWED}, as to the request: {error}", now)
            self._count_in(data, now)

    def answered(self, data: bytes, now: float) -> None:
        """These bytes came from the target; b"" is the end of its side."""
        try:
            if not data and self._read_answer == self._answer_content:
                self._answer_body.eof()
                self._end_answer(now)
            while data:
                data = self._read_answer(data, now)
        except Malformed as error:
            if data:
                self.give_up(f"{NOT_FOLLOWED}, as to the answer: {error}", now)
                self._count_out(data, now)
            # Or the body was cut short: ended() says so.

    def give_up(self, why: str, now: float) -> None:
        """Only count from now on, because of ``why``."""
        self._drop_heads()
        self._read_request, self._read_answer = self._count_in, self._count_out
        if not self._waiting:
            self._waiting.append(Exchange(now))
        for exchange in self._waiting:
            exchange.problem, exchange.hear = why, None

    def ended(self, now: float) -> None:
        """The visit is over."""
        self._drop_heads()
        while self._waiting:
            exchange = self._waiting[0]
            if not (exchange.problem or exchange.answered or exchange.switches()):
                exchange.problem = CUT_SHORT if exchange.status else NO_ANSWER
            self._finish(now)

    def _finish_answer(self, now: float) -> None:
        """The answer is whole. If it came early, the exchange goes on until the request is."""
        if self.uploading and self._waiting[0] is self._asking:
            self._asking.answered = True
        else:
            self._finish(now)

    def _finish(self, now: float) -> None:
        exchange = self._waiting.popleft()
        exchange.over, exchange.hear = now, None
        self._tell(exchange)

    def _count_in(self, data: bytes, now: float) -> bytes:
        self._waiting[0].bytes_in += len(data)
        return b""

    def _count_out(self, data: bytes, now: float) -> bytes:
        self._waiting[0].bytes_out += len(data)
        return b""

    def _switched_in(self, data: bytes, now: float) -> bytes:
        exchange = self._waiting[0]
        exchange.bytes_in += len(data)
        if exchange.hear is not None:
            exchange.hear(False, data, now)
        return b""

    def _switched_out(self, data: bytes, now: float) -> bytes:
        exchange = self._waiting[0]
        exchange.bytes_out += len(data)
        if exchange.hear is not None:
            exchange.hear(True, data, now)
        return b""

    def _keep(self, held: bytearray, data: bytes) -> None:
        """Replace the bytes in ``held`` by ``data``, until more comes. Raises Malformed."""
        more = len(data) - len(held)
        if not self._hold(more):
            raise Malformed(431, "no memory is left for its head")
        held[:] = data

    def _drop_heads(self) -> None:
        for held in (self._held_in, self._held_out):
            if held:
                self._keep(held, b"")

    # The request's states

    def _request_head(self, data: bytes, now: float) -> bytes:
        held = self._held_in
        if not held:
            self._asking = Exchange(now)
        whole = bytes(held) + data if held else data
        end = head_end(whole, len(held))
        if end < 0:
            self._keep(held, whole)
            return b""
        if held:
            self._keep(held, b"")
        exchange = self._asking
        exchange.request_head = whole[:end]
        body = read_request(exchange)
        if len(self._waiting) == MOST_WAITING:
            raise Malformed(400, f"over {MOST_WAITING} requests wait for their answers")
        self._waiting.append(exchange)
        if self._listen is not None:
            exchange.hear = self._listen(exchange)
        if body is None or body.complete:
            self._end_request(now)
        else:
            self._request_body, self._read_request = body, self._request_content
            self.uploading = True
        return whole[end:]

    def _request_content(self, data: bytes, now: float) -> bytes:
        body, exchange = self._request_body, self._asking
        for piece in body.feed(data):
            exchange.bytes_in += len(piece)
            if exchange.hear is not None:
                exchange.hear(False, piece, now)
        if not body.complete:
            return b""
        exchange.request_trailers = body.trailers
        self._end_request(now)
        return body.rest

    def _end_request(self, now: float) -> None:
        self.uploading = False
        if self._asking.answered:
            self._finish(now)
        undecided = self._asking.may_switch and not self._asking.status
        self._read_request = self._undecided if undecided else self._request_head

    def _undecided(self, data: bytes, now: float) -> bytes:
        """What comes behind a request for another protocol is in that one, or a next request: the
        answer decides."""
        whole = bytes(self._held_in) + data
        if len(whole) > HEAD_LIMIT:
            raise Malformed(400, "it goes on before the protocol is agreed on")
        self._keep(self._held_in, whole)
        return b""

    # The answer's states

    def _answer_head(self, data: bytes, now: float) -> bytes:
        if not self._waiting or self._waiting[0].answered:
            raise Malformed(400, "it came without a request")
        held = self._held_out
        whole = bytes(held) + data if held else data
        end = answer_end(whole, len(held))
        if end < 0:
            self._keep(held, whole)
            return b""
        if held:
            self._keep(held, b"")
        exchange, rest = self._waiting[0], whole[end:]
        exchange.response_head = whole[:end]
        body = read_answer(exchange)
        status = exchange.status
        if status < 200 and status != SWITCHING_PROTOCOLS:  # an interim answer (RFC 9110 §15.2)
            if len(exchange.interim) < MOST_INTERIM:
                exchange.interim += (exchange.response_head,)
            exchange.response_head, exchange.status = b"", 0
            return rest
        exchange.answer_began = now
        switches = exchange.switches()
        if status == SWITCHING_PROTOCOLS and not switches:
            raise Malformed(400, "status 101, which the request did not ask for")
        undecided = b""
        if exchange is self._asking and self._read_request == self._undecided:
            undecided = bytes(self._held_in)
            self._keep(self._held_in, b"")
            self._read_request = self._request_head
        if switches:
            self._read_request, self._read_answer = self._switched_in, self._switched_out
        elif body is None or body == 0:
            self._finish_answer(now)
        elif isinstance(body, int) and len(rest) >= body:
            exchange.bytes_out = body
            if exchange.hear is not None:
                exchange.hear(True, rest[:body], now)
            self._finish_answer(now)
            rest = rest[body:]
        else:
            self._answer_body = SizedBody(body) if isinstance(body, int) else body
            self._read_answer = self._answer_content
        if undecided:
            self.asked(undecided, now)
        return rest

    def _answer_content(self, data: bytes, now: float) -> bytes:
        body, exchange = self._answer_body, self._waiting[0]
        for piece in body.feed(data):
            exchange.bytes_out += len(piece)
            if exchange.hear is not None:
                exchange.hear(True, piece, now)
        if not body.complete:
            return b""
        self._end_answer(now)
        return body.rest

    def _end_answer(self, now: float) -> None:
        self._read_answer = self._answer_head
        self._waiting[0].response_trailers = self._answer_body.trailers
        self._finish_answer(now)
