"""HTTP Basic authentication (RFC 7617) as a rule of a policy.

Passwords come as scrypt hashes (RFC 7914) and in no other way. A hash costs some 50 ms of CPU and
16 MiB, which nobody may spend for us at will: a success is remembered (as a keyed digest), so a
page with a hundred files costs one computation; failures are counted by address; few computations
run at once, and few wait.

No password and no hash is ever in a text or a repr.
"""

import base64
import binascii
import hmac
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from gotunnel_agent.common.passwords import CONTROL, MOST_PASSWORD, MOST_USER, Hash
from gotunnel_agent.common.token_bucket import Buckets

from ..net.round_robin import Gate
from .verdict import Allow, Answer, Caller, refusal, too_many

# A person mistypes a few times; an attacker has 8640 guesses a day from an address.
FAILURES = 10
FAILURES_A_SECOND = 1 / 10
# Beyond that nothing is computed for an address; a password that was right from there before still
# opens, since an address may be shared. That makes each request a guess again: so many of them, and
# no password opens.
GUESSES = 100
GUESSES_A_SECOND = 1

# Right passwords, and wrong ones, that a tunnel remembers with their addresses: a program that goes
# on using an old password costs one computation. Some 250 bytes each.
MOST_REMEMBERED = 4096

# Computations in this process. Two keep two cores busy, with 128 MiB at most; those that wait do so
# for half a second or two, each with a thread. Tunnels take turns, and so do the addresses at one
# tunnel: a login waits for one guess of each other tunnel, however many are made there. Of the
# places to wait a tunnel alone has a third.
COMPUTED_AT_ONCE = 2
WAITING_TO_COMPUTE = 30
_gate = Gate(COMPUTED_AT_ONCE, WAITING_TO_COMPUTE)

ANY_USER = None  # stands for every user name

_BASIC = re.compile(r"basic +([A-Za-z0-9+/]+={0,2}) *", re.IGNORECASE | re.ASCII)

# The field was for the gateway, and has no business in the target's log.
_ADMITTED = Allow(strip=("authorization",))
_ASK = (("WWW-Authenticate", 'Basic realm="gotunnel", charset="UTF-8"'),)
_NO_PASSWORD = refusal(
    401, "password-required", "A user name and a password are needed here.", _ASK
)
_WRONG_PASSWORD = refusal(
    401, "password-required", "This user name with this password is not known here.", _ASK
)
_BUSY = refusal(
    503, "gateway-busy", "The gateway checks as many passwords as it can. Try again in 1 s.",
    (("Retry-After", "1"),),
)  # fmt: skip


class Passwords:
    """The rule that asks for a user name and a password. Any thread."""

    def __init__(self, users: dict[bytes | None, Hash], now: Callable[[], float]):
        """``users``: by name; ANY_USER, which is then alone, if the name does not matter."""
        self._users = users
        self._now = now
        self._key = os.urandom(32)  # of the digests below: of no use outside of this process
        self._right = OrderedDict()  # (share, digest) of what was computed: the latest last
        self._wrong = OrderedDict()
        self._failures = Buckets(FAILURES_A_SECOND, FAILURES)
        self._guesses = Buckets(GUESSES_A_SECOND, GUESSES)
        self._running = {}  # (share, digest): Future of the verdict
        self._lock = threading.Lock()  # guards these five; never held while computing

    def judge(self, caller: Caller) -> Allow | Answer:
        """May compute, or wait for another thread that does."""
        if caller.authorization is None:
            return _NO_PASSWORD
        credentials = _credentials(caller.authorization)
        if credentials is None:
            return _WRONG_PASSWORD
        user, password = credentials
        # Looked up by a keyed digest: how long that takes says nothing of the password (no timing
        # oracle).
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
            # A browser opens several connections at once: one of them computes.
            running = self._running.get(case)
            is_first = running is None
            if is_first:
                running = self._running[case] = Future()
        if is_first:
            verdict = _BUSY
            try:
                verdict = self._compute(case, user, password)
            finally:  # the threads that wait get a verdict in any case
                with self._lock:
                    del self._running[case]
                running.set_result(verdict)
        return running.result()

    def _compute(self, case, user, password):
        if not _gate.enter(self, case[0]):
            return _BUSY
        try:
            return self._compute_now(case, user, password)
        finally:
            _gate.leave()

    def _compute_now(self, case, user, password):
        share = case[0]
        with self._lock:  # others from there may have failed in the meantime
            if locked := self._failures.wait(share, self._now()):
                return _too_many_wrong(locked)
        # An unknown user costs what a known one does, always the same hash (no timing oracle).
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

    def _digest(self, content):
        return hmac.digest(self._key, content, "sha256")


def _remember(cases, case):
    cases[case] = None
    if len(cases) > MOST_REMEMBERED:
        cases.popitem(last=False)


def _too_many_wrong(wait):
    return too_many("Too many wrong passwords came from your address", wait)


def _credentials(authorization):
    """User and password out of a field, as bytes; None if it holds none that could be right."""
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
