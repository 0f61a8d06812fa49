"""The storage of a member: Redis, with a copy in ACME_CACHE.

What is read or written on Redis is also put into the folder, in the form in which a gateway without
CLUSTER keeps it. The copy serves these cases:

- Without Redis a member starts, and serves its certificates, from the copy.
- A certificate that was ordered while Redis went away is kept in the copy, and sent to Redis when
  it is back: the CA has counted it.
- Redis has lost its data: the members put back what they have.
- A gateway joins a cluster: what it has in the folder is taken along, nothing is ordered again. A
  gateway leaves: it goes on with the folder.

Redis is the truth: what differs there is taken over into the copy, except a certificate that is
still to be sent. `CA/imported.json` on Redis says that a member has taken its folder along. From
then on only certificates are put back: an account that an operator has removed from Redis stays
removed.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable
from time import monotonic

from ..certs.cert_dir import names_of
from ..certs.folder import FolderStorage
from ..certs.storage import Locker, OutOfReach, Unreadable
from ..certs.store import StoreError, check
from ..net.certificate import ends, load_certificates
from ..net.safe_read import MALFORMED
from .sealed import WrongKey
from .storage import CERTIFICATE, REQUEST, News, RedisStorage, Refused, Serial

log = logging.getLogger("gotunnel.local_copy")

# Seconds for which Redis is not tried again after it could not be reached: a start reads hundreds
# of certificates, and each try may wait for a second.
AGAIN = 2.0
# Seconds between two looks which certificates other members have written, and what the operator
# asks for. A message tells that there are new ones; the look is for those that got lost.
LOOK = 5.0
# Beside certificates, what a gateway needs to go on without CLUSTER: copied at each full look.
OTHERS = ("account.json", "pause.json", "turns.json")
IMPORTED = "imported.json"
PASSING = (REQUEST, "/writable")  # these are soon deleted: no copy
# Bound of certificates that wait for Redis, by key; what is beyond it is found at the next start.
MOST_PENDING = 1000

_MINE = (Unreadable, WrongKey, Refused)  # Redis has answered


class CopiedStorage:
    """A Storage. Any thread, except changes(). ``ca`` is the folder of the CA that is used."""

    def __init__(
        self,
        shared: RedisStorage,
        locker: Locker,
        copy: FolderStorage,
        ca: str,
        on_certificate: Callable[[], object] = lambda: None,
    ) -> None:
        """``on_certificate()`` is called when a certificate was written to Redis."""
        self._shared = shared
        self._locker = locker
        self._copy = copy
        self._ca = ca
        self._on_certificate = on_certificate
        self._lock = threading.Lock()  # guards what follows
        self._away_until = 0.0  # monotonic; 0: Redis was there at the last try
        self._why = ""  # it could not be reached; begins with its address
        self._pending: dict[str, None] = {}  # certificates that Redis does not have yet
        # Of changes().
        self._serial = Serial()
        self._look_at = 0.0  # monotonic
        self._is_imported = False  # the folder was taken along, by us or before
        self._is_told = False  # that the cluster has another key

    # A Storage

    def read(self, key: str) -> bytes | None:
        """As Storage.read(); from the copy if Redis cannot be reached."""
        try:
            self._try()
            content = self._shared.read(key)
        except _MINE:
            raise
        except OSError as error:
            self._note_away(error)
            return self._copy.read(key)
        self._note_back()
        if content is None:
            return self._copy_not_sent_yet(key)
        self._put_copy(key, content)
        return content

    def _copy_not_sent_yet(self, key: str) -> bytes | None:
        with self._lock:
            is_pending = key in self._pending
        return self._copy.read(key) if is_pending else None

    def write(self, key: str, content: bytes) -> None:
        """As Storage.write(). A certificate is kept in the copy if Redis cannot be reached."""
        try:
            self._try()
            self._shared.write(key, content)
        except _MINE:
            raise
        except OSError as error:
            self._note_away(error)
            if not key.endswith(CERTIFICATE):
                raise OutOfReach(error.errno, self._why, self.where(key)) from error
            self._copy.write(key, content)
            with self._lock:
                if len(self._pending) < MOST_PENDING:
                    self._pending[key] = None
            log.warning("%s: kept only here for now; the other members get it when Redis is back",
                        self._copy.where(key))  # fmt: skip
            return
        self._note_back()
        self._put_copy(key, content)
        if key.endswith(CERTIFICATE):
            self._on_certificate()

    def delete(self, key: str) -> bool:
        """As Storage.delete(): one member alone gets True."""
        found = self._shared.delete(key)
        try:
            self._copy.delete(key)
        except OSError as error:
            log.debug("%s stays: %s", self._copy.where(key), error.strerror)
        return found

    def keys(self, prefix: str) -> list[str]:
        """As Storage.keys(); those of the copy if Redis cannot be reached."""
        try:
            self._try()
            found = self._shared.keys(prefix)
        except OSError as error:
            self._note_away(error)
            return self._copy.keys(prefix)
        self._note_back()
        with self._lock:
            pending = {key for key in self._pending if key.rpartition("/")[0] + "/" == prefix}
        return sorted(pending.union(found))

    def set_aside(self, key: str, flaw: str) -> None:
        self._shared.set_aside(key, flaw)

    def where(self, key: str) -> str:
        return self._shared.where(key)

    # Whether Redis is there

    def _try(self) -> None:
        """Raises OSError if Redis could not be reached a moment ago."""
        with self._lock:
            if monotonic() < self._away_until:
                raise OutOfReach(errno.EHOSTUNREACH, self._why)

    def _note_away(self, error: OSError) -> None:
        with self._lock:
            is_news = not self._away_until
            if monotonic() >= self._away_until:
                self._away_until = monotonic() + AGAIN
                self._why = error.strerror or str(error)
                self._serial = Serial()  # other members may have put back what Redis has lost
        if is_news:
            # The board's own line is for the operator (members.py).
            log.debug("%s: certificates are read from ACME_CACHE, and none is ordered until it is "
                      "back", self._why)  # fmt: skip

    def _note_back(self) -> None:
        if self._away_until:
            with self._lock:
                was_away, self._away_until = self._away_until, 0.0
            if was_away:
                log.debug("certificates are shared by Redis again")

    def _put_copy(self, key: str, content: bytes) -> None:
        """Have the folder hold the same. If it cannot be written, Redis still has it."""
        if key.endswith(PASSING):
            return
        try:
            if self._copy.read(key) != content:
                self._copy.write(key, content)
        except OSError as error:
            log.debug("no copy in %s: %s", self._copy.where(key), error.strerror)

    # What other members write

    def look_now(self) -> None:
        """Another member has written a certificate. Any thread."""
        with self._lock:
            self._look_at = 0.0

    def changes(self) -> Iterable[str] | None:
        """As CertStore's ``changes``. Also sends what Redis misses. One thread. Raises OSError."""
        with self._lock:
            if monotonic() < self._look_at:
                return ()
            self._look_at = monotonic() + LOOK
            since = self._serial
        try:
            self._try()
            news = self._look(since)
        except WrongKey as error:
            if not self._is_told:
                log.error("%s; until then certificates are served, and none is ordered",
                          error.strerror)  # fmt: skip
            self._is_told = True
            raise
        except OSError as error:
            if not isinstance(error, _MINE):
                self._note_away(error)
            raise
        self._note_back()
        self._is_told = False
        with self._lock:
            self._serial = news.serial
        return news.keys

    def _look(self, since: Serial) -> News:
        news = self._shared.news(since)
        if news.keys is None or self._pending or not self._is_imported:
            self.send()
            for name in OTHERS:
                self.read(f"{self._ca}/{name}")
            self._shared.seal_anew()
            again = self._shared.news(news.serial)
            news = news if news.keys is None else again
        return news

    # Taking along

    def send(self) -> int:
        """Put on Redis what it misses of the folder, under a lock; how much that was. Raises
        OSError."""
        sent = 0
        with self._locker.lock(f"{self._ca}/import", wait=True):
            first = self._shared.read(f"{self._ca}/{IMPORTED}") is None
            for key in self._to_send(everything=first):
                sent += self._send(key)
            if first:
                self._shared.write(f"{self._ca}/{IMPORTED}", b"{}\n")
        self._is_imported = True
        if sent:
            log.info("%d files of ACME_CACHE are shared by Redis now", sent)
        return sent

    def _to_send(self, *, everything: bool) -> list[str]:
        certs = f"{self._ca}/certs/"
        there = {*self._shared.keys(certs), *self._shared.keys("")}
        here = [*self._copy.keys(certs), *self._left_by_go()]
        with self._lock:
            pending = set(self._pending)
        found = [key for key in here if key not in there or key in pending]
        if everything:
            there.update(self._shared.keys(f"{self._ca}/"))
            others = (f"{self._ca}/{name}" for name in OTHERS)
            return [*found, *(key for key in others if key not in there)]
        return [key for key in found if key.endswith(CERTIFICATE) or "/" not in key]

    def _left_by_go(self) -> list[str]:
        return [key for key in self._copy.keys("") if "." in key and not key.endswith(".json")]

    def _send(self, key: str) -> bool:
        """Whether Redis did not have it."""
        is_certificate = key.endswith(CERTIFICATE)
        if not (is_certificate or key.endswith(".json") or "/" not in key):
            return False
        try:
            content = self._copy.read(key)
        except OSError:  # a folder, or another user's
            content = None
        if content is None or (is_certificate or "/" not in key) and not _is_good(content):
            return False
        written = self._shared.write_new(key, content)
        if not written and is_certificate and _ends(content) > self._ends_there(key):
            self._shared.write(key, content)
            written = True
        with self._lock:
            self._pending.pop(key, None)
        return written

    def _ends_there(self, key: str) -> float:
        try:
            return _ends(self._shared.read(key))
        except Unreadable:
            return 0.0


def _is_good(pem: bytes) -> bool:
    """Whether it is a certificate with its key and chain. A broken one is not sent on."""
    try:
        return bool(check(pem, min(names_of(load_certificates(pem)[0]))))
    except (StoreError, OSError, LookupError, *MALFORMED):
        return False


def _ends(pem: bytes | None) -> float:
    """When the first certificate in ``pem`` ends; 0 if there is none."""
    try:
        return ends(load_certificates(pem or b"")[0]).timestamp()
    except MALFORMED:
        return 0.0
