"""Connects to the first address of a host that answers (RFC 8305, "Happy Eyeballs").

A name may have addresses that swallow what is sent to them, such as IPv6 ones on a network that
only seems to have IPv6. So the next address is tried while the earlier ones still may answer. The
families take turns, and the first connection wins.
"""

import contextlib
import errno
import os
import selectors
import socket
from itertools import chain, zip_longest

from gotunnel import Deadline

NEXT_ADDRESS = 0.25  # seconds until the next address is tried too (RFC 8305 §5 recommends it)
# Addresses of one host that are tried. The name's DNS server decides how many it has, and each try
# is a descriptor. The last of these begins after 4 seconds.
MOST_ADDRESSES = 16
# What a connection that goes on says: Windows uses the second.
UNDER_WAY = (errno.EINPROGRESS, errno.EWOULDBLOCK)

# A selector that needs no descriptor of its own, where the system has one.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class GivenUp(ConnectionAbortedError):
    """The caller of connect() has no use for the connection any more."""


def addresses_of(host, port) -> list:
    """getaddrinfo()'s addresses for TCP, one of each family in turn (RFC 8305 §4), MOST_ADDRESSES
    at most. Raises socket.gaierror."""
    families = {}
    for address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        families.setdefault(address[0], []).append(address)
    turns = chain.from_iterable(zip_longest(*families.values()))
    return list(filter(None, turns))[:MOST_ADDRESSES]


def connect(addresses, deadline, stop=None) -> socket.socket:
    """A connection, non-blocking, to the first of ``addresses`` that answers.

    ``stop`` is something with a fileno() that is readable once nobody wants the connection any
    more: then GivenUp is raised. Raises TimeoutError when the ``deadline`` is over, and OSError if
    all addresses fail: a refusal if there was one, since it says that the host is there.
    """
    with contextlib.closing(_Attempts(deadline, stop)) as attempts:
        return attempts.first_of(addresses)


class _Attempts:
    """Connections under way to the addresses of one host."""

    def __init__(self, deadline, stop):
        self._deadline, self._stop = deadline, stop
        self._selector = _Selector()  # of the sockets that are under way
        if stop is not None:
            self._selector.register(stop, selectors.EVENT_READ)
        self._errors = []

    def close(self):
        """Give up those that are still under way."""
        for key in list(self._selector.get_map().values()):
            if key.fileobj is not self._stop:
                key.fileobj.close()
        self._selector.close()

    def first_of(self, addresses):
        """The first connection, an OSError if none comes."""
        for number, address in enumerate(addresses, 1):
            failures = len(self._errors)
            sock = self._begin(*address) or self._wait(failures, number == len(addresses))
            if sock is not None:
                return sock
        refused = [error for error in self._errors if isinstance(error, ConnectionRefusedError)]
        raise (refused or self._errors)[-1]

    def _begin(self, family, kind, protocol, name, address):
        """Begin to connect; the socket if that is done already."""
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:  # this system does not know the family, or has no descriptor left
            self._errors.append(error)
            return None
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code in UNDER_WAY:
            self._selector.register(sock, selectors.EVENT_WRITE)
            return None
        return self._ended(sock, code)

    def _wait(self, failures, is_last):
        """Wait for a connection. None when it is time for the next address: one more than
        ``failures`` has failed, or none has answered for NEXT_ADDRESS; if ``is_last``, when all
        have failed. Raises TimeoutError, GivenUp."""
        next_at = Deadline(None if is_last else NEXT_ADDRESS)
        while len(self._selector.get_map()) > (self._stop is not None):
            if not is_last and len(self._errors) > failures:
                return None
            left = self._deadline.left()
            try:
                wait = next_at.left()
            except TimeoutError:
                return None
            for key, _ in self._selector.select(left if wait is None else min(wait, left)):
                if key.fileobj is self._stop:
                    raise GivenUp("the connection is not wanted any more")
                self._selector.unregister(key.fileobj)
                code = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if (sock := self._ended(key.fileobj, code)) is not None:
                    return sock
        return None

    def _ended(self, sock, code):
        """The socket if it has connected."""
        if not code:
            return sock
        sock.close()
        # As Python itself does for a connect(): each number has its subclass of OSError.
        self._errors.append(OSError(code, os.strerror(code)))
        return None
