"""Decides which hostnames need a certificate, and where each certificate comes from.

    a certificate comes from        if
    CERT_DIR                        a valid pair there names the hostname
    our own CA (ACME_ENV=local)     its agent is connected; certificates of other hostnames are
                                    forgotten when there are more than MOST_ISSUED
    an order                        its agent is connected, or was at the hourly review before
    an earlier order, in the store  none of the other three applies

A wildcard's certificate is from CERT_DIR or from our own CA; none is ordered. A certificate is
served until there is a newer one, even if its hostname is no longer wanted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from time import monotonic

from gotunnel_agent.common.hostnames import WILDCARD, normal_hostname, valid_hostname

from .contexts import Certificates
from .local_ca import CertificateError
from .ordered import NothingOrdered, Ordered
from .ordering import Ordering
from .rate_limits import UNLIMITED, Limits
from .state import FAILED, READY, NotRenewed, State

log = logging.getLogger("gotunnel.keeper")

# Seconds between reviews of which hostnames are served. One without an agent at two reviews in a
# row is no longer renewed.
KEEP = 3600
# Bound of our own CA's certificates: two files and a context of some 20 KiB each. An agent may
# register ever new hostnames; beyond the bound the oldest that no agent serves are forgotten, a
# tenth at once so that not every further hostname costs a search. MAX_HOSTS_PER_AGENT bounds those
# that are served.
MOST_ISSUED = 4096
# Seconds between tries of our own CA for a hostname for which it failed: a disk was full, perhaps.
RETRY = 60


class Keeper:
    """Has ``certificates`` serve the certificates that are wanted. Any thread, except look()."""

    def __init__(
        self,
        certificates: Certificates,
        *,
        own_names: Iterable[str],
        served: Callable[[], Iterable[str]],
        on_change: Callable[[str], object],
        owner: Callable[[str], tuple[object, Limits]] = lambda hostname: (None, UNLIMITED),
        earlier: Iterable[str] = (),
        ordering: Ordering | None = None,
    ) -> None:
        """``own_names`` are the gateway's: they are always wanted. ``served()`` gives the hostnames
        that agents serve now, and ``owner(hostname)`` the agent that orders for it, with its
        limits. ``on_change(hostname)`` is called, in a thread of ours and without a lock, when
        state(hostname) may have changed; it must not block. ``earlier`` are hostnames that our own
        CA has signed for. ``ordering`` is None if nothing is ordered.

        Raises CertificateError if one of ``own_names`` has no certificate, and can get none.
        """
        self._certificates = certificates
        self._own_names = tuple(own_names)
        self._served = served
        self._owner = owner
        self._on_change = on_change
        self._ordered = (
            NothingOrdered() if ordering is None else Ordered(ordering, certificates, on_change)
        )
        self._orders = ordering is not None
        self._unissued: set[str] = set()  # our own CA has failed for them: look() tries again
        self._lock = threading.Lock()  # guards _unissued
        # For look(): as they were at the last one.
        self._given = certificates.given
        self._review_at = monotonic() + KEEP
        self._retry_at = monotonic() + RETRY
        self._served_before: set[str] = set()
        for name in self._own_names:
            self._want_own(name)
        self.want(earlier)

    def prepare(self) -> None:
        """Start the thread that orders; it waits for start(). Raises NoThread."""
        self._ordered.prepare()

    def start(self) -> None:
        """Begin to order. Raises NoThread, but not after prepare()."""
        self._ordered.start()

    def stop(self) -> None:
        """No more orders; returns within two seconds."""
        self._ordered.stop()

    # What is wanted

    def want(
        self, hostnames: Iterable[str], agent: object = None, limits: Limits = UNLIMITED
    ) -> None:
        """Make sure that hostnames have certificates, now or soon; errors are logged.

        Their orders count as the ``agent``'s (any hashable), within its ``limits``; None for the
        agent that serves them, or else the gateway. Reads the disk, so do not call it in a
        handshake.
        """
        self._certificates.reload()  # once for all: it stats hundreds of files
        for hostname in hostnames:
            self._want(hostname, agent, limits)
        issued = self._certificates.issued()
        if len(issued) > MOST_ISSUED:
            self._forget_unserved(issued, len(issued) - MOST_ISSUED + MOST_ISSUED // 10)

    def _forget_unserved(self, issued: list[str], count: int) -> None:
        """Forget the oldest ``count`` certificates of our own CA whose hostnames have no agent."""
        wanted = self._wanted_names()
        idle = [hostname for hostname in issued if hostname not in wanted][:count]
        for hostname in idle:
            try:
                self._certificates.forget(hostname)
            except CertificateError as error:
                log.warning("%s: its certificate is no longer served, but its files stay: %s",
                            hostname, error)  # fmt: skip
        if idle:
            log.info("%d certificates of our own CA are forgotten: no agent serves their hostnames",
                     len(idle))  # fmt: skip
        if back := self._wanted_names().intersection(idle):
            self.want(back)  # its agent came meanwhile

    def _wanted_names(self) -> set[str]:
        return {normal_hostname(name) for name in (*self._own_names, *self._served())}

    def _want(self, hostname: str, agent: object, limits: Limits) -> None:
        try:
            there = self._certificates.ensure(hostname)
        except (CertificateError, OSError) as error:  # the other hostnames are served all the same
            with self._lock:
                is_known = hostname in self._unissued
                self._unissued.add(hostname)
            if not is_known:
                log.error("%s: %s; next try in %d s", hostname, error, RETRY)
            return
        if not self._ordered.takes(hostname):
            if not there:
                log.warning("%s: visitors are refused, %s", hostname, _why_none(hostname))
            return
        if self._certificates.is_given(hostname):
            self._ordered.drop(hostname)
            return
        if agent is None and hostname not in self._own_names:
            agent, limits = self._owner(hostname)
        self._ordered.want(hostname, agent, limits)

    def _want_own(self, name: str) -> None:
        is_ordered = self._ordered.takes(name)
        if is_ordered and valid_hostname(name):
            self.want([name])
        elif not self._certificates.ensure(name):
            raise CertificateError(
                f"{name}: no CA certifies an IP address here, expected a hostname in "
                "TUNNEL_HOST, or its certificate in CERT_DIR"
                if is_ordered else
                f"CERT_DIR {self._certificates.cert_dir}: no certificate for {name}, expected one "
                "in a pair x.crt and x.key; add it, or set ACME_ENV=local to try things out"
            )  # fmt: skip

    # Its state

    def state(self, hostname: str) -> State:
        """The state of a hostname's certificate. No disk."""
        state = self._ordered.state(hostname)
        if state is not None:
            return state
        context = self._certificates.context(hostname)
        if context:
            return State(READY, ends_at=context.ends_at)
        return State(FAILED, _why_none(hostname))

    def renew(self, hostname: str) -> None:
        """Order a new certificate now, if the limits of the CA and of the hostname's agent permit
        it. Any thread; no disk. Raises NotRenewed."""
        if self._certificates.is_given(hostname):
            raise NotRenewed(
                f"the certificate of {hostname} is from CERT_DIR: put a newer one there"
            )
        if self._certificates.context(hostname) is None and not self._ordered.state(hostname):
            raise NotRenewed(f"{hostname} has no certificate here, and no agent serves it")
        if not self._ordered.takes(hostname):
            raise NotRenewed(
                f"{hostname} is a wildcard, and its certificate is not ordered: put one into "
                "CERT_DIR"
                if self._orders and hostname.startswith(WILDCARD) else
                f"nothing is ordered here (ACME_ENV): the certificate of {hostname} is from our "
                "own CA, which renews it by itself"
            )  # fmt: skip
        self._ordered.renew(hostname)

    def pending(self, hostname: str | None) -> bool:
        """Whether a hostname has no certificate yet, but will soon: its visitors may wait. Also
        while it is READY, and not yet served. No disk."""
        return self._ordered.pending(hostname)

    # What changes

    def look(self) -> None:
        """Take up changes of CERT_DIR, the operator's requests, and which hostnames are served.

        Call it every few seconds, always in one thread; it waits for the disk.
        """
        self._certificates.reload()
        if self._given != self._certificates.given:
            self._given = self._certificates.given
            self._take_up_given()
        self._ordered.look()
        if monotonic() >= self._retry_at:
            self._retry_at = monotonic() + RETRY
            self._retry_unissued()
        if monotonic() >= self._review_at:
            self._review_at = monotonic() + KEEP
            self._review()

    def _retry_unissued(self) -> None:
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

    def _take_up_given(self) -> None:
        """CERT_DIR has valid pairs for other names now: order what is missing, and tell agents."""
        served = tuple(self._served())
        self.want({*self._own_names, *served})
        for hostname in served:
            self._on_change(hostname)

    def _review(self) -> None:
        """Renew hostnames that are served now, and drop those that are not, nor were at the review
        before."""
        now = {*self._own_names, *self._served()}
        self.want(now)
        idle = self._ordered.drop_all_but(now | self._served_before | set(self._served()))
        if back := idle.intersection(self._served()):
            self.want(back)  # its agent came meanwhile
        self._served_before = now


def _why_none(hostname: str) -> str:
    if hostname.startswith(WILDCARD):
        return f"CERT_DIR has no certificate for {hostname}, and wildcards are not ordered"
    return "there is no certificate for it"
