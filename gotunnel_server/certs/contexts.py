"""Certificates on disk and by SNI: which `SSLContext` a hostname is served with.

A certificate is loaded once, into a context of its own. A port begins every handshake with its
*front* context, which has no certificate; when OpenSSL has read the hostname in the ClientHello
it calls us, and the connection goes on with that hostname's context. What then comes from where:

    from the hostname's context    certificate and key, the ALPN choice
    from the front                 TLS versions, options, ticket keys

A session ticket is encrypted with the front's keys, which OpenSSL makes with the context and never
changes. So each hostname has a front of its own (Fronts), which is made anew every few hours: a
ticket of one hostname does not resume at another, and keys that are stolen open what was recorded
in those hours, no more. A visitor may resume a session also after the certificate was renewed. A
ticket opens no hostname by itself: we are called in a resumption too. The name is then, in TLS 1.2,
the one that the ticket was given for (OpenSSL takes it from the session).

A context that is in use is never changed, because loading a certificate into it breaks the
handshakes that run meanwhile. A new certificate is a new context, published by one assignment;
that is also why a handshake takes no lock.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic

from gotunnel_agent.common.hostnames import normal_hostname
from gotunnel_agent.common.tls import AEAD, IGNORE_UNEXPECTED_EOF

from .cert_dir import CertDir, Pair, Served, load_pair
from .choices import Choices, Loaded
from .local_ca import RENEW_BEFORE, Authority, CertificateError

__all__ = ["CertificateError", "Certificates", "Fronts"]

log = logging.getLogger("gotunnel.contexts")

# Seconds that ticket keys live, three times what OpenSSL lets a ticket (two hours). The visitors
# that come back across their end make one full handshake.
KEY_LIFE = 6 * 3600
# Fronts of a port, some 13 KiB each. Their number grows with the hostnames that have certificates,
# and under a wildcard with those that visitors name. If there are more, the oldest goes, and its
# visitors make a full handshake.
MOST_FRONTS = 2048


class Certificates:
    """All certificates that there are: those given in `cert_dir`, else those the authority issues.

    `cert_dir.py` says which files are taken. They serve the names in the certificate, a wildcard
    (`*.example.com`) exactly one label. A given certificate comes before an issued one while it is
    valid, and after it once it has run out. `alpn` is offered on every context. Raises
    CertificateError if `cert_dir` cannot be read.
    """

    def __init__(
        self, cert_dir: Path | None, authority: Authority | None, *, alpn: tuple[str, ...] = ()
    ) -> None:
        self.cert_dir = cert_dir
        self._alpn = alpn
        self._authority = authority
        self._choices = Choices(self._new_context)
        self._cert_dir = CertDir(cert_dir, self._new_context) if cert_dir else None
        # What the authority issued is bounded by the keeper, what was ordered by the CA's limits.
        self._issued: dict[str, Pair] = {}
        # Held to publish: a slow thread must not put an older certificate over a newer one.
        self._publishing = threading.Lock()

    @property
    def given(self) -> Served:
        """What the pairs in `cert_dir` serve now. Equal to an earlier one if nothing changed."""
        return self._cert_dir.served if self._cert_dir else Served({}, {})

    def is_given(self, hostname: str) -> bool:
        """Whether a pair in `cert_dir` that is valid now serves `hostname`."""
        return _find(self.given.valid, normal_hostname(hostname)) is not None

    def reload(self) -> None:
        """Take up what changed in `cert_dir` since the last look, or by a date that passed.

        Meant to be called every few seconds: it costs one look at the folder if nothing changed.
        Any thread; it waits for the disk. It raises nothing: a folder or a pair that cannot be
        read is named in the log once, and served as it was before.
        """
        if self._cert_dir:
            self._cert_dir.reload()

    def ensure(self, hostname: str) -> bool:
        """Make sure that there is a certificate for `hostname`; False if nobody can give us one.

        A wildcard (`*.dev.example.com`) may be asked for like any hostname: then a certificate of
        exactly that name is needed, which will serve what is one label longer than its rest.

        Call it at start, when a hostname is registered, and daily for those that stay: what the
        authority issued is renewed here. For a name that has one it costs a few microseconds.
        Never call it in a handshake: anybody may put any name in a ClientHello, and that must
        cost us no key, no signature and no file.

        Any thread. Raises CertificateError if the authority cannot issue.
        """
        hostname = normal_hostname(hostname)
        valid, outdated = self.given
        if _find(valid, hostname):
            return True
        if self._authority is None:
            return _find(outdated, hostname) is not None
        known = _find(self._issued, hostname)
        if known is None or known.ends - datetime.now(timezone.utc) < RENEW_BEFORE:
            self._publish(hostname, *self._authority.issue(hostname))
        return True

    def issued(self) -> list[str]:
        """The hostnames that the authority issued for, the oldest first. Any thread."""
        return list(self._issued) if self._authority else []

    def forget(self, hostname: str) -> None:
        """Serve `hostname` no more with what the authority issued, which is removed. Any thread.
        Raises CertificateError if the disk refuses."""
        with self._publishing:
            self._issued.pop(hostname, None)
        if self._authority:
            self._authority.forget(hostname)

    def take(self, hostname: str, file: Path) -> None:
        """Serve `hostname` with an ordered certificate: `file` holds key, certificate and chain.

        One that began earlier than what is served changes nothing. Any thread. Raises
        CertificateError if it cannot be used; then what was served stays.
        """
        self._publish(normal_hostname(hostname), file, file)

    def context(self, hostname: str) -> ssl.SSLContext | None:
        """The context of `hostname`: of exactly that name, else of a wildcard; None if none.

        Any thread; no lock, no disk.
        """
        hostname = normal_hostname(hostname)
        valid, outdated = self.given
        if context := _find(valid, hostname):
            return context
        if issued := _find(self._issued, hostname):
            return issued.context
        return _find(outdated, hostname)

    def front(
        self,
        default: str,
        allowed: Callable[[str], bool] | None = None,
        protocol: str | None = None,
    ) -> ssl.SSLContext:
        """The context with which a port begins its handshakes. `protocol` is the only one that it
        takes by ALPN, None for `alpn`.

        A visitor that names no hostname gets the certificate of `default`. For a hostname without
        a certificate, or one that is not `allowed`, it gets the alert unrecognized_name (RFC 6066
        §3). `allowed` is asked with the hostname; without it every one is, and `default` always.
        It runs within each handshake, in that thread: it must neither block nor read the disk.

        A hostname that is not ASCII never reaches us: Python refuses it, and says so on standard
        error. A caller that peeks at the ClientHello first should close those.
        """
        default = normal_hostname(default)

        def choose(
            connection: ssl.SSLObject | ssl.SSLSocket, sni: str | None, _: ssl.SSLContext
        ) -> int | None:
            try:
                hostname = default if sni is None else normal_hostname(sni)
                welcome = hostname == default or allowed is None or allowed(hostname)
                context = self.context(hostname) if welcome else None
                if context is None:
                    return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
                if protocol is not None:
                    context = self._choices.context(context, protocol)
                connection.context = context
                return None  # go on
            except Exception as error:  # out of here it would be a traceback a handshake
                log.error("choosing the certificate of %.253r failed: %r", sni, error)
                return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR

        front = self._new_context()
        front.sni_callback = choose
        return front

    def fronts(self, default: str, allowed: Callable[[str], bool] | None = None) -> Fronts:
        """As front(), for a port that knows the hostname before the handshake."""
        return Fronts(self, normal_hostname(default), allowed)

    def _publish(self, hostname: str, certificate_file: Path, key_file: Path) -> None:
        issued = load_pair(certificate_file, key_file, self._new_context())
        with self._publishing:
            known = self._issued.get(hostname)
            # The end alone would not tell which is newer: a CA that shortens its lifetimes gives
            # us a new one that ends before the old one would.
            if known is None or (known.begins, known.ends) <= (issued.begins, issued.ends):
                self._issued[hostname] = issued

    def _new_context(self, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
        context = Loaded()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(AEAD)
        # A renegotiation costs us far more than the peer that asks for it, and HTTP has no use for
        # it. Compression tells secrets by their length (CRIME).
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | IGNORE_UNEXPECTED_EOF
        # One TLS 1.3 ticket a handshake, OpenSSL makes two: a visitor keeps the last one anyway.
        if hasattr(context, "num_tickets"):  # not in every TLS library that Python is built on
            context.num_tickets = 1
        if alpn := alpn or self._alpn:
            context.set_alpn_protocols(list(alpn))
        return context


class Fronts:
    """The contexts with which a port begins its handshakes: one a hostname. Any thread.

    A name without a certificate, or one that is not allowed, costs no context: all of them have
    one, which refuses. A hostname's front takes that hostname only, whatever a second ClientHello
    (after a HelloRetryRequest) may name.
    """

    def __init__(
        self,
        certificates: Certificates,
        default: str,
        allowed: Callable[[str], bool] | None,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self._certificates = certificates
        self._default = default
        self._allowed = allowed
        self._now = now
        self._refusing = certificates.front("", lambda hostname: False)
        # hostname: (front, monotonic end of its keys' life); the oldest first
        self._fronts: OrderedDict[str, tuple[ssl.SSLContext, float]] = OrderedDict()
        self._lock = threading.Lock()  # guards _fronts

    def context(self, sni: str | None, protocol: str | None = None) -> ssl.SSLContext:
        """The front for the hostname in a ClientHello, None if it names none. No disk. With a
        `protocol`, that is what it takes by ALPN; then no session is resumed."""
        hostname = self._default if sni is None else normal_hostname(sni)
        if not self._is_welcome(hostname):
            return self._refusing
        if protocol is not None:
            return self._certificates.front(hostname, lambda other: False, protocol)
        now = self._now()
        with self._lock:
            while self._fronts and next(iter(self._fronts.values()))[1] <= now:
                self._fronts.popitem(last=False)
            known = self._fronts.get(hostname)
            if known is not None:
                return known[0]
            front = self._certificates.front(hostname, lambda other: False)
            self._fronts[hostname] = front, now + KEY_LIFE
            if len(self._fronts) > MOST_FRONTS:
                self._fronts.popitem(last=False)
            return front

    def _is_welcome(self, hostname: str) -> bool:
        if hostname != self._default and self._allowed is not None and not self._allowed(hostname):
            return False
        return self._certificates.context(hostname) is not None


def _find(by_name: Mapping, hostname: str):
    # A wildcard stands for exactly the first label (RFC 9525 §6.3).
    wildcard = "*." + hostname.partition(".")[2]
    return by_name.get(hostname) or by_name.get(wildcard)
