"""Lets one of several processes write to a pipe at a time.

A pipe takes a write of more than PIPE_BUF (4096 bytes) in pieces, and another process's write may
come between them: then lines are torn. A write to a file that is opened for appending is one piece.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]  # mypy knows no module that may be missing


@contextlib.contextmanager
def sole_writer(file: int) -> Iterator[None]:
    """Hold the lock of a pipe, or of a socket such as journald's; nothing for another file. A
    process that ends gives it back. May wait as long as another process's write does."""
    # Not flock(): the processes have the same open file, and would all hold the lock.
    locked = False
    if fcntl is not None:
        with contextlib.suppress(OSError):
            mode = os.fstat(file).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                fcntl.lockf(file, fcntl.LOCK_EX)
                locked = True
    try:
        yield
    finally:
        if locked:
            with contextlib.suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_UN)
