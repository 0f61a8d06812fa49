"""Makes Records of the visits that a Follower follows.

The threads of visits call began(), over() and hear(): these note what there is, and wait for
nothing. refresh() tells what has changed of visits that go on; a thread of the inspector calls it.
"""

from __future__ import annotations

import threading
from time import monotonic, time

from ..common.hostnames import WILDCARD
from ..config import Tunnel
from ..dialogue import SWITCHING_PROTOCOLS, Exchange, Hear
from . import websocket
from .content import field
from .event_stream import EventStream
from .kept import Kept
from .record import ENDED, OPEN, SHARE, Message, Record, Ring

MOST_PIECES = 64  # of a body; more are joined, as each is an object
MOST_TARGETS = 1000  # tunnels whose target's text is kept
MOST_ADDRESS = 100  # characters of a visitor's address: IPv6 with a zone, and more than one
FORWARDED = (b"\r\nx-forwarded-for:", b"\r\nx-real-ip:")
EVENT_STREAM = "text/event-stream"
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
        tape = _Tape(self, tunnel, exchange, OPEN)
        self._open[exchange] = tape
        self.ring.add(tape.record)
        return tape.hear if self.body else None

    def over(self, tunnel: Tunnel, exchange: Exchange) -> None:
        tape = self._open.pop(exchange, None)
        if tape is None:  # its request could not be read
            tape = _Tape(self, tunnel, exchange, ENDED)
            tape.end()
            self.ring.add(tape.record)
        else:
            tape.end()
            self.ring.update(tape.record)

    def refresh(self) -> None:
        """Bring the records of visits that go on up to date."""
        for tape in list(self._open.values()):
            if tape.refresh():
                self.ring.update(tape.record)

    def target_of(self, tunnel: Tunnel) -> str:
        found = self._targets.get(id(tunnel))
        if found is None:
            if len(self._targets) >= MOST_TARGETS:
                self._targets.clear()
            found = self._targets[id(tunnel)] = (tunnel, str(tunnel.target))
        return found[1]


class _Tape:
    """Fills a record from its exchange."""

    __slots__ = ("record", "_recorder", "_exchange", "_told", "_lock", "_bodies", "_decided",
                 "_frames", "_events")  # fmt: skip

    def __init__(self, recorder: Recorder, tunnel: Tunnel, exchange: Exchange, state: str):
        self._recorder, self._exchange = recorder, exchange
        hostname = tunnel.hostname
        if hostname.startswith(WILDCARD):
            hostname = exchange.host or hostname
        head = exchange.request_head
        self.record = Record(
            hostname=hostname,
            mode=tunnel.mode,
            target=recorder.target_of(tunnel),
            visitor=visitor_of(head) if head else "",
            began=time() - (monotonic() - exchange.began),
            method=exchange.method,
            path=exchange.target,
            request_head=head,
            problem=exchange.problem,
            state=state,
        )
        self._told = (0, 0, 0, 0)  # see refresh()
        self._lock = threading.Lock()  # guards the bodies, and the record against two refreshes
        self._bodies: tuple[_Beginning, _Beginning] | None = None  # made when something comes
        self._decided = False  # whether there are messages: the answer's head says it
        # Both directions of a WebSocket, the visitor's first; the answer's events.
        self._frames: tuple[websocket.Reader, websocket.Reader] | None = None
        self._events: EventStream | None = None

    def hear(self, answered: bool, data: bytes, now: float) -> None:
        """A piece of a body, or bytes after a change of protocol. Thread of the visit."""
        if not self._decided and self._exchange.status:
            self._decide()
        if self._frames is not None:
            frames = self._frames[answered].feed(data)
            if frames:
                self._keep_frames(answered, frames, now)
            return
        if self._events is not None and answered:
            for event in self._events.feed(data):
                self._keep_message(Message(self._wall(now), False, "event", *event))
        bodies = self._bodies
        if bodies is None:
            bodies = self._bodies = (_Beginning(), _Beginning())
        body = bodies[answered]
        room = self._recorder.body - body.length
        if room <= 0:
            return
        piece = data if len(data) <= room else data[:room]
        with self._lock:
            body.add(piece)
        self._charge(len(piece))

    def _decide(self) -> None:
        """The answer's head has come: are messages to follow?"""
        self._decided = True
        exchange, keep = self._exchange, self._recorder.body
        answer = exchange.response
        fields = answer.fields.items if answer is not None else []
        if exchange.status == SWITCHING_PROTOCOLS:
            if field(fields, "upgrade").lower() == WEBSOCKET:
                values = [v for n, v in fields if n.lower() == "sec-websocket-extensions"]
                agreed = websocket.agreed(",".join(values))
                self._frames = (
                    websocket.Reader(keep, agreed, from_visitor=True),
                    websocket.Reader(keep, agreed),
                )
                self.record.working = sum(reader.memory for reader in self._frames)
                self._charge(self.record.working)
        elif field(fields, "content-type").partition(";")[0].strip().lower() == EVENT_STREAM:
            self._events = EventStream(keep, field(fields, "content-encoding").strip().lower())
            self.record.working = self._events.memory
            self._charge(self.record.working)

    def _keep_frames(self, answered: bool, frames: list[websocket.Read], now: float) -> None:
        at = self._wall(now)
        for frame in frames:
            self._keep_message(Message(at, not answered, *frame))

    def _keep_message(self, message: Message) -> None:
        ring = self._recorder.ring
        self._charge(self.record.add_message(message, ring.budget // SHARE))

    def _charge(self, count: int) -> None:
        """The record takes ``count`` bytes more."""
        if not self._recorder.ring.grow(self.record, count):
            self._exchange.hear = None  # the record is gone: do no more for it

    def _wall(self, now: float) -> float:
        """Wall-clock time. By the beginning, so that a clock that jumps changes no order."""
        return self.record.began + (now - self._exchange.began)

    def refresh(self) -> bool:
        """Bring the record up to date. False if nothing has changed."""
        exchange, record = self._exchange, self.record
        with self._lock:
            told = (
                exchange.status,
                exchange.bytes_in,
                exchange.bytes_out,
                record.dropped + record.message_count,
            )
            if told == self._told and not exchange.over and record.problem == exchange.problem:
                return False
            self._told = told
            if exchange.status and not record.status:
                record.response_head = exchange.response_head
                if exchange.answer_began:
                    record.first_byte = exchange.answer_began - exchange.began
                record.status = exchange.status
            record.interim = exchange.interim
            record.problem = exchange.problem
            bodies = self._bodies
            asked = answered = b""
            if bodies is not None:
                asked, answered = bodies[False].joined(), bodies[True].joined()
            record.request_body = Kept(asked, exchange.bytes_in)
            record.response_body = Kept(answered, exchange.bytes_out)
        return True

    def end(self) -> None:
        """The exchange is over."""
        exchange, record = self._exchange, self.record
        at = self._wall(exchange.over)
        if self._frames is not None:
            for answered, reader in enumerate(self._frames):
                for frame in reader.end():
                    self._keep_message(Message(at, not answered, *frame))
            self._frames = None
        if self._events is not None:
            for event in self._events.end():
                self._keep_message(Message(at, False, "event", *event))
            self._events = None
        self.refresh()
        with self._lock:
            record.working = 0
            record.request_trailers = tuple(exchange.request_trailers)
            record.response_trailers = tuple(exchange.response_trailers)
            record.duration = max(0.0, exchange.over - exchange.began)
            record.state = ENDED


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


def visitor_of(head: bytes) -> str:
    """The visitor's address, as the gateway has written it into a request's head; "" if it has
    not."""
    lower = head.lower()
    for name in FORWARDED:
        at = lower.find(name)
        if at >= 0:
            at += len(name)
            value = head[at : head.find(b"\r\n", at)]
            return value.split(b",", 1)[0].strip()[:MOST_ADDRESS].decode("latin-1")
    return ""
