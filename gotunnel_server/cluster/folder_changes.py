"""Tells which certificates in ACME_CACHE were written: FolderChanges, for several processes on one
machine that share the folder, and have no Redis to tell them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import time

# Seconds for which a folder's time of change is not trusted: systems have ticks of some
# milliseconds, some file systems of a second or two, and another write in the same tick does not
# change it.
TICK = 3.0


class FolderChanges:
    """As CertStore's ``changes``. One thread."""

    def __init__(self, folder: Path, ca: str, clock: Callable[[], float] = time) -> None:
        """``ca`` is the folder of the CA in ``folder``, ACME_CACHE."""
        self._certs = folder / ca / "certs"
        self._prefix = f"{ca}/certs/"
        self._clock = clock
        self._seen = -1.0  # the folder's time of change, in seconds since 1970
        self._files = self._list()

    def __call__(self) -> list[str]:
        """The keys of the certificates, and of requests to renew one, that were written since the
        last call. Raises OSError."""
        try:
            changed_at = self._certs.stat().st_mtime
        except FileNotFoundError:
            return []
        if changed_at == self._seen:
            return []
        before, self._files = self._files, self._list()
        self._seen = changed_at if self._clock() - changed_at > TICK else -1.0
        return [
            self._prefix + name for name, written in self._files.items()
            if before.get(name) != written
        ]  # fmt: skip

    def _list(self) -> dict[str, tuple[int, int]]:
        """File name to number and time of change: a new file has another number."""
        try:
            with os.scandir(self._certs) as entries:
                found = [
                    (entry.name, entry.stat(follow_symlinks=False))
                    for entry in entries if entry.name.endswith((".pem", ".renew"))
                ]  # fmt: skip
        except FileNotFoundError:
            return {}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}
