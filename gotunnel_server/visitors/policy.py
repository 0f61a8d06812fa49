"""What a tunnel asks of its visitors: where they come from, how often, and who they are.

An agent sends a policy with its registration, a JSON object whose keys are all optional:

    {"allow": ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1"],    only from there
     "deny": ["10.1.0.0/16"],                                  never from there
     "rate_limit": {"per_address": 10, "burst": 20,            requests a second, and at once
                    "total": 200, "total_burst": 400},         ... of all visitors together
     "basic_auth": ["USER:$scrypt$ln=14,r=8,p=1$SALT$HASH"]}   http mode only

``read`` turns it into a ``Policy``, or says in a PolicyError what is wrong. A policy is judged in
this order: deny, allow, rates, password; so an address that is kept out costs a set look-up, and a
flood never comes as far as the passwords. Each verdict is None (come in) or a ``Denial``.

*Rates* are token buckets: ``burst`` at once, one more every 1/rate seconds (GCRA). What is denied
takes no token. An IPv6 visitor counts by the /64 that a subscriber gets, an IPv4-mapped address as
IPv4.

*Passwords* come as scrypt hashes (RFC 7914) and in no other way. A hash costs some 50 ms of CPU and
16 MiB, which nobody may spend for us at will: a success is remembered (as a keyed digest), so a
page with a hundred files costs one computation; failures are counted by address; few computations
run at once, and few wait.

Nothing here reads or writes anything; the time comes from the ``now`` that is handed in. A Policy
may be used by any thread. No password and no hash is ever in a text or a repr.
"""

import base64
import binascii
import hmac
import math
import os
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from gotunnel_agent.common import addresses
from gotunnel_agent.common.passwords import (
    CONTROL,
    HASH_MARK,
    MOST_PASSWORD,
    MOST_USER,
    MOST_USERS,
    Hash,
    PasswordError,
    hash_if_plain,
    valid_user,
)
from gotunnel_agent.common.quantities import LEAST_RATE, MOST_BURST, MOST_RATE, RATE_KEYS
from gotunnel_agent.common.token_bucket import Buckets

# A burst that nobody set is what the rate gives in 10 seconds: a browser asks for a page with all
# its files in one go, some seventy of them, and then its reader reads.
BURST_SECONDS = 10


# A person mistypes a few times; who guesses gets 8640 a day from an address.
FAILURES = 10
FAILURES_A_SECOND = 1 / 10
# Beyond that nothing is computed for an address, but whoever has come in from there before still
# does: it may be shared. So a guess is still a guess, and with so many of them nobody comes in.
GUESSES = 100
GUESSES_A_SECOND = 1

# Passwords that were right, and that were wrong, which a tunnel remembers with their addresses: a
# program that has an old one is told so for nothing. Some 250 bytes each.
MOST_REMEMBERED = 4096

# Computations in this process. Two keep two cores busy, with 128 MiB at most; those that wait do so
# for half a second or two, each with a thread. A tunnel under attack leaves the others their part.
COMPUTED_AT_ONCE = 2
WAITING_TO_COMPUTE = 16
OF_ONE_TUNNEL = COMPUTED_AT_ONCE + WAITING_TO_COMPUTE // 2
_turns = threading.BoundedSemaphore(COMPUTED_AT_ONCE)
_places = threading.BoundedSemaphore(COMPUTED_AT_ONCE + WAITING_TO_COMPUTE)

MOST_SHOWN = 60  # characters of a bad value that a message shows

HTTP_KEYS = ("basic_auth",)
KEYS = (*HTTP_KEYS, "allow", "deny", "rate_limit")

_BASIC = re.compile(r"basic +([A-Za-z0-9+/]+={0,2}) *", re.IGNORECASE | re.ASCII)


class PolicyError(ValueError):
    """A policy cannot be followed; the text is one line, for the agent's operator."""


class Denial(NamedTuple):
    """Why a visit is not let in: status, code word, text and fields of the answer."""

    status: int
    code: str
    text: str
    fields: tuple = ()


def read(
    wire: object,
    mode: str,
    defaults: "Defaults | None" = None,
    *,
    now: Callable[[], float] = monotonic,
) -> "Policy | None":
    """The policy of a tunnel in ``mode`` ("http" or "tcp"), as its agent sent it.

    ``wire`` is None if it sent none. ``defaults`` count for each key that it did not set. The
    result is None if there is nothing to ask of visitors. Raises PolicyError.
    """
    rules = {} if wire is None else _rules(wire, mode)
    if defaults is not None:
        rules = {**defaults.rules_for(mode), **rules}
    return Policy(rules, now) if rules else None


@dataclass(frozen=True)
class Defaults:
    """What counts for the tunnels that do not say it themselves."""

    rules: dict = field(repr=False)

    @classmethod
    def read(cls, wire: dict) -> "Defaults":
        """``wire`` is as an agent would send it. Raises PolicyError."""
        return cls(_rules(wire, "http"))

    def rules_for(self, mode: str) -> dict:
        """Key to rule, of those that can be followed in a mode."""
        left_out = () if mode == "http" else HTTP_KEYS
        return {key: rule for key, rule in self.rules.items() if key not in left_out}


class Policy:
    """The rules of one tunnel, and what its visitors have used up. Any thread."""

    def __init__(self, rules: dict, now: Callable[[], float]):
        self._now = now
        self._allow = rules.get("allow")
        self._deny = rules.get("deny")
        users = rules.get("basic_auth")
        self._passwords = Passwords(users, now) if users else None
        limit = rules.get("rate_limit")
        self._each = limit and limit.per_address and Buckets(*limit.per_address)
        self._total = limit and limit.total and Buckets(*limit.total, most=1)
        self._lock = threading.Lock()  # guards both Buckets

    @property
    def asks_password(self) -> bool:
        """Whether the Authorization of a request is for the gateway, and none of the target's."""
        return self._passwords is not None

    def judge_request(self, address: str, authorization: str | None) -> Denial | None:
        """Whether a request may go to the agent. ``authorization`` is the value of that field,
        None without one; if there were several, they are joined by commas. May compute, or wait
        for others who do, some 50 ms at a time."""
        visitor = addresses.parse(address)
        denial = self._judge_place(address, visitor) or self._judge_rate(visitor)
        if denial is None and self._passwords is not None:
            denial = self._passwords.judge(_subscriber(visitor), authorization)
        return denial

    def judge_connection(self, address: str) -> Denial | None:
        """Whether a visit in tcp mode may go to the agent. Waits for nothing."""
        visitor = addresses.parse(address)
        return self._judge_place(address, visitor) or self._judge_rate(visitor)

    def _judge_place(self, address, visitor):
        deny, allow = self._deny, self._allow
        if deny is None and allow is None:
            return None
        if visitor is None or deny and visitor in deny or allow and visitor not in allow:
            text = f"Visitors from {address[:MOST_SHOWN] or 'nowhere'} are not let in."
            return Denial(403, "not-allowed", text)
        return None

    def _judge_rate(self, visitor):
        each, total = self._each, self._total
        if each is None and total is None:
            return None
        who, now = _subscriber(visitor), self._now()
        with self._lock:
            wait = 0 if each is None else each.wait(who, now)
            total_wait = 0 if total is None else total.wait(None, now)
            if not wait and not total_wait:
                if each is not None:
                    each.take(who, now)
                if total is not None:
                    total.take(None, now)
                return None
        whence = "from your address" if wait else "from all visitors together"
        return _too_many(f"Too much comes {whence}", max(wait, total_wait))


def _too_many(what, wait):
    seconds = max(1, math.ceil(wait))
    return Denial(
        429, "too-many-requests", f"{what}. Try again in {seconds} s.",
        (("Retry-After", str(seconds)),),
    )  # fmt: skip


# --- Addresses -----------------------------------------------------------------------------------


class Networks:
    """A set of IP networks. Asked by address, it takes one look-up a length of prefix."""

    def __init__(self, networks: Iterable[addresses.Network]):
        self._prefixes = {4: {}, 6: {}}  # version: {bits behind the prefix: prefixes}
        for network in networks:
            behind = network.max_prefixlen - network.prefixlen
            prefixes = self._prefixes[network.version].setdefault(behind, set())
            prefixes.add(int(network.network_address) >> behind)

    def __contains__(self, address):
        number = int(address)
        lengths = self._prefixes[address.version].items()
        return any(number >> behind in prefixes for behind, prefixes in lengths)

    def __eq__(self, other):
        return isinstance(other, Networks) and self._prefixes == other._prefixes


def _subscriber(visitor):
    """The key that a visitor is counted by; those without an address share one."""
    return None if visitor is None else addresses.subscriber(visitor)


# --- Rates ---------------------------------------------------------------------------------------


class Rate(NamedTuple):
    """``burst`` at once, and ``rate`` a second in the long run."""

    rate: float
    burst: int


class RateLimit(NamedTuple):
    per_address: Rate | None
    total: Rate | None


# --- Passwords -----------------------------------------------------------------------------------

_ASK = (("WWW-Authenticate", 'Basic realm="gotunnel", charset="UTF-8"'),)
_NO_PASSWORD = Denial(401, "password-required", "A user name and a password are needed here.", _ASK)
_WRONG_PASSWORD = Denial(
    401, "password-required", "This user name with this password is not known here.", _ASK
)
_BUSY = Denial(
    503, "gateway-busy", "The gateway checks as many passwords as it can. Try again in 1 s.",
    (("Retry-After", "1"),),
)  # fmt: skip


def hashed_entry(text: str) -> str:
    """USER:HASH of USER:PASSWORD; a password that begins with HASH_MARK is one already.

    Raises PolicyError, which does not show the text.
    """
    user, colon, password = unicodedata.normalize("NFC", text).partition(":")  # RFC 7617 §2.1
    if not colon:
        raise PolicyError("a text without a colon came, expected USER:PASSWORD")
    if password.startswith(HASH_MARK):
        return f"{user}:{password}"
    try:
        return f"{user}:{hash_if_plain(password)}"
    except PasswordError as error:
        raise PolicyError(str(error)) from None


class Passwords:
    """Who may come in, by user name and password (RFC 7617). Any thread."""

    def __init__(self, users: dict[bytes, Hash], now: Callable[[], float]):
        self._users = users
        self._now = now
        self._key = os.urandom(32)  # of the digests below, so that they are of use to nobody else
        self._right = OrderedDict()  # (who, digest) of what was computed: the latest last
        self._wrong = OrderedDict()
        self._failures = Buckets(FAILURES_A_SECOND, FAILURES)
        self._guesses = Buckets(GUESSES_A_SECOND, GUESSES)
        self._running = {}  # (who, digest): Future of the verdict
        self._lock = threading.Lock()  # guards these five; never held while computing
        self._places = threading.BoundedSemaphore(OF_ONE_TUNNEL)

    def judge(self, who, authorization: str | None) -> Denial | None:
        """``who`` is what failures are counted by. May compute, or wait for who does."""
        if authorization is None:
            return _NO_PASSWORD
        credentials = _credentials(authorization)
        if credentials is None:
            return _WRONG_PASSWORD
        user, password = credentials
        # A key to look up by: it says nothing of the password to who measures how long that takes.
        case = who, self._digest(user + b":" + password)
        with self._lock:
            locked = self._failures.wait(who, self._now())
            if locked and self._guesses.wait(who, self._now()):
                return _too_many_wrong(locked)
            if case in self._right:
                self._right.move_to_end(case)
                return None
            if case in self._wrong:
                return _WRONG_PASSWORD
            if locked:
                self._guesses.take(who, self._now())
                return _too_many_wrong(locked)
            # A browser opens several connections at once: one of them computes.
            verdict = self._running.get(case)
            is_first = verdict is None
            if is_first:
                verdict = self._running[case] = Future()
        if is_first:
            denial = _BUSY
            try:
                denial = self._compute(case, user, password)
            finally:  # those who wait get a verdict in any case
                with self._lock:
                    del self._running[case]
                verdict.set_result(denial)
        return verdict.result()

    def _compute(self, case, user, password):
        if not self._places.acquire(blocking=False):
            return _BUSY
        try:
            if not _places.acquire(blocking=False):
                return _BUSY
            try:
                with _turns:
                    return self._compute_now(case, user, password)
            finally:
                _places.release()
        finally:
            self._places.release()

    def _compute_now(self, case, user, password):
        who = case[0]
        with self._lock:  # others from there may have failed in the meantime
            if locked := self._failures.wait(who, self._now()):
                return _too_many_wrong(locked)
        # A user who does not exist costs what one who does would: always the same.
        hashes = list(self._users.values())
        stand_in = hashes[int.from_bytes(self._digest(user), "big") % len(hashes)]
        known = self._users.get(user, stand_in)
        fits = hmac.compare_digest(known.compute(password), known.digest)
        with self._lock:
            if fits and user in self._users:
                _remember(self._right, case)
                return None
            _remember(self._wrong, case)
            self._failures.take(who, self._now())
            return _WRONG_PASSWORD

    def _digest(self, content):
        return hmac.digest(self._key, content, "sha256")


def _remember(cases, case):
    cases[case] = None
    if len(cases) > MOST_REMEMBERED:
        cases.popitem(last=False)


def _too_many_wrong(wait):
    return _too_many("Too many wrong passwords came from your address", wait)


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


# --- The wire ------------------------------------------------------------------------------------


def _rules(wire, mode):
    """Key to rule, of what an agent sent."""
    if not isinstance(wire, dict):
        raise PolicyError(f"{_shown(wire)} came, expected an object")
    for key in wire:
        if key not in KEYS:
            raise PolicyError(f"unknown key {_shown(key)}, expected one of {', '.join(KEYS)}")
    if mode != "http" and "basic_auth" in wire:
        raise PolicyError(f"basic_auth: mode {_shown(mode)} came, expected http beside it")
    readers = {
        "allow": _networks, "deny": _networks, "rate_limit": _rate_limit, "basic_auth": _users,
    }  # fmt: skip
    rules = {}
    for key, value in wire.items():
        try:
            rules[key] = readers[key](value)
        except PolicyError as error:
            raise PolicyError(f"{key}: {error}") from None
    return rules


def _texts(value, most, what):
    """The members of a list of texts."""
    if not isinstance(value, list) or not value:
        came = "an empty list" if value == [] else _shown(value)
        raise PolicyError(f"{came} came, expected a list of {what}")
    if len(value) > most:
        raise PolicyError(f"{len(value)} {what} came, expected at most {most}")
    for number, text in enumerate(value):
        if not isinstance(text, str):
            raise PolicyError(f"[{number}]: {_kind(text)} came, expected a text")
    return value


def _networks(value):
    return Networks(map(_network, _texts(value, addresses.MOST_NETWORKS, "addresses and networks")))


def _network(text):
    try:
        return addresses.unmapped_network(addresses.network(text))
    except ValueError as error:
        raise PolicyError(str(error)) from None


def _rate_limit(value):
    if not isinstance(value, dict):
        raise PolicyError(f"{_shown(value)} came, expected an object")
    for key in value:
        if key not in RATE_KEYS:
            raise PolicyError(f"unknown key {_shown(key)}, expected one of {', '.join(RATE_KEYS)}")
    limit = RateLimit(
        _rate(value, "per_address", "burst"), _rate(value, "total", "total_burst")
    )
    if limit == (None, None):
        raise PolicyError("an empty object came, expected per_address, total or both")
    return limit


def _rate(value, key, burst_key):
    if key not in value:
        if burst_key in value:
            raise PolicyError(f"{burst_key} came without {key}, expected both or neither")
        return None
    rate = value[key]
    if type(rate) not in (int, float) or not LEAST_RATE <= rate <= MOST_RATE:  # NaN is not more
        raise PolicyError(
            f"{key}: {_shown(rate)} came, expected requests a second, a number from "
            f"1/3600 to {MOST_RATE}"
        )
    burst = value.get(burst_key, min(math.ceil(rate * BURST_SECONDS), MOST_BURST))
    if type(burst) is not int or not 1 <= burst <= MOST_BURST:
        raise PolicyError(
            f"{burst_key}: {_shown(burst)} came, expected a whole number from 1 to {MOST_BURST}"
        )
    return Rate(float(rate), burst)


def _users(value):
    """User to Hash. Nothing of an entry is shown: who errs may have swapped the two."""
    users = {}
    for number, entry in enumerate(_texts(value, MOST_USERS, "entries USER:HASH")):
        name, colon, hashed = entry.partition(":")
        if not colon or not valid_user(name):
            raise PolicyError(
                f"[{number}]: expected USER:HASH, with a user name of 1 to {MOST_USER} bytes"
            )
        user = name.encode()
        if user in users:
            raise PolicyError(f"[{number}]: this user came before, expected each once")
        try:
            users[user] = Hash.read(hashed)
        except PasswordError as error:
            raise PolicyError(f"[{number}]: {error}") from None
    return users


def _shown(value):
    """A value of a peer's, bounded and on one line."""
    if isinstance(value, str):
        return repr(value if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]}...")
    if type(value) in (int, float) and abs(value) < 1e15:
        return repr(value)
    return _kind(value)


def _kind(value):
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number out of range")
