"""The queue of certificate orders: which hostnames need one, and which may be ordered next.

It remembers the results of earlier orders and decides what is next; it starts no thread and asks no
CA (issuer.py does). What a failure delays depends on its kind (acme_errors.py):

    HOST        this hostname: 1, 10, 100 minutes, then daily; the next attempt uses the other
                challenge type
    LATER       this hostname, for as long as the error says; not counted as a failure
    LIMITED     this hostname, or all beneath a domain that have no certificate yet, for as long as
                the CA says; not counted
    CONFIG      this hostname for a day; all hostnames if the error is account-wide
    ACCOUNT     all, for as long as the CA says
    TRANSPORT   all, for a short time that grows with each failure; not counted against a hostname.
                Also if no certificate could be written to the store

How agents share the CA's rate limits is decided in rate_limits.py; which challenge type comes
first, in proof_memory.py.

No failure touches a certificate that is there: it is served until there is a newer one. The store
keeps what was learned of a hostname, a pause that the CA asked for, and the tokens that were taken.
So a restart repeats no failed attempt early, and gives no agent a second share.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from cryptography import x509

from gotunnel_agent.common.hostnames import normal_hostname, valid_hostname
from gotunnel_agent.common.one_line import words_and_link

from .acme_errors import ACCOUNT, CONFIG, HOST, LIMITED, TRANSPORT, CaError
from .kept import Kept, number
from .proof_memory import ProofMemory
from .rate_limits import ATTEMPT, CERTIFICATE, ORDER, UNLIMITED, Bounds, Limits, RateLimits
from .schedule import ASK, CLOCK_OFF, DAY, HOUR, LEFT_AT_LATEST, Window, retry_delay
from .state import FAILED, READY, WAITING, NotRenewed, State
from .store import CertStore, StoreAway, Stored, StoreError
from .wanted import Wanted

log = logging.getLogger("gotunnel.order_queue")

# Hostnames without certificate that one agent may have in the queue. Above it, those that have
# waited longest are dropped; the hourly review takes up those that are still served. Without this
# bound, an agent could register ever new hostnames, and each costs a small file.
MOST_WAITING = 500
# Seconds of pause after the first failure to reach the CA, doubled with each up to the second.
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0
# In log and status; a Token's ``why`` follows: which rate limit the hostname waits for.
WAITS = "it waits for its turn: "
# Seconds until the next attempt if another process orders for the hostname. Orders take a few.
ELSEWHERE = 5.0
# No delay of ours is longer (a day and a tenth). A longer one was written with another clock.
LONGEST_DELAY = 1.1 * DAY

_Read = TypeVar("_Read")


class OrderQueue:
    """The hostnames that want certificates, and what is known of each. Any thread.

    ``clock`` gives seconds since 1970. ``types`` are the challenge types that can be used here.
    """

    def __init__(
        self,
        store: CertStore,
        types: Iterable[str] = (),
        *,
        clock: Callable[[], float] = time.time,
        bounds: Bounds = Bounds(),
    ) -> None:
        self.lock = threading.Condition()  # guards what follows; notified when an order may be due
        self._store = store
        self._types = tuple(types)
        self._clock = clock
        self._hosts: dict[str, Wanted] = {}
        self._limits = RateLimits(bounds)
        self._proofs = ProofMemory()
        self._paused_until = 0.0
        self._pause = ""  # why
        self._pause_kept: object = None  # until when, as the store has it
        self._outages = 0  # failures in a row to reach the CA, or the store
        self._outage_until = 0.0  # when the pause for the latest one ends
        self._looked_at = 0.0  # by our clock, which may be set
        self._to_keep: list[Wanted] = []  # they wait for tokens, and that is not saved yet
        self._saving = threading.Lock()  # held to write turns.json, so that the newest is last

    def restore(self) -> None:
        """Read the pause and the token buckets that the store has. If they cannot be read we start
        without: the CA will refuse what comes too early."""
        pause = read_or(_nothing, self._store.pause)
        turns = read_or(_nothing, self._store.turns)
        with self.lock:
            now = self._clock()
            self._paused_until = number(pause.get("until"), now + LONGEST_DELAY)
            self._pause = words_and_link(pause.get("reason") or "")
            self._pause_kept = pause.get("until")
            self._limits.restore(turns, now)
            self._proofs.restore(turns.get("proofs"), self._types)

    # Which hostnames

    def want(self, hostname: str, agent: object = None, limits: Limits = UNLIMITED) -> State:
        """Get a certificate for ``hostname``, and keep it new. A second call does no harm.

        ``agent`` has registered it (any hashable): a first order takes tokens of this agent, within
        its ``limits``. None is the gateway. Reads the store, so do not call it in a handshake.
        Raises ValueError for a name that cannot be ordered: an address, a wildcard.
        """
        if not valid_hostname(hostname) or hostname != normal_hostname(hostname):
            raise ValueError(f"{hostname!r}: expected a hostname, in lower case, without wildcard")
        with self.lock:
            host = self._hosts.get(hostname)
        if host is None:
            host = self._read(hostname, agent, limits)
            with self.lock:
                host.told = self._to_tell(host)
                host = self._hosts.setdefault(hostname, host)  # another thread may be quicker
                self.lock.notify_all()
            self._forget_longest_waiting(host)
        with self.lock:
            if agent is not None:  # another agent may have registered it before
                host.agent, host.limits = agent, limits
            known = self._to_tell(host)
            if known[0] == WAITING:  # the caller gets it as result: news() need not report it
                host.told = known
            return self._state(host)

    def _read(self, hostname: str, agent: object, limits: Limits) -> Wanted:
        """A hostname as the store has it. What cannot be read now is read again before an order."""
        host = Wanted(hostname, agent, limits)
        host.stored = read_or(lambda: None, lambda: self._store.certificate(hostname))
        now, state = self._clock(), read_or(_nothing, lambda: self._store.state(hostname))
        host.restore(state, now + LONGEST_DELAY)
        host.kept = _attempt_in(state)
        host.judge_loss(now)
        return host

    def _forget_longest_waiting(self, host: Wanted) -> None:
        """Make room for one more hostname of its agent."""
        if host.agent is None:
            return
        with self.lock:
            waiting = [
                other for other in self._hosts.values()
                if other.agent == host.agent and other.has_only_waited and not other.busy
            ]  # fmt: skip
        for other in waiting[:-MOST_WAITING]:
            log.debug("%s: forgotten while it waits for its turn: its agent has more than %d",
                      other.name, MOST_WAITING)  # fmt: skip
            self.drop(other.name)

    def hostnames(self) -> set[str]:
        """Those that are wanted."""
        with self.lock:
            return set(self._hosts)

    def drop(self, hostname: str) -> None:
        """No longer wanted: it is not renewed, and an order for it ends. Its files stay, except
        one that says only that it waits."""
        with self.lock:
            host = self._hosts.pop(hostname, None)
            if host is None:
                return
            host.stop.set()
            was_kept = host.turn_why and host.has_only_waited
        if was_kept:
            save(lambda: self._forget_turn(hostname))

    def _forget_turn(self, hostname: str) -> None:
        """Remove a state that says only that the hostname waits: another process may know more."""
        if not any(_attempt_in(self._store.state(hostname))):
            self._store.forget_state(hostname)

    def cancel(self) -> None:
        """End all orders that run. Caller holds the lock."""
        for host in self._hosts.values():
            host.stop.set()

    def retry_now(self, hostname: str) -> bool:
        """One attempt at once, whatever failed before, and also if the certificate is a new one.

        If an order runs, and fails by the hostname's fault, another one follows. False if the
        hostname is not wanted.
        """
        with self.lock:
            host = self._hosts.get(hostname)
            if host is None:
                return False
            paused = self._paused_until > 0
            host.asked_for = True
            host.not_before = self._paused_until = 0.0
            self._pause_kept = None if paused else self._pause_kept
            self._limits.release(hostname)
            self.lock.notify_all()
        if paused:
            save(lambda: self._store.save_pause({}))
        return True

    def renew(self, hostname: str) -> None:
        """As retry_now(), but within the limits of the CA, and those of the hostname's agent. It
        counts against these, so that a button can be pressed as often as one likes. Raises
        NotRenewed."""
        with self.lock:
            host = self._hosts.get(hostname)
            if host is None:
                raise NotRenewed(
                    f"{hostname} has no agent now, and only hostnames with one are ordered"
                )
            if host.ordering or host.asked_for:
                raise NotRenewed(f"an order for {hostname} is under way; its result comes soon")
            now = self._clock()
            until, why = self._held(host, now)
            if until > now:
                raise NotRenewed(f"the CA takes no orders for {hostname} now: {why}", until)
            taken, others = self._limits.of_request(
                hostname, host.agent, host.limits, host.stored is not None
            )
            longest = max([*taken, *others], key=lambda token: self._limits.wait(token, now))
            wait = self._limits.wait(longest, now)
            if wait > 0:
                why = longest.why or "more orders than the CA takes at once"
                raise NotRenewed(f"{hostname} is not ordered now: {why}", now + wait)
            for token in taken:
                self._limits.take(token, now)
            host.asked_for, host.not_before = True, 0.0
            self.lock.notify_all()

    # Their state

    def state(self, hostname: str) -> State | None:
        """None if the hostname is not wanted."""
        with self.lock:
            host = self._hosts.get(hostname)
            return None if host is None else self._state(host)

    def certificate(self, hostname: str) -> Stored | None:
        """The certificate to serve; None if there is none, or the hostname is not wanted."""
        with self.lock:
            host = self._hosts.get(hostname)
            return None if host is None else host.stored

    def waits(self) -> list[tuple[str, float, str]]:
        """Domains ("" for all) for which the CA takes no orders: name, until when, and why."""
        with self.lock:
            now = self._clock()
            paused = [("", self._paused_until, self._pause)] if self._paused_until > now else []
            return paused + self._limits.all_held(now)

    def _state(self, host: Wanted) -> State:
        now = self._clock()
        ends_at = None if host.stored is None else host.stored.ends_at
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

    def _held(self, host: Wanted, now: float) -> tuple[float, str]:
        """Until when the CA takes no order for a hostname, and why; (0, "") if it does. Caller
        holds the lock."""
        all_of_us = (self._paused_until, self._pause)
        if host.stored is not None or host.asked_for:  # a renewal is beyond a domain's limits
            return all_of_us
        return max(all_of_us, self._limits.held(host.name, now))

    def news(self) -> list[str]:
        """Hostnames whose state changed since it was last reported; they count as reported. FAILED
        to WAITING is not reported. Caller holds the lock."""
        changed = []
        for host in self._hosts.values():
            now = self._to_tell(host)
            if host.busy or now == host.told or (now[0], host.told[0]) == (WAITING, FAILED):
                continue
            host.told = now
            changed.append(host.name)
        return changed

    def _to_tell(self, host: Wanted) -> tuple[object, ...]:
        state = self._state(host)
        return state.name, state.reason, host.stored

    # Which order is next. Caller holds the lock.

    def idle(self, now: float) -> Iterator[tuple[float, Wanted]]:
        """The hostnames without a running job, and when each is due: first those that have a
        certificate, then by that instant."""
        due = [(host.due_at(), host) for host in self._hosts.values() if not host.busy]
        due.sort(key=lambda pair: (pair[1].stored is None, pair[0]))
        for at, host in due:
            yield max(at, self._held(host, now)[0]), host

    def ask_at(self, host: Wanted) -> float:
        """When to ask the CA for a hostname's renewal window (ARI)."""
        return max(host.ask_at, self._paused_until)

    def give_turn(self, host: Wanted, now: float, ahead: dict[str, int]) -> float | None:
        """Take the tokens that an order needs. None if all are there, else when they will be.

        A renewal does not wait for tokens: an agent with many new names, or lifetimes too short for
        the hour's orders, must not let a certificate expire. The CA takes it beyond its limits if
        it says what it replaces (RFC 9773 §5). An order that the operator asks for does not wait
        either. ``ahead`` counts, for each bucket, the hostnames that are before this one."""
        if host.stored is not None or host.asked_for:
            tokens = self._limits.of_renewal()
        else:
            tokens = self._limits.needed(host.name, host.agent, host.limits)
            needed = [*tokens, self._limits.of_certificate(host.name)]
            longest = max(needed, key=lambda token: self._limits.wait(token, now))
            soonest = now + self._limits.wait(longest, now)
            if soonest > now:
                place = ahead.get(longest.bucket, 0)
                ahead[longest.bucket] = place + 1
                if host.wait_for_turn(now + self._limits.wait(longest, now, place), longest.why):
                    self._to_keep.append(host)
                    log.warning("%s: %s%s", host.name, WAITS, longest.why)
                return soonest
        host.begin_turn([token for token in tokens if self._limits.take(token, now)])
        return None

    def take_to_keep(self) -> list[Wanted]:
        """The hostnames that have begun to wait since the last call: keep() is due for them."""
        hosts, self._to_keep = self._to_keep, []
        return hosts

    def forgive_a_step_back(self, now: float) -> None:
        """If the clock was set back, move all instants with it: a delay keeps its length."""
        back, self._looked_at = self._looked_at - now, now
        if back > 0:
            self._limits.shift(-back)
            self._proofs.shift(-back)
        if back > CLOCK_OFF:
            self._paused_until -= back
            for host in self._hosts.values():
                host.not_before -= back
                host.ask_at -= back
                host.turn_at -= back

    def not_begun(self, host: Wanted) -> None:
        """An order took its tokens, and then could not begin."""
        self._give_back(host, ATTEMPT, ORDER, CERTIFICATE)

    def _give_back(self, host: Wanted, *spent_by: str) -> None:
        """Give back the tokens of a hostname's order whose ``is_spent_by`` is in ``spent_by``; the
        others are used up."""
        for token in host.tokens:
            if token.is_spent_by in spent_by:
                self._limits.give_back(token)
        host.tokens = []

    # How an order goes

    def begin(self, host: Wanted) -> bool:
        """An order begins. Returns whether the operator has asked for it."""
        with self.lock:
            asked_for, host.asked_for = host.asked_for, False
            return asked_for

    def choose(self, host: Wanted) -> str:
        """The challenge type to use. After a failure the one that was not tried last; else the one
        that worked for the hostname, or for others. Raises CaError if there is none."""
        types = self._types
        if not types:
            raise CaError(
                CONFIG, "gotunnel", "no port for challenges is open, expected HTTP_PORT or "
                "GATEWAY_PORT to be reached from outside", account_wide=True)  # fmt: skip
        with self.lock:
            if host.failures and host.tried in types:
                host.trying = types[(types.index(host.tried) + 1) % len(types)]
            elif host.challenge in types:
                host.trying = host.challenge
            else:
                host.trying = self._proofs.ranked(types, self._clock())[0]
            return host.trying

    def abandoned(self, host: Wanted) -> None:
        """The order was given up; the CA may have counted it, but issued nothing."""
        with self.lock:
            self._give_back(host, CERTIFICATE)

    def not_found(self, host: Wanted) -> None:
        """The hostname does not lead here: the CA was not asked, but it counts as an attempt."""
        with self.lock:
            self._give_back(host, ORDER, CERTIFICATE)

    def heed(self, host: Wanted, state: Kept, pause: Kept) -> bool:
        """Take over what another process has kept of the hostname since we last did: a failed
        attempt, and a pause. True if no order is due any more."""
        with self.lock:
            now = self._clock()
            latest = now + LONGEST_DELAY
            if pause.get("until") != self._pause_kept:
                self._pause_kept = pause.get("until")
                self._paused_until = max(self._paused_until, number(self._pause_kept, latest))
                self._pause = words_and_link(pause.get("reason") or "") or self._pause
            if _attempt_in(state) != host.kept:
                host.heed(state, latest)
                host.kept = _attempt_in(state)
            waits = max(host.not_before, self._paused_until) > now
            if waits:
                self.not_begun(host)
            return waits

    def has_turn(self, host: Wanted) -> bool:
        """Whether the tokens of an order were still there when keep_turns() has joined those of all
        processes, and the CA still takes the order. If not, they are given back."""
        with self.lock:
            now = self._clock()
            over = any(self._limits.is_overdrawn(token, now) for token in host.tokens)
            if over or self._held(host, now)[0] > now:
                self.not_begun(host)
                return False
            return True

    def ordered_elsewhere(self, host: Wanted, asked_for: bool) -> None:
        """Another process orders for the hostname: look again soon."""
        with self.lock:
            host.not_before = self._clock() + ELSEWHERE
            self.not_begun(host)
            host.asked_for |= asked_for

    def adopted(self, host: Wanted, stored: Stored) -> None:
        """Another process has ordered ``stored``."""
        self.succeeded(host, stored, host.challenge)
        with self.lock:
            self.not_begun(host)
            host.not_before = 0.0  # nothing was ordered, and this one may have expired

    def found(self, hostname: str, stored: Stored) -> None:
        """The store has ``stored``, which another process may have ordered."""
        with self.lock:
            host = self._hosts.get(hostname)
            if host is None or host.ordering:  # not wanted here; or the order finds it
                return
            if host.stored is None or host.stored.ends_at < stored.ends_at:
                self.adopted(host, stored)
                self.lock.notify_all()

    def issued(self, host: Wanted, challenge: str) -> None:
        """The CA has issued a certificate; it is not stored yet."""
        with self.lock:
            self._limits.take(self._limits.of_certificate(host.name), self._clock())
            self._proofs.worked(challenge, self._clock())
            host.tokens = []  # used up, whatever follows

    def succeeded(self, host: Wanted, stored: Stored, challenge: str | None) -> None:
        """A new certificate is in the store."""
        with self.lock:
            self.forgive_a_step_back(self._clock())
            before = host.stored
            host.stored, host.challenge = stored, challenge
            host.failures, host.error, host.ask_at = 0, "", 0.0
            host.asked_for = False  # the operator has got a new certificate
            host.lost = host.lost and before is None
            # Without this delay we would order in a loop from a CA whose windows have all passed,
            # or whose clock is wrong.
            life = max(stored.ends_at - stored.begins_at, 0.0)
            host.not_before = self._clock() + min(DAY, life * LEFT_AT_LATEST)
            host.window = host.window_of = None
            self._outages = 0

    def failed(self, host: Wanted, error: CaError) -> None:
        """An attempt failed: when is the next one, and which hostnames wait?"""
        with self.lock:
            now = self._clock()
            self.forgive_a_step_back(now)  # before the instants below, which are by the new clock
            pause = error.retry_after or 0.0
            host.error = str(error)
            if error.challenge:
                self._proofs.failed(error.challenge, error.code, now)
            # The CA counts orders that it took, and certificates. An attempt that fails by the
            # hostname's fault still counts for its agent.
            spent = error.kind in (HOST, CONFIG)
            self._give_back(host, CERTIFICATE, *(() if spent else (ATTEMPT, ORDER)))
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
                self._limits.hold(error.domain, now + pause, str(error))
            blamed = error.kind in (HOST, CONFIG) and not error.account_wide
            host.not_before = now if host.asked_for and blamed else now + pause
            if error.account_wide or error.kind == TRANSPORT:
                self._paused_until = max(self._paused_until, now + pause)
                self._pause = str(error)
                self._outage_until = now + pause if error.kind == TRANSPORT else 0.0
            # Not a CONFIG error: the operator may have mended it, and restarted for that.
            is_kept = error.kind == ACCOUNT and error.status
            paused = {"until": self._paused_until, "reason": self._pause}
            if is_kept:
                self._pause_kept = self._paused_until
        if is_kept:
            save(lambda: self._store.save_pause(paused))
        others = ", all other hostnames wait, too" if error.account_wide else (
            f", new hostnames of {error.domain} wait" if error.domain else "")  # fmt: skip
        log.warning("%s: no certificate, next attempt in %.0f s%s: %s", host.name, pause, others,
                    error)  # fmt: skip

    def end_outage(self) -> None:
        """What could not be reached is back: what waits for that is due now."""
        with self.lock:
            until, self._outage_until, self._outages = self._outage_until, 0.0, 0
            if not until:
                return
            if self._paused_until == until:
                self._paused_until = 0.0
            for host in self._hosts.values():
                if host.not_before == until:
                    host.not_before = 0.0
            self.lock.notify_all()

    def delay(self, host: Wanted, seconds: float) -> None:
        """No attempt for a hostname in so many seconds."""
        with self.lock:
            host.not_before = max(host.not_before, self._clock() + seconds)

    def asking(self, host: Wanted) -> None:
        """The CA is being asked for a renewal window."""
        with self.lock:
            host.ask_at = self._clock() + ASK  # whatever the result

    def told_window(
        self, host: Wanted, leaf: x509.Certificate, window: Window | None, again: float
    ) -> None:
        """The CA's renewal window for ``leaf``, and in how many seconds to ask again."""
        with self.lock:
            host.ask_at = self._clock() + again
            if window is not None or host.window_of != leaf.serial_number:
                host.window, host.window_of = window, leaf.serial_number

    # What is kept

    def keep(self, host: Wanted) -> None:
        """Save what is known of a hostname, if it is still wanted."""
        with self.lock:
            if self._hosts.get(host.name) is not host:
                return
            state = host.as_dict()
        save(lambda: self._save_state(host, state))

    def _save_state(self, host: Wanted, state: dict[str, Any]) -> None:
        self._store.save_state(host.name, state)
        with self.lock:  # not if it failed: the store would seem to know less than we do
            host.kept = _attempt_in(state)

    def keep_part(self, host: Wanted, *fields: str) -> None:
        """As keep(), but only these fields of its state; the others stay as the store has them."""
        with self.lock:
            if self._hosts.get(host.name) is not host:
                return
            state = host.as_dict()
        save(lambda: self._save_part(host.name, {key: state[key] for key in fields}))

    def _save_part(self, hostname: str, part: dict[str, Any]) -> None:
        self._store.save_state(hostname, {**self._store.state(hostname), **part})

    def keep_turns(self) -> None:
        """Save the token buckets, and which challenge types work. Another gateway may share the
        folder, and have taken tokens: those count, too."""
        with self._saving:
            save(self._save_turns)

    def _save_turns(self) -> None:
        with self._store.turns_lock():
            found = read_or(_nothing, self._store.turns)
            with self.lock:
                now = self._clock()
                self._limits.join(found, now)
                turns = {**self._limits.as_dict(now), "proofs": self._proofs.as_dict()}
            self._store.save_turns(turns)
        with self.lock:
            self._limits.note_kept(turns)


def _attempt_in(state: Kept) -> tuple[object, ...]:
    """What a kept state says of the attempts so far; it differs after each one."""
    return tuple(state.get(key) or None for key in ("failures", "next_attempt_at", "error"))


def _nothing() -> dict[str, Any]:
    return {}


def read_or(default: Callable[[], _Read], read: Callable[[], _Read]) -> _Read:
    """What ``read()`` gives; if the store cannot be read, that is logged, and it is the default."""
    try:
        return read()
    except StoreError as error:
        _log(error)
        return default()


def save(write: Callable[[], Any]) -> None:
    """Call ``write()``. If the store cannot be written, that is logged, and we go on without."""
    try:
        write()
    except StoreError as error:
        _log(error)


def _log(error: StoreError) -> None:
    log.log(logging.DEBUG if isinstance(error, StoreAway) else logging.ERROR, "%s", error)
