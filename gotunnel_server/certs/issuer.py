"""When certificates are ordered, and what becomes of it. How one is ordered: acme.py.

    thread              how many                      ends when
    issuer              1                             stop(); it looks who is due, and starts jobs
    order HOSTNAME      JOBS + 1, with the next       certificate or refusal; soon after stop()
    window HOSTNAME     at most JOBS - 1              the CA has told its renewal window
    timer of a request  one a request (bounded_http)  the answer is there, or late

A hostname is due when it has no certificate, when its certificate is to be renewed, or when the
time after a failure is over (schedule.py). Whom a failure holds up (acme_errors.py):

    HOST        that hostname: 1, 10, 100 minutes, then daily; the next attempt uses the other
                challenge
    LATER       that hostname, for as long as the error says; it is not counted
    CONFIG      that hostname for a day, and all of them if none would fare better
    ACCOUNT     all, for as long as the CA says
    TRANSPORT   all, for a short while that grows; no hostname is blamed. So it is when the store
                could keep no certificate: then none is ordered

A certificate that is there is never touched by any of this: it is served until there is a newer
one. What was learned of a hostname is kept by the store, and so is a pause that the CA has asked
for: a restart repeats no failure early.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from gotunnel import NoThread, spawn
from gotunnel_agent.common.hostnames import normal_hostname, valid_hostname
from gotunnel_agent.common.one_line import words_on_one_line
from gotunnel_agent.common.token_bucket import Buckets

from .acme_errors import ACCOUNT, CONFIG, HOST, LATER, TRANSPORT, Abandoned, CaError
from .schedule import ASK, CLOCK_OFF, DAY, HOUR, LEFT_AT_LATEST, retry_delay
from .state import FAILED, READY, WAITING, State
from .store import CertStore, Stored, StoreError
from .turns import UNLIMITED, Limits
from .wanted import Wanted, number

log = logging.getLogger("gotunnel.issuer")

# A hostname whose address is silent keeps its order for a minute; the others are to go on. There is
# one more for certificates that are there, lest they run out while new names wait for a resolver.
JOBS = 4
# First orders. Let's Encrypt takes 300 in three hours. An agent may register MAX_HOSTS_PER_AGENT.
ORDERS_PER_HOUR, ORDERS_PER_AGENT = 80, 50
# Seconds at most between two looks at the clock: it may be set, and the machine may have slept.
LOOK_AGAIN = 600.0
# Seconds of pause after the first failure to reach the CA, doubled with each up to the second.
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0
IN_TURN = "more new hostnames than are ordered in an hour: it waits for its turn, maybe for hours"
# Seconds: another process has the hostname. Orders take a few.
ELSEWHERE = 5.0
# Seconds until a store is tried again that could not be read or locked; the CA hears nothing of it.
STORE_AGAIN = 60.0
# No delay of ours is longer (a day and a tenth). One that seems to be is by another clock.
LONGEST_DELAY = 1.1 * DAY
# Seconds until the issuer looks again, and a hostname is ordered for again, after a bug.
AFTER_BUG = 60.0
# Seconds for all jobs. One that is being connected, or says its last words, is left behind.
STOP_TIMEOUT = 1.5


class Issuer:
    """Keeps certificates for the hostnames that are wanted. Any thread.

    ``ca`` is a Ca, or what orders like one; ``challenges`` publishes proofs and has the ``types``
    that can be published. ``on_change(hostname)`` is called, in a thread of ours and without a
    lock, when state(hostname) has changed. ``clock`` gives seconds since 1970; after setting a
    fake one, call look(). ``look_up(hostname)`` is called in a job's thread before a first order,
    and raises CaError if that cannot go well: it spares the CA, and its limits.
    """

    def __init__(self, ca, store: CertStore, challenges, on_change: Callable[[str], None], *,
                 clock=time.time, look_up: Callable[[str], None] = lambda hostname: None,
                 orders_per_hour=ORDERS_PER_HOUR,
                 orders_per_agent=ORDERS_PER_AGENT):  # fmt: skip
        self._ca = ca
        self._look_up = look_up
        self._store = store
        self._challenges = challenges
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Condition()  # guards what follows; notified when a look is worth it
        self._hosts: dict[str, Wanted] = {}
        self._jobs: set[threading.Thread] = set()
        self._orders = Buckets(orders_per_hour / HOUR, orders_per_hour, most=1)
        self._orders_by_agent = Buckets(orders_per_agent / HOUR, orders_per_agent)
        self._paused_until = 0.0
        self._pause = ""  # why
        self._outages = 0  # failures in a row to reach the CA
        self._looked_at = 0.0  # by our clock, which may be set
        self._in_turn: list[Wanted] = []  # of whom it must be kept that they wait
        self._stopping = False
        self._thread: threading.Thread | None = None  # once it is started

    def start(self):
        """Begin, but not before the CA said that it may be asked again, whoever it said it to.
        Raises NoThread."""
        kept = self._read(self._store.pause, default={})  # else we ask too early, and are told
        with self._lock:
            self._paused_until = number(kept.get("until"), self._clock() + LONGEST_DELAY)
            self._pause = words_on_one_line(kept.get("reason") or "")
        self._thread = spawn("issuer", self._run)

    def stop(self):
        """No more orders; returns within two seconds, whatever the CA does."""
        with self._lock:
            self._stopping = True
            for host in self._hosts.values():
                host.stop.set()
            jobs = list(self._jobs)
            self._lock.notify_all()
        deadline = time.monotonic() + STOP_TIMEOUT
        for thread in (self._thread, *jobs):
            if thread is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    # Who is wanted

    def want(self, hostname, agent=None, limits: Limits = UNLIMITED) -> State:
        """Get a certificate for ``hostname``, and keep it new. Once is enough, twice does no harm.

        ``agent`` is the one that causes it (any hashable): a first order counts as one of its own,
        within its ``limits``. None is the gateway. Reads the store, so do not call it in a
        handshake. Raises ValueError for what cannot be ordered so: an address, a wildcard.
        """
        if not valid_hostname(hostname) or hostname != normal_hostname(hostname):
            raise ValueError(f"{hostname!r}: expected a hostname, in lower case, without wildcard")
        with self._lock:
            host = self._hosts.get(hostname)
        if host is None:
            host = Wanted(hostname, agent)
            # What cannot be read now is ordered, and read again just before.
            host.stored = self._read(self._store.certificate, hostname, default=None)
            now = self._clock()
            host.restore(self._read(self._store.state, hostname, default={}), now + LONGEST_DELAY)
            host.judge_loss(now)
            with self._lock:
                host.told = self._to_tell(host)
                host = self._hosts.setdefault(hostname, host)  # another thread may be quicker
                self._lock.notify_all()
        with self._lock:
            known = self._to_tell(host)
            if known[0] == WAITING:  # who asks knows it now, and it would be no news
                host.told = known
            return self._state(host)

    def hostnames(self) -> set[str]:
        """Those that are wanted."""
        with self._lock:
            return set(self._hosts)

    def drop(self, hostname):
        """No longer wanted: it is not renewed, and an order for it ends. Its files stay."""
        with self._lock:
            host = self._hosts.pop(hostname, None)
            if host is not None:
                host.stop.set()

    def retry_now(self, hostname) -> bool:
        """One attempt at once, whatever failed before, and also if the certificate is a new one.

        If an order is in flight, and fails by the hostname's fault, there is another one. False
        if the hostname is not wanted.
        """
        with self._lock:
            host = self._hosts.get(hostname)
            if host is None:
                return False
            paused = self._paused_until > 0
            host.asked_for = True
            host.not_before = self._paused_until = 0.0
            self._lock.notify_all()
        if paused:
            self._save(self._store.save_pause, {})
        return True

    def state(self, hostname) -> State | None:
        """None if the hostname is not wanted."""
        with self._lock:
            host = self._hosts.get(hostname)
            return host and self._state(host)

    def certificate(self, hostname) -> Stored | None:
        """The certificate to serve; None if there is none, or the hostname is not wanted."""
        with self._lock:
            host = self._hosts.get(hostname)
            return host and host.stored

    def look(self):
        """See now who is due: the clock was set. What is due has been started on return."""
        with self._lock:
            self._look()
            self._lock.notify_all()

    def _state(self, host) -> State:
        now = self._clock()
        ends_at = host.stored and host.stored.ends_at
        next_at, reason = host.due_at(), host.error
        if max(next_at, now) < self._paused_until:
            next_at, reason = self._paused_until, reason or self._pause
        if ends_at is not None and ends_at > now:
            return State(READY, reason, next_at, ends_at)
        return State(FAILED if reason else WAITING, reason, next_at, ends_at)

    # Who is due

    def _run(self):
        """Thread: order what is due, until stop()."""
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
        """Look once, tell what is new, or wait until a look is worth it. False: the end."""
        with self._lock:
            wait = self._look()
            if self._stopping:
                return False
            in_turn, self._in_turn = self._in_turn, []
            states = [(host.name, host.as_dict()) for host in in_turn]
            news = self._news()
            if not (news or states):
                self._lock.wait(wait)
        for hostname, state in states:
            self._save(self._store.save_state, hostname, state)
        self._tell(news)
        return True

    def _look(self) -> float:
        """Start what is due and may run; seconds until the next look. Caller holds the lock."""
        if self._stopping:
            return 0.0
        now = self._clock()
        self._forgive_a_step_back(now)
        return self._start_jobs(now)

    def _forgive_a_step_back(self, now):
        """A delay is so many seconds, also if the clock is set back while it lasts."""
        back, self._looked_at = self._looked_at - now, now
        if back > 0:
            self._orders.shift(-back)
            self._orders_by_agent.shift(-back)
        if back > CLOCK_OFF:
            self._paused_until -= back
            for host in self._hosts.values():
                host.not_before -= back
                host.ask_at -= back

    def _start_jobs(self, now) -> float:
        wait, asking = LOOK_AGAIN, []
        for _, due_at, host in sorted(
            ((not host.stored, host.due_at(), host)
             for host in self._hosts.values() if not host.busy),
            key=lambda triple: triple[:2],
        ):  # fmt: skip
            if len(self._jobs) >= JOBS + (host.stored is not None):
                return wait  # the end of a job is a reason to look
            due_at = max(due_at, self._paused_until)
            if due_at <= now:
                bounds = self._bounds(host)
                bound = max((buckets.wait(key, now) for buckets, key in bounds), default=0)
                if not bound:
                    host.turns = bounds
                    for buckets, key in bounds:
                        buckets.take(key, now)
                    if host.error == IN_TURN:
                        host.error = ""
                    self._start(host, "order", self._order)
                    continue
                due_at = now + bound
                host.not_before = due_at
                if not host.error:
                    host.error = IN_TURN
                    self._in_turn.append(host)
                    log.warning("%s: %s", host.name, IN_TURN)
            wait = min(wait, due_at - now)
            if host.stored and host.stored.ends_at > now:  # an expired one has no window
                ask_at = max(host.ask_at, self._paused_until)
                if ask_at <= now:
                    asking.append(host)
                else:
                    wait = min(wait, ask_at - now)
        for host in asking:  # the end of a job is a reason to look; one place is for orders
            if len(self._jobs) < JOBS - 1:
                self._start(host, "window", self._ask)
        return wait

    def _bounds(self, host) -> list[tuple]:
        """The (Buckets, key) that an order takes a token of.

        A renewal is held up by none: an agent with many new names, or lifetimes so short that the
        hour's orders would not do, must not let a certificate run out. The CA takes it beyond its
        limits if it says what it replaces (RFC 9773 §5). Nor is an order that the operator asks
        for."""
        if host.stored is not None or host.asked_for:
            return []
        if host.agent is None:
            return [(self._orders, None)]
        return [(self._orders, None), (self._orders_by_agent, host.agent)]

    def _start(self, host, what, job):
        try:
            # It cannot end before we let go of the lock.
            thread = spawn(f"{what} {host.name}", self._work, host, job)
        except NoThread as error:
            log.error("%s: %s", host.name, error)
            return
        host.busy = True
        self._jobs.add(thread)

    def _work(self, host, job):
        """Thread: do one job. Whatever becomes of it, the hostname and the other ones go on."""
        try:
            try:
                self._attempt(host, job)
            except Exception:
                log.exception("%s: ended early (bug, traceback follows); the next attempt is in "
                              "%g s", threading.current_thread().name, AFTER_BUG)  # fmt: skip
                with self._lock:
                    host.not_before = max(host.not_before, self._clock() + AFTER_BUG)
            with self._lock:
                host.busy = False
                news = self._news()
            self._tell(news)
        finally:
            with self._lock:
                self._jobs.discard(threading.current_thread())
                self._lock.notify_all()

    def _attempt(self, host, job):
        """Do a job, and keep what was learned."""
        try:
            job(host)
        except Abandoned:
            pass  # nobody wants to know
        except Exception as error:
            log.exception("%s: failed (bug, traceback follows); that counts as the hostname's "
                          "failure", threading.current_thread().name)  # fmt: skip
            self._failed(host, CaError(HOST, "gotunnel", repr(error)))
        with self._lock:
            wanted = self._hosts.get(host.name) is host and not self._stopping
            state = host.as_dict()
        if wanted:
            self._save(self._store.save_state, host.name, state)

    def _news(self) -> list[str]:
        """Whose state is to be told: that who failed waits again is no news. Counts as told, once.
        Caller holds the lock."""
        news = []
        for host in () if self._stopping else self._hosts.values():
            now = self._to_tell(host)
            if host.busy or now == host.told or (now[0], host.told[0]) == (WAITING, FAILED):
                continue
            host.told = now
            news.append(host.name)
        return news

    def _to_tell(self, host) -> tuple:
        state = self._state(host)
        return state.name, state.reason, host.stored

    def _read(self, read, *what, default):
        try:
            return read(*what)
        except StoreError as error:
            log.error("%s", error)
            return default

    def _save(self, save, *what):
        try:
            save(*what)
        except StoreError as error:
            log.error("%s", error)

    def _tell(self, hostnames):
        for hostname in hostnames:
            try:
                self._on_change(hostname)
            except Exception:  # it is not ours, and the other hostnames must go on
                log.exception("%s: a new state could not be told", hostname)

    # What becomes of it

    def _order(self, host):
        with self._lock:
            asked_for, host.asked_for = host.asked_for, False
        try:
            self._make_sure_of_room()
            with self._store.lock(host.name) as ours:
                if not ours:
                    with self._lock:
                        host.not_before = self._clock() + ELSEWHERE
                        host.give_turns_back()
                        host.asked_for |= asked_for
                    return
                if not self._adopt(host):
                    self._have_issued(host)
        except StoreError as error:
            self._failed(host, CaError(LATER, "ACME_CACHE", str(error), retry_after=STORE_AGAIN))
        except CaError as error:
            self._failed(host, error)

    def _make_sure_of_room(self):
        try:
            self._store.make_sure_of_room()
        except StoreError as error:
            raise CaError(TRANSPORT, "ACME_CACHE", str(error)) from error

    def _adopt(self, host) -> bool:
        """Take what another process may have ordered since we looked."""
        stored = self._store.certificate(host.name)
        if stored is None or (host.stored and stored.ends_at <= host.stored.ends_at):
            return False
        self._succeeded(host, stored, host.challenge)
        with self._lock:
            host.give_turns_back()
            host.not_before = 0.0  # nothing was ordered, and this one may have run out
        return True

    def _have_issued(self, host):
        challenge = self._choose(host)
        if host.stored is None:
            self._look_up(host.name)
        key_pem, chain_pem = self._ca.order(
            host.name, challenge, self._challenges, host.stop,
            replaces=host.stored and host.stored.leaf)  # fmt: skip
        try:
            stored = self._store.save(host.name, key_pem, chain_pem)
        except StoreError as error:  # it has cost one of the few that the CA gives
            raise CaError(HOST, "ACME_CACHE", str(error)) from error
        self._succeeded(host, stored, challenge)
        log.info("%s: certificate until %s UTC, by %s", host.name,
                 stored.leaf.not_valid_after_utc.strftime("%Y-%m-%d %H:%M"), challenge)  # fmt: skip

    def _choose(self, host) -> str:
        """The challenge that worked; after a failure the next one, in turn."""
        types = list(self._challenges.types)
        if not types:
            raise CaError(
                CONFIG, "gotunnel", "no port for challenges is open, expected HTTP_PORT or "
                "GATEWAY_PORT to be reached from outside", account_wide=True)  # fmt: skip
        first = types.index(host.challenge) if host.challenge in types else 0
        return types[(first + host.failures) % len(types)]

    def _succeeded(self, host, stored, challenge):
        with self._lock:
            self._forgive_a_step_back(self._clock())
            before = host.stored
            host.stored, host.challenge = stored, challenge
            host.failures, host.error, host.ask_at = 0, "", 0.0
            host.asked_for = False  # this is a new one
            host.lost = host.lost and before is None
            # A CA whose windows have all passed, or whose clock is wrong, would be asked in a loop.
            life = max(stored.ends_at - stored.begins_at, 0.0)
            host.not_before = self._clock() + min(DAY, life * LEFT_AT_LATEST)
            host.window = host.window_of = None
            self._outages = 0

    def _failed(self, host, error: CaError):
        with self._lock:
            now = self._clock()
            self._forgive_a_step_back(now)  # or what is noted now would be taken back as well
            pause = error.retry_after or 0.0
            host.error = str(error)
            if error.kind == TRANSPORT:
                self._outages += self._paused_until <= now  # once for all jobs that meet it
                longer = FIRST_PAUSE * 2 ** min(self._outages - 1, 20)
                pause = max(pause, min(longer, LONGEST_PAUSE))
            elif error.kind == CONFIG:
                host.failures += 1
                pause = max(pause, DAY)
            elif error.kind == HOST:
                host.failures += 1
                pause = max(pause, retry_delay(host.name, host.failures))
            elif error.kind == LATER:
                host.give_turns_back()
            if error.kind == ACCOUNT:
                pause = pause or HOUR
            blamed = error.kind in (HOST, CONFIG) and not error.account_wide
            host.not_before = now if host.asked_for and blamed else now + pause
            if error.account_wide or error.kind == TRANSPORT:
                self._paused_until = max(self._paused_until, now + pause)
                self._pause = str(error)
            # What the operator has to change may well be the reason of a restart.
            kept = error.kind == ACCOUNT and error.status
            paused = {"until": self._paused_until, "reason": self._pause}
        if kept:
            self._save(self._store.save_pause, paused)
        log.warning("%s: no certificate, next attempt in %.0f s%s: %s", host.name, pause,
                    ", all wait" if error.account_wide else "", error)  # fmt: skip

    def _ask(self, host):
        with self._lock:
            host.ask_at = self._clock() + ASK  # whatever comes of it
        leaf = host.stored.leaf
        window, again = self._ca.renewal_info(leaf, host.stop)
        with self._lock:
            host.ask_at = self._clock() + again
            if window is not None or host.window_of != leaf.serial_number:
                host.window, host.window_of = window, leaf.serial_number
