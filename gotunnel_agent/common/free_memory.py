"""Gives freed memory back to the system after a rush.

What thousands of connections have taken, the C library keeps when they are gone: it returns only
what is free at the end of its heap, and one small block there holds back all before it. glibc's
malloc_trim(3) returns all free pages. That, and a search for reference cycles before it, take some
ten milliseconds, in which other threads wait, so it is not done while there is much to do.

It does not return the end of an arena. glibc gives threads arenas (heaps) of their own, eight a
CPU, of which each may keep some megabytes there. So a process has one arena: use_one_arena().
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import threading
from collections.abc import Callable

log = logging.getLogger("gotunnel.free_memory")

# A rush is over when the load has fallen by so much since its peak, and to half of it or less. 50
# connections with TLS take a megabyte or two.
FALL = 50
# So many looks later, memory is given back once more: what the last visits and threads of a rush
# have left. A thread that is not needed ends within a minute.
ONCE_MORE = 40
M_ARENA_MAX = -8  # for mallopt(3), from malloc.h


def _of_glibc(name: str) -> Callable[..., object] | None:
    """A function of glibc's; None in a process without it (musl, macOS)."""
    if sys.platform != "linux":
        return None
    try:
        function: Callable[..., object] = getattr(ctypes.CDLL(None), name)
        return function
    except (OSError, AttributeError):
        return None


def use_one_arena() -> None:
    """Have all threads allocate from one heap. To be called before the first thread is started.

    Without Python's GIL threads would wait for each other there; with it, hardly two allocate at
    the same time."""
    mallopt = _of_glibc("mallopt")
    if mallopt is not None and getattr(sys, "_is_gil_enabled", lambda: True)():
        mallopt(M_ARENA_MAX, 1)


class FreeMemory:
    """Call look() every few seconds, in one thread."""

    def __init__(
        self,
        connections: Callable[[], int] = lambda: 0,
        free: Callable[[], object] = lambda: None,
    ):
        """The load are the process' threads, and its ``connections()`` that may have none.
        ``free()`` frees what the process keeps for the next connections."""
        self._connections = connections
        self._free = free
        self._peak = 0
        self._until_more = 0  # looks until memory is given back once more; 0: it will not be
        self._trim = _of_glibc("malloc_trim")

    def look(self, asked: bool = False) -> bool:
        """Give memory back if a rush is over. Returns whether that was so."""
        load = threading.active_count() + self._connections()
        self._peak = max(self._peak, load)
        if load <= self._peak - FALL and load <= self._peak / 2:
            self._until_more = ONCE_MORE
        elif self._until_more != 1:
            self._until_more = max(0, self._until_more - 1)
            return False
        else:
            self._until_more = 0
        log.debug("a rush is over: %d threads and connections, from %d; its memory goes back to "
                  "the system", load, self._peak)  # fmt: skip
        self._peak = load
        self._free()
        gc.collect()  # sessions and streams are in reference cycles, which wait for this
        if self._trim is not None:
            self._trim(0)
        return True
