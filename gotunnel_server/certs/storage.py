"""What a certificate store is kept on: bytes under keys, and locks by name.

Two small interfaces, so that another place than a folder is one class. `folder.py` implements both
for a folder. A key is names with slashes between them, as ``CA/certs/app.example.com.pem``; no name
is empty or begins with a dot.
"""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager
from typing import Protocol


class Unreadable(OSError):
    """There is something under the key, and reading it will fail later too: ``strerror`` says why.
    A reader that owns the key sets it aside."""


class Storage(Protocol):
    """Bytes under keys. Any thread; several processes may share it.

    Each method but where() raises OSError if the place does not do it now; ``strerror`` says why.
    """

    def read(self, key: str) -> bytes | None:
        """None if there is nothing. Raises Unreadable for what can never be read."""

    def write(self, key: str, content: bytes) -> None:
        """Whole or not at all, also through a crash: a reader gets the old content or the new."""

    def delete(self, key: str) -> bool:
        """False if there was nothing: another process may have been quicker."""

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin with ``prefix`` and have no further slash; sorted."""

    def set_aside(self, key: str, flaw: str) -> None:
        """Move broken content out of the way, for a person to look at, and log it with its
        ``flaw``. Nothing happens if it is gone: another process was quicker, and has logged it."""

    def where(self, key: str) -> str:
        """How a person finds the key; for log lines and errors."""


class Locker(Protocol):
    """Locks by name, which look like keys. One holder at a time among all processes and threads."""

    def lock(self, name: str, *, wait: bool) -> AbstractContextManager[bool]:
        """Hold a lock for the length of a block. Gives whether it is ours: always with ``wait``.

        The end of the process frees it. Raises OSError if locking fails.
        """


class ReadOnly:
    """Another Storage, of which nothing is changed; and a Locker that gives no lock.

    What would have been set aside stays where it is, and ``broken`` has its flaw by key.
    """

    def __init__(self, storage: Storage):
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
