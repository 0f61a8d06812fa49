"""Streams that need no thread of their own: a pool's thread works on one when something has come.

A Stream of gotunnel.py is made for threads that wait: read() and write() block, and a Bell wakes
them. The streams that a peer opens may be thousands, most of them idle, and one end of a passage is
as slow as the other one. So here the Bells call a function instead (Watched), which has a Job done
by a small pool, and nothing waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

from gotunnel import (
    NOTHING,
    READ_SIZE,
    Bell,
    BytesLike,
    SessionClosed,
    Stream,
    call_logged,
)
from gotunnel_agent.common.process import Stopped

Submit = Callable[[Callable[[], object]], object]


class Job:
    """A function that a pool's thread calls after each wake(), never two threads at once.

    wake() is for any thread, whatever locks it holds, and waits for nothing. It takes the lock of
    the Job, and then the pool's.
    """

    __slots__ = ("_function", "_submit", "_lock", "_busy", "_again")

    def __init__(self, submit: Submit, function: Callable[[], object]):
        self._function: Callable[[], object] = function
        self._submit = submit
        self._lock = threading.Lock()  # guards the next two
        self._busy = False  # it is submitted, or a thread is at it
        self._again = False  # woken meanwhile

    def wake(self) -> None:
        with self._lock:
            self._again = self._busy
            if self._busy:
                return
            self._busy = True
        self._hand_in()

    def end(self) -> None:
        """Call the function no more, and forget it: it may be a method of what has this Job, and
        the streams that wake it must not keep that in memory."""
        self._function = _nothing

    def _hand_in(self) -> None:
        try:
            self._submit(self._run)
        except Stopped:  # the gateway stops, and ends what the job would see to
            pass

    def _run(self) -> None:
        with self._lock:
            self._again = False
        call_logged(self._function)
        with self._lock:
            self._busy = self._again
            if not self._busy:
                return
        self._hand_in()  # behind the jobs that wait: one busy stream must not keep a thread


def _nothing() -> None:
    """What an ended Job does."""


class _Call(Bell):
    """A Bell that calls a function, and for which no thread waits."""

    __slots__ = ("ring",)

    def __init__(self, lock: threading.Lock, function: Callable[[], object]):
        super().__init__(lock)
        self.waiting = 1  # else it would not be rung
        self.ring = function  # type: ignore[method-assign, assignment]  # see above

    def wait(self, timeout: float | None) -> float | None:
        raise TimeoutError("a watched stream is not waited for")


class Watched:
    """A stream that is read and written without waiting. One thread at a time; a Stream's methods
    that wait must not be used any more."""

    __slots__ = ("stream",)

    def __init__(self, stream: Stream, on_change: Callable[[], None]):
        """``on_change()`` is called when take() or put() may have more to do from now on, perhaps
        for no reason. The session's lock may be held then: it must not wait, nor take a session's
        lock."""
        self.stream = stream
        with stream._lock:
            stream._readable = _Call(stream._lock, on_change)
            stream._writable = _Call(stream._lock, on_change)
            stream._on_payload = on_change

    def take(self, size: int = READ_SIZE) -> bytes | None:
        """Bytes that have come, b"" after the peer's FIN, None if none have come. Raises
        StreamReset, SessionClosed."""
        stream, sender, data = self.stream, self.stream._sender, None
        with stream._lock:
            if stream._chunks:
                data = stream._take_out(size)
                stream._streams.count_unread(stream, -len(data))
                due = stream._known and stream._mux.consumed(stream.id, len(data), monotonic())
            elif stream._got_fin or stream._discarding:
                return b""
            elif stream._error is not None:
                stream._raise_error()
            else:
                due = sender.postponed  # the ACK of an accepted stream
            batch = sender.take() if due else NOTHING
        sender.send(batch)
        return data

    def room(self) -> int:
        """Bytes that put() would take now. Raises StreamReset, SessionClosed."""
        with self.stream._lock:
            return self._room()

    def _room(self) -> int:
        """Caller holds the lock."""
        stream, session = self.stream, self.stream.session
        if stream._error is not None:
            stream._raise_error()
        if session._closing:
            raise SessionClosed(session._closing[0])
        return stream._mux.room(stream.id)

    def put(self, data: BytesLike) -> BytesLike:
        """Send what the peer's window permits; returns the rest. Raises StreamReset,
        SessionClosed."""
        stream = self.stream
        with stream._lock:
            room = self._room()
            if not room:
                return data
            if room < len(data):
                data = memoryview(data)
            stream._mux.send(stream.id, data[:room])
            batch = stream._sender.take()
        stream._sender.send(batch)
        return data[room:]
