"""Dials a peer once more whose certificate was refused, to say more about it.

Nothing is sent but a TLS handshake. What is learned here is for a message: no decision depends on
it.
"""

import contextlib
import socket
import ssl
from collections.abc import Iterator

from gotunnel import Deadline

from .common.duplex import NO_LINGER
from .connect import addresses_of, connect
from .trust import client_context

TIMEOUT = 3  # seconds to connect, and for each step of the handshake: the peer has just answered
# In each name of a CA of Let's Encrypt for trials (its "staging environment").
STAGING = b"(STAGING)"
MOST_NAMES = 3  # of a certificate, in a message


def trusted_names(
    host: str, port: int, sni: str | None = None, ca_file: str | None = None
) -> tuple[str, ...] | None:
    """The names in the certificate of a peer, if a CA in ``ca_file`` (None: one that the system
    trusts) has signed it; whether it fits the name that was dialled does not matter. None if no
    such CA has, or there is no connection. ``sni``: None for the host's name."""
    try:
        context = client_context(ca_file)
        context.check_hostname = False
        with _dial(host, port, sni or host, context) as peer:
            certificate = peer.getpeercert() or {}
    except OSError:
        return None
    names = certificate.get("subjectAltName", ())
    return tuple(str(name[1]) for name in names if isinstance(name, tuple))


def is_of_staging(host: str, port: int, sni: str | None = None) -> bool:
    """Whether a peer has a certificate of Let's Encrypt's staging environment."""
    with contextlib.suppress(OSError):
        with _dial(host, port, sni or host, client_context(skip_verify=True)) as peer:
            return STAGING in (peer.getpeercert(binary_form=True) or b"")
    return False


@contextlib.contextmanager
def _dial(host: str, port: int, sni: str, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    with connect(addresses_of(host, port), Deadline(TIMEOUT)) as sock:
        sock.settimeout(TIMEOUT)
        with context.wrap_socket(sock, server_hostname=sni) as peer:
            # A gateway has dialled a target in tcp mode by now. A reset ends that visit at once;
            # after a close, an SSH server would wait for more.
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            yield peer


def shown(names: tuple[str, ...]) -> str:
    """Some names of a certificate, for a message."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
