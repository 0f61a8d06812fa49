"""One thread that reads all HTTP/2 connections, as a session's demultiplexer reads all its streams.

A connection carries many requests, and each has a thread (one of WORKERS) while it is served. None
of them can be the reader: it may wait for its target, while the visitor grants another stream more
window, or cancels it. A reader for each connection would hold a thread for every open server-sent
event stream. So this one thread reads from those that are readable, and never waits for a visitor,
a target or a place: it puts what came where the request's thread finds it. It cannot deadlock, and
an idle connection costs a descriptor and some memory.

Addresses take turns, one read each; a connection over its budget (http2_screen.py) is not read for
a while.
"""

import logging
import selectors
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic, sleep
from typing import Protocol

from gotunnel import Waker, spawn
from gotunnel_agent.common.addresses import counted_by
from gotunnel_agent.common.duplex import Duplex

from ..net.listener import Address
from ..net.round_robin import RoundRobin

log = logging.getLogger("gotunnel.http2_reader")

SWEEP = 1.0  # seconds between two checks of deadlines, which need not be met exactly
TURNS = 32  # reads before the selector is asked again, so that new input gets its turn soon
PAUSE = 0.2  # seconds without reading after a bug: its cause may still be there


class Connection(Protocol):
    """What the reader can watch; compared by identity. All methods are called by its thread."""

    duplex: Duplex

    @property
    def wants_to_write(self) -> bool:
        """Whether the kernel did not take all bytes: turn() is called once it has room, too."""

    @property
    def address(self) -> Address:
        """The visitor's address."""

    def turn(self, now: float) -> float | None:
        """Read once. Returns for how many seconds not to read, None if the connection is over: then
        forget it."""

    def look(self, now: float) -> bool:
        """Check deadlines. False as turn()'s None."""

    def drain(self) -> None:
        """The gateway stops: take no further requests."""

    def close_when_left(self) -> None:
        """The reader has forgotten the connection: close it once no other thread uses it."""

    def break_off(self) -> None:
        """The reader has stopped: break the connection."""


class Reader:
    """The thread, and the connections that it reads. Any thread may call the public methods."""

    # Made together with the thread: a gateway that is never started, or that no visitor asks for
    # HTTP/2, needs no descriptors for it.
    _selector: selectors.BaseSelector
    _waker: Waker

    def __init__(self) -> None:
        self._calls: deque[Callable[[], object]] = deque()  # for the thread; appended by others
        self._lock = threading.Lock()  # guards _thread and _over
        self._thread: threading.Thread | None = None  # started with the first connection
        self._over = False
        # Of the thread alone: connections with the events that they are registered for (0: none),
        # those that are paused and until when (monotonic), those that wait for their turn.
        self._known: dict[Connection, int] = {}
        self._paused: dict[Connection, float] = {}
        self._turns = RoundRobin()
        self._queued: set[Connection] = set()
        self._draining = False
        self._last_sweep = 0.0

    def add(self, connection: Connection) -> None:
        """Read this connection from now on. Raises NoThread; OSError if the reader has stopped."""
        with self._lock:
            if self._over:
                raise ConnectionAbortedError("the gateway stops")
            if self._thread is None:
                self._start()
        self._call(partial(self._take_in, connection))

    def _start(self) -> None:
        """Caller holds the lock. Raises NoThread."""
        self._selector, self._waker = selectors.DefaultSelector(), Waker()
        self._selector.register(self._waker, selectors.EVENT_READ)
        try:
            self._thread = spawn("http2 reader", self._run)
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        self._selector.close()
        self._waker.close()

    def wake(self, connection: Connection) -> None:
        """Give a connection a turn: it has something to write, or to end."""
        self._call(partial(self._queue, connection))

    def drain(self) -> None:
        """The gateway stops: tell all visitors to send no further requests."""
        self._call(self._drain)

    def stop(self, timeout: float) -> None:
        """Break off all connections, and end the thread."""
        with self._lock:
            self._over = True
            thread = self._thread
        if thread is not None:
            self._waker.wake()
            thread.join(timeout)
            if not thread.is_alive():
                self._close()

    def _call(self, function: Callable[[], object]) -> None:
        self._calls.append(function)
        if self._thread is not None:  # otherwise it looks by itself when it is started
            self._waker.wake()

    # The thread

    def _run(self) -> None:
        while not self._over:
            try:
                self._round()
            except Exception:
                log.exception("an unexpected error (bug, traceback follows); HTTP/2 goes on")
                sleep(PAUSE)
        for connection in list(self._known):
            self._forget(connection)
            connection.break_off()

    def _round(self) -> None:
        for key, _ in self._selector.select(self._patience()):
            if key.data is None:
                self._waker.clear()
            else:
                self._queue(key.data)
        while self._calls:
            self._calls.popleft()()
        now = monotonic()
        for _ in range(TURNS):
            if not self._turns:
                break
            connection = self._turns.pop()
            self._queued.discard(connection)
            if connection in self._known:
                self._turn(connection, now)
        for connection in [c for c, until in self._paused.items() if until <= now]:
            del self._paused[connection]
            self._queue(connection)  # TLS may hold bytes, which the selector cannot see
        if now - self._last_sweep >= SWEEP:
            self._last_sweep = now
            for connection in list(self._known):
                if not connection.look(now):
                    self._forget(connection)

    def _patience(self) -> float:
        if self._turns:
            return 0
        if self._paused:
            return max(0.0, min(SWEEP, min(self._paused.values()) - monotonic()))
        return SWEEP if self._known else 60 * SWEEP

    def _take_in(self, connection: Connection) -> None:
        self._known[connection] = 0
        self._watch(connection)
        if self._draining:
            connection.drain()
        self._queue(connection)  # bytes may have come together with the handshake's last

    def _queue(self, connection: Connection) -> None:
        if connection in self._known and connection not in self._queued:
            self._queued.add(connection)
            self._turns.put((counted_by(connection.address[0]),), connection)

    def _turn(self, connection: Connection, now: float) -> None:
        try:
            pause = connection.turn(now)
        except Exception:
            log.exception("visitor at %s: its connection is reset (bug, traceback follows)",
                          connection.address[0])  # fmt: skip
            connection.break_off()
            pause = None
        if pause is None:
            self._forget(connection)
        elif pause > 0:
            self._unwatch(connection)
            self._paused[connection] = now + pause
        else:
            self._watch(connection)
            if connection.duplex.pending:  # the selector cannot see bytes that TLS holds
                self._queue(connection)

    def _watch(self, connection: Connection) -> None:
        """Register the connection for the events that it waits for now."""
        if connection in self._paused:
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE * connection.wants_to_write)
        known = self._known[connection]
        try:
            if not known:
                self._selector.register(connection.duplex, wanted, connection)
            elif known != wanted:
                self._selector.modify(connection.duplex, wanted, connection)
        except (OSError, ValueError, KeyError):  # closed: its next turn finds out
            self._queue(connection)
        else:
            self._known[connection] = wanted

    def _unwatch(self, connection: Connection) -> None:
        if self._known[connection]:
            self._known[connection] = 0
            self._selector.unregister(connection.duplex)

    def _forget(self, connection: Connection) -> None:
        """Before its descriptor is closed: see Connection.turn()."""
        if connection in self._known:
            self._unwatch(connection)
            del self._known[connection]
            self._paused.pop(connection, None)
            connection.close_when_left()

    def _drain(self) -> None:
        self._draining = True
        for connection in list(self._known):
            connection.drain()
            self._queue(connection)
