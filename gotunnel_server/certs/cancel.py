"""The end of a job in another thread: an Event that also wakes a thread that waits in a socket.

A thread that waits for an answer hears of no Event. It says how it can be woken instead, such as by
a shutdown of its socket, and is, in the thread that calls set().
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Stop(threading.Event):
    """Any thread."""

    def __init__(self):
        super().__init__()
        self._guard = threading.Lock()  # guards _wakers
        self._wakers: list[Callable[[], None]] = []

    def set(self):
        super().set()
        with self._guard:
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """While this lasts, set() calls ``wake``; if it is set already, that is called at once.

        ``wake`` must neither block nor raise, and may be called twice.
        """
        with self._guard:
            self._wakers.append(wake)
        try:
            if self.is_set():
                wake()
            yield
        finally:
            with self._guard:
                self._wakers.remove(wake)
