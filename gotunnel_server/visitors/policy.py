"""Checks a visit against its tunnel's policy: allowed addresses, rates, passwords.

An agent sends a policy when it registers, a JSON object whose keys are all optional:

    {"allow": ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1"],    only from there
     "deny": ["10.1.0.0/16"],                                  never from there
     "rate_limit": {"per_address": 10, "burst": 20,            requests a second, and at once
                    "total": 200, "total_burst": 400},         ... of all visitors together
     "basic_auth": ["USER:$scrypt$ln=14,r=8,p=1$SALT$HASH"]}   http mode only

read() turns it into a Policy, or raises a PolicyError that says what is wrong. The rules are
checked in this order: deny, allow, rates, password. So a denied address costs one look-up in a set,
and a flood never reaches the costly passwords.

*Rates* are token buckets: ``burst`` requests at once, one more every 1/rate seconds (GCRA). A
denied request takes no token. An IPv6 visitor counts by its /64, which is what one subscriber gets;
an IPv4-mapped address counts as IPv4.

*Passwords*: see basic_auth.py.

Nothing here does I/O; the time comes from ``now``, a parameter. Any thread may use a Policy. No
password and no hash ever appears in a text or a repr.
"""

import math
import threading
import unicodedata
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, Protocol

from gotunnel_agent.common import addresses
from gotunnel_agent.common.passwords import (
    HASH_MARK,
    MOST_USER,
    MOST_USERS,
    Hash,
    PasswordError,
    hash_if_plain,
    valid_user,
)
from gotunnel_agent.common.quantities import LEAST_RATE, MOST_BURST, MOST_RATE, RATE_KEYS
from gotunnel_agent.common.token_bucket import Buckets

from .basic_auth import Passwords
from .verdict import WELCOME, Allow, Answer, Caller, refusal, too_many

# The default burst is what the rate gives in 10 seconds: a browser requests a page and its files,
# about seventy, at once, and then its user reads.
BURST_SECONDS = 10

MOST_SHOWN = 60  # characters of a bad value that a message quotes

HTTP_KEYS = ("basic_auth",)
KEYS = (*HTTP_KEYS, "allow", "deny", "rate_limit")


Rules = dict[str, Any]  # by key; the values are of the types that the readers in _rules() return


class PolicyError(ValueError):
    """A policy is malformed. The text is one line, for the agent's operator."""


def reader(defaults: "Defaults | None") -> Callable[[object, str], "Policy | None"]:
    """read() with these defaults."""
    return partial(read, defaults=defaults)


def read(
    wire: object,
    mode: str,
    defaults: "Defaults | None" = None,
    *,
    now: Callable[[], float] = monotonic,
) -> "Policy | None":
    """Read the policy of a tunnel in ``mode`` ("http" or "tcp").

    ``wire`` is what the agent sent, None for nothing. ``defaults`` apply to each key that it did
    not set. The result is None if there are no rules. Raises PolicyError.
    """
    rules = {} if wire is None else _rules(wire, mode)
    if defaults is not None:
        rules = {**defaults.rules_for(mode), **rules}
    return Policy(rules, now) if rules else None


@dataclass(frozen=True)
class Defaults:
    """The rules for tunnels that set none of their own."""

    rules: Rules = field(repr=False)

    @classmethod
    def read(cls, wire: dict[str, object]) -> "Defaults":
        """Read them from the form in which an agent sends a policy. Raises PolicyError."""
        return cls(_rules(wire, "http"))

    def rules_for(self, mode: str) -> Rules:
        """The rules that exist in a mode."""
        left_out = () if mode == "http" else HTTP_KEYS
        return {key: rule for key, rule in self.rules.items() if key not in left_out}


class Rule(Protocol):
    """One rule of a Policy: see verdict.py."""

    def judge(self, caller: Caller) -> Allow | Answer: ...


class Policy:
    """The rules of one tunnel, with the state of its rates and passwords. Any thread."""

    def __init__(self, rules: Rules, now: Callable[[], float]):
        chain: list[Rule] = []
        allow, deny = rules.get("allow"), rules.get("deny")
        if allow is not None or deny is not None:
            chain.append(Place(allow, deny))
        if "rate_limit" in rules:
            chain.append(Rates(rules["rate_limit"], now))
        self._for_connections = tuple(chain)
        if "basic_auth" in rules:
            chain.append(Passwords(rules["basic_auth"], now))
        self._for_requests = tuple(chain)
        self._counted = [rule for rule in chain if isinstance(rule, (Rates, Passwords))]

    def judge_request(self, address: str, authorization: str | None) -> Allow | Answer:
        """Whether a request may go to the agent; for the arguments see verdict.Caller. It may
        compute a password's hash, or wait for a thread that does, about 50 ms at a time."""
        return _judge(self._for_requests, address, authorization)

    def judge_connection(self, address: str) -> Allow | Answer:
        """Whether a visit in tcp mode may go to the agent. Never waits."""
        return _judge(self._for_connections, address, None)

    # Several gateways with one policy (cluster/counts.py)

    def spent(self) -> dict[str, dict[Hashable, int]]:
        """What visits have spent here since the last call: tokens by bucket and visitor. The first
        call begins to count."""
        return {name: spent for rule in self._counted for name, spent in rule.spent().items()}

    def hear(self, bucket: str, share: Hashable, tokens: int) -> None:
        """Visits at another gateway have spent so much. An unknown bucket is passed over."""
        for rule in self._counted:
            rule.hear(bucket, share, tokens)


def _judge(chain: tuple[Rule, ...], address: str, authorization: str | None) -> Allow | Answer:
    caller = Caller(address, addresses.parse(address), authorization)
    add, strip = WELCOME
    for rule in chain:
        verdict = rule.judge(caller)
        if isinstance(verdict, Answer):
            return verdict
        add += verdict.add
        strip += verdict.strip
    return Allow(add, strip)


# --- Addresses -----------------------------------------------------------------------------------


class Networks:
    """A set of IP networks. Whether it contains an address costs one look-up per prefix length."""

    def __init__(self, networks: Iterable[addresses.Network]):
        # IP version to {number of bits behind the prefix: prefixes}.
        self._prefixes: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        for network in networks:
            behind = network.max_prefixlen - network.prefixlen
            prefixes = self._prefixes[network.version].setdefault(behind, set())
            prefixes.add(int(network.network_address) >> behind)

    def __contains__(self, address: addresses.Address) -> bool:
        number = int(address)
        lengths = self._prefixes[address.version].items()
        return any(number >> behind in prefixes for behind, prefixes in lengths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Networks) and self._prefixes == other._prefixes


class Place:
    """The rule about visitors' addresses. Any thread."""

    def __init__(self, allow: Networks | None, deny: Networks | None):
        """``allow`` None: all addresses except those in ``deny``."""
        self._allow, self._deny = allow, deny

    def judge(self, caller: Caller) -> Allow | Answer:
        ip, deny, allow = caller.ip, self._deny, self._allow
        if ip is None or deny and ip in deny or allow and ip not in allow:
            source = caller.address[:MOST_SHOWN] or "hidden addresses"
            text = f"Visitors from {source} are not let in. Ask the people who run the site."
            return refusal(403, "not-allowed", text)
        return WELCOME


# --- Rates ---------------------------------------------------------------------------------------


class Rate(NamedTuple):
    """``burst`` requests at once, and ``rate`` a second in the long run."""

    rate: float
    burst: int


class RateLimit(NamedTuple):
    per_address: Rate | None
    total: Rate | None


class Rates:
    """The rule about how often visitors may come. Any thread."""

    def __init__(self, limit: RateLimit, now: Callable[[], float]):
        self._now = now
        self._each = Buckets(*limit.per_address) if limit.per_address else None
        self._total = Buckets(*limit.total, most=1) if limit.total else None
        both = {"each": self._each, "total": self._total}
        self._buckets = {name: buckets for name, buckets in both.items() if buckets is not None}
        self._lock = threading.Lock()  # guards both Buckets

    def judge(self, caller: Caller) -> Allow | Answer:
        each, total = self._each, self._total
        key, now = caller.share, self._now()
        with self._lock:
            wait = 0 if each is None else each.wait(key, now)
            total_wait = 0 if total is None else total.wait(None, now)
            if not wait and not total_wait:
                if each is not None:
                    each.take(key, now)
                if total is not None:
                    total.take(None, now)
                return WELCOME
        source = "your address" if wait else "all visitors together"
        return too_many(f"Too many requests came from {source}", max(wait, total_wait))

    def spent(self) -> dict[str, dict[Hashable, int]]:
        """As Policy.spent()."""
        with self._lock:
            return {name: buckets.spent() for name, buckets in self._buckets.items()}

    def hear(self, bucket: str, share: Hashable, tokens: int) -> None:
        """As Policy.hear()."""
        if bucket in self._buckets:
            with self._lock:
                self._buckets[bucket].hear(share, tokens, self._now())


# --- The wire ------------------------------------------------------------------------------------


def _rules(wire: object, mode: str) -> Rules:
    """Read the rules that an agent sent."""
    if not isinstance(wire, dict):
        raise PolicyError(f"{_shown(wire)} came, expected an object")
    for key in wire:
        if key not in KEYS:
            raise PolicyError(f"unknown key {_shown(key)}, expected one of {', '.join(KEYS)}")
    if mode != "http" and "basic_auth" in wire:
        raise PolicyError(f"basic_auth: the tunnel's mode is {_shown(mode)}, expected http")
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


def _texts(value: object, most: int, what: str) -> list[str]:
    """Check that a value is a list of at most ``most`` texts, and return it."""
    if not isinstance(value, list) or not value:
        came = "an empty list" if value == [] else _shown(value)
        raise PolicyError(f"{came} came, expected a list of {what}")
    if len(value) > most:
        raise PolicyError(f"{len(value)} {what} came, expected at most {most}")
    for number, text in enumerate(value):
        if not isinstance(text, str):
            raise PolicyError(f"[{number}]: {_kind(text)} came, expected a text")
    return value


def _networks(value: object) -> Networks:
    return Networks(map(_network, _texts(value, addresses.MOST_NETWORKS, "addresses and networks")))


def _network(text: str) -> addresses.Network:
    try:
        return addresses.unmapped_network(addresses.network(text))
    except ValueError as error:
        raise PolicyError(str(error)) from None


def _rate_limit(value: object) -> RateLimit:
    if not isinstance(value, dict):
        raise PolicyError(f"{_shown(value)} came, expected an object")
    for key in value:
        if key not in RATE_KEYS:
            raise PolicyError(f"unknown key {_shown(key)}, expected one of {', '.join(RATE_KEYS)}")
    limit = RateLimit(_rate(value, "per_address", "burst"), _rate(value, "total", "total_burst"))
    if limit == (None, None):
        raise PolicyError("an empty object came, expected per_address, total or both")
    return limit


def _rate(value: dict[str, Any], key: str, burst_key: str) -> Rate | None:
    if key not in value:
        if burst_key in value:
            raise PolicyError(f"{burst_key} came without {key}, expected both or neither")
        return None
    rate = value[key]
    # NaN fails here, too: it compares False to everything.
    if type(rate) not in (int, float) or not LEAST_RATE <= rate <= MOST_RATE:
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


def _users(value: object) -> dict[bytes, Hash]:
    """User to Hash. Errors quote nothing: an author may have confused user and password."""
    users: dict[bytes, Hash] = {}
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


def hashed_entry(text: str) -> str:
    """USER:HASH for USER:PASSWORD. A password that begins with HASH_MARK is a hash already.

    Raises PolicyError, which does not quote the text.
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


def _shown(value: object) -> str:
    """A value from the agent, for an error: bounded, and on one line."""
    if isinstance(value, str):
        return repr(value if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]}...")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15:
        return repr(value)
    return _kind(value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number out of range")
