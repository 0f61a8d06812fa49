"""Copying bytes between two connections, both ways, until both ends are done.

A visit in tcp mode is a relay: at the gateway between visitor and stream, at the agent between
stream and target. A relay has two threads, one a direction: the caller's, and one that it starts.
"""

from __future__ import annotations

import logging
import threading
from time import monotonic
from typing import Protocol

from gotunnel import Stream, spawn

from .duplex import Duplex

log = logging.getLogger("gotunnel")

LOOK_AT_ENDED = 15  # seconds between two checks whether an end that has sent FIN is still alive.
# TCP keepalive takes minutes to find a dead one, so checking more often would not help
DELIVERY_TIMEOUT = 30  # seconds without progress for the last bytes of an end that broke
RESET_JOIN = 10  # seconds for the thread of a relay to notice a reset: it only has to wake up


class Source(Protocol):
    """Where pump() reads: a Stream, a Duplex or a wrapper of one."""

    def read(self) -> bytes: ...
    def cut(self) -> None: ...
    def reset(self) -> None: ...


class Sink(Protocol):
    """Where pump() writes: a Stream, a Duplex or a wrapper of one."""

    def write(self, data: bytes) -> None: ...
    def finish(self) -> None: ...
    def cut(self) -> None: ...
    def reset(self) -> None: ...


class RelayEnd(Source, Sink, Protocol):
    """An end of a relay other than a Stream: a Duplex or a wrapper of one."""

    def stop_reading(self) -> None: ...


def relay(left: Stream | RelayEnd, right: Stream | RelayEnd) -> None:
    """Copy bytes both ways until both ends are done; a half-close is passed on.

    If one end breaks, the other one gets the bytes that came before, and then a reset: no byte that
    came is lost, and data that was cut off does not look complete. One direction is copied by the
    calling thread, the other one by a new thread. The caller closes both ends. Raises NoThread.

    One direction may last for days after the other has ended. If the end that has sent FIN dies
    then, nothing reads what still comes, and both are reset. A Stream reports its death
    (on_death); a Duplex that no thread reads must be asked (died).
    """
    there, back = _Direction(left, right), _Direction(right, left)
    there.shorten()
    back.shorten()
    for end, other in ((left, right), (right, left)):
        # If a Stream dies, the thread that reads from it wakes up by itself. The one that reads
        # from the other end may wait there for ever, so it is woken here, and the relay can end.
        if isinstance(end, Stream):
            end.on_death(other.cut if isinstance(other, Stream) else other.stop_reading)
    name = f"{threading.current_thread().name} back"
    thread = spawn(name, back.run, there)
    there.run(back)
    thread.join(RESET_JOIN)
    if thread.is_alive():
        log.error("thread %s still runs although its relay was reset (bug)", name)


def pump(source: Source, sink: Sink) -> bool:
    """Copy bytes one way until EOF, then half-close the sink; True if that succeeded.

    If the source breaks, the sink is reset after what was copied. If the sink breaks, neither is
    reset here: the thread that reads from the sink first reads what the sink sent before it broke,
    and then resets the source. If the sink takes nothing for too long, or on any other error, both
    are reset at once.
    """
    return _Direction(source, sink).copy()


class _Direction:
    """One direction of a relay."""

    def __init__(self, source: Source, sink: Sink):
        self.source, self.sink = source, sink
        self.over = threading.Event()  # set when nothing more is copied
        self.moved_at = monotonic()  # when the sink last took bytes

    def shorten(self) -> None:
        """From a Stream to a Duplex without TLS: spare this direction's thread the wake-up for
        small payload (Stream.shortcut)."""
        source, sink = self.source, self.sink
        if not (isinstance(source, Stream) and isinstance(sink, Duplex) and sink.plain):
            return

        def take(data: bytes) -> int:
            taken = sink.offer(data)
            if taken:
                self.moved_at = monotonic()
            return taken

        source.shortcut(take)

    def run(self, back: _Direction) -> None:
        """Copy everything; then wait for the other direction, and end it if an end is dead."""
        source, sink = self.source, self.sink
        well = self.copy()  # whether all bytes and the EOF reached the sink
        self.over.set()
        while not back.over.wait(LOOK_AT_ENDED):
            if hasattr(source, "died") and source.died():
                sink.cut()
                break
            if self._is_broken(well) and monotonic() - back.moved_at > DELIVERY_TIMEOUT:
                self._reset()
                break
        if back.over.wait(RESET_JOIN) and self._is_broken(well):
            source.cut()  # it may not know yet that its bytes were not delivered

    def _is_broken(self, well: bool) -> bool:
        """Whether bytes were not delivered. A dead Stream's finish() raises nothing, so ``well``
        alone does not tell."""
        return not well or (isinstance(self.sink, Stream) and self.sink.is_dead)

    def copy(self) -> bool:
        """See pump()."""
        source, sink = self.source, self.sink
        try:
            while True:
                try:
                    data = source.read()
                except OSError:
                    sink.cut()
                    source.reset()
                    return False
                if not data:
                    sink.finish()
                    return True
                sink.write(data)
                self.moved_at = monotonic()
        except ConnectionError:  # the sink broke
            return False
        except TimeoutError as error:
            log.info("%s: reset: %s", threading.current_thread().name, error)
        except (OSError, ValueError):  # ValueError: closed or finished by another thread
            pass
        except Exception:
            name = threading.current_thread().name
            log.exception("thread %s: its relay is reset (bug, traceback follows)", name)
        self._reset()
        return False

    def _reset(self) -> None:
        self.source.reset()
        self.sink.reset()
