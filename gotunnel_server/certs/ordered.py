"""The certificates that are ordered from a CA, as the keeper sees them: Ordered.

A gateway that orders nothing has NothingOrdered in its place, so that the keeper need not ask which
of the two it is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

from gotunnel_agent.common.hostnames import WILDCARD

from .contexts import Certificates
from .issuer import Issuer
from .local_ca import CertificateError
from .look_up import look_up
from .ordering import Ordering
from .pem_file import pem_file
from .rate_limits import Limits
from .state import FAILED, State
from .store import Stored, StoreError

log = logging.getLogger("gotunnel.ordered")


class Ordered:
    """Orders certificates, and has ``certificates`` serve them. Any thread, except look().

    ``on_change(hostname)`` is called, in a thread of ours and without a lock, when an order has
    ended, good or bad, and its certificate is served; it must not block.
    """

    def __init__(
        self, ordering: Ordering, certificates: Certificates, on_change: Callable[[str], object]
    ) -> None:
        self._certificates = certificates
        self._on_change = on_change
        self._store = ordering.store
        self.issuer = Issuer(
            ordering.ca,
            ordering.store,
            ordering.challenges,
            self._order_ended,
            look_up=look_up,
            bounds=ordering.bounds,
        )
        self._queue = self.issuer.queue
        self._unserved: set[str] = set()  # stored, but serving them failed: look() tries again
        self._lock = threading.Lock()  # guards _unserved
        self._is_out_of_reach = False  # the store, at the last look
        # With a certificate, visitors get an error page until the agent is back, not a TLS error.
        self._serve_stored()

    def prepare(self) -> None:
        """Start the thread that orders; it waits for start(). Raises NoThread."""
        self.issuer.prepare()

    def start(self) -> None:
        """Begin to order. Raises NoThread, but not after prepare()."""
        self.issuer.start()

    def stop(self) -> None:
        """No more orders; returns within two seconds."""
        self.issuer.stop()

    def takes(self, hostname: str) -> bool:
        """Whether a hostname is ordered at all: a wildcard is not."""
        return not hostname.startswith(WILDCARD)

    def want(self, hostname: str, agent: object, limits: Limits) -> None:
        """As OrderQueue.want(); an invalid hostname is logged. A stored certificate is served."""
        try:
            self._queue.want(hostname, agent, limits)
        except ValueError as error:
            log.warning("%s: no certificate: %s", hostname, error)
            return
        self._serve_ordered(hostname)

    def renew(self, hostname: str) -> None:
        """As OrderQueue.renew()."""
        self._queue.renew(hostname)

    def drop(self, hostname: str) -> None:
        """As OrderQueue.drop()."""
        self._queue.drop(hostname)

    def drop_all_but(self, hostnames: set[str]) -> set[str]:
        """Drop the others, and return them."""
        others = self._queue.hostnames() - hostnames
        for hostname in others:
            self._queue.drop(hostname)
        return others

    def state(self, hostname: str) -> State | None:
        """None if the hostname is not wanted. No disk."""
        return self._queue.state(hostname)

    def pending(self, hostname: str | None) -> bool:
        """As Keeper.pending()."""
        if hostname is None or self._certificates.context(hostname):
            return False
        state = self._queue.state(hostname)
        return state is not None and state.name is not FAILED

    def look(self) -> None:
        """Take up `certificates --renew` and what others have ordered, and try again what could not
        be served. One thread; it waits for the disk."""
        self._take_up_changes()
        for hostname in self._store.renewals():
            known = self._queue.retry_now(hostname)
            unknown = "" if known else ", but no agent serves it now: nothing is ordered"
            log.info("%s: a new certificate was asked for%s", hostname, unknown)
        with self._lock:
            unserved = tuple(self._unserved)
        for hostname in unserved:
            self._serve_ordered(hostname)

    def _take_up_changes(self) -> None:
        """Serve what other gateways have ordered, if the store tells."""
        try:
            hostnames = self._store.changed()
        except StoreError as error:  # asked again in seconds
            self._is_out_of_reach = True
            log.debug("%s", error)
            return
        if self._is_out_of_reach:
            self._is_out_of_reach = False
            self._queue.end_outage()
        for hostname in hostnames:
            try:
                stored = self._store.certificate(hostname)
                if stored is not None:
                    self._queue.found(hostname, stored)
                    self._serve(hostname, stored)
            except (StoreError, CertificateError, OSError) as error:
                log.warning("%s: the certificate that another gateway has ordered is not served "
                            "yet: %s", hostname, error)  # fmt: skip

    def _serve_stored(self) -> None:
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

    def _serve(self, hostname: str, stored: Stored) -> None:
        """Raises StoreError, CertificateError, OSError."""
        with pem_file(self._store.pem(stored)) as file:
            self._certificates.take(hostname, file)

    def _serve_ordered(self, hostname: str) -> None:
        """Serve a hostname's ordered certificate, if it is there. If that fails, look() tries
        again: the process may be short of descriptors."""
        stored = self._queue.certificate(hostname)
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

    def _order_ended(self, hostname: str) -> None:
        """Issuer's threads."""
        self._serve_ordered(hostname)
        self._on_change(hostname)


class NothingOrdered:
    """In place of Ordered if no CA is asked: has nothing, does nothing."""

    def prepare(self) -> None:
        pass

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def takes(self, hostname: str) -> bool:
        return False

    def want(self, hostname: str, agent: object, limits: Limits) -> None:
        pass

    def renew(self, hostname: str) -> None:
        pass

    def drop(self, hostname: str) -> None:
        pass

    def drop_all_but(self, hostnames: set[str]) -> set[str]:
        return set()

    def state(self, hostname: str) -> State | None:
        return None

    def pending(self, hostname: str | None) -> bool:
        return False

    def look(self) -> None:
        pass
