"""Finds the route that a PostgreSQL CancelRequest is for.

To cancel a query, such as at psql's Ctrl-C, a client opens another connection and sends a key that
the server told it in its session. libpq before version 17 does so without TLS, even if the session
has TLS, and without TLS there is no SNI that names the hostname. So the gateway, which ends TLS,
reads the key from the beginning of each such session (PostgreSQL, "Message Flow" and "Message
Formats"):

    visitor    SSLRequest, TLS, StartupMessage                 a later connection: CancelRequest
    target     Authentication..., BackendKeyData, ReadyForQuery

The key is a secret of target and visitor. A visitor that does not know it reaches no tunnel, and
the target checks the key again.
"""

import threading
from collections.abc import Callable

from ..routes import Route
from .sniff import LEAST_KEY, MOST_KEY
from .visits import End

# The key must be within this many first bytes of the target. A login and about twenty parameters
# take 700.
SCAN_LIMIT = 16384
KEYS = 2048  # how many are remembered; as many as there may be relays (relays.MAX_RELAYS)

_BACKEND_KEY_DATA = ord("K")
# Types of the messages before it: Authentication, NegotiateProtocolVersion, ParameterStatus,
# NoticeResponse.
_BEFORE = frozenset(b"RvSN")


class Scanner:
    """Looks for the BackendKeyData in a target's first bytes."""

    def __init__(self) -> None:
        self.over = False  # the key was found, or there is none
        self._came = b""  # the unread bytes; they begin with a message
        self._left = SCAN_LIMIT

    def feed(self, data: bytes) -> bytes | None:
        """Read on; returns the key when it is complete. The scan is ``over`` then, or when the
        bytes cannot hold a key any more. Never raises, whatever the bytes are."""
        self._left -= len(data)
        self._came += data
        while len(self._came) >= 5:  # type, length without it
            kind, end = self._came[0], 1 + int.from_bytes(self._came[1:5], "big")
            is_key = kind == _BACKEND_KEY_DATA and LEAST_KEY <= end - 5 <= MOST_KEY
            if not is_key and (kind not in _BEFORE or not 5 <= end <= SCAN_LIMIT):
                break
            if len(self._came) < end and self._left > 0:
                return None
            if is_key and len(self._came) >= end:
                key, self._came, self.over = self._came[5:end], b"", True
                return key
            self._came = self._came[end:]
        else:
            if self._left > 0:
                return None
        self._came, self.over = b"", True
        return None


class CancelKeys:
    """The keys of the sessions that are running, and their Routes. Any thread."""

    def __init__(self) -> None:
        self._routes: dict[bytes, Route] = {}  # by key
        self._lock = threading.Lock()  # guards it

    def add(self, key: bytes, route: Route) -> bool:
        """Remember a key. False if there is no room, or another session has the same key."""
        with self._lock:
            if key in self._routes or len(self._routes) >= KEYS:
                return False
            self._routes[key] = route
            return True

    def remove(self, key: bytes) -> None:
        with self._lock:
            del self._routes[key]

    def route(self, request: bytes) -> Route | None:
        """The Route that a CancelRequest is for, None if its key is unknown."""
        return self._routes.get(request[8:])


class Watched:
    """The relay end of a visitor that speaks PostgreSQL. While the relay runs, the session's
    CancelRequests find its Route. After the target's first bytes it costs nothing."""

    def __init__(self, duplex: End, keys: CancelKeys, find_route: Callable[[], Route]):
        """``find_route()``: the Route of the session, once its target has said something."""
        self.write: Callable[[bytes], None] = self._scan_and_write
        self.read, self.finish = duplex.read, duplex.finish
        self.reset, self.died = duplex.reset, duplex.died
        self.cut, self.stop_reading = duplex.cut, duplex.stop_reading
        self._duplex = duplex
        self._keys, self._find_route = keys, find_route
        self._scanner = Scanner()
        self._key: bytes | None = None  # as long as it is among the keys

    def _scan_and_write(self, data: bytes) -> None:
        key = self._scanner.feed(data)
        if key is not None and self._keys.add(key, self._find_route()):
            self._key = key  # before the visitor gets it and can send a CancelRequest
        if self._scanner.over:
            self.write = self._duplex.write
        self._duplex.write(data)

    def forget(self) -> None:
        """The relay has ended: forget the key."""
        if self._key is not None:
            self._keys.remove(self._key)
