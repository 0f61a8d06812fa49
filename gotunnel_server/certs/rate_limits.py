"""Which hostname may be ordered for now: rate limits that stay below the CA's, shared fairly.

No agent may use up what the CA gives to all. A first order, one for a hostname without certificate,
takes a token from each of these token buckets (GCRA, as in common/token_bucket.py: the full bucket
at once, then one token at even intervals):

    bucket                        tokens, by default              refilled in
    all                           300 less a reserve for          3 hours
                                  renewals
    a credential, in all          2/3 of these: others get        3 hours
                                  the rest
    a registered domain           ACME_ORDERS_PER_DOMAIN (45)     a week
    a credential, in that domain  8/9 of these: others get        a week
                                  the rest
    a credential                  orders_per_hour, _week of its   an hour, a week
                                  limits
    a hostname                    4, taken by certificates        a week
                                  that were issued

The numbers are Let's Encrypt's (https://letsencrypt.org/docs/rate-limits/: 300 new orders of an
account in 3 hours, 50 certificates of a registered domain and 5 of one set of names in a week) less
a reserve. A renewal, and an order that the operator asks for, never wait: they take a token of
"all" if there is one.

Tokens of an order that failed are given back if the CA did not count it: see OrderQueue.failed().

The CA may also have refused all orders beneath a domain for a while: see hold().

Invariant: a token that was taken is given back at most once, and only by the order that took it.
The order queue's lock guards all of this. as_dict() outlives a restart, in turns.json.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

from gotunnel_agent.common.one_line import words_and_link

from .kept import Kept, number
from .registered_domain import registered_domain
from .schedule import DAY, HOUR

WEEK = 7 * DAY
# Bound of the buckets that are not full, some 100 bytes each in memory and on disk. Beyond it the
# fullest are forgotten. Most are those of hostnames, one for each certificate of the last days.
MOST_BUCKETS = 4000
# Bound of the domains for which the CA refuses orders; it has named each in a refusal.
MOST_HELD = 1000


class Limits(Protocol):
    """What bounds a credential's orders; None: the default. agents_file.Limits is one."""

    @property
    def hostnames(self) -> int | None: ...  # that it may have at once

    @property
    def orders_per_hour(self) -> int | None: ...

    @property
    def orders_per_week(self) -> int | None: ...


class _Unlimited(NamedTuple):
    hostnames: int | None = None
    orders_per_hour: int | None = None
    orders_per_week: int | None = None


UNLIMITED: Limits = _Unlimited()


class Quota(NamedTuple):
    """Size of a bucket: ``most`` tokens at once, and as many again in ``seconds``."""

    most: int
    seconds: float

    @property
    def interval(self) -> float:
        """Seconds until one more token is there."""
        return self.seconds / self.most


class Bounds(NamedTuple):
    """The sizes of all buckets."""

    all: Quota = Quota(270, 3 * HOUR)
    domain: Quota = Quota(45, WEEK)
    # Of a credential whose limits say nothing else. If its hostnames are bounded, of_credential()
    # makes these smaller: one certificate for each of them in an hour, three in a week, and a few.
    hour: Quota = Quota(150, HOUR)
    week: Quota = Quota(500, WEEK)
    hostname: Quota = Quota(4, WEEK)
    # What the operator asks for on the dashboard: of one hostname, and of all. A CA bears few
    # failed validations of a hostname in an hour (Let's Encrypt 5), and those of our own attempts
    # are among them.
    asked: Quota = Quota(2, HOUR)
    all_asked: Quota = Quota(30, HOUR)

    @classmethod
    def with_domain(cls, certificates: int) -> Bounds:
        """The defaults, but ``certificates`` of a registered domain in a week."""
        return cls(domain=Quota(certificates, WEEK))

    @property
    def all_per_credential(self) -> Quota:
        """One credential's part of ``all``."""
        return self.all._replace(most=max(1, self.all.most * 2 // 3))

    @property
    def domain_per_credential(self) -> Quota:
        """One credential's part of ``domain``."""
        return self.domain._replace(most=max(1, self.domain.most * 8 // 9))

    def of_credential(self, limits: Limits) -> tuple[Quota, Quota]:
        """What a credential may order in an hour, and in a week."""
        hour, week, hostnames = self.hour.most, self.week.most, limits.hostnames
        if hostnames is not None:
            hour, week = min(hour, hostnames + 5), min(week, 3 * hostnames + 10)
        return (
            Quota(limits.orders_per_hour or hour, self.hour.seconds),
            Quota(limits.orders_per_week or week, self.week.seconds),
        )


class Token(NamedTuple):
    """A token of one bucket. ``why`` tells the operator that the bucket is empty. ``is_spent_by``
    says what uses the token up: an ATTEMPT, whatever its result; an ORDER that the CA accepts; or a
    CERTIFICATE that is issued."""

    bucket: str
    quota: Quota
    why: str
    is_spent_by: str


ATTEMPT, ORDER, CERTIFICATE = "attempt", "order", "certificate"
ALL = "all"


class RateLimits:
    """The buckets. Not thread-safe: the caller holds a lock. Instants are seconds since 1970."""

    def __init__(self, bounds: Bounds = Bounds()) -> None:
        self._bounds = bounds
        self._full_at: dict[str, float] = {}  # when a bucket is full again; full ones are missing
        self._held: dict[str, tuple[float, str]] = {}  # domain: until when, and why
        # What the file had when it was last read or written, and _full_at at that time.
        self._in_file: Kept = {}
        self._counted: dict[str, float] = {}

    def needed(self, hostname: str, agent: object, limits: Limits) -> list[Token]:
        """The tokens that a first order takes. ``agent`` None is the gateway, whose own names take
        no credential's tokens."""
        bounds, domain = self._bounds, registered_domain(hostname)
        tokens = [
            Token(ALL, bounds.all, "more new hostnames than the CA takes orders for at once",
                  ORDER),
            Token(f"domain {domain}", bounds.domain,
                  f"more new hostnames of {domain} than ACME_ORDERS_PER_DOMAIN allows "
                  f"certificates for in a week ({bounds.domain.most})", CERTIFICATE),
        ]  # fmt: skip
        if agent is None:
            return tokens
        key = hashlib.sha256(repr(agent).encode()).hexdigest()[:32]
        hour, week = bounds.of_credential(limits)
        more = "more new hostnames than this credential gets certificates for in"
        return tokens + [
            Token(f"part {key}", bounds.all_per_credential,
                  "more new hostnames than one credential gets of the CA's orders", ORDER),
            Token(f"share {key} {domain}", bounds.domain_per_credential,
                  f"more new hostnames of {domain} than one credential gets certificates for in a "
                  f"week ({bounds.domain_per_credential.most})", CERTIFICATE),
            Token(f"hour {key}", hour, f"{more} an hour ({hour.most})", ATTEMPT),
            Token(f"week {key}", week, f"{more} a week ({week.most})", ATTEMPT),
        ]  # fmt: skip

    def of_renewal(self) -> list[Token]:
        """The tokens that a renewal takes if they are there."""
        return [Token(ALL, self._bounds.all, "", ORDER)]

    def of_certificate(self, hostname: str) -> Token:
        """The token that an issued certificate takes: the CA issues few for one set of names."""
        quota = self._bounds.hostname
        why = (
            f"{quota.most} certificates in a week were ordered for it, and none is left in "
            "ACME_CACHE: find out what removes them"
        )
        return Token(f"name {hostname}", quota, why, CERTIFICATE)

    def of_request(
        self, hostname: str, agent: object, limits: Limits, is_renewal: bool
    ) -> tuple[list[Token], list[Token]]:
        """The tokens of an order that the operator asks for on the dashboard: those that the
        request takes, and those that must be there as well, since the order takes them later."""
        bounds = self._bounds
        asked = [
            Token(f"asked {hostname}", bounds.asked,
                  f"its certificate was asked for {bounds.asked.most} times in an hour", ATTEMPT),
            Token("asked", bounds.all_asked, "more certificates were asked for in an hour than "
                  f"{bounds.all_asked.most}", ATTEMPT),
        ]  # fmt: skip
        needed = self.needed(hostname, agent, limits)
        asked += [token for token in needed if token.is_spent_by == ATTEMPT]
        others = [token for token in needed if token.is_spent_by != ATTEMPT]
        if is_renewal:  # which is beyond a domain's limits
            others = [token for token in others if token.bucket == ALL]
        return asked, [*others, self.of_certificate(hostname)]

    def wait(self, token: Token, now: float, ahead: int = 0) -> float:
        """Seconds until the bucket has a token; 0 if it has one. ``ahead`` tokens are taken by
        others first."""
        most, interval = token.quota.most, token.quota.interval
        full_at = max(self._full_at.get(token.bucket, now), now) + ahead * interval
        # Times are rounded, so a thousandth of a token may be missing.
        return max(0.0, full_at - now - (most - 0.999) * interval)

    def take(self, token: Token, now: float) -> bool:
        """Whether there was one to take. An empty bucket does not go into debt: hundreds of
        renewals at once delay first orders by one refill at most."""
        if self.wait(token, now) > 0:
            return False
        full_at = max(self._full_at.get(token.bucket, now), now)
        self._full_at[token.bucket] = full_at + token.quota.interval
        if len(self._full_at) > MOST_BUCKETS:
            self._forget(now)
        return True

    def is_overdrawn(self, token: Token, now: float) -> bool:
        """Whether more tokens were taken than the bucket had: by several processes, see join()."""
        debt = self._full_at.get(token.bucket, now) - now
        return debt > (token.quota.most + 0.5) * token.quota.interval

    def give_back(self, token: Token) -> None:
        if token.bucket in self._full_at:
            self._full_at[token.bucket] -= token.quota.interval

    def _forget(self, now: float) -> None:
        """Forget full buckets; if too many are left, also the fullest of them."""
        left = sorted((at, bucket) for bucket, at in self._full_at.items() if at > now)
        self._full_at = {bucket: at for at, bucket in left[-(MOST_BUCKETS * 9 // 10) :]}

    # What the CA has said of a domain

    def hold(self, domain: str, until: float, why: str) -> None:
        """Order nothing for hostnames beneath ``domain``."""
        self._held[domain] = (until, why)
        if len(self._held) > MOST_HELD:
            del self._held[min(self._held, key=lambda name: self._held[name][0])]

    def held(self, hostname: str, now: float) -> tuple[float, str]:
        """Until when nothing may be ordered for a hostname, and why; (0, "") if it may."""
        labels = hostname.split(".") if self._held else []
        above = (".".join(labels[first:]) for first in range(1, len(labels)))
        held = (self._held[name] for name in above if name in self._held)
        return max((entry for entry in held if entry[0] > now), default=(0.0, ""))

    def all_held(self, now: float) -> list[tuple[str, float, str]]:
        """The domains of hold(): name, until when, and why."""
        return sorted((name, *entry) for name, entry in self._held.items() if entry[0] > now)

    def release(self, hostname: str) -> None:
        """Undo hold() for the domains above ``hostname``: the operator wants an order now."""
        self._held = {d: held for d, held in self._held.items() if not hostname.endswith(f".{d}")}

    # Clocks, and restarts

    def shift(self, seconds: float) -> None:
        """The clock was set forward by so many seconds, back if they are negative. Each bucket
        keeps its tokens."""
        self._full_at = {bucket: at + seconds for bucket, at in self._full_at.items()}
        self._counted = {bucket: at + seconds for bucket, at in self._counted.items()}
        self._held = {name: (at + seconds, why) for name, (at, why) in self._held.items()}

    def as_dict(self, now: float) -> dict[str, object]:
        """What has to outlive a restart, for JSON."""
        self._forget(now)
        self._held = {name: held for name, held in self._held.items() if held[0] > now}
        held = {domain: list(entry) for domain, entry in self._held.items()}
        return {"full_at": dict(self._full_at), "held": held, "at": now}

    def restore(self, kept: Kept, now: float) -> None:
        """Take what as_dict() made. Invalid values count as missing. Instants that are too far
        ahead (a bucket that needs more than its period to be full, a domain held longer than a CA
        asks for) were written with another clock, and are cut."""
        full_at, held = kept.get("full_at"), kept.get("held")
        back = max(0.0, number(kept.get("at")) - now)  # the clock was set back meanwhile
        for bucket, at in full_at.items() if isinstance(full_at, dict) else ():
            at = min(number(at) - back, now + WEEK)
            if at > now:
                self._full_at[bucket] = at
        for domain, entry in held.items() if isinstance(held, dict) else ():
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
                until = min(number(entry[0]) - back, now + DAY)
                if until > now:
                    self.hold(domain, until, words_and_link(entry[1]))
        self._forget(now)
        self.note_kept(kept)

    def note_kept(self, kept: Kept) -> None:
        """The file has this now."""
        full_at = kept.get("full_at")
        self._in_file = kept
        self._counted = dict(full_at) if isinstance(full_at, dict) else {}

    def join(self, kept: Kept, now: float) -> None:
        """Take in what another process has written into the file: the tokens that either of the two
        has taken since are taken from the same bucket."""
        if not kept or all(kept.get(key) == self._in_file.get(key) for key in ("full_at", "held")):
            return
        other = RateLimits(self._bounds)
        other.restore(kept, now)
        for bucket in {*other._full_at, *self._full_at}:
            ours, theirs = self._full_at.get(bucket, now), other._full_at.get(bucket, now)
            taken = max(ours, now) - max(number(self._counted.get(bucket)), now)
            self._full_at[bucket] = max(theirs, now) + taken
        known = self._in_file.get("held")
        for domain, (until, why) in other._held.items():
            if not isinstance(known, dict) or domain not in known:  # else we know more of it
                self.hold(domain, until, why)
        self._forget(now)
