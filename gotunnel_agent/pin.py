"""Gets a gateway's CA by its fingerprint (certificate pinning), as a join string names it.

The certificate comes over a connection that nothing has checked yet. That does no harm: it counts
only if its SHA-256 is the one in the join string, which came by a way that the user trusts.
"""

import contextlib
import hashlib
import ssl
from collections.abc import Iterable

from gotunnel import Deadline

from .common.tls import AEAD
from .connect import addresses_of, connect
from .trust import client_context

TIMEOUT = 10  # seconds to connect, and again for the TLS handshake


class CannotPin(Exception):
    """The gateway does not send the certificate; the text is one line for the operator."""


def fetch_ca(host: str, port: int, fingerprint: str) -> bytes:
    """The certificate (PEM) with that SHA-256 in the chain that the gateway sends. Raises CannotPin
    if the chain has none such, OSError if there is no connection or no TLS."""
    context = client_context(skip_verify=True)
    context.set_ciphers(AEAD)
    sock = connect(addresses_of(host, port), Deadline(TIMEOUT))
    with contextlib.closing(sock):
        sock.settimeout(TIMEOUT)
        with context.wrap_socket(sock, server_hostname=host) as tls:
            chain = list(unverified_chain(tls))
    for certificate in chain:
        if hashlib.sha256(certificate).hexdigest() == fingerprint:
            return ssl.DER_cert_to_PEM_cert(certificate).encode()
    raise CannotPin(
        f"{host}:{port} sends no certificate with the fingerprint in the join string, so this is "
        "another gateway, or its CA is a new one, or somebody is in between: compare HOST:PORT, "
        "and have the gateway print a new join string (gotunnel-server agents rotate)"
    )


def unverified_chain(tls: ssl.SSLSocket) -> Iterable[bytes]:
    """The certificates (DER) as the peer has sent them, the leaf first."""
    if hasattr(tls, "get_unverified_chain"):  # Python 3.13
        return [bytes(each) for each in tls.get_unverified_chain()]
    # Before, only the object inside has it.
    found = tls._sslobj.get_unverified_chain() or []  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in found]


def is_pinned(pem: bytes, fingerprint: str) -> bool:
    """Whether ``pem`` is the one certificate with that SHA-256."""
    try:
        certificate = ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))
    except ValueError:
        return False
    return hashlib.sha256(certificate).hexdigest() == fingerprint
