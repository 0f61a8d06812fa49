"""One selector thread a port: accepts connections, limits them, watches idle ones, and hands those
with input to workers.

Waiting costs no worker here. A connection that waits for its peer is *parked* with its port's
listener. When the peer sends something, or the time is up, the listener hands the connection to a
worker, which does what can be done now and then parks it again or closes it. A connection needs no
lock, since it has one owner at a time: the listener's selector, one worker, or the list of
call_later().

Any thread may call park(), await_more(), call_later(), stop_accepting(), moves() and stop(). What
another thread parks is watched at once, while the listener's thread waits (readable.py). Everything
else happens in the listener's thread. One lock guards the state that it shares with other threads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import resource
import socket
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from time import monotonic
from typing import Any, Protocol

from gotunnel import NoThread, Waker, call_logged, spawn
from gotunnel_agent.common.addresses import counted_by, unmapped_host
from gotunnel_agent.common.duplex import Duplex, tune
from gotunnel_agent.common.process import Stopped

from .drops import BAD_TOKENS, Dropped, Drops
from .inherited import NOTHING, Inherited
from .readable import Readable
from .round_robin import FairWorkers
from .shares import Places, Seat

log = logging.getLogger("gotunnel.listener")

BACKLOG = 1024  # connections that the kernel queues until they are accepted
# Interval of the check of deadlines, in seconds. They need not be met to the millisecond.
SWEEP, SHORT_SWEEP = 1.0, 0.1
ACCEPTS_A_TURN = 64  # connections accepted before parked ones get their turn
REFUSALS_SILENCE = 60  # seconds between two log lines about connections that were turned away
LOOK_LATER = 0.1  # interval of the check for due call_later() calls, in seconds
# A ClientHello, a request head or a registration comes in a few pieces. If a peer sends it byte by
# byte, each byte costs a step of a worker. So after FREE_WAITS waits in one state, the connection's
# input is read only every TRICKLE seconds.
FREE_WAITS = 64
TRICKLE = 0.1
PAUSE = 0.2  # seconds without accepting, if the process has no descriptor left
# Seconds that a silent connection is watched on once the listener accepts no more: the ClientHello
# of a connection that was just accepted, or the next request of a busy one, is on its way.
LINGER = 1.0

Address = tuple[Any, ...]  # as accept() gives it: IP address, port; for IPv6 two numbers more


class Parkable(Protocol):
    """What a listener can watch. It compares by identity."""

    @property
    def duplex(self) -> Duplex:
        """The connection."""

    @property
    def address(self) -> Address:
        """The peer's address. Addresses take turns at the workers."""

    @property
    def silent(self) -> bool:
        """Whether nothing of a message has come: while the gateway stops, it waits LINGER only."""

    @property
    def brief(self) -> bool:
        """Whether ready() takes so little time now that the listener's thread may call it."""

    def ready(self) -> None:
        """The peer has sent something. Called by a worker, or as ``brief`` says."""

    def expired(self) -> None:
        """The time is up. Called by a worker."""

    def close(self) -> None:
        """The listener stops. Called by the listener's thread, or the one that calls stop() or
        park()."""


Welcome = Callable[[socket.socket, Address, Seat], "Parkable | None"]


def descriptor_limit() -> int:
    """How many file descriptors the process may have open (RLIMIT_NOFILE)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


class PortError(Exception):
    """The gateway cannot listen on a port; the text is one line for the operator."""


def bind(
    setting: str, addresses: Sequence[str], port: int, inherited: Inherited = NOTHING
) -> list[socket.socket]:
    """Listening sockets for a port (0: any free one) on the given IP addresses, () for all; those
    that were ``inherited``, where they fit.

    Raises PortError, which calls the port by ``setting``, the name of its variable; Contradiction.
    """
    sockets = inherited.take(setting, port)
    if sockets:
        return sockets
    try:
        for address in addresses or ("",):
            found = inherited.take_at(setting, address, port)
            if found is None:
                found = open_socket(address, port, shared=inherited.shares_ports)
            sockets.append(found)
            port = sockets[0].getsockname()[1]  # the same for all, if it was any free one
    except OSError as error:
        for sock in sockets:
            sock.close()
        other = inherited.named_at(port) if error.errno == errno.EADDRINUSE else ""
        why = _reason(error, setting) if not other else (
            f"systemd's socket at this port is for {other}, expected one for {setting}: correct "
            "its FileDescriptorName=, or choose another port"
        )  # fmt: skip
        raise PortError(f"{setting} {port}{_on(address)}: {why}") from None
    return sockets


def open_socket(address: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket at an IP address, "" for all. ``shared``: other sockets of ours may have
    the same address, and each gets a part of the connections (SO_REUSEPORT). Raises OSError."""
    create = partial(socket.create_server, backlog=BACKLOG, reuse_port=shared)
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return create((address, port), family=family)
    if socket.has_dualstack_ipv6():
        try:
            return create(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise  # on a machine without IPv6, listen on IPv4 alone
    return create(("", port))


def _on(address: str) -> str:
    return f" on {address}" if address else ""


def _reason(error: OSError, setting: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return "in use, another program listens there; stop it or choose another port"
    if error.errno == errno.EACCES:
        return (
            "no right to listen on a port below 1024; choose a higher one, "
            "or grant the right (root, or the capability cap_net_bind_service)"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        own = setting in ("DASHBOARD_PORT", "METRICS_PORT")
        names = setting.replace("_PORT", "_BIND") if own else "BIND"
        return f"not an address of this machine; correct {names}"
    return error.strerror or str(error)


def _raise_limit(error: OSError) -> str:
    """What the operator can do if a limit of the process, or of the system, was reached."""
    if error.errno == errno.EMFILE:
        return "; raise the limit (ulimit -n)"
    return "; raise the limit (sysctl fs.file-max)" if error.errno == errno.ENFILE else ""


class Listener:
    """One port. start(), then stop(), which closes all parked connections."""

    def __init__(
        self,
        name: str,
        sockets: Sequence[socket.socket],
        welcome: Welcome,
        workers: FairWorkers,
        places: Places,
        first_timeout: float,
    ):
        """``welcome(sock, address, seat)`` makes a Parkable of an accepted socket, or returns None
        if bad tokens have come from its address; it may raise Dropped. The Parkable calls
        Seat.settle() when its peer has asked for something, and Seat.leave() when it is closed.
        ``workers`` run the connections' steps; ``places`` limit how many are open at a time.
        ``first_timeout``: seconds that a peer has for its first byte before expired() is called;
        with 0 it is called at once.
        """
        self.name = name
        self.port = sockets[0].getsockname()[1]
        self._sockets = sockets
        self._welcome = welcome
        self._workers = workers
        self.places = places
        self._first_timeout = first_timeout
        # Sweep at least three times per first_timeout. With first_timeout 0, sweep every
        # SHORT_SWEEP seconds for the short timeouts passed to park().
        self._sweep_every = min(SWEEP, first_timeout / 3 or SHORT_SWEEP)
        self._lock = threading.Lock()  # guards the six below, and what is accepted from
        self._readable = Readable()  # all of it except wait()
        # By descriptor: the connection, and its monotonic deadline.
        self._parked: dict[int, tuple[Parkable, float]] = {}
        self._sleeps = False  # the thread waits in the selector without a timeout
        self._accepting = True
        # When (monotonic), the function, the key of its turn.
        self._later: list[tuple[float, Callable[[], object], Hashable]] = []
        self._over = False  # what is parked is closed, what is called later is called at once
        self.refused = 0  # connections that got no place; counted by the thread alone
        self.drops = Drops()  # of the others, counted by the Parkables
        self._refused_said = 0  # how many of them the log has reported
        self._refused_host: str | None = None  # address of the last of them
        self._said_at: float = -REFUSALS_SILENCE  # monotonic, of the last line about them
        self.starved = 0  # tries to accept that have failed for lack of a descriptor, or memory
        self._starved_said_at: float = -REFUSALS_SILENCE  # monotonic, of the last line about them
        self._resume_at: float | None = None  # monotonic, end of a _pause(); None: accepting
        self._leaving = threading.Event()  # stop_accepting() was called
        self._accepts_no_more = threading.Event()  # the thread has seen that
        self._turned = threading.Event()  # the thread has taken a turn since moves() cleared it
        self._stopping = threading.Event()
        self._waker = Waker()
        self._last_sweep = 0.0  # monotonic
        self._thread: threading.Thread | None = None  # None until start()

    @property
    def stopping(self) -> bool:
        """Whether stop() was called. Then call_later() does not wait for its timeout."""
        return self._stopping.is_set()

    @property
    def crowded(self) -> bool:
        """Whether connections wait for a worker. Then a step should park its connection rather
        than wait for the peer."""
        return self._workers.crowded

    def start(self) -> None:
        """Begin to accept. Raises PortError if the system gives no thread."""
        for sock in self._sockets:
            sock.setblocking(False)
            tune(sock)  # for the sockets that it accepts
            self._readable.watch_always(sock.fileno())
        self._readable.watch_always(self._waker.fileno())
        try:
            self._thread = spawn(f"listener {self.name}", self._run)
        except NoThread as error:
            self.stop()
            raise PortError(f"port {self.port}: {error}") from None

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """Its listening sockets, for a successor; closed ones once it accepts no more."""
        return self._sockets

    def moves(self, timeout: float) -> bool:
        """Whether the thread takes a turn within ``timeout`` seconds, or is to take none."""
        if self._thread is None or self._stopping.is_set():
            return True
        self._turned.clear()
        self._waker.wake()
        return self._turned.wait(timeout) or self._stopping.is_set()

    def accept_also(self, sockets: Sequence[socket.socket]) -> None:
        """Accept the connections of other listening sockets as well, until leave_out(). Any
        thread; the caller closes them after leave_out()."""
        with self._lock:
            if not self._accepting or self._over or self._leaving.is_set():
                return
            for sock in sockets:
                sock.setblocking(False)
                if self._resume_at is None:
                    self._readable.watch_always(sock.fileno())
            self._sockets = (*self._sockets, *sockets)
        self._waker.wake()

    def leave_out(self, sockets: Sequence[socket.socket]) -> None:
        """No longer accept the connections of these sockets. Any thread."""
        with self._lock:
            for sock in sockets:
                if sock in self._sockets and self._resume_at is None and self._accepting:
                    with contextlib.suppress(OSError, ValueError, KeyError):  # closed already
                        self._readable.forget(sock.fileno())
            self._sockets = tuple(sock for sock in self._sockets if sock not in sockets)
        self._waker.wake()

    def stop_accepting(self) -> None:
        """Accept no further connections, and close our descriptors of the port: a process that
        shares its sockets gets those that come. Parked connections are watched on; silent ones for
        LINGER seconds."""
        self._leaving.set()
        self._waker.wake()
        if self._thread is not None:
            self._accepts_no_more.wait()
        for sock in self._sockets:
            sock.close()

    def stop(self) -> None:
        """Stop accepting, and close all parked connections; waits for the thread. Connections in
        the hands of workers go on, and are closed as soon as they are parked."""
        self._stopping.set()
        self._waker.wake()
        if self._thread is not None:
            self._thread.join()
        self._finish()
        for sock in self._sockets:
            sock.close()
        self._readable.close()
        self._waker.close()

    def park(self, connection: Parkable, timeout: float) -> None:
        """Watch a connection until its peer sends something, ``timeout`` seconds at most."""
        if timeout <= 0:  # even if input is pending, or a peer that trickles would never expire
            self._hand_over(connection, connection.expired)
            return
        if connection.duplex.pending:  # bytes that were read already: the selector cannot see them
            self._hand_over(connection, connection.ready)
            return
        self._watch(connection, monotonic() + timeout, self._readable.watch)

    def await_more(self, connection: Parkable, timeout: float, waits: int) -> None:
        """As park(), for a message that comes in a few pieces. ``waits``: how often the connection
        has waited for it, this time included. After FREE_WAITS, ready() is called only once in
        TRICKLE seconds, however often the peer sends."""
        if waits > FREE_WAITS and timeout > 0 and not self.stopping:
            self.call_later(connection, connection.ready, min(timeout, TRICKLE))
        else:
            self.park(connection, timeout)

    def call_later(
        self, connection: Parkable, function: Callable[[], object], timeout: float
    ) -> None:
        """Have a worker call ``function`` in ``timeout`` seconds, or a little later, when the
        connection's address has its turn. If the listener has stopped, it is called at once; if
        the workers have stopped as well, raises Stopped."""
        key = counted_by(connection.address[0])
        with self._lock:
            over = self._over
            if not over:
                self._later.append((monotonic() + timeout, function, key))
        if over:
            self._workers.submit(function, key)
        else:
            self._waker.wake()

    def _watch(self, connection: Parkable, deadline: float, watch: Callable[[int], object]) -> None:
        """``watch`` is a method of Readable."""
        try:
            with self._lock:
                over, wake = self._over, self._sleeps
                if not over:
                    if not self._accepting:
                        deadline = self._shortened(connection, deadline, monotonic())
                    fd = connection.duplex.fileno()
                    watch(fd)
                    self._parked[fd] = connection, deadline
                    self._sleeps = False
        except (OSError, ValueError):  # the connection is broken: its next step finds out
            self._hand_over(connection, connection.ready)
            return
        if over:
            connection.close()
        elif wake:  # or the thread would not see the deadline
            self._waker.wake()

    def _hand_over(self, connection: Parkable, step: Callable[[], object]) -> None:
        """Have a worker call ``step``, a method of the connection."""
        try:
            self._workers.submit(step, counted_by(connection.address[0]))
        except Stopped:  # no worker is left to close it
            connection.close()

    # The listener's thread

    def _run(self) -> None:
        self._last_sweep = monotonic()
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception:
                log.exception("port %s: an unexpected error (bug, traceback follows); the port "
                              "stays open", self.name)  # fmt: skip
                self._stopping.wait(PAUSE)  # the cause may still be there: no busy loop
        self._finish()

    def _turn(self) -> None:
        for fd in self._readable.wait(self._patience()):
            with self._lock:
                connection, _ = self._parked.pop(fd, (None, 0))
            if connection is None:
                self._find_out(fd)
            elif connection.brief:
                call_logged(connection.ready)
            else:
                self._hand_over(connection, connection.ready)
        now = monotonic()
        if self._accepting and self._leaving.is_set():
            self._leave(now)
        if not self._turned.is_set():
            self._turned.set()
        self._submit_due(now)
        if self._resume_at is not None and now >= self._resume_at:
            with self._lock:
                self._resume_at = None
                for sock in self._sockets:
                    self._readable.watch_always(sock.fileno())
        if now - self._last_sweep >= self._sweep_every:
            self._last_sweep = now
            self._sweep(now)

    def _find_out(self, fd: int) -> None:
        """A visitor has come, or stop() or another method has woken the thread."""
        if fd == self._waker.fileno():
            self._waker.clear()
        for sock in self._sockets:
            if fd == sock.fileno():
                self._accept(sock)

    def _finish(self) -> None:
        """Close all that is parked; from here on park() closes, and call_later() calls at once. The
        thread's last act; stop() repeats it, in case the thread never ran."""
        with self._lock:
            self._over = True
            left = [self._unwatch(fd) for fd in list(self._parked)]
        self._accepts_no_more.set()
        for connection in left:
            call_logged(connection.close)
        self._submit_due(math.inf)

    def _patience(self) -> float | None:
        """How long the selector may wait, in seconds; None: until something happens."""
        if self._later:
            return LOOK_LATER
        if self._resume_at is not None:
            return PAUSE
        with self._lock:
            self._sleeps = not self._parked
            return None if self._sleeps else self._sweep_every

    def _submit_due(self, now: float) -> None:
        if not self._later:
            return
        with self._lock:
            due = [(entry[1], entry[2]) for entry in self._later if entry[0] <= now]
            if due:
                self._later[:] = [entry for entry in self._later if entry[0] > now]
        for function, key in due:
            call_logged(self._workers.submit, function, key)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._report_starved(error)
                self._pause()
                return
            host = unmapped_host(address[0])
            seat = self.places.take(host)
            if seat is not None:
                self._take_in(sock, (host, *address[1:]), seat)
            else:
                # Without an answer: that would need a TLS handshake, the most expensive part.
                sock.close()
                self.refused += 1
                self._report_refused(monotonic(), host)

    def _take_in(self, sock: socket.socket, address: Address, seat: Seat) -> None:
        connection = None
        try:
            connection = self._welcome(sock, address, seat)
        except Dropped as error:
            self.drops.add(error.reason)
            return
        finally:
            if connection is None:  # the peer is not wanted, or welcome() failed
                sock.close()
                seat.leave()
        if connection is None:
            self.drops.add(BAD_TOKENS)
            return
        if self._first_timeout:
            deadline = monotonic() + self._first_timeout
            self._watch(connection, deadline, self._readable.watch_new)
        else:
            self._hand_over(connection, connection.expired)

    def _report_refused(self, now: float, host: str | None = None) -> None:
        """Log how many connections were turned away, every REFUSALS_SILENCE at most. ``host``: the
        address of one that was turned away now."""
        self._refused_host = host or self._refused_host
        count = self.refused - self._refused_said
        if count and now - self._said_at >= REFUSALS_SILENCE:
            self._refused_said, self._said_at = self.refused, now
            log.warning("port %s: %d more connections were closed at once, the last from %s (%d "
                        "since the start): the limit of connections (%d) is reached, or one "
                        "address has used up its share of it",
                        self.name, count, self._refused_host, self.refused, self.places.most,
                        )  # fmt: skip

    def _report_starved(self, error: OSError) -> None:
        """Count, and log every REFUSALS_SILENCE at most, that a connection cannot be accepted."""
        self.starved += 1
        now = monotonic()
        if now - self._starved_said_at >= REFUSALS_SILENCE:
            self._starved_said_at = now
            log.warning("port %s: cannot accept: %s; connections wait, next tries every %g s%s",
                        self.name, error.strerror, PAUSE, _raise_limit(error))  # fmt: skip

    def _pause(self) -> None:
        """Do not accept for a while. While there is no descriptor for an accepted connection, the
        listening socket stays ready, and the thread would spin."""
        if self._resume_at is None:
            with self._lock:
                self._resume_at = monotonic() + PAUSE
                for sock in self._sockets:
                    self._readable.forget(sock.fileno())

    def _leave(self, now: float) -> None:
        """Accept no more. Silent connections are watched a little longer."""
        self._sweep_every = min(self._sweep_every, SHORT_SWEEP)
        with self._lock:
            self._accepting = False
            if self._resume_at is None:
                for sock in self._sockets:
                    self._readable.forget(sock.fileno())
            for fd, (connection, deadline) in self._parked.items():
                self._parked[fd] = connection, self._shortened(connection, deadline, now)
        self._resume_at = None
        self._accepts_no_more.set()

    def _shortened(self, connection: Parkable, deadline: float, now: float) -> float:
        return min(deadline, now + LINGER) if connection.silent else deadline

    def _unwatch(self, fd: int) -> Parkable:
        """Take a connection back. Caller holds the lock."""
        self._readable.forget(fd)
        return self._parked.pop(fd)[0]

    def _sweep(self, now: float) -> None:
        self._report_refused(now)
        with self._lock:
            late = [fd for fd, (_, deadline) in self._parked.items() if deadline <= now]
            expired = [self._unwatch(fd) for fd in late]
        for connection in expired:
            self._hand_over(connection, connection.expired)
