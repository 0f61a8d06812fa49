"""Tells by the first bytes of a connection which protocol the visitor speaks.

    protocol     first bytes                       what follows
    TLS          22, 3                             client_hello.py reads on
    SSH          "SSH-" (RFC 4253 §4.2)            a visit in tcp mode
    HTTP         a method and a blank              a redirect to https://
    PostgreSQL   SSLRequest, GSSENCRequest         an answer of one byte; then TLS, or another try
                 CancelRequest                     a visit in tcp mode, if its session is known
                 (PostgreSQL, "Message Formats")
    other        none of these                     a visit in tcp mode, to RAW_TCP_HOST

Bytes in, values out: nothing is read from the connection here.
"""

import re
import struct
from typing import NamedTuple

TLS, SSH, HTTP, SSL_REQUEST, GSS_REQUEST, CANCEL_REQUEST, OTHER = range(7)

# Longest HTTP method, in bytes. The longest one registered with IANA, UPDATEREDIRECTREF, has 17.
METHOD_LIMIT = 24
_METHOD = re.compile(rb"[A-Z][A-Z-]*")

# PostgreSQL's clients send these before TLS: a length, and a code in place of a protocol version.
_SSL_REQUEST = struct.pack("!II", 8, 80877103)
_GSS_REQUEST = struct.pack("!II", 8, 80877104)
YES, NO = b"S", b"N"  # the answers to them
# A CancelRequest consists of its length, this code and a key.
_CANCEL_CODE = struct.pack("!I", 80877102)
_BEFORE_KEY = 8  # bytes of length and code
# Sizes of a key, in bytes: a process number of 4, and a secret, which has 4 bytes up to version 3.0
# of the protocol and at most 256 from 3.2 on.
LEAST_KEY, MOST_KEY = 8, 260
# Protocols that always begin with the same bytes.
EXACT = ((b"SSH-", SSH), (_SSL_REQUEST, SSL_REQUEST), (_GSS_REQUEST, GSS_REQUEST))


class Recognised(NamedTuple):
    """The protocol of a connection. ``kind``: one of TLS to OTHER. ``size``: how many of the first
    bytes only request TLS or GSSAPI; they do not belong to what follows."""

    kind: int
    size: int = 0


_TLS = Recognised(TLS)


def recognise(data: bytes) -> Recognised | None:
    """The protocol that ``data``, all bytes so far, begins; None if more bytes are needed. The
    result does not depend on how the bytes are split into reads."""
    if data[:1] == b"\x16":  # a TLS handshake record; client_hello.Reader checks the rest
        return _TLS
    for start, kind in EXACT:
        if data.startswith(start):
            return Recognised(kind, 0 if kind == SSH else len(start))
        if start.startswith(data):
            return None
    cancels = _cancels(data)
    if cancels is not False:
        return Recognised(CANCEL_REQUEST) if cancels else None
    method = _METHOD.match(data)
    if method and method.end() <= METHOD_LIMIT:
        if data[method.end() : method.end() + 1] == b" ":
            return Recognised(HTTP)
        if method.end() == len(data) < METHOD_LIMIT:
            return None
    return Recognised(OTHER)


def _cancels(data: bytes) -> bool | None:
    """Whether ``data`` begins a CancelRequest; None if more bytes are needed."""
    length, code = data[:4], data[4:_BEFORE_KEY]
    # The length is big-endian and below 65536, so its first two bytes are zero.
    if not length.startswith(b"\0\0"[: len(length)]) or not _CANCEL_CODE.startswith(code):
        return False
    size = int.from_bytes(length, "big") - _BEFORE_KEY
    if len(length) == 4 and not LEAST_KEY <= size <= MOST_KEY:
        return False
    return len(code) == len(_CANCEL_CODE) or None
