"""The proofs that we hold a hostname, as long as a CA may ask for them.

    http-01        a file on port 80, under /.well-known/acme-challenge/ (RFC 8555 §8.3)
    tls-alpn-01    a certificate by TLS with ALPN "acme-tls/1", on port 443 (RFC 8737)

An order publishes a proof for the length of a block; listeners ask for it by hostname. A CA
asks several times, from several places.
"""

import contextlib
import re
import ssl
import tempfile
import threading
from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gotunnel_agent.common.tls import AEAD

from ..net.client_hello import ACME_TLS
from .acme_errors import HOST, CaError
from .folder import sweep

HTTP_01, TLS_ALPN_01 = "http-01", "tls-alpn-01"
PATH = "/.well-known/acme-challenge/"
PROOFS = ".proof-*.tmp"  # files that a gateway leaves which is killed in that moment

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")  # base64url (RFC 8555 §8.1); real ones have 43
_ACME_IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")  # RFC 8737 §3
_OCTET_STRING = b"\x04\x20"  # DER: so many bytes (32) follow
_LIFETIME = timedelta(days=1)  # nobody looks at it


class Challenges:
    """The proofs that are published now. Any thread."""

    def __init__(self, types, folder=None):
        """``types`` are those that a CA can see here: HTTP_01, TLS_ALPN_01.

        ``folder`` is where a certificate and its key lie for a moment; None for the system's own.
        Those that killed gateways have left there are removed.
        """
        self.types = tuple(types)
        self._folder = folder
        with contextlib.suppress(OSError):  # they harm nobody
            for path in folder.glob(PROOFS) if folder else ():
                sweep(path)
        self._bodies = {}  # (hostname, token): bytes
        self._contexts = {}  # hostname: SSLContext
        self._lock = threading.Lock()  # held to change both; reading one entry needs none

    @contextlib.contextmanager
    def http(self, hostname, token, body):
        """Publish a file's content."""
        with self._published(self._bodies, (hostname, token), body):
            yield

    @contextlib.contextmanager
    def alpn(self, hostname, digest):
        """Publish a certificate; ``digest`` is the SHA-256 of the key authorization.

        Raises CaError if it cannot be made.
        """
        try:
            context = _context(hostname, digest, self._folder)
        except OSError as error:
            raise CaError(
                HOST, "gotunnel", f"the proof cannot be written in "
                f"{self._folder or 'a temporary folder'}: {error.strerror}; make room, and see "
                "that the gateway can write there"
            ) from error  # fmt: skip
        with self._published(self._contexts, hostname, context):
            yield

    @contextlib.contextmanager
    def _published(self, table, name, value):
        with self._lock:
            table[name] = value
        try:
            yield
        finally:
            with self._lock:
                table.pop(name, None)

    @staticmethod
    def is_asked_for(path):
        """Whether a request's path is one where a CA looks for a file."""
        return path.startswith(PATH)

    def body(self, hostname, path):
        """The content of the file at a request's path, None if there is none for that hostname."""
        token = path.removeprefix(PATH)
        if not self._bodies or token == path or not _TOKEN.fullmatch(token):
            return None
        return self._bodies.get((hostname, token))

    def context(self, hostname):
        """The context for a CA that asks by TLS, None if there is no proof for that hostname."""
        return self._contexts.get(hostname)


def _context(hostname, digest, folder) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(timezone.utc)
    nobody = x509.Name([])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(nobody)
        .issuer_name(nobody)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _LIFETIME)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(hostname)]), critical=False)
        .add_extension(
            x509.UnrecognizedExtension(_ACME_IDENTIFIER, _OCTET_STRING + digest), critical=True
        )
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(AEAD)
    context.set_alpn_protocols([ACME_TLS])
    # OpenSSL reads certificates from files only.
    prefix, _, suffix = PROOFS.partition("*")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=prefix, suffix=suffix) as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)
    return context
