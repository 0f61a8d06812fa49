"""Sends the dashboard's live events to its readers: server-sent events (HTML standard, 9.2).

A reader is a browser tab or a program. It has a thread of its own, as a relay has, so it takes no
worker from visitors. The thread asks a `Source` every POLL seconds which events are due; nobody
waits for it. A reader that reads nothing is cut (relays.FEED_STALL), and may connect again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from time import monotonic
from typing import Protocol

from gotunnel_agent.common.addresses import counted_by

from ..visitors.request import Feed, FeedEnd, Request
from .calls import May, Refused, Who

# Threads of some 65 kB each. An operator has a few tabs; programs should ask for the state instead.
MOST_READERS = 32
# IPv6 addresses are counted by /64. Browsers open 6 connections to a host by HTTP/1.1: with 6
# readers, no other request of that browser would get one.
MOST_OF_ADDRESS = 4
POLL = 0.25  # seconds between two looks for events: a person sees no difference
LOOK = 2.0  # seconds between two looks whether the reader has left, or may not read any more
PING_EVERY = 15.0  # seconds without an event, then a comment, so that no proxy cuts the connection
RETRY = 2000  # milliseconds after which a browser whose connection broke connects again

FIELDS = (
    ("Content-Type", "text/event-stream"),
    ("Cache-Control", "no-store"),
    ("X-Accel-Buffering", "no"),  # asks nginx not to hold events back
    ("X-Content-Type-Options", "nosniff"),
    ("Server", "gotunnel"),
    ("Connection", "close"),  # the answer ends with the connection; HTTP/2 has no such field
)


class Event(Protocol):
    """A name, and one line of JSON."""

    @property
    def name(self) -> str: ...

    @property
    def data(self) -> str: ...


class Source(Protocol):
    """Where the events of one reader come from. One thread at a time."""

    def poll(self) -> Iterable[Event]:
        """The events that are due now, the whole state as the first one; waits for nothing."""


class Reader:
    """One reader. ``who`` may read until ``who.is_valid()`` says no."""

    def __init__(self, who: Who):
        self.who = who
        self.key: Hashable = counted_by(who.address)
        self.is_over = False  # it is to end
        self.gone: Callable[[], bool] = lambda: False  # see request.Feed


class Events:
    """All readers. Any thread."""

    def __init__(self, source: Callable[[May], Source], now: Callable[[], float] = monotonic):
        """``source(may)``: the events for a new reader that may do so much."""
        self._source = source
        self._now = now
        self._lock = threading.Lock()  # guards the rest
        self._ended = threading.Condition(self._lock)  # notified when readers are to end
        self._readers: dict[Reader, None] = {}  # in the order of their coming
        self._counted: Counter[Hashable] = Counter()
        self._is_draining = False

    @property
    def taken(self) -> int:
        """How many readers there are."""
        with self._lock:
            return len(self._readers)

    def serve(self, request: Request, who: Who) -> None:
        """Make the caller a reader. Raises Refused if there is no place, OSError."""
        reader = self._enter(who)
        feed = Feed(lambda end, gone: self._run(reader, end, gone), lambda: self._leave(reader))
        try:
            begun = request.switch(200, "OK", list(FIELDS), b"retry: %d\n\n" % RETRY, feed)
        except BaseException:
            self._leave(reader)
            raise
        if not begun:
            self._leave(reader)
            raise _full("The gateway has too many open connections.")

    def drain(self) -> None:
        """The gateway stops: end all readers, and take none any more."""
        with self._lock:
            self._is_draining = True
            for reader in self._readers:
                reader.is_over = True
            self._ended.notify_all()

    # Places

    def _enter(self, who: Who) -> Reader:
        reader = Reader(who)
        with self._lock:
            if self._is_draining:
                raise _full("The gateway is about to stop.")
            if self._is_full(reader.key):
                # A tab that was closed or loaded again is noticed when it is written to. Look now:
                # under the lock, as each connection is open until its reader has left.
                for other in list(self._readers):
                    if other.gone():
                        self._drop(other)
                self._ended.notify_all()
            if self._is_full(reader.key):
                raise _full(
                    f"There are {MOST_READERS} readers of live events, or {MOST_OF_ADDRESS} from "
                    "your address. Close a tab, or ask for api/v1/state from time to time."
                )
            self._readers[reader] = None
            self._counted[reader.key] += 1
        return reader

    def _is_full(self, key: Hashable) -> bool:
        return len(self._readers) >= MOST_READERS or self._counted[key] >= MOST_OF_ADDRESS

    def _leave(self, reader: Reader) -> None:
        with self._lock:
            self._drop(reader)

    def _drop(self, reader: Reader) -> None:
        """Caller holds the lock. A second call does nothing."""
        reader.is_over = True
        if reader in self._readers:
            del self._readers[reader]
            self._counted[reader.key] -= 1
            if not self._counted[reader.key]:
                del self._counted[reader.key]

    # A reader's thread

    def _run(self, reader: Reader, end: FeedEnd, gone: Callable[[], bool]) -> None:
        with self._lock:
            reader.gone = gone
        try:
            self._send(reader, end)
            end.finish()
        finally:
            self._leave(reader)  # before the connection is closed: see _enter()

    def _send(self, reader: Reader, end: FeedEnd) -> None:
        source = self._source(reader.who.may)
        sent_at = looked_at = self._now()
        while True:
            now = self._now()
            if now - looked_at >= LOOK:
                looked_at = now
                if reader.gone():
                    return
                if not reader.who.is_valid():
                    end.write(b"event: ended\ndata: {}\n\n")
                    return
            text = "".join(
                f"event: {event.name}\ndata: {event.data}\n\n" for event in source.poll()
            )
            if not text and now - sent_at >= PING_EVERY:
                text = ": ping\n\n"
            if text:
                end.write(text.encode())
                sent_at = self._now()
            with self._lock:
                if self._ended.wait_for(lambda: reader.is_over, POLL):
                    return


def _full(text: str) -> Refused:
    return Refused(503, "too-many-readers", text, (("Retry-After", "5"),))
