"""Reads a tunnel's policy (passwords, addresses, rates) from YAML values, and writes it as the
gateway gets it.

The gateway enforces it, before a byte comes to the agent. Passwords are hashed here at once:
neither the gateway nor another part of the agent ever sees one. No PolicyError and no repr shows a
password, a hash, or a text that may have been meant as one.
"""

import hashlib
import hmac
import secrets
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

from .common import addresses
from .common.hidden import shown
from .common.passwords import (
    MOST_USER,
    MOST_USERS,
    SALT_SIZE,
    PasswordError,
    hash_if_plain,
    valid_user,
)
from .common.quantities import LEAST_RATE, MOST_BURST, MOST_RATE, RATE_KEYS, rate, whole_number
from .common.strict_yaml import kind

A_RATE = f"requests a second such as 10, or 10/s, 600/m, 1/h; from 1/h to {MOST_RATE}/s"

MOST_SHOWN = 60  # characters of a bad value that a message shows
MOST_HASHES = 1000  # remembered hashes: ten tunnels with as many users as each may have

_KEY = secrets.token_bytes(32)  # so that what is remembered shows nothing of a password
_hashes: dict[bytes, str] = {}  # a user and password, as HMAC: the hash


class PolicyError(Exception):
    """A value cannot be part of a policy; the text says what came and what was expected."""


class Policy(NamedTuple):
    """What one tunnel requires of its visitors. An empty part requires nothing."""

    basic_auth: tuple[str, ...] = ()  # USER:HASH
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    rate_limit: tuple[tuple[str, float], ...] = ()  # pairs of RATE_KEYS and number

    def __repr__(self) -> str:
        return shown(self, "basic_auth")

    def wire(self) -> dict[str, Any]:
        """The policy as a register message holds it; empty if it requires nothing."""
        parts: dict[str, Any] = {
            "basic_auth": list(self.basic_auth),
            "allow": list(self.allow),
            "deny": list(self.deny),
            "rate_limit": dict(self.rate_limit),
        }
        return {key: part for key, part in parts.items() if part}


# --- Passwords -----------------------------------------------------------------------------------


def users(value: object, shared_by: str = "") -> tuple[str, ...]:
    """Entries USER:HASH for a "USER:PASSWORD", a list of them, or a mapping of user to password.

    A password that begins with HASH_MARK is taken as a hash; to hash any other takes some 50 ms.
    ``shared_by``: the hostname, if several agents have it (a pool). Their policies must be equal,
    so the hashes of one password must be. Raises PolicyError.
    """
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        pairs = [_pair(text, number) for number, text in enumerate(_texts(value, "USER:PASSWORD"))]
    if not 1 <= len(pairs) <= MOST_USERS:
        raise PolicyError(f"{len(pairs)} users came, expected 1 to {MOST_USERS}")
    found: dict[str, str] = {}
    for number, (name, password) in enumerate(pairs):
        user = unicodedata.normalize("NFC", name)
        if not valid_user(user):
            raise PolicyError(
                f"[{number}]: expected a user name of 1 to {MOST_USER} bytes, without a colon or "
                "control characters"
            )
        if user in found:
            raise PolicyError(f"[{number}]: this user comes twice, expected each user once")
        try:
            found[user] = _hash(user, password, shared_by)
        except PolicyError as error:
            raise PolicyError(f"[{number}]: {error}") from None
    return tuple(f"{user}:{hashed}" for user, hashed in found.items())


def users_of_lines(text: str, shared_by: str = "") -> tuple[str, ...]:
    """As ``users``, for the text of a file with one USER:PASSWORD a line. Blank lines and lines
    that begin with # are ignored."""
    lines = [line.rstrip("\r") for line in text.split("\n")]
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise PolicyError("no user came, expected one USER:PASSWORD a line")
    return users(lines, shared_by)


def _pair(text: str, number: int) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not colon:  # not shown, as it may be a password
        raise PolicyError(f"[{number}]: a text without a colon came, expected USER:PASSWORD")
    return name, password


def _hash(user: str, password: object, shared_by: str) -> str:
    """The password's hash; the same one if the two come again, as they do whenever the file is read
    anew: to hash takes some 50 ms, and another salt would look like another password."""
    if not isinstance(password, str):
        raise PolicyError(f"{kind(password)} came, expected a password")
    text = f"{shared_by}:{user}:{password}".encode("utf-8", "surrogatepass")
    key = hmac.digest(_KEY, text, "sha256")
    # Not random in a pool, but of its own for each user of each hostname. It must not depend on the
    # password: then it would be a fast hash of it.
    salt = b""
    if shared_by:
        salt = hashlib.sha256(f"gotunnel pool\0{shared_by}\0{user}".encode()).digest()[:SALT_SIZE]
    try:
        hashed = _hashes.get(key) or hash_if_plain(password, salt)
    except PasswordError as error:
        raise PolicyError(str(error)) from None
    if len(_hashes) >= MOST_HASHES:
        _hashes.clear()
    _hashes[key] = hashed
    return hashed


# --- Addresses -----------------------------------------------------------------------------------


def networks(value: object) -> tuple[str, ...]:
    """Addresses and networks, from one text or a list of texts. Raises PolicyError."""
    texts = _texts(value, "an address or a network such as 10.0.0.0/8")
    if len(texts) > addresses.MOST_NETWORKS:
        raise PolicyError(
            f"{len(texts)} addresses and networks came, expected at most {addresses.MOST_NETWORKS}"
        )
    return tuple(dict.fromkeys(map(_network, texts)))


def _network(text: str) -> str:
    try:
        found = addresses.network(text)
    except ValueError as error:
        raise PolicyError(str(error)) from None
    return str(found) if "/" in text else str(found.network_address)


# --- Rates ---------------------------------------------------------------------------------------


def rate_limit(value: object) -> tuple[tuple[str, float], ...]:
    """Pairs of key and number, from one rate (per address) or a mapping. Raises PolicyError."""
    if isinstance(value, str):
        value = {"per_address": value}
    if not isinstance(value, dict):
        raise PolicyError(f"{kind(value)} came, expected {A_RATE}; or a mapping with some of "
                          f"{', '.join(RATE_KEYS)}")  # fmt: skip
    for key in value:
        if key not in RATE_KEYS:
            raise PolicyError(f"unknown key {_shown(key)}, expected some of {', '.join(RATE_KEYS)}")
    for burst, key in (("burst", "per_address"), ("total_burst", "total")):
        if burst in value and key not in value:
            raise PolicyError(f"{burst} came without {key}, expected both or neither")
    if not value:
        raise PolicyError("an empty mapping came, expected per_address, total or both")
    readers: dict[str, Callable[[str], float]]
    readers = {"per_address": _rate, "burst": _burst, "total": _rate, "total_burst": _burst}
    numbers = []
    for key, text in value.items():
        if not isinstance(text, str):
            raise PolicyError(f"{key}: {kind(text)} came, expected a number")
        try:
            numbers.append((key, readers[key](text)))
        except PolicyError as error:
            raise PolicyError(f"{key}: {error}") from None
    return tuple(numbers)


def _rate(text: str) -> float:
    number = rate(text)
    if number is None or not LEAST_RATE <= number <= MOST_RATE:
        raise PolicyError(f"{_shown(text)} came, expected {A_RATE}")
    return number


def _burst(text: str) -> int:
    burst = whole_number(text)
    if burst is None or not 1 <= burst <= MOST_BURST:
        raise PolicyError(f"{_shown(text)} came, expected a whole number from 1 to {MOST_BURST}")
    return burst


# --- The kinds of value --------------------------------------------------------------------------


def _texts(value: object, expected: str) -> list[str]:
    """The texts of a value that is one text or a list of at least one."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise PolicyError(f"an empty list came, expected {expected}")
    texts = []
    for number, item in enumerate(items):
        if not isinstance(item, str):
            where = f"[{number}]: " if items is value else ""
            raise PolicyError(f"{where}{kind(item)} came, expected {expected}")
        texts.append(item)
    return texts


def _shown(text: str) -> str:
    return repr(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}...")
