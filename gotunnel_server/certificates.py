"""Certificates on disk and by SNI: which `SSLContext` a hostname is served with.

A certificate is loaded once, into a context of its own. A port begins every handshake with its
*front* context, which has no certificate; when OpenSSL has read the hostname in the ClientHello
it calls us, and the connection goes on with that hostname's context. What then comes from where:

    from the hostname's context    certificate and key, the ALPN choice
    from the front                 TLS versions, options, ticket keys

So a visitor may resume a session also after the certificate was renewed. A ticket opens no hostname
by itself: we are called in a resumption too. The name is then, in TLS 1.2, the one that the ticket
was given for, whatever the new ClientHello says (OpenSSL takes it from the session).

A context that is in use is never changed, because loading a certificate into it breaks the
handshakes that run meanwhile. A new certificate is a new context, published by one assignment;
that is also why a handshake takes no lock.
"""
from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

from gotunnel import IGNORE_UNEXPECTED_EOF

from .authority import RENEW_BEFORE, Authority, CertificateError, read_pair

__all__ = ["CertificateError", "Certificates"]

log = logging.getLogger("gotunnel.certificates")


class _Loaded(NamedTuple):
    names: frozenset[str]
    ends: datetime      # aware, UTC
    context: ssl.SSLContext


class Certificates:
    """All certificates that there are: those given in `cert_dir`, else those the authority issues.

    `cert_dir` holds pairs `x.crt` (leaf first, then its chain) and `x.key`, PEM, of any stem; they
    serve the names in the certificate, a wildcard (`*.example.com`) exactly one label. A pair that
    cannot be used is named in the log and left out. Of several for one name the one that ends last
    is taken. `alpn` is offered on every context. Raises CertificateError if `cert_dir` cannot be
    read.
    """

    def __init__(
        self, cert_dir: Path | None, authority: Authority | None, *, alpn: tuple[str, ...] = ()
    ) -> None:
        self._cert_dir = cert_dir
        self._authority = authority
        self._alpn = alpn
        self._given: Mapping[str, _Loaded] = {}     # by name; replaced whole, never changed
        self._pairs: Mapping[Path, _Loaded] = {}    # the same by file, for the next reload
        self._pairs_state: object = None            # of the files when they were last read
        # Grows by one a registered hostname, so whom we let register bounds it.
        self._issued: dict[str, _Loaded] = {}
        # Held to publish: a slow thread must not put an older certificate over a newer one.
        self._publishing = threading.Lock()
        self.reload()

    def reload(self) -> None:
        """Read `cert_dir` again if a file in it has changed; costs one look at the folder if not.

        A pair that can no longer be used, perhaps because it is being written just now, is served
        as it was before. Any thread. Raises CertificateError if the folder cannot be read; then
        everything stays as it was.
        """
        if self._cert_dir is None:
            return
        try:
            files = sorted(file for file in self._cert_dir.iterdir()
                           if file.suffix in (".crt", ".key") and file.is_file())
            state = [(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
        except OSError as error:
            raise CertificateError(
                f"CERT_DIR {self._cert_dir}: {error.strerror}, expected a readable folder"
            ) from error
        if state == self._pairs_state:
            return
        pairs: dict[Path, _Loaded] = {}
        for file in files:
            if file.suffix == ".crt" and (loaded := self._load_given(file)):
                pairs[file] = loaded
        given: dict[str, _Loaded] = {}
        for loaded in sorted(pairs.values(), key=lambda pair: pair.ends):
            given.update(dict.fromkeys(loaded.names, loaded))   # so the one that ends last stays
        with self._publishing:
            self._given, self._pairs, self._pairs_state = given, pairs, state

    def ensure(self, hostname: str) -> bool:
        """Make sure that there is a certificate for `hostname`; False if nobody can give us one.

        Call it at start, when a hostname is registered, and daily for those that stay: what the
        authority issued is renewed here. For a name that has one it costs a few microseconds.
        Never call it in a handshake: anybody may put any name in a ClientHello, and that must
        cost us no key, no signature and no file.

        Any thread. Raises CertificateError if the authority cannot issue.
        """
        hostname = _normal(hostname)
        if _find(self._given, hostname):
            return True
        if self._authority is None:
            return False
        known = _find(self._issued, hostname)
        if known is None or known.ends - datetime.now(timezone.utc) < RENEW_BEFORE:
            loaded = self._load(*self._authority.issue(hostname))
            with self._publishing:
                known = self._issued.get(hostname)
                if known is None or known.ends < loaded.ends:
                    self._issued[hostname] = loaded
        return True

    def context(self, hostname: str) -> ssl.SSLContext | None:
        """The context of `hostname`: of exactly that name, else of a wildcard; None if none.

        Given certificates come before issued ones. Any thread; no lock, no disk.
        """
        hostname = _normal(hostname)
        loaded = _find(self._given, hostname) or _find(self._issued, hostname)
        return loaded.context if loaded else None

    def front(
        self, default: str, allowed: Callable[[str], bool] | None = None
    ) -> ssl.SSLContext:
        """The context with which a port begins its handshakes.

        A visitor who names no hostname gets the certificate of `default`. Who names one without
        a certificate, or one that is not `allowed`, gets the alert unrecognized_name (RFC 6066
        §3). `allowed` is asked with the hostname; without it every one is, and `default` always.
        It runs within each handshake, in that thread: it must neither block nor read the disk.

        A hostname that is not ASCII never reaches us: Python refuses it, and says so on standard
        error. Whoever peeks at the ClientHello first should close those.
        """
        default = _normal(default)

        def choose(
            connection: ssl.SSLObject | ssl.SSLSocket, sni: str | None, _: ssl.SSLContext
        ) -> int | None:
            try:
                hostname = default if sni is None else _normal(sni)
                welcome = hostname == default or allowed is None or allowed(hostname)
                context = self.context(hostname) if welcome else None
                if context is None:
                    return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
                connection.context = context
                return None     # go on
            except Exception as error:      # out of here it would be a traceback a handshake
                log.error("choosing the certificate of %.253r failed: %r", sni, error)
                return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR

        front = self._new_context()
        front.sni_callback = choose
        return front

    def _load_given(self, certificate_file: Path) -> _Loaded | None:
        """One pair of `cert_dir`; if it cannot be used, says so and takes what it was before."""
        try:
            loaded = self._load(certificate_file, certificate_file.with_suffix(".key"))
        except CertificateError as error:
            before = self._pairs.get(certificate_file)
            log.warning("CERT_DIR: %s not used%s: %s", certificate_file.name,
                        ", the one read before stays" if before else "", error)
            return before
        if loaded.ends < datetime.now(timezone.utc):
            # Who sees an expired certificate knows what is wrong; who sees none does not.
            log.warning("CERT_DIR: %s ran out on %s, served all the same",
                        certificate_file.name, f"{loaded.ends:%Y-%m-%d}")
        return loaded

    def _load(self, certificate_file: Path, key_file: Path) -> _Loaded:
        certificate, _ = read_pair(certificate_file, key_file)
        names = _names(certificate)
        if not names:
            raise CertificateError(f"{certificate_file}: names no host (subjectAltName)")
        context = self._new_context()
        try:
            context.load_cert_chain(certificate_file, key_file)
        except OSError as error:    # SSLError is one: a chain cut short, a key too weak
            raise CertificateError(f"{certificate_file}: {error}") from error
        return _Loaded(names, certificate.not_valid_after_utc, context)

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # A renegotiation costs us far more than whoever asks for it, and HTTP has no use for it.
        # Compression tells secrets by their length (CRIME).
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | IGNORE_UNEXPECTED_EOF
        # One TLS 1.3 ticket a handshake, OpenSSL makes two: a visitor keeps the last one anyway.
        if hasattr(context, "num_tickets"):     # not in every TLS library that Python is built on
            context.num_tickets = 1
        if self._alpn:
            context.set_alpn_protocols(list(self._alpn))
        return context


def _normal(name: str) -> str:
    """The hostname that `name` means: a ClientHello may spell it in any case."""
    return name.lower().removesuffix(".")


def _find(certificates: Mapping[str, _Loaded], hostname: str) -> _Loaded | None:
    # A wildcard stands for exactly the first label (RFC 9525 §6.3).
    wildcard = "*." + hostname.partition(".")[2]
    return certificates.get(hostname) or certificates.get(wildcard)


def _names(certificate: x509.Certificate) -> frozenset[str]:
    """The DNS names and IP addresses in subjectAltName, which alone counts (RFC 9525 §2)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
            ValueError):
        return frozenset()
    return frozenset(map(_normal, names.get_values_for_type(x509.DNSName))) | frozenset(
        map(str, names.get_values_for_type(x509.IPAddress)))
