"""Tells a gateway that has been restarted which member it was before, so that the hostnames of that
one are free at once.

Without it, the names of a gateway that died alone could be another agent's only after FORGET
(leases.py): no other member is there that can tell whether it still serves. A file in ACME_CACHE
holds the id of the running member, which keeps it locked (flock). The system gives the lock back
when the process ends, however it ends. So a process that gets the lock knows that the one before is
dead. A folder may be shared by machines whose locks do not count for each other, so the file also
has the machine's name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a system for gateways
    fcntl = None  # type: ignore[assignment]  # then nothing is known

log = logging.getLogger("gotunnel.former_member")

MOST_BYTES = 1000  # of the file


class FormerMember:
    """One thread at a time."""

    def __init__(self, folder: Path, number: int = 0):
        """``folder``: ACME_CACHE. ``number``: of the process, where several share the folder."""
        self._path = folder / ("member.json" if not number else f"member-{number}.json")
        self._file: int | None = None
        self._failed = fcntl is None

    @property
    def is_taken(self) -> bool:
        """Whether take() need not be called again."""
        return self._file is not None or self._failed

    def take(self, id: str) -> str | None:
        """Leave the id of this member. Returns that of the one before if it is surely dead; None if
        there was none, or if it still runs: call again later."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(self._path, flags, 0o600)
        except OSError as error:
            self._fail(error)
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = os.read(file, MOST_BYTES)
            machine = socket.gethostname()
            os.truncate(file, 0)
            os.pwrite(file, json.dumps({"member": id, "machine": machine}).encode(), 0)
        except BlockingIOError:  # as in a hand-over
            os.close(file)
            return None
        except OSError as error:
            os.close(file)
            self._fail(error)
            return None
        self._file = file
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            found = json.loads(before)
            if found["machine"] == machine and isinstance(found["member"], str):
                return found["member"] or None
        return None

    def _fail(self, error: OSError) -> None:
        log.debug("%s cannot be used: %s", self._path, error)
        self._failed = True

    def close(self) -> None:
        """This member has left: it needs no word after it."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                os.truncate(file, 0)
            os.close(file)
