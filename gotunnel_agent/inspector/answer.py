"""Reads the answer to a replayed request from its bytes, as leniently as a target's answers are
read (common/http1.py), and keeps the beginning of its body.

Pure: no socket, no clock, no thread.
"""

from __future__ import annotations

from ..common.http1 import Body, Fields, Malformed, answer_end, parse_response, response_body
from .event_stream import Event, EventStream

SWITCHING_PROTOCOLS = 101
EVENT_STREAM = "text/event-stream"
# Interim answers (1xx) before the final one. A target may send some progress (102, 103); a thousand
# is a target that will never answer.
MOST_INTERIM = 1000
# Steps in which the events of one answer are read, see kept.py.
MOST_STEPS = 100_000
KEPT_INTERIM = 10  # of their heads


class Answer:
    """One answer, as far as it has come.

    ``head`` are the bytes of the final answer's head, b"" before it is whole; ``status`` is 0 then.
    ``interim`` are the heads of the first 1xx answers, ``trailers`` came behind the body.
    ``kept`` is the beginning of the body, up to ``limit`` bytes, and ``size`` counts all of it.
    ``events`` are those of an event stream that the caller has not taken yet. ``over``: the answer
    is whole, and what follows does not belong to it.
    """

    def __init__(self, method: str, limit: int):
        self.head = b""
        self.status = 0
        self.size = 0
        self.over = False
        self.events: list[Event] = []
        self.interim: tuple[bytes, ...] = ()
        self.trailers: tuple[tuple[str, str], ...] = ()
        self._method, self._limit = method, limit
        self._kept = bytearray()
        self._held = bytearray()  # a head that is not whole
        self._body: Body | None = None
        self._stream: EventStream | None = None
        self._interim = 0

    @property
    def kept(self) -> bytes:
        return bytes(self._kept)

    def feed(self, data: bytes) -> None:
        """Take what has come. Raises Malformed."""
        while data and not self.over:
            if self._body is not None:
                self._take(self._body, data)
                return
            searched = len(self._held)
            self._held += data
            end = answer_end(self._held, searched)
            if end < 0:
                return
            head, data = bytes(self._held[:end]), bytes(self._held[end:])
            self._held.clear()
            self._read_head(head)

    def eof(self) -> None:
        """The target has closed its side. Raises Malformed if the answer is not whole."""
        if self.over:
            return
        if self._body is None:
            raise Malformed(400, "the head was cut short" if self._held else "no answer")
        self._body.eof()
        self._end()

    def _read_head(self, head: bytes) -> None:
        response = parse_response(head)
        status = response.status
        if status == SWITCHING_PROTOCOLS:
            raise Malformed(400, "status 101, which the request did not ask for")
        if status < 200:
            self._interim += 1
            if self._interim > MOST_INTERIM:
                raise Malformed(400, f"over {MOST_INTERIM} interim answers, expected a final one")
            if len(self.interim) < KEPT_INTERIM:
                self.interim += (head,)
            return
        self.head, self.status = head, status
        self._body = response_body(response, self._method)
        self._stream = _stream_of(response.fields, self._limit)
        self.over = self._body is None or self._body.complete

    def _take(self, body: Body, data: bytes) -> None:
        for piece in body.feed(data):
            self.size += len(piece)
            room = self._limit - len(self._kept)
            if room > 0:
                self._kept += piece[:room]
            if self._stream is not None:
                left = MOST_STEPS - self._stream.steps
                self.events += self._stream.feed(piece, max(0, left))
        if body.complete:
            self.trailers = tuple(body.trailers)
            self._end()

    def _end(self) -> None:
        self.over = True
        if self._stream is not None:
            self.events += self._stream.end()


def _stream_of(fields: Fields, limit: int) -> EventStream | None:
    media = (fields.get("content-type") or "").partition(";")[0].strip().lower()
    if media != EVENT_STREAM:
        return None
    return EventStream(limit, (fields.get("content-encoding") or "").strip().lower())
