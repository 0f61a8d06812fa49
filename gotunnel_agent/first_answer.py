"""Looks at the first bytes that a target in http mode answers, to recognise a target of another
kind: one with TLS that ``target`` does not name so, one that speaks HTTP/2 alone, or SSH.

Such a target answers with a TLS alert, with a page that says so, with the first frame of HTTP/2, or
closes without a byte. The visit gets what came. The log says what to change.
"""

import contextlib
import logging
import ssl
from collections.abc import Callable

from gotunnel import Deadline

from .common.duplex import Duplex
from .config import H2, H2C, Target, Tunnel
from .connect import addresses_of, connect
from .greeting import protocol_of
from .trust import begin_tls, client_context

log = logging.getLogger("gotunnel.first_answer")

LOOK_TIMEOUT = 2  # seconds to connect, and again for the handshake: the target has just been there
# Seconds between two lines about the same hostname, and between two looks; also the time that a
# target is left alone after an ordinary answer.
LOOK_AGAIN = 60.0
MOST_LOOKED_AT = 4096  # bytes of a page

# What a port with TLS answers to a request in plain HTTP: nginx; Go, Caddy and Traefik; Apache;
# Tomcat. Others send a TLS alert or close.
WANTS_TLS = (
    b"plain http request was sent to https port",
    b"client sent an http request to an https server",
    b"speaking plain http to an ssl-enabled server port",
    b"combination of host and port requires tls",
)


class FirstAnswer:
    """A target as the source of its answer. The first read looks at what has come; all further ones
    are ``read_on()``, and cost nothing more."""

    def __init__(
        self,
        target: Duplex,
        tunnel: Tunnel,
        note_ordinary: Callable[[], object],
        read_on: Callable[[], bytes],
    ):
        """``note_ordinary()`` is called if the first bytes are those of an ordinary answer."""
        self.read: Callable[[], bytes] = self._read_first
        self.reset, self.cut = target.reset, target.cut
        self.over = False  # the visit has ended: what is read from now on proves nothing
        self.odd = b""  # the first bytes, if they are not those of an ordinary answer
        self.silent = False  # the target has ended the connection before its first byte
        self._target = target
        self._read_on = read_on
        self._note_ordinary = note_ordinary
        self._protocol = tunnel.protocol

    def _read_first(self) -> bytes:
        self.read = self._read_on
        try:
            data = self._target.read()
        except OSError:
            self.silent = not self.over
            raise
        if not data:
            self.silent = not self.over
        elif (
            data[:1] == b"\0"  # a SETTINGS frame begins with its length
            if self._protocol
            else data[:7] == b"HTTP/1." and data[8:13] != b" 400 "
        ):
            self._note_ordinary()
        else:
            self.odd = data[:MOST_LOOKED_AT]
        return data


def tell(answer: FirstAnswer, tunnel: Tunnel, may_tell: Callable[[], bool]) -> None:
    """Log what is wrong with the target, after the visit. ``may_tell()`` is asked before it costs
    anything; it is false if it was true, or an answer was ordinary, less than LOOK_AGAIN ago."""
    if not (answer.odd or answer.silent) or not may_tell():
        return
    problem = problem_of(answer.odd, tunnel) if answer.odd else ""
    if answer.silent and not tunnel.target.tls and speaks_tls(tunnel.target):
        problem = _with_tls(tunnel)
    if problem:
        log.warning("%s: target %s %s", tunnel.hostname, tunnel.target, problem)


def problem_of(first: bytes, tunnel: Tunnel) -> str:
    """What the first bytes of an answer show to be wrong with a tunnel, to be put behind its
    target; "" if they show nothing."""
    protocol = protocol_of(first)
    if protocol == "TLS" or protocol == "HTTP" and _wants_tls(first):
        return "" if tunnel.target.tls else _with_tls(tunnel)
    if protocol == "HTTP":
        return "answers in HTTP/1.1; remove protocol from the tunnel" if tunnel.protocol else ""
    if protocol == "HTTP/2":
        return f"speaks HTTP/2; add protocol: {H2 if tunnel.target.tls else H2C} to the tunnel"
    return f"speaks {protocol}; write mode: tcp" if protocol else ""


def _wants_tls(page: bytes) -> bool:
    text = b" ".join(page.lower().split())
    return any(words in text for words in WANTS_TLS)


def _with_tls(tunnel: Tunnel) -> str:
    if tunnel.target.path:
        return "speaks TLS, which a target that is a unix socket cannot have; name its port"
    url = tunnel.target._replace(tls=True)
    more = f", and protocol: {H2}" if tunnel.protocol else ""
    return f"speaks TLS; write {url} as target{more}"


def speaks_tls(target: Target) -> bool:
    """Whether a target answers a TLS handshake. Nothing else is sent."""
    if target.path:
        return False
    with contextlib.suppress(OSError):
        addresses = addresses_of(target.host, target.port)
        with contextlib.closing(Duplex(connect(addresses, Deadline(LOOK_TIMEOUT)))) as duplex:
            try:
                begin_tls(duplex, client_context(skip_verify=True), target.host, LOOK_TIMEOUT)
            except ssl.SSLError:  # an alert: it is TLS that answers
                pass
            return True
    return False
