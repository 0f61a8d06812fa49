"""Whose turn it is to have a certificate ordered, so that nobody uses up what the CA gives to all.

An order for a hostname without certificate, a first order, takes a token of each of these buckets
(GCRA, as in common/token_bucket.py: so many at once, then one whenever its share of the time is
over):

    bucket                        holds, by default               in
    all                           300 less a reserve for          3 hours
                                  renewals
    a credential, in all          2 of 3 of these: others get     3 hours
                                  the rest
    a registered domain           ACME_ORDERS_PER_DOMAIN (45)          a week
    a credential, in that domain  8 of 9 of these: others get     a week
                                  the rest
    a credential                  orders_per_hour, _week of its   an hour, a week
                                  limits
    a hostname                    4, of certificates that came    a week

The numbers are Let's Encrypt's (https://letsencrypt.org/docs/rate-limits/: 300 new orders of an
account in 3 hours, 50 certificates of a registered domain and 5 of one set of names in a week) less
a reserve. An order that the operator asks for, and a renewal, wait for none: they only take of
"all", and leave it the emptier for others.

Tokens of an order that failed are given back, as far as the CA did not count it: see
Issuer._failed().

Besides, the CA may have said of a domain that nothing is to be ordered beneath it for a while.

Invariant: a bucket's token that was taken is given back at most once, and only by the order that
took it; the issuer's lock guards all of it. as_dict() outlives a restart.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

from gotunnel_agent.common.one_line import words_and_link

from .kept import number
from .registered_domain import registered_domain
from .schedule import DAY, HOUR

WEEK = 7 * DAY
# Buckets that are not full, some 100 bytes each in memory and on disk. If there are more, the
# fullest are forgotten. Most are those of hostnames, one for each certificate of the last days.
MOST_BUCKETS = 4000
# Domains that the CA wants to hear nothing of; it has named each in a refusal.
MOST_HELD = 1000


class Limits(Protocol):
    """What bounds a credential's orders; None: as any. agents_file.Limits is one."""

    hostnames: int | None  # that it may have at once
    orders_per_hour: int | None
    orders_per_week: int | None


class _Unlimited(NamedTuple):
    hostnames: int | None = None
    orders_per_hour: int | None = None
    orders_per_week: int | None = None


UNLIMITED: Limits = _Unlimited()


class Quota(NamedTuple):
    """So many at once, and as many again in so many seconds."""

    most: int
    seconds: float

    @property
    def interval(self) -> float:
        return self.seconds / self.most


class Bounds(NamedTuple):
    """What is allowed."""

    all: Quota = Quota(270, 3 * HOUR)
    domain: Quota = Quota(45, WEEK)
    # Of a credential whose limits say nothing else. One that may have few hostnames at once needs
    # few certificates: for each in an hour, and for three generations of them in a week, and some.
    hour: Quota = Quota(150, HOUR)
    week: Quota = Quota(500, WEEK)
    hostname: Quota = Quota(4, WEEK)

    @classmethod
    def with_domain(cls, certificates: int) -> Bounds:
        """So many of a registered domain in a week."""
        return cls(domain=Quota(certificates, WEEK))

    @property
    def part(self) -> Quota:
        """Of one credential in all."""
        return self.all._replace(most=max(1, self.all.most * 2 // 3))

    @property
    def share(self) -> Quota:
        """Of one credential in one domain."""
        return self.domain._replace(most=max(1, self.domain.most * 8 // 9))

    def of_credential(self, limits: Limits) -> tuple[Quota, Quota]:
        """In an hour, and in a week."""
        hour, week, hostnames = self.hour.most, self.week.most, limits.hostnames
        if hostnames is not None:
            hour, week = min(hour, hostnames + 5), min(week, 3 * hostnames + 10)
        return (
            Quota(limits.orders_per_hour or hour, self.hour.seconds),
            Quota(limits.orders_per_week or week, self.week.seconds),
        )


class Token(NamedTuple):
    """Of one bucket. ``why`` says to a person that it is empty. ``is_spent_by``: an ATTEMPT,
    whatever becomes of it; an ORDER that the CA takes; or a CERTIFICATE that comes of it."""

    bucket: str
    quota: Quota
    why: str
    is_spent_by: str


ATTEMPT, ORDER, CERTIFICATE = "attempt", "order", "certificate"
ALL = "all"


class Turns:
    """One thread at a time. Instants are seconds since 1970."""

    def __init__(self, bounds: Bounds = Bounds()):
        self._bounds = bounds
        self._full_at: dict[str, float] = {}  # when a bucket is full again; those are missing
        self._held: dict[str, tuple[float, str]] = {}  # domain: until when, and why

    def needed(self, hostname, agent, limits: Limits) -> list[Token]:
        """What a first order takes. ``agent`` None is the gateway, whose names count for nobody."""
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
            Token(f"part {key}", bounds.part,
                  "more new hostnames than one credential gets of the CA's orders", ORDER),
            Token(f"share {key} {domain}", bounds.share,
                  f"more new hostnames of {domain} than one credential gets certificates for in a "
                  f"week ({bounds.share.most})", CERTIFICATE),
            Token(f"hour {key}", hour, f"{more} an hour ({hour.most})", ATTEMPT),
            Token(f"week {key}", week, f"{more} a week ({week.most})", ATTEMPT),
        ]  # fmt: skip

    def of_renewal(self) -> list[Token]:
        return [Token(ALL, self._bounds.all, "", ORDER)]

    def of_certificate(self, hostname) -> Token:
        """What a certificate that came takes: the CA gives few for one set of names."""
        quota = self._bounds.hostname
        why = f"{quota.most} certificates in a week were ordered for it, and are gone"
        return Token(f"name {hostname}", quota, why, CERTIFICATE)

    def wait(self, token: Token, now, ahead=0) -> float:
        """Seconds until the bucket has one, when so many others have been taken before; 0 if it has
        one."""
        most, interval = token.quota.most, token.quota.interval
        full_at = max(self._full_at.get(token.bucket, now), now) + ahead * interval
        # Times are rounded, so a thousandth of a token may be missing.
        return max(0.0, full_at - now - (most - 0.999) * interval)

    def take(self, token: Token, now) -> bool:
        """Whether it was taken. If there is none, the bucket stays empty and owes nothing: hundreds
        of renewals that come at once delay first orders by no more than it takes to fill."""
        if self.wait(token, now) > 0:
            return False
        full_at = max(self._full_at.get(token.bucket, now), now)
        self._full_at[token.bucket] = full_at + token.quota.interval
        if len(self._full_at) > MOST_BUCKETS:
            self._forget(now)
        return True

    def give_back(self, token: Token):
        if token.bucket in self._full_at:
            self._full_at[token.bucket] -= token.quota.interval

    def _forget(self, now):
        """Buckets that are full; and if there are too many others, those that are nearly."""
        left = sorted((at, bucket) for bucket, at in self._full_at.items() if at > now)
        self._full_at = {bucket: at for at, bucket in left[-(MOST_BUCKETS * 9 // 10) :]}

    # What the CA has said of a domain

    def hold(self, domain, until, why):
        """Nothing is to be ordered for what lies beneath a domain."""
        self._held[domain] = (until, why)
        if len(self._held) > MOST_HELD:
            del self._held[min(self._held, key=lambda name: self._held[name][0])]

    def held(self, hostname, now) -> tuple[float, str]:
        """Until when nothing is to be ordered for a hostname, and why; (0, "") if that is over."""
        labels = hostname.split(".") if self._held else ()
        above = (".".join(labels[first:]) for first in range(1, len(labels)))
        held = (self._held[name] for name in above if name in self._held)
        return max((entry for entry in held if entry[0] > now), default=(0.0, ""))

    def all_held(self, now) -> list[tuple[str, float, str]]:
        """Domain, until when, and why."""
        return sorted((name, *entry) for name, entry in self._held.items() if entry[0] > now)

    def release(self, hostname):
        """The operator wants one now, and knows why."""
        self._held = {d: held for d, held in self._held.items() if not hostname.endswith(f".{d}")}

    # Clocks, and restarts

    def shift(self, seconds):
        """The clock was set forward by so many seconds, back if they are negative: each bucket
        holds what it held."""
        self._full_at = {bucket: at + seconds for bucket, at in self._full_at.items()}
        self._held = {name: (at + seconds, why) for name, (at, why) in self._held.items()}

    def as_dict(self, now) -> dict:
        """What has to outlive a restart, for JSON."""
        self._forget(now)
        self._held = {name: held for name, held in self._held.items() if held[0] > now}
        return {"full_at": dict(self._full_at), "held": dict(self._held), "at": now}

    def restore(self, kept, now):
        """Take what as_dict() made. Values that make no sense count as missing; no bucket is
        further from full than empty, nor a domain held for longer than a CA asks for: else it was
        written with another clock."""
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
