"""The interfaces below a certificate store: Storage, bytes under keys, and Locker, locks by name.

`folder.py` implements both for a folder; another place for certificates needs no more than these. A
key is names with slashes between them, as ``CA/certs/app.example.com.pem``; no name is empty or
begins with a dot.
"""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager
from typing import Protocol


class Unreadable(OSError):
    """There is something under the key that can never be read; ``strerror`` says why. A reader that
    owns the key sets it aside."""


class OutOfReach(OSError):
    """The place cannot be reached now, and nobody has to do anything here; ``strerror`` says
    why."""


class Storage(Protocol):
    """Bytes under keys. Any thread; several processes may share it.

    Each method except where() raises OSError if it fails now; ``strerror`` says why.
    """

    def read(self, key: str) -> bytes | None:
        """None if there is nothing. Raises Unreadable if it can never be read."""

    def write(self, key: str, content: bytes) -> None:
        """Atomic, also in a crash: a reader gets the old content or the new."""

    def delete(self, key: str) -> bool:
        """False if there was nothing: another process may have been quicker."""

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin with ``prefix`` and have no further slash; sorted."""

    def set_aside(self, key: str, flaw: str) -> None:
        """Move broken content away, for the operator to look at, and log it with its ``flaw``.
        Does nothing if it is gone: another process was quicker, and has logged it."""

    def where(self, key: str) -> str:
        """Where the operator finds the key; for log lines and errors."""


class Locker(Protocol):
    """Locks by name. A lock has one holder at a time, among all processes and threads."""

    def lock(self, name: str, *, wait: bool) -> AbstractContextManager[bool]:
        """Hold a lock for the length of a block. Gives whether we hold it: always with ``wait``.

        The end of the process releases it. Raises OSError if locking fails.
        """


class ReadOnly:
    """A read-only view of another Storage, and a Locker that gives no lock.

    Content that would have been set aside stays; ``broken`` has its flaw by key.
    """

    def __init__(self, storage: Storage) -> None:
        self.broken: dict[str, str] = {}
        self.read, self.keys, self.where = storage.read, storage.keys, storage.where

    def write(self, key: str, content: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.where(key))

    def delete(self, key: str) -> bool:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.where(key))

    def set_aside(self, key: str, flaw: str) -> None:
        self.broken[key] = flaw

    def lock(self, name: str, *, wait: bool) -> AbstractContextManager[bool]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.where(name))
