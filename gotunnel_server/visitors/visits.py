"""Begins the records of visits, and hands each to the subscribers at its end.

A subscriber is a plain function of one Visit (visit.py): the access log, the metrics, the
dashboard's counts. They are decided when the gateway starts. Without any, there is no Visits, no
record is made, and a visit costs one comparison.

    recording.py in the hall chooses the subscribers; port.Port has the Visits, or None
"""

import logging
from collections.abc import Callable, Sequence
from time import monotonic, time
from typing import Protocol

from gotunnel_agent.common.relay import RelayEnd

from . import visit as words  # the words that a Visit says of its end: LEFT, SLOW, CUT
from .forwarded import Proxies
from .visit import Visit

log = logging.getLogger("gotunnel.visits")

# Called by the thread that has served the visit, after its answer was sent. It must wait for
# nothing, and return soon: the visitor's next request may be waiting.
Subscriber = Callable[[Visit], object]


class Visits:
    """The subscribers, and the records that are made for them. Any thread."""

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

    def begin(self, visitor: str) -> Visit:
        """``visitor``: the IP address of its connection."""
        return Visit(self, visitor, monotonic())

    def emit(self, visit: Visit) -> None:
        """The visit is over; only for Visit.end(). A subscriber that raises has a bug, which is
        logged, and hurts neither the visit nor the other subscribers."""
        visit.duration = monotonic() - visit.began
        visit.at = time() - visit.duration
        for subscriber in self._subscribers:
            try:
                subscriber(visit)
            except Exception:
                log.exception("a visit is not recorded (bug, traceback follows)")


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
