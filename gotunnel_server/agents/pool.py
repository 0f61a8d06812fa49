"""A pool: agents of one credential that share a hostname, and the choice of one for each visit.

A visit goes to the member with the fewest visits at the time, relative to its weight (least
connections). Members that are equal in that take turns, a heavy one more often (smooth weighted
round robin, as in nginx). With ``sticky`` a visitor comes back to its member as long as that can
take visits: it is found by the member's token in a cookie, or by the visitor's address (rendezvous
hashing: a member that comes or goes moves only the visitors that it gets or had).

Members that most likely cannot serve are passed over, unless there are no others:

    not well    its agent has found the target unwell (health checks)
    silent      its link was asked for a sign of life, and has not answered yet
    refused     its agent did not reach the target for a visit (passive health): for FIRST_PASS
                seconds, twice as long each time, MOST_PASS at most. Then one visit tries it, the
                others go on passing it over until that one is answered.

A Pool does not change. The Registry replaces it when an agent joins or leaves, and the table of
routes has the new one. What belongs to a member and to its visits goes from one to the next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from time import monotonic
from typing import Any, NamedTuple

from gotunnel_agent.common.addresses import counted_by

from ..routes import ADDRESS, COOKIE, Route, Tunnel
from .registration import Agent, Pooled

log = logging.getLogger("gotunnel.pool")

# Agents of a pool. Each choice looks at all of them, for half a microsecond each: with so many it
# takes a tenth of a millisecond.
MOST_MEMBERS = 256
# The words for a member's state.
READY, UNWELL, SILENT, PASSED_OVER = "ready", "unwell", "silent", "passed over"
# Seconds for which a member is passed over after its target was not reached: a target that restarts
# is back in a second or two, and one visit in MOST_PASS shows soon enough that it is.
FIRST_PASS, MOST_PASS = 1, 30


class Terms(NamedTuple):
    """What all members of a pool have in common. ``policy`` is what the agents have sent of it."""

    credential: str
    mode: str
    sticky: str
    policy: Any

    @property
    def owner(self) -> str:
        """Differs if any of them does. So several gateways, each of which may have seen another
        agent first, have the hostname for one of two pools that differ, not each for another."""
        text = json.dumps([*self[1:3], _canonical(self.policy)], sort_keys=True)
        return f"{self.credential}:{hashlib.sha256(text.encode()).hexdigest()}"


class Member:
    """One agent of a pool: see routes.Member. Its figures are guarded by its Pool's lock."""

    def __init__(self, route: Route, weight: int, token: str):
        self.route = route
        self.weight = weight
        self.token = token
        self.visits = 0  # that it has now
        self.turn = 0  # for ties: grows by the weight with each tie, and falls when it is chosen
        self.refusals = 0  # in a row: visits whose target was not reached
        self.passed_until = 0.0  # monotonic; of a member with refusals
        self.silent_since = -math.inf  # monotonic; past as soon as its session hears something

    def __repr__(self) -> str:
        return f"<Member {self.route.tunnel.agent} {self.visits} visits>"

    @property
    def is_well(self) -> bool:
        return self.route.tunnel.well(self.route.hostname)

    @property
    def is_silent(self) -> bool:
        return self.silent_since > self.route.tunnel.heard_at

    @property
    def is_ready(self) -> bool:
        """Whether nothing is known that speaks against it."""
        return self.refusals == 0 and not self.is_silent and self.is_well

    @property
    def state(self) -> str:
        """In a word, for people."""
        if not self.is_well:
            return UNWELL
        if self.is_silent:
            return SILENT
        return PASSED_OVER if self.refusals else READY


class Pool:
    """The agents that share a hostname: see routes.Pool."""

    def __init__(
        self,
        terms: Terms,
        members: tuple[Member, ...],
        read_by: object = None,
        lock: threading.Lock | None = None,
        now: Callable[[], float] = monotonic,
        owner: str = "",
    ):
        """``read_by``: what has made the policy of the agents' rules and the gateway's defaults.
        ``lock`` guards the members' figures: that of the Pool which this one replaces."""
        self.members = members
        self.owner, self.sticky = owner or terms.owner, terms.sticky
        self._terms = terms
        self._read_by = read_by
        self._lock = lock or threading.Lock()
        self._now = now

    # For visits

    def well(self) -> bool:
        """Whether any member's target is well."""
        return any(member.is_well for member in self.members)

    def key(self, address: str, token: str = "") -> str:
        """By what a visitor finds its member again, for choose(): its token or its address; "" if
        it has no member."""
        if self.sticky == ADDRESS:
            return str(counted_by(address)) if address else ""
        return token if self.sticky == COOKIE else ""

    def choose(
        self, key: str = "", but: Collection[object] = (), bound: Tunnel | None = None
    ) -> Member | None:
        """The member for a visit, which counts as its visit until leave(); None if all are in
        ``but``. ``key``: see key(). ``bound``: a login binds the visitor to that tunnel's streams
        (visitors/login.py), so it is taken if it is here."""
        now = self._now()
        with self._lock:
            rest = [member for member in self.members if member not in but] if but else self.members
            if not rest:
                return None
            member = next(
                (each for each in rest if each.route.tunnel is bound), None
            ) or self._best(_fittest(rest, now), key)
            member.visits += 1
            if member.refusals and member.passed_until <= now:
                member.passed_until = now + _pass(member.refusals)  # only this visit tries it
        return member

    def _best(self, members: Collection[Member], key: str) -> Member:
        if key and self.sticky == ADDRESS:
            return max(members, key=lambda member: _score(key, member))
        if key and self.sticky == COOKIE:
            for member in members:
                if member.token == key:
                    return member
        return _least_busy(members)

    def leave(self, member: Member) -> None:
        """A visit of that member is over."""
        with self._lock:
            member.visits -= 1

    def refused(self, member: Member) -> None:
        """The agent did not reach its target."""
        now = self._now()
        with self._lock:
            member.refusals += 1
            member.passed_until = now + _pass(member.refusals)
            is_first = member.refusals == 1
        if is_first:
            log.info("%s: %s did not reach its target, and is passed over at times until it does",
                     member.route.hostname, member.route.tunnel)  # fmt: skip

    def reached(self, member: Member) -> None:
        """The target has answered."""
        if member.refusals:  # nearly never: spare each answer the lock
            with self._lock:
                was_passed, member.refusals = member.refusals > 0, 0
            if was_passed:
                log.info("%s: %s reaches its target again",
                         member.route.hostname, member.route.tunnel)  # fmt: skip

    def silent(self, member: Member) -> None:
        """The agent was asked for a sign of life, and has not answered soon."""
        was_silent, member.silent_since = member.is_silent, self._now()
        if not was_silent:
            log.info("%s: %s is silent, and is passed over until something comes from it",
                     member.route.hostname, member.route.tunnel)  # fmt: skip

    # For the Registry, which calls them one at a time

    def update(self, route: Route) -> Route | None:
        """Take a member's Route in place of the one that it has; None if its tunnel is not here."""
        for member in self.members:
            if member.route.tunnel is route.tunnel:
                member.route = route._replace(pool=None)
                return member.route
        return None

    def in_the_way(self, newcomer: Pool) -> tuple[Tunnel, str] | None:
        """As Route.in_the_way(). ``newcomer`` is the pool of one agent that wants to join. An agent
        that comes back takes the place of its old session (takeover.py)."""
        agent = newcomer.members[0].route.tunnel.agent
        for member in self.members:
            if agent.is_same_process(member.route.tunnel.agent):
                return member.route.tunnel, ""
        why = self._why_not(newcomer)
        return (self.members[0].route.tunnel, why) if why else None

    def _why_not(self, newcomer: Pool) -> str:
        """Why the agent of another pool cannot join; "" if it can."""
        mine, terms = self._terms, newcomer._terms
        if terms.credential != mine.credential:
            return "by a pool of another credential"
        for name in ("mode", "sticky"):
            there, here = getattr(mine, name), getattr(terms, name)
            if there != here:
                return f"by a pool with {name} {there or 'off'}, and this agent has {here or 'off'}"
        if newcomer.owner != self.owner:
            return (
                f"by a pool with another policy ({', '.join(_differing(mine.policy, terms.policy))}"
                "): the agents of a pool need the same one"
            )
        if len(self.members) >= MOST_MEMBERS:
            return f"by a pool of {MOST_MEMBERS} agents, the most that one can have"
        return ""

    def joined(self, there: Route, newcomer: Pool) -> Route:
        """The hostname's Route with the newcomer. ``there``: the one that it has. The policy stays
        the one that is there, and so do its counts of visits. But if the gateway has other defaults
        now, the newcomer's has them."""
        read_by, policy = self._read_by, there.policy
        if newcomer._read_by is not read_by:
            read_by, policy = newcomer._read_by, newcomer.members[0].route.policy
        members = (*self.members, *newcomer.members)
        return self._route(there._replace(policy=policy), members, read_by)

    def without(self, there: Route, tunnels: Collection[Tunnel]) -> Route | None:
        """The hostname's Route when these tunnels are gone; None if no member is left."""
        left = tuple(member for member in self.members if member.route.tunnel not in tunnels)
        if len(left) == len(self.members):
            return there
        return self._route(there, left, self._read_by) if left else None

    def _route(self, there: Route, members: tuple[Member, ...], read_by: object) -> Route:
        pool = Pool(self._terms, members, read_by, self._lock, self._now, self.owner)
        ports = (member.route.port for member in members if member.route.port is not None)
        first = members[0].route
        return first._replace(policy=there.policy, port=next(ports, None), pool=pool)


def with_pool(route: Route, pooled: Pooled, agent: Agent) -> Route:
    """The Route of an agent that asks for a pool, of which it is the only member until it joins
    another."""
    kind, issuer = agent.identity.credential
    terms = Terms(f"pool:{kind}:{issuer}", route.mode, pooled.sticky, pooled.policy)
    member = Member(route, pooled.weight, _token(route.hostname, agent.instance))
    return route._replace(pool=Pool(terms, (member,), pooled.read_by))


def _token(hostname: str, instance: str) -> str:
    """128 bits by which a visitor's cookie names the agent. They need no key: the instance is
    random and stays between agent and gateways, each of which makes the same token of it. A token
    of another hostname does not fit."""
    return hashlib.sha256(f"gotunnel pool\0{hostname.lower()}\0{instance}".encode()).hexdigest()[
        :32
    ]


def _pass(refusals: int) -> float:
    """Seconds for which a member is passed over after so many refusals in a row."""
    return min(FIRST_PASS * 2.0 ** min(refusals - 1, 10), MOST_PASS)


def _fittest(members: Collection[Member], now: float) -> Collection[Member]:
    """The members that can take a visit; those with the least against them if none can."""
    # Nearly always all can. Each term is cheap: heard_at is an attribute, unwell mostly empty.
    faults = [
        4 * (not member.is_well)
        + 2 * member.is_silent
        + (member.refusals > 0 and member.passed_until > now)
        for member in members
    ]
    least = min(faults)
    if least == max(faults):
        return members
    return [member for member, fault in zip(members, faults, strict=True) if fault == least]


def _least_busy(members: Collection[Member]) -> Member:
    """The member with the fewest visits relative to its weight. Ties are broken in turn, which the
    members' ``turn`` counts."""
    least = min(member.visits / member.weight for member in members)
    ties = [member for member in members if member.visits / member.weight == least]
    if len(ties) == 1:
        return ties[0]
    for member in ties:
        member.turn += member.weight
    chosen = max(ties, key=lambda member: member.turn)
    chosen.turn -= sum(member.weight for member in ties)
    return chosen


def _score(key: str, member: Member) -> float:
    """The rank of a member for a visitor's address (weighted rendezvous hashing)."""
    digest = hashlib.blake2b(f"{key}\0{member.token}".encode(), digest_size=8).digest()
    return member.weight / -math.log((int.from_bytes(digest, "big") + 1) / (2**64 + 1))


def _canonical(value: Any) -> Any:
    """A policy in which equal numbers are written alike."""
    if isinstance(value, dict):
        return {key: _canonical(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_canonical(each) for each in value]
    return float(value) if type(value) is int else value


def _differing(there: Any, here: Any) -> Iterable[str]:
    """The names of the rules in which two policies differ."""
    there, here = (each if isinstance(each, Mapping) else {} for each in (there, here))
    return sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
