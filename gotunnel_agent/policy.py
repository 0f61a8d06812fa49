"""What a tunnel asks of its visitors, out of YAML values: the policy as the gateway gets it.

The gateway checks it all, before a byte comes to the agent. Passwords are hashed here and at once:
neither the gateway nor any other part of the agent ever sees one. No text of a PolicyError and no
repr shows a password, a hash or what stands where one may have been meant.
"""

import base64
import binascii
import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass, field

from .common import addresses

# What the gateway takes.
MOST_NETWORKS = 1000
MOST_USERS = 100
MOST_USER = 255  # bytes
MOST_PASSWORD = 1024  # bytes
MOST_RATE = MOST_BURST = 1_000_000  # requests a second, and at once

# A rate is a number of requests, by default a second.
PERIODS = {"s": 1, "m": 60, "h": 3600}
LEAST_RATE = 1 / 3600
RATE_KEYS = ("per_address", "burst", "total", "total_burst")
A_RATE = f"requests a second such as 10, or 10/s, 600/m, 1/h; from 1/h to {MOST_RATE}/s"

# What a hash made here costs (RFC 7914): 16 MiB and some 50 ms, once a visitor.
HASH_MARK = "$scrypt$"
LN, R, P = 14, 8, 1
SALT_SIZE, HASH_SIZE = 16, 32  # bytes

# What a hash made elsewhere may cost the gateway.
LEAST_LN = 10
LEAST_MEMORY, MOST_MEMORY = 1 << 20, 1 << 26  # bytes, 128 * r * 2^ln
MOST_WORK = 1 << 19  # r * p * 2^ln
_PHC = re.compile(
    r"\$scrypt\$ln=([0-9]{1,2}),r=([0-9]{1,4}),p=([0-9]{1,4})"
    r"\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})"  # 8 to 64 and 16 to 64 bytes
)

# What htpasswd and others write, such as "$2y$05$..." and "{SHA}...".
_OTHER_HASH = re.compile(r"\$[A-Za-z0-9-]{1,16}\$.|\{[A-Za-z0-9-]{2,16}\}.")

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MOST_SHOWN = 60  # characters of a bad value that a message shows


class PolicyError(Exception):
    """A value cannot be part of a policy; the text says what came and what was expected."""


@dataclass(frozen=True)
class Policy:
    """What one tunnel asks. Empty parts ask nothing."""

    basic_auth: tuple[str, ...] = field(default=(), repr=False)  # USER:HASH
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    rate_limit: tuple[tuple[str, float], ...] = ()  # pairs of RATE_KEYS and number

    def wire(self) -> dict:
        """As it stands in the register message; empty if it asks nothing."""
        parts = {
            "basic_auth": list(self.basic_auth),
            "allow": list(self.allow),
            "deny": list(self.deny),
            "rate_limit": dict(self.rate_limit),
        }
        return {key: part for key, part in parts.items() if part}


# --- Passwords -----------------------------------------------------------------------------------


def users(value: object) -> tuple[str, ...]:
    """Entries USER:HASH of "USER:PASSWORD", of a list of such, or of a mapping of user to password.

    A password that begins with HASH_MARK is taken as a hash. Any other takes some 50 ms. Raises
    PolicyError.
    """
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        pairs = [_pair(text, number) for number, text in enumerate(_texts(value, "USER:PASSWORD"))]
    if not 1 <= len(pairs) <= MOST_USERS:
        raise PolicyError(f"{len(pairs)} users came, expected 1 to {MOST_USERS}")
    found = {}
    for number, (name, password) in enumerate(pairs):
        user = unicodedata.normalize("NFC", name)
        if not 1 <= _size(user) <= MOST_USER or _CONTROL.search(user) or ":" in user:
            raise PolicyError(
                f"[{number}]: expected a user name of 1 to {MOST_USER} bytes, without a colon or "
                "control characters"
            )
        if user in found:
            raise PolicyError(f"[{number}]: this user came before, expected each once")
        try:
            found[user] = _hash(password)
        except PolicyError as error:
            raise PolicyError(f"[{number}]: {error}") from None
    return tuple(f"{user}:{hashed}" for user, hashed in found.items())


def users_of_lines(text: str) -> tuple[str, ...]:
    """As ``users``, of a file with one USER:PASSWORD a line. Blank lines and those that begin with
    # do not count."""
    lines = [line.rstrip("\r") for line in text.split("\n")]
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise PolicyError("no user came, expected one USER:PASSWORD a line")
    return users(lines)


def hash_password(password: str) -> str:
    """The hash of a password as the PHC string format has it, with a random salt.

    Raises PolicyError.
    """
    password = unicodedata.normalize("NFC", password)  # RFC 7617 §2.1, as browsers send it
    if not 1 <= _size(password) <= MOST_PASSWORD or _CONTROL.search(password):
        raise PolicyError(
            f"expected a password of 1 to {MOST_PASSWORD} bytes, without control characters"
        )
    salt = os.urandom(SALT_SIZE)
    digest = hashlib.scrypt(
        password.encode(), salt=salt, n=1 << LN, r=R, p=P, dklen=HASH_SIZE,
        maxmem=128 * R * ((1 << LN) + P + 2),  # what it takes (RFC 7914 §6), no byte more
    )  # fmt: skip
    salt, digest = (base64.b64encode(part).decode().rstrip("=") for part in (salt, digest))
    return f"{HASH_MARK}ln={LN},r={R},p={P}${salt}${digest}"


def _pair(text, number):
    name, colon, password = text.partition(":")
    if not colon:  # not shown: this may be a password
        raise PolicyError(f"[{number}]: a text without a colon came, expected USER:PASSWORD")
    return name, password


def _hash(password):
    if not isinstance(password, str):
        raise PolicyError(f"{_kind(password)} came, expected a password")
    if not password.startswith(HASH_MARK):
        if _OTHER_HASH.match(password):  # it would be the password itself, for who has read it
            raise PolicyError(
                "a hash of another kind came, expected a password, or what gotunnel-agent "
                "hash-password prints"
            )
        return hash_password(password)
    match = _PHC.fullmatch(password)
    if match is None:
        raise PolicyError(
            "no hash as $scrypt$ln=14,r=8,p=1$SALT$HASH came, expected what gotunnel-agent "
            "hash-password prints"
        )
    ln, r, p = map(int, match.group(1, 2, 3))
    memory, work = 128 * r << ln, r * p << ln
    bounded = LEAST_MEMORY <= memory <= MOST_MEMORY and 0 < work <= MOST_WORK
    if not (bounded and LEAST_LN <= ln < 16 * r):  # more cannot be computed (RFC 7914 §2)
        raise PolicyError(
            f"a hash with ln={ln},r={r},p={p} came, expected ln from {LEAST_LN} to below 16*r, "
            f"that takes {LEAST_MEMORY >> 20} to {MOST_MEMORY >> 20} MiB and has 2^ln*r*p of at "
            f"most {MOST_WORK}"
        )
    try:
        for part in match.group(4, 5):
            base64.b64decode(part + "=" * (-len(part) % 4), validate=True)
    except binascii.Error:
        raise PolicyError("a hash whose base64 is cut came, expected the whole of it") from None
    return password


# --- Addresses -----------------------------------------------------------------------------------


def networks(value: object) -> tuple[str, ...]:
    """Addresses and networks, of one or a list of them. Raises PolicyError."""
    texts = _texts(value, "an address or a network such as 10.0.0.0/8")
    if len(texts) > MOST_NETWORKS:
        raise PolicyError(f"{len(texts)} of them came, expected at most {MOST_NETWORKS}")
    return tuple(dict.fromkeys(map(_network, texts)))


def _network(text):
    try:
        found = addresses.network(text)
    except ValueError as error:
        raise PolicyError(str(error)) from None
    return str(found) if "/" in text else str(found.network_address)


# --- Rates ---------------------------------------------------------------------------------------


def rate_limit(value: object) -> tuple[tuple[str, float], ...]:
    """Pairs of key and number, of one rate (per address) or a mapping. Raises PolicyError."""
    if isinstance(value, str):
        value = {"per_address": value}
    if not isinstance(value, dict):
        raise PolicyError(f"{_kind(value)} came, expected {A_RATE}; or a mapping with some of "
                          f"{', '.join(RATE_KEYS)}")  # fmt: skip
    for key in value:
        if key not in RATE_KEYS:
            raise PolicyError(f"unknown key {_shown(key)}, expected some of {', '.join(RATE_KEYS)}")
    for burst, rate in (("burst", "per_address"), ("total_burst", "total")):
        if burst in value and rate not in value:
            raise PolicyError(f"{burst} came without {rate}, expected both or neither")
    if not value:
        raise PolicyError("an empty mapping came, expected per_address, total or both")
    readers = {"per_address": _rate, "burst": _burst, "total": _rate, "total_burst": _burst}
    numbers = []
    for key, text in value.items():
        if not isinstance(text, str):
            raise PolicyError(f"{key}: {_kind(text)} came, expected a number")
        try:
            numbers.append((key, readers[key](text)))
        except PolicyError as error:
            raise PolicyError(f"{key}: {error}") from None
    return tuple(numbers)


def _rate(text):
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:/([smh]))?", text)
    rate = float(match[1]) / PERIODS[match[2] or "s"] if match else 0
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise PolicyError(f"{_shown(text)} came, expected {A_RATE}")
    return rate


def _burst(text):
    # int() alone would take "1_000", " 7" and other scripts' digits too.
    burst = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
    if not 1 <= burst <= MOST_BURST:
        raise PolicyError(f"{_shown(text)} came, expected a whole number from 1 to {MOST_BURST}")
    return burst


# --- The kinds of value --------------------------------------------------------------------------


def _texts(value, expected):
    """One text, or a list of them with at least one."""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise PolicyError(f"an empty list came, expected {expected}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            where = f"[{number}]: " if texts is value else ""
            raise PolicyError(f"{where}{_kind(text)} came, expected {expected}")
    return texts


def _size(text):
    """Bytes of a text; 0 for one that has none, with half of a character in it."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


def _kind(value):
    """What a value is, in the reader's words."""
    if value is None:
        return "no value"
    return {dict: "a mapping", list: "a list", str: "a text"}[type(value)]


def _shown(text):
    return repr(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}...")
