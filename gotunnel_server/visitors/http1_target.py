"""A target's side of an exchange in HTTP/1.1, written and read by http1.py (RFC 9112)."""

from collections.abc import Callable, Iterable

from gotunnel import Stream
from gotunnel_agent.common import http1
from gotunnel_agent.common.http1 import Body, Malformed, Response

from .pages import RETRY
from .request import Request
from .target import TargetFailed
from .work import Work

# Work budget for the chunks of an answer: chunks a second in the long run, and at once. Each
# CHUNK_PAYLOAD bytes permit one more. A stream of server-sent events has about a hundred a second.
# Without it, sixteen endless answers of one-byte chunks slowed every other visit from 5 to 400 ms.
CHUNK_RATE, CHUNK_BURST = 10_000, 5_000
CHUNK_PAYLOAD = 2048


class Http1Target:
    """A target.Target that speaks HTTP/1.1."""

    arrived = b""
    unsent = False
    length: int | None = None
    trailers: Iterable[tuple[str, str]] = ()
    reusable = shareable = False
    _stream: Stream

    def __init__(
        self,
        request: Request,
        fields: list[tuple[str, str]],
        next: Callable[[float | None], bytes],
        timeout: float,
    ):
        """``fields`` are those of the request's head, without its framing. ``next(timeout)``
        returns what ``read`` does, and waits for it as long as makes sense; ``timeout``, which a
        head has, is in seconds."""
        self._request = request
        self._fields = fields
        self._next = next
        self._timeout = timeout
        self._body: Body | None = None  # of the final answer
        self._interim = 0  # bytes of interim heads, of which all together are limited
        # The target's HTTP is sloppy, so the answer's end is not certain either.
        self._loose = False
        self._keeps_alive = self._certain = False

    # The request

    def opening(self, stream: Stream | None) -> bytes:
        if stream is not None:
            self._stream, self.read = stream, stream.read
        request, fields = self._request, self._fields
        if request.wants_upgrade:
            fields = [*fields, ("Connection", "Upgrade")]
        if request.has_body:
            length = request.body_length
            if length is None:
                fields = [*fields, ("Transfer-Encoding", "chunked")]
            else:
                fields = [*fields, ("Content-Length", str(length))]
        return http1.encode_head(f"{request.method} {request.path} HTTP/1.1", fields)

    def carried_by(self, stream: Stream) -> None:
        self._stream, self.read = stream, stream.read

    def framed(self, pieces: list[bytes]) -> bytes:
        # Chunks are encoded anew, not copied: a target that parses a copied frame differently would
        # find another request in it (request smuggling).
        request = self._request
        if request.body_length is not None:
            return b"".join(pieces)
        data = b"".join(map(http1.encode_chunk, pieces))
        return data + http1.encode_last_chunk(request.trailers) if request.body_complete else data

    def send_body(self, pieces: list[bytes], timeout: float) -> None:
        self._stream.write(self.framed(pieces), timeout)

    # The answer

    def read_head(self) -> Response:
        data, seen = self.arrived, 0
        while (end := http1.answer_end(data, seen)) < 0:
            seen = len(data)
            more = self._next(self._timeout)
            if not more:
                text = f"The site broke off in the middle of its answer. {RETRY}"
                raise TargetFailed(502, "no-answer", text)
            data += more
        response = http1.parse_response(data[:end])
        self.arrived = data[end:]
        self._loose |= response.loose
        if response.status >= 200:
            self._await_body(response)
        elif response.status != 101:
            self._interim += end
            if self._interim > http1.HEAD_LIMIT:
                text = f"interim answers of {self._interim} bytes, expected the final one"
                raise Malformed(431, text)
        return response

    def _await_body(self, response: Response) -> None:
        body = self._body = http1.response_body(response, self._request.method)
        if body is not None:
            self.length = body.length
        else:  # of the body that GET would have got; none is sent
            stated = response.fields.get("content-length")
            self.length = None if stated is None else int(stated)
        self._keeps_alive = http1.keeps_alive(response)
        # Some targets send a body where none may be, such as to HEAD. On a kept stream the next
        # visitor would get those bytes as its answer (HTTP desync). And a target that ignores the
        # body of a request would parse it as the next request, and answer that to the next visitor
        # (request smuggling).
        self._certain = body is not None and response.status != 205 and not self._request.has_body

    def pass_body(self, send: Callable[[list[bytes]], None]) -> list[bytes]:
        body, rest = self._body, self.arrived
        pieces: list[bytes] = []
        if body is not None:
            data, chunks = rest, 0
            work: Work | None = None
            if data:
                pieces = body.feed(data)
            while not body.complete:
                units = body.chunks - chunks - len(data) // CHUNK_PAYLOAD
                if units > 0:
                    work = work or Work(CHUNK_RATE, CHUNK_BURST)
                    work.spend(units)
                send(pieces)
                data, chunks = self._next(None), body.chunks
                pieces = []
                if data:
                    pieces = body.feed(data)
                else:
                    body.eof()
            self.trailers, rest = body.trailers, body.rest
            self._loose |= body.loose
        self.reusable = (
            self._keeps_alive
            and not (rest or self._loose)
            and not isinstance(body, http1.UntilCloseBody)
        )
        self.shareable = self.reusable and self._certain
        return pieces

    def reset(self) -> None:
        self._stream.reset()
