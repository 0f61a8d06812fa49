"""Follows the visits of an agent beside the relay: which came, and how they were answered.

A Follower sees the bytes of each visit while they pass between stream and target. It never holds
one back and never changes one; what it cannot read, it counts. An agent without a Follower does
nothing for it, as the methods of a target are replaced for each visit that is followed.

The threads of a visit only note what they pass on. It is read later, many pieces at a time: when
look() or take() is called, when a visit has much that is not read, and at its end. Parsing each
piece at once would cost three times as much, as the threads of all visits would take the GIL and
the processor's caches from each other.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic, sleep, time
from typing import Any, NamedTuple, Protocol

from gotunnel import BytesLike, Stream

from .common.duplex import Duplex
from .common.hostnames import WILDCARD
from .common.http1 import HEAD_LIMIT
from .config import Tunnel
from .dialogue import NOT_FOLLOWED, Counted, Dialogue, Exchange, Hear

log = logging.getLogger("gotunnel.follow")

BAD_GATEWAY = 502  # what the visitor of a target that was not reached gets
KEPT = 1000  # visits that take() has not fetched; of more, the oldest are lost
# Bytes of unfinished heads, of all streams together. A head usually comes whole, and needs none.
MOST_HELD = 4 * 1024 * 1024
# Of one visit, what has passed and was not read: above MUCH bytes or MANY pieces its own threads
# read it. If one of them is slow at that (a million tiny chunks) and the other one goes on, then of
# more than MOST_PIECES the visit is not followed any more.
MUCH = 32 * 1024
MANY = 32
MOST_PIECES = 2 * MANY
# Of a visit whose target was not reached: seconds for the rest of its request to come if a listener
# wants it, and bytes of its body that are read.
BODY_WAIT = 0.2
MOST_MISSED = 1024 * 1024
SLICE = 0.0004  # seconds of reading, see look(): about a hundred pieces
HTTP2 = f"{NOT_FOLLOWED}: HTTP/2"
TOO_FAST = f"{NOT_FOLLOWED}: it came faster than it could be read"


class Seen(NamedTuple):
    """A visit that is over: in http mode one request and its answer, in tcp mode a connection.

    ``hostname`` is the tunnel's; for that of a wildcard, the request's Host. ``method`` and
    ``path`` are "" in tcp mode and if the stream could not be followed; a path is as it came,
    latin-1, with its query. ``status`` is 0 without an answer. ``started`` is wall-clock time,
    ``duration`` is in seconds. ``bytes_in`` and ``bytes_out`` count the content of the request and
    of the answer; after a change of protocol and in tcp mode all bytes. ``problem`` says why the
    visit is not whole or was not followed.
    """

    hostname: str
    method: str
    path: str
    status: int
    started: float
    duration: float
    bytes_in: int
    bytes_out: int
    problem: str = ""
    mode: str = "http"


class Listener(Protocol):
    """Hears of the visits of a Follower. The thread that reads calls it, and calls for different
    visits may come at the same time. It must not block, as the thread may be one of a visit."""

    def began(self, tunnel: Tunnel, exchange: Exchange) -> Hear | None:
        """A request's head is whole, or a stream has begun that is not read (tcp mode, HTTP/2).
        Returns the function that hears the bodies (see dialogue.Hear), or None."""

    def over(self, tunnel: Tunnel, exchange: Exchange) -> None:
        """An exchange is over. It may not have begun before, if no request could be read."""


class Totals(NamedTuple):
    """What a Follower has seen since its start."""

    visits: int  # that are over
    failed: int  # of them, those with a status of 500 or more, or none, or cut short
    bytes_in: int
    bytes_out: int


class Follower:
    """Follows all visits of an agent. Any thread may call any method."""

    def __init__(
        self, on_seen: Callable[[Seen], object] | None = None, *, for_listeners: bool = False
    ):
        """``on_seen(seen)`` is called for each visit that is over, by the thread that reads: see
        look(). It must not block, as the thread may be one of a visit. ``for_listeners``: nobody
        wants what take() and totals() return, so they return nothing."""
        self._on_seen = on_seen
        self._for_listeners = for_listeners
        self._lock = threading.Lock()  # guards all below
        self._live: set[_Followed] = set()
        self._seen: deque[Seen] = deque(maxlen=KEPT)
        self._held = 0  # bytes of unfinished heads
        self._visits = self._failed = self._bytes_in = self._bytes_out = 0  # see Totals
        # Replaced whole, as visits read it unlocked.
        self._listeners: tuple[Listener, ...] = ()
        # A thread waits in await_bytes(); _woken ends that. No lock guards them.
        self.asleep = False
        self._woken = threading.Event()

    def add(self, listener: Listener) -> None:
        """Have ``listener`` hear of the visits on streams that begin from now on."""
        with self._lock:
            self._listeners += (listener,)

    def remove(self, listener: Listener) -> None:
        with self._lock:
            self._listeners = tuple(each for each in self._listeners if each is not listener)

    def follow(self, target: Duplex, tunnel: Tunnel) -> None:
        """Follow a visit from now on until its target is closed."""
        followed = _Followed(self, tunnel)
        with self._lock:
            self._live.add(followed)
        followed.watch(target)

    def missed(self, stream: Stream, tunnel: Tunnel, why: str) -> None:
        """A visit found no target, and is about to be turned away: tell of it, with what has come
        of its request. Waits BODY_WAIT at most, and not without listeners."""
        began = monotonic()
        dialogue = Dialogue(lambda exchange: None, listen=self.listening(tunnel))
        if tunnel.mode == "http" and not tunnel.protocol:
            # What has come is read at once. A listener may want to send the request again when the
            # target is back, which takes all of it, so that has a moment.
            wait = BODY_WAIT if self._listeners else 0.0
            left = HEAD_LIMIT + MOST_MISSED
            with contextlib.suppress(OSError):  # nothing, or nothing more, has come
                while left > 0 and (data := stream.read(left, timeout=wait)):
                    dialogue.asked(data, began)
                    left -= len(data)
                    waited = monotonic() - began
                    wait = max(0.0, BODY_WAIT - waited) if self._awaits_body(dialogue) else 0.0
        exchange = dialogue.current() or Exchange(began)
        exchange.status = BAD_GATEWAY if tunnel.mode == "http" else 0
        exchange.problem, exchange.over = why, monotonic()
        if not exchange.request_head:
            exchange.bytes_in = 0
        self.end(tunnel, exchange)

    def _awaits_body(self, dialogue: Dialogue) -> bool:
        return bool(self._listeners) and dialogue.uploading

    def look(self, rest: float = 0.0) -> None:
        """Read what has passed. To be called a few times a second if visits are to be told soon.
        ``rest``: seconds to sleep after each SLICE of reading. A thread that reads for long keeps
        the GIL for sys.getswitchinterval() at a time, and all visits stand still meanwhile."""
        began = monotonic()
        for followed in self._all():
            followed.look()
            if rest and monotonic() - began > SLICE:
                sleep(rest)
                began = monotonic()

    def await_bytes(self, over: threading.Event) -> None:
        """Wait until there is something to read, for a thread that calls look() then. wake() ends
        it, after ``over`` was set."""
        self._woken.clear()
        self.asleep = True
        # Bytes that were noted before ``asleep`` was set have not woken this thread.
        if over.is_set() or any(followed.has_noted() for followed in self._all()):
            self.asleep = False
            return
        self._woken.wait()

    def wake(self) -> None:
        self.asleep = False
        self._woken.set()

    def take(self) -> list[Seen]:
        """look(), and return the visits that have ended since the last call, KEPT at most."""
        self.look()
        with self._lock:
            seen = list(self._seen)
            self._seen.clear()
        return seen

    def running(self) -> list[Seen]:
        """look(), and return the visits that go on, as far as they have come. Their ``duration`` is
        so far."""
        now = monotonic()
        found = [followed.current(now) for followed in self._all()]
        return [seen for seen in found if seen is not None]

    def totals(self) -> Totals:
        with self._lock:
            return Totals(self._visits, self._failed, self._bytes_in, self._bytes_out)

    def _all(self) -> list[_Followed]:
        with self._lock:
            return list(self._live)

    # Called by _Followed

    def hold(self, count: int) -> bool:
        """See Dialogue."""
        with self._lock:
            if count > 0 and self._held + count > MOST_HELD:
                return False
            self._held += count
            return True

    def listening(self, tunnel: Tunnel) -> Callable[[Exchange], Hear | None] | None:
        """Tells the listeners that an exchange of a tunnel has begun; None if there are none."""
        return partial(self._began, tunnel) if self._listeners else None

    def _began(self, tunnel: Tunnel, exchange: Exchange) -> Hear | None:
        listeners = self._listeners  # those of now: the stream may be older
        if len(listeners) == 1:
            return listeners[0].began(tunnel, exchange)
        heard = [listener.began(tunnel, exchange) for listener in listeners]
        return _joined([hear for hear in heard if hear is not None])

    def end(self, tunnel: Tunnel, exchange: Exchange) -> None:
        """An exchange is over."""
        for listener in self._listeners:
            try:
                listener.over(tunnel, exchange)
            except Exception:
                log.exception("%s: a visit is not kept (bug, traceback follows)", tunnel.hostname)
        if not self._for_listeners:
            self.tell(record(exchange, tunnel, exchange.over))

    def tell(self, seen: Seen) -> None:
        failed = has_failed(seen)
        with self._lock:
            self._seen.append(seen)
            self._visits += 1
            self._failed += failed
            self._bytes_in += seen.bytes_in
            self._bytes_out += seen.bytes_out
        if self._on_seen is not None:
            self._on_seen(seen)

    def forget(self, followed: _Followed) -> None:
        with self._lock:
            self._live.discard(followed)


def _joined(hears: Sequence[Hear]) -> Hear | None:
    if len(hears) < 2:
        return hears[0] if hears else None

    def hear(answered: bool, data: bytes, now: float) -> None:
        for each in hears:
            each(answered, data, now)

    return hear


def has_failed(seen: Seen) -> bool:
    """Whether the target failed: a status of 500 or more, or no whole answer."""
    if not seen.method and seen.problem.startswith(NOT_FOLLOWED):
        return False
    return seen.status >= 500 or bool(seen.problem)


def record(exchange: Exchange, tunnel: Tunnel, now: float) -> Seen:
    """An exchange that is over, or that has come so far by ``now``."""
    hostname = tunnel.hostname
    if hostname.startswith(WILDCARD):
        hostname = exchange.host or hostname
    return Seen(
        hostname,
        exchange.method,
        exchange.target,
        exchange.status,
        time() - (monotonic() - exchange.began),
        now - exchange.began,
        exchange.bytes_in,
        exchange.bytes_out,
        exchange.problem,
        tunnel.mode,
    )


class _Followed:
    """One visit. Its two threads note what passes, in the order in which it passes. One thread at a
    time reads what was noted; if others want to, it goes on with what they have noted, too (flat
    combining)."""

    def __init__(self, follower: Follower, tunnel: Tunnel):
        self._follower, self._tunnel = follower, tunnel
        self._over: deque[Exchange] = deque()  # exchanges to tell of
        # What has passed and was not read yet: (function to call, bytes, monotonic time).
        self._noted: deque[tuple[Callable[[bytes, float], None], bytes, float]] = deque()
        self._bytes = 0  # about so many are noted: no lock guards it
        self._lost = False  # a piece was not noted (MOST_PIECES)
        self._ahead = 0  # bytes at the front of what is written next that were noted already
        self._reading = threading.Lock()  # held by the thread that reads: guards _dialogue
        tell = self._over.append
        self._dialogue: Counted | Dialogue
        if tunnel.mode != "http":
            self._dialogue = Counted(tell, monotonic(), listen=follower.listening(tunnel))
        elif tunnel.protocol:
            self._dialogue = Counted(tell, monotonic(), HTTP2, follower.listening(tunnel))
        else:
            self._dialogue = Dialogue(tell, follower.hold, follower.listening(tunnel))

    def watch(self, target: Duplex) -> None:
        """Replace the methods of this one target by which the bytes of a visit pass."""
        read, write, offer, close = target.read, target.write, target.offer, target.close
        noted, note, note_asked = self._noted, self._note, self._note_asked
        answered = self._dialogue.answered

        def read_followed(*args: Any, **named: Any) -> bytes:
            # What this thread has noted is passed on: now nothing waits for it.
            if self._bytes > MUCH or len(noted) > MANY:
                self.look()
            data = read(*args, **named)
            note(answered, data)
            return data

        # A request is noted before it is written: its answer may come before write() returns.

        def write_followed(data: BytesLike, *args: Any, **named: Any) -> None:
            note_asked(data)
            write(data, *args, **named)
            if self._bytes > MUCH or len(noted) > MANY:
                self.look()

        def offer_followed(data: BytesLike) -> int:
            """Demultiplexer thread: leaves the reading to the others as long as it can."""
            note_asked(data)
            taken = 0
            try:
                taken = offer(data)
            finally:
                self._ahead += len(data) - taken  # they come again
            if self._bytes > 2 * MUCH or len(noted) > MANY:
                self.look()
            return taken

        def close_followed() -> None:
            # Only these functions hold the target's own methods: a cycle, if they stayed.
            del target.read, target.write, target.offer, target.close
            try:
                close()
            finally:
                noted.append((self._end, b"", monotonic()))
                self.look()

        target.read, target.write = read_followed, write_followed  # type: ignore[method-assign]
        target.offer, target.close = offer_followed, close_followed  # type: ignore[method-assign]

    def current(self, now: float) -> Seen | None:
        """The visit, or its request that is not answered; None if it only waits for the next one.
        Any thread."""
        self.look()
        exchange = self._dialogue.current()
        return None if exchange is None else record(exchange, self._tunnel, now)

    def look(self) -> None:
        """Read what was noted, unless another thread does: that one goes on with ours."""
        noted, reading, over = self._noted, self._reading, self._over
        while noted and reading.acquire(blocking=False):
            try:
                self._read_noted()
            finally:
                reading.release()
        while over:
            try:
                exchange = over.popleft()
            except IndexError:  # another thread was faster
                return
            self._follower.end(self._tunnel, exchange)

    def has_noted(self) -> bool:
        return bool(self._noted)

    def _note(self, act: Callable[[bytes, float], None], data: bytes) -> None:
        if len(self._noted) < MOST_PIECES:
            self._noted.append((act, data, monotonic()))
            self._bytes += len(data)
        else:
            self._lost = True
        if self._follower.asleep:
            self._follower.wake()

    def _note_asked(self, data: BytesLike) -> None:
        if self._ahead:
            seen = min(self._ahead, len(data))
            self._ahead -= seen
            data = data[seen:]
        if data:
            self._note(self._dialogue.asked, bytes(data))

    def _read_noted(self) -> None:
        noted, self._bytes = self._noted, 0
        while noted:
            act, data, now = noted.popleft()
            try:
                if self._lost:
                    self._lost = False
                    self._dialogue.give_up(TOO_FAST, now)
                act(data, now)
            except Exception:
                log.exception("%s: a visit is not followed any more (bug, traceback follows); it "
                              "goes on", self._tunnel.hostname)  # fmt: skip
                self._dialogue.give_up(NOT_FOLLOWED, now)

    def _end(self, _: bytes, now: float) -> None:
        self._dialogue.ended(now)
        self._follower.forget(self)
