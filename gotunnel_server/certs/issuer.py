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
    LIMITED     that hostname, or all beneath a domain that have none yet, for as long as the CA
                says; it is not counted
    CONFIG      that hostname for a day, and all of them if none would fare better
    ACCOUNT     all, for as long as the CA says
    TRANSPORT   all, for a short while that grows; no hostname is blamed. So it is when the store
                could keep no certificate: then none is ordered

Whose turn it is, so that one agent leaves others something of what the CA gives, is turns.py's
business; which challenge comes first, proof_memory.py's.

A certificate that is there is never touched by any of this: it is served until there is a newer
one. What was learned of a hostname is kept by the store, and so are a pause that the CA has asked
for, and whose turns were taken: a restart repeats no failure early, and gives nobody a new turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from gotunnel import NoThread, spawn
from gotunnel_agent.common.hostnames import normal_hostname, valid_hostname
from gotunnel_agent.common.one_line import words_and_link

from .acme_errors import ACCOUNT, CONFIG, HOST, LATER, LIMITED, TRANSPORT, Abandoned, CaError
from .kept import number
from .proof_memory import ProofMemory
from .schedule import ASK, CLOCK_OFF, DAY, HOUR, LEFT_AT_LATEST, retry_delay
from .state import FAILED, READY, WAITING, State
from .store import CertStore, Stored, StoreError
from .turns import ATTEMPT, CERTIFICATE, ORDER, UNLIMITED, Bounds, Limits, Turns
from .wanted import Wanted

log = logging.getLogger("gotunnel.issuer")

# A hostname whose address is silent keeps its order for a minute; the others are to go on. There is
# one more for certificates that are there, lest they run out while new names wait for a resolver.
JOBS = 4
# Hostnames without certificate that one agent may have wait at once; of more, those that have
# waited longest are forgotten until the hourly review finds them served. An agent may register
# MAX_HOSTS_PER_AGENT at once, and others when these have gone; each costs a small file.
MOST_WAITING = 500
# Seconds at most between two looks at the clock: it may be set, and the machine may have slept.
LOOK_AGAIN = 600.0
# Seconds of pause after the first failure to reach the CA, doubled with each up to the second.
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0
WAITS = "it waits for its turn: "
# Seconds: another process has the hostname. Orders take a few.
ELSEWHERE = 5.0
# Seconds until a store is tried again that could not be read or locked; the CA hears nothing of it.
STORE_AGAIN = 60.0
# No delay of ours is longer (a day and a tenth). One that seems to be is by another clock.
LONGEST_DELAY = 1.1 * DAY
# Seconds until the issuer looks again, and a hostname is ordered for again, after a bug.
AFTER_BUG = 60.0
# ... after the system had no thread for a job: others end soon, and a look costs little.
AFTER_NO_THREAD = 30.0
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
                 bounds: Bounds = Bounds()):  # fmt: skip
        self._ca = ca
        self._look_up = look_up
        self._store = store
        self._challenges = challenges
        self._on_change = on_change
        self._clock = clock
        self._saving = threading.Lock()  # held to write the turns: never older ones over newer
        self._lock = threading.Condition()  # guards what follows; notified when a look is worth it
        self._hosts: dict[str, Wanted] = {}
        self._jobs: set[threading.Thread] = set()
        self._turns = Turns(bounds)
        self._proofs = ProofMemory()
        self._paused_until = 0.0
        self._pause = ""  # why
        self._outages = 0  # failures in a row to reach the CA
        self._looked_at = 0.0  # by our clock, which may be set
        self._in_turn: list[Wanted] = []  # those of which it is to be kept that they wait
        self._stopping = False
        self._thread: threading.Thread | None = None  # once it is started

    def start(self):
        """Begin, but not before the CA said that it may be asked again, whomever it said it to.
        Raises NoThread."""
        self.restore()
        self._thread = spawn("issuer", self._run)

    def restore(self):
        """Take up what the store has of earlier orders; what cannot be read is done without: then
        we ask too early, and are told."""
        pause = self._read(self._store.pause, default={})
        turns = self._read(self._store.turns, default={})
        with self._lock:
            now = self._clock()
            self._paused_until = number(pause.get("until"), now + LONGEST_DELAY)
            self._pause = words_and_link(pause.get("reason") or "")
            self._turns.restore(turns, now)
            if self._challenges is not None:
                self._proofs.restore(turns.get("proofs"), self._challenges.types)

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
            host = Wanted(hostname, agent, limits)
            # What cannot be read now is ordered, and read again just before.
            host.stored = self._read(self._store.certificate, hostname, default=None)
            now = self._clock()
            host.restore(self._read(self._store.state, hostname, default={}), now + LONGEST_DELAY)
            host.judge_loss(now)
            with self._lock:
                host.told = self._to_tell(host)
                host = self._hosts.setdefault(hostname, host)  # another thread may be quicker
                self._lock.notify_all()
            self._forget_longest_waiting(host)
        with self._lock:
            if agent is not None:  # it may have been another's
                host.agent, host.limits = agent, limits
            known = self._to_tell(host)
            if known[0] == WAITING:  # the caller knows it now, and it would be no news
                host.told = known
            return self._state(host)

    def _forget_longest_waiting(self, host):
        """Make room for one more hostname of its agent's."""
        with self._lock:
            waiting = [
                other for other in self._hosts.values()
                if other.agent == host.agent and other.has_only_waited and not other.busy
            ] if host.agent is not None else []  # fmt: skip
        for other in waiting[:-MOST_WAITING]:
            log.debug("%s: forgotten while it waits for its turn: its agent has more than %d",
                      other.name, MOST_WAITING)  # fmt: skip
            self.drop(other.name)

    def hostnames(self) -> set[str]:
        """Those that are wanted."""
        with self._lock:
            return set(self._hosts)

    def drop(self, hostname):
        """No longer wanted: it is not renewed, and an order for it ends. Its files stay, but for
        one that says only that it waits."""
        with self._lock:
            host = self._hosts.pop(hostname, None)
            if host is None:
                return
            host.stop.set()
            was_kept = host.turn_why and host.has_only_waited
        if was_kept:
            self._save(self._store.forget_state, hostname)

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
            self._turns.release(hostname)
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

    def waits(self) -> list[tuple[str, float, str]]:
        """Domains ("" for all) for which the CA takes no orders: name, until when, and why."""
        with self._lock:
            now = self._clock()
            paused = [("", self._paused_until, self._pause)] if self._paused_until > now else []
            return paused + self._turns.all_held(now)

    def look(self):
        """See now who is due: the clock was set. What is due has been started on return."""
        with self._lock:
            self._look()
            self._lock.notify_all()

    def _state(self, host) -> State:
        now = self._clock()
        ends_at = host.stored and host.stored.ends_at
        next_at, reason = host.due_at(), host.error
        if host.turn_why:
            next_at = max(next_at, host.turn_at)
            reason = reason or WAITS + host.turn_why
        held_until, held = self._held(host, now)
        if max(next_at, now) < held_until:
            next_at, reason = held_until, reason or held
        if ends_at is not None and ends_at > now:
            return State(READY, reason, next_at, ends_at)
        return State(FAILED if reason else WAITING, reason, next_at, ends_at)

    def _held(self, host, now) -> tuple[float, str]:
        """Until when the CA wants to hear nothing of a hostname, and why; (0, "") for now. Caller
        holds the lock."""
        all_of_us = (self._paused_until, self._pause)
        if host.stored is not None or host.asked_for:  # a renewal is beyond a domain's limits
            return all_of_us
        return max(all_of_us, self._turns.held(host.name, now))

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
            states = [
                (host.name, host.as_dict()) for host in in_turn
                if self._hosts.get(host.name) is host
            ]  # fmt: skip
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
            self._turns.shift(-back)
            self._proofs.shift(-back)
        if back > CLOCK_OFF:
            self._paused_until -= back
            for host in self._hosts.values():
                host.not_before -= back
                host.ask_at -= back
                host.turn_at -= back

    def _start_jobs(self, now) -> float:
        wait, asking, ahead = LOOK_AGAIN, [], {}
        for _, due_at, host in sorted(
            ((not host.stored, host.due_at(), host)
             for host in self._hosts.values() if not host.busy),
            key=lambda triple: triple[:2],
        ):  # fmt: skip
            if len(self._jobs) >= JOBS + (host.stored is not None):
                return wait  # the end of a job is a reason to look
            due_at = max(due_at, self._held(host, now)[0])
            if due_at <= now:
                due_at = self._give_turn(host, now, ahead)
                if due_at is None:
                    if not self._start(host, "order", self._order):
                        return min(wait, AFTER_NO_THREAD)
                    continue
            wait = min(wait, due_at - now)
            if host.stored and host.stored.ends_at > now:  # an expired one has no window
                ask_at = max(host.ask_at, self._paused_until)
                if ask_at <= now:
                    asking.append(host)
                else:
                    wait = min(wait, ask_at - now)
        for host in asking:  # the end of a job is a reason to look; one place is for orders
            if len(self._jobs) < JOBS - 1 and not self._start(host, "window", self._ask):
                return min(wait, AFTER_NO_THREAD)
        return wait

    def _give_turn(self, host, now, ahead: dict[str, int]) -> float | None:
        """Take the tokens that an order needs; None if there are all, or when there will be.

        A renewal waits for none: an agent with many new names, or lifetimes so short that the
        hour's orders would not do, must not let a certificate run out. The CA takes it beyond its
        limits if it says what it replaces (RFC 9773 §5). Nor does an order that the operator asks
        for. ``ahead`` counts by bucket those that wait longer already."""
        if host.stored is not None or host.asked_for:
            tokens = self._turns.of_renewal()
        else:
            tokens = self._turns.needed(host.name, host.agent, host.limits or UNLIMITED)
            needed = [*tokens, self._turns.of_certificate(host.name)]
            longest = max(needed, key=lambda token: self._turns.wait(token, now))
            soonest = now + self._turns.wait(longest, now)
            if soonest > now:
                place = ahead.get(longest.bucket, 0)
                ahead[longest.bucket] = place + 1
                if host.wait_for_turn(now + self._turns.wait(longest, now, place), longest.why):
                    self._in_turn.append(host)
                    log.warning("%s: %s%s", host.name, WAITS, longest.why)
                return soonest
        host.begin_turn([token for token in tokens if self._turns.take(token, now)])
        return None

    def _give_back(self, host, *what):
        """What a hostname's order has taken, of these kinds, was not used after all: ATTEMPT,
        ORDER, CERTIFICATE. Caller holds the lock."""
        for token in host.tokens:
            if token.is_spent_by in what:
                self._turns.give_back(token)
        host.tokens = []

    def _start(self, host, what, job) -> bool:
        """Begin a job; False if the system has no thread for it."""
        try:
            # It cannot end before we let go of the lock.
            thread = spawn(f"{what} {host.name}", self._work, host, job)
        except NoThread as error:
            log.error("%s: %s; next try in %g s", host.name, error, AFTER_NO_THREAD)
            self._give_back(host, ATTEMPT, ORDER, CERTIFICATE)
            return False
        host.busy = True
        self._jobs.add(thread)
        return True

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
        except Abandoned:  # nobody wants to know
            with self._lock:
                self._give_back(host, CERTIFICATE)
        except Exception as error:
            log.exception("%s: failed (bug, traceback follows); that counts as the hostname's "
                          "failure", threading.current_thread().name)  # fmt: skip
            self._failed(host, CaError(HOST, "gotunnel", repr(error)))
        with self._lock:
            wanted = self._hosts.get(host.name) is host and not self._stopping
            state = host.as_dict()
        if wanted:
            self._save(self._store.save_state, host.name, state)
        if job == self._order:
            self._save_turns()

    def _save_turns(self):
        with self._saving:
            with self._lock:
                turns = {**self._turns.as_dict(self._clock()), "proofs": self._proofs.as_dict()}
            self._save(self._store.save_turns, turns)

    def _news(self) -> list[str]:
        """Hostnames whose state changed since it was last told; they count as told. FAILED to
        WAITING is not told. Caller holds the lock."""
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
                log.exception("%s: telling its new state failed (bug, traceback follows)", hostname)

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
                        self._give_back(host, ATTEMPT, ORDER, CERTIFICATE)
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
            self._give_back(host, ATTEMPT, ORDER, CERTIFICATE)
            host.not_before = 0.0  # nothing was ordered, and this one may have run out
        return True

    def _have_issued(self, host):
        challenge = host.trying = self._choose(host)
        if host.stored is None:
            self._find(host)
            self._save_turns()  # a gateway that is killed now has taken them all the same
        key_pem, chain_pem = self._ca.order(
            host.name, challenge, self._challenges, host.stop,
            replaces=host.stored and host.stored.leaf)  # fmt: skip
        with self._lock:
            self._turns.take(self._turns.of_certificate(host.name), self._clock())
            self._proofs.worked(challenge, self._clock())
            host.tokens = []  # used, whatever comes
        try:
            stored = self._store.save(host.name, key_pem, chain_pem)
        except StoreError as error:  # it has cost one of the few that the CA gives
            raise CaError(HOST, "ACME_CACHE", str(error)) from error
        self._succeeded(host, stored, challenge)
        log.info("%s: certificate until %s UTC, by %s", host.name,
                 stored.leaf.not_valid_after_utc.strftime("%Y-%m-%d %H:%M"), challenge)  # fmt: skip

    def _find(self, host):
        try:
            self._look_up(host.name)
        except CaError as error:
            if error.kind == HOST:
                with self._lock:
                    self._give_back(host, ORDER, CERTIFICATE)  # the CA has not heard of it
            raise

    def _choose(self, host) -> str:
        """After a failure the type that was not tried last; else the one that worked for the
        hostname, or for others."""
        types = list(self._challenges.types)
        if not types:
            raise CaError(
                CONFIG, "gotunnel", "no port for challenges is open, expected HTTP_PORT or "
                "GATEWAY_PORT to be reached from outside", account_wide=True)  # fmt: skip
        if host.failures and host.tried in types:
            return types[(types.index(host.tried) + 1) % len(types)]
        if host.challenge in types:
            return host.challenge
        with self._lock:
            return self._proofs.ranked(types, self._clock())[0]

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
            if error.challenge:
                self._proofs.failed(error.challenge, error.code, now)
            # The CA counts orders that it took, and certificates. An attempt that fails by the
            # hostname's fault is its agent's all the same.
            self._give_back(host, CERTIFICATE, *(
                () if error.kind in (HOST, CONFIG) else (ATTEMPT, ORDER)))  # fmt: skip
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
            if error.kind in (HOST, CONFIG):
                host.tried = host.trying
            if error.kind in (ACCOUNT, LIMITED):
                pause = pause or HOUR
            if error.domain:
                self._turns.hold(error.domain, now + pause, str(error))
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
        others = ", all wait" if error.account_wide else (
            f", new hostnames of {error.domain} wait" if error.domain else "")  # fmt: skip
        log.warning("%s: no certificate, next attempt in %.0f s%s: %s", host.name, pause, others,
                    error)  # fmt: skip

    def _ask(self, host):
        with self._lock:
            host.ask_at = self._clock() + ASK  # whatever comes of it
        leaf = host.stored.leaf
        window, again = self._ca.renewal_info(leaf, host.stop)
        with self._lock:
            host.ask_at = self._clock() + again
            if window is not None or host.window_of != leaf.serial_number:
                host.window, host.window_of = window, leaf.serial_number
