"""Whose certificate is wanted, and how it stands. Nothing else decides that.

    a hostname's certificate is     as long as
    in CERT_DIR                     a valid pair there names it
    signed by our own CA            there is one (ACME_ENV=local): made at once, and kept while its
                                    agent is there; of the others MOST_ISSUED are kept
    ordered                         its agent is there, or was at the hourly review before
    kept from an earlier order      there is none of the others

A wildcard is served from CERT_DIR, or by our own CA; none is ordered. A certificate that was there
is served until there is another one, also if its hostname is not wanted any more.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from time import monotonic

from gotunnel_agent.common.hostnames import WILDCARD, normal_hostname, valid_hostname

from .contexts import Certificates
from .issuer import Issuer
from .local_ca import CertificateError
from .look_up import look_up
from .ordering import Ordering
from .pem_file import pem_file
from .state import FAILED, READY, State
from .store import StoreError
from .turns import UNLIMITED, Limits

log = logging.getLogger("gotunnel.keeper")

# Seconds between reviews of which hostnames are served. One without an agent at two reviews in a
# row is no longer renewed.
KEEP = 3600
# Certificates of our own CA at a time: two files and a context of some 20 KiB each. An agent may
# register ever new hostnames; beyond these the oldest go of those that nobody serves, a tenth at
# once, lest each further one cost a look at all. Those that are served bind themselves.
MOST_ISSUED = 4096
# ... between tries of our own CA for a hostname for which it has failed: a disk was full, perhaps.
RETRY = 60


class Keeper:
    """Has ``certificates`` serve what is wanted. Any thread, but for look()."""

    def __init__(
        self,
        certificates: Certificates,
        *,
        own_names: Iterable[str],
        served: Callable[[], Iterable[str]],
        on_change: Callable[[str], None],
        owner: Callable[[str], tuple[object, Limits]] = lambda hostname: (None, UNLIMITED),
        earlier: Iterable[str] = (),
        ordering: Ordering | None = None,
    ):
        """``own_names`` are the gateway's: they always are wanted. ``served()`` gives the hostnames
        that agents serve now, and ``owner(hostname)`` whose orders those are, with that one's
        limits. ``on_change(hostname)`` is called, in a thread of ours and without a lock, when
        state(hostname) may have changed; it must not block. ``earlier`` are hostnames that our own
        CA has signed for. ``ordering`` is None if nothing is ordered.

        Raises CertificateError if a name of the gateway's has no certificate, and can get none.
        """
        self._certificates = certificates
        self._own_names = tuple(own_names)
        self._served = served
        self._owner = owner
        self._on_change = on_change
        self._store = ordering and ordering.store
        self._issuer = ordering and Issuer(
            ordering.ca,
            ordering.store,
            ordering.challenges,
            self._order_ended,
            look_up=look_up,
            bounds=ordering.bounds,
        )
        self._unserved: set[str] = set()  # ordered, but serving them failed: look() tries again
        self._unissued: set[str] = set()  # our own CA has failed for them: look() tries again
        self._lock = threading.Lock()  # guards _unserved and _unissued
        # Of look(), as they were at its last time.
        self._given = certificates.given
        self._review_at = monotonic() + KEEP
        self._retry_at = monotonic() + RETRY
        self._served_before: set[str] = set()
        # Until its agent is back, a hostname shows a page that says so, and no TLS error.
        if self._store:
            self._serve_stored()
        for name in self._own_names:
            self._want_own(name)
        self.want(earlier)

    def start(self) -> None:
        """Begin to order. Raises NoThread."""
        if self._issuer:
            self._issuer.start()

    def stop(self) -> None:
        """No more orders; returns within two seconds."""
        if self._issuer:
            self._issuer.stop()

    # What is wanted

    def want(
        self, hostnames: Iterable[str], agent: object = None, limits: Limits = UNLIMITED
    ) -> None:
        """See to it that hostnames have certificates, now or soon; what goes wrong is logged.

        ``agent`` is whose orders they count as (any hashable), None for the one that serves them,
        or else the gateway; ``limits`` are that one's. Reads the disk, so do not call it in a
        handshake.
        """
        self._certificates.reload()  # once for all: it is a look at each of hundreds of files
        for hostname in hostnames:
            self._want(hostname, agent, limits)
        issued = self._certificates.issued()
        if len(issued) > MOST_ISSUED:
            self._forget_unserved(issued, len(issued) - MOST_ISSUED + MOST_ISSUED // 10)

    def _forget_unserved(self, issued, count):
        """Forget the oldest ``count`` certificates of our own CA whose hostnames nobody serves."""
        wanted = self._wanted_names()
        idle = [hostname for hostname in issued if hostname not in wanted][:count]
        for hostname in idle:
            try:
                self._certificates.forget(hostname)
            except CertificateError as error:
                log.warning("%s: its certificate is not served any more, but stays: %s",
                            hostname, error)  # fmt: skip
        if idle:
            log.info("%d certificates of our own CA are forgotten, nobody serves their hostnames",
                     len(idle))  # fmt: skip
        if back := self._wanted_names().intersection(idle):
            self.want(back)  # its agent came just then

    def _wanted_names(self):
        return {normal_hostname(name) for name in (*self._own_names, *self._served())}

    def _want(self, hostname, agent, limits):
        try:
            there = self._certificates.ensure(hostname)
        except (CertificateError, OSError) as error:  # the other hostnames are served all the same
            with self._lock:
                is_known = hostname in self._unissued
                self._unissued.add(hostname)
            if not is_known:
                log.error("%s: %s; next try in %d s", hostname, error, RETRY)
            return
        if self._issuer is None or hostname.startswith(WILDCARD):
            if not there:
                log.warning("%s: visitors are refused, %s", hostname, _why_none(hostname))
            return
        if self._certificates.is_given(hostname):
            self._issuer.drop(hostname)
            return
        if agent is None and hostname not in self._own_names:
            agent, limits = self._owner(hostname)
        try:
            self._issuer.want(hostname, agent, limits)
        except ValueError as error:
            log.warning("%s: no certificate: %s", hostname, error)
            return
        self._serve_ordered(hostname)

    def _want_own(self, name):
        if self._issuer and valid_hostname(name):
            self.want([name])
        elif not self._certificates.ensure(name):
            raise CertificateError(
                f"{name}: no CA certifies an IP address here, expected a hostname in "
                "TUNNEL_HOST, or its certificate in CERT_DIR"
                if self._issuer else
                f"CERT_DIR {self._certificates.cert_dir}: no certificate for {name}, expected one "
                "in a pair x.crt and x.key; add it, or set ACME_ENV=local to try things out"
            )  # fmt: skip

    # How it stands

    def state(self, hostname: str) -> State:
        """How the certificate of a hostname stands. No disk."""
        state = self._issuer and self._issuer.state(hostname)
        if state is not None:
            return state
        if self._certificates.context(hostname):
            return State(READY)
        return State(FAILED, _why_none(hostname))

    def pending(self, hostname: str | None) -> bool:
        """Whether a hostname has no certificate yet, and will soon: its visitors may wait. In
        between it is ready, and not yet served. No disk."""
        if self._issuer is None or hostname is None or self._certificates.context(hostname):
            return False
        state = self._issuer.state(hostname)
        return state is not None and state.name is not FAILED

    # What is served

    def _serve_stored(self):
        """Serve what was ordered earlier."""
        try:
            hostnames = self._store.hostnames()
        except StoreError as error:
            log.warning("certificates ordered earlier are not served before their agents are "
                        "back: %s", error)  # fmt: skip
            return
        for hostname in hostnames:
            with contextlib.suppress(StoreError, CertificateError, OSError):  # ordered when wanted
                stored = self._store.certificate(hostname)
                if stored is not None:
                    self._serve(hostname, stored)

    def _serve(self, hostname, stored):
        """Raises StoreError, CertificateError, OSError."""
        with pem_file(self._store.pem(stored)) as file:
            self._certificates.take(hostname, file)

    def _serve_ordered(self, hostname):
        """Serve what was ordered for a hostname, if it is there; if that fails, look() tries again:
        the process may be short of descriptors."""
        stored = self._issuer.certificate(hostname)
        try:
            if stored is not None:
                self._serve(hostname, stored)
        except (StoreError, CertificateError, OSError) as error:
            with self._lock:
                is_known = hostname in self._unserved
                self._unserved.add(hostname)
            if not is_known:
                log.error("%s: its new certificate cannot be served, next try in a few seconds: %s",
                          hostname, error)  # fmt: skip
        else:
            with self._lock:
                self._unserved.discard(hostname)

    def _order_ended(self, hostname):
        """Issuer's threads: an order has come to an end, good or bad."""
        self._serve_ordered(hostname)
        self._on_change(hostname)

    # What changes

    def look(self) -> None:
        """Take up what has changed in CERT_DIR, in the operator's requests, and in who is served.

        To be called every few seconds, always in one thread; it waits for the disk.
        """
        self._certificates.reload()
        if self._given != self._certificates.given:
            self._given = self._certificates.given
            self._take_up_given()
        self._renew_asked()
        with self._lock:
            unserved = tuple(self._unserved)
        for hostname in unserved:
            self._serve_ordered(hostname)
        if monotonic() >= self._retry_at:
            self._retry_at = monotonic() + RETRY
            self._retry_unissued()
        if monotonic() >= self._review_at:
            self._review_at = monotonic() + KEEP
            self._review()

    def _retry_unissued(self):
        """Ask our own CA again for hostnames for which it has failed, if they are still wanted."""
        wanted = {*self._own_names, *self._served()}
        with self._lock:
            self._unissued &= wanted
            hostnames = tuple(self._unissued)
        for hostname in hostnames:
            self.want([hostname])
            if self._certificates.context(hostname):
                with self._lock:
                    self._unissued.discard(hostname)
                log.info("%s: it has a certificate now", hostname)
                self._on_change(hostname)

    def _take_up_given(self):
        """Other names have a valid pair in CERT_DIR now: order what is missing, and tell agents."""
        served = tuple(self._served())
        self.want({*self._own_names, *served})
        for hostname in served:
            self._on_change(hostname)

    def _renew_asked(self):
        """Order what `certificates --renew` asks for."""
        for hostname in self._store.renewals() if self._issuer else ():
            known = self._issuer.retry_now(hostname)
            log.info("%s: a new certificate was asked for%s", hostname,
                     "" if known else ", but nobody serves it now")  # fmt: skip

    def _review(self):
        """Renew those of hostnames that are served now, and forget those that are not, nor were at
        the review before."""
        now = {*self._own_names, *self._served()}
        self.want(now)
        if self._issuer:
            idle = self._issuer.hostnames() - now - self._served_before - set(self._served())
            for hostname in idle:
                self._issuer.drop(hostname)
            self.want(idle.intersection(self._served()))  # its agent came just then
        self._served_before = now


def _why_none(hostname):
    if hostname.startswith(WILDCARD):
        return f"CERT_DIR has no certificate for {hostname}, and wildcards are not ordered"
    return "there is no certificate for it"
