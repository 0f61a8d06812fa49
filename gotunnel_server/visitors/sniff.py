"""What a connection to the public port begins with: TLS, or something that was not encrypted.

Bytes in, values out. The first bytes decide by which door a visitor comes in:

    TLS          22, 3                             client_hello.py reads on
    SSH          "SSH-" (RFC 4253 §4.2)            a raw visit
    HTTP         a method and a blank              a redirect to https://
    PostgreSQL   SSLRequest, GSSENCRequest         an answer of one byte; then TLS, or another try
                 CancelRequest                     a raw visit, if it is of a session that we know
                 (PostgreSQL, "Message Formats")
    anything     none of these                     a raw visit, if the operator wants any

Nothing is taken from the connection here.
"""

import re
import struct
from typing import NamedTuple

TLS, SSH, HTTP, SSL_REQUEST, GSS_REQUEST, CANCEL_REQUEST, OTHER = range(7)

# Bytes within which an HTTP method must end: the longest that is registered with IANA has 17
# (UPDATEREDIRECTREF).
METHOD_LIMIT = 24
_METHOD = re.compile(rb"[A-Z][A-Z-]*")

# What PostgreSQL's clients send before TLS: a length and a code that no version ever has.
_SSL_REQUEST = struct.pack("!II", 8, 80877103)
_GSS_REQUEST = struct.pack("!II", 8, 80877104)
YES, NO = b"S", b"N"  # the answers to them
# A CancelRequest is its length, this code and a key.
_CANCEL_CODE = struct.pack("!I", 80877102)
_BEFORE_KEY = 8  # bytes
# Bytes of a key: the number of the process, and the secret, which has 4 bytes up to version 3.0 of
# the protocol and at most 256 from 3.2 on.
LEAST_KEY, MOST_KEY = 8, 260
EXACT = ((b"SSH-", SSH), (_SSL_REQUEST, SSL_REQUEST), (_GSS_REQUEST, GSS_REQUEST))


class Knock(NamedTuple):
    """``kind`` is one of TLS to OTHER; ``size`` is how many bytes only say so, and are used up."""

    kind: int
    size: int = 0


def knock(data: bytes) -> Knock | None:
    """What ``data``, all that has come so far, begins; None if more must come to tell.

    It says the same however the bytes are cut.
    """
    for start, kind in EXACT:
        if data.startswith(start):
            return Knock(kind, 0 if kind == SSH else len(start))
        if start.startswith(data):
            return None
    cancels = _cancels(data)
    if cancels is not False:
        return cancels and Knock(CANCEL_REQUEST)
    if data[0] == 22:  # a handshake record; whether it is one in earnest client_hello.Reader tells
        return Knock(TLS)
    method = _METHOD.match(data)
    if method and method.end() <= METHOD_LIMIT:
        if data[method.end() : method.end() + 1] == b" ":
            return Knock(HTTP)
        if method.end() == len(data) < METHOD_LIMIT:
            return None
    return Knock(OTHER)


def _cancels(data):
    """Whether it begins a CancelRequest; None if more must come to tell."""
    length, code = data[:4], data[4:_BEFORE_KEY]
    if not length.startswith(b"\0\0"[: len(length)]) or not _CANCEL_CODE.startswith(code):
        return False
    size = int.from_bytes(length, "big") - _BEFORE_KEY
    if len(length) == 4 and not LEAST_KEY <= size <= MOST_KEY:
        return False
    return len(code) == len(_CANCEL_CODE) or None
