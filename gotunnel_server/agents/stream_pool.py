"""Connection pools: streams that an earlier visit left in good order, kept for later visits.

A kept stream spares the next visit a new connection between agent and target. It holds such a
connection meanwhile, so none is kept for long.

If the agent sends anything on a kept stream, bytes or its end, the stream is closed at that moment
(Stream.rest()) and leaves the pool. Bytes would belong to an earlier visit, and must not be taken
for the answer to the next one (response desynchronisation).

A target may serve one connection at a time (http.server.HTTPServer, small devices). At such a
target the idle connection of a kept stream blocks every new one. So when a new stream waits for its
answer, the pool closes the kept streams of its hostname (give_up()). It keeps none for that
hostname until the target has accepted the new connection. Targets accept in order: an answer on
that stream, or on a newer one, shows it.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from time import monotonic
from typing import Any

from gotunnel import START_WINDOW, Stream

# Kept streams, at most: a busy page has as many visitors at once. A visit that finds none costs a
# new stream, and its target a new connection.
OF_A_HOSTNAME = 128
OF_A_SESSION = 256  # kept streams of all its hostnames; an agent takes 1024 streams in all
# Idle streams of a session that logins (NTLM) have bound to one visitor's connection each: half of
# what an agent takes. Beyond it the oldest is closed, and its visitor signs in again.
OWN_OF_A_SESSION = 512
MOST_AGE = 30  # seconds that a stream is kept; a target may close it earlier


class KeptStreams:
    """The kept streams of one session, for any visitor. Any thread."""

    def __init__(self) -> None:
        # Hostname: (monotonic time, stream), the freshest last.
        self._by_hostname: dict[str, deque[tuple[float, Stream]]] = {}
        self._all: set[Stream] = set()  # the streams in it
        # Hostnames whose visits are held up: a new stream has no answer yet, so no other stream is
        # kept. The value is the id of the newest stream that give_up() was called for.
        self._held_up: dict[str, int] = {}
        self._closed = False
        self._lock = threading.Lock()  # guards these four

    def __contains__(self, stream: Stream) -> bool:
        with self._lock:
            return stream in self._all

    def pop(self, hostname: str) -> Stream | None:
        """The freshest stream of a hostname, which may have died since it was kept; or None."""
        with self._lock:
            kept = self._by_hostname.get(hostname)
            if not kept:
                return None
            stream = kept.pop()[1]
            self._all.remove(stream)
            return stream

    def put(self, hostname: str, stream: Stream) -> None:
        """Keep a stream, or close it if it is not fit for that, or if there is no room."""
        # A flow control window that has grown takes memory until its stream ends.
        fit = stream.window <= START_WINDOW
        # rest() comes before the stream is in the pool, where another thread may take it at once.
        if not (fit and stream.rest(functools.partial(self._drop_one, hostname, stream))):
            stream.close()
        elif not self._put(hostname, stream):
            stream.close()
        elif not stream.quiet:  # it ended before it was in the pool: rest()'s call missed it
            self._drop_one(hostname, stream)

    def _put(self, hostname: str, stream: Stream) -> bool:
        with self._lock:
            kept = self._by_hostname.setdefault(hostname, deque())
            room = len(kept) < OF_A_HOSTNAME and len(self._all) < OF_A_SESSION
            if not room or self._closed or hostname in self._held_up:
                return False
            kept.append((monotonic(), stream))
            self._all.add(stream)
            return True

    def _drop_one(self, hostname: str, stream: Stream) -> None:
        """Close a stream if it is still in the pool."""
        with self._lock:
            if stream not in self._all:
                return
            self._all.remove(stream)
            kept = self._by_hostname[hostname]
            kept.remove(next(entry for entry in kept if entry[1] is stream))
        stream.close()

    def make_way(self, hostname: str) -> None:
        """A new stream is about to be opened: close the kept one if it is the only one. Its target
        may serve one connection at a time; for another target this costs little."""
        with self._lock:
            kept = self._by_hostname.get(hostname)
            stream = kept.pop()[1] if kept and len(kept) == 1 else None
            if stream is not None:
                self._all.discard(stream)
        if stream is not None:
            stream.close()

    def give_up(self, hostname: str, waiting: Stream) -> None:
        """The new stream ``waiting`` has no answer yet: close the kept streams of its hostname, and
        keep none until served() is called for it or for a newer one."""
        with self._lock:
            self._held_up[hostname] = max(waiting.id, self._held_up.get(hostname, 0))
            dropped = [entry[1] for entry in self._by_hostname.pop(hostname, ())]
            self._all.difference_update(dropped)
        for stream in dropped:
            stream.close()

    def forget(self, hostname: str) -> None:
        """Close the streams of a hostname that is no longer served by this session."""
        with self._lock:
            dropped = [entry[1] for entry in self._by_hostname.pop(hostname, ())]
            self._all.difference_update(dropped)
        for stream in dropped:
            stream.close()

    def served(self, hostname: str, stream: Stream) -> None:
        """The target has answered on a new stream, or the stream's visit has ended without that."""
        if not self._held_up:  # nearly always: spare each answer the lock
            return
        with self._lock:
            if self._held_up.get(hostname, stream.id + 1) <= stream.id:
                del self._held_up[hostname]

    def close_old(self) -> None:
        """Close the streams that were kept for MOST_AGE."""
        self._drop(kept_before=monotonic() - MOST_AGE)

    def close_all(self) -> None:
        """Close the streams that are here now."""
        self._drop(kept_before=float("inf"))

    def close(self) -> None:
        """Close all streams, and from now on each one that is put here."""
        with self._lock:
            self._closed = True
        self.close_all()

    def _drop(self, kept_before: float) -> None:
        dropped = []
        with self._lock:
            for kept in self._by_hostname.values():
                while kept and kept[0][0] < kept_before:
                    dropped.append(kept.popleft()[1])
            self._all.difference_update(dropped)
        for stream in dropped:
            stream.close()


class OwnStreams:
    """The kept streams of one session that belong to one owner each (a visitor's connection, see
    visitors/login.py). Any thread."""

    def __init__(self) -> None:
        # Owner: (monotonic time, hostname, stream), the oldest first.
        self._by_owner: dict[Any, tuple[float, str, Stream]] = {}
        self._closed = False
        self._lock = threading.Lock()  # guards both

    def streams(self) -> set[Stream]:
        """The streams that are here now."""
        with self._lock:
            return {entry[2] for entry in self._by_owner.values()}

    def pop(self, owner: object, hostname: str) -> Stream | None:
        """The owner's stream, which may have died since; None if there is none of that hostname."""
        with self._lock:
            entry = self._by_owner.get(owner)
            if entry is None or entry[1] != hostname:
                return None
            del self._by_owner[owner]
            return entry[2]

    def put(self, owner: object, hostname: str, stream: Stream) -> None:
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

    def drop(self, owner: object) -> None:
        """Close the owner's stream, if there is one."""
        with self._lock:
            entry = self._by_owner.pop(owner, None)
        if entry is not None:
            entry[2].close()

    def forget(self, hostname: str) -> None:
        """As KeptStreams.forget()."""
        with self._lock:
            owners = [owner for owner, kept in self._by_owner.items() if kept[1] == hostname]
            dropped = [self._by_owner.pop(owner)[2] for owner in owners]
        for stream in dropped:
            stream.close()

    def close_old(self) -> None:
        """Close the streams that were kept for MOST_AGE."""
        self._drop(kept_before=monotonic() - MOST_AGE)

    def close(self) -> None:
        """Close all streams, and from now on each one that is put here."""
        with self._lock:
            self._closed = True
        self._drop(kept_before=float("inf"))

    def _drop(self, kept_before: float) -> None:
        with self._lock:
            owners = [owner for owner, kept in self._by_owner.items() if kept[0] < kept_before]
            dropped = [self._by_owner.pop(owner)[2] for owner in owners]
        for stream in dropped:
            stream.close()
