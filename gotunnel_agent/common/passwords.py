"""Passwords of visitors (basic_auth), and their scrypt hashes as text.

A hash is written in the PHC string format, with unpadded base64:
"$scrypt$ln=14,r=8,p=1$SALT$HASH". The agent makes it (``gotunnel-agent hash-password``, or when it
reads its configuration); the gateway computes it once for each visitor.

No PasswordError and no repr shows a password, a hash, or a text that may be meant as one.
"""

import base64
import binascii
import hashlib
import os
import re
import unicodedata
from typing import NamedTuple

from .hidden import shown

# Users of one tunnel. With names of usual length, all fit into a register message (64 KiB).
MOST_USERS = 100
MOST_USER = 255  # bytes
MOST_PASSWORD = 1024  # bytes
CONTROL = re.compile(rb"[\x00-\x1f\x7f]")  # in no user name and no password (RFC 7617 §2)

# The cost of scrypt (RFC 7914). LN, R and P are for the hashes that we make: one of OWASP's
# recommended settings, 16 MiB and some 50 ms. Hashes from elsewhere may take up to MOST_MEMORY,
# other programs' default (ln=16). With less than LEAST_MEMORY a hash would protect too little.
LN, R, P = 14, 8, 1
LEAST_LN = 10
LEAST_MEMORY, MOST_MEMORY = 1 << 20, 1 << 26  # bytes, 128 * r * 2^ln
MOST_WORK = 1 << 19  # 2^ln * r * p, some 200 ms
SALT_SIZE, HASH_SIZE = 16, 32  # bytes, of the hashes that we make

HASH_MARK = "$scrypt$"
_PHC = re.compile(
    r"\$scrypt\$ln=([0-9]{1,2}),r=([0-9]{1,4}),p=([0-9]{1,4})"
    r"\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})"  # 8 to 64 and 16 to 64 bytes
)
# What htpasswd and others write, such as "$2y$05$..." and "{SHA}...".
_OTHER_HASH = re.compile(r"\$[A-Za-z0-9-]{1,16}\$.|\{[A-Za-z0-9-]{2,16}\}.")


class PasswordError(ValueError):
    """A text can be neither a password nor a hash; says what came and what was expected."""


class Hash(NamedTuple):
    """A password's scrypt hash; str() is its text."""

    ln: int
    r: int
    p: int
    salt: bytes
    digest: bytes

    def __repr__(self) -> str:
        return shown(self, "salt", "digest")

    @classmethod
    def read(cls, text: str) -> "Hash":
        """The hash in ``text``. Raises PasswordError."""
        match = _PHC.fullmatch(text)
        if match is None:
            raise PasswordError(
                "no hash of the form $scrypt$ln=14,r=8,p=1$SALT$HASH came, expected what "
                "gotunnel-agent hash-password prints"
            )
        ln, r, p = map(int, match.group(1, 2, 3))
        memory, work = 128 * r << ln, r * p << ln
        bounded = LEAST_MEMORY <= memory <= MOST_MEMORY and 0 < work <= MOST_WORK
        if not (bounded and LEAST_LN <= ln < 16 * r):  # the upper bound is RFC 7914 §2's
            raise PasswordError(
                f"a hash with ln={ln},r={r},p={p} came, expected ln from {LEAST_LN} to below 16*r, "
                f"{LEAST_MEMORY >> 20} to {MOST_MEMORY >> 20} MiB of memory (128*r*2^ln bytes) and "
                f"2^ln*r*p of at most {MOST_WORK}"
            )
        try:
            salt, digest = (
                base64.b64decode(part + "=" * (-len(part) % 4), validate=True)
                for part in match.group(4, 5)
            )
        except binascii.Error:
            raise PasswordError(
                "a hash with incomplete base64 came, expected the whole hash"
            ) from None
        return cls(ln, r, p, salt, digest)

    @classmethod
    def of(cls, password: bytes, salt: bytes = b"") -> "Hash":
        """A new hash of ``password``, with a random salt unless there is one; takes some 50 ms."""
        made = cls(LN, R, P, salt or os.urandom(SALT_SIZE), bytes(HASH_SIZE))
        return cls(LN, R, P, made.salt, made.compute(password))

    def __str__(self) -> str:
        salt, digest = (
            base64.b64encode(part).decode().rstrip("=") for part in (self.salt, self.digest)
        )
        return f"{HASH_MARK}ln={self.ln},r={self.r},p={self.p}${salt}${digest}"

    def compute(self, password: bytes) -> bytes:
        """The digest of ``password``; equal to ``digest`` if that is the right password."""
        n = 1 << self.ln
        return hashlib.scrypt(
            password, salt=self.salt, n=n, r=self.r, p=self.p, dklen=len(self.digest),
            maxmem=128 * self.r * (n + self.p + 2),  # what scrypt needs (RFC 7914 §6), exactly
        )  # fmt: skip


def hash_password(password: str, salt: bytes = b"") -> str:
    """The text of a new hash of a password; takes some 50 ms. For ``salt`` see Hash.of(). Raises
    PasswordError."""
    content = _encoded(unicodedata.normalize("NFC", password))  # RFC 7617 §2.1, as browsers send it
    if not 1 <= len(content) <= MOST_PASSWORD or CONTROL.search(content):
        raise PasswordError(
            f"expected a password of 1 to {MOST_PASSWORD} bytes, without control characters"
        )
    return str(Hash.of(content, salt))


def hash_if_plain(text: str, salt: bytes = b"") -> str:
    """The hash for a text that a configuration gives as password or hash. For ``salt`` see
    Hash.of(). Raises PasswordError."""
    if text.startswith(HASH_MARK):
        Hash.read(text)
        return text
    if _OTHER_HASH.match(text):  # taken as a password, the hash itself would let visitors in
        raise PasswordError(
            "a hash of another kind came, expected a password, or a hash that gotunnel-agent "
            "hash-password prints"
        )
    return hash_password(text, salt)


def valid_user(name: str) -> bool:
    """Whether a text can be a user name (RFC 7617 §2)."""
    content = _encoded(name)
    return 1 <= len(content) <= MOST_USER and ":" not in name and not CONTROL.search(content)


def _encoded(text: str) -> bytes:
    """A text in UTF-8; b"" for one that cannot be encoded, since it holds a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return b""
