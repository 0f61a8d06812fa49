"""Follows the visits as they end, and makes the state document of them and of the gateway's parts.

`Live` is a Subscriber of visits (visitors/visits.py): it counts visits by the second, and keeps the
last MOST_KEPT of them. `Overview` is the state document: one build serves all that ask for it. A
`Feed` is one reader of live events (events.py): poll() gives its events that are due.

No visit waits for a reader. A Feed remembers only the number of the last visit that it has had. If
it comes too late, the visits that Live no longer has are counted as missed.

Rates and ages are by the monotonic clock: a clock that is set changes only the times that are
shown.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from time import monotonic
from typing import NamedTuple

from ..visitors.visit import Visit
from .state import SPARK, Document, Rates, Seen, of_visit, seen

MOST_KEPT = 500  # visits, at most 3 KiB each; also the most that a reader may be behind
MOST_SHOWN = 100  # of them in a state document
# Seconds between two looks of a Feed whether the state has changed, and between two events with
# visits.
EVERY, VISITS_EVERY = 2.0, 0.25
# Seconds that a document may be old when it is asked for. A build for 500 hostnames takes some
# 10 ms of CPU; a program that asks all the time causes no more of them.
FRESH = 0.25
# Builds take at most one part in so many of the time: with many hostnames they come less often.
SPARSE = 20

_encode = json.JSONEncoder(separators=(",", ":")).encode  # ASCII alone, so never two lines


class Event(NamedTuple):
    """A server-sent event: its name, and its data as one line of JSON."""

    name: str
    data: str


class Live:
    """Counts visits, and keeps the last. Any thread."""

    def __init__(self, now: Callable[[], float] = monotonic):
        self._now = now
        self._lock = threading.Lock()  # guards all below
        self._last: deque[Seen] = deque(maxlen=MOST_KEPT)
        self._number = 0  # of the last visit, counted from 1
        self._second = int(now())  # the present one, which is not full yet
        self._counts: dict[str, int] = {}  # visits in it, by hostname as agents spell it
        self._total = 0  # visits in it
        # The full seconds before it, the latest last.
        self._earlier: deque[tuple[int, dict[str, int]]] = deque(maxlen=SPARK)

    def __call__(self, visits: Sequence[Visit]) -> None:
        """Visits have ended. Those of the dashboard itself are left out: a page that is open would
        show itself."""
        kept = [seen(visit) for visit in visits if not visit.is_local]
        with self._lock:
            self._roll()
            counts = self._counts
            for visit in visits:
                route = visit.route
                if route is not None:
                    counts[route.hostname] = counts.get(route.hostname, 0) + 1
            self._total += len(kept)
            self._number += len(kept)
            self._last += kept

    def _roll(self) -> None:
        """Begin the present second, if that is not done. Caller holds the lock."""
        second = int(self._now())
        gone = second - self._second
        if gone <= 0:
            return
        self._earlier.append((self._total, self._counts))
        self._earlier.extend((0, {}) for _ in range(min(gone - 1, SPARK)))
        self._second, self._counts, self._total = second, {}, 0

    def rates(self) -> Rates:
        with self._lock:
            self._roll()
            earlier = list(self._earlier)
        total = [0] * SPARK
        by_hostname: dict[str, list[int]] = {}
        for at, (count, counts) in enumerate(earlier, SPARK - len(earlier)):
            total[at] = count
            for hostname, number in counts.items():
                if hostname not in by_hostname:
                    by_hostname[hostname] = [0] * SPARK
                by_hostname[hostname][at] = number
        return Rates(total, by_hostname)

    def since(self, number: int, most: int = MOST_KEPT) -> tuple[int, list[Seen]]:
        """The visits after the one with that ``number``, or the last ``most`` of them, and the
        number of the last one."""
        with self._lock:
            count = min(self._number - number, most, len(self._last))
            found = list(islice(self._last, len(self._last) - count, None)) if count > 0 else []
            return self._number, found

    def last(
        self, most: int = MOST_SHOWN, hostname: str = "", failed: bool | None = None
    ) -> list[Document]:
        """The last visits, the newest last; those of a ``hostname``, if it is not "", and those
        that ``failed``, or did not."""
        if most <= 0:
            return []
        number, found = self.since(0, MOST_KEPT if hostname or failed is not None else most)
        wanted = [
            (visit, at) for at, visit in enumerate(found, number - len(found) + 1)
            if hostname in ("", visit.hostname) and failed in (None, visit.failed)
        ]  # fmt: skip
        return [of_visit(visit, at) for visit, at in wanted[-most:]]


class Built(NamedTuple):
    """A state document. ``version`` is another one if more than the time has changed. ``visits``
    are the last ones, the last of which has that ``number``."""

    version: int
    at: float  # monotonic, when it was built
    document: Document  # without the visits
    text: str  # its JSON
    steady: str  # what is compared
    number: int
    visits: Sequence[Seen]


class Overview:
    """The state document, built when it is asked for. Any thread."""

    def __init__(
        self,
        describe: Callable[[], Document],
        live: Live | None = None,
        now: Callable[[], float] = monotonic,
    ):
        """``describe()`` makes a document without visits, ``live`` has these; None: it never has
        any."""
        self._describe = describe
        self._live = live
        self._now = now
        self._built: Built | None = None
        self._took = 0.0  # seconds that the last build took
        self._is_stale = False  # an act has changed something
        self._is_building = False  # a thread does
        self._texts: dict[int, str] = {}  # JSON of visits, by number
        # Guards the five above; notified when a build has ended.
        self._changed = threading.Condition()

    def touch(self) -> None:
        """An act has changed something: the next document is a new one."""
        with self._changed:
            self._is_stale = True

    def document(self) -> Document:
        built = self._get()
        if self._live is None:
            return built.document
        first = built.number - len(built.visits) + 1
        visits = [of_visit(visit, at) for at, visit in enumerate(built.visits, first)]
        return {**built.document, "visits": visits}

    def text(self) -> str:
        """The document as JSON."""
        return self._whole(self._get())

    def feed(self) -> Feed:
        """For a new reader of live events."""
        return Feed(self, self._live, self._now)

    def _whole(self, built: Built) -> str:
        if self._live is None:
            return built.text
        return f'{built.text[:-1]},"visits":{self._list(built.visits, built.number)}}}'

    def _get(self, *, for_feed: bool = False) -> Built:
        """The document as it is now, or was FRESH seconds ago; for a Feed, EVERY seconds."""
        with self._changed:
            while self._is_building:
                self._changed.wait()
            before, now = self._built, self._now()
            if before is not None and not self._is_stale:
                least = EVERY if for_feed else FRESH
                if now < before.at + max(least, SPARSE * self._took):
                    return before
            self._is_building, self._is_stale = True, False
        built = None
        try:
            built = self._build(before)
            return built
        finally:
            with self._changed:
                self._is_building = False
                if built is not None:
                    self._built, self._took = built, self._now() - built.at
                self._changed.notify_all()

    def _build(self, before: Built | None) -> Built:
        at = self._now()
        document = self._describe()
        number, visits = (0, []) if self._live is None else self._live.since(0, MOST_SHOWN)
        gateway = document["gateway"]
        rest = _encode({key: document[key] for key in document if key != "gateway"})
        # The time passes; that alone is no news.
        told = {key: gateway[key] for key in gateway if key not in ("now", "uptime_seconds")}
        steady = _encode(told) + rest
        version = 1 if before is None else before.version + (steady != before.steady)
        text = f'{{"gateway":{_encode(gateway)},{rest[1:]}'
        return Built(version, at, document, text, steady, number, visits)

    def _list(self, visits: Sequence[Seen], number: int) -> str:
        """JSON of visits, the last of which has that ``number``."""
        return f"[{','.join(map(self._text, visits, range(number - len(visits) + 1, number + 1)))}]"

    def _text(self, visit: Seen, number: int) -> str:
        """JSON of one visit: made once for all readers."""
        text = self._texts.get(number)
        if text is None:
            text = _encode(of_visit(visit, number))
            with self._changed:
                self._texts[number] = text
                if len(self._texts) > 2 * MOST_KEPT:
                    oldest = number - MOST_KEPT
                    self._texts = {at: kept for at, kept in self._texts.items() if at > oldest}
        return text


class Feed:
    """The events for one reader. One thread at a time."""

    def __init__(self, overview: Overview, live: Live | None, now: Callable[[], float]):
        self._overview = overview
        self._live = live
        self._now = now
        self._version = 0  # of the last state that it has had; 0: none
        self._number = 0  # of the last visit that it has had
        self._visits_at = 0.0  # monotonic: not earlier

    def poll(self) -> list[Event]:
        """The events that are due; call it every VISITS_EVERY seconds. Waits for a build of the
        state at most.

        The first event is a whole state. Later states leave the visits out: these come in events of
        their own."""
        built = self._overview._get(for_feed=True)
        if self._version == 0:
            self._version, self._number = built.version, built.number
            return [Event("state", self._overview._whole(built))]
        events = []
        if built.version != self._version:
            self._version = built.version
            events.append(Event("state", built.text))
        if self._live is not None and self._now() >= self._visits_at:
            number, visits = self._live.since(self._number)
            if number != self._number:
                missed = number - self._number - len(visits)
                self._number, self._visits_at = number, self._now() + VISITS_EVERY
                told = self._overview._list(visits, number)
                events.append(Event("visits", f'{{"visits":{told},"missed":{missed}}}'))
        return events
