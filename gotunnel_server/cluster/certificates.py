"""What the members of a cluster share of certificates: SharedCertificates builds it.

with CLUSTER           a store on Redis with a copy in ACME_CACHE, the local CA there, too
with PROCESSES alone   ACME_CACHE, as ever: all processes have the same folder
both                   proofs that every member answers (proofs.py)
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..certs.challenges import Challenges, Publisher
from ..certs.folder import FolderLocker, FolderStorage, open_store
from ..certs.local_ca import FOLDER, Authority, CertificateError, put_ca
from ..certs.storage import OutOfReach
from ..certs.store import CertStore, StoreError, ca_id
from .folder_changes import FolderChanges
from .local_copy import CopiedStorage
from .locker import RedisLocker
from .proofs import ALL, KINDS, SharedProofs
from .sealed import Sealer, WrongKey
from .storage import Call, RedisStorage

log = logging.getLogger("gotunnel.certificates")

NEWS = "certificate"  # a message: a member has written one
LOCAL_CA = f"{FOLDER}/ca.pem"  # key and certificate of the local CA, in the shared storage
LOCAL_LOCK = f"{FOLDER}/lock"


class Members(Protocol):
    """What is needed of cluster.Cluster."""

    id: str

    def members(self) -> Mapping[str, object]: ...

    def on_members(self, callback: Callable[[Mapping[str, Any]], object]) -> None: ...

    def publish(self, to: str, message: Mapping[str, Any]) -> None: ...

    def on(self, do: str, hear: Callable[[Mapping[str, Any]], object]) -> None: ...


class SharedCertificates:
    """Any thread, except that parts are built before start()."""

    def __init__(
        self,
        call: Call | None,
        name: str,
        keys: Sequence[bytes],
        folder: Path,
        members: Members,
        close: Callable[[], object] = lambda: None,
    ) -> None:
        """``call`` is Redis; None: there is none. ``name`` is CLUSTER_NAME, ``keys`` are those of
        CLUSTER_KEY_FILE or the supervisor's, ``folder`` is ACME_CACHE. ``close()`` closes the
        connections to Redis."""
        self.close = close
        self._sealer = Sealer(keys)
        self._folder = folder
        self._members = members
        self._redis = None if call is None else _open(call, name, self._sealer)
        self._copied: CopiedStorage | None = None
        self._proofs: SharedProofs | None = None
        self._known: set[str] = set()  # the members at the last change
        # How often the others are still asked for their proofs: at the start, messages to us may
        # get lost.
        self._questions = 3
        members.on(NEWS, lambda message: self._look_now())
        members.on_members(self._changed)

    # What certification.py asks for

    def store(self, directory_url: str) -> CertStore:
        """The certificates of a CA. What the folder has of them is taken along, if Redis can be
        reached. Raises StoreError if the folder cannot be written, or the cluster has another
        key."""
        ca = ca_id(directory_url)
        open_store(self._folder, directory_url)  # checks the folder
        folder = FolderStorage(self._folder)
        if self._redis is None:
            changes = FolderChanges(self._folder, ca)
            return CertStore(folder, FolderLocker(self._folder), directory_url, changes)
        storage, locker = self._redis
        self._copied = copied = CopiedStorage(storage, locker, folder, ca, self._tell_certificate)
        try:
            storage.check_key()
            copied.changes()
        except WrongKey as error:
            raise StoreError(str(error.strerror)) from None
        except OSError as error:
            log.debug("ACME_CACHE is not taken along yet: %s", error.strerror)
        return CertStore(copied, locker, directory_url, copied.changes)

    def publisher(self, challenges: Challenges) -> Publisher:
        """Where orders of this member publish their proofs. ``challenges`` are what its ports
        ask."""
        self._proofs = proofs = SharedProofs(challenges, self._members, self._sealer, self._others)
        for kind in KINDS:
            self._members.on(kind, proofs.hear)
        return proofs

    def share_local_ca(self) -> None:
        """Have ACME_CACHE hold the local CA of all members: the first one makes it. Raises
        CertificateError."""
        folder = self._folder / FOLDER
        if self._redis is None:
            return
        storage, locker = self._redis
        try:
            with locker.lock(LOCAL_LOCK, wait=True):
                pem = storage.read(LOCAL_CA)
                if pem is None:
                    storage.write(LOCAL_CA, Authority(folder).as_pem())
                    return
        except WrongKey as error:
            raise CertificateError(str(error.strerror)) from None
        except OSError as error:
            if not (folder / "ca.key").exists():
                raise CertificateError(
                    f"{error.strerror}: the local CA of the cluster cannot be read, and {folder} "
                    "has no copy yet; a gateway needs Redis when it starts for the first time: "
                    "start the server, or correct CLUSTER"
                ) from error
            log.warning("%s: the local CA is the copy in %s", error.strerror, folder)
            return
        if put_ca(folder, pem):
            log.warning("%s has the local CA of the cluster now: agents and visitors that trusted "
                        "the one before (now %s) have to trust %s", folder, folder / "ca.crt.bad",
                        folder / "ca.crt")  # fmt: skip

    # Life

    def tick(self) -> None:
        """Call it every second, once the board can be used."""
        if self._proofs is None:
            return
        if self._questions:
            self._questions -= 1
            self._proofs.ask()
        self._proofs.sweep()

    # Messages

    def _others(self) -> list[str]:
        return [member for member in self._members.members() if member != self._members.id]

    def _changed(self, members: Mapping[str, Any]) -> None:
        new = set(members) - self._known - {self._members.id}
        self._known = set(members)
        if self._proofs is not None:
            self._proofs.changed(sorted(new))

    def _tell_certificate(self) -> None:
        self._members.publish(ALL, {"do": NEWS})

    def _look_now(self) -> None:
        if self._copied is not None:
            self._copied.look_now()


def open_redis(call: Call, name: str, keys: Sequence[bytes]) -> tuple[RedisStorage, RedisLocker]:
    """What a cluster keeps on Redis, without being a member: for an operator's command."""
    return _open(call, name, Sealer(keys))


def _open(call: Call, name: str, sealer: Sealer) -> tuple[RedisStorage, RedisLocker]:
    def said_clearly(*command: str | bytes | int) -> Any:
        try:
            return call(*command)
        except OSError as error:
            text = (error.strerror or str(error)).rstrip(".")
            raise OutOfReach(errno.EHOSTUNREACH, text) from None

    locker = RedisLocker(said_clearly, name)
    return RedisStorage(said_clearly, name, sealer, locker), locker
