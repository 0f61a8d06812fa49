"""Passes the visits of another gateway on to the agents here, byte for byte.

    visitor --- other gateway === a peer's stream === this gateway === agent's stream === agent

The peer's stream looks like a data stream to an agent: the data header first, then the visit. The
Passage opens a stream to the agent with a data header of its own, and from then on it copies both
ways: payload, half-close, and resets with their codes. It reads nothing of a visit; what its bytes
mean is between the other gateway and the agent.

*Flow control goes through*: a piece is taken from one stream only when the piece before has gone
into the other one, and only if that has room. So a slow reader stops the sender, and what waits is
in the windows of the two streams.

*Never passed on twice*: only agents of this gateway are looked up. A visit whose hostname none of
them has is refused with GONE, as nothing of it was forwarded, and the other gateway deals with it.

A passage has no thread. A pool's thread works on it when one of its streams has changed
(watched.py), and an idle one costs nothing but memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TypeVar

from gotunnel import (
    READ_SIZE,
    REFUSED,
    BytesLike,
    Ends,
    ProtocolError,
    SessionClosed,
    Stream,
    StreamReset,
    read_data_header,
)
from gotunnel_agent.common import refusals
from gotunnel_agent.common.hostnames import normal_hostname

from ..net.total import Total
from ..routes import AgentBusy, Member, Pool, Registry, Route
from .watched import Job, Submit, Watched

log = logging.getLogger("gotunnel.passage")

T = TypeVar("T")

PIECES = 16  # copied in a row, a MiB at most; then other passages have their turn
FIRST = 8 * 1024  # most bytes of a visit that the agent gets together with its data header
HEADER_TIMEOUT = 10  # seconds for the whole data header; it comes together with the SYN
OPEN_TIMEOUT = 10  # seconds for the agent to accept earlier streams: as agents/tunnel.py has it
OPEN_LOOK = 0.1  # seconds between two tries meanwhile
MOST_TRIES = 4  # members of a pool that one visit is tried with


class Passages:
    """The passages of a gateway, from all its peers. Any thread."""

    def __init__(self, registry: Registry, submit: Submit):
        """``submit(function)`` has a pool's thread call it; no such call waits for a peer."""
        self.registry = registry
        self.submit = submit
        self.total = Total()  # of the passages that were begun
        self._running: set[Passage] = set()  # adding, discarding and copying are atomic
        self._none = threading.Event()  # none was running, after await_last() began

    def begin(self, stream: Stream) -> None:
        """Serve a stream that a peer has opened."""
        passage = Passage(self, stream)
        self._running.add(passage)
        self.total.add()
        passage.start()

    def end(self, passage: Passage) -> None:
        self._running.discard(passage)
        if not self._running:
            self._none.set()

    @property
    def running(self) -> int:
        """How many there are, idle ones included, which the other gateways keep."""
        return len(self._running)

    # The gateway stops: see visitors/port.drain()

    drains = True

    def await_last(self, timeout: float) -> None:
        """Wait until none is left. The peers open no new ones, and have ended the idle ones."""
        self._none.clear()
        if self._running:
            self._none.wait(timeout)

    def reset(self) -> int:
        """End all that are left; returns how many there were."""
        left = [passage for passage in self._running.copy() if passage.reset()]
        return len(left)


class _Incomplete(Exception):
    """More of the data header has to come."""


class _SinkBroke(Exception):
    """A direction's sink takes no more."""


class _Direction:
    """One direction of a passage. ``over``: nothing more is copied, since the source's FIN was
    passed on, or the sink is ``broken``."""

    __slots__ = ("source", "sink", "rest", "moved", "over", "broken")

    def __init__(self, source: Watched, sink: Watched):
        self.source, self.sink = source, sink
        self.rest: BytesLike = b""  # taken, and not put yet; nearly always empty
        self.moved = False  # any byte was taken
        self.over = self.broken = False

    def move(self) -> bool:
        """Copy one piece; whether anything was moved. Raises _SinkBroke; StreamReset and
        SessionClosed if the source broke, and all that came before has been copied."""
        count = len(self.rest)
        if not count:
            # No more is taken than the sink has room for, so that what waits does so in the
            # windows, where it is counted (gotunnel.Memory).
            room = self._of_sink(self.sink.room)
            if not room:
                return False
            data = self.source.take(min(room, READ_SIZE))
            if data is None:
                return False
            if not data:
                self.over = True
                self.sink.stream.finish()
                return True
            self.rest, self.moved = data, True
        self.rest = self._of_sink(partial(self.sink.put, self.rest))
        return not count or len(self.rest) < count

    def _of_sink(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except ConnectionError:
            self.over = self.broken = True
            raise _SinkBroke from None


class Passage:
    """One visit from another gateway. All of it happens in its Job, but for start()."""

    def __init__(self, passages: Passages, stream: Stream):
        self._passages = passages
        self._job = Job(passages.submit, self._work)
        self._stream = stream  # the peer's
        self._peer: Watched  # the same; set by start()
        self._head = b""  # of the stream, as long as the data header is not whole
        self._directions: tuple[_Direction, _Direction] | None = None  # there and back; once open
        self._asked: tuple[str, Ends | None, bool] | None = None  # by the data header
        # Monotonic, for the data header; then for the agent's stream. None: no timer runs yet.
        self._deadline: float | None = None
        # Of a pool: the present member, whose visits count it, and all that were asked.
        self._pool: Pool | None = None
        self._member: Member | None = None
        self._tried: list[Member] = []
        self._over = False

    def start(self) -> None:
        self._peer = Watched(self._stream, self._job.wake)
        self._job.wake()

    def reset(self) -> bool:
        """Reset the peer's stream, and so end the passage. Any thread. False if it is over."""
        self._stream.reset()
        return not self._over

    def _work(self) -> None:
        if self._over:
            return
        try:
            if self._directions is None and not self._open():
                return
            self._copy()
        except Exception:
            self._refuse(refusals.AGENT_GONE.code)
            raise

    # Opening

    def _open(self) -> bool:
        """Open the agent's stream; whether that was done."""
        try:
            while self._asked is None:
                data = self._peer.take()
                if data is None:
                    self._await(HEADER_TIMEOUT, HEADER_TIMEOUT)
                    return False
                if not data:
                    raise ProtocolError("the stream ended within its data header")
                self._head += data
                self._read_header()
        except (OSError, ProtocolError) as error:  # the visitor has left, most likely
            log.debug("stream %d of a peer is dropped: %s", self._stream.id, error)
            self._refuse(0)
            return False
        return self._open_to(*self._asked)

    def _read_header(self) -> None:
        """Take the data header off the head, if it is whole. Raises ProtocolError."""
        at = 0

        def read_exactly(count: int) -> bytes:
            nonlocal at
            at += count
            if at > len(self._head):
                raise _Incomplete
            return self._head[at - count : at]

        try:
            self._asked = read_data_header(read_exactly)
        except _Incomplete:
            return
        self._head = self._head[at:]
        self._deadline = None

    def _open_to(self, hostname: str, ends: Ends | None, relayed: bool) -> bool:
        failed: tuple[Route, OSError] | None = None
        while True:
            route = self._route(hostname, ends)
            if route is None and failed is not None:  # all members of the pool were tried
                self._fail(*failed)
                return False
            if route is None or route.addressed and ends is None:
                log.debug("a peer's visit to %.253r is refused: no agent here serves it", hostname)
                self._refuse(refusals.GONE.code)
                return False
            if route.is_unwell():
                self._refuse(refusals.UNHEALTHY.code)
                return False
            try:
                self._open_stream(route, ends, relayed)
                return True
            except OSError as error:
                failed = route, error
                if self._member is None or len(self._tried) >= MOST_TRIES:
                    self._fail(*failed)
                    return False

    def _open_stream(self, route: Route, ends: Ends | None, relayed: bool) -> None:
        """Raises OSError."""
        first, relayed = self._head[:FIRST], relayed and route.tunnel.upgrades
        stream = route.tunnel.open(route, lambda: ends or NOBODY, first, relayed, timeout=0)
        agent = Watched(stream, self._job.wake)
        there, back = _Direction(self._peer, agent), _Direction(agent, self._peer)
        there.rest, self._head = self._head[FIRST:], b""
        self._directions = there, back

    def _fail(self, route: Route, error: OSError) -> None:
        """There is no agent's stream: refuse the visit, or try again later."""
        if isinstance(error, AgentBusy):
            log.info("%s: a peer's visit is refused: %s", route.hostname, error)
            self._refuse(refusals.AGENT_LIMIT.code)
        elif isinstance(error, TimeoutError):
            try:
                self._tried.clear()
                self._await(OPEN_TIMEOUT, OPEN_LOOK)
            except TimeoutError:
                self._refuse(refusals.AGENT_BUSY.code)
        else:  # if the session has ended before, nothing was sent
            gone = isinstance(error, SessionClosed)
            self._refuse((refusals.GONE if gone else refusals.AGENT_GONE).code)

    def _route(self, hostname: str, ends: Ends | None) -> Route | None:
        """The route to an agent here, never one to another gateway; of a pool the next member's,
        None if all were tried."""
        route = self._passages.registry.held().get(normal_hostname(hostname))
        if route is None or route.pool is None:
            return route
        self._leave_pool()
        key = route.pool.key("" if ends is None else ends.visitor[0])
        member = route.pool.choose(key, self._tried)
        if member is None:
            return None
        self._pool, self._member = route.pool, member
        self._tried.append(member)
        return member.route

    def _leave_pool(self) -> None:
        if self._pool is not None:
            self._pool.leave(self._member)
            self._pool = self._member = None

    def _await(self, timeout: float, look: float) -> None:
        """Have the job done again in ``look`` seconds. Raises TimeoutError ``timeout`` seconds
        after the first such call."""
        now = monotonic()
        if self._deadline is None:
            self._deadline = now + timeout
        elif now >= self._deadline:
            raise TimeoutError("no data header came in time")
        elif look == timeout:  # the timer of the first call runs
            return
        self._stream.session.call_later(look, self._job.wake)

    # Copying

    def _copy(self) -> None:
        if self._directions is None:
            return
        there, back = self._directions
        for _ in range(PIECES):
            before = back.moved
            moved = self._move(there, self._lose_visitor) | self._move(back, self._lose_agent)
            if self._over:
                return
            if self._pool is not None and back.moved and not before:
                self._pool.reached(self._member)
            if there.over and back.over:
                if there.broken or back.broken:  # else both FINs were passed on
                    self._cut()
                return self._end()
            if not moved:
                break
        else:
            self._job.wake()
            return
        if self._stream.is_dead:
            # The visitor is gone: what the agent's window does not permit yet is dropped.
            self._cut()
            self._end()

    def _move(self, direction: _Direction, lose: Callable[[OSError], None]) -> bool:
        if direction.over or self._over:
            return False
        try:
            return direction.move()
        except _SinkBroke:  # that end's own direction says why, when all that came is copied
            return True
        except (StreamReset, SessionClosed) as error:
            lose(error)
            return True

    def _lose_visitor(self, error: OSError) -> None:
        """The other gateway has reset the stream, or is gone: the agent gets what came before."""
        self._cut()
        self._end()

    def _lose_agent(self, error: OSError) -> None:
        """The agent has reset its stream, or is gone."""
        if self._directions is not None and self._directions[1].moved:
            self._cut()  # the peer's stream too, after what was passed back
        else:
            code = _code_of(error)
            if self._pool is not None and code not in (0, refusals.AGENT_GONE.code):
                self._pool.refused(self._member)
            self._stream.reset(code=code)
        self._end()

    def _cut(self) -> None:
        """End both streams by a reset, after what was put into them."""
        self._stream.cut()
        if self._directions is not None:
            self._directions[0].sink.stream.cut()

    # The end

    def _refuse(self, code: int) -> None:
        self._stream.reset(code=code)
        if self._directions is not None:
            self._directions[0].sink.stream.reset()
        self._end()

    def _end(self) -> None:
        self._over = True
        self._directions = None
        self._leave_pool()
        self._job.end()
        self._passages.end(self)


def _code_of(error: OSError) -> int:
    """What the other gateway is told of an agent that has sent nothing."""
    if not isinstance(error, StreamReset):
        return refusals.AGENT_GONE.code
    return error.code if error.code == REFUSED or error.code in refusals.BY_CODE else 0


NOBODY = Ends(("0.0.0.0", 0), ("0.0.0.0", 0))  # is not used: only addressed routes ask for Ends
