"""A certificate store's Storage and Locker in a folder: a key is the path of a file in it.

Folders have mode 0700, files 0600. A file is written under a temporary name, flushed to the disk
(fsync) and renamed: a reader sees the old one or the new one. A broken file is renamed to FILE.bad.
A lock is a file that is never removed (flock).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from gotunnel_agent.common import atomic_file

from ..net import safe_read
from ..net.safe_read import Unfit
from .storage import Unreadable
from .store import CertStore, StoreError, ca_id

log = logging.getLogger("gotunnel.folder")

# Seconds. No write takes so long: an older temporary file was left by a process that was killed.
STALE = 60.0


def open_store(folder: Path, directory_url: str) -> CertStore:
    """The store of a CA in ACME_CACHE. Makes its folders, and removes old temporary files. Raises
    StoreError if the folders cannot be written."""
    storage, ca = FolderStorage(folder), ca_id(directory_url)
    store = CertStore(storage, FolderLocker(folder), directory_url)
    try:
        store.probe(b"")
        storage.sweep(ca)
        storage.sweep(f"{ca}/certs")
    except OSError as error:
        raise StoreError(
            f"ACME_CACHE {folder}: {error.strerror} ({error.filename or folder}), expected a "
            "folder that the gateway can write: change its owner, or name another"
        ) from error
    return store


def key_files(folder: Path) -> list[Path]:
    """The files in ACME_CACHE that hold private keys: of all CAs, of the local one, and of the Go
    program. A folder that cannot be read gives none."""
    kinds = ("*/account.json", "*/certs/*.pem", "*/*.key")
    with contextlib.suppress(OSError):
        left_by_go = [file for file in folder.iterdir() if "." in file.name or "+" in file.name]
        return sorted([*left_by_go, *(file for kind in kinds for file in folder.glob(kind))])
    return []


class _Folders:
    """The folders under a root, made when they are needed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._closed: set[Path] = set()  # folders whose mode was set to 0700 already
        self._lock = threading.Lock()  # guards _closed

    def make(self, folder: Path) -> None:
        """Make a folder under the root, and the root, with mode 0700. A folder that exists gets
        that mode, except the root: it may be the operator's. Raises OSError."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in reversed([folder, *folder.parents]):
            if self._root in path.parents:
                path.mkdir(mode=0o700, exist_ok=True)
                with self._lock:
                    known = path in self._closed
                    self._closed.add(path)
                if not known:
                    path.chmod(0o700)


class FolderStorage:
    """A Storage in ``folder``, which the first write makes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folders = _Folders(folder)

    def read(self, key: str) -> bytes | None:
        """As Storage.read(). Only regular files of bounded size: a FIFO or a device would block."""
        try:
            return safe_read.read(self._folder / key)
        except FileNotFoundError:
            return None
        except (Unfit, IsADirectoryError, PermissionError) as error:
            raise Unreadable(error.errno, error.strerror, self.where(key)) from error

    def write(self, key: str, content: bytes) -> None:
        file = self._folder / key
        new = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
        self._folders.make(file.parent)
        atomic_file.write(file, content, new=new)

    def delete(self, key: str) -> bool:
        try:
            (self._folder / key).unlink()
        except FileNotFoundError:
            return False
        return True

    def keys(self, prefix: str) -> list[str]:
        """As Storage.keys(). Folders count, too: one may lie where a file should be."""
        inner, slash, start = prefix.rpartition("/")
        try:
            names = os.listdir(self._folder / inner)
        except FileNotFoundError:
            return []
        return sorted(
            inner + slash + name
            for name in names
            if name.startswith(start) and not name.startswith(".")
        )

    def set_aside(self, key: str, flaw: str) -> None:
        file = self._folder / key
        bad = file.with_name(file.name + ".bad")
        try:
            os.replace(file, bad)
        except FileNotFoundError:
            return
        except OSError as error:  # for example, there is a folder with the name of ``bad``
            raise OSError(
                error.errno, f"cannot be moved to {bad.name} ({error.strerror}): remove both"
            ) from error
        log.warning("%s is broken (%s): renamed to %s; a new one is made", file, flaw, bad.name)

    def where(self, key: str) -> str:
        return str(self._folder / key)

    def sweep(self, inner: str) -> None:
        """Remove the temporary files that killed processes have left in a folder of ours. Raises
        OSError."""
        for path in (self._folder / inner).glob(".*.tmp"):
            sweep(path)


class FolderLocker:
    """A Locker with a file in ``folder`` for each lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folders = _Folders(folder)

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        path = self._folder / name
        self._folders.make(path.parent)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                ours = True
            except BlockingIOError:
                ours = False
            yield ours
        finally:
            os.close(lock)  # which also unlocks; so does the end of the process


def sweep(path: Path) -> None:
    """Remove a temporary file if it is too old to be in use. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):  # another process was quicker
        if path.stat().st_mtime < time.time() - STALE:
            path.unlink()
