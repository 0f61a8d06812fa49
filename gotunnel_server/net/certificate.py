"""Questions to X.509 certificates that older versions of cryptography cannot answer by themselves.

Debian 12 has cryptography 38. Versions since then read several certificates from one PEM text (39),
compare public keys and check which key has signed (40), and tell times with their zone (42). Each
function here asks the library where it can, and does the same by hand where it cannot.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa

if TYPE_CHECKING:  # older versions do not name this type
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def load_certificates(pem: bytes) -> list[x509.Certificate]:
    """The certificates in a PEM text, at least one. Raises ValueError, and others of MALFORMED."""
    if hasattr(x509, "load_pem_x509_certificates"):
        return x509.load_pem_x509_certificates(pem)
    found = [x509.load_pem_x509_certificate(block) for block in _BLOCK.findall(pem)]
    if not found:
        raise ValueError("there is no certificate in it")
    return found


def begins(certificate: x509.Certificate) -> datetime:
    """When a certificate becomes valid, in UTC."""
    if hasattr(certificate, "not_valid_before_utc"):
        return certificate.not_valid_before_utc
    return certificate.not_valid_before.replace(tzinfo=timezone.utc)


def ends(certificate: x509.Certificate) -> datetime:
    """When a certificate expires, in UTC."""
    if hasattr(certificate, "not_valid_after_utc"):
        return certificate.not_valid_after_utc
    return certificate.not_valid_after.replace(tzinfo=timezone.utc)


def are_equal(one: PublicKeyTypes, other: PublicKeyTypes) -> bool:
    """Whether two public keys are the same."""
    return one == other or _spelled_out(one) == _spelled_out(other)


def _spelled_out(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def check_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    """Check that the key of ``issuer`` has signed the certificate, under the issuer's name.

    Raises InvalidSignature if it has not, ValueError if the names differ, one of TypeError and
    ValueError for a key of a kind that signs no certificates. Dates are not checked.
    """
    if hasattr(certificate, "verify_directly_issued_by"):
        certificate.verify_directly_issued_by(issuer)
        return
    if certificate.issuer != issuer.subject:
        raise ValueError("the issuer's name is not that of the other certificate")
    key, signature = issuer.public_key(), certificate.signature
    signed, digest = certificate.tbs_certificate_bytes, certificate.signature_hash_algorithm
    if isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)):
        key.verify(signature, signed)
    elif isinstance(key, rsa.RSAPublicKey) and digest is not None:
        key.verify(signature, signed, padding.PKCS1v15(), digest)
    elif isinstance(key, ec.EllipticCurvePublicKey) and digest is not None:
        key.verify(signature, signed, ec.ECDSA(digest))
    else:
        raise TypeError(f"a key of the kind {type(key).__name__} signs no certificates")
