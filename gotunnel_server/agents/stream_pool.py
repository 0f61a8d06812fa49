"""Streams that an earlier visit left in good order, kept for the next one.

A stream that is taken up again spares its visit the connection between agent and target. None is
kept for long: each holds such a connection.

A stream whose agent sends anything while it is kept, bytes or an end, is over at that moment
(Stream.rest()) and leaves the pool: the bytes belong to an earlier visit, and must not be taken for
the answer to the next one.

A target may serve one connection at a time (http.server.HTTPServer, small devices). There a kept
stream, whose connection is idle, holds up every new one. So the pool gives streams up for a new one
that waits for its answer (give_up()), and keeps none for that hostname until the target has shown
that it has accepted it: targets accept in order, so an answer on that stream, or on a newer one,
shows it.
"""

import functools
import threading
from collections import deque
from time import monotonic

from gotunnel import START_WINDOW

OF_A_HOSTNAME = 64  # at most; as many visitors come at once to a busy page
OF_A_SESSION = 256  # of all its hostnames; an agent takes 1024 streams in all
# Streams of a session that logins have bound to a visitor's connection each, at most, while they
# are idle: half of what an agent takes. Beyond it the oldest ends, whose visitor signs in again.
OWN_OF_A_SESSION = 512
MOST_AGE = 30  # seconds that one is kept; a target that closes it earlier does no harm


class KeptStreams:
    """Those of one session. Any thread."""

    def __init__(self):
        self._by_hostname = {}  # hostname: deque of (monotonic time, Stream), the freshest last
        self._all = set()  # the streams in it
        self._held_up = {}  # hostname: id of the newest Stream that give_up() was called for
        self._closed = False
        self._lock = threading.Lock()  # guards these four

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
        fit = stream.window <= START_WINDOW
        # Before the stream is in the pool: there another thread may take it up at once.
        if not (fit and stream.rest(functools.partial(self._drop_one, hostname, stream))):
            stream.close()
        elif not self._put(hostname, stream):
            stream.close()
        elif not stream.quiet:  # it ended before it was in the pool, where it was looked for
            self._drop_one(hostname, stream)

    def _put(self, hostname, stream):
        with self._lock:
            kept = self._by_hostname.setdefault(hostname, deque())
            room = len(kept) < OF_A_HOSTNAME and len(self._all) < OF_A_SESSION
            if not room or self._closed or hostname in self._held_up:
                return False
            kept.append((monotonic(), stream))
            self._all.add(stream)
            return True

    def _drop_one(self, hostname, stream):
        """Close a stream if it is still here, and has not been taken up."""
        with self._lock:
            if stream not in self._all:
                return
            self._all.remove(stream)
            kept = self._by_hostname[hostname]
            kept.remove(next(entry for entry in kept if entry[1] is stream))
        stream.close()

    def make_way(self, hostname):
        """A new stream is about to be opened: close the kept one if there is one alone, as a target
        has that serves one connection at a time. Others open it again at little cost."""
        with self._lock:
            kept = self._by_hostname.get(hostname)
            stream = kept.pop()[1] if kept and len(kept) == 1 else None
            self._all.discard(stream)
        if stream is not None:
            stream.close()

    def give_up(self, hostname, waiting):
        """A new Stream waits for its answer: close those kept of its hostname, and keep none until
        served() is called for it or for a newer one."""
        with self._lock:
            self._held_up[hostname] = max(waiting.id, self._held_up.get(hostname, 0))
            dropped = [entry[1] for entry in self._by_hostname.pop(hostname, ())]
            self._all.difference_update(dropped)
        for stream in dropped:
            stream.close()

    def served(self, hostname, stream):
        """The target has answered on a new Stream, or nobody waits for it any more."""
        if not self._held_up:  # as almost always: spare each answer the lock
            return
        with self._lock:
            if self._held_up.get(hostname, stream.id + 1) <= stream.id:
                del self._held_up[hostname]

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


class OwnStreams:
    """Streams that belong to one owner each (a visitor's connection, see visitors/login.py), idle
    until its next request. Any thread."""

    def __init__(self):
        self._by_owner = {}  # owner: (monotonic time, hostname, Stream), the oldest first
        self._closed = False
        self._lock = threading.Lock()  # guards both

    def streams(self) -> set:
        """Those that are idle now."""
        with self._lock:
            return {entry[2] for entry in self._by_owner.values()}

    def pop(self, owner, hostname):
        """The owner's Stream, which may have died since; None if there is none of that hostname."""
        with self._lock:
            _, kept_for, stream = self._by_owner.get(owner, (None, None, None))
            if kept_for != hostname:
                return None
            del self._by_owner[owner]
            return stream

    def put(self, owner, hostname, stream):
        """Keep a stream, or close it if it is not fit for that. The owner has none here."""
        if not stream.rest(stream.close):
            stream.close()
            return
        with self._lock:
            ended = stream if self._closed else None
            if ended is None:
                if len(self._by_owner) >= OWN_OF_A_SESSION:
                    ended = self._by_owner.pop(next(iter(self._by_owner)))[2]
                self._by_owner[owner] = (monotonic(), hostname, stream)
        if ended is not None:
            ended.close()

    def drop(self, owner):
        """Close the owner's stream, if there is one."""
        with self._lock:
            entry = self._by_owner.pop(owner, None)
        if entry is not None:
            entry[2].close()

    def close_old(self):
        """Close those that were idle for MOST_AGE."""
        self._drop(kept_before=monotonic() - MOST_AGE)

    def close(self):
        """Close all, and whatever is still put here."""
        with self._lock:
            self._closed = True
        self._drop(kept_before=float("inf"))

    def _drop(self, kept_before):
        with self._lock:
            owners = [owner for owner, kept in self._by_owner.items() if kept[0] < kept_before]
            dropped = [self._by_owner.pop(owner)[2] for owner in owners]
        for stream in dropped:
            stream.close()
