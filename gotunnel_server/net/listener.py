"""One selector thread a port: accept, limit, watch idle connections, hand over.

Waiting costs no worker here. A connection that waits for its peer is *parked* with its port's
listener; when the peer sends something, or the time is up, it is handed to a worker, which does
what can be done and parks it again, or closes it. So ownership moves, and a connection needs no
lock: it is in the listener's selector, in the hands of one worker, or waits for its turn
(call_later()).

Any thread may call park(), call_later() and stop(). Everything else happens in the
listener's thread; what it shares with the others is guarded by one lock.

What can be parked has:

    duplex            the connection (common.duplex.Duplex)
    address           the peer's; its connections take turns with those of others
    ready()           the peer has sent something; called by a worker
    expired()         the time is up; called by a worker
    close()           the listener stops; called by its thread
"""

import errno
import logging
import math
import resource
import selectors
import socket
import sys
import threading
from time import monotonic

from gotunnel import NoThread, Waker, call_logged, spawn
from gotunnel_agent.common.addresses import counted_by, unmapped_host
from gotunnel_agent.common.process import Stopped

log = logging.getLogger("gotunnel.listener")

BACKLOG = 1024  # connections that the kernel holds for us while we are busy
# Seconds between looks at the deadlines, which need not be met to the millisecond.
SWEEP, SHORT_SWEEP = 1.0, 0.1
ACCEPTS_A_TURN = 64  # connections accepted before those that are parked get their turn
REFUSALS_SILENCE = 60  # seconds between two lines in the log that say how many were turned away
LOOK_LATER = 0.1  # seconds between looks at calls that are to be made later
# Waits in one state after which a connection's next bytes are looked at only each TRICKLE seconds:
# a hello, a head or a registration comes in a few pieces, and byte by byte each would take a step.
FREE_WAITS = 64
TRICKLE = 0.1
PAUSE = 0.2  # seconds without accepting, when the process has no descriptor left


def descriptor_limit() -> int:
    """How many descriptors the process may have."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


class PortError(Exception):
    """A port cannot be listened on; one line for the operator."""


def bind(setting, addresses, port) -> list:
    """Listening sockets for a port (0: any free one) on the given IP addresses, () for all.

    ``setting`` names the port in the error, PortError.
    """
    sockets = []
    try:
        for address in addresses or ("",):
            sockets.append(_bind_one(address, port))
            port = sockets[0].getsockname()[1]  # the same for all, if it was any free one
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise PortError(f"{setting} {port}{_on(address)}: {_reason(error, setting)}") from None
    return sockets


def _bind_one(address, port):
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise  # only a machine without IPv6 is none of our business
    return socket.create_server(("", port), backlog=BACKLOG)


def _on(address):
    return f" on {address}" if address else ""


def _reason(error, setting):
    if error.errno == errno.EADDRINUSE:
        return "in use, another program listens there; stop it or choose another port"
    if error.errno == errno.EACCES:
        return (
            "no right to listen on a port below 1024; choose a higher one, "
            "or grant the right (root, or the capability cap_net_bind_service)"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        names = "DASHBOARD_BIND" if setting == "DASHBOARD_PORT" else "BIND"
        return f"not an address of this machine; correct {names}"
    return error.strerror or str(error)


def _raise_limit(error):
    """What helps, where a limit is in the way: of the process, or of the system."""
    if error.errno == errno.EMFILE:
        return "; raise the limit (ulimit -n)"
    return "; raise the limit (sysctl fs.file-max)" if error.errno == errno.ENFILE else ""


class Listener:
    """One port. start(), then stop(), which closes all that is parked."""

    def __init__(self, name, sockets, welcome, workers, places, first_timeout):
        """``welcome(sock, address, seat)`` makes something that can be parked out of an accepted
        socket, or None if that peer is not wanted; what it makes settles its Seat, and leaves it in
        the end. ``workers``: FairWorkers, which take its steps. ``places``: shares.Places for the
        connections that are open at a time. ``first_timeout`` is how many seconds the first byte
        may take: then it is expired(), with 0 at once.
        """
        self.name = name
        self.port = sockets[0].getsockname()[1]
        self._sockets = sockets
        self._welcome = welcome
        self._workers = workers
        self._places = places
        self._first_timeout = first_timeout
        # Sweep at least three times per first_timeout. With first_timeout 0, sweep every
        # SHORT_SWEEP seconds for the short timeouts passed to park().
        self._sweep_every = min(SWEEP, first_timeout / 3 or SHORT_SWEEP)
        self._selector = selectors.DefaultSelector()
        self._parked = {}  # connection: monotonic deadline
        self._lock = threading.Lock()  # guards the three below
        self._newly_parked = []  # (connection, deadline)
        self._later = []  # (deadline, function, key of its turn)
        self._over = False  # the thread has looked at both lists for the last time
        self.refused = 0  # connections that found no place; only the thread counts them
        self._refused_said = 0  # of them, those that the log knows of
        self._refused_host = None  # address of the last of them
        self._said_at = -REFUSALS_SILENCE  # monotonic, of its last line about them
        self._resume_at = None  # accept again then; None: accepting
        self._stopping = threading.Event()
        self._waker = Waker()
        self._last_sweep = 0.0  # monotonic
        self._thread = None

    @property
    def stopping(self) -> bool:
        """Whether what is to be called later would be called at once."""
        return self._stopping.is_set()

    @property
    def crowded(self) -> bool:
        """Whether connections wait for a worker: then none of them should wait in a worker."""
        return self._workers.crowded

    def start(self):
        for sock in self._sockets:
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)
        self._selector.register(self._waker, selectors.EVENT_READ)
        try:
            self._thread = spawn(f"listener {self.name}", self._run)
        except NoThread as error:
            self.stop()
            raise PortError(f"port {self.port}: {error}") from None

    def stop(self):
        """Stop accepting, close what is parked; waits for the thread. What workers have goes on,
        and is closed as soon as it is parked."""
        self._stopping.set()
        self._waker.wake()
        if self._thread is not None:
            self._thread.join()
        self._finish()
        for closable in (*self._sockets, self._selector, self._waker):
            closable.close()

    def park(self, connection, timeout):
        """Watch a connection until its peer sends something, ``timeout`` seconds at most."""
        if timeout <= 0:  # also for a peer that always has just sent a byte
            self._hand_over(connection, connection.expired)
            return
        if connection.duplex.pending:  # the selector sees the socket, not what was read from it
            self._hand_over(connection, connection.ready)
            return
        with self._lock:
            over = self._over
            if not over:
                self._newly_parked.append((connection, monotonic() + timeout))
        if over:
            connection.close()
        else:
            self._waker.wake()

    def await_more(self, connection, timeout, waits):
        """As park(), for something that comes in a few pieces. ``waits``: how often the connection
        has waited for it, this time included. If it is too often, a worker looks in a while."""
        if waits > FREE_WAITS and timeout > 0 and not self.stopping:
            self.call_later(connection, connection.ready, min(timeout, TRICKLE))
        else:
            self.park(connection, timeout)

    def call_later(self, connection, function, timeout):
        """Have a worker call ``function`` in ``timeout`` seconds, or a little later, when it is the
        turn of the connection's address. If the listener has stopped, at once; raises Stopped if
        the workers have, too."""
        key = counted_by(connection.address[0])
        with self._lock:
            over = self._over
            if not over:
                self._later.append((monotonic() + timeout, function, key))
        if over:
            self._workers.submit(function, key)
        else:
            self._waker.wake()

    def _hand_over(self, connection, step):
        """Have a worker call ``step``, a method of the connection."""
        try:
            self._workers.submit(step, counted_by(connection.address[0]))
        except Stopped:  # the workers have stopped: nobody else would close it
            connection.close()

    # The listener's thread

    def _run(self):
        self._last_sweep = monotonic()
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception:
                log.exception("port %s: an unexpected error (bug, traceback follows); the port "
                              "stays open", self.name)  # fmt: skip
                self._stopping.wait(PAUSE)  # its cause may still be there: no busy loop
        self._finish()

    def _turn(self):
        busy = self._parked or self._resume_at is not None
        for key, _ in self._selector.select(self._patience(busy)):
            if key.data is not None:
                self._unwatch(key.data)
                self._hand_over(key.data, key.data.ready)
            elif key.fileobj is self._waker:
                self._waker.clear()
            else:
                self._accept(key.fileobj)
        self._take_newly_parked()
        now = monotonic()
        self._submit_due(now)
        if now - self._last_sweep >= self._sweep_every:
            self._last_sweep = now
            self._sweep(now)

    def _finish(self):
        """The thread's last act, and stop()'s if it never ran: from here on park() closes, and
        call_later() calls at once."""
        with self._lock:
            self._over = True
        for connection in list(self._parked):
            self._unwatch(connection)
            call_logged(connection.close)
        for connection, _ in self._take(self._newly_parked):
            call_logged(connection.close)
        self._submit_due(math.inf)

    def _take(self, entries) -> list:
        """What is in one of the lists that other threads append to; it is empty then."""
        with self._lock:
            taken = entries.copy()
            entries.clear()
        return taken

    def _patience(self, busy):
        """Seconds until something has to be looked at, None if nothing has."""
        if self._later:
            return LOOK_LATER
        return self._sweep_every if busy else None

    def _submit_due(self, now):
        if not self._later:
            return
        with self._lock:
            due = [entry[1:] for entry in self._later if entry[0] <= now]
            if due:
                self._later[:] = [entry for entry in self._later if entry[0] > now]
        for function, key in due:
            call_logged(self._workers.submit, function, key)

    def _accept(self, listening):
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                more = _raise_limit(error)
                log.warning("port %s: cannot accept: %s; accepting pauses for %g s%s",
                            self.name, error.strerror, PAUSE, more)  # fmt: skip
                self._pause()
                return
            host = unmapped_host(address[0])
            seat = self._places.take(host)
            if seat is not None:
                self._take_in(sock, (host, *address[1:]), seat)
            else:
                # Not even told so: that would take a handshake, which is the dearest part.
                sock.close()
                self.refused += 1
                self._report_refused(monotonic(), host)

    def _take_in(self, sock, address, seat):
        connection = None
        try:
            connection = self._welcome(sock, address, seat)
        finally:
            if connection is None:  # not wanted, or welcome() failed
                sock.close()
                seat.leave()
        if connection is None:
            return
        if self._first_timeout:
            self._watch(connection, monotonic() + self._first_timeout)
        else:
            self._hand_over(connection, connection.expired)

    def _report_refused(self, now, host=None):
        """Log how many were turned away, now and then; ``host`` is where the last one is from."""
        self._refused_host = host or self._refused_host
        count = self.refused - self._refused_said
        if count and now - self._said_at >= REFUSALS_SILENCE:
            self._refused_said, self._said_at = self.refused, now
            log.warning("port %s: as many connections are open as may be (%d), or as one address "
                        "may have of them; %d more were closed at once, the last from %s, "
                        "%d since the start",
                        self.name, self._places.most, count, self._refused_host, self.refused,
                        )  # fmt: skip

    def _pause(self):
        """Without a descriptor the socket would stay ready, and we would go round in circles."""
        if self._resume_at is None:
            self._resume_at = monotonic() + PAUSE
            for sock in self._sockets:
                self._selector.unregister(sock)

    def _watch(self, connection, deadline):
        try:
            self._selector.register(connection.duplex, selectors.EVENT_READ, connection)
        except (OSError, ValueError):  # broken in the meantime: its owner will find out
            self._hand_over(connection, connection.ready)
            return
        self._parked[connection] = deadline

    def _take_newly_parked(self):
        for connection, deadline in self._take(self._newly_parked) if self._newly_parked else ():
            self._watch(connection, deadline)

    def _unwatch(self, connection):
        self._selector.unregister(connection.duplex)
        del self._parked[connection]

    def _sweep(self, now):
        self._report_refused(now)
        for connection in [c for c, deadline in self._parked.items() if deadline <= now]:
            self._unwatch(connection)
            self._hand_over(connection, connection.expired)
        if self._resume_at is not None and now >= self._resume_at:
            self._resume_at = None
            for sock in self._sockets:
                self._selector.register(sock, selectors.EVENT_READ)
