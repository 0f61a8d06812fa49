"""Questions to certificates, asked of cryptography as it is and as version 38 is."""

from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa

from gotunnel_server.net import certificate as questions

BEGIN, END = datetime(2026, 1, 2, 3, 4, 5), datetime(2027, 1, 2, 3, 4, 5)
SINCE_38 = {
    "not_valid_before_utc", "not_valid_after_utc", "verify_directly_issued_by",
}  # fmt: skip

KEYS = {
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "EC": lambda: ec.generate_private_key(ec.SECP256R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


class Old:
    """A certificate as version 38 has it."""

    not_valid_before, not_valid_after = BEGIN, END

    def __init__(self, certificate):
        self._certificate = certificate

    def __getattr__(self, name):
        if name in SINCE_38:
            raise AttributeError(name)
        return getattr(self._certificate, name)


@pytest.fixture(params=["new", "old"])
def version(request, monkeypatch):
    """Makes of a certificate what this version of cryptography gives."""
    if request.param == "new":
        return lambda certificate: certificate
    monkeypatch.delattr(x509, "load_pem_x509_certificates", raising=False)
    return Old


def make(key, signer, *, issuer="ca"):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "leaf")])
    by = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)])
    return (
        x509.CertificateBuilder()
        .subject_name(by if key is signer else name)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(BEGIN)
        .not_valid_after(END)
        .sign(signer, None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )


def pem(*certificates):
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


@pytest.mark.parametrize("kind", KEYS)
def test_the_key_that_has_signed_is_found(version, kind):
    ca, other, leaf = (KEYS[kind]() for _ in range(3))
    issuer, stranger = version(make(ca, ca)), version(make(other, other))
    signed = version(make(leaf, ca))
    questions.check_issued_by(signed, issuer)
    with pytest.raises(InvalidSignature):
        questions.check_issued_by(signed, stranger)
    with pytest.raises(ValueError):
        questions.check_issued_by(version(make(leaf, ca, issuer="another")), issuer)


def test_a_key_that_signs_no_certificates_is_refused(version):
    ca, leaf = (dsa.generate_private_key(1024), KEYS["EC"]())
    odd = version(make(ca, ca))
    with pytest.raises((TypeError, ValueError)):
        questions.check_issued_by(version(make(leaf, KEYS["EC"]())), odd)


def test_times_have_their_zone(version):
    key = KEYS["EC"]()
    found = version(make(key, key))
    assert questions.begins(found) == BEGIN.replace(tzinfo=timezone.utc)
    assert questions.ends(found) == END.replace(tzinfo=timezone.utc)
    assert questions.ends(found).utcoffset() == timedelta(0)


def test_all_certificates_of_a_text_are_read_and_none_is_an_error(version):
    keys = [KEYS["EC"]() for _ in range(3)]
    made = [make(key, key) for key in keys]
    text = b"before\n" + pem(*made) + b"-----BEGIN PRIVATE KEY-----\n"
    assert questions.load_certificates(text) == made
    with pytest.raises(ValueError):
        questions.load_certificates(b"nothing")


def test_keys_are_equal_by_what_they_are():
    key, other = KEYS["EC"](), KEYS["EC"]()
    assert questions.are_equal(key.public_key(), key.public_key())
    assert not questions.are_equal(key.public_key(), other.public_key())
