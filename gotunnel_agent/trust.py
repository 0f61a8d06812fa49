"""TLS contexts with which the agent and ``forward`` check the certificate of a peer that they
dial."""

import ssl

from .common import small_file
from .common.tls import IGNORE_UNEXPECTED_EOF

# OpenSSL's reasons that mean that the peer does not speak TLS at all.
NO_TLS = ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG")

MOST_CAS = 4 << 20  # bytes of a CA file that comes by a pipe; the system's has some 200 kB


def client_context(
    ca_file: str | None = None,
    skip_verify: bool = False,
    renegotiates: bool = False,
    ca: str | None = None,
) -> ssl.SSLContext:
    """A context that checks the certificate of the peer that we dial. It trusts the system's CAs,
    or those in the file ``ca_file``, or in the text ``ca`` (PEM); with ``skip_verify`` it accepts
    any certificate, for trials. Raises OSError if there is no certificate in them.

    The ciphers are Python's defaults, as a target may be an old device. For a gateway the caller
    sets AEAD.

    ``renegotiates``: the peer may ask for another handshake (TLS 1.2). A gateway needs none, and a
    handshake costs us more than the peer that asks. A target may need it (IIS does, to ask for a
    certificate).
    """
    if ca_file is not None and small_file.is_pipe(ca_file):  # OpenSSL would wait for its writer
        text = small_file.read(ca_file, MOST_CAS).decode("ascii", "ignore")
        context = ssl.create_default_context(cadata=text or " ")  # "" would mean the system's CAs
    else:
        context = ssl.create_default_context(cafile=ca_file, cadata=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= IGNORE_UNEXPECTED_EOF
    if not renegotiates:
        context.options |= ssl.OP_NO_RENEGOTIATION
    if skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class CannotTrust(Exception):
    """A CA file cannot be used; the text is one line for the operator."""


def tls_context(ca_file: str | None, skip_verify: bool, key: str = "ca_file") -> ssl.SSLContext:
    """A context that checks a gateway or a target. Raises CannotTrust if ``ca_file``, which the
    configuration names under ``key``, holds no certificates."""
    try:
        return client_context(ca_file, skip_verify, renegotiates=key == "target_ca_file")
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or error
        raise CannotTrust(f"{key} {ca_file}: {reason}, expected certificates as PEM") from None
