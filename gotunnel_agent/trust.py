"""How the agent and the visitor's helper check the certificate of the peer that they dial."""

import ssl

from .common.tls import IGNORE_UNEXPECTED_EOF

# How OpenSSL says that an answer is no TLS at all.
NO_TLS = ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG")


def client_context(ca_file=None, skip_verify=False, renegotiates=False) -> ssl.SSLContext:
    """How to check the peer that we dial: against the system's authorities, those in the file
    ``ca_file`` (PEM), or not at all, for trying things out. Raises OSError if the file holds none.

    Ciphers are Python's choice, as a target may be an old device. A gateway is none: for that, the
    caller sets AEAD.

    ``renegotiates``: whether the peer may ask for another handshake (TLS 1.2). A gateway has no
    use for it, and it costs us more than the peer; a target may (IIS does, for a certificate).
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= IGNORE_UNEXPECTED_EOF
    if not renegotiates:
        context.options |= ssl.OP_NO_RENEGOTIATION
    if skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
