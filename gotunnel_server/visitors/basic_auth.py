"""Asks a visitor for user name and password: HTTP Basic authentication (RFC 7617), a policy's rule.

Passwords are known only as scrypt hashes (RFC 7914). To check one takes about 50 ms of CPU and
16 MiB, so visitors must not cause it without limit. A success is remembered as a keyed digest, so a
page with a hundred files costs one computation. Failures are counted by address. Few computations
run at a time, and few may wait.

No password and no hash ever appears in a text or a repr.
"""

import base64
import binascii
import hmac
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future

from gotunnel_agent.common.passwords import CONTROL, MOST_PASSWORD, MOST_USER, Hash
from gotunnel_agent.common.token_bucket import Buckets

from ..net.round_robin import Gate
from .verdict import Allow, Answer, Caller, refusal, too_many

# Failed logins per address: at once, and a second in the long run. A person mistypes a few times;
# an attacker has 8640 guesses a day from each address.
FAILURES = 10
FAILURES_A_SECOND = 1 / 10
# While an address is locked by its failures, no hash is computed for it. A password that was right
# from there before still works, since several people may share the address. So an attacker there
# can still test guesses against it. GUESSES limits these, too; beyond it no password from the
# address works.
GUESSES = 100
GUESSES_A_SECOND = 1

# How many right and how many wrong passwords a tunnel remembers, with their addresses. So a program
# that keeps using an old password costs one computation. About 250 bytes each.
MOST_REMEMBERED = 4096

# Computations in the whole process. Two keep two cores busy, with 128 MiB at most (a hash may ask
# for passwords.MOST_MEMORY). Those that wait do so for up to two seconds, each in a thread. Tunnels
# take turns, and so do the addresses at one tunnel: a login waits for at most one guess at each
# other tunnel, however many are made there. One tunnel alone gets a third of the places to wait.
COMPUTED_AT_ONCE = 2
WAITING_TO_COMPUTE = 30
_gate = Gate(COMPUTED_AT_ONCE, WAITING_TO_COMPUTE)

ANY_USER = None  # as a key of ``users``: any user name

Case = tuple[Hashable, bytes]  # an address's share, and the digest of user and password

_BASIC = re.compile(r"basic +([A-Za-z0-9+/]+={0,2}) *", re.IGNORECASE | re.ASCII)

# The field is removed: it is for the gateway, and would only end up in the target's log.
_ADMITTED = Allow(strip=("authorization",))
_ASK = (("WWW-Authenticate", 'Basic realm="gotunnel", charset="UTF-8"'),)
_NO_PASSWORD = refusal(
    401, "password-required", "This site needs a user name and a password.", _ASK
)
_WRONG_PASSWORD = refusal(
    401, "password-required", "The user name or the password is wrong. Try again.", _ASK
)
_BUSY = refusal(
    503, "gateway-busy", "Too many visitors are logging in at the moment. Try again in a second.",
    (("Retry-After", "1"),),
)  # fmt: skip


class Passwords:
    """The rule that asks for a user name and a password. Any thread."""

    def __init__(self, users: Mapping[bytes | None, Hash], now: Callable[[], float]):
        """``users``: hashes by user name; or ANY_USER alone, if the name does not matter."""
        self._users = users
        self._now = now
        self._key = os.urandom(32)  # for the digests; they are worthless outside of this process
        self._right: OrderedDict[Case, None] = OrderedDict()  # the latest one last
        self._wrong: OrderedDict[Case, None] = OrderedDict()
        self._failures = Buckets(FAILURES_A_SECOND, FAILURES)
        self._guesses = Buckets(GUESSES_A_SECOND, GUESSES)
        self._running: dict[Case, Future[Allow | Answer]] = {}  # verdicts that are being computed
        self._lock = threading.Lock()  # guards these five; never held while computing

    def judge(self, caller: Caller) -> Allow | Answer:
        """See verdict.py. It may compute a hash, or wait for a thread that does."""
        if caller.authorization is None:
            return _NO_PASSWORD
        credentials = _credentials(caller.authorization)
        if credentials is None:
            return _WRONG_PASSWORD
        user, password = credentials
        # Looked up by a keyed digest, so that the time which that takes tells nothing about the
        # password (no timing oracle).
        share = caller.share
        case = share, self._digest(user + b":" + password)
        with self._lock:
            locked = self._failures.wait(share, self._now())
            if locked and self._guesses.wait(share, self._now()):
                return _too_many_wrong(locked)
            if case in self._right:
                self._right.move_to_end(case)
                return _ADMITTED
            if case in self._wrong:
                return _WRONG_PASSWORD
            if locked:
                self._guesses.take(share, self._now())
                return _too_many_wrong(locked)
            # A browser opens several connections at once; only the first one's thread computes.
            running = self._running.get(case)
            if running is None:
                ours = self._running[case] = Future()
        if running is not None:
            return running.result()
        verdict: Allow | Answer = _BUSY
        try:
            verdict = self._compute(case, user, password)
        finally:  # also after a bug, or the waiting threads would wait for ever
            with self._lock:
                del self._running[case]
            ours.set_result(verdict)
        return verdict

    def spent(self) -> dict[str, dict[Hashable, int]]:
        """As policy.Policy.spent()."""
        with self._lock:
            return {"wrong": self._failures.spent(), "guesses": self._guesses.spent()}

    def hear(self, bucket: str, share: Hashable, tokens: int) -> None:
        """As policy.Policy.hear()."""
        buckets = {"wrong": self._failures, "guesses": self._guesses}.get(bucket)
        if buckets is not None:
            with self._lock:
                buckets.hear(share, tokens, self._now())

    def _compute(self, case: Case, user: bytes, password: bytes) -> Allow | Answer:
        if not _gate.enter(self, case[0]):
            return _BUSY
        try:
            return self._compute_now(case, user, password)
        finally:
            _gate.leave()

    def _compute_now(self, case: Case, user: bytes, password: bytes) -> Allow | Answer:
        share = case[0]
        with self._lock:  # other logins from this address may have failed in the meantime
            if locked := self._failures.wait(share, self._now()):
                return _too_many_wrong(locked)
        # For an unknown user another's hash is computed, always the same one. So it takes as long
        # as for a known user (no timing oracle).
        hashes = list(self._users.values())
        stand_in = hashes[int.from_bytes(self._digest(user), "big") % len(hashes)]
        known = self._users.get(user, stand_in)
        fits = hmac.compare_digest(known.compute(password), known.digest)
        with self._lock:
            if fits and (user in self._users or ANY_USER in self._users):
                _remember(self._right, case)
                return _ADMITTED
            _remember(self._wrong, case)
            self._failures.take(share, self._now())
            return _WRONG_PASSWORD

    def _digest(self, content: bytes) -> bytes:
        return hmac.digest(self._key, content, "sha256")


def _remember(cases: OrderedDict[Case, None], case: Case) -> None:
    cases[case] = None
    if len(cases) > MOST_REMEMBERED:
        cases.popitem(last=False)


def _too_many_wrong(wait: float) -> Answer:
    return too_many("Too many wrong passwords came from your address", wait)


def _credentials(authorization: str) -> tuple[bytes, bytes] | None:
    """User and password in an Authorization field, None if it has none that could be right."""
    match = _BASIC.fullmatch(authorization)
    if match is None:
        return None
    try:
        decoded = base64.b64decode(match[1], validate=True)
    except binascii.Error:
        return None
    user, colon, password = decoded.partition(b":")
    if not colon or CONTROL.search(decoded):
        return None
    return (user, password) if len(user) <= MOST_USER and len(password) <= MOST_PASSWORD else None
