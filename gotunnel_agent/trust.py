"""TLS with a peer that the agent or ``forward`` dials: the context that checks its certificate, the
handshake, and words for what is wrong with a CA file or a certificate."""

import os
import ssl
from datetime import datetime, timezone

from .common import small_file
from .common.duplex import Duplex
from .common.hostnames import for_socket
from .common.tls import IGNORE_UNEXPECTED_EOF
from .greeting import protocol_of

# OpenSSL's reasons that mean that the peer does not speak TLS at all.
NO_TLS = ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG")
UNKNOWN_NAME = "TLSV1_UNRECOGNIZED_NAME"  # likewise: the peer's alert about the SNI

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


class NoTLS(OSError):
    """The peer does not speak TLS. str() says what it does, to be put behind its name: "speaks SSH
    without TLS"; ``protocol`` is what it speaks, "" if that is not known."""

    def __init__(self, text: str, protocol: str = ""):
        super().__init__(text)
        self.protocol = protocol


class ClosedInHandshake(NoTLS):
    """The peer closes the connection in the TLS handshake."""


def begin_tls(
    duplex: Duplex, context: ssl.SSLContext, hostname: str, timeout: float | None
) -> None:
    """TLS with a peer that we have dialled, its handshake included.

    Raises NoTLS; ssl.SSLCertVerificationError for a certificate that does not count; TimeoutError
    after ``timeout`` seconds; ssl.SSLError if the handshake fails for any other reason.
    """
    duplex.start_tls(context, server_side=False, server_hostname=for_socket(hostname))
    try:
        duplex.handshake_within(timeout)
    except TimeoutError:
        raise TimeoutError("the program there did not answer in TLS in time") from None
    except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
        raise ClosedInHandshake("closed the connection in the TLS handshake") from None
    except ssl.SSLError as error:
        if error.reason not in NO_TLS:
            raise
        protocol = protocol_of(duplex.refused)
        text = f"speaks {protocol} without TLS" if protocol else "does not speak TLS"
        raise NoTLS(text, protocol) from None


# Numbers of OpenSSL for what is wrong with a certificate (x509_vfy.h).
NOT_YET_VALID, EXPIRED = 9, 10
OTHER_NAME, OTHER_ADDRESS = 62, 64
# Of an unknown CA: issuer not found, of the last certificate or of the first; self-signed, itself
# or in its chain.
NO_ISSUER = (20, 21)
UNKNOWN_CA = (18, 19, *NO_ISSUER)


NO_SYSTEM_CAS = (
    "this system has no CA certificates: install them (in Debian, apt install ca-certificates; on "
    "macOS, run Install Certificates.command of Python from python.org)"
)


def system_has_no_cas(code: int) -> bool:
    """Whether there is no CA that this system trusts, so that no public certificate counts.
    ``code``: OpenSSL's number of what is wrong with one. A chain that ends in a self-signed
    certificate is from a private CA: others do not send that."""
    if code not in NO_ISSUER:
        return False
    folder = ssl.get_default_verify_paths().capath
    if folder is not None and os.path.isdir(folder) and os.listdir(folder):
        return False  # OpenSSL reads them when it needs them
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    return context.cert_store_stats()["x509_ca"] == 0


def clock_advice(code: int, renew: str) -> str:
    """What to do about a certificate that is NOT_YET_VALID or EXPIRED. ``renew`` says who renews
    it."""
    clock = this_clock()
    if code == NOT_YET_VALID:
        return f"set this machine's clock, which says {clock}"
    return f"{renew}, unless this machine's clock is wrong, which says {clock}"


def this_clock() -> str:
    """What this machine's clock says now, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


class CannotTrust(Exception):
    """A CA file cannot be used; the text is one line for the operator."""


def tls_context(ca_file: str | None, skip_verify: bool, key: str = "ca_file") -> ssl.SSLContext:
    """A context that checks a gateway or a target. Raises CannotTrust if ``ca_file``, which the
    configuration names under ``key``, holds no certificates."""
    try:
        return client_context(ca_file, skip_verify, renegotiates=key == "target_ca_file")
    except OSError as error:  # ssl.SSLError is one
        reason = why_no_cas(ca_file or "", error)
        raise CannotTrust(f"{key} {ca_file}: {reason}, expected certificates as PEM") from None


def why_no_cas(path: str, error: OSError) -> str:
    """Why the file ``path`` has no CA certificates that client_context() could use; ``error`` is
    what that has raised."""
    try:
        content = b"" if small_file.is_pipe(path) else small_file.read(path, MOST_CAS)
    except IsADirectoryError:
        return "it is a folder"
    except OSError as unreadable:
        return unreadable.strerror or str(unreadable)
    if b"-----BEGIN CERTIFICATE-----" in content:
        return f"a certificate in it cannot be read ({getattr(error, 'reason', None) or error})"
    if b" PRIVATE KEY-----" in content:
        return "it holds a private key, and no certificate"
    if b"-----BEGIN CERTIFICATE REQUEST-----" in content:
        return "it holds a request for a certificate, and no certificate"
    if _is_der(content):
        return f"it is not text (DER); openssl x509 -inform der -in {path} -out ca.pem converts it"
    return "no certificate is in it" if content.strip() else "it is empty"


def _is_der(content: bytes) -> bool:
    """Whether a file holds a certificate in its binary form."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content)
    except (OSError, ValueError):
        return False
    return True
