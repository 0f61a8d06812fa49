"""What the inspector keeps of visits: a Record of each, in a Ring within a budget of bytes.

The threads of visits write here and never wait for a reader: a Ring holds its lock for a few steps
at a time, and a reader that is slow misses changes, which its Subscription counts.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from .kept import Kept as Kept

OPEN, ENDED = "open", "ended"

# Bytes that a record costs besides its texts and bodies, and a message besides its data: objects,
# numbers, places in tables. A test compares them with what Python allocates.
RECORD_COST = 1100
MESSAGE_COST = 230

# Of a record, the latest messages that are kept: so many, and with at most a SHARE of the budget.
# Otherwise one WebSocket would take the place of all other visits.
MOST_MESSAGES = 1000
SHARE = 8
# Records that have changed, and events, which wait for one reader. Of more, the oldest are lost.
MOST_CHANGES = 500
# Seconds between the first change and the return of take(): changes come in crowds, and a reader
# that is woken for each takes the GIL from the visits.
CROWD = 0.1


class Message(NamedTuple):
    """A message of a WebSocket, or an event of a text/event-stream.

    ``at`` is wall-clock time. ``kind`` is "text", "binary", "ping", "pong", "close", or "event".
    ``data`` is its beginning, decompressed if it was compressed and could be; ``size`` is the size
    of the whole as it passed. ``note`` says in words what is odd about it.
    """

    at: float
    from_visitor: bool
    kind: str
    data: bytes
    size: int
    note: str = ""


@dataclass(slots=True, eq=False)
class Record:
    """One request and its answer, as far as they have come.

    ``id`` grows; the Ring gives it. ``target`` is the configuration's. ``visitor`` is the address
    that the gateway has told, "" if it has told none. ``began`` is wall-clock time, ``duration``
    and ``first_byte`` (the final answer's head was whole) are in seconds from there; None: not yet.
    ``method`` and ``path`` are "" if the visit could not be followed, ``status`` is 0 without an
    answer. The heads are the bytes as they passed. ``interim`` are the heads of 1xx answers.
    ``problem`` says why the visit is not whole or not followed. ``replay_of`` is the id of the
    record that this one repeats; ``imported``: it comes from a file.

    Threads of visits change it while it is open. Each attribute is replaced, never changed in
    place, but for the bodies and messages: read these by their properties, which copy.
    """

    id: int = 0
    hostname: str = ""
    mode: str = "http"
    target: str = ""
    visitor: str = ""
    began: float = 0.0
    duration: float | None = None
    first_byte: float | None = None
    method: str = ""
    path: str = ""
    status: int = 0
    request_head: bytes = b""
    response_head: bytes = b""
    interim: tuple[bytes, ...] = ()
    request_body: Kept = Kept()
    response_body: Kept = Kept()
    request_trailers: tuple[tuple[str, str], ...] = ()
    response_trailers: tuple[tuple[str, str], ...] = ()
    problem: str = ""
    replay_of: int | None = None
    imported: bool = False
    state: str = ENDED
    dropped: int = 0  # messages that were kept and are not any more
    _messages: list[Message] | None = None  # made when the first one comes
    _message_bytes: int = 0  # what the messages cost
    working: int = 0  # bytes that reading its messages takes, while it is open
    charged: int = 0  # bytes that the ring counts for it; the ring's lock guards it

    @property
    def messages(self) -> list[Message]:
        return [] if self._messages is None else self._messages[:]

    @property
    def message_count(self) -> int:
        return 0 if self._messages is None else len(self._messages)

    def add_message(self, message: Message, most_bytes: int) -> int:
        """Keep a message, and forget the oldest ones if all cost more than ``most_bytes`` or are
        more than MOST_MESSAGES. Returns how many bytes the record takes more. For the thread that
        writes the record."""
        if self._messages is None:
            self._messages = []
        messages, before = self._messages, self._message_bytes
        messages.append(message)
        self._message_bytes += _cost_of(message)
        if self._message_bytes <= most_bytes and len(messages) <= MOST_MESSAGES:
            return self._message_bytes - before
        # A quarter at once: deleting from the front moves all the others.
        gone = 0
        while gone < len(messages) and (
            self._message_bytes > most_bytes * 3 // 4
            or len(messages) - gone > MOST_MESSAGES * 3 / 4
        ):
            self._message_bytes -= _cost_of(messages[gone])
            gone += 1
        del messages[:gone]
        self.dropped += gone
        return self._message_bytes - before

    def cost(self) -> int:
        """Bytes that the record takes in memory, about."""
        return (
            RECORD_COST
            + len(self.request_head)
            + len(self.response_head)
            + len(self.path)
            + len(self.hostname)
            + len(self.problem)
            + len(self.request_body.data)
            + len(self.response_body.data)
            + self._message_bytes
            + self.working
            + (sum(map(len, self.interim)) if self.interim else 0)
            + _cost_of_fields(self.request_trailers)
            + _cost_of_fields(self.response_trailers)
        )


def _cost_of(message: Message) -> int:
    return MESSAGE_COST + len(message.data) + len(message.note)


def _cost_of_fields(fields: tuple[tuple[str, str], ...]) -> int:
    return sum(250 + len(name) + len(value) for name, value in fields) if fields else 0


class Changes(NamedTuple):
    """What a reader has not been told yet.

    ``records`` are new or have changed, by id. Records with an id below ``oldest`` are gone.
    ``events`` are those of Ring.tell(). ``missed``: so many changes and events were lost, as the
    reader was slow; Ring.all() has what there is.
    """

    records: list[Record]
    oldest: int
    events: list[tuple[str, object]]
    missed: int


class Subscription:
    """A reader of a Ring's changes. Use it in a ``with`` block, or call close()."""

    def __init__(self, ring: Ring):
        self._ring = ring
        self._news = threading.Event()  # there is something to take, or close() was called
        self._closed = threading.Event()
        # The ring's lock guards these.
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._events: list[tuple[str, object]] = []
        self._missed = 0

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, timeout: float | None = None) -> Changes | None:
        """Wait until something has changed, ``timeout`` seconds at most (None: for ever), and a
        CROWD longer. None if nothing has, or after close()."""
        if not self._news.wait(timeout) or self._closed.wait(CROWD):
            return None
        return self.take_now()

    def take_now(self) -> Changes:
        """What has changed, without waiting."""
        ring = self._ring
        with ring._lock:
            if not self._closed.is_set():
                self._news.clear()
            records, self._records = self._records, OrderedDict()
            events, self._events = self._events, []
            missed, self._missed = self._missed, 0
            oldest = ring._oldest()
        found = [record for number, record in records.items() if number >= oldest]
        return Changes(sorted(found, key=lambda record: record.id), oldest, events, missed)

    def close(self) -> None:
        """take() returns None from now on. Any thread."""
        with self._ring._lock:
            self._ring._subscriptions.discard(self)
        self._closed.set()
        self._news.set()

    # Called by the ring, with its lock

    def _note(self, record: Record) -> None:
        self._records[record.id] = record
        if len(self._records) > MOST_CHANGES:
            self._records.popitem(last=False)
            self._missed += 1
        self._wake()

    def _tell(self, event: tuple[str, object]) -> None:
        self._events.append(event)
        if len(self._events) > MOST_CHANGES:
            del self._events[0]
            self._missed += 1
        self._wake()

    def _wake(self) -> None:
        if not self._news.is_set():
            self._news.set()


class Ring:
    """The latest records, as many as a budget of bytes holds: the oldest go first, open ones as
    well. Any thread may call any method."""

    def __init__(self, budget: int):
        """``budget`` is in bytes, see Record.cost()."""
        self.budget = budget
        self._lock = threading.Lock()  # guards all below
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._last = 0  # the id that was given last
        self._used = 0
        self._subscriptions: set[Subscription] = set()

    def add(self, record: Record) -> Record:
        """Give a new record its id, and keep it."""
        cost = record.cost()
        with self._lock:
            self._last += 1
            record.id = self._last
            self._records[record.id] = record
            self._charge(record, cost)
            self._changed(record)
        return record

    def update(self, record: Record) -> bool:
        """A record has changed: count it anew, and tell the readers. False if it is gone."""
        cost = record.cost()
        with self._lock:
            if record.id not in self._records:
                return False
            self._charge(record, cost - record.charged)
            self._changed(record)
            return record.id in self._records

    def grow(self, record: Record, count: int) -> bool:
        """A record takes ``count`` bytes more, which are not worth telling the readers yet. False
        if it is gone."""
        with self._lock:
            if record.id in self._records:
                self._charge(record, count)
            return record.id in self._records

    def all(self) -> list[Record]:
        """All records, the oldest first."""
        with self._lock:
            return list(self._records.values())

    def get(self, number: int) -> Record | None:
        with self._lock:
            return self._records.get(number)

    def clear(self) -> None:
        """Forget all records. Open visits are not kept any more."""
        with self._lock:
            self._records.clear()
            self._used = 0
            for subscription in self._subscriptions:
                subscription._wake()  # Changes.oldest says it

    def set_budget(self, budget: int) -> None:
        with self._lock:
            self.budget = budget
            self._keep_budget()

    @property
    def used(self) -> int:
        """Bytes that the records take."""
        return self._used

    def __len__(self) -> int:
        return len(self._records)

    def subscribe(self) -> Subscription:
        """A reader of what changes from now on."""
        subscription = Subscription(self)
        with self._lock:
            self._subscriptions.add(subscription)
        return subscription

    def tell(self, event: str, value: object) -> None:
        """Tell the readers something else than a change of a record, such as how a replay goes."""
        with self._lock:
            for subscription in self._subscriptions:
                subscription._tell((event, value))

    # With the lock

    def _charge(self, record: Record, count: int) -> None:
        record.charged += count
        self._used += count
        self._keep_budget()

    def _keep_budget(self) -> None:
        while self._used > self.budget and self._records:
            _, oldest = self._records.popitem(last=False)
            self._used -= oldest.charged

    def _changed(self, record: Record) -> None:
        for subscription in self._subscriptions:
            subscription._note(record)

    def _oldest(self) -> int:
        return next(iter(self._records), self._last + 1)
