"""Cancelling a job in another thread: an Event that also wakes a thread blocked on a socket.

A thread that waits for bytes does not see an Event. So it registers a function that wakes it, such
as a shutdown of its socket; set() calls that function.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Stop(threading.Event):
    """A threading.Event with wakers. Any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.Lock()  # guards _wakers
        self._wakers: list[Callable[[], None]] = []

    def set(self) -> None:
        super().set()
        with self._guard:
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Within the block, set() calls ``wake``; if it is set already, ``wake`` is called at once.

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
