"""The proofs that we control a hostname, while a CA validates it.

    http-01        a file on port 80, under /.well-known/acme-challenge/ (RFC 8555 §8.3)
    tls-alpn-01    a certificate by TLS with ALPN "acme-tls/1", on port 443 (RFC 8737)

An order publishes a proof for the length of a block; listeners look it up by hostname. A CA asks
several times, from several places.
"""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
import tempfile
import threading
from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Protocol, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gotunnel_agent.common.tls import AEAD

from ..net.client_hello import ACME_TLS
from .acme_errors import HOST, CaError
from .folder import sweep

log = logging.getLogger("gotunnel.challenges")

HTTP_01, TLS_ALPN_01 = "http-01", "tls-alpn-01"
PATH = "/.well-known/acme-challenge/"
PROOFS = ".proof-*.tmp"  # our temporary files; one is left if the gateway is killed meanwhile

MOST_ADOPTED = 64  # proofs of a predecessor: it has 6 orders at a time (issuer.JOBS)

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")  # base64url (RFC 8555 §8.1); real ones have 43
_ACME_IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")  # RFC 8737 §3
_OCTET_STRING = b"\x04\x20"  # DER: 32 bytes follow
_LIFETIME = timedelta(days=1)  # no CA checks it

_Name = TypeVar("_Name", bound=Hashable)
_Proof = TypeVar("_Proof")


class Publisher(Protocol):
    """Where an order publishes its proofs."""

    @property
    def types(self) -> tuple[str, ...]:
        """The challenge types that a CA can validate here: HTTP_01, TLS_ALPN_01."""

    def http(self, hostname: str, token: str, body: bytes) -> AbstractContextManager[None]:
        """Publish a file's content, for the length of a block."""

    def alpn(self, hostname: str, digest: bytes) -> AbstractContextManager[None]:
        """Publish a certificate, for the length of a block; ``digest`` is the SHA-256 of the key
        authorization. Raises CaError if it cannot be made."""


class Challenges:
    """The Publisher of a gateway: the proofs that are published now. Any thread."""

    def __init__(self, types: Iterable[str], folder: Path | None = None) -> None:
        """``types`` as in Publisher.

        ``folder`` is where a certificate and its key lie for a moment; None for the system's own.
        Files that killed gateways have left there are removed.
        """
        self.types = tuple(types)
        self._folder = folder
        with contextlib.suppress(OSError):  # a file that stays does no harm
            for path in folder.glob(PROOFS) if folder else ():
                sweep(path)
        self._bodies: dict[tuple[str, str], bytes] = {}  # by hostname and token
        self._contexts: dict[str, ssl.SSLContext] = {}  # by hostname
        self._digests: dict[str, bytes] = {}  # by hostname: what the certificates are made of
        self._lock = threading.Lock()  # held to change all three; reading one entry needs none

    @contextlib.contextmanager
    def http(self, hostname: str, token: str, body: bytes) -> Iterator[None]:
        """Publish a file's content."""
        with self._published(self._bodies, (hostname, token), body):
            yield

    @contextlib.contextmanager
    def alpn(self, hostname: str, digest: bytes) -> Iterator[None]:
        """Publish a certificate; ``digest`` is the SHA-256 of the key authorization.

        Raises CaError if it cannot be made.
        """
        try:
            context = _context(hostname, digest, self._folder)
        except OSError as error:
            raise CaError(
                HOST, "gotunnel", f"the proof cannot be written in "
                f"{self._folder or 'a temporary folder'}: {error.strerror}; make room, and check "
                "that the gateway can write there"
            ) from error  # fmt: skip
        with self._published(self._contexts, hostname, context):
            with self._published(self._digests, hostname, digest):
                yield

    @contextlib.contextmanager
    def _published(self, table: dict[_Name, _Proof], name: _Name, proof: _Proof) -> Iterator[None]:
        with self._lock:
            table[name] = proof
        try:
            yield
        finally:
            with self._lock:
                if table.get(name) is proof:  # else another order's, of another member
                    del table[name]

    def published(self) -> tuple[tuple[str, str, str], ...]:
        """What is published now, for a successor: hostname, challenge token and body of each file;
        hostname, "" and the digest in hexadecimal digits of each certificate."""
        with self._lock:
            files = [(*name, body.decode()) for name, body in self._bodies.items()]
            return (*files, *((name, "", digest.hex()) for name, digest in self._digests.items()))

    def adopt(self, proofs: Iterable[tuple[str, str, str]]) -> None:
        """Publish the proofs of a predecessor, since the CA may now ask this process. They are not
        removed: a proof is useless to others, and after the end of its order."""
        for hostname, token, content in list(proofs)[:MOST_ADOPTED]:
            if token:
                with self._lock:
                    self._bodies[hostname, token] = content.encode()
                continue
            try:
                context = _context(hostname, bytes.fromhex(content), self._folder)
            except OSError as error:
                log.warning("%s: a predecessor's proof cannot be published (%s): its order may "
                            "fail, and is repeated", hostname, error.strerror)  # fmt: skip
                continue
            with self._lock:
                self._contexts[hostname] = context

    @staticmethod
    def is_asked_for(path: str) -> bool:
        """Whether a request's path is one of HTTP-01 validations."""
        return path.startswith(PATH)

    def body(self, hostname: str, path: str) -> bytes | None:
        """The content of the file at a request's path, None if there is none for that hostname."""
        token = path.removeprefix(PATH)
        if not self._bodies or token == path or not _TOKEN.fullmatch(token):
            return None
        return self._bodies.get((hostname, token))

    def context(self, hostname: str | None) -> ssl.SSLContext | None:
        """The context for a TLS-ALPN-01 validation; None if no proof for that hostname is
        published, or the ClientHello names none."""
        return None if hostname is None else self._contexts.get(hostname)


def _context(hostname: str, digest: bytes, folder: Path | None) -> ssl.SSLContext:
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
