"""Bounds what Redis answers, in bytes and in time.

redis-py reads an answer of any length into memory, and its timeout is for each read: a server that
sends a byte now and then would hold a thread for ever. So each connection gets a socket that counts
from one command to the next.
"""

from __future__ import annotations

import errno
import socket
from time import monotonic
from typing import Any

# Bytes of an answer. The longest one is the list of all hostnames that a gateway holds: half a
# million. Objects that Python makes of it may take ten times as much.
MOST_ANSWER = 32 * 1024 * 1024
# Seconds until an answer is complete. It is more than engine.PING, since the connection for
# messages gets answers without asking.
WHOLE_TIMEOUT = 5.0


class BoundedSocket:
    """A socket, as redis-py uses it: reads raise OSError beyond the bounds. One thread at a
    time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._begin()

    def _begin(self) -> None:
        self._left = MOST_ANSWER
        self._deadline = monotonic() + WHOLE_TIMEOUT

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, data: bytes) -> None:
        self._begin()
        self._sock.sendall(data)

    def recv(self, *arguments: int) -> bytes:
        self._check()
        data = self._sock.recv(*arguments)
        self._left -= len(data)
        return data

    def recv_into(self, *arguments: Any) -> int:
        """As the parser of the package hiredis reads."""
        self._check()
        size = self._sock.recv_into(*arguments)
        self._left -= size
        return size

    def _check(self) -> None:
        if self._left <= 0:
            raise OSError(errno.EMSGSIZE, f"an answer of more than {MOST_ANSWER >> 20} MiB")
        if monotonic() > self._deadline:
            raise TimeoutError("no whole answer in time")


def bound(connection: Any) -> None:
    """Bound a connection of redis-py from its first command on: its ``redis_connect_func``."""
    connection._sock = BoundedSocket(connection._sock)
    connection.on_connect()
