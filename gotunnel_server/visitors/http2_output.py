"""What goes to a visitor of an HTTP/2 connection: one writer at a time, and turns for the others.

A thread with something to send puts frames into the output, and writes the output itself unless
another thread is writing: that one takes it along (flat combining). Requests take turns for room in
the output: the more urgent one first (RFC 9218), and of equals the one that has sent longest ago.
A thread puts at most one frame a turn while others wait. So a small answer waits for one write of a
download beside it, not for the download (head-of-line blocking). The kernel holds few unsent bytes
for the same reason (TCP_NOTSENT_LOWAT).
"""

import logging
import threading
from collections.abc import Callable
from itertools import count
from time import monotonic
from typing import Protocol

from gotunnel_agent.common.duplex import ANSWERS, STALL_LOOK, Duplex
from gotunnel_agent.common.patience import Patience

from .http2_frames import Frames
from .http2_screen import FRAME_SIZE, Code
from .request import LEAST_BYTE_RATE, VisitorGone
from .visit import Visit

log = logging.getLogger("gotunnel.http2_output")

# Output that waits for the writing thread: with more, a thread waits for its turn.
ROOM = 16 * 1024
# Bytes that a thread sends in a turn while no other one waits: with one frame a turn, a single
# download would pay a system call for each.
QUANTUM = 64 * 1024
# Unsent bytes in the kernel (TCP_NOTSENT_LOWAT), which a small answer has to wait for.
UNSENT = 64 * 1024
# Bytes of our own frames (acknowledgements, resets, window updates) that the visitor has not read.
# More are an attack.
MOST_REPLIES = ANSWERS


class Sender(Protocol):
    """What the output needs of an http2_request.Http2Request, which explains the attributes."""

    stream_id: int
    hostname: str
    visit: Visit | None
    reset: str | None
    sent_end: bool
    turn: int
    waits_for: int

    @property
    def rank(self) -> tuple[int, int]: ...

    def cut(self, why: str) -> None: ...

    def wait(self, timeout: float) -> object: ...

    def wake(self) -> None: ...

    def spend_patience(self, seconds: float, granted: int) -> None: ...


class Output:
    """The output of one connection. ``lock`` is the connection's, which the caller of a method
    holds if its docstring says so."""

    def __init__(
        self,
        frames: Frames,
        duplex: Duplex,
        lock: threading.Lock,
        stall_timeout: float,
        is_crowded: Callable[[], bool],
        wake_reader: Callable[[], None],
        note_sent: Callable[[int], None],
    ):
        """``wake_reader()``: have the reader's thread look at the connection. ``note_sent(size)``:
        a DATA frame was sent."""
        self.over: str | None = None  # why no sender may go on
        self.broken = False  # nothing can be written any more
        self.wants_to_write = (
            False  # the kernel has not taken all of it; the reader's thread flushes
        )
        self._frames = frames
        self._duplex = duplex
        self._lock = lock
        self._stall_timeout = stall_timeout
        self._is_crowded = is_crowded
        self._wake_reader = wake_reader
        self._note_sent = note_sent
        self._writing = False  # a thread writes
        self._waiting: set[Sender] = set()  # those whose threads wait to send
        self._turns = count(1)
        self._patience: Patience | None = None  # for a visitor that reads slowly; the writer's
        duplex.limit_unsent(UNSENT)

    @property
    def is_empty(self) -> bool:
        """Whether all of it was written. Caller holds the lock."""
        return not self._frames.unsent and not self._writing

    # Threads of exchanges and relays

    def send(
        self,
        sender: Sender,
        head: list[tuple[str, str]] | None,
        data: bytes = b"",
        end: bool = False,
        trailers: list[tuple[str, str]] | None = None,
    ) -> None:
        """Send a head, data behind it, and the end, as far as they are given. Waits for the
        visitor. Raises VisitorGone, OSError; TimeoutError if it reads too slowly."""
        frames, stream_id, size, at = self._frames, sender.stream_id, len(data), 0
        ends = end and not trailers  # DATA, or the head alone, ends the stream
        with self._lock:
            try:
                if head is not None:
                    self._await_turn(sender, 0)
                    self._count(sender, frames.send_head(stream_id, head, ends and not size))
                    sender.sent_end = ends and not size
                elif ends and not size:
                    self._await_turn(sender, 0)
                    self._count(sender, frames.send_data(stream_id, b"", True))
                    sender.sent_end = True
                while at < size:
                    at = self._send_some(sender, data, at, ends)
                    if at < size:
                        self._push(more=True)
                if trailers:
                    self._await_turn(sender, 0)
                    self._count(sender, frames.send_head(stream_id, trailers, end))
                    sender.sent_end = True
                self._push()
            except TimeoutError as error:
                self._drop_slow(sender, error)
                raise
            finally:
                self.wake_next()

    def _send_some(self, sender: Sender, data: bytes, at: int, ends: bool) -> int:
        """Put one turn's frames into the output; returns the offset behind them. Caller holds the
        lock."""
        size = len(data)
        behind = at + min(self._await_turn(sender, size - at), QUANTUM, size - at)
        while at < behind:
            count = min(FRAME_SIZE, behind - at)
            last = ends and at + count == size
            piece = data if count == size else data[at : at + count]
            self._count(sender, self._frames.send_data(sender.stream_id, piece, last))
            self._note_sent(count)
            at += count
            if last:
                sender.sent_end = True
            if self._waiting:
                break
        sender.turn = next(self._turns)
        return at

    def _await_turn(self, sender: Sender, size: int) -> int:
        """Wait until the sender may go on: there is room, no other sender goes first, and, for
        ``size`` bytes of DATA, the visitor's windows are open. Returns how many bytes they permit.
        Caller holds the lock."""
        frames = self._frames
        while True:
            if self.over is not None:
                raise ConnectionResetError(self.over)
            if sender.reset is not None:
                raise VisitorGone(sender.reset)
            window = frames.permitted(sender.stream_id) if size else 1
            if window > 0 and frames.unsent < ROOM:
                if not self._waiting or not self._goes_behind(sender):
                    return window
            if frames.unsent and not self._writing:
                self._write()
                continue
            self.wake_next()
            began = monotonic()
            sender.waits_for = size
            self._waiting.add(sender)
            try:
                sender.wait(min(STALL_LOOK, self._stall_timeout / 4))
            finally:
                self._waiting.discard(sender)
            if window <= 0:  # that is the visitor's doing, all else is not
                sender.spend_patience(monotonic() - began, max(0, self._permitted(sender)))

    def _permitted(self, sender: Sender) -> int:
        if sender.reset is not None or self.over is not None:
            return 0
        return self._frames.permitted(sender.stream_id)

    def _goes_behind(self, sender: Sender) -> bool:
        best = self._best()
        return best is not None and best is not sender and best.rank < sender.rank

    def _best(self) -> Sender | None:
        """Of the senders whose threads wait and could go on, the one whose turn it is."""
        able = [s for s in self._waiting if not s.waits_for or self._permitted(s) > 0]
        return min(able, key=lambda s: s.rank) if able else None

    def _push(self, more: bool = False) -> None:
        """See that the output is written: by this thread, or by one that writes or waits to send.
        With ``more`` the caller is back with more output at once. Caller holds the lock."""
        while self._frames.unsent and not self._writing:
            self._write()
            if more:
                return
            heir = self._best() if self._waiting else None
            if heir is not None:  # it runs next, and has the same duty
                heir.wake()
                return

    def _write(self) -> None:
        """Write the output, without the lock, which the caller holds. Raises OSError."""
        data = self._take()
        failure: OSError | None = None
        self._lock.release()
        try:
            self._duplex.write(data, self._stall_timeout, self._spend)
        except OSError as error:
            failure = error
        finally:
            self._lock.acquire()
            self._writing = False
        if failure is not None:
            self._break(failure)
            raise failure
        if self.over is not None and not self._frames.unsent:
            self._wake_reader()  # it waits for that to close the connection

    def _spend(self, seconds: float, taken: int) -> None:
        if self._patience is None:
            self._patience = Patience(self._stall_timeout, LEAST_BYTE_RATE, self._is_crowded)
        self._patience.spend(seconds, taken)

    def _drop_slow(self, sender: Sender, error: TimeoutError) -> None:
        """The visitor opens a stream's window too slowly. Caller holds the lock."""
        if self.over is None:
            log.info("%s: the answer on an HTTP/2 stream is reset, its visitor read %s",
                     sender.hostname, error)  # fmt: skip
            self.reset(sender, Code.CANCEL, "its visitor reads too slowly")

    @staticmethod
    def _count(sender: Sender, size: int) -> None:
        """So many bytes for the sender are in the output."""
        if sender.visit is not None:
            sender.visit.sent += size

    # Any thread

    def wake_next(self) -> None:
        """There may be room, or a window may be open: wake the thread whose turn it is. Caller
        holds the lock."""
        if self._waiting and self._frames.unsent < ROOM:
            best = self._best()
            if best is not None:
                best.wake()

    def reset(self, sender: Sender, code: Code, why: str) -> None:
        """Reset the sender's stream. Caller holds the lock, and flushes."""
        if sender.reset is None and self.over is None:
            self._frames.reset(sender.stream_id, code)
        sender.cut(why)

    def flush(self) -> None:
        """Write the output as far as the kernel takes it at once. Without the lock."""
        if not self._frames.unsent:  # a thread that adds some now writes it
            return
        with self._lock:
            # What the kernel did not take is kept by the Duplex, which has no bound: no more then.
            while self._frames.unsent and not (self._writing or self.wants_to_write or self.broken):
                data = self._take()
                failure: OSError | None = None
                done = True
                self._lock.release()
                try:
                    done = self._duplex.send(data)
                except OSError as error:
                    failure = error
                finally:
                    self._lock.acquire()
                    self._writing = False
                if failure is not None:
                    self._break(failure)
                elif not done:
                    self.wants_to_write = True
                    self._wake_reader()
            if self._frames.unsent > ROOM + QUANTUM + MOST_REPLIES:
                self._break(ConnectionAbortedError("the visitor does not read our replies"))

    def flush_kernel(self) -> None:
        """The reader's thread: give the kernel what it had no room for. Raises OSError."""
        self.wants_to_write = not self._duplex.flush()

    def _take(self) -> bytes:
        data = self._frames.take()
        self._writing = True
        self.wake_next()  # there is room now
        return data

    def _break(self, error: OSError) -> None:
        """Caller holds the lock."""
        if isinstance(error, TimeoutError):
            log.info("an HTTP/2 connection is reset, its visitor read %s", error)
        self.over = self.over or str(error) or "broken"
        if not self.broken:
            self.broken = True
            self._duplex.reset()
            self._wake_reader()
        for sender in self._waiting:
            sender.wake()
