"""SNI and ALPN from a ClientHello, before the TLS library sees it (RFC 8446 §4.1.2, RFC 6066,
RFC 7301).

The owner of a new connection (arrival.py, newcomer.py) asks a ``Reader`` whether its first bytes
are TLS, and if so, for which hostname and which protocols. It asks again when more bytes have come.
Then the owner gives the bytes back to the connection, and the TLS library reads them again. This
module does no I/O, and reads only the parts that choose a certificate; the library checks versions,
ciphers and keys.

From the outside in, a hello is

    records       type 22, version, length, fragment; the fragments joined are
    a handshake   type 1, length, body; the body is
    a ClientHello version, random, session id, cipher suites, compression methods, extensions

The promise: whatever bytes come, ``Reader.parse`` returns a value or raises NotTLS. The result is
the same whether the bytes come at once or one at a time.
"""

import re
import struct
from typing import NamedTuple

from gotunnel_agent.common import addresses
from gotunnel_agent.common.hostnames import MAX_HOSTNAME, REQUESTED_NAME

# A hello must be complete within so many bytes. Real ones have 250 to 2000 bytes, with large
# session tickets a few thousand; nginx and HAProxy peek at 16 KiB as well. The sender chooses how
# it is cut into records, which may have one byte each.
HELLO_LIMIT = 16384

_RECORD_HEADER = 5  # bytes: type, version (2), length (2)
_RECORD_HANDSHAKE = 22  # RFC 8446 §5.1
_RECORD_MAJOR = 3  # first byte of every TLS version; the second one must be ignored
_RECORD_FRAGMENT_LIMIT = 16384  # 2**14 bytes, RFC 8446 §5.1
_MESSAGE_HEADER = 4  # bytes: type, length (3)
_MESSAGE_CLIENT_HELLO = 1  # RFC 8446 §4
_BEFORE_SESSION_ID = 34  # bytes: legacy_version (2), random (32)
_SESSION_ID_LIMIT = 32  # bytes, RFC 8446 §4.1.2
_EXTENSION = struct.Struct("!HH")  # type, length
_EXTENSION_SERVER_NAME = 0  # RFC 6066 §3
_EXTENSION_ALPN = 16  # RFC 7301 §3.1
_NAME_HOST = 0  # RFC 6066 §3, the only name type there is

# The one ALPN protocol that a CA offers in a TLS-ALPN-01 validation (RFC 8737 §4).
ACME_TLS = "acme-tls/1"

POSTGRESQL = "postgresql"  # offered by PostgreSQL's clients that begin with TLS at once
# ALPN protocols that are accepted for every hostname, whatever its mode. In tcp mode, a visitor
# such as curl offers HTTP/1.1 and HTTP/2, and its target most likely speaks HTTP/1.1.
ALWAYS_TAKEN = ("http/1.1", POSTGRESQL)

_PROTOCOL = re.compile(r"[!-~]{1,255}")  # printable ASCII, as every name in IANA's registry is
_HOSTNAME = re.compile(REQUESTED_NAME)


class Hello(NamedTuple):
    """What a TLS connection asks for.

    ``server_name`` is the hostname, lower case, no trailing dot. It is None if the hello has none,
    or an IP address, which is no hostname (RFC 6066 §3). ``alpn``: the protocols, the preferred one
    first, as latin-1, which keeps different bytes different; empty if the hello has none.
    """

    server_name: str | None
    alpn: tuple[str, ...]


def own_protocol(offered: tuple[str, ...]) -> str | None:
    """The ALPN protocol to select for a hostname in tcp mode: the visitor's first choice, since the
    target probably speaks it. None if the visitor offers none, or one of ALWAYS_TAKEN."""
    if not offered or set(offered) & set(ALWAYS_TAKEN) or not _PROTOCOL.fullmatch(offered[0]):
        return None
    return offered[0]


def older_protocol(offered: tuple[str, ...]) -> str:
    """The one of ALWAYS_TAKEN to select for a hostname in tcp mode whose visitor offers HTTP/2 as
    well, which only hostnames in http mode have."""
    return next((name for name in offered if name in ALWAYS_TAKEN), ALWAYS_TAKEN[0])


class NotTLS(Exception):
    """The bytes do not begin a TLS connection, or its hello breaks the rules."""


class Reader:
    """Reads the first bytes of one connection as they come. No whole record is read twice, so one
    byte at a time costs no more."""

    def __init__(self) -> None:
        self._at = 0  # offset of the first record that was not whole
        self._joined = b""  # the fragments of the records before it

    def parse(self, data: bytes) -> Hello | None:
        """Read the hello at the start of ``data``: all bytes that have come so far, those of
        earlier calls included. None if more must come.

        Bytes after the hello are ignored. Raises NotTLS as soon as the bytes cannot become a
        hello (SSLv2's is none), or when HELLO_LIMIT bytes hold no complete one.
        """
        message = self._message(data[:HELLO_LIMIT])
        if message is not None:
            return _client_hello(message)
        if len(data) >= HELLO_LIMIT:
            raise NotTLS(f"no end of the hello in {HELLO_LIMIT} bytes, expected a shorter one")
        return None

    def _message(self, data: bytes) -> bytes | None:
        """The body of the first handshake message, joined from its records; None if incomplete."""
        while True:
            header = data[self._at : self._at + _RECORD_HEADER]
            if header and header[0] != _RECORD_HANDSHAKE:
                raise NotTLS(f"record type {header[0]}, expected handshake ({_RECORD_HANDSHAKE})")
            if len(header) > 1 and header[1] != _RECORD_MAJOR:
                raise NotTLS(f"record version {header[1]}, expected {_RECORD_MAJOR}")
            if len(header) < _RECORD_HEADER:
                return None
            length = int.from_bytes(header[3:], "big")
            if not 1 <= length <= _RECORD_FRAGMENT_LIMIT:
                raise NotTLS(f"record of {length} bytes, expected 1 to {_RECORD_FRAGMENT_LIMIT}")
            end = self._at + _RECORD_HEADER + length
            joined = self._joined + data[self._at + _RECORD_HEADER : end]
            message = _whole(joined)
            if message is not None or end > len(data):
                return message
            self._at, self._joined = end, joined


def _whole(joined: bytes) -> bytes | None:
    """The body of the hello at the start of ``joined``; None if it is not whole."""
    if joined and joined[0] != _MESSAGE_CLIENT_HELLO:
        raise NotTLS(f"handshake type {joined[0]}, expected hello ({_MESSAGE_CLIENT_HELLO})")
    if len(joined) < _MESSAGE_HEADER:
        return None
    end = _MESSAGE_HEADER + int.from_bytes(joined[1:_MESSAGE_HEADER], "big")
    if end > HELLO_LIMIT:
        raise NotTLS(f"hello of {end} bytes, expected at most {HELLO_LIMIT}")
    return joined[_MESSAGE_HEADER:end] if len(joined) >= end else None


def _client_hello(body: bytes) -> Hello:
    session_id, at = _vector(body, _BEFORE_SESSION_ID, 1, "session id")
    if len(session_id) > _SESSION_ID_LIMIT:
        raise NotTLS(f"session id of {len(session_id)} bytes, expected at most {_SESSION_ID_LIMIT}")
    ciphers, at = _vector(body, at, 2, "cipher suites")
    if not ciphers or len(ciphers) % 2:
        raise NotTLS(f"cipher suites of {len(ciphers)} bytes, expected pairs")
    compressions, at = _vector(body, at, 1, "compression methods")
    if not compressions:
        raise NotTLS("no compression method, expected at least the null one")
    if at == len(body):  # TLS 1.2 and older may end here
        return Hello(None, ())
    block, at = _vector(body, at, 2, "extensions")
    _expect_end(body, at, "extensions")

    extensions: dict[int, bytes] = {}
    at, end = 0, len(block)
    padded = block + bytes(3)  # so a header that is cut can be unpacked; it ends beyond the block
    while at < end:
        kind, length = _EXTENSION.unpack_from(padded, at)
        start = at + _EXTENSION.size
        at = start + length
        if at > end:
            raise NotTLS(f"extension up to byte {at}, expected an end within {end} bytes")
        if kind in extensions:  # RFC 8446 §4.2; TLS libraries differ in which one they take
            raise NotTLS(f"extension {kind} twice, expected it once")
        extensions[kind] = block[start:at]
    return Hello(
        _server_name(extensions.get(_EXTENSION_SERVER_NAME)),
        _protocols(extensions.get(_EXTENSION_ALPN)),
    )


def _server_name(content: bytes | None) -> str | None:
    """The hostname in a server_name extension (RFC 6066 §3)."""
    if content is None:
        return None
    entries, at = _vector(content, 0, 2, "server names")
    _expect_end(content, at, "server names")
    if not entries:
        raise NotTLS("no server name in the list, expected one")
    names: dict[int, bytes] = {}
    at = 0
    while at < len(entries):
        kind = entries[at]
        name, at = _vector(entries, at + 1, 2, "server name")
        if kind in names:
            raise NotTLS(f"server name of type {kind} twice, expected it once")
        names[kind] = name
    return _hostname(names[_NAME_HOST]) if _NAME_HOST in names else None


def _hostname(name: bytes) -> str | None:
    text = name.decode("latin-1")
    # Only what may be an address is parsed, since that takes longer than the rest of the hello.
    if (":" in text or text[-1:].isdigit()) and addresses.parse(text) is not None:
        return None
    if not _HOSTNAME.fullmatch(text):
        raise NotTLS(f"server name {text[:MAX_HOSTNAME]!r}, expected an ASCII hostname")
    # RFC 6066 §3 forbids the trailing dot; it means the same name, so we are lenient.
    text = text.lower().removesuffix(".")
    if len(text) > MAX_HOSTNAME:
        raise NotTLS(f"server name of {len(text)} bytes, expected at most {MAX_HOSTNAME}")
    return text


def _protocols(content: bytes | None) -> tuple[str, ...]:
    """The names in an ALPN extension (RFC 7301 §3.1)."""
    if content is None:
        return ()
    entries, at = _vector(content, 0, 2, "protocols")
    _expect_end(content, at, "protocols")
    if not entries:
        raise NotTLS("no protocol in the ALPN list, expected one")
    names = []
    at = 0
    while at < len(entries):
        name, at = _vector(entries, at, 1, "protocol")
        if not name:
            raise NotTLS("empty protocol name, expected 1 to 255 bytes")
        names.append(name.decode("latin-1"))
    return tuple(names)


def _vector(data: bytes, at: int, width: int, what: str) -> tuple[bytes, int]:
    """The vector at ``at``, its length in ``width`` bytes before it, and the offset behind it.

    TLS writes everything of varying length like this (RFC 8446 §3.4).
    """
    start = at + width
    end = start + int.from_bytes(data[at:start], "big")
    if end > len(data):  # true as well if the length itself is cut
        raise NotTLS(f"{what} up to byte {end}, expected an end within {len(data)} bytes")
    return data[start:end], end


def _expect_end(data: bytes, at: int, what: str) -> None:
    if at != len(data):
        raise NotTLS(f"{len(data) - at} bytes after the {what}, expected none")
