"""Streams that an earlier visit left in good order, kept for the next one.

A stream that is taken up again spares its visit the connection between agent and target. None is
kept for long: each holds such a connection.
"""

import threading
from collections import deque
from time import monotonic

from gotunnel import START_WINDOW

OF_A_HOSTNAME = 64  # at most; as many visitors come at once to a busy page
OF_A_SESSION = 256  # of all its hostnames; an agent takes 1024 streams in all
MOST_AGE = 30  # seconds that one is kept; a target that closes it earlier does no harm


class KeptStreams:
    """Those of one session. Any thread."""

    def __init__(self):
        self._by_hostname = {}  # hostname: deque of (monotonic time, Stream), the freshest last
        self._all = set()  # the streams in it
        self._closed = False
        self._lock = threading.Lock()  # guards these three

    def __contains__(self, stream):
        with self._lock:
            return stream in self._all

    def pop(self, hostname):
        """The freshest Stream of a hostname, which may have died since it was kept; or None."""
        with self._lock:
            kept = self._by_hostname.get(hostname)
            if not kept:
                return None
            stream = kept.pop()[1]
            self._all.remove(stream)
            return stream

    def put(self, hostname, stream):
        """Keep a stream, or close it if it is not fit for that, or if there is no room."""
        # A window that has grown is given back only by the end of its stream.
        fit = stream.quiet and stream.window <= START_WINDOW
        with self._lock:
            kept = self._by_hostname.setdefault(hostname, deque())
            room = len(kept) < OF_A_HOSTNAME and len(self._all) < OF_A_SESSION
            if fit and room and not self._closed:
                kept.append((monotonic(), stream))
                self._all.add(stream)
                return
        stream.close()

    def close_old(self):
        """Close those that were kept for MOST_AGE."""
        self._drop(kept_before=monotonic() - MOST_AGE)

    def close_all(self):
        """Close those that are there now."""
        self._drop(kept_before=float("inf"))

    def close(self):
        """Close all, and whatever is still put here."""
        with self._lock:
            self._closed = True
        self.close_all()

    def _drop(self, kept_before):
        dropped = []
        with self._lock:
            for kept in self._by_hostname.values():
                while kept and kept[0][0] < kept_before:
                    dropped.append(kept.popleft()[1])
            self._all.difference_update(dropped)
        for stream in dropped:
            stream.close()
