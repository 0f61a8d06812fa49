"""Decides which agent gets a hostname that another session holds.

A hostname belongs to one session at a time, and is free as soon as that session ends. For an agent
that comes back that is often too late: its link was cut, and to the gateway the old session is only
silent. So when an agent claims a hostname that another session holds, the gateway finds out:

    same credential, same instance    The agent itself has come back: the old session ends at once.
                                      If the gateway has asked the agent for a new session, or the
                                      agent says that its old one still runs (OVERLAP), the visits
                                      of the old session go on.
    any other agent                   The holder's agent is asked for a sign of life. If it answers
                                      within ANSWER_TIMEOUT it keeps the hostname, else its session
                                      is replaced.

So two agents with one configuration do not take hostnames from each other for ever: the first one
keeps them while it lives. The other one is told which hostnames are taken, and tries again later.

A claim gets all hostnames or none, unless it is partial: then it goes on without the hostnames that
others keep.

Where several gateways are one, the holder may be at another one. It is asked through that gateway,
by the same rules, and the claim waits as long as the gateways have not decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from ..routes import HostnameTaken, NotDecided, Route, Undecided
from .claims import Claims
from .registration import Agent

# Seconds until a claim is looked at again that other gateways decide, at first; doubled up to LOOK.
# They answer in milliseconds.
FIRST_LOOK = 0.01
LOOK = 0.1  # seconds between two attempts: a session may have ended, or its agent answered
# Seconds that a claim waits for holders to end. A demultiplexer, or the machine, may be busy.
ENDING_TIMEOUT = 10
# Seconds that a claim waits for other gateways. Agents of ours wait 30 s for an answer.
UNDECIDED_TIMEOUT = 20
MOMENT = 0.05  # seconds that the worker waits for holders by itself: most end in milliseconds


class Claim:
    """One agent's claim to hostnames. One thread at a time."""

    def __init__(
        self,
        claims: Claims,
        agent: Agent,
        routes: Mapping[str, Route],
        permit: Callable[[Mapping[str, Route]], object],
        partial: bool = False,
    ):
        """``agent`` wants ``routes``, by hostname. ``permit`` is as for Registry.claim()."""
        self.routes = routes  # those that are not denied
        self.denied: dict[str, str] = {}  # by hostname: why the claim goes on without it
        self.holders: dict[str, Any] = {}  # of the denied hostnames that others hold
        self._claims = claims
        self._agent = agent
        self._permit = permit
        self._partial = partial
        self.look = LOOK  # seconds until the next attempt, if the last one has decided nothing
        self._soon = FIRST_LOOK
        self._asked: dict[Any, float] = {}  # holder: monotonic time since when it is asked
        self._deadline = monotonic() + ENDING_TIMEOUT
        self._patience = monotonic() + UNDECIDED_TIMEOUT
        self._replaced: set[Any] = set()  # holders that were told to end

    def attempt(self) -> bool:
        """Take the hostnames if that can be decided now. False: call again in ``look`` seconds.
        Raises HostnameTaken, also if all were denied, and what ``permit`` raises."""
        self.look = LOOK
        while True:
            try:
                return self._attempt()
            except HostnameTaken as taken:
                self._claims.give_up(next(iter(self.routes.values())).tunnel, taken.holders)
                if not self._partial:
                    raise
                self.denied |= taken.one_by_one()
                if taken.tunnels:
                    self.holders |= taken.holders
                self.routes = {
                    hostname: route
                    for hostname, route in self.routes.items()
                    if hostname not in taken.holders
                }
                if not self.routes:
                    raise

    def _attempt(self) -> bool:
        """As attempt(). HostnameTaken names the hostnames that others keep, or all that are held if
        the claim is not partial."""
        try:
            self._claims.claim(self.routes, self._permit)
            return True
        except Undecided as undecided:
            if monotonic() > self._patience:
                raise NotDecided(undecided) from None
            self.look, self._soon = self._soon, min(2 * self._soon, LOOK)
            return False
        except HostnameTaken as taken:
            if not taken.tunnels or monotonic() > self._deadline:
                raise
            others = [
                holder for holder in taken.tunnels if not self._agent.is_same_process(holder.agent)
            ]
            for holder in others:
                if holder not in self._asked:
                    self._asked[holder] = holder.ask()
                elif holder.has_answered(self._asked[holder]):
                    if self._partial:
                        raise taken.of(holder) from None
                    raise
            overlaps = self._agent.overlaps or all(holder.moving for holder in taken.tunnels)
            if not others and overlaps:
                try:
                    self._claims.claim(self.routes, self._permit, instead_of=taken.tunnels)
                except Undecided:
                    return False
                successor = next(iter(self.routes.values())).tunnel
                for holder in taken.tunnels:
                    holder.step_aside(successor)
                return True
            # While another agent may keep a hostname, the old session of this agent goes on: it may
            # still serve.
            if not others:
                replaced = taken.tunnels - self._replaced
                self._replaced |= replaced
                for holder in replaced:
                    holder.replace(f"its agent has come back, from {self._agent.host}")
                if replaced and all(holder.gone.wait(MOMENT) for holder in taken.tunnels):
                    return self._attempt()
            return False
