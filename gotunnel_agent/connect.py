"""Connects to the first address of a host that answers (RFC 8305, "Happy Eyeballs").

Some addresses of a name may never answer, such as IPv6 ones on a network with broken IPv6. So the
next address is tried while the earlier ones still may answer. IPv4 and IPv6 take turns, and the
first connection wins.
"""

import contextlib
import errno
import os
import selectors
import socket
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Protocol

from gotunnel import Deadline

from .common.hostnames import for_socket, normal_hostname

NEXT_ADDRESS = 0.25  # seconds until the next address is tried too (RFC 8305 §5 recommends it)
# Addresses of one host that are tried. The name's DNS server decides how many there are, and each
# attempt takes a descriptor. The last of these begins after 4 seconds.
MOST_ADDRESSES = 16
# What connect_ex() returns for a connection in progress; the second is Windows's.
UNDER_WAY = (errno.EINPROGRESS, errno.EWOULDBLOCK)
LOCALHOST = "localhost"  # it and all names below it are this machine (RFC 6761 §6.3)

# A selector that needs no descriptor of its own, where the system has one.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)

# As getaddrinfo() gives it: family, kind, protocol, canonical name, address for connect().
SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, SocketAddress]


class Readable(Protocol):
    """What a selector can wait for, such as gotunnel.Waker."""

    def fileno(self) -> int: ...


class NoAnswer(TimeoutError):
    """No address has answered in time."""


class GivenUp(ConnectionAbortedError):
    """The caller of connect() does not want the connection any more."""


def addresses_of(host: str, port: int) -> list[AddressInfo]:
    """getaddrinfo()'s addresses for TCP, the families in turn (RFC 8305 §4), at most
    MOST_ADDRESSES. Raises socket.gaierror."""
    families: dict[socket.AddressFamily, list[AddressInfo]] = {}
    for address in _resolve(host, port):
        families.setdefault(address[0], []).append(address)
    turns = chain.from_iterable(zip_longest(*families.values()))
    return list(filter(None, turns))[:MOST_ADDRESSES]


def _resolve(host: str, port: int) -> Sequence[AddressInfo]:
    """All addresses. Names under localhost lead to this machine even if the system's resolver does
    not know them; RFC 6761 §6.3 asks resolvers for it, and glibc's "files dns" does not do it."""
    try:
        return socket.getaddrinfo(for_socket(host), port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        if f".{normal_hostname(host)}".endswith(f".{LOCALHOST}"):
            return socket.getaddrinfo(None, port, type=socket.SOCK_STREAM)  # ::1 and 127.0.0.1
        raise


def connect(
    addresses: Sequence[AddressInfo], deadline: Deadline, stop: Readable | None = None
) -> socket.socket:
    """A connection, non-blocking, to the first of ``addresses`` that answers.

    Raises GivenUp as soon as ``stop`` is readable: then the caller does not want the connection any
    more. Raises NoAnswer when the ``deadline`` is over, and OSError if all addresses fail:
    ConnectionRefusedError if one refused, since that shows that the host is up.
    """
    with contextlib.closing(_Attempts(deadline, stop)) as attempts:
        try:
            return attempts.first_of(addresses)
        except TimeoutError as error:
            raise NoAnswer(str(error)) from None


class _Attempts:
    """Connections under way to the addresses of one host."""

    def __init__(self, deadline: Deadline, stop: Readable | None):
        self._deadline = deadline
        self._selector: selectors.BaseSelector = _Selector()
        self._pending: dict[int, socket.socket] = {}  # connections in progress, by descriptor
        if stop is not None:
            self._selector.register(stop, selectors.EVENT_READ)
        self._errors: list[OSError] = []

    def close(self) -> None:
        """Give up the attempts that are still in progress."""
        self._selector.close()
        for sock in self._pending.values():
            sock.close()

    def first_of(self, addresses: Sequence[AddressInfo]) -> socket.socket:
        """The first connection. Raises OSError if there is none."""
        for number, address in enumerate(addresses, 1):
            failures = len(self._errors)
            sock = self._begin(*address) or self._wait(failures, number == len(addresses))
            if sock is not None:
                return sock
        refused = [error for error in self._errors if isinstance(error, ConnectionRefusedError)]
        raise (refused or self._errors)[-1]

    def _begin(
        self,
        family: socket.AddressFamily,
        kind: socket.SocketKind,
        protocol: int,
        _name: str,
        address: SocketAddress,
    ) -> socket.socket | None:
        """Begin to connect. Returns the socket if it is connected already."""
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:  # the system does not know the family, or has no descriptor left
            self._errors.append(error)
            return None
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code in UNDER_WAY:
            self._selector.register(sock, selectors.EVENT_WRITE)
            self._pending[sock.fileno()] = sock
            return None
        return self._ended(sock, code)

    def _wait(self, failures: int, is_last: bool) -> socket.socket | None:
        """Wait for a connection. Returns None when it is time for the next address: more than
        ``failures`` attempts have failed, or none has answered for NEXT_ADDRESS. If ``is_last``,
        returns None when all have failed. Raises TimeoutError, GivenUp."""
        next_at = Deadline(None if is_last else NEXT_ADDRESS)
        while self._pending:
            if not is_last and len(self._errors) > failures:
                return None
            left = self._deadline.left()
            try:
                wait = next_at.left()
            except TimeoutError:
                return None
            waits = [seconds for seconds in (wait, left) if seconds is not None]
            for key, _ in self._selector.select(min(waits, default=None)):
                if key.fd not in self._pending:  # it is stop
                    raise GivenUp("the connection is not wanted any more")
                self._selector.unregister(key.fd)
                sock = self._pending.pop(key.fd)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if self._ended(sock, code) is not None:
                    return sock
        return None

    def _ended(self, sock: socket.socket, code: int) -> socket.socket | None:
        """The socket if it has connected; else its error is noted."""
        if not code:
            return sock
        sock.close()
        # OSError picks the subclass for the number, as a failed socket.connect() does.
        # Windows has the texts for its sockets' codes in a table of their own.
        text = getattr(socket, "errorTab", {}).get(code) or os.strerror(code)
        self._errors.append(OSError(code, text))
        return None
