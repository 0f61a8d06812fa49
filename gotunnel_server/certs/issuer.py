"""The threads that order certificates. Which is next: order_queue.py. How one is ordered: acme.py.

    thread              how many                      ends when
    issuer              1; starts jobs that are due   stop()
    order HOSTNAME      JOBS for new certificates,    certificate or refusal; soon after stop()
                        and one more for renewals
    window HOSTNAME     JOBS - 1; they and the        the CA has told its renewal window (ARI)
                        orders are JOBS + 1 at most
    timer of a request  one a request (bounded_http)  the answer has come, or the time is over

A hostname is due when it has no certificate, when its certificate is to be renewed, or when the
delay after a failure is over (schedule.py).
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from cryptography import x509

from gotunnel import NoThread, spawn

from ..net.certificate import ends
from .acme_errors import HOST, LATER, TRANSPORT, Abandoned, CaError
from .cancel import Stop
from .challenges import Publisher
from .order_queue import OrderQueue
from .rate_limits import Bounds
from .schedule import Window
from .store import CertStore, StoreAway, StoreError
from .wanted import Wanted

log = logging.getLogger("gotunnel.issuer")

# Orders at a time. An order for a hostname whose address is silent takes a minute; the others must
# not wait for it. One more is allowed for a renewal: with many new hostnames waiting, a certificate
# could expire otherwise.
JOBS = 4
# Longest time in seconds between two checks for due orders: the clock may be set meanwhile, or the
# machine may sleep.
LOOK_AGAIN = 600.0
# Seconds until a store is tried again that could not be read or locked. The CA is not asked.
STORE_AGAIN = 60.0
# Seconds until the issuer looks again, and a hostname is ordered for again, after a bug.
AFTER_BUG = 60.0
# Seconds until the issuer looks again after the system had no thread for a job.
AFTER_NO_THREAD = 30.0
# Seconds that stop() waits for all jobs. A job that still connects then ends by itself (daemon).
STOP_TIMEOUT = 1.5

ORDER, WINDOW = "order", "window"  # what a job does

# The parts of a hostname's state (Wanted.as_dict) that are kept without its lock. Another process
# may have kept newer ones of the rest.
WINDOW_FIELDS = ("window", "window_of", "ask_at", "lost")
TURN = ("turn_at", "turn_why")


class Orderer(Protocol):
    """How a CA is asked; acme.Ca does it."""

    def order(
        self, hostname: str, challenge: str, challenges: Publisher, stop: Stop, *,
        replaces: x509.Certificate | None = None,
    ) -> tuple[bytes, bytes]: ...  # fmt: skip

    def renewal_info(self, leaf: x509.Certificate, stop: Stop) -> tuple[Window | None, float]: ...


class Issuer:
    """Orders what its ``queue`` wants. Any thread.

    ``challenges`` publishes proofs. ``on_change(hostname)`` is called, in a thread of ours and
    without a lock, when queue.state(hostname) has changed. ``clock`` gives seconds since 1970;
    after setting a fake one, call look(). ``look_up(hostname)`` is called in a job's thread before
    a first order. It raises CaError if the hostname does not lead here: a failed validation would
    count against the CA's limits.
    """

    def __init__(self, ca: Orderer, store: CertStore, challenges: Publisher,
                 on_change: Callable[[str], object], *, clock: Callable[[], float] = time.time,
                 look_up: Callable[[str], None] = lambda hostname: None,
                 bounds: Bounds = Bounds()) -> None:  # fmt: skip
        self.queue = OrderQueue(store, challenges.types, clock=clock, bounds=bounds)
        self._ca = ca
        self._look_up = look_up
        self._store = store
        self._challenges = challenges
        self._on_change = on_change
        self._clock = clock
        self._lock = self.queue.lock  # guards what follows, too
        self._jobs: set[threading.Thread] = set()
        self._stopping = False
        self._thread: threading.Thread | None = None  # None until prepare()
        self._begun = threading.Event()  # set by start() and stop()

    def prepare(self) -> None:
        """Start the thread, which waits for start(). Raises NoThread."""
        self._thread = spawn("issuer", self._run)

    def start(self) -> None:
        """Begin to order. If the CA has asked an earlier process for a pause, wait until its end.
        Raises NoThread, but not after prepare()."""
        if self._thread is None:
            self.prepare()
        self.queue.restore()
        self._begun.set()

    def stop(self) -> None:
        """No more orders; returns within two seconds, whatever the CA does."""
        with self._lock:
            self._stopping = True
            self.queue.cancel()
            jobs = list(self._jobs)
            self._lock.notify_all()
        self._begun.set()
        deadline = time.monotonic() + STOP_TIMEOUT
        for thread in (self._thread, *jobs):
            if thread is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def look(self) -> None:
        """Look now which orders are due: the clock was set. They have been started on return."""
        with self._lock:
            self._look()
            self._lock.notify_all()

    # What is due

    def _run(self) -> None:
        """Thread: order what is due, until stop()."""
        self._begun.wait()
        while True:
            try:
                if not self._turn():
                    return
            except Exception:
                log.exception("issuer: looking which certificates are due failed (bug, traceback "
                              "follows); next look in %g s", AFTER_BUG)  # fmt: skip
                with self._lock:
                    if not self._stopping:
                        self._lock.wait(AFTER_BUG)

    def _turn(self) -> bool:
        """Look once; then report what is new, or wait until a look is worth it. False: the end."""
        with self._lock:
            wait = self._look()
            if self._stopping:
                return False
            to_keep, news = self.queue.take_to_keep(), self.queue.news()
            if not (news or to_keep):
                self._lock.wait(wait)
        for host in to_keep:
            self.queue.keep_part(host, *TURN)
        self._tell(news)
        return True

    def _look(self) -> float:
        """Start what is due and may run; seconds until the next look. Caller holds the lock."""
        if self._stopping:
            return 0.0
        now = self._clock()
        self.queue.forgive_a_step_back(now)
        return self._start_jobs(now)

    def _start_jobs(self, now: float) -> float:
        wait = LOOK_AGAIN
        asking: list[tuple[Wanted, x509.Certificate]] = []
        ahead: dict[str, int] = {}
        for due_at, host in self.queue.idle(now):
            if len(self._jobs) >= JOBS + (host.stored is not None):
                return wait  # _work() notifies the issuer when a job has ended
            if due_at <= now:
                turn_at = self.queue.give_turn(host, now, ahead)
                if turn_at is None:
                    if not self._start(host, ORDER, self._order):
                        self.queue.not_begun(host)
                        return min(wait, AFTER_NO_THREAD)
                    continue
                due_at = turn_at
            wait = min(wait, due_at - now)
            if host.stored and host.stored.ends_at > now:  # an expired one has no window
                ask_at = self.queue.ask_at(host)
                if ask_at <= now:
                    asking.append((host, host.stored.leaf))
                else:
                    wait = min(wait, ask_at - now)
        for host, leaf in asking:
            # One place is left for orders. If all are taken, the end of a job starts another look.
            if len(self._jobs) < JOBS - 1 and not self._start(
                host, WINDOW, functools.partial(self._ask, leaf)
            ):
                return min(wait, AFTER_NO_THREAD)
        return wait

    def _start(self, host: Wanted, what: str, job: Callable[[Wanted], None]) -> bool:
        """Begin a job; False if the system has no thread for it."""
        try:
            # It cannot end before we let go of the lock.
            thread = spawn(f"{what} {host.name}", self._work, host, what, job)
        except NoThread as error:
            log.error("%s: %s; next try in %g s", host.name, error, AFTER_NO_THREAD)
            return False
        host.busy, host.ordering = True, what == ORDER
        self._jobs.add(thread)
        return True

    def _work(self, host: Wanted, what: str, job: Callable[[Wanted], None]) -> None:
        """Thread: do one job. Whatever its result, its place is free again afterwards."""
        try:
            try:
                self._attempt(host, what, job)
            except Exception:
                log.exception("%s: ended early (bug, traceback follows); the next attempt is in "
                              "%g s", threading.current_thread().name, AFTER_BUG)  # fmt: skip
                self.queue.delay(host, AFTER_BUG)
            with self._lock:
                host.busy = host.ordering = False
                news = [] if self._stopping else self.queue.news()
            self._tell(news)
        finally:
            with self._lock:
                self._jobs.discard(threading.current_thread())
                self._lock.notify_all()

    def _attempt(self, host: Wanted, what: str, job: Callable[[Wanted], None]) -> None:
        """Do a job, and keep the tokens that it took."""
        try:
            job(host)
        except Abandoned:  # stop(), or drop(): its result is no longer wanted
            self.queue.abandoned(host)
        except Exception as error:
            log.exception("%s: failed (bug, traceback follows); that counts as the hostname's "
                          "failure", threading.current_thread().name)  # fmt: skip
            self.queue.failed(host, CaError(HOST, "gotunnel", repr(error)))
            self.queue.keep(host)
        if what == ORDER:
            self.queue.keep_turns()

    def _tell(self, hostnames: list[str]) -> None:
        for hostname in hostnames:
            try:
                self._on_change(hostname)
            except Exception:  # a bug of the caller's must not stop the other hostnames
                log.exception("%s: telling its new state failed (bug, traceback follows)", hostname)

    # The jobs

    def _order(self, host: Wanted) -> None:
        asked_for = self.queue.begin(host)
        try:
            self._make_sure_of_room()
            with self._store.lock(host.name) as ours:
                if ours:
                    self._order_alone(host, asked_for)
                else:
                    self.queue.ordered_elsewhere(host, asked_for)
        except StoreError as error:
            self.queue.failed(host, CaError(LATER, _place(error), str(error),
                                            retry_after=STORE_AGAIN))  # fmt: skip
            self.queue.keep_part(host, "error")
        except CaError as error:
            self.queue.failed(host, error)
            self.queue.keep_part(host, "error")

    def _order_alone(self, host: Wanted, asked_for: bool) -> None:
        """Order under the hostname's lock, and keep the result before another process gets the
        lock. What others have learned counts for us, too: else each gateway of a cluster would
        repeat the attempts of all others."""
        if self._adopt(host):
            self.queue.keep(host)
            return
        told = self._store.state(host.name), self._store.pause()
        if not asked_for and self.queue.heed(host, *told):
            return
        try:
            self._have_issued(host)
        except CaError as error:
            self.queue.failed(host, error)
        finally:
            if not self._stopping:
                self.queue.keep(host)

    def _make_sure_of_room(self) -> None:
        try:
            self._store.make_sure_of_room()
        except StoreError as error:
            raise CaError(TRANSPORT, _place(error), str(error)) from error

    def _adopt(self, host: Wanted) -> bool:
        """Take what another process may have ordered since we looked."""
        stored = self._store.certificate(host.name)
        if stored is None or (host.stored and stored.ends_at <= host.stored.ends_at):
            return False
        self.queue.adopted(host, stored)
        return True

    def _have_issued(self, host: Wanted) -> None:
        challenge = self.queue.choose(host)
        if host.stored is None:
            self._find(host)
            # The tokens stay taken, also if the gateway is killed now. Meanwhile others may have
            # taken the last ones.
            self.queue.keep_turns()
            if not self.queue.has_turn(host):
                return
        key_pem, chain_pem = self._ca.order(
            host.name, challenge, self._challenges, host.stop,
            replaces=None if host.stored is None else host.stored.leaf)  # fmt: skip
        self.queue.issued(host, challenge)
        try:
            stored = self._store.save(host.name, key_pem, chain_pem)
        except StoreError as error:  # HOST, since the CA has counted this certificate
            raise CaError(HOST, "ACME_CACHE", str(error)) from error
        self.queue.succeeded(host, stored, challenge)
        log.info("%s: certificate until %s UTC, by %s", host.name,
                 ends(stored.leaf).strftime("%Y-%m-%d %H:%M"), challenge)  # fmt: skip

    def _find(self, host: Wanted) -> None:
        try:
            self._look_up(host.name)
        except CaError as error:
            if error.kind == HOST:
                self.queue.not_found(host)
            raise

    def _ask(self, leaf: x509.Certificate, host: Wanted) -> None:
        self.queue.asking(host)
        window, again = self._ca.renewal_info(leaf, host.stop)
        self.queue.told_window(host, leaf, window, again)
        if not self._stopping:
            self.queue.keep_part(host, *WINDOW_FIELDS)


def _place(error: StoreError) -> str:
    """The place that an error names first."""
    return "" if isinstance(error, StoreAway) else "ACME_CACHE"
