"""Makes Records of the visits that a Follower follows.

The threads of visits call began(), over() and hear(): these note what there is, and wait for
nothing. refresh() tells what has changed of visits that go on; a thread of the inspector calls it.
"""

from __future__ import annotations

import threading
from time import monotonic, time
from typing import Protocol, TypeVar

from ..common.hostnames import WILDCARD
from ..config import Tunnel
from ..dialogue import SWITCHING_PROTOCOLS, Exchange, Hear
from . import websocket
from .content import field
from .event_stream import Event, EventStream
from .kept import Kept
from .record import ENDED, OPEN, SHARE, Message, Record, Ring

# Bytes of a body that a visit may have before it is in the ring, and so counted: a record is made
# once, at the visit's end or when a look finds it, if it is no larger.
SMALL = 4096
# Bytes by which the memory for a message that has not ended must change to be counted anew.
LEAST_WORK = 1024
# Steps in which messages of a visit are read (kept.py): so many a second, and at once. Few programs
# send as many messages, and the latest thousand are kept.
STEP_RATE, MOST_STEPS = 2000, 8000
MOST_PIECES = 64  # of a body; more are joined, as each is an object
MOST_TARGETS = 1000  # tunnels whose target's text is kept
MOST_ADDRESS = 100  # characters of a visitor's address: IPv6 with a zone, and more than one
USUALLY = b"\r\nX-Forwarded-For:"  # as our gateway spells it
FORWARDED = (b"\r\nx-forwarded-for:", b"\r\nx-real-ip:")
EVENT_STREAM = b"text/event-stream"
WEBSOCKET = "websocket"


class Recorder:
    """A follow.Listener that keeps all visits in a ring. Any thread may call any method."""

    def __init__(self, ring: Ring, body: int):
        """``body``: bytes of each body, and of each message, that are kept; 0: heads alone."""
        self.ring = ring
        self.body = body
        # Visits that go on. One step of the interpreter adds or removes one, so no lock guards it.
        self._open: dict[Exchange, _Tape] = {}
        # By the id() of a tunnel, with the tunnel itself, so that no other gets that id.
        self._targets: dict[int, tuple[Tunnel, str]] = {}

    def began(self, tunnel: Tunnel, exchange: Exchange) -> Hear | None:
        tape = self._open[exchange] = _Tape(self, tunnel, exchange)
        return tape.hear if self.body else None

    def over(self, tunnel: Tunnel, exchange: Exchange) -> None:
        tape = self._open.pop(exchange, None) or _Tape(self, tunnel, exchange)
        tape.end()

    def refresh(self) -> None:
        """Bring the records of visits that go on up to date."""
        for tape in list(self._open.values()):
            tape.refresh()

    def target_of(self, tunnel: Tunnel) -> str:
        found = self._targets.get(id(tunnel))
        if found is None:
            if len(self._targets) >= MOST_TARGETS:
                self._targets.clear()
            found = self._targets[id(tunnel)] = (tunnel, str(tunnel.target))
        return found[1]


T = TypeVar("T")


class _Reader(Protocol[T]):
    """A websocket.Reader or an EventStream."""

    @property
    def steps(self) -> int: ...
    def feed(self, data: bytes, most: int) -> list[T]: ...


class _Tape:
    """Makes a record of an exchange. Most visits are over soon: their record is made then, whole.
    Others get one when refresh() sees them, or when they take memory."""

    __slots__ = (
        "_record", "_recorder", "_tunnel", "_exchange", "_told", "_lock", "_asked", "_answered",
        "_decided", "_frames", "_events", "_steps", "_counted_at",
    )  # fmt: skip

    def __init__(self, recorder: Recorder, tunnel: Tunnel, exchange: Exchange):
        self._recorder, self._tunnel, self._exchange = recorder, tunnel, exchange
        self._lock = threading.Lock()  # guards all below, but for the messages
        self._record: Record | None = None
        self._told: tuple[object, ...] = ()  # see refresh()
        self._asked: _Beginning | None = None  # bodies, made when something comes
        self._answered: _Beginning | None = None
        # The thread of the visit uses these alone.
        self._decided = False  # whether there are messages: the answer's head says it
        # Both directions of a WebSocket, the visitor's first; the answer's events.
        self._frames: tuple[websocket.Reader, websocket.Reader] | None = None
        self._events: EventStream | None = None
        self._steps, self._counted_at = float(MOST_STEPS), 0.0  # that are left, since when

    def hear(self, answered: bool, data: bytes, now: float) -> None:
        """A piece of a body, or bytes after a change of protocol. Thread of the visit."""
        if not self._decided and self._exchange.status:
            self._decide()
        if self._frames is not None:
            if frames := self._feed(self._frames[answered], data, now):
                self._keep_frames(answered, frames, now)
            self._work(self._frames[False].memory + self._frames[True].memory)
            return
        if self._events is not None and answered:
            if events := self._feed(self._events, data, now):
                self._keep_events(events, now)
            self._work(self._events.memory)
        body = self._answered if answered else self._asked
        if body is None:
            body = _Beginning()
            with self._lock:
                if answered:
                    self._answered = body
                else:
                    self._asked = body
        room = self._recorder.body - body.length
        if room <= 0:
            return
        piece = data if len(data) <= room else data[:room]
        with self._lock:
            body.add(piece)
            record = self._record
        if record is not None:
            self._charge(record, len(piece))
        elif body.length > SMALL:
            self._opened()

    def _feed(self, reader: _Reader[T], data: bytes, now: float) -> list[T]:
        """Read messages, within the steps that the visit has (a token bucket)."""
        before = reader.steps
        more = max(0.0, now - self._counted_at) * STEP_RATE
        left = min(self._steps + more, MOST_STEPS)
        found = reader.feed(data, max(0, int(left)))
        self._steps, self._counted_at = left - (reader.steps - before), now
        return found

    def _decide(self) -> None:
        """The answer's head has come: are messages to follow?"""
        self._decided = True
        exchange = self._exchange
        if exchange.status == SWITCHING_PROTOCOLS:
            self._read_frames(exchange)
        # A look that costs little, as most answers are no streams; the parser decides.
        elif EVENT_STREAM in exchange.response_head.lower():
            self._read_events(exchange)

    def _read_frames(self, exchange: Exchange) -> None:
        fields = _fields(exchange)
        if field(fields, "upgrade").strip().lower() != WEBSOCKET:
            return
        values = [value for name, value in fields if name.lower() == "sec-websocket-extensions"]
        agreed, keep = websocket.agreed(",".join(values)), self._recorder.body
        self._frames = (
            websocket.Reader(keep, agreed, from_visitor=True),
            websocket.Reader(keep, agreed),
        )

    def _read_events(self, exchange: Exchange) -> None:
        fields = _fields(exchange)
        media = field(fields, "content-type").partition(";")[0].strip().lower()
        if media.encode("latin-1") == EVENT_STREAM:
            coding = field(fields, "content-encoding").strip().lower()
            self._events = EventStream(self._recorder.body, coding)

    def _work(self, memory: int) -> None:
        """Reading messages takes that much memory now."""
        record = self._record or self._opened()
        more = memory - record.working
        if abs(more) >= LEAST_WORK:
            record.working = memory
            self._charge(record, more)

    def _keep_frames(self, answered: bool, frames: list[websocket.Read], now: float) -> None:
        record = self._opened()
        at = self._wall(record, now)
        for frame in frames:
            self._keep_message(record, Message(at, not answered, *frame))

    def _keep_events(self, events: list[Event], now: float) -> None:
        record = self._opened()
        at = self._wall(record, now)
        for event in events:
            self._keep_message(record, Message(at, False, "event", *event))

    def _keep_message(self, record: Record, message: Message) -> None:
        self._charge(record, record.add_message(message, self._recorder.ring.budget // SHARE))

    def _charge(self, record: Record, count: int) -> None:
        """The record takes ``count`` bytes more."""
        if not self._recorder.ring.grow(record, count):
            self._exchange.hear = None  # the record is gone: do no more for it

    def _wall(self, record: Record, now: float) -> float:
        """Wall-clock time. By the beginning, so that a clock that jumps changes no order."""
        return record.began + (now - self._exchange.began)

    def _made(self, state: str) -> Record:
        """A new record, with what there is so far. Caller holds the lock."""
        exchange, tunnel = self._exchange, self._tunnel
        hostname = tunnel.hostname
        if hostname.startswith(WILDCARD):
            hostname = exchange.host or hostname
        head = exchange.request_head
        self._record = record = Record(
            hostname=hostname,
            mode=tunnel.mode,
            target=self._recorder.target_of(tunnel),
            visitor=visitor_of(head) if head else "",
            began=time() - (monotonic() - exchange.began),
            method=exchange.method,
            path=exchange.target,
            request_head=head,
            state=state,
        )
        return record

    def _fill(self, record: Record) -> None:
        """Caller holds the lock."""
        exchange, asked, answered = self._exchange, self._asked, self._answered
        if exchange.status and not record.status:
            record.response_head = exchange.response_head
            if exchange.answer_began:
                record.first_byte = exchange.answer_began - exchange.began
            record.status = exchange.status
        record.interim = exchange.interim
        record.problem = exchange.problem
        if exchange.bytes_in:
            record.request_body = Kept(b"" if asked is None else asked.joined(), exchange.bytes_in)
        if exchange.bytes_out:
            record.response_body = Kept(
                b"" if answered is None else answered.joined(), exchange.bytes_out
            )

    def _opened(self) -> Record:
        """The record, which is in the ring from now on. Any thread."""
        with self._lock:
            if self._record is not None:
                return self._record
            record = self._made(OPEN)
            self._fill(record)
            # With the lock: what comes is charged to a record that the ring has.
            self._recorder.ring.add(record)
        return record

    def refresh(self) -> None:
        """Tell what has changed."""
        exchange, record = self._exchange, self._record
        is_new = record is None
        if record is None:
            record = self._opened()
        told = (
            exchange.status, exchange.bytes_in, exchange.bytes_out, exchange.problem,
            record.dropped + record.message_count,
        )  # fmt: skip
        is_told = is_new or told == self._told
        self._told = told
        if is_told:
            return
        with self._lock:
            if record.state == ENDED:  # meanwhile, by the thread of the visit
                return
            self._fill(record)
        self._recorder.ring.update(record)

    def end(self) -> None:
        """The exchange is over."""
        exchange = self._exchange
        if self._frames is not None:
            for answered, reader in enumerate(self._frames):
                self._keep_frames(bool(answered), reader.end(), exchange.over)
        if self._events is not None:
            self._keep_events(self._events.end(), exchange.over)
        with self._lock:
            record = self._record
            is_new = record is None
            if record is None:
                record = self._made(ENDED)
            self._fill(record)
            if exchange.request_trailers or exchange.response_trailers:
                record.request_trailers = tuple(exchange.request_trailers)
                record.response_trailers = tuple(exchange.response_trailers)
            record.working = 0
            record.duration = max(0.0, exchange.over - exchange.began)
            record.state = ENDED
        if is_new:
            self._recorder.ring.add(record)
        else:
            self._recorder.ring.update(record)


class _Beginning:
    """The beginning of a body, in the pieces in which it has come."""

    __slots__ = ("length", "_pieces")

    def __init__(self) -> None:
        self.length = 0
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        self.length += len(piece)
        self._pieces.append(piece)
        if len(self._pieces) > MOST_PIECES:
            self.joined()

    def joined(self) -> bytes:
        if len(self._pieces) > 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0] if self._pieces else b""


def _fields(exchange: Exchange) -> list[tuple[str, str]]:
    """Those of the answer's head."""
    answer = exchange.response
    return [] if answer is None else answer.fields.items


def visitor_of(head: bytes) -> str:
    """The visitor's address, as the gateway has written it into a request's head; "" if it has
    not."""
    at = head.find(USUALLY)
    if at >= 0:
        at += len(USUALLY)
    else:
        lower = head.lower()
        for name in FORWARDED:
            at = lower.find(name)
            if at >= 0:
                at += len(name)
                break
        else:
            return ""
    value = str(head[at : head.find(b"\r\n", at)], "latin-1")
    if "," in value:
        value = value.partition(",")[0]
    return value.strip()[:MOST_ADDRESS]
