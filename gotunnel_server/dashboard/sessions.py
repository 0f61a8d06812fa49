"""The sessions of browsers that have logged in to the dashboard. Any thread.

A session's id is 256 random bits, made at login and never taken over from a browser (no session
fixation). It ends by logout, after LIFETIME, and with the process: nothing is written to a disk.

With PROCESSES a browser's connections reach several processes. The one that does not know a session
asks the others once (elsewhere), and a logout is told to all (ended).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence

LIFETIME = 12 * 3600  # seconds from the login: a working day
# Some 500 bytes each. Only a login makes a session, so this many come from scripts that log in
# again and again: the oldest session ends.
MOST_SESSIONS = 256
ID_BYTES = 32
# Of a request's ids, so many are looked for at other processes: a browser has one cookie of ours.
MOST_ELSEWHERE = 4


class Session:
    """One login. ``csrf`` proves that a request comes from a page that the session was given."""

    def __init__(self, until: float, only_from: Hashable, csrf: str = ""):
        """``until``: when it ends, monotonic. ``only_from``: see Sessions.begin()."""
        self.csrf = csrf or secrets.token_urlsafe(ID_BYTES)
        self.until = until
        self.only_from = only_from
        self.has_ended = False

    def proves(self, csrf: str) -> bool:
        """Whether ``csrf`` is this session's token. Takes the same time for all others (no timing
        oracle)."""
        return hmac.compare_digest(self.csrf.encode(), csrf.encode("utf-8", "replace"))


class Sessions:
    """All sessions, by a digest of their ids: to look one up takes a time that tells nothing about
    the other ids (no timing oracle)."""

    def __init__(self, now: Callable[[], float]):
        """``now``: a monotonic clock."""
        self._now = now
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()  # the latest one last
        self._lock = threading.Lock()  # guards _sessions
        # ``elsewhere(digest, address)``: a session that another process has, as its CSRF token and
        # how many seconds are left; None if there is none that the address may use.
        self.elsewhere: Callable[[bytes, Hashable], tuple[str, float] | None] = lambda *_: None
        # ``ended(digests)``: these sessions are over.
        self.ended: Callable[[Sequence[bytes]], object] = lambda digests: None

    def begin(self, only_from: Hashable = None) -> tuple[str, Session]:
        """A new session, and its id. ``only_from``: the one address that may use it; None: all."""
        name = secrets.token_urlsafe(ID_BYTES)
        session = Session(self._now() + LIFETIME, only_from)
        self._keep(_digest(name), session)
        return name, session

    def _keep(self, digest: bytes, session: Session) -> None:
        with self._lock:
            self._sessions[digest] = session
            while len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)[1].has_ended = True

    def find(self, names: Iterable[str], address: Hashable) -> Session | None:
        """The first session that one of the ids belongs to, and that ``address`` may use."""
        digests = [_digest(name) for name in names]
        with self._lock:
            for digest in digests:
                session = self._sessions.get(digest)
                if session is not None and self.is_valid(session):
                    if session.only_from in (None, address):
                        return session
        for digest in digests[:MOST_ELSEWHERE]:
            if (told := self.elsewhere(digest, address)) is not None:
                csrf, left = told
                session = Session(self._now() + left, address, csrf)
                self._keep(digest, session)
                return session
        return None

    def told(self, digest: bytes) -> tuple[str, float, Hashable] | None:
        """For another process: a session's CSRF token, the seconds that it has left, and the one
        address that may use it."""
        with self._lock:
            session = self._sessions.get(digest)
            if session is None or not self.is_valid(session):
                return None
            return session.csrf, session.until - self._now(), session.only_from

    def is_valid(self, session: Session) -> bool:
        return not session.has_ended and self._now() < session.until

    def end(self, names: Iterable[str]) -> None:
        """Log out: end all sessions of these ids."""
        digests = [_digest(name) for name in names]
        self.end_digests(digests)
        if digests:
            self.ended(digests)

    def end_digests(self, digests: Iterable[bytes]) -> None:
        """Sessions have ended, here or at another process."""
        with self._lock:
            for digest in digests:
                session = self._sessions.pop(digest, None)
                if session is not None:
                    session.has_ended = True

    def end_all(self) -> None:
        """The password has changed."""
        with self._lock:
            for session in self._sessions.values():
                session.has_ended = True
            self._sessions.clear()


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "replace")).digest()
