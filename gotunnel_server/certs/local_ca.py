"""A certificate authority of our own, for trying gotunnel out and for tests (ACME_ENV=local).

No public CA signs `app.localhost` or `127.0.0.1`. Here a CA is made on first start and kept in a
folder. A visitor that trusts its `ca.crt` once sees no warning:

    ca.crt, ca.key               the CA; made once, then only read
    HOSTNAME.crt, HOSTNAME.key   one certificate a hostname; made again before it expires
    .lock                        held while one process (or thread) looks and writes

The CA signs its leaves itself. A chain is the leaf and the CA's certificate. A visitor that trusts
the CA does not need the latter; an agent that knows only its fingerprint gets it there (`join`).

A CA that cannot be read is an error and is never made anew, because users have trusted the old
one. A leaf that cannot be read is replaced, because nobody has to trust it by hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import os
import re
import secrets
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gotunnel_agent.common import atomic_file
from gotunnel_agent.common.hostnames import MAX_HOSTNAME, WILDCARD, normal_hostname, valid_hostname

from ..net import safe_read
from ..net.certificate import are_equal, check_issued_by, ends, load_certificates
from ..net.safe_read import MALFORMED

if TYPE_CHECKING:  # older versions of cryptography do not name this type
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

FOLDER = "local"  # in ACME_CACHE, where the gateway's own CA lies
# Trusted by hand, on every device that visits: it should outlive any trial.
CA_LIFETIME = timedelta(days=3650)
# Below 398 days, above which some clients refuse a leaf. Today's shorter limits are for public CAs,
# not for a CA that was added by hand.
LEAF_LIFETIME = timedelta(days=397)
# In its last month a leaf is renewed at the next start, registration or hourly review.
RENEW_BEFORE = timedelta(days=30)
# Clocks of phones and virtual machines run behind; a leaf must be valid for them at once.
BACKDATE = timedelta(hours=1)

# A file's name has 255 bytes at most; ours is a stem and up to 8 more (".crt.new"). The stem is
# the hostname; if that is longer, its beginning and a hash, so that no two hostnames share one.
_LONGEST_STEM = 255 - 8
HASHED_STEM = re.compile(r".{100}-[0-9a-f]{32}")

_NO_KEY_USAGE = dict.fromkeys((
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
    "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
), False)  # fmt: skip


class CertificateError(Exception):
    """A certificate cannot be read, made or kept; the text is one line for the operator."""


def read_pair(certificate_file: Path, key_file: Path) -> tuple[x509.Certificate, PrivateKeyTypes]:
    """The first certificate of a PEM file and the private key that belongs to it.

    Raises CertificateError, naming the file, if either cannot be read or they do not match.
    """
    try:
        certificate = load_certificates(safe_read.read(certificate_file))[0]
        public_key = certificate.public_key()
    except OSError as error:
        raise CertificateError(f"{certificate_file}: {error.strerror}") from error
    except MALFORMED as error:
        raise CertificateError(f"{certificate_file}: not a certificate, expected PEM") from error
    try:
        key = serialization.load_pem_private_key(safe_read.read(key_file), password=None)
    except OSError as error:
        raise CertificateError(f"{key_file}: {error.strerror}") from error
    except TypeError as error:  # cryptography's error for a missing password
        raise CertificateError(f"{key_file}: encrypted, expected a key without password") from error
    except MALFORMED as error:
        raise CertificateError(f"{key_file}: not a private key, expected PEM") from error
    if not are_equal(key.public_key(), public_key):
        raise CertificateError(f"{key_file}: not the key of {certificate_file.name}")
    return certificate, key


def put_ca(folder: Path, pem: bytes) -> bool:
    """Have `folder` hold the CA in `pem`, made by Authority.as_pem() on another machine. Returns
    whether there was another CA before, whose files then end in .bad. Raises CertificateError."""
    key_file, ca_file = folder / "ca.key", folder / "ca.crt"
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        certificate = load_certificates(pem)[0]
        if not are_equal(key.public_key(), certificate.public_key()):
            raise ValueError("key of another certificate")
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not an elliptic curve key")
    except MALFORMED as error:
        raise CertificateError(f"the CA that is to go into {folder} is broken: {error}") from error
    with _to_ourselves(folder):
        found = ca_file.read_bytes() if ca_file.exists() else None
        if found == _pem(certificate) and key_file.exists():
            return False
        for file in (key_file, ca_file) if found else ():
            with contextlib.suppress(FileNotFoundError):
                file.rename(file.with_name(file.name + ".bad"))
        _write_key(key_file, key)
        _write_certificates(ca_file, certificate)
    return found is not None


class Authority:
    """The CA in `folder`, made there if the folder has none yet.

    `ca_file` is its certificate, for visitors and agents to trust. Any thread may issue; several
    processes may share the folder. Raises CertificateError if the folder cannot be written, or
    holds a CA that cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.ca_file = folder / "ca.crt"
        self._folder = folder
        self._key_file = folder / "ca.key"
        with _to_ourselves(self._folder):
            if not self.ca_file.exists() and not self._key_file.exists():
                self._make_ca()
            self._certificate, self._key = self._read_ca()

    def issue(self, hostname: str) -> tuple[Path, Path]:
        """The certificate file and the key file of `hostname` (or IP address, or `*.` wildcard).

        Files on disk are used if they are valid for at least RENEW_BEFORE; otherwise new ones are
        made, which takes a few milliseconds. Raises CertificateError if no certificate can have
        the hostname, or the files cannot be written.
        """
        name = _general_name(hostname)
        stem = _stem(hostname)
        certificate_file = self._folder / f"{stem}.crt"
        key_file = self._folder / f"{stem}.key"
        with _to_ourselves(self._folder):
            if not self._still_good(certificate_file, key_file):
                key = ec.generate_private_key(ec.SECP256R1())
                certificate = self._sign_leaf(name, key.public_key())
                _write_key(key_file, key)
                _write_certificates(certificate_file, certificate, self._certificate)
        return certificate_file, key_file

    def forget(self, hostname: str) -> None:
        """Remove the files of issue(), if they are there. Raises CertificateError."""
        with _to_ourselves(self._folder):
            for ending in (".crt", ".key"):
                (self._folder / (_stem(hostname) + ending)).unlink(missing_ok=True)

    def hostnames(self) -> list[str]:
        """The hostnames with a certificate here, also of an earlier gateway, except long ones:
        their files' names are hashed."""
        stems = (file.stem for file in self._folder.glob("*.crt") if file != self.ca_file)
        return sorted(stem for stem in stems if not HASHED_STEM.fullmatch(stem))

    def as_pem(self) -> bytes:
        """The CA's key and certificate, for put_ca() on another machine."""
        return _key_pem(self._key) + _pem(self._certificate)

    def _make_ca(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        # In a trust store the tag tells this CA from those of other machines and earlier trials.
        name = x509.Name(
            [
                x509.NameAttribute(
                    NameOID.COMMON_NAME, f"gotunnel local CA {secrets.token_hex(4).upper()}"
                )
            ]
        )
        certificate = (
            _builder(name, name, key.public_key(), CA_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.KeyUsage(**_NO_KEY_USAGE | {"key_cert_sign": True, "crl_sign": True}),
                critical=True,
            )
            .sign(key, hashes.SHA256())
        )
        _write_key(self._key_file, key)
        _write_certificates(self.ca_file, certificate)

    def _read_ca(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        try:
            certificate, key = read_pair(self.ca_file, self._key_file)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise CertificateError(f"{self._key_file}: not an elliptic curve key, as we make")
            if ends(certificate) < datetime.now(timezone.utc):
                raise CertificateError(f"{self.ca_file}: expired on {ends(certificate):%Y-%m-%d}")
        except CertificateError as error:
            raise CertificateError(
                f"{error}; restore ca.crt and ca.key from a copy, or remove both to get a new CA,"
                " which must then be trusted anew"
            ) from error
        return certificate, key

    def _still_good(self, certificate_file: Path, key_file: Path) -> bool:
        try:
            certificate, _ = read_pair(certificate_file, key_file)
            check_issued_by(certificate, self._certificate)
            has_ca = safe_read.read(certificate_file).endswith(_pem(self._certificate))
        except (CertificateError, InvalidSignature, OSError, *MALFORMED):
            return False  # missing, cut short, or another CA's: a new one is made
        if not has_ca:  # an earlier version made it
            return False
        return ends(certificate) - datetime.now(timezone.utc) >= RENEW_BEFORE

    def _sign_leaf(
        self, name: x509.GeneralName, public_key: ec.EllipticCurvePublicKey
    ) -> x509.Certificate:
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            # The subject is empty, since a common name ends at 64 characters and clients ignore
            # it; the alternative name is then critical (RFC 5280 §4.2.1.6).
            _builder(x509.Name([]), self._certificate.subject, public_key, LEAF_LIFETIME)
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(**_NO_KEY_USAGE | {"digital_signature": True}), critical=True
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(issuer_key, critical=False)
            .sign(self._key, hashes.SHA256())
        )


@contextlib.contextmanager
def _to_ourselves(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep other threads and processes out. An OSError is raised as
    CertificateError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)  # which also unlocks
    except OSError as error:
        raise CertificateError(
            f"{folder}: {error.strerror}; the local CA needs a folder that it can write,"
            " make it writable or set ACME_CACHE to another"
        ) from error


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    """The fields that the CA's certificate and a leaf have in common."""
    begin = datetime.now(timezone.utc) - BACKDATE
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _stem(hostname: str) -> str:
    if len(hostname) <= _LONGEST_STEM:
        return hostname
    return f"{hostname[:100]}-{hashlib.sha256(hostname.encode()).hexdigest()[:32]}"


def _general_name(hostname: str) -> x509.GeneralName:
    """`hostname` as a certificate names it. A name that passes is also safe as a file's stem."""
    try:
        if "%" not in hostname:  # a zone (fe80::1%eth0) is only valid on one machine
            return x509.IPAddress(ipaddress.ip_address(hostname))
    except ValueError:
        pass  # not an address, so it should be a name
    if hostname == "ca":
        raise CertificateError("hostname ca: its files would be those of the CA itself")
    name = hostname.removeprefix(WILDCARD)
    normal = valid_hostname(name) and name == normal_hostname(name)
    if not normal:
        raise CertificateError(
            f"hostname {hostname[:MAX_HOSTNAME]!r}: expected an IP address, or labels of a-z, 0-9"
            f" and hyphens, {MAX_HOSTNAME} characters at most"
        )
    return x509.DNSName(hostname)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    _write(path, _key_pem(key), mode=0o600)


def _write_certificates(path: Path, *certificates: x509.Certificate) -> None:
    _write(path, b"".join(map(_pem, certificates)), mode=0o644)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(path: Path, content: bytes, *, mode: int) -> None:
    """Caller holds the folder's lock: with one writer the temporary name can be fixed."""
    atomic_file.write(path, content, new=path.with_name(path.name + ".new"), mode=mode)
