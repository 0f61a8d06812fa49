"""How the gateways of a cluster know each other: TLS with a certificate at both ends, made of the
cluster's secret.

Each key of CLUSTER_KEY_FILE gives a certificate authority of its own (HKDF, RFC 5869, then
Ed25519): all members derive the same one, and none of it is ever stored or sent. A process makes
itself a certificate for NAME, signed by the authority of the first key, and trusts those of all
keys. So a member can be told from anybody else, in both directions:

- An agent has no such certificate, whatever its token says. A token proves nothing to a peer.
- Nothing can be replayed: in TLS 1.3 each end signs the handshake with its certificate's key.
- A man in the middle can terminate TLS only with a certificate of the authority.
- NAME ends in .invalid (RFC 6761), so no public CA signs a certificate for it.

Two keys at a time serve for rotation: first all members learn the new key as their second one, then
as their first one, and then the old one is removed.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NAME = "peer.gotunnel.invalid"  # the SNI of a gateway that dials another one
PROTOCOL = "gotunnel-peer/1"  # ALPN: what the two speak (docs/protocol.md)
PURPOSE = b"gotunnel: authority of peers, 1"  # HKDF's info: no other use gets the same key
# The certificates last as long as X.509 can say: clocks differ, and the processes that use them end
# before (RFC 5280 §4.1.2.5).
BEGIN = datetime(1970, 1, 1, tzinfo=timezone.utc)
END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc)


class Secret:
    """What a process needs to prove that it is a member, and to check that others are."""

    def __init__(self, keys: Sequence[bytes]):
        """``keys``: one or two secrets of at least 32 random bytes each, such as the keys of
        CLUSTER_KEY_FILE. The first one signs, all are accepted."""
        if not keys:
            raise ValueError("no key came, expected at least one")
        authorities = [_authority(key) for key in keys]
        own = Ed25519PrivateKey.generate()
        name, signer = authorities[0]
        builder = _builder(NAME, own, issuer=name)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), False)
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(both), False)
        builder = builder.add_extension(_issued_by(signer), False)
        self._own = _pem_of_key(own) + _pem(builder.sign(signer, None))
        self._trusted = b"".join(_pem(_certificate_of(*each)) for each in authorities).decode()

    def __repr__(self) -> str:
        return "<Secret>"

    def for_dialling(self) -> ssl.SSLContext:
        """The TLS context of a gateway that dials another one, with NAME as its SNI."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def for_accepting(self) -> ssl.SSLContext:
        """The TLS context of the other one."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # a resumed session would not be checked again
        return context

    def _context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols([PROTOCOL])
        context.load_verify_locations(cadata=self._trusted)
        with _file(self._own) as path:
            context.load_cert_chain(path)
        return context


def _authority(key: bytes) -> tuple[x509.Name, Ed25519PrivateKey]:
    """The name and the key of a secret's authority."""
    if len(key) < 32:
        raise ValueError(f"a key of {len(key)} bytes, expected 32 or more")
    derived = HKDF(hashes.SHA256(), 32, salt=None, info=PURPOSE).derive(key)
    signer = Ed25519PrivateKey.from_private_bytes(derived)
    # A name of its own, so that OpenSSL finds the right one of two authorities.
    digest = x509.SubjectKeyIdentifier.from_public_key(signer.public_key()).digest.hex()
    return _name(f"gotunnel cluster {digest[:16]}"), signer


def _certificate_of(name: x509.Name, signer: Ed25519PrivateKey) -> x509.Certificate:
    builder = _builder("", signer, issuer=name, subject=name)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = builder.add_extension(usage, True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(signer.public_key())
    return builder.add_extension(identifier, False).sign(signer, None)


def _issued_by(signer: Ed25519PrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())


def _builder(
    name: str, key: Ed25519PrivateKey, issuer: x509.Name, subject: x509.Name | None = None
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject or _name(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(BEGIN)
        .not_valid_after(END)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_of_key(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@contextmanager
def _file(data: bytes) -> Iterator[str]:
    """A path at which ``data`` can be read, as Python's ssl reads keys only from files. Where the
    system can (Linux's memfd), they are on no disk."""
    folder = "/proc/self/fd"
    if hasattr(os, "memfd_create") and os.path.isdir(folder):
        with open(os.memfd_create("gotunnel-peer"), "wb", buffering=0) as memory:
            memory.write(data)
            yield f"{folder}/{memory.fileno()}"
        return
    with tempfile.NamedTemporaryFile() as file:  # readable by this user alone
        file.write(data)
        file.flush()
        yield file.name
