"""Begins the records of visits, and hands each to the subscribers soon after its end.

A subscriber is a plain function of some Visits (visit.py): the access log, the counts, the
dashboard. They are decided when the gateway starts. Without any, there is no Visits, no record is
made, and a visit costs one comparison.

Records are handed over in batches. To do that at the end of each visit would cost the visits three
times as much: the code and the data of the subscribers would come into the CPU's caches for one
record, and be driven out by the next request. A batch also costs each subscriber one lock.

    recording.py in the hall chooses the subscribers; port.Port has the Visits, or None
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic, time
from typing import Protocol

from gotunnel import spawn
from gotunnel_agent.common.relay import RelayEnd

from . import visit as words  # the words that a Visit says of its end: LEFT, SLOW, CUT
from .forwarded import Proxies
from .visit import Visit

log = logging.getLogger("gotunnel.visits")

BATCH = 64  # records that the thread of the last of them hands over at once: 0.3 ms of work
DELAY = 0.05  # seconds that a record waits for others, at most
# Records that may wait while a thread hands others over. With so many, threads wait for its end:
# it waits for nothing itself. A record may hold 64 KiB of a head.
MOST_WAITING = 256

# Called by one thread at a time, which may be one that serves visits. It must wait for nothing, and
# one bad record must not cost the others.
Subscriber = Callable[[Sequence[Visit]], object]


class Visits:
    """The subscribers, and the records that are made for them: call start(), then stop(). Any
    thread."""

    def __init__(
        self, subscribers: Sequence[Subscriber], proxies: Proxies, *, ids: bool, detailed: bool
    ):
        """``proxies`` may name the visitors that they stand for. ``ids``: requests get an
        X-Request-Id. ``detailed``: a subscriber reads Visit.referer and user_agent."""
        self.proxies = proxies
        self.proxied = bool(proxies)
        self.ids = ids
        self.detailed = detailed
        self._subscribers = tuple(subscribers)
        self._ended: deque[Visit] = deque()  # records to be handed over
        self._handing_over = threading.Lock()  # held to take records out, and to hand them over
        self._asked = False  # the thread was woken for what waits
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Raises NoThread."""
        self._thread = spawn("visits", self._run)

    def stop(self) -> None:
        """Hand over what waits."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self.settle()

    def begin(self, visitor: str) -> Visit:
        """``visitor``: the IP address of its connection."""
        return Visit(self, visitor, monotonic())

    def emit(self, visit: Visit) -> None:
        """The visit is over; only for Visit.end()."""
        visit.duration = monotonic() - visit.began
        ended = self._ended
        ended.append(visit)
        if len(ended) >= BATCH:
            # Else the thread that has the lock hands this one over, too, or the next one does.
            if self._handing_over.acquire(blocking=len(ended) >= MOST_WAITING):
                self._hand_over()
        elif not self._asked:
            self._asked = True
            self._wake.set()

    def settle(self) -> None:
        """Return when all visits that have ended are handed over."""
        self._handing_over.acquire()
        self._hand_over()

    def _hand_over(self) -> None:
        """Caller has acquired the lock, which is released. A subscriber that raises has a bug,
        which is logged, and hurts neither the visit nor the other subscribers."""
        ended = self._ended
        try:
            batch = [ended.popleft() for _ in range(len(ended))]
            began = time() - monotonic()  # the wall clock's time when the other clock was 0
            for visit in batch:
                visit.at = began + visit.began
            for subscriber in self._subscribers if batch else ():
                try:
                    subscriber(batch)
                except Exception:
                    log.exception("%d visits may not be recorded (bug, traceback follows)",
                                  len(batch))  # fmt: skip
        finally:
            self._handing_over.release()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._stopping.wait(DELAY)
            # In this order: a record that comes meanwhile is handed over below, or wakes us again.
            self._wake.clear()
            self._asked = False
            self.settle()


class End(RelayEnd, Protocol):
    """A visitor's end of a relay: its Duplex, or a wrapper."""

    def died(self) -> bool: ...


class Counted:
    """The relay end of a visitor whose bytes are counted. It also notes which side broke first."""

    def __init__(self, end: End, visit: Visit):
        self._end, self._visit = end, visit
        self.finish = end.finish

    def read(self) -> bytes:
        try:
            data = self._end.read()
        except OSError:
            self._visit.fail(words.LEFT)
            raise
        self._visit.received += len(data)
        return data

    def write(self, data: bytes) -> None:
        visit = self._visit
        if visit.first_byte_at is None:
            visit.first_byte_at = monotonic()
        try:
            self._end.write(data)
        except OSError as error:
            visit.fail(words.SLOW if isinstance(error, TimeoutError) else words.LEFT)
            raise
        visit.sent += len(data)

    def died(self) -> bool:
        died = self._end.died()
        if died:
            self._visit.fail(words.LEFT)
        return died

    # The relay calls these three when one end has broken. If it was this one, that is noted by now.

    def cut(self) -> None:
        self._visit.fail(words.CUT)
        self._end.cut()

    def reset(self) -> None:
        self._visit.fail(words.CUT)
        self._end.reset()

    def stop_reading(self) -> None:
        self._visit.fail(words.CUT)
        self._end.stop_reading()
