"""A visit in tcp mode to a pool: to one of its agents, or to another one if the first cannot serve.

Another agent gets the visit in these cases:

    it opens no stream                 the agent has left, or 256 streams wait for it
    its target is not there            the agent refuses the stream. What the visitor has sent so
                                       far is kept, RESEND bytes at most, and sent again: no target
                                       has got any of it
    its link is silent                 if the visitor has sent nothing yet (silence.py)

From the target's first byte on, the visit stays where it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from gotunnel import SessionClosed, Stream

from ..routes import AgentBusy, Member, Pool, Route
from .pooled import MOST_TRIES, RESEND
from .relays import Party, carry, refuse
from .silence import LOOK, Silence, gives_sign

log = logging.getLogger("gotunnel.pooled_relay")


def relay_tcp(visitor: Party, route: Route) -> None:
    """As relays' function of that name, for a route with a pool."""
    if route.pool is None:
        raise ValueError("a route without a pool")
    line = PooledLine(visitor, route.pool)
    try:
        try:
            line.open()
        except OSError as error:
            refuse(visitor, route, error)
            raise
        carry(visitor, line.route, line if line.may_move else line.stream)
    finally:
        line.end()


class PooledLine:
    """The agent's end of a relay, as a Stream is for other visits.

    A relay has two threads: one writes, one reads. Whichever of them finds that the stream was
    refused opens the next one, while the other waits for the lock.
    """

    stream: Stream  # set by open(), as is route
    route: Route  # of the present member
    write: Callable[[bytes], None]
    read: Callable[[], bytes]

    def __init__(self, visitor: Party, pool: Pool):
        self._visitor = visitor
        self._pool = pool
        self._key = pool.key(visitor.address[0])
        self._tried: list[Member] = []
        self._holds_member = False
        # Guards stream, and all below. Held while the visit moves, so the one thread waits for the
        # other; no other visit does.
        self._lock = threading.Lock()
        self._kept: list[bytes] = []  # what the visitor has sent, while may_move
        self._size = 0  # bytes in it
        self._finished = False
        self.may_move = True  # another member may still get the visit
        self.write, self.read = self._write, self._read

    def open(self) -> None:
        """Open a stream of the next member that opens one. Raises OSError. Caller holds the lock,
        or is the only thread."""
        failure: OSError = SessionClosed("no agent of the pool takes visits")
        while len(self._tried) < MOST_TRIES:
            self.leave()
            member = self._pool.choose(self._key, self._tried)
            if member is None:
                break
            self._holds_member = True
            self._tried.append(member)
            route = self.route = member.route
            if self._visitor.visit is not None:
                self._visitor.visit.route = route
            try:
                if self._has_choice() and not gives_sign(route.tunnel):
                    self._pool.silent(member)
                    continue
                self.stream = route.tunnel.open(route, self._visitor.ends)
            except AgentBusy:
                raise  # the limit is that of all members together
            except OSError as error:
                failure = error.with_traceback(None)
                continue
            self.may_move = self.may_move and route.tunnel.half_close
            self._silence = Silence(route.tunnel)
            return
        try:
            raise failure
        finally:
            del failure  # else a reference cycle with this frame, which holds the visitor

    def end(self) -> None:
        """The visit is over."""
        self.leave()
        del self.write, self.read  # a reference cycle, which holds the visitor

    def leave(self) -> None:
        """The visit is over, or moves."""
        if self._holds_member:
            self._holds_member = False
            self._pool.leave(self._tried[-1])

    def _has_choice(self) -> bool:
        return any(member.is_ready and member not in self._tried for member in self._pool.members)

    def _move(self, stream: Stream) -> bool:
        """Open the next member's stream in place of this one, if another thread has not; False if
        the visit must stay. Caller holds the lock."""
        if self.stream is not stream:
            return True
        if not self.may_move:
            return False
        member = self._tried[-1]
        if stream.refused:
            self._pool.refused(member)
            member.route.tunnel.count_failed(member.route)
        try:
            self.open()
            for data in self._kept:
                self.stream.write(data)
            if self._finished:
                self.stream.finish()
        except OSError as error:
            log.debug("%s: no other agent takes the visit: %s", self.route.hostname, error)
            self.may_move = False
            return False
        stream.reset()
        if self._visitor.visit is not None:
            self._visitor.visit.stream = self.stream.id
        return True

    def _stay(self) -> None:
        """The visit stays where it is. Caller holds the lock."""
        self.may_move = False
        self._kept.clear()
        self.write, self.read = self.stream.write, self.stream.read
        # As relay() has it of a Stream: the thread that reads from the visitor must not wait on.
        self.stream.on_death(self._visitor.duplex.stop_reading)

    # As the end of a relay

    @property
    def id(self) -> int:
        return self.stream.id

    @property
    def refused(self) -> bool:
        return self.stream.refused

    def _write(self, data: bytes) -> None:
        with self._lock:
            stream = self.stream
            self._size += len(data)
            if self._size <= RESEND:
                self._kept.append(data)
            elif self.may_move:
                self._stay()
        try:
            stream.write(data)
        except ConnectionError:
            with self._lock:
                if not (stream.refused and self._move(stream)):
                    raise

    def _read(self) -> bytes:
        while True:
            stream = self.stream
            try:
                data = stream.read(timeout=LOOK)
            except TimeoutError:
                self._look(stream)
                continue
            except ConnectionError:
                with self._lock:
                    if stream.refused and self._move(stream):
                        continue
                self._visitor.duplex.stop_reading()
                raise
            with self._lock:
                if self.may_move:
                    self._stay()
            self._pool.reached(self._tried[-1])
            return data

    def _look(self, stream: Stream) -> None:
        """Reading thread: nothing has come for a while."""
        if not self._silence.is_long():
            return
        self._pool.silent(self._tried[-1])
        with self._lock:
            if self.may_move and not self._size and self._has_choice():
                self._move(stream)

    def finish(self) -> None:
        with self._lock:
            self._finished = True
            self.stream.finish()

    def cut(self) -> None:
        self.stream.cut()

    def reset(self) -> None:
        self.stream.reset()

    def stop_reading(self) -> None:
        self.stream.reset()

    def close(self) -> None:
        self.stream.close()
