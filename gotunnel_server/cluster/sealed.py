"""Seals what holds private keys before it goes to Redis: Sealer, with the keys of CLUSTER_KEY_FILE.

Redis may be shared with other programs, write its memory to a disk and send it to replicas. So a
private key is only there encrypted and authenticated (Fernet: AES-CBC with HMAC-SHA256), with a key
that only the gateways have. Sealed content looks like this:

    gotunnel-sealed 1 ID⏎        ID: which key sealed it; an HKDF of the key, it reveals nothing
    gAAAAA...                    a Fernet token of: the name under which it is kept, ⏎, the content

The name inside binds the content to its place: nobody can put one certificate in another's place.

CLUSTER_KEY_FILE has one key, or two while keys are changed (rotation). The first one seals; both
open. What was opened with the second one is to be sealed anew, with the first.
"""

from __future__ import annotations

import base64
import errno
from collections.abc import Sequence
from typing import NamedTuple

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SETTING = "CLUSTER_KEY_FILE"
ID_DIGITS = 16  # of a key: enough to tell the few keys of a cluster apart

_MARK = b"gotunnel-sealed 1 "
_HEAD = len(_MARK) + ID_DIGITS + 1  # bytes before the token


class WrongKey(OSError):
    """Content is sealed with a key that we do not have. It is left as it is; ``strerror`` tells the
    operator what to do."""

    def __init__(self, where: str) -> None:
        super().__init__(
            errno.EACCES,
            f"{where} is encrypted with a key that this gateway does not have, and stays as it is: "
            f"give this gateway the {SETTING} of the other members",
        )


class Broken(ValueError):
    """Content was not sealed by a gateway, or was changed since."""


class Opened(NamedTuple):
    content: bytes
    is_old: bool  # it is sealed with the second key


class Sealer:
    """Seals and opens content. Any thread."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """``keys``: 32 bytes each; the first one seals, all open."""
        self._fernets = {_id(key): Fernet(base64.urlsafe_b64encode(key)) for key in keys}
        self.ids = tuple(self._fernets)

    def seal(self, name: str, content: bytes) -> bytes:
        """Content as it may be kept under ``name``."""
        first = self.ids[0]
        token = self._fernets[first].encrypt(name.encode() + b"\n" + content)
        return _MARK + first.encode() + b"\n" + token

    def open(self, name: str, sealed: bytes) -> Opened:
        """What was sealed for ``name``. Raises WrongKey, Broken."""
        if not sealed.startswith(_MARK) or sealed[_HEAD - 1 : _HEAD] != b"\n":
            raise Broken("not encrypted by a gateway")
        key_id = sealed[len(_MARK) : _HEAD - 1].decode("ascii", "replace")
        fernet = self._fernets.get(key_id)
        if fernet is None:
            raise WrongKey(name)
        try:
            named, _, content = fernet.decrypt(sealed[_HEAD:]).partition(b"\n")
        except InvalidToken:
            raise Broken("changed since a gateway encrypted it") from None
        if named != name.encode():
            raise Broken("encrypted by a gateway for another name")
        return Opened(content, key_id != self.ids[0])


def new_key() -> str:
    """A new line for CLUSTER_KEY_FILE."""
    return Fernet.generate_key().decode()


def _id(key: bytes) -> str:
    derived = HKDF(hashes.SHA256(), ID_DIGITS // 2, None, b"gotunnel: the key's id").derive(key)
    return derived.hex()
