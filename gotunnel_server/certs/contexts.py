"""Which certificate (`SSLContext`) a hostname is served with, chosen by SNI in the handshake.

A certificate is loaded once, into a context of its own. A port begins every handshake with a
*front* context, which has no certificate. When OpenSSL has read the hostname in the ClientHello
it calls us (sni_callback), and the connection goes on with that hostname's context. Of the two
contexts, these settings apply:

    from the hostname's context    certificate and key, the ALPN choice
    from the front                 TLS versions, options, ticket keys

A session ticket is encrypted with the front's ticket keys, which OpenSSL makes with the context and
never changes. So each hostname has a front of its own (Fronts), replaced every few hours: a ticket
of one hostname does not resume at another, and stolen ticket keys only decrypt what was recorded in
those hours (forward secrecy). A session may be resumed after the certificate was renewed. A ticket
does not bypass our check of the hostname: OpenSSL calls us in a resumption, too. In TLS 1.2 it then
gives us the hostname that the ticket was issued for.

A context in use is never changed, because loading a certificate into it breaks handshakes that run
meanwhile. A new certificate is a new context, published by one assignment; so a handshake needs no
lock.
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
from typing import TypeVar

from gotunnel_agent.common.hostnames import normal_hostname
from gotunnel_agent.common.tls import AEAD, IGNORE_UNEXPECTED_EOF

from .cert_dir import CertDir, Pair, Served, load_pair
from .choices import Choices, Loaded
from .local_ca import RENEW_BEFORE, Authority, CertificateError

__all__ = ["CertificateError", "Certificates", "Fronts"]

log = logging.getLogger("gotunnel.contexts")

_Found = TypeVar("_Found")

NOTHING_GIVEN = Served({}, {})

# Lifetime of ticket keys in seconds, three times that of OpenSSL's tickets (two hours). A visitor
# that comes back after it makes one full handshake.
KEY_LIFE = 6 * 3600
# Bound of a port's fronts, some 13 KiB each. Their number grows with the hostnames that have
# certificates, and under a wildcard with those that visitors name. Beyond it the oldest is dropped,
# and its visitors make a full handshake.
MOST_FRONTS = 2048


class Certificates:
    """All certificates: given in `cert_dir`, issued by `authority`, or ordered (take()).

    `cert_dir.py` says which files are read. A wildcard (`*.example.com`) serves exactly one more
    label. A valid given certificate comes before an issued or ordered one, an outdated one after
    it. `alpn` is offered on every context. Raises CertificateError if `cert_dir` cannot be read.
    """

    def __init__(
        self, cert_dir: Path | None, authority: Authority | None, *, alpn: tuple[str, ...] = ()
    ) -> None:
        self.cert_dir = cert_dir
        self._alpn = alpn
        self._authority = authority
        self._choices = Choices(self._new_context)
        self._cert_dir = CertDir(cert_dir, self._new_context) if cert_dir else None
        # By hostname. Bounded by the keeper, and for ordered ones by the CA's rate limits.
        self._issued: dict[str, Pair] = {}
        # Held to publish: a slow thread must not put an older certificate over a newer one.
        self._publishing = threading.Lock()

    @property
    def given(self) -> Served:
        """The contexts of `cert_dir` now. Equal to an earlier value if nothing changed."""
        return self._cert_dir.served if self._cert_dir else NOTHING_GIVEN

    def is_given(self, hostname: str) -> bool:
        """Whether a valid pair in `cert_dir` serves `hostname`."""
        return _find(self.given.valid, normal_hostname(hostname)) is not None

    def reload(self) -> None:
        """Take up what changed in `cert_dir` since the last look, or because a date passed.

        Call it every few seconds: if nothing changed it costs one stat a file. Any thread; it waits
        for the disk. It raises nothing: a folder or a pair that cannot be read is logged once, and
        served as it was before.
        """
        if self._cert_dir:
            self._cert_dir.reload()

    def ensure(self, hostname: str) -> bool:
        """Make sure that there is a certificate for `hostname`; False if there is none, and no
        authority to issue one.

        `hostname` may be a wildcard (`*.dev.example.com`): then a certificate of exactly that name
        is needed.

        Call it at start, when a hostname is registered, and daily while it stays: it renews what
        the authority issued. For a name that has a certificate it takes a few microseconds. Never
        call it in a handshake: a ClientHello may name any hostname, and must cost us no key, no
        signature and no file.

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
        """Remove the certificate that the authority issued for `hostname`. Any thread. Raises
        CertificateError if the files cannot be removed."""
        with self._publishing:
            self._issued.pop(hostname, None)
        if self._authority:
            self._authority.forget(hostname)

    def take(self, hostname: str, file: Path) -> None:
        """Serve `hostname` with an ordered certificate: `file` holds key, certificate and chain.

        Does nothing if a newer one is served already. Any thread. Raises CertificateError if it
        cannot be used; then the one served before stays.
        """
        self._publish(normal_hostname(hostname), file, file)

    def context(self, hostname: str) -> Loaded | None:
        """The context of `hostname`: of exactly that name, else of a wildcard; None if none.

        Any thread; no lock, no disk.
        """
        return self._context(normal_hostname(hostname))

    def _context(self, hostname: str) -> Loaded | None:
        """As context(), for a normalised hostname."""
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
        accepts by ALPN; None for those of `alpn`.

        A visitor that names no hostname gets the certificate of `default`. If a hostname has no
        certificate, or `allowed(hostname)` is false, the visitor gets the alert unrecognized_name
        (RFC 6066 §3). Without `allowed` all hostnames are allowed; `default` always is. `allowed`
        runs in each handshake, in its thread: it must neither block nor read the disk.

        A hostname that is not ASCII never reaches us: Python refuses it, and says so on standard
        error. A caller that peeks at the ClientHello first should close such connections.
        """
        default = normal_hostname(default)

        def choose(
            connection: ssl.SSLObject | ssl.SSLSocket, sni: str | None, _: ssl.SSLContext
        ) -> int | None:
            try:
                hostname = default if sni in (None, default) else normal_hostname(sni)
                welcome = hostname == default or allowed is None or allowed(hostname)
                context = self._context(hostname) if welcome else None
                if context is None:
                    return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
                if protocol is not None:
                    context = self._choices.context(context, protocol)
                connection.context = context
                return None  # go on
            except Exception as error:  # Python would print a traceback for each handshake
                log.error("choosing the certificate of %.253r failed (bug: %r); the visitor is "
                          "refused", sni, error)  # fmt: skip
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
            # Not by the end alone: after a CA has shortened its lifetimes, a newer certificate may
            # end before the old one.
            if known is None or (known.begins, known.ends) <= (issued.begins, issued.ends):
                self._issued[hostname] = issued

    def _new_context(self, alpn: tuple[str, ...] = ()) -> Loaded:
        context = Loaded()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(AEAD)
        # A renegotiation costs us far more than the peer that asks for it (denial of service), and
        # HTTP does not use it. Compression reveals secrets by their length (CRIME).
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | IGNORE_UNEXPECTED_EOF
        # One TLS 1.3 ticket a handshake instead of two: a visitor keeps only the last one.
        if hasattr(context, "num_tickets"):  # missing in some TLS libraries
            context.num_tickets = 1
        if alpn := alpn or self._alpn:
            context.set_alpn_protocols(list(alpn))
        return context


class Fronts:
    """The contexts with which a port begins its handshakes: one a hostname. Any thread.

    All names without a certificate, and all that are not allowed, share one context, which refuses.
    A hostname's front accepts only that hostname, whatever a second ClientHello (after a
    HelloRetryRequest) names.
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
        # By hostname: the front, and the monotonic end of its keys' life; the oldest first.
        self._fronts: OrderedDict[str, tuple[ssl.SSLContext, float]] = OrderedDict()
        self._lock = threading.Lock()  # guards _fronts

    def context(self, sni: str | None, protocol: str | None = None) -> ssl.SSLContext:
        """The front for the hostname in a ClientHello (None if it names none). No disk. With a
        `protocol`, only that is accepted by ALPN, and no session is resumed."""
        hostname = self._default if sni is None else normal_hostname(sni)
        if protocol is not None:
            if not self._is_welcome(hostname):
                return self._refusing
            return self._certificates.front(hostname, lambda other: False, protocol)
        now = self._now()
        with self._lock:
            while self._fronts and next(iter(self._fronts.values()))[1] <= now:
                self._fronts.popitem(last=False)
            known = self._fronts.get(hostname)
            if known is not None:  # it refuses by itself, once there is no certificate any more
                return known[0]
            if not self._is_welcome(hostname):
                return self._refusing
            front = self._certificates.front(hostname, lambda other: False)
            self._fronts[hostname] = front, now + KEY_LIFE
            if len(self._fronts) > MOST_FRONTS:
                self._fronts.popitem(last=False)
            return front

    def _is_welcome(self, hostname: str) -> bool:
        if hostname != self._default and self._allowed is not None and not self._allowed(hostname):
            return False
        return self._certificates.context(hostname) is not None


def _find(by_name: Mapping[str, _Found], hostname: str) -> _Found | None:
    # A wildcard stands for exactly the first label (RFC 9525 §6.3).
    wildcard = "*." + hostname.partition(".")[2]
    return by_name.get(hostname) or by_name.get(wildcard)
