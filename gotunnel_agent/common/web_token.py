"""Signs and reads the tokens by which agents register: JSON Web Tokens (RFC 7519) with HS256.

A token is three parts with dots between, each in base64url without padding (RFC 7515 §7.1): a
header, the claims, and the HMAC of both. HS256 is the only algorithm, so that a token cannot choose
how it is checked. This needs hmac alone; a library for all algorithms loads ten megabytes of them.

What the claims mean is not decided here: see gotunnel_server/agents/credentials.py.
"""

from __future__ import annotations

import hmac
import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from typing import Any, NamedTuple

from .one_line import on_one_line

ALGORITHM = "HS256"

_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")


class Unreadable(Exception):
    """A text is not such a token; one clause that says why."""


class WebToken(NamedTuple):
    """A token that was read. Its claims are unchecked until is_signed_with() is true."""

    claims: dict[str, Any]
    signed: bytes  # header and claims, as they came
    signature: bytes

    def is_signed_with(self, secret: str) -> bool:
        return hmac.compare_digest(self.signature, _signature(self.signed, secret))


def sign(claims: Mapping[str, object], secret: str) -> str:
    """A token with these claims."""
    header = {"alg": ALGORITHM, "typ": "JWT"}
    signed = _encode(_json(header)) + b"." + _encode(_json(claims))
    return (signed + b"." + _encode(_signature(signed, secret))).decode()


def read(text: str) -> WebToken:
    """Read a token that anybody may have made. Raises Unreadable."""
    if not _COMPACT.fullmatch(text):
        raise Unreadable("the token is malformed, expected three base64url parts with dots")
    signed, _, signature = text.encode().rpartition(b".")
    try:
        head, claims, digest = map(_decode, (*signed.split(b"."), signature))
        _check(_object(head))
    except (ValueError, RecursionError):
        raise Unreadable("the token cannot be read, expected a JSON Web Token") from None
    try:
        return WebToken(_object(claims), signed, digest)
    except (ValueError, RecursionError):
        raise Unreadable("the token's claims cannot be read, expected a JSON object") from None


def _check(header: dict[str, Any]) -> None:
    algorithm = header.get("alg")
    if not isinstance(header.get("kid", ""), str):  # RFC 7515 §4.1.4
        raise ValueError("kid is no text")
    if algorithm != ALGORITHM:
        came = on_one_line(algorithm, 20) if isinstance(algorithm, str) else "missing"
        raise Unreadable(f"the token's algorithm is {came}, expected {ALGORITHM}")
    if "crit" in header:  # extensions that must be understood (RFC 7515 §4.1.11)
        raise Unreadable("the token's header has crit, expected none")


def _signature(signed: bytes, secret: str) -> bytes:
    return hmac.digest(secret.encode(), signed, "sha256")


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _object(content: bytes) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _encode(content: bytes) -> bytes:
    return urlsafe_b64encode(content).rstrip(b"=")


def _decode(part: bytes) -> bytes:
    """The one content that has this spelling: bits beyond the last whole byte must be zero."""
    content = urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    if _encode(content) != part:
        raise ValueError("not the base64url of any content")
    return content
