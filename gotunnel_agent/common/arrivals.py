"""Connections to a server of this machine, until the heads of their requests have come.

A server with few threads must not give one to a connection that says nothing, or a byte now and
then: any program that can connect could hold them all. So the thread that accepts connections reads
their heads, too. A request of the peer that the server is for comes at once, and waits for nobody.
"""

from __future__ import annotations

import logging
import re
import selectors
import socket
from collections.abc import Callable
from time import monotonic

log = logging.getLogger("gotunnel.arrivals")

MOST = 256  # connections whose head has not come whole; of more, the oldest is closed
RECEIVE = 64 * 1024  # bytes that are read at once
ACCEPT_PAUSE = 0.1  # seconds to wait when the system has no descriptor for a connection
_BLANK_LINE = re.compile(rb"\n\r?\n")

Address = tuple[str, int]


def has_head(came: bytes | bytearray, start: int = 0) -> bool:
    """Whether a blank line is behind ``start``, which ends a head."""
    return _BLANK_LINE.search(came, start) is not None


class Arrivals:
    """Accepts connections, and passes each on with its head. One thread, with a selector:

    for key, _ in selector.select(arrivals.left()):
        arrivals.take(key.fileobj)
    arrivals.end_late()
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listening: list[socket.socket],
        pass_on: Callable[[socket.socket, Address, bytes], object],
        timeout: float,
        longest: int,
    ):
        """``selector`` gets the sockets in ``listening``, which do not block, and connections.
        ``pass_on(sock, address, came)`` gets each connection with its head, and perhaps bytes
        behind it; or with more than ``longest`` bytes of an endless head: see has_head(). A head
        has ``timeout`` seconds."""
        self._selector, self._listening, self._pass_on = selector, set(listening), pass_on
        self._timeout, self._longest = timeout, longest
        self._waiting: dict[socket.socket, _Arrival] = {}  # the oldest first
        for sock in listening:
            selector.register(sock, selectors.EVENT_READ)

    def take(self, sock: object) -> None:
        """Something has come at ``sock``, which may be of another kind."""
        if not isinstance(sock, socket.socket):
            return
        if sock in self._listening:
            self._accept(sock)
        elif (arrival := self._waiting.get(sock)) is not None:
            self._read(sock, arrival)

    def left(self) -> float | None:
        """Seconds until end_late() has something to do; None if there is no connection."""
        for arrival in self._waiting.values():
            return max(0.0, arrival.ends - monotonic())
        return None

    def end_late(self) -> None:
        now = monotonic()
        for sock, arrival in list(self._waiting.items()):
            if arrival.ends > now:
                break
            self._end(sock)

    def close(self) -> None:
        """End the connections that wait."""
        for sock in list(self._waiting):
            self._end(sock)

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, address = listening.accept()
        except BlockingIOError:
            return
        except OSError as error:  # it has left already, or we are out of descriptors
            log.debug("a connection could not be accepted: %s", error.strerror)
            self._selector.unregister(listening)
            self._selector.select(ACCEPT_PAUSE)
            self._selector.register(listening, selectors.EVENT_READ)
            return
        sock.setblocking(False)
        if len(self._waiting) >= MOST:
            self._end(next(iter(self._waiting)))
        arrival = self._waiting[sock] = _Arrival(address, monotonic() + self._timeout)
        self._selector.register(sock, selectors.EVENT_READ)
        self._read(sock, arrival)  # most often the head is here

    def _read(self, sock: socket.socket, arrival: _Arrival) -> None:
        try:
            data = sock.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        searched = max(0, len(arrival.head) - 2)
        arrival.head += data
        if has_head(arrival.head, searched) or len(arrival.head) > self._longest:
            self._forget(sock)
            self._pass_on(sock, arrival.address, bytes(arrival.head))
        elif not data:
            self._end(sock)

    def _forget(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._waiting[sock]

    def _end(self, sock: socket.socket) -> None:
        self._forget(sock)
        sock.close()


class _Arrival:
    def __init__(self, address: Address, ends: float):
        self.address = address
        self.ends = ends  # monotonic
        self.head = bytearray()  # what has come of it
