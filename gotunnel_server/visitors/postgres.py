"""PostgreSQL's CancelRequest: to which tunnel does it belong?

To cancel what a session does, such as at psql's Ctrl-C, a client opens a further connection and
sends a key there that the server has told it in that session. libpq before version 17 does so
without TLS, also if the session has TLS: then no SNI names the hostname. So the gateway, which ends
TLS, reads the key at the beginning of such a session (PostgreSQL, "Message Flow" and "Message
Formats"):

    visitor    SSLRequest, TLS, StartupMessage                 a later connection: CancelRequest
    target     Authentication..., BackendKeyData, ReadyForQuery

The key is a secret of the two. A visitor that does not know it reaches no tunnel, and the target
checks it again.
"""

import threading

from .sniff import LEAST_KEY, MOST_KEY

# Bytes of a target within which its key must come: logging in and some twenty parameters take 700.
SCAN_LIMIT = 16384
KEYS = 2048  # that are remembered; as many as relays there may be

_BACKEND_KEY_DATA = ord("K")
# What may come before it: Authentication, NegotiateProtocolVersion, ParameterStatus, Notice.
_BEFORE = frozenset(b"RvSN")


class Scanner:
    """Looks for the BackendKeyData in the first bytes of a target."""

    def __init__(self):
        self.over = False  # there is no key, or it was found
        self._came = b""  # from the beginning of a message on
        self._left = SCAN_LIMIT

    def feed(self, data: bytes) -> bytes | None:
        """The key, once it is there. Whatever the bytes are, it is found or the scan is over."""
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
    """The keys of the sessions that last, and their Routes. Any thread."""

    def __init__(self):
        self._routes = {}  # key: Route
        self._lock = threading.Lock()  # guards it

    def add(self, key: bytes, route) -> bool:
        """False if there is no room, or the key is another session's."""
        with self._lock:
            if key in self._routes or len(self._routes) >= KEYS:
                return False
            self._routes[key] = route
            return True

    def remove(self, key: bytes):
        with self._lock:
            del self._routes[key]

    def route(self, request: bytes):
        """The Route that a CancelRequest is for, None if there is none."""
        return self._routes.get(request[8:])


class Watched:
    """A visitor that speaks PostgreSQL as an end of a relay: its CancelRequests find the Route as
    long as the relay lasts. After the target's first bytes it costs nothing."""

    def __init__(self, duplex, keys, route):
        self.read, self.finish = duplex.read, duplex.finish
        self.reset, self.died = duplex.reset, duplex.died
        self.cut, self.stop_reading = duplex.cut, duplex.stop_reading
        self._duplex = duplex
        self._keys, self._route = keys, route
        self._scanner = Scanner()
        self._key = None

    def write(self, data):
        key = self._scanner.feed(data)
        if key is not None and self._keys.add(key, self._route):
            self._key = key  # before the visitor has it
        if self._scanner.over:
            self.write = self._duplex.write
        self._duplex.write(data)

    def forget(self):
        """The relay is over."""
        if self._key is not None:
            self._keys.remove(self._key)
